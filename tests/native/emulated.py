"""Kernels of a device run by the processor: their text as it is, after a header that says what a compiler for devices knows by itself, and
threads one after the other."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from adjoint.native.build import library

BEFORE = """
struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx, blockDim;
#define __global__
#define __grid_constant__
"""

AFTER = """
template <unsigned... I> struct Numbers {};
template <unsigned N, unsigned... I> struct Upto : Upto<N - 1, N - 1, I...> {};
template <unsigned... I> struct Upto<0, I...> { typedef Numbers<I...> type; };
template <class T> struct Plain { typedef T type; };
template <class T> struct Plain<const T> { typedef T type; };
template <class... A, unsigned... I> static void called(void (*kernel)(A...), void** a, Numbers<I...>) {
  kernel(*(typename Plain<A>::type*)a[I]...);
}
template <class... A> static void all(void (*kernel)(A...), long blocks, long threads, void** a) {
  blockDim.x = threads;
  for (long b = 0; b < blocks; b++) for (long t = 0; t < threads; t++) {
    blockIdx.x = b; threadIdx.x = t;
    called(kernel, a, typename Upto<sizeof...(A)>::type());
  }
}
#define BY_HOST(kernel) extern "C" void by_host_##kernel(long blocks, long threads, void** a) { all(kernel, blocks, threads, a); }
BY_HOST(measure) BY_HOST(solve) BY_HOST(fill_up)
#if !DISPLACED
BY_HOST(sweep) BY_HOST(add_up)
#endif
"""


class Emulator:
    """The launcher: ``launched``, names of kernels and how many threads they had; ``texts`` of programs that were made."""

    #: of all of them: programs keep the launcher with which they were made
    block = 32
    launched: ClassVar[list[tuple[str, int]]] = []
    texts: ClassVar[list[str]] = []

    def __call__(self, text: str, device: torch.device) -> Any:
        self.texts.append(text)
        loaded = library(BEFORE + text + AFTER, True)

        def launch(name: str, threads: int, arguments: Sequence[Any]) -> None:
            self.launched.append((name, threads))
            at = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(x) for x in arguments])
            blocks = -(-threads // Emulator.block)
            getattr(loaded, f"by_host_{name}")(ctypes.c_long(blocks), ctypes.c_long(Emulator.block), at)

        return launch
