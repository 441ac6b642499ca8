"""Root finders with sparse and Krylov linear solvers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adjoint.linalg import GMRES, LinearOperator, Log, SparseLU, SparseMatrix
from adjoint.nonlinear import METHODS, Newton, RootProblem, RootStatus

from ..helpers.nonlinear_problems import problem, row_problem, sparse
from ..helpers.steady_problems import reaction_advection_diffusion

VALUE = 0.19624154641511393  # of the objective at the steady state


@pytest.mark.parametrize("name", ["newton", "shamanskii", "dogleg", "broyden", "pseudo_transient", "auto"])
def test_sparse_factors(name):
    f, F, p = reaction_advection_diffusion(16)
    dense = problem(lambda u: F(u, p), log=Log())
    record = METHODS[name].solve(replace(dense, jacobian=sparse(dense), linear_solver=SparseLU()), torch.full((1, 256), 0.1))
    assert int(record.status) == 0 and abs(float(f(record.x[0], p)) - VALUE) < 1e-10
    assert dense.log.n_factorizations + dense.log.n_refactorizations >= int(record.n_jac) >= 1


def test_a_nan_row_does_not_hinder_sparse_factors():
    system = row_problem(lambda x, p: x**2 - p + 0 * p.log(), torch.tensor([[4.0, 9.0], [-1.0, 1.0]]), linear_solver=SparseLU())
    diagonal = torch.tensor([[0, 1], [0, 1]])
    record = Newton().solve(replace(system, jacobian=lambda x: SparseMatrix(diagonal, 2 * x, (2, 2))), torch.ones(2, 2))
    assert record.status.tolist() == [0, RootStatus.NON_FINITE] and torch.allclose(record.x[0], torch.tensor([2.0, 3.0]))


def test_matrix_free_newton():
    f, F, p = reaction_advection_diffusion(16)
    residual = torch.func.vmap(lambda u: F(u, p))

    def operator(x):
        return LinearOperator(256, 1, x.dtype, x.device, lambda v: torch.func.jvp(residual, (x,), (v,))[1])

    iterations = []
    for forcing in ("eisenstat-walker", None):
        system = RootProblem(residual=residual, jacobian=operator, linear_solver=GMRES(), tol=1e-9)
        record = Newton(forcing=forcing).solve(system, torch.full((1, 256), 0.1))
        assert int(record.status) == 0 and abs(float(f(record.x[0], p)) - VALUE) < 1e-12
        iterations.append(system.log.n_iterations)
    assert iterations[0] < iterations[1]
