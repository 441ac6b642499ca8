"""Newton's method on batches: values by SciPy and closed forms, rates, reuse of factors, bounds, statuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.optimize
import torch

from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.linalg import DenseLU, Factorization, LinearOperator, Log, SparseMatrix
from adjoint.nonlinear import Backtracking, EisenstatWalker, Newton, RootProblem, RootStatus

from ..helpers.nonlinear_problems import coupled, powell_singular, problem, rosenbrock, row_problem, sparse
from ..helpers.steady_problems import SOURCE_VALUE, bratu, chandrasekhar, reaction_advection_diffusion, source_and_diffusion

EVERY = [
    Newton(),
    Newton(linesearch="natural"),
    Newton(linesearch=None),
    Newton(reuse="shamanskii"),
    Newton(reuse="chord"),
    Newton(linesearch=Backtracking(decrease=0.1), bounds="interior"),
]


def names(m):
    return f"{m.linesearch}-{m.reuse}".replace("(", "_")[:24]


@pytest.mark.parametrize("method", EVERY, ids=names)
def test_chandrasekhar(method):
    F = chandrasekhar(100)
    record = method.solve(problem(lambda H: F(H, 0.9)), torch.ones(1, 100))
    assert int(record.status) == RootStatus.SUCCESS
    H = record.x[0]
    got = torch.stack([H[0], H[-1], H.norm()])
    assert torch.allclose(got, torch.tensor([1.0145314757360013, 1.847721717856573, 15.368016943618473]), rtol=1e-12)


@pytest.mark.parametrize("method", EVERY, ids=names)
def test_rows_are_those_of_each_alone(method):
    p = torch.tensor([[1.0, 0.5], [3.0, -0.5], [0.2, 2.0], [30.0, 4.0]])
    x0 = torch.tensor([[1.0, 1.0], [2.0, 0.1], [0.1, 0.1], [4.0, 3.0]])
    together = method.solve(row_problem(coupled, p), x0)
    for i in range(4):
        alone = method.solve(row_problem(coupled, p[i : i + 1]), x0[i : i + 1])
        assert int(alone.status) == int(together.status[i]) == 0
        assert torch.allclose(together.x[i], alone.x[0], rtol=1e-14, atol=1e-15)
        for name in ("n_steps", "n_fun", "n_jac"):
            assert int(getattr(together, name)[i]) == int(getattr(alone, name))
        want = scipy.optimize.root(lambda x, i=i: coupled(torch.tensor(x), p[i]).numpy(), x0[i].numpy(), tol=1e-13)
        assert want.success and np.allclose(together.x[i], want.x, rtol=1e-9)
    assert together.n_steps.unique().numel() > 1


def test_a_failing_row_fails_alone():
    def single(x, p):
        return torch.where(p[0] > 0, x**2 - p[0], x / 0 * 0)

    record = Newton().solve(row_problem(single, torch.tensor([[4.0], [-1.0], [9.0]])), torch.ones(3, 1))
    assert record.status.tolist() == [0, RootStatus.NON_FINITE, 0]
    assert torch.allclose(record.x[[0, 2], 0], torch.tensor([2.0, 3.0])) and int(record.n_steps[1]) == 0
    assert float(record.x[1]) == 1.0  # frozen at the guess


def test_quadratic_convergence():
    errors = []
    F = chandrasekhar(50)
    p = problem(lambda H: F(H, 0.9))
    root = Newton().solve(p, torch.ones(1, 50)).x
    p = replace(p, callback=lambda k, x, norm: errors.append(float((x - root).norm())))
    Newton().solve(p, torch.ones(1, 50))
    seen = [e for e in errors if e > 1e-11]
    rates = [np.log(c / b) / np.log(b / a) for a, b, c in zip(seen, seen[1:], seen[2:], strict=False)]
    assert rates and max(rates) > 1.8


def test_shamanskii_factorises_less():
    F = bratu(63)
    logs = {}
    for reuse in ("none", "shamanskii", "chord"):
        log = Log()
        record = Newton(reuse=reuse).solve(problem(lambda u: F(u, 3.0), log=log), torch.zeros(1, 63))
        assert int(record.status) == 0 and int(record.n_jac) == log.n_factorizations
        logs[reuse] = (log.n_factorizations, int(record.n_steps))
    assert logs["shamanskii"][0] < logs["none"][0] and logs["shamanskii"][1] >= logs["none"][1]
    assert logs["chord"][0] <= logs["shamanskii"][0]


def test_bratu_against_the_closed_form():
    # theta = sqrt(2 l) cosh(theta / 4); the error of the scheme is O(h^4)
    errors = []
    for n in (15, 31):
        F = bratu(n)
        x = Newton().solve(problem(lambda u, F=F: F(u, 1.0)), torch.zeros(1, n)).x[0]
        errors.append(abs(float(x[n // 2]) - 0.140539214400471798))
    assert errors[1] < 1e-8 and 12 < errors[0] / errors[1] < 20


def test_source_and_diffusion_by_a_sparse_jacobian():
    f, F, p = source_and_diffusion()
    system = RootProblem(residual=torch.func.vmap(lambda x: F(x, p)), jacobian=_source_matrix(F, p))
    record = Newton().solve(system, torch.ones(1, 2000))
    assert int(record.status) == 0
    assert abs(float(f(record.x[0], p)) - SOURCE_VALUE) < 1e-9 * SOURCE_VALUE


def _source_matrix(F, p, nx=50, ny=40):
    # F is affine: one product for each of the colours of a five-point stencil gives all columns
    n = nx * ny
    i, j = torch.arange(n) % nx, torch.arange(n) // nx
    colour = (i + 2 * j) % 5
    base = F(torch.zeros(n), p)
    rows, columns, values = [], [], []
    for c in range(5):
        v = (colour == c).to(base)
        product = F(v, p) - base
        for di, dj in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            ci, cj = i + di, j + dj
            inside = (ci >= 0) & (ci < nx) & (cj >= 0) & (cj < ny)
            at = (cj * nx + ci).clamp(0, n - 1)
            hit = inside & (colour[at] == c)
            rows.append(torch.arange(n)[hit])
            columns.append(at[hit])
            values.append(product[hit])
    r, c, v = torch.cat(rows), torch.cat(columns), torch.cat(values)
    order = torch.argsort(r * n + c)
    matrix = SparseMatrix(torch.stack([r, c])[:, order], v[order].unsqueeze(0), (n, n))
    return lambda x: matrix


def test_reaction_advection_diffusion_dense_and_sparse():
    f, F, p = reaction_advection_diffusion(16)
    dense = problem(lambda u: F(u, p))
    records = [Newton().solve(q, torch.full((1, 256), 0.1)) for q in (dense, replace(dense, jacobian=sparse(dense)))]
    for record in records:
        assert int(record.status) == 0
        assert abs(float(f(record.x[0], p)) - 0.19624154641511393) < 1e-13
    assert torch.allclose(records[0].x, records[1].x, atol=1e-13)


def test_powell_singular_function():
    start = torch.tensor([[3.0, -1.0, 0.0, 1.0]])
    record = Newton().solve(problem(powell_singular, max_steps=200, tol=1e-14), start)
    # the Jacobian is singular at the root: the error halves in every step, no better
    assert int(record.status) == 0 and 35 < int(record.n_steps) < 60
    assert float(record.x.abs().max()) < 1e-11


def test_rosenbrock_and_linesearch():
    record = Newton().solve(problem(rosenbrock), torch.tensor([[-1.2, 1.0]]))
    assert int(record.status) == 0 and torch.allclose(record.x, torch.ones(1, 2))
    arctan = problem(torch.atan)
    far = torch.tensor([[3.0]])
    assert int(Newton().solve(arctan, far).status) == 0
    assert int(Newton(linesearch=None).solve(arctan, far).status) < 0


def test_bounds():
    squares = problem(lambda x: x**2 - 4)
    for method in (Newton(), Newton(bounds="interior")):
        down = method.solve(replace(squares, upper=torch.tensor([0.0])), torch.tensor([[-0.5]]))
        assert int(down.status) == 0 and abs(float(down.x) + 2) < 1e-12
    # the residual is defined inside only, and the first step would leave
    logs = problem(lambda x: torch.log(x) + 2, lower=torch.tensor([0.0]))
    for method in (Newton(), Newton(bounds="interior")):
        record = method.solve(logs, torch.tensor([[5.0]]))
        assert int(record.status) == 0 and abs(float(record.x) - np.exp(-2)) < 1e-12
    # a root on the bound itself, and none within the bounds
    edge = Newton().solve(problem(lambda x: x - 1.0, upper=torch.tensor([1.0])), torch.tensor([[0.0]]))
    assert int(edge.status) == 0 and float(edge.x) == 1.0
    none = Newton().solve(problem(lambda x: x - 2.0, upper=torch.tensor([1.0])), torch.tensor([[0.0]]))
    assert int(none.status) == RootStatus.STALLED and float(none.x) == 1.0


def test_statuses():
    def end(single, x0, method=None, **settings):
        return int((method or Newton()).solve(problem(single, **settings), torch.tensor([x0])).status)

    assert end(lambda x: x**2 + 1, [1.0]) == RootStatus.STALLED
    assert end(lambda x: x**2 + 1, [1.3]) == RootStatus.STALLED
    assert end(lambda x: x.log(), [-1.0]) == RootStatus.NON_FINITE
    assert end(lambda x: x**3 - 1e6, [1e-3], max_steps=3) == RootStatus.MAX_STEPS
    assert end(lambda x: torch.stack([x[0] - x[1], 2 * x[0] - 2 * x[1] + 1]), [1.0, 0.0]) == RootStatus.SINGULAR
    assert end(lambda x: torch.stack([x[0] / 3 - x[1] / 7, x[0] / 9 - x[1] / 21]) - 1, [1.0, 0.0]) == RootStatus.SINGULAR
    assert end(lambda x: x, [0.0]) == RootStatus.SUCCESS


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scales_of_equations_do_not_matter(scale):
    p = torch.tensor([1.0, 0.5])
    d = torch.tensor([scale, 1.0])
    record = Newton().solve(problem(lambda x: d * coupled(x, p), tol=float("inf")), torch.ones(1, 2))
    want = Newton().solve(problem(lambda x: coupled(x, p)), torch.ones(1, 2))
    assert int(record.status) == 0 and torch.allclose(record.x, want.x, rtol=1e-12)


def test_factors_are_those_at_the_root_or_none():
    linear = problem(lambda x: 2 * x - 1)
    assert Newton().solve(linear, torch.zeros(1, 1)).factors is None  # x moved after the factorisation
    A = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    start = torch.ones(1, 2)
    record = Newton().solve(problem(lambda x: A @ (x - 1) + (x - 1) ** 2 + 1e-20), start)  # the step is below rounding
    assert int(record.status) == 0 and torch.equal(record.x, start) and record.factors is not None
    b = torch.rand(1, 2)
    assert torch.allclose(record.factors.solve(b)[0], torch.linalg.solve(A, b[0]))


def test_complex_and_single_precision():
    c = torch.tensor([[2j], [-1.0 + 1j]])
    system = RootProblem(residual=lambda z: z**2 - c, jacobian=lambda z: torch.diag_embed(2 * z))
    record = Newton().solve(system, torch.ones(2, 1, dtype=torch.complex128) * (1 + 0.5j))
    assert torch.allclose(record.x**2, c) and record.status.tolist() == [0, 0]
    single = problem(lambda x: x**2 - 2, tol=1e-6, x_rtol=1e-5, x_atol=1e-6)
    record = Newton().solve(single, torch.ones(1, 1, dtype=torch.float32))
    assert record.x.dtype == torch.float32 and abs(float(record.x) - 2**0.5) < 1e-6


class _Inexact(Factorization):
    """Solves with a relative residual of exactly ``rtol``."""

    def __init__(self, operator, rtol, log):
        self.rows, self.n, self.dtype, self.device, self.log = operator.rows, operator.n, operator.dtype, operator.device, log
        self.inner, self.rtol = DenseLU().factor(operator, log), rtol

    def solve(self, b, *, transposed=False, conjugated=False):
        noise = torch.ones_like(b)
        noise = noise * (self.rtol * b.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        return self.inner.solve(b + noise, transposed=transposed, conjugated=conjugated)


@dataclass(frozen=True)
class _InexactSolver:
    rtol: float = 1e-8
    used: list | None = None

    def factor(self, matrix, log=None):
        assert self.used is not None
        self.used.append(self.rtol)
        return _Inexact(matrix, self.rtol, log or Log())

    def refactor(self, factorization, matrix):
        return self.factor(matrix, factorization.log)


def test_inexact_newton_sets_the_forcing_terms():
    F = chandrasekhar(20)
    residual = torch.func.vmap(lambda H: F(H, 0.9))

    def operator(x):
        return LinearOperator(20, 1, x.dtype, x.device, lambda v: torch.func.jvp(residual, (x,), (v,))[1])

    used = []
    system = RootProblem(residual=residual, jacobian=operator, linear_solver=_InexactSolver(used=used))
    record = Newton().solve(system, torch.ones(1, 20))
    exact = Newton().solve(problem(lambda H: F(H, 0.9)), torch.ones(1, 20))
    assert int(record.status) == 0 and torch.allclose(record.x, exact.x, rtol=1e-9)
    assert used[0] == 0.1 and min(used) < 1e-2 and record.factors is None
    used.clear()
    Newton(forcing=None).solve(system, torch.ones(1, 20))
    assert set(used) == {1e-8}
    with pytest.raises(UnsupportedCombination, match="shamanskii"):
        Newton(reuse="shamanskii").solve(system, torch.ones(1, 20))


def test_eisenstat_walker_choice_two():
    rule = EisenstatWalker()
    assert rule.next(0.1, 0.1) == pytest.approx(0.9 * 0.01)
    assert rule.next(0.5, 1e-3) == pytest.approx(0.9 * 0.25)  # the safeguard
    assert rule.next(0.1, 10.0) == 0.5


def test_bad_settings():
    for bad in (dict(linesearch="armijo"), dict(reuse="always"), dict(forcing=0.1), dict(bounds="clip"), dict(factor=1.0)):
        with pytest.raises(InvalidInput, match=str(next(iter(bad)))):
            Newton(**bad)
    with pytest.raises(InvalidInput, match="jacobian"):
        Newton().solve(RootProblem(residual=lambda x: x), torch.ones(1, 1))
    with pytest.raises(InvalidInput, match="shape"):
        Newton().solve(problem(lambda x: x), torch.ones(3))


def test_empty():
    for shape in ((0, 2), (1, 0)):
        record = Newton().solve(
            RootProblem(residual=lambda x: x, jacobian=lambda x: torch.diag_embed(torch.ones_like(x))), torch.ones(*shape)
        )
        assert record.x.shape == shape and record.status.tolist() == [0] * shape[0]


@pytest.mark.parametrize("reuse", ["shamanskii", "chord"])
def test_steps_with_old_factors_are_judged_by_what_they_leave(reuse):
    # near x0 the chord converges at the rate 1 - 1 / x0, so that a small step may leave a larger error
    x0 = torch.linspace(2.5, 8.0, 40).unsqueeze(-1)
    record = Newton(reuse=reuse).solve(problem(lambda x: x**2 - 1, tol=float("inf"), x_rtol=1e-3, x_atol=0.0), x0)
    assert bool((record.status == 0).all()) and float((record.x - 1).abs().max()) <= 1.05e-3


def test_the_last_step_of_inexact_newton_is_exact_enough():
    used = []
    solver = _InexactSolver(used=used)
    A = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    operator = LinearOperator(2, 1, A.dtype, A.device, lambda v: v @ A.T)
    settings = dict(tol=float("inf"), x_rtol=1e-3, x_atol=0.0, linear_solver=solver)
    system = RootProblem(residual=lambda x: (x - 1) @ A.T, jacobian=lambda x: operator, **settings)
    record = Newton(forcing=EisenstatWalker(first=0.5, smallest=0.5)).solve(system, torch.full((1, 2), 3.0))
    assert int(record.status) == 0 and used[0] == 0.5 and used[-1] == 0.01
    assert float((record.x - 1).abs().max()) < 1e-4
