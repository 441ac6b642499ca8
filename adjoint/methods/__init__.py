"""How one step is taken. A new method is one new file here and one line in the registry."""

from __future__ import annotations

from .protocol import Method
from .runge_kutta import ExplicitRungeKutta
from .tableau import Tableau
from .tableaux import TABLEAUX

__all__ = ["METHODS", "ExplicitRungeKutta", "Method", "Tableau"]

#: every method that ``method="name"`` knows
METHODS: dict[str, Method] = {name: ExplicitRungeKutta(tableau) for name, tableau in TABLEAUX.items()}
