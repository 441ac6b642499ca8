"""Graphs of right-hand sides, and calls that only say which graph they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..system.capture import Captured
from .levels import above
from .program import Program

__all__ = ["Graph", "Heard", "ear"]

#: what graphs were called by this thread since they were last counted
ear = threading.local()


@dataclass(eq=False)
class Graph:
    """A traced right-hand side: called, it says so to `recognise`.

    ``module``: the graph of a tracer; None for one that is known by its fingerprint, whose function comes with each `Heard`.
    """

    module: GraphModule | None = None
    programs: dict[Hashable, Program | Exception] = field(default_factory=dict)
    kinds: list[tuple[torch.Size, torch.dtype]] | None = None
    #: whether it changes tensors in place that it is given
    writes: bool = False
    #: whether a `torch.autograd.Function` in it has a derivative that its operators do not tell
    own_derivative: bool = False
    #: whether one known by its fingerprint could not be read as it stands, for which a tracer is asked instead
    refused: bool = False
    #: whether a program was made of it, so that it is not random
    was_read: bool = False
    #: places, among the tensors of a call, of what `find_captured` found, with its flags
    captured: tuple[tuple[int, ...], dict[str, bool]] | None = None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The results themselves: what ``fun`` keeps of them on an object (weights, noise, buffers) the tracer writes there."""
        assert self.module is not None
        with torch.inference_mode(False), torch.enable_grad(), above():
            usual = [x.clone() if x.is_inference() else x for x in tensors]
            versions = [x._version for x in usual]
            outs = list(self.module(*usual))
        self.kinds = [(x.shape, x.dtype) for x in outs]
        self.writes |= any(x._version != version for x, version in zip(usual, versions, strict=True))
        ear.heard.append((self, tensors, outs))
        return outs

    def stand_ins(self) -> list[Tensor]:
        """Tensors of the shapes and dtypes of results."""
        assert self.kinds is not None
        return [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in self.kinds]


@dataclass(frozen=True)
class Heard:
    """A call of ``fun`` that only said which graph it is: with these tensors, of one copy.

    ``module``: the function of these tensors alone, which gives all tensors of the result. ``known``: what the tensors of the call are.
    ``result``: tensors that stand for what it returned, of its structure, shapes and dtypes.
    """

    graph: Graph
    module: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    arguments: tuple[Tensor, ...]
    known: dict[int, tuple[str, int]]
    results: tuple[tuple[str, int], ...]
    result: Any = None

    @property
    def captured(self) -> Captured | None:
        """What `find_captured` found for this graph, or None: it has not been asked."""
        if self.graph.captured is None:
            return None
        places, flags = self.graph.captured
        return Captured([self.tensors[i] for i in places], **flags)

    def remember(self, found: Captured) -> None:
        """Answer with what was found from now on: the guards of the graph see to it that it is the same."""
        place = {id(x): i for i, x in enumerate(self.tensors)}
        if all(id(x) in place for x in found.tensors):
            self.graph.captured = tuple(place[id(x)] for x in found.tensors), found.flags
