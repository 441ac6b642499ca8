"""The quick walk over pytrees is PyTorch's."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from adjoint.doors.forcing import Forcing
from adjoint.torch_internals import leaves_of, mapped

Pair = namedtuple("Pair", "a b")
x, y = torch.arange(2.0), torch.nn.Parameter(torch.ones(3))
TREES = [
    x,
    None,
    1.5,
    (),
    {},
    (x, (y, [None, 2]), {"b": x, "a": (y,)}),
    [x, Pair(y, {"c": x}), OrderedDict(z=x, w=y)],
    torch.max(torch.eye(2), 0),
    (torch.float64, torch.device("cpu"), slice(1, 2), x.shape),
    [Forcing([0.0, 1.0], [2.0, 3.0]), x],
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_leaves_and_their_order(tree: object) -> None:
    ours, theirs = leaves_of(tree), tree_leaves(tree)
    assert len(ours) == len(theirs) and all(a is b or a == b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_structure_of_what_is_mapped(tree: object) -> None:
    def shown(leaf: object) -> str:
        return f"<{leaf}>"

    ours, theirs = mapped(shown, tree), tree_map(shown, tree)
    assert type(ours) is type(theirs)
    if not isinstance(tree, list) or not isinstance(tree[0], Forcing):
        assert repr(ours) == repr(theirs)
    else:
        assert ours[0].knots == theirs[0].knots and ours[1] == theirs[1]
