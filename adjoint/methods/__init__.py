"""How one step is taken. A new method is one new file here and one line in the registry."""

from __future__ import annotations

from .abm import Adams
from .additive import AdditiveRungeKutta, AdditiveTableau
from .auto import AutoSwitch
from .bdf import BDF, Bdf
from .collocation import IMPLICIT_TABLEAUX, CollocationTableau, FullyImplicitRungeKutta
from .dirk import DiagonallyImplicitRungeKutta, DirkTableau
from .family import Method, TableauMethod
from .rosenbrock import Rosenbrock
from .runge_kutta import ExplicitRungeKutta
from .tableau import Tableau
from .tableaux import TABLEAUX
from .tableaux_additive import ADDITIVE_TABLEAUX
from .tableaux_dirk import DIRK_TABLEAUX
from .tableaux_rosenbrock import ROSENBROCK_TABLEAUX, RosenbrockTableau

__all__ = [
    "DAE_METHODS",
    "IMEX_METHODS",
    "METHODS",
    "SWITCHING_METHODS",
    "Adams",
    "AdditiveRungeKutta",
    "AdditiveTableau",
    "AutoSwitch",
    "Bdf",
    "CollocationTableau",
    "DiagonallyImplicitRungeKutta",
    "DirkTableau",
    "ExplicitRungeKutta",
    "FullyImplicitRungeKutta",
    "Method",
    "Rosenbrock",
    "RosenbrockTableau",
    "Tableau",
    "TableauMethod",
]

#: every method that ``method="name"`` knows
METHODS: dict[str, Method] = {
    **{name: ExplicitRungeKutta(tableau) for name, tableau in TABLEAUX.items()},
    **{name: DiagonallyImplicitRungeKutta(tableau) for name, tableau in DIRK_TABLEAUX.items()},
    **{name: Rosenbrock(tableau) for name, tableau in ROSENBROCK_TABLEAUX.items()},
    **{name: FullyImplicitRungeKutta(tableau) for name, tableau in IMPLICIT_TABLEAUX.items()},
    "abm": Adams(),
    "bdf": BDF,
}

#: pairs of methods that trajectories are switched between
SWITCHING_METHODS: dict[str, Method] = {
    "auto": AutoSwitch(METHODS["tsit5"], METHODS["kvaerno5"]),
}

#: those for equations ``F(t, y, y') = 0``
DAE_METHODS: dict[str, Method] = {
    "radau": FullyImplicitRungeKutta(IMPLICIT_TABLEAUX["radau5"], residual=True),
    "radau3": FullyImplicitRungeKutta(IMPLICIT_TABLEAUX["radauIIA3"], residual=True),
    "bdf": Bdf(residual=True),
}

#: those for right-hand sides in two parts, `adjoint.SplitFunction`
IMEX_METHODS: dict[str, Method] = {
    name: AdditiveRungeKutta(tableau)
    for name, tableau in ADDITIVE_TABLEAUX.items()
}
