"""Solves and their ways back on a device: kernels of ``engine/device.hpp``, a thread for each trajectory, launched one after the other.

Only the launcher knows which device it is. Results of a round are looked at when it is over, to see who needs another one; within it
nothing waits for the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Launch
from .cuda import on_cuda

__all__ = ["LAUNCHERS", "DeviceEngine", "addressed", "kernels_of", "trimmed"]

#: for kernels of this text, on this device, by the type of the device
LAUNCHERS: dict[str, Callable[[str, torch.device], Launch]] = {"cuda": on_cuda}
#: a trajectory that needs another round, see ``device.hpp``
_FILLED = 9
#: numbers that one thread adds up
_ADDED = 64
#: bytes of what trajectories add to cotangents of shared inputs before it is added up
_MOST_TOTALS = 2**28
#: bytes of a record whose room is cut to what was needed
_LARGE = 2**20
#: steps of a round that keeps none
_UNLIMITED = 2**60


@dataclass(frozen=True)
class DeviceEngine:
    """Kernels of a program. ``saved``: bytes that a round leaves of a trajectory; ``shared``: cotangents of shared inputs."""

    launch: Launch
    saved: int
    shared: int
    #: as of `Engine`: functions are called within the text
    functions: dict[str, int]

    def rounds(
        self,
        call: Any,
        counts: Tensor,
        grid: Callable[[int, bool], dict[str, Tensor]],
        first: int,
        after: Callable[[], None],
    ) -> tuple[int, dict[str, Tensor]]:
        """The solve that ``call`` asks for, to its end.

        ``counts`` (9, B): what is written there; ``grid``: tensors for so many steps by name, and whether for the first ones, before which
        ``states`` has the initial one; ``first``: how many in the first round; ``after``: what is called behind each round. Results: how
        many steps the longest trajectory has, and tensors of these.
        """
        rows, status = call.rows, counts[3]
        keeps, most = bool(call.keep_grid), call.max_steps
        room = min(first, most) if keeps else _UNLIMITED
        saved = torch.empty((rows, self.saved) if keeps else (0, 1), dtype=torch.uint8, device=counts.device)
        rounds, which, left, start, longest = [], None, rows, 0, 0
        while True:
            steps = grid(room if keeps else 0, start == 0)
            self._point(call, steps, start)
            call.room = start + room
            chosen = ctypes.c_void_p(None if which is None else which.data_ptr())
            self.launch("solve", left, (call, chosen, ctypes.c_long(left), ctypes.c_void_p(saved.data_ptr()), ctypes.c_long(start)))
            rounds.append(steps)
            after()
            filled = status == _FILLED
            left, longest = torch.stack([filled.sum(), counts[1].max()]).tolist() if rows else (0, 0)
            if not left:
                break
            which = torch.nonzero(filled).reshape(-1)
            # each as long as all that is there already
            start += room
            room = max(min(start, most - start), 1)
        whole = rounds[0] if len(rounds) == 1 else {name: torch.cat([x[name] for x in rounds]) for name in rounds[0]}
        if keeps:
            whole = trimmed(whole, longest)
            self._point(call, whole, 0)
            self.launch("fill_up", rows, (call, ctypes.c_long(longest)))
        return longest, whole

    @staticmethod
    def _point(call: Any, steps: dict[str, Tensor], start: int) -> None:
        """Steps are numbered from the first round on, wherever their round is."""
        for name, x in steps.items():
            # the end of step k is state k + 1
            before = start + 1 if name == "states" and start else start
            setattr(call, name, x.data_ptr() - before * x[0].nbytes if len(x) else None)

    def sweep(self, call: Any, like: Tensor) -> Tensor:
        """The way back that ``call`` asks for; the cotangents of shared inputs (SHARED,) in the dtype of ``like``."""
        rows = call.rows
        wave = max(1, min(rows, _MOST_TOTALS // max(self.shared * like.element_size(), 1)))
        found = []
        for start in range(0, rows, wave):
            count = min(wave, rows - start)
            totals = like.new_empty((self.shared, count))
            self.launch("sweep", count, (call, ctypes.c_long(start), ctypes.c_long(count), ctypes.c_void_p(totals.data_ptr())))
            while totals.shape[1] > 1 and self.shared:
                columns = totals.shape[1]
                groups = -(-columns // _ADDED)
                sums = like.new_empty((self.shared, groups))
                sizes = (ctypes.c_long(x) for x in (self.shared, columns, groups))
                self.launch("add_up", self.shared * groups, (ctypes.c_void_p(totals.data_ptr()), ctypes.c_void_p(sums.data_ptr()), *sizes))
                totals = sums
            found.append(totals)
        if not found:
            return like.new_zeros(self.shared)
        total = found[0]
        for more in found[1:]:
            total = total + more
        return total.reshape(-1)


def trimmed(steps: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Of ``count`` steps; much memory that is mostly not used is given back."""
    if len(steps["t"]) == count:
        return steps
    cut = {name: x[: count + (name == "states")] if len(x) else x for name, x in steps.items()}
    wasteful = 2 * count < len(steps["t"]) and sum(x.nbytes for x in cut.values()) > _LARGE
    return {name: x.clone() for name, x in cut.items()} if wasteful else cut


def kernels_of(text: str, device: torch.device, shared: int) -> DeviceEngine:
    """The kernels of ``text``. Raises `NoCompiler`."""
    launch = LAUNCHERS[device.type](text, device)
    size = torch.empty(1, dtype=torch.int64, device=device)
    launch("measure", 1, (ctypes.c_void_p(size.data_ptr()),))
    return DeviceEngine(launch, int(size), shared, {})


def addressed(tensors: Sequence[Tensor], device: torch.device) -> tuple[int, Any]:
    """Where on the device the addresses of these tensors stand, and what keeps them there."""
    if device.type == "cpu":
        array = (ctypes.c_void_p * max(len(tensors), 1))(*[x.data_ptr() for x in tensors])
        return ctypes.addressof(array), array
    table = torch.tensor([x.data_ptr() for x in tensors] or [0], dtype=torch.int64, device=device)
    return table.data_ptr(), table
