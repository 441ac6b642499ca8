"""What is left to be gained: the same method and its discrete adjoint written by hand in C++ for one system, with nothing around them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..workloads import Case
from . import Stats

PACKAGES = ()


def _library(system: str, lanes: int) -> Any:
    out = Path(tempfile.mkdtemp(prefix="adjoint-floor-")) / "floor.so"
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread", f"-DW={lanes}", f"-DSYSTEM={system}"]
    subprocess.run(["g++", *flags, str(Path(__file__).with_suffix(".cpp")), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def _pointer(x: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


class FloorRunner:
    """`floor.cpp`, so many trajectories at a time; threads as for the others."""

    peer = "floor"

    def __init__(self, case: Case, lanes: int) -> None:
        self.case, self.name = case, f"C++ by hand, {lanes} lanes" if lanes > 1 else "C++ by hand"
        self.solve = _library(case.workload, lanes).solve
        self.data = [np.ascontiguousarray(x) for x in (case.y0, case.params[0])]
        self.threads = min(int(os.environ.get("OMP_NUM_THREADS", "1")), case.size)

    def _run(self, gradient: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        y0, p = self.data
        y1, bar, steps = np.empty_like(y0), np.empty_like(p) if gradient else None, np.empty(len(y0), dtype=np.int64)
        end, rtol, atol = (ctypes.c_double(x) for x in (self.case.t_eval[-1], self.case.rtol, self.case.atol))
        self.solve(*map(_pointer, (y0, p, y1, bar, steps)), ctypes.c_long(len(y0)), end, rtol, atol, ctypes.c_int(self.threads))
        return y1, bar, steps

    def forward(self) -> Any:
        return self._run(False)[0]

    def gradient(self) -> Any:
        return self._run(True)[1]

    def values(self) -> np.ndarray:
        return np.stack([self.case.y0, self.forward()])

    def gradients(self) -> list[np.ndarray]:
        return [self.gradient()]

    def stats(self) -> Stats:
        return Stats(steps=self._run(False)[2])

    def memory(self, what: str) -> tuple[float, str] | None:
        return None


def runners(case: Case, device: str) -> list[FloorRunner]:
    """Of ensembles that are looked at once: one by one, and several at a time."""
    if device != "cpu":
        raise RuntimeError("written for the CPU")
    if not case.ensemble or len(case.t_eval) != 2 or case.t_eval[0] != 0.0:
        raise NotImplementedError("written for ensembles of which the end counts")
    return [FloorRunner(case, lanes) for lanes in ((1,) if case.size == 1 else (1, 8))]
