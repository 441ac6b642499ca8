"""The launcher of kernels on CUDA devices: NVRTC's code, loaded and launched by the driver's interface on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..system.remarks import remark
from .build import NoCompiler
from .calls import Launch
from .nvrtc import cubin

__all__ = ["CudaError", "on_cuda"]

#: threads of a block: few, as each has much in registers, and so that a handful of trajectories is spread over processors
_BLOCK = 64


class CudaError(RuntimeError):
    """The driver's interface failed."""


@cache
def _driver() -> ctypes.CDLL:
    """The driver's interface. Raises `NoCompiler`."""
    for name in ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NoCompiler("libcuda, which comes with NVIDIA's driver, was not found")


def _called(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        raise CudaError(f"{name}: {said} ({status}); without compile=True nothing of this is called")


@cache
def _context(index: int) -> ctypes.c_void_p:
    """The context that PyTorch has on a device."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _called("cuInit", ctypes.c_uint(0))
    _called("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _called("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


class _Current:
    """Within it the context of a device is that of this thread: ways back run in threads of their own."""

    def __init__(self, index: int) -> None:
        self.context = _context(index)

    def __enter__(self) -> None:
        _called("cuCtxPushCurrent_v2", self.context)

    def __exit__(self, *_: object) -> None:
        _called("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def _untried() -> None:
    """Once in a process."""
    remark(
        "compile=True on a CUDA device: these kernels are tested through an emulation and have not run on a GPU yet. Compare one solve, "
        "and its gradient, with compile=False before you rely on them",
        RuntimeWarning,
    )


def on_cuda(text: str, device: torch.device) -> Launch:
    """Launches kernels of ``text`` on a device. Raises `NoCompiler`."""
    _untried()
    index = torch.cuda.current_device() if device.index is None else device.index
    code, module = cubin(text, torch.cuda.get_device_capability(index)), ctypes.c_void_p()
    functions: dict[str, ctypes.c_void_p] = {}
    current = _Current(index)
    with current:
        _called("cuModuleLoadData", ctypes.byref(module), code)

    def launch(name: str, threads: int, arguments: Sequence[Any]) -> None:
        if not threads:
            return
        at = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(x) for x in arguments])
        stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
        sizes = (ctypes.c_uint(x) for x in (-(-threads // _BLOCK), 1, 1, _BLOCK, 1, 1, 0))
        with current:
            if name not in functions:
                functions[name] = ctypes.c_void_p()
                _called("cuModuleGetFunction", ctypes.byref(functions[name]), module, name.encode())
            _called("cuLaunchKernel", functions[name], *sizes, stream, at, None)

    return launch
