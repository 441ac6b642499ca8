"""Emitted statements put through g++ and called, for one trajectory after the other or for several at once."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adjoint.native.text import header, vector_library

COMPILER = shutil.which("g++")
SIGNATURE = "(const S* y, const R* a0, const S* a1, const S* v, const R* const* k, S* o)"


def leaf_name(data: tuple) -> str:
    """State y, input 0 shared by all, input 1 by trajectory, cotangents v, tables k."""
    kind, *index = data
    if kind in ("y", "v"):
        return f"{kind}[{index[0]}]"
    array = f"a{index[0]}" if kind == "a" else f"k[{index[0]}]"
    return array if len(index) == 1 else f"{array}[{index[1]}]"


def compiled(folder: Path, body: str, dtype: torch.dtype, lanes: int, before: str = "") -> ctypes.CDLL:
    """A library with ``body`` as its function ``f``."""
    number = len(list(folder.glob("*.so")))  # a name of its own, for libraries are known by their names
    source, library = folder / f"f{number}.cpp", folder / f"f{number}.so"
    text = header(dtype == torch.float32, lanes) + before
    source.write_text(text + f'extern "C" void f{SIGNATURE} {{\n{body}\n}}\n')
    flags = ["-O0", "-march=native", "-fno-math-errno", "-std=c++17", "-Wall", "-Werror", "-Wno-unused-function"]
    flags += ["-Wno-unused-variable", "-Wno-unused-but-set-variable"]
    flags += [*vector_library()] if lanes else []
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(library), *flags], check=True)
    return ctypes.CDLL(str(library))


def called(
    library: ctypes.CDLL,
    lanes: int,
    count: int,
    y: Tensor,
    shared: Tensor,
    own: Tensor,
    v: Tensor,
    tables: Sequence[Tensor] = (),
) -> Tensor:
    """Results (B, count) for y (B, m): blocks of lanes have the lanes last."""
    width, rows = max(lanes, 1), y.shape[0]
    extra = -rows % width
    pointers = (ctypes.c_void_p * max(len(tables), 1))(*[x.data_ptr() for x in tables])

    def block(x: Tensor, start: int) -> Tensor:
        padded = torch.cat([x, x[:1].expand(extra, *x.shape[1:])])
        return padded[start : start + width].T.contiguous()

    found = []
    for start in range(0, rows, width):
        parts = [_aligned(block(x, start)) for x in (y, own, v)]
        out = _aligned(torch.zeros(count, width, dtype=y.dtype))
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in (parts[0], shared, *parts[1:])]
        library.f(*addresses, pointers, ctypes.c_void_p(out.data_ptr()))
        found.append(out.T)
    return torch.cat(found)[:rows]


def _aligned(x: Tensor) -> Tensor:
    """A copy that starts at a multiple of 64 bytes."""
    room = torch.empty(x.numel() + 64, dtype=x.dtype)
    start = (-room.data_ptr() % 64) // x.element_size()
    out = room[start : start + x.numel()].view(x.shape)
    return out.copy_(x)
