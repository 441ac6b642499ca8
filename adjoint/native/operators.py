"""How elements of the results of ATen operators follow from elements of their arguments: all readers, by the name of the operator."""

from __future__ import annotations

from . import (
    operators_activations,
    operators_complex,
    operators_indexing,
    operators_linalg,
    operators_pointwise,
    operators_products,
    operators_reductions,
    operators_views,
    operators_writing,
)
from .elements import Reader

__all__ = ["COMPLEX", "READERS"]

READERS: dict[str, Reader] = {
    **operators_pointwise.READERS,
    **operators_activations.READERS,
    **operators_views.READERS,
    **operators_indexing.READERS,
    **operators_writing.READERS,
    **operators_reductions.READERS,
    **operators_products.READERS,
    **operators_linalg.READERS,
}
#: where complex numbers are among arguments or results
COMPLEX: dict[str, Reader] = {**operators_complex.MOVING, **operators_complex.READERS}
