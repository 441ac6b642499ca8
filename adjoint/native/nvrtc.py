"""From text to code of CUDA devices: NVRTC, and the folder that keeps what it made. No device is needed for that."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .build import NoCompiler, cache_folder, kept

__all__ = ["cubin", "nvrtc"]

_FLAGS = ("--std=c++17", "--device-as-default-execution-space", "--extra-device-vectorization", "-w")
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def _places() -> Iterator[str]:
    """Where the library may be: what ``ADJOINT_NVRTC`` names, the loader's paths, the wheels of NVIDIA, a toolkit."""
    given = os.environ.get("ADJOINT_NVRTC")
    if given:
        yield given
    yield from _NAMES
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(x) for x in wheels.submodule_search_locations or ()] if wheels else []
    for folder in folders:
        yield from (str(x) for part in ("*/lib", "*/bin") for x in sorted(folder.glob(f"{part}/libnvrtc.so*"), reverse=True))
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    yield from (f"{toolkit}/lib64/{name}" for name in _NAMES)


@cache
def nvrtc() -> ctypes.CDLL:
    """The library. Raises `NoCompiler`."""
    for place in _places():
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise NoCompiler("libnvrtc was not found: it comes with the CUDA builds of PyTorch, or `pip install nvidia-cuda-nvrtc`")


@cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def cubin(text: str, capability: tuple[int, int]) -> bytes:
    """The code of ``text`` for devices of this capability, from the folder where it was made before. Raises `NoCompiler`."""
    flags = (*_FLAGS, f"--gpu-architecture=sm_{capability[0]}{capability[1]}")
    key = hashlib.sha256("\n".join([text, *flags, _version()]).encode()).hexdigest()[:32]
    target = cache_folder() / f"{key}.cubin"
    return kept(target, lambda path: path.write_bytes(_compiled(text, flags))).read_bytes()


def _compiled(text: str, flags: tuple[str, ...]) -> bytes:
    lib, program = nvrtc(), ctypes.c_void_p()
    _checked(lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"solve.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(flags))(*[x.encode() for x in flags])
        if lib.nvrtcCompileProgram(program, len(flags), given):
            raise NoCompiler(f"NVRTC {_version()} failed: {_first_error(_read(program, 'ProgramLog').decode())}")
        return _read(program, "CUBIN")
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _checked(getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    room = ctypes.create_string_buffer(size.value)
    _checked(getattr(nvrtc(), f"nvrtcGet{what}")(program, room))
    return room.raw


def _checked(status: int) -> None:
    if status:
        nvrtc().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NoCompiler(f"NVRTC: {nvrtc().nvrtcGetErrorString(status).decode()}")


def _first_error(log: str) -> str:
    return next((line for line in log.splitlines() if re.search(r"\berror\b", line)), log[:300])
