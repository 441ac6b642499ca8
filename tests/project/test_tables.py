"""The tables of docs/methods.md are those that the code and the tests of refusals give; some of their cells are tried."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from adjoint import DiscreteAdjoint, GaussAdjoint, solve_ivp
from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.methods import DAE_METHODS, IMEX_METHODS, METHODS, SWITCHING_METHODS

SCRIPT = Path(__file__).parents[2] / "scripts" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_registry_gives(tables):
    page = tables.PAGE.read_text()
    assert tables.written(page) == page, "python scripts/tables.py"


def test_every_method_has_a_line(tables):
    lines = tables.methods().splitlines()[2:]
    assert len(lines) == len(METHODS) + len(SWITCHING_METHODS) + len(IMEX_METHODS) + len(DAE_METHODS)


def cells(tables, column):
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.methods().splitlines()]
    place = head.index(column)
    return {row[0].strip("`"): row[place] for row in rows if row[1] == "`solve_ivp`"}


def solve(method, **options):
    y0 = torch.tensor([1.0, 0.5], requires_grad=True)
    first = None if (METHODS | SWITCHING_METHODS)[method].adaptive else 0.1
    return solve_ivp(lambda t, y: -y, (0.0, 0.3), y0, method=method, first_step=first, rtol=1e-2, **options).y[-1].sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_cells_are_what_solves_do(tables, method):
    def tried(column, error, **options):
        if cells(tables, column)[method].startswith(("no", "by another")):
            with pytest.raises(error):
                solve(method, **options)
        else:
            solve(method, **options)

    tried("`checkpoints=`", UnsupportedCombination, gradient=DiscreteAdjoint(checkpoints=2))
    tried("continuous adjoints", InvalidInput, gradient=GaussAdjoint())
    tried("`jac=`, `jac_sparsity=`, `linear_solver=`", UnsupportedCombination, jac=lambda t, y: -torch.eye(2))
    tried("`mass_matrix=`", UnsupportedCombination, mass_matrix=torch.eye(2))
    tried("derivatives in `step_ts`", UnsupportedCombination, step_ts=torch.tensor([0.2], requires_grad=True))
