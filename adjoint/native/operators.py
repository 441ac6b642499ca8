"""How elements of the results of ATen operators follow from elements of their arguments: all readers, by the name of the operator."""

from __future__ import annotations

from . import (
    operators_activations,
    operators_indexing,
    operators_linalg,
    operators_pointwise,
    operators_products,
    operators_reductions,
    operators_views,
    operators_writing,
)
from .elements import Reader

__all__ = ["READERS"]

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
