"""From C++ text to functions that can be called: the compiler, the folder that keeps what it made, loading."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

__all__ = ["LEVELS", "NoCompiler", "cache_folder", "compiler", "kept", "library", "spending", "spent"]

_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-w", "-pthread")
#: of functions that are inlined into nothing, and of the engine
LEVELS = {False: "-O1", True: "-O2"}


class _Spent(threading.local):
    """Seconds that this thread has spent on making code."""

    seconds = 0.0


spent = _Spent()


@contextmanager
def spending() -> Iterator[None]:
    """What is done here makes code."""
    start, before = time.perf_counter(), spent.seconds
    try:
        yield
    finally:
        # what is inside of another one counts once
        spent.seconds = before + time.perf_counter() - start


class NoCompiler(Exception):
    """There is no C++ compiler, or it failed; the message says which."""


@cache
def compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: that of the environment variable ``CXX``, g++, clang++, or the one of the package ``ziglang``."""
    if os.name != "posix":
        raise NoCompiler("native code is for Linux and macOS: long integers and threads are others here")
    given = os.environ.get("CXX")
    for name in (given, "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return (found,)
    try:
        import ziglang  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise NoCompiler("no C++ compiler was found (CXX, g++, clang++): install one, or `pip install torch-adjoint[native]`") from None
    return (sys.executable, "-m", "ziglang", "c++")


@cache
def _identity() -> str:
    """What compiled code depends on besides its text: compiler, processor, system."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(next((x for x in lines if x.startswith(key)), "") for key in ("model name", "flags"))
    except OSError:
        pass
    return "\n".join([*version[:1], processor, platform.system(), str(ctypes.sizeof(ctypes.c_long))])


@cache
def cache_folder() -> Path:
    """Where compiled code is kept between processes: ``ADJOINT_CACHE``, or ``adjoint`` in the user's cache folder.

    It belongs to the user alone, since what lies there is loaded and run; where that cannot be had, it is a folder for this process.
    """
    base = os.environ.get("ADJOINT_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adjoint")
    folder = Path(base)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _ours(folder) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="adjoint-"))


def _ours(path: Path) -> bool:
    """Whether nobody else could have written here."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def library(text: str, optimised: bool, links: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled ``text``, from the folder where it was made before. Raises `NoCompiler`."""
    flags = (*_FLAGS, LEVELS[optimised], "-march=native", *links)
    key = hashlib.sha256("\n".join([text, *flags, _identity()]).encode()).hexdigest()[:32]
    target = cache_folder() / f"{key}.so"
    return ctypes.CDLL(str(kept(target, lambda made: _compile(text, flags, made))))


def kept(target: Path, make: Callable[[Path], object]) -> Path:
    """A file of the folder, which is made where it is not there: under another name first, as others may look for it."""
    if target.exists() and _ours(target):
        return target
    handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    made = Path(name)
    try:
        make(made)
        os.chmod(made, 0o700)
        os.replace(made, target)
    finally:
        made.unlink(missing_ok=True)
    return target


def _compile(text: str, flags: tuple[str, ...], made: Path) -> None:
    source = made.with_suffix(".cpp")
    try:
        source.write_text(text)
        links = [x for x in flags if x.startswith("-l")]
        command = [*compiler(), *(x for x in flags if not x.startswith("-l")), str(source), "-o", str(made), *links]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoCompiler(f"{command[0]} failed: {next((x for x in done.stderr.splitlines() if 'error' in x), done.stderr[:300])}")
    finally:
        source.unlink(missing_ok=True)
