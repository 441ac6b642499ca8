"""Memory that compiled code reads and writes: how numbers lie there, and its pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

__all__ = ["FEW_BYTES", "as_given", "bytes_of", "in_large_pages", "in_parts", "plain", "put_together"]

#: bytes of a large page
_PAGE = 2**21
#: bytes from which on memory is asked for in large pages: below, it is mostly that of a solve before
FEW_BYTES = 2**22


@cache
def _advise() -> ctypes._NamedFuncPointer | None:
    """``madvise`` of the C library; None where there are no large pages to be asked for."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def in_large_pages(x: Tensor) -> None:
    """Ask the system to lay out the memory of ``x``, not yet written to, in large pages: the first touch of small ones costs as much as
    what is written there. It may decline."""
    if x.nbytes >= FEW_BYTES and x.device.type == "cpu" and (advise := _advise()) is not None:
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        length = (x.data_ptr() + x.nbytes) // _PAGE * _PAGE - start
        if length > 0:
            advise(start, length, mmap.MADV_HUGEPAGE)


def plain(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` without derivatives, in this dtype, its numbers side by side as they are: a lazy negation is not to be seen by its address."""
    x = x.detach()
    if (dtype is None or x.dtype is dtype) and x.is_contiguous() and not x.is_neg():
        return x
    x = x.resolve_neg()
    return (x if dtype is None else x.to(dtype)).contiguous()


def as_given(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`plain` of `in_parts` of ``x``, to be read by its address: ``x`` itself where that is so."""
    return x if x.dtype is dtype and x.is_contiguous() and not x.is_neg() else plain(in_parts(x), dtype)


def bytes_of(x: Tensor) -> bytes:
    """What stands in the memory of a real tensor."""
    x = x if x.is_contiguous() and not x.is_neg() else plain(x)
    return ctypes.string_at(x.data_ptr(), x.nbytes)


def in_parts(x: Tensor) -> Tensor:
    """``x``, and where it is complex its real and imaginary parts, (..., 2)."""
    return torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x


def put_together(bar: Tensor, x: Tensor) -> Tensor:
    """The cotangent of ``x`` from that of `in_parts` of it."""
    if x.is_complex():
        return torch.view_as_complex(bar.reshape(*x.shape, 2))
    return bar if bar.shape == x.shape else bar.reshape(x.shape)
