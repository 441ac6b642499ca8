"""The peers: one adapter module each, behind one protocol.

A module offers ``PACKAGES`` (what must be importable) and ``runners(case, device) -> list[Runner]``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

__all__ = ["PEERS", "Runner", "Stats", "load"]

PEERS = ("ours", "torchdiffeq", "torchode", "diffrax", "heyoka", "floor")


@dataclass(frozen=True)
class Stats:
    """Counts of the forward solve, per trajectory where the peer counts so (else arrays of one element); None: not known."""

    steps: np.ndarray | None = None
    accepted: np.ndarray | None = None
    rejected: np.ndarray | None = None
    n_fun: np.ndarray | None = None

    def summary(self) -> dict[str, dict[str, float] | None]:
        """Mean and maximum of each count."""

        def one(x: np.ndarray | None) -> dict[str, float] | None:
            return None if x is None else {"mean": float(np.mean(x)), "max": float(np.max(x))}

        return {name: one(getattr(self, name)) for name in ("steps", "accepted", "rejected", "n_fun")}


class Runner(Protocol):
    """One way to solve one case with one peer. Building it may be slow; ``forward`` and ``gradient`` are what is timed."""

    name: str  # unique in the report: "peer variant"
    peer: str

    def forward(self) -> Any:
        """Solve without derivatives; return the solution, computed to the end (synchronised)."""

    def gradient(self) -> Any:
        """Solve and differentiate the loss with respect to all parameters; return the gradients, synchronised."""

    def values(self) -> np.ndarray:
        """The solution, (T, *y0.shape)."""

    def gradients(self) -> list[np.ndarray]:
        """The gradients, one for each parameter array."""

    def stats(self) -> Stats: ...

    def memory(self, what: str) -> tuple[float, str] | None:
        """Peak bytes of ``"forward"`` or ``"gradient"`` above those in use before, and how they were measured."""


def load(names: Sequence[str]) -> tuple[dict[str, ModuleType], list[str]]:
    """The adapters whose packages are installed, and a line for each that is not."""
    unknown = [n for n in names if n not in PEERS]
    if unknown:
        raise SystemExit(f"unknown peer {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    found: dict[str, ModuleType] = {}
    skipped: list[str] = []
    for name in names or PEERS:
        module = importlib.import_module(f".{name}", __name__)
        try:
            for package in module.PACKAGES:
                importlib.import_module(package)
        except Exception as error:  # a half-installed peer fails in its own ways
            skipped.append(f"{name} skipped: `import {package}` failed ({type(error).__name__}: {error})")
        else:
            found[name] = module
    return found, skipped
