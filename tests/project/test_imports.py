"""``import adjoint`` takes next to no time: public names are looked up when they are asked for, SciPy is imported where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adjoint


def written_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(adjoint.__file__).read_text())
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    found = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: "." * node.level + (node.module or "") for node in found for alias in node.names}


def test_every_public_name_is_found_and_shown():
    for name in adjoint.__all__:
        assert getattr(adjoint, name) is not None
        assert name in dir(adjoint)
    space: dict[str, object] = {}
    exec("from adjoint import *", space)
    assert set(adjoint.__all__) <= set(space)


def test_type_checkers_see_the_same_names_at_the_same_places():
    assert {name: home for name, home in written_for_type_checkers().items() if home != "."} == adjoint._HOME_OF
    rooms = {name for name, home in written_for_type_checkers().items() if home == "."}
    assert rooms <= set(adjoint._ROOMS)
    assert {*adjoint._HOME_OF, *rooms, "__version__"} == set(adjoint.__all__)


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="no attribute 'solve_pde'"):
        _ = adjoint.solve_pde
    with pytest.raises(ImportError):
        exec("from adjoint import solve_pde")


def test_import_loads_little_and_explicit_solves_no_scipy():
    script = """
import sys, torch, adjoint
own = [m for m in sys.modules if m.startswith("adjoint.")]
assert len(own) <= 8, own
assert adjoint.errors.InvalidInput is adjoint.InvalidInput and adjoint.linalg.DenseLU
# the first name is asked for inside a transform, and what is counted of references there is what it is outside
def last(y0):
    return adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, rtol=1e-8).y[-1]
y = torch.vmap(last)(torch.ones(3, 1, dtype=torch.float64))
assert torch.allclose(y, torch.exp(torch.tensor(-1.0, dtype=torch.float64)), rtol=1e-6)
kept = torch.zeros(1, dtype=torch.float64)
def writes(t, y):
    return torch.mul(y, -1.0, out=kept)
y = adjoint.solve_ivp(writes, (0.0, 1.0), torch.ones(1, dtype=torch.float64), rtol=1e-8).y[-1]
assert torch.allclose(y, torch.exp(torch.tensor(-1.0, dtype=torch.float64)), rtol=1e-6)
assert not any(m == "scipy" or m.startswith("scipy.") for m in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(adjoint.__file__).parents[1])
    assert done.returncode == 0, done.stderr
