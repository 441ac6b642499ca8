"""What differential-algebraic solves hand out between the ends of their steps: prescribed variables and multipliers."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import DiscreteAdjoint, ForwardSensitivity, HigherIndexDAE, solve_dae, solve_ivp
from benchmarks.dense_output import cases, measured

F64 = torch.float64
TOLERANCES = {"rtol": 1e-5, "atol": 1e-7}
SAMPLES = torch.linspace(0.0, 1.0, 41, dtype=F64)
START = torch.tensor([1.0, 0.0], dtype=F64)
MASS = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
RESIDUAL_METHODS = ("radau", "radau3", "bdf")
MASS_METHODS = ("rodas3p", "rodas4", "rodas5p", "radau5", "bdf")


def forced(t, y, yp, w=20.0):
    return torch.stack([yp[0] + y[0], y[1] - torch.sin(w * t)])


def forced_right(t, y, w=20.0):
    return torch.stack([-y[0], y[1] - torch.sin(w * t)])


def solve(method, fun=None, **options):
    """The system by a method of `solve_dae`, or by one of `solve_ivp` with a mass matrix, whose name then ends in an M."""
    options = {"t_eval": SAMPLES, **TOLERANCES, **options}
    if not method.endswith("M"):
        return solve_dae(fun or forced, (0.0, 1.0), START, method=method, **options)
    return solve_ivp(fun or forced_right, (0.0, 1.0), START, method=method[:-1], mass_matrix=MASS, **options)


@pytest.mark.parametrize("method", [*RESIDUAL_METHODS, *(m + "M" for m in MASS_METHODS)])
def test_a_prescribed_variable_is_as_exact_as_the_tolerance_wherever_it_is_asked_for(method):
    extra = {"events": lambda t, y, *_: y[1] - 0.1, "dense_output": True}
    sol = solve(method, **extra)
    assert (sol.y[:, 1] - torch.sin(20 * SAMPLES)).abs().max() < 5e-5
    fine = torch.linspace(0.0, 1.0, 301, dtype=F64)
    assert (sol(fine)[:, 1] - torch.sin(20 * fine)).abs().max() < 5e-5
    first = math.asin(0.1)
    zeros = sorted([first + 2 * math.pi * k for k in range(4)] + [math.pi - first + 2 * math.pi * k for k in range(3)])
    torch.testing.assert_close(sol.events[0].t * 20, torch.tensor(zeros, dtype=F64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["radau", "rodas5pM"])
def test_a_prescribed_variable_of_a_nonlinear_constraint(method):
    sign = 1 if method == "radau" else -1
    fun = lambda t, y, *yp: torch.stack([sum(yp)[0] + y[0] if yp else -y[0], sign * (torch.exp(y[1]) - 2 - torch.sin(20 * t))])  # noqa: E731
    sol = solve(method, fun)
    assert (sol.y[:, 1] - torch.log(2 + torch.sin(20 * SAMPLES))).abs().max() < 5e-5


def test_steps_do_not_depend_on_the_scale_or_the_mixture_of_the_equations():
    mixer = torch.tensor([[1e-4, 3e5], [2e-4, -1e5]], dtype=F64)
    plain, mixed = solve("radau"), solve("radau", lambda t, y, yp: mixer @ forced(t, y, yp))
    assert plain.stats.n_accepted == mixed.stats.n_accepted
    torch.testing.assert_close(mixed.y, plain.y, rtol=1e-8, atol=1e-9)


def test_a_combination_of_variables_is_prescribed():
    # (x + z)' = -(x + z), z = sin 20 t: the matrix in front of the slopes names neither variable
    fun = lambda t, y, yp: torch.stack([yp[0] + yp[1] + y[0] + y[1], y[1] - torch.sin(20 * t)])  # noqa: E731
    sol = solve("radau", fun)
    torch.testing.assert_close(sol.y[:, 1], torch.sin(20 * SAMPLES), rtol=0, atol=5e-5)
    torch.testing.assert_close(sol.y.sum(-1), torch.exp(-SAMPLES), rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ["radau", "rodas5pM"])
def test_rows_of_batches_and_mapped_ones_take_the_steps_of_one_trajectory(method):
    w = torch.tensor([8.0, 3.0], dtype=F64)
    one = [solve(method, args=x) for x in w]
    mapped = torch.vmap(lambda x: solve(method, args=x).y)(w)
    rows = START.repeat(2, 1)
    if method == "radau":
        residual = lambda t, y, yp, w: torch.stack([yp[:, 0] + y[:, 0], y[:, 1] - torch.sin(w * t)], -1)  # noqa: E731
        both = solve_dae(residual, (0.0, 1.0), rows, args=w, batched=True, t_eval=SAMPLES, **TOLERANCES)
    else:
        right = lambda t, y, w: torch.stack([-y[:, 0], y[:, 1] - torch.sin(w * t)], -1)  # noqa: E731
        both = solve_ivp(right, (0.0, 1.0), rows, args=w, batched=True, t_eval=SAMPLES, method="rodas5p", mass_matrix=MASS, **TOLERANCES)
    for k, sol in enumerate(one):
        assert int(both.stats.n_accepted[k]) == int(sol.stats.n_accepted)
        torch.testing.assert_close(both.y[:, k], sol.y, rtol=0, atol=1e-8)
        torch.testing.assert_close(mapped[k], sol.y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), ForwardSensitivity()], ids=["discrete", "forward"])
def test_derivatives_of_a_prescribed_variable(gradient):
    w = torch.tensor(20.0, dtype=F64, requires_grad=True)
    z = solve("radau", args=w, gradient=gradient).y[13, 1]
    (slope,) = torch.autograd.grad(z, w)
    torch.testing.assert_close(slope.detach(), SAMPLES[13] * torch.cos(20 * SAMPLES[13]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["radau", "radau3"])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_a_prescribed_multiplier_follows_the_tolerance(method, tolerance):
    residual = lambda t, y, yp: torch.stack([yp[0] + y[0] - 2 * y[1], y[0] - 0.7 * torch.sin(t)])  # noqa: E731
    start = torch.tensor([0.0, 0.3], dtype=F64)
    sol = solve_dae(residual, (0.0, 1.0), start, t_eval=SAMPLES, rtol=tolerance, atol=tolerance / 10, method=method)
    assert (sol.y[:, 1] - 0.35 * (torch.cos(SAMPLES) + torch.sin(SAMPLES))).abs().max() < 10 * tolerance


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_a_multiplier_where_nothing_else_moves(compiled, tolerance):
    """A level that is held by an outflow: no error of the level tells of that of the outflow."""
    residual = lambda t, y, yp: torch.stack([yp[0] - 1 - torch.sin(5 * t) + 0.5 * y[0] + y[1], y[0] - 2.0])  # noqa: E731
    start, options = torch.tensor([2.0, 0.0], dtype=F64), {"rtol": tolerance, "atol": tolerance / 10, "compile": compiled}
    sol = solve_dae(residual, (0.0, 1.0), start, t_eval=SAMPLES, **options)
    assert (sol.y[:, 1] - torch.sin(5 * SAMPLES)).abs().max() < 10 * tolerance


def level(t, a, tau):
    """The algebraic variable of the problems below: it jumps at ``tau``."""
    return torch.where(t > tau, a, torch.sin(t))


def jumping(t, y, yp, a, tau):
    return torch.stack([yp[0] + y[0] - y[1], y[1] - level(t, a, tau)])


def jumping_right(t, y, a, tau):
    return torch.stack([y[1] - y[0], y[1] - level(t, a, tau)])


@pytest.mark.parametrize(
    ("method", "named"), [("radau", False), ("rodas5pM", False), ("radau", True), ("rodas5pM", True), ("bdf", True), ("bdfM", True)]
)
def test_a_jump_of_an_algebraic_variable_is_stepped_over(method, named):
    fun = jumping_right if method.endswith("M") else jumping
    a, tau = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (2.0, 0.5))
    times = torch.tensor([0.3, 0.4999, 0.5001, 1.0], dtype=F64)
    sol = solve(method, fun, t_eval=times, args=(a, tau.detach()), step_ts=tau.reshape(1) if named else None)
    torch.testing.assert_close(sol.y[:, 1], level(times, a, tau), rtol=0, atol=1e-5)
    # x' = sin t - x up to the jump, x' = 2 - x behind it
    at_jump = 1.5 * math.exp(-0.5) + (math.sin(0.5) - math.cos(0.5)) / 2
    assert abs(float(sol.y[-1, 0]) - (2 + (at_jump - 2) * math.exp(-0.5))) < 1e-4
    if named:
        slopes = torch.autograd.grad(sol.y[-1, 0], [a, tau])
        right = [1 - math.exp(-0.5), (math.sin(0.5) - 2) * math.exp(-0.5)]
        torch.testing.assert_close(torch.stack(slopes), torch.tensor(right, dtype=F64), rtol=0, atol=1e-4)


def circuit(t, y, yp, sign):
    """A ramp that begins and ends at named times, behind a capacitance that depends on the voltage; ``sign``: the direction of time."""
    ramp = torch.where(sign * t <= 0.25, 0.0, torch.where(sign * t >= 0.5, 5.0, 20 * (sign * t - 0.25)))
    return torch.stack([(1 + y[0] ** 2) * sign * yp[0] + 20 * (y[0] - y[1]), y[1] - ramp])


def test_slopes_behind_jumps_are_found_once_and_on_the_far_side():
    jumps, ends = torch.tensor([0.25, 0.5], dtype=F64), []
    for sign in (1.0, -1.0):
        start = torch.zeros(2, dtype=F64)
        sol = solve_dae(circuit, (0.0, sign), start, args=torch.tensor(sign, dtype=F64), step_ts=sign * jumps, **TOLERANCES)
        ends.append((sol.y[-1], sol.stats))
    (forward, stats), (backward, mirrored) = ends
    # one matrix an accepted step, and those of the search for slopes at the start and behind both jumps: not of every step
    assert int(stats.n_jac) <= int(stats.n_accepted) + 3 * 12
    assert torch.equal(forward, backward)
    counts = ("n_accepted", "n_rejected", "n_fun", "n_jac", "n_newton")
    assert [int(getattr(stats, name)) for name in counts] == [int(getattr(mirrored, name)) for name in counts]


def test_rows_of_bdf_jump_each_at_its_own_time():
    residual = lambda t, y, yp, tau: torch.stack([yp[:, 0] + y[:, 0] - y[:, 1], y[:, 1] - level(t, 2.0, tau)], -1)  # noqa: E731
    tau = torch.tensor([0.25, 0.5], dtype=F64)
    options = {"args": tau, "batched": True, "step_ts": tau.reshape(1, 2), "t_eval": SAMPLES[1::4]}
    sol = solve_dae(residual, (0.0, 1.0), START.repeat(2, 1), method="bdf", **TOLERANCES, **options)
    torch.testing.assert_close(sol.y[..., 1], level(SAMPLES[1::4].unsqueeze(-1), 2.0, tau), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mass", [False, True])
def test_bdf_refuses_index_two_by_name(mass):
    start = torch.tensor([0.0, 0.35], dtype=F64)
    right = lambda t, y: torch.stack([2 * y[1] - y[0], y[0] - 0.7 * torch.sin(t)])  # noqa: E731
    residual = lambda t, y, yp: right(t, y) - MASS @ yp  # noqa: E731
    door, fun, options = (solve_ivp, right, {"mass_matrix": MASS}) if mass else (solve_dae, residual, {})
    with pytest.raises(HigherIndexDAE, match="'bdf' is for equations of index 0 and 1"):
        door(fun, (0.0, 1.0), start, method="bdf", **options)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        pytest.param(method, problem, marks=[pytest.mark.slow] if problem == "stiff" else [])
        for method, problem in cases()
        if method != "implicit_euler"
    ],
)
def test_dense_output_of_every_method_is_of_the_order_of_its_tolerance(method, problem):
    # fehlberg2 and trbdf2: their errors at the ends of steps are as large
    bound = 1000 if method == "fehlberg2" else 50
    ends, between, _ = measured(method, problem, 1e-4)
    assert between < bound
    assert between < 30 * max(ends, 1.0)
