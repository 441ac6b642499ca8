"""Trust regions, least squares, fixed-point methods, pseudo-transient continuation, and the automatic choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch

from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.linalg import LinearOperator, Log
from adjoint.nonlinear import (
    METHODS,
    Anderson,
    Auto,
    Broyden,
    Dogleg,
    FixedPoint,
    LevenbergMarquardt,
    Newton,
    PseudoTransient,
    RootProblem,
    RootStatus,
)

from ..helpers.nonlinear_problems import coupled, powell_singular, problem, rosenbrock, row_problem, sparse
from ..helpers.steady_problems import bratu, chandrasekhar, reaction_advection_diffusion

H_VALUES = torch.tensor([1.0145314757360013, 1.847721717856573, 15.368016943618473], dtype=torch.float64)


def contraction(x, p):
    return 0.4 * torch.sin(x.flip(0) + p) - x


P = torch.tensor([[0.3, 1.1, -0.4], [2.0, -1.0, 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
X0 = torch.tensor([[0.0, 0.0, 0.0], [3.0, -2.0, 1.0], [1e-3, 0.0, 0.0]], dtype=torch.float64)
OF_CONTRACTIONS = [
    *METHODS.values(),
    FixedPoint(0.7),
    Anderson(3, mixing=0.5),
    Broyden(initial="scaled"),
    Broyden(initial=-1.0),
    Broyden(memory=3),
]


@pytest.mark.parametrize("method", OF_CONTRACTIONS, ids=lambda m: repr(m)[:40])
def test_rows_are_those_of_each_alone_and_of_scipy(method):
    together = method.solve(row_problem(contraction, P, tol=1e-11), X0)
    assert together.status.tolist() == [0, 0, 0]
    for i in range(3):
        alone = method.solve(row_problem(contraction, P[i : i + 1], tol=1e-11), X0[i : i + 1])
        assert torch.allclose(together.x[i], alone.x[0], rtol=1e-12, atol=1e-13)
        assert int(together.n_steps[i]) == int(alone.n_steps) and int(together.n_fun[i]) == int(alone.n_fun)
        want = scipy.optimize.root(lambda x, i=i: contraction(torch.tensor(x), P[i]).numpy(), X0[i].numpy(), tol=1e-13)
        assert np.allclose(together.x[i], want.x, atol=1e-10)


@pytest.mark.parametrize("method", OF_CONTRACTIONS, ids=lambda m: repr(m)[:40])
def test_a_nan_row_fails_alone(method):
    def single(x, p):
        return contraction(x, p) + 0 * p.log()

    p = torch.stack([P[0].abs(), -torch.ones(3), P[0].abs() + 1])
    record = method.solve(row_problem(single, p), torch.zeros(3, 3))
    assert record.status.tolist() == [0, RootStatus.NON_FINITE, 0]
    assert bool((record.x[1] == 0).all()) and not bool(torch.isfinite(record.residual_norm[1]))


@pytest.mark.parametrize("name", ["dogleg", "levenberg_marquardt", "broyden", "anderson", "auto"])
def test_chandrasekhar(name):
    F = chandrasekhar(100)
    # fixed-point form: g(H) - H
    system = problem(lambda H: -F(H, 0.9), tol=1e-12)
    record = METHODS[name].solve(system, torch.ones(1, 100))
    H = record.x[0]
    assert int(record.status) == 0
    assert torch.allclose(torch.stack([H[0], H[-1], H.norm()]), H_VALUES, rtol=1e-10)


def test_acceleration_accelerates():
    F = chandrasekhar(100)
    plus = problem(lambda H: -F(H, 0.9), tol=1e-11)
    minus = problem(lambda H: F(H, 0.9), tol=1e-11)
    start = torch.ones(1, 100)
    slow, fast = FixedPoint().solve(plus, start), Anderson().solve(plus, start)
    assert int(slow.status) == int(fast.status) == 0 and int(fast.n_fun) < int(slow.n_fun) / 2
    for method in (FixedPoint(form="x-g"), Anderson(form="x-g")):
        assert torch.allclose(method.solve(minus, start).x, slow.x, rtol=1e-9)


def test_divergence_is_said():
    record = FixedPoint().solve(problem(lambda x: 2 * x + 1), torch.tensor([[1.0]]))
    assert int(record.status) == RootStatus.DIVERGED
    # Anderson's method solves linear systems whether they contract or not
    record = Anderson().solve(problem(lambda x: 2 * x + 1), torch.tensor([[1.0]]))
    assert int(record.status) == 0 and abs(float(record.x) + 0.5) < 1e-9


def test_broyden_needs_no_jacobian_and_few_factorisations():
    F = chandrasekhar(100)
    free = RootProblem(residual=torch.func.vmap(lambda H: F(H, 0.9)))
    record = Broyden().solve(free, torch.ones(1, 100))
    assert int(record.status) == 0 and int(record.n_jac) == 0 and torch.allclose(record.x.norm(), H_VALUES[2], rtol=1e-9)
    log = Log()
    B = bratu(63)
    record = Broyden().solve(problem(lambda u: B(u, 3.0), log=log, tol=1e-9), torch.zeros(1, 63))
    exact = Newton().solve(problem(lambda u: B(u, 3.0)), torch.zeros(1, 63))
    assert int(record.status) == 0 and log.n_factorizations == 1 < int(exact.n_jac)
    assert torch.allclose(record.x, exact.x, atol=1e-10)


@pytest.mark.parametrize("method", [Dogleg(), Dogleg(radius=0.1), LevenbergMarquardt()], ids=repr)
def test_rosenbrock_from_hard_starts(method):
    starts = torch.tensor([[-1.2, 1.0], [6.0, -30.0], [0.0, 0.0]])
    record = method.solve(problem(rosenbrock), starts)
    assert record.status.tolist() == [0, 0, 0] and torch.allclose(record.x, torch.ones(3, 2), atol=1e-9)


def test_dogleg_sparse_and_scaled():
    f, F, p = reaction_advection_diffusion(16)
    dense = problem(lambda u: F(u, p))
    for system in (dense, replace(dense, jacobian=sparse(dense))):
        record = Dogleg().solve(system, torch.full((1, 256), 0.1))
        assert int(record.status) == 0 and abs(float(f(record.x[0], p)) - 0.19624154641511393) < 1e-12
    d = torch.tensor([1e-6, 1e6])
    scaled = problem(lambda x: coupled(x * d, P[0, :2]), x_scale=1 / d, x_atol=1e-12 / d)
    plain = Newton().solve(problem(lambda x: coupled(x, P[0, :2])), torch.ones(1, 2))
    record = Dogleg().solve(scaled, torch.ones(1, 2) / d)
    assert int(record.status) == 0 and torch.allclose(record.x * d, plain.x, rtol=1e-9)


@pytest.mark.parametrize("method", [Dogleg(), LevenbergMarquardt(), Auto()], ids=lambda m: type(m).__name__)
def test_powell_singular_function(method):
    record = method.solve(problem(powell_singular, max_steps=200), torch.tensor([[3.0, -1.0, 0.0, 1.0]]))
    assert float(record.residual_norm) < 1e-10 and float(record.x.abs().max()) < 1e-4


def test_no_root_is_a_failure():
    for method in (Dogleg(), LevenbergMarquardt(), PseudoTransient(), Broyden(), Auto()):
        for tol in (1e-10, float("inf")) if method.__class__ is not Broyden else (1e-10,):
            record = method.solve(problem(lambda x: x**2 + 1, tol=tol), torch.tensor([[0.7]]))
            assert int(record.status) < 0
    record = LevenbergMarquardt().solve(problem(lambda x: x**2 + 1, least_squares=True), torch.tensor([[0.7]]))
    assert int(record.status) == 0 and abs(float(record.x)) < 1e-6


@pytest.mark.parametrize("name", ["newton", "shamanskii", "chord", "dogleg", "levenberg_marquardt", "auto"])
def test_one_root_of_many_is_not_an_answer(name):
    def binding(x):
        rate = 2 * x[0] * x[1] - x[2]
        return torch.stack([-rate, -rate, rate])

    record = METHODS[name].solve(problem(binding, tol=float("inf")), torch.tensor([[1.0, 2.0, 0.0]]))
    assert int(record.status) == RootStatus.SINGULAR


def test_a_tolerance_below_rounding_ends_soon():
    big = problem(lambda x: x.exp() - 1e8, max_steps=200)
    for name in ("newton", "shamanskii", "chord", "dogleg"):
        record = METHODS[name].solve(big, torch.tensor([[17.0]]))
        assert int(record.status) == RootStatus.STALLED and int(record.n_steps) < 60
        loose = METHODS[name].solve(replace(big, tol=float("inf")), torch.tensor([[17.0]]))
        assert int(loose.status) == 0 and abs(float(loose.x) - 8 * np.log(10)) < 1e-8


def test_least_squares_against_scipy():
    t = torch.linspace(0, 1, 12)
    data = torch.stack([1.2 * torch.exp(0.7 * t) + 0.1 * torch.sin(20 * t), 0.5 * torch.exp(-2 * t) + 0.05 * torch.cos(9 * t)])

    def single(q, d):
        return q[0] * torch.exp(q[1] * t) - d

    system = row_problem(single, data)
    record = LevenbergMarquardt().solve(system, torch.tensor([[1.0, 0.5], [1.0, 0.0]]))
    assert record.status.tolist() == [0, 0]
    for i in range(2):
        want = scipy.optimize.least_squares(
            lambda q, i=i: single(torch.tensor(q), data[i]).numpy(), [1.0, 0.0], xtol=1e-15, ftol=1e-15, gtol=1e-15
        )
        assert np.allclose(record.x[i], want.x, rtol=1e-7)
    gradient = (system.jacobian(record.x).mT @ record.residual.unsqueeze(-1)).abs().max()
    assert float(gradient) < 1e-10 < float(record.residual_norm.min())
    with pytest.raises(InvalidInput, match="residuals"):
        LevenbergMarquardt().solve(problem(lambda x: x[:1]), torch.ones(1, 2))


def test_pseudo_transient():
    p = torch.tensor([[2.0], [-1.0]])
    flow = row_problem(lambda x, p: p - x - 5 * torch.tanh(3 * x), p)
    record = PseudoTransient().solve(flow, torch.full((2, 1), 30.0))
    for i in range(2):
        want = scipy.optimize.brentq(lambda x, i=i: float(p[i]) - x - 5 * np.tanh(3 * x), -5, 5, xtol=1e-14)
        assert int(record.status[i]) == 0 and abs(float(record.x[i]) - want) < 1e-11
    # of x' = x - x^3, Newton finds the unstable 0 from 0.4; the flow goes to 1
    steady = problem(lambda x: x - x**3)
    assert abs(float(Newton().solve(steady, torch.tensor([[0.4]])).x)) < 1e-10
    slow = PseudoTransient(first=0.05, growth=1.5).solve(steady, torch.tensor([[0.4]]))
    assert int(slow.status) == 0 and abs(float(slow.x) - 1) < 1e-10


def test_small_steps_in_time_are_not_convergence():
    # the residual hardly falls, so that the steps stay small; they must not be taken for Newton's
    creeping = PseudoTransient(first=1e-13).solve(problem(lambda x: 1 - x, tol=float("inf"), max_steps=20), torch.tensor([[3.0]]))
    assert int(creeping.status) == RootStatus.MAX_STEPS


def test_pseudo_transient_with_a_mass_matrix_and_a_sparse_jacobian():
    # x' = y - x, 0 = x y - 1
    system = problem(lambda x: torch.stack([x[1] - x[0], x[0] * x[1] - 1]))
    record = PseudoTransient(mass=torch.tensor([1.0, 0.0])).solve(system, torch.tensor([[3.0, 0.5]]))
    assert int(record.status) == 0 and torch.allclose(record.x, torch.ones(1, 2), atol=1e-10)
    f, F, p = reaction_advection_diffusion(16)
    dense = problem(lambda u: F(u, p))
    record = PseudoTransient().solve(replace(dense, jacobian=sparse(dense)), torch.full((1, 256), 0.1))
    assert int(record.status) == 0 and abs(float(f(record.x[0], p)) - 0.19624154641511393) < 1e-12


@pytest.mark.parametrize("method", [Dogleg(), LevenbergMarquardt(), Broyden(), PseudoTransient(), Auto()], ids=lambda m: type(m).__name__)
def test_bounds_hold(method):
    seen = []

    def residual(x):
        seen.append(float(x.min()))
        return 2 - x - x.sqrt()  # NaN for negative x; the root is 1

    system = RootProblem(residual=residual, jacobian=lambda x: torch.diag_embed(-1 - 0.5 / x.sqrt()), lower=torch.tensor([0.0]))
    record = method.solve(system, torch.tensor([[9.0], [0.01]]))
    assert record.status.tolist() == [0, 0] and torch.allclose(record.x, torch.ones(2, 1)) and min(seen) >= 0


def test_auto_says_what_it_did():
    easy = problem(lambda x: x**2 - 2)
    calls = []
    counted = replace(easy, jacobian=lambda x: calls.append(1) or easy.jacobian(x))
    record = Auto().solve(counted, torch.ones(1, 1))
    assert record.note == "Newton" and len(calls) == int(record.n_jac)  # nothing is spent on fallbacks that are not needed
    p = torch.tensor([[1.0], [0.0]])
    # x^3 - 2x + 2 from 0 is a cycle for Newton; with the search it stops at a local minimum of the residual
    both = row_problem(lambda x, p: torch.where(p > 0, x**2 - 2, -(x**3 - 2 * x + 2)), p)
    record = Auto().solve(both, torch.tensor([[1.0], [0.9]]))
    assert record.status.tolist() == [0, 0] and abs(float(record.x[0]) - 2**0.5) < 1e-12
    assert abs(float(record.x[1]) + 1.7692923542386314) < 1e-12
    assert "rows 1" in record.note and "pseudo-transient" in record.note and "another" in record.note


def test_auto_integrates_as_a_last_resort():
    calls = []

    def integrate(x):
        calls.append(x)
        return torch.full_like(x, -1.5)

    system = problem(lambda x: -(x**3 - 2 * x + 2))
    record = Auto(flow=False, integrate=integrate).solve(system, torch.tensor([[0.9]]))
    assert len(calls) == 1 and int(record.status) == 0 and "time integration" in record.note
    assert int(Auto(flow=False).solve(system, torch.tensor([[0.9]])).status) < 0


def test_auto_without_a_jacobian():
    F = chandrasekhar(100)
    record = Auto().solve(RootProblem(residual=torch.func.vmap(lambda H: F(H, 0.9))), torch.ones(1, 100))
    assert int(record.status) == 0 and torch.allclose(record.x.norm(), H_VALUES[2], rtol=1e-9) and "Broyden" in record.note


def test_operators_without_transposed_products():
    operator = lambda x: LinearOperator(1, 1, x.dtype, x.device, lambda v: 2 * x * v)  # noqa: E731
    system = RootProblem(residual=lambda x: x**2 - 2, jacobian=operator)
    assert int(Auto().solve(system, torch.ones(1, 1)).status) == 0
    with pytest.raises(UnsupportedCombination, match="rmatvec"):
        Dogleg().solve(system, torch.ones(1, 1))
    with pytest.raises(UnsupportedCombination, match="LinearOperator"):
        LevenbergMarquardt().solve(system, torch.ones(1, 1))


def test_bad_settings():
    for make in (
        lambda: Dogleg(radius=-1.0),
        lambda: Dogleg(accept=0.5),
        lambda: LevenbergMarquardt(damping=0.0),
        lambda: FixedPoint(damping=0.0),
        lambda: FixedPoint(form="g"),
        lambda: Anderson(depth=0),
        lambda: Broyden(memory=0),
        lambda: Broyden(initial="identity"),
        lambda: PseudoTransient(first=0.0),
        lambda: PseudoTransient(growth=1.0),
    ):
        with pytest.raises(InvalidInput):
            make()


def test_an_infinite_tolerance_of_the_residual_leaves_the_error_of_x():
    for method in (FixedPoint(), Anderson(), Broyden()):
        for size in (1.0, 1e-9):
            record = method.solve(problem(lambda x: size * torch.cos(x / size) - x, tol=float("inf"), x_atol=0.0), torch.full((1, 1), size))  # noqa: B023
            assert bool((record.status == 0).all()) and abs(record.x.item() / size - 0.7390851332151607) < 1e-9
