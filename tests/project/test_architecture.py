"""Imports run down: a list of rooms, no circle, no private name across files, and nothing at the top but the public door."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from adjoint.sensitivity.node import SolveNode

SCRIPT = Path(__file__).parents[2] / "scripts" / "rooms.py"


@pytest.fixture(scope="module")
def rooms():
    spec = importlib.util.spec_from_file_location("rooms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rooms"] = module
    spec.loader.exec_module(module)
    # all files are read once
    module.imports = functools.cache(lambda imports=module.imports: list(imports()))
    return module


def test_imports_run_down(rooms):
    order = list(rooms.ROOMS)
    found = list(rooms.imports())
    assert len(found) > 500
    assert {rooms.room(i.source) for i in found} | {"errors"} == set(order)
    climbing = [i for i in found if order.index(rooms.room(i.source)) > order.index(rooms.room(i.target))]
    assert not climbing


def test_no_circles(rooms):
    assert rooms.circles() == []


def test_private_names_stay_in_their_file(rooms):
    shared = [i for i in rooms.imports() if i.name.startswith("_") and not i.name.startswith("__")]
    assert not shared


def test_the_top_is_the_public_door(rooms):
    files = {path.name for path in rooms.PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "_version.py", "errors.py", "py.typed", "torch_internals.py", "torchdiffeq.py"}


def test_files_are_of_a_size_to_be_read(rooms):
    assert {name: n for name, path in rooms.modules().items() if (n := len(path.read_text().splitlines())) > 500} == {}


def test_nodes_are_of_one_kind(rooms):
    """What PyTorch asks of a custom function at every call is made once."""
    plain = [name for name, path in rooms.modules().items() if "(torch.autograd.Function)" in path.read_text()]
    assert plain == ["adjoint.torch_internals"]
    assert inspect.signature(SolveNode.forward) is inspect.signature(SolveNode.forward)
    assert list(inspect.signature(SolveNode.forward).parameters) == ["problem", "anchors", "t_eval", "y0", "inputs"]
