"""Memory of records: where it is new, its first touch costs as much as what is written there, unless its pages are large."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

__all__ = ["in_large_pages"]

#: bytes of a large page
_PAGE = 2**21
#: bytes from which on memory is asked for in large pages: below, it is mostly that of a solve before
_MOST = 2**22


@cache
def _advise() -> ctypes._NamedFuncPointer | None:
    """``madvise`` of the C library; None where there are no large pages to be asked for."""
    found = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
    if found is not None:
        found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def in_large_pages(x: Tensor) -> Tensor:
    """``x``, not yet written to, whose memory the system is asked to lay out in large pages. It may decline."""
    if x.nbytes >= _MOST and x.device.type == "cpu" and (advise := _advise()) is not None:
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        length = (x.data_ptr() + x.nbytes) // _PAGE * _PAGE - start
        if length > 0:
            advise(start, length, mmap.MADV_HUGEPAGE)
    return x
