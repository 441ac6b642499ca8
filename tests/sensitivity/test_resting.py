"""Derivatives where the state itself asks for no small steps: at rest, constant, on a slow manifold."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipy_solve
from torch.autograd import forward_ad

import adjoint


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


OSCILLATOR = matrix([0.0, 1.0], [-1.0, -0.1])
CHAIN = matrix([-3.0, 0.0, 0.0], [3.0, -2.0, 0.0], [0.0, 2.0, -1.0])
BESIDE = torch.block_diag(matrix([-1.0]), OSCILLATOR)
FAST_BESIDE = matrix([-1.0, 0.0], [0.0, -60.0])
#: the fast mode of two that are coupled rests
FAST_MODE = matrix([-31.5, 28.5], [28.5, -31.5])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def linear(a):
    return lambda t, y: y @ a.T


def pendulum(t, y):
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) - 0.1 * y[..., 1]], -1)


def end(fun, span, method="tsit5", **options):
    return lambda y0: adjoint.solve_ivp(fun, (0.0, span), y0, method=method, **options).y[-1]


def jacobian(solve, y0):
    y0 = torch.tensor(y0, requires_grad=True)
    return torch.stack([torch.autograd.grad(x, y0, retain_graph=True)[0] for x in solve(y0)])


CASES = {
    "oscillator": (linear(OSCILLATOR), OSCILLATOR, 20.0, [0.0, 0.0]),
    "pendulum": (pendulum, OSCILLATOR, 20.0, [0.0, 0.0]),
    "decay": (linear(matrix([-100.0])), matrix([-100.0]), 1.0, [0.0]),
    "chain": (linear(CHAIN), CHAIN, 5.0, [0.0, 0.0, 0.0]),
    "oscillator beside": (linear(BESIDE), BESIDE, 20.0, [1.0, 0.0, 0.0]),
    "decay beside": (linear(FAST_BESIDE), FAST_BESIDE, 3.0, [1.0, 0.0]),
    "fast mode": (linear(FAST_MODE), FAST_MODE, 2.0, [1.0, 1.0]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["tsit5", slow("dopri5"), slow("dopri8"), slow("bosh3")])
def test_derivatives_in_the_initial_state(case, method):
    fun, a, span, y0 = CASES[case]
    torch.testing.assert_close(jacobian(end(fun, span, method), y0), torch.linalg.matrix_exp(a * span), rtol=0, atol=5e-5)


LOOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "radau5", "auto", "abm", "bdf", slow("trbdf2"), slow("kvaerno3")])
@pytest.mark.parametrize("case", ["oscillator", "oscillator beside", slow("decay"), slow("chain"), slow("decay beside")])
def test_steps_of_other_methods_are_short_enough_too(case, method):
    fun, a, span, y0 = CASES[case]
    span = span / 5
    torch.testing.assert_close(jacobian(end(fun, span, method, **LOOSE), y0), torch.linalg.matrix_exp(a * span), rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", ["kvaerno5", "auto", "abm", "bdf"])
def test_many_trajectories_of_implicit_methods(method):
    y0 = torch.tensor([[1.0, 0.5], [0.0, 0.0]], requires_grad=True)
    y = end(linear(OSCILLATOR), 4.0, method, batched=True, **LOOSE)(y0)
    truth = torch.linalg.matrix_exp(OSCILLATOR * 4.0)
    torch.testing.assert_close(y, y0 @ truth.T, rtol=0, atol=1e-3)
    (found,) = torch.autograd.grad(y[:, 0].sum(), y0)
    torch.testing.assert_close(found, truth[0].expand(2, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method, controller", [("tsit5", adjoint.PIController()), ("kvaerno3", None)])
def test_controllers_that_remember_are_told_the_error_beside(method, controller):
    # alone and as a row: the steps are the same
    y0 = torch.zeros(2, requires_grad=True)
    options = {"method": method, "controller": controller, **LOOSE}
    alone, row = (adjoint.solve_ivp(linear(OSCILLATOR), (0.0, 4.0), y, batched=y.dim() > 1, **options) for y in (y0, y0.unsqueeze(0)))
    assert alone.stats.n_steps == int(row.stats.n_steps[0]) > 10


@pytest.mark.parametrize("stiffness", [30.0, 100.0])
def test_a_slow_manifold_with_a_multistep_method(stiffness):
    y0 = torch.ones(1, requires_grad=True)
    y = end(lambda t, y: -stiffness * (y - torch.cos(t)) - torch.sin(t), 2.0, "abm", **LOOSE)(y0)
    (found,) = torch.autograd.grad(y[0], y0)
    assert found.abs().item() < 1e-4


def test_a_fast_mode_that_rests_in_a_multistep_method():
    truth = torch.linalg.matrix_exp(FAST_MODE * 2.0)
    torch.testing.assert_close(jacobian(end(linear(FAST_MODE), 2.0, "abm", **LOOSE), [1.0, 1.0]), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["abm", "bdf"])
def test_samples_and_inputs_of_a_multistep_method_at_rest(method):
    p, times = torch.zeros(1, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])

    def fun(t, y, p):
        return torch.stack([y[1], -y[0] - 0.1 * y[1] + p[0]])

    y = adjoint.solve_ivp(fun, (0.0, 3.0), torch.zeros(2), args=(p,), method=method, t_eval=times, **LOOSE).y
    constant = matrix([0.0], [1.0])
    for k, t in enumerate(times):
        truth = torch.linalg.solve(OSCILLATOR, (torch.linalg.matrix_exp(OSCILLATOR * t) - torch.eye(2)) @ constant)
        (found,) = torch.autograd.grad(y[k, 0], p, retain_graph=True)
        torch.testing.assert_close(found, truth[0], rtol=0, atol=1e-3)


def test_events_with_a_multistep_method_at_rest_are_warned_of():
    y0 = torch.zeros(2, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="the state rests"):
        adjoint.solve_ivp(linear(OSCILLATOR), (0.0, 5.0), y0, method="abm", events=lambda t, y: y[0] - 1.0)


@pytest.mark.parametrize("method", ["kencarp3", slow("kencarp5")])
def test_the_explicit_part_of_an_additive_method(method):
    explicit, implicit = matrix([0.0, 4.0], [-4.0, -20.0]), matrix([-1.0, 0.0], [0.0, -3.0])
    fun = adjoint.SplitFunction(linear(explicit), linear(implicit))
    truth = torch.linalg.matrix_exp(explicit + implicit)
    torch.testing.assert_close(jacobian(end(fun, 1.0, method, **LOOSE), [0.0, 0.0]), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("stiffness", [100.0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("moving", [1.0, 0.0])
def test_a_slow_manifold_with_a_switched_method(stiffness, moving):
    def fun(t, y, p):
        return -stiffness * (y - p * torch.cos(moving * t)) - p * moving * torch.sin(moving * t)

    y0, p = torch.ones(1, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    sol = adjoint.solve_ivp(fun, (0.0, 2.0), y0, args=(p,), method="auto")
    first = torch.autograd.grad(sol.y[-1, 0], (y0, p))
    assert first[0].abs().item() < 1e-6
    assert first[1].item() == pytest.approx(np.cos(2.0 * moving), abs=1e-6)
    # it is handed over, and not followed by short steps
    assert sol.stats.n_steps < 400


@pytest.mark.parametrize("gradient", [adjoint.DiscreteAdjoint(), adjoint.DiscreteAdjoint(checkpoints=5), adjoint.ForwardSensitivity()])
def test_of_every_strategy(gradient):
    y0 = torch.zeros(2, requires_grad=True)
    (found,) = torch.autograd.grad(end(linear(OSCILLATOR), 10.0, gradient=gradient)(y0)[0], y0)
    torch.testing.assert_close(found, torch.linalg.matrix_exp(OSCILLATOR * 10.0)[0], rtol=0, atol=1e-5)


def test_rows_that_rest_beside_rows_that_do_not():
    y0 = torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.0, 1e-3]], requires_grad=True)
    y = end(linear(OSCILLATOR), 10.0, batched=True)(y0)
    truth = torch.linalg.matrix_exp(OSCILLATOR * 10.0)
    torch.testing.assert_close(y, y0 @ truth.T, rtol=0, atol=1e-5)
    (found,) = torch.autograd.grad(y[:, 0].sum(), y0)
    torch.testing.assert_close(found, truth[0].expand(3, -1), rtol=0, atol=1e-4)


def test_forward_mode_maps_and_second_order():
    solve = end(pendulum, 2.0)
    truth = torch.linalg.matrix_exp(OSCILLATOR * 2.0)
    torch.testing.assert_close(torch.func.jacfwd(solve)(torch.zeros(2)), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(solve))(torch.zeros(2, 2)), truth.expand(2, 2, 2), rtol=0, atol=1e-5)
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(solve(forward_ad.make_dual(torch.zeros(2), torch.ones(2)))).tangent
    torch.testing.assert_close(along, truth.sum(1), rtol=0, atol=1e-5)
    # y' = -y + y^2: y(t) = y0 e / (1 - y0 (1 - e)), e = exp(-t)
    e = np.exp(-3.0)
    y0 = torch.zeros(1, requires_grad=True)
    (first,) = torch.autograd.grad(end(lambda t, y: -y + y**2, 3.0)(y0), y0, create_graph=True)
    (second,) = torch.autograd.grad(first, y0)
    assert second.item() == pytest.approx(2 * e * (1 - e), abs=1e-5)


def test_steady_state_reached_long_before_the_end():
    y0, p = torch.tensor([0.5], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = end(lambda t, y: -50 * (y - p), 5.0)(y0)
    first = torch.autograd.grad(y[0], (y0, p))
    assert first[0].abs().item() < 1e-6
    assert first[1].item() == pytest.approx(1.0, abs=1e-6)


def test_a_forcing_of_size_zero():
    dose = torch.zeros(1, requires_grad=True)

    def fun(t, y):
        return torch.stack([y[1], -y[0] - 0.1 * y[1] + dose[0] * torch.cos(3 * t)])

    (found,) = torch.autograd.grad(end(fun, 10.0)(torch.zeros(2))[0], dose)
    truth = scipy_solve(lambda t, y: [y[1], -y[0] - 0.1 * y[1] + np.cos(3 * t)], (0, 10.0), [0, 0], rtol=1e-10, atol=1e-12).y[0, -1]
    assert found.item() == pytest.approx(truth, abs=1e-5)


def test_ordinary_solves_take_the_steps_that_they_take_without_derivatives():
    def volterra(t, y, p):
        a, b = y.unbind(-1)
        return torch.stack([p * a - a * b, a * b - b], -1)

    for method in ("tsit5", "dopri8", "bosh3", "kvaerno5", "rodas5p", "abm", "bdf"):
        steps = []
        for wanted in (False, True):
            p = torch.tensor(1.5, requires_grad=wanted)
            for batched in (False, True):
                y0 = torch.tensor([1.0, 0.3])
                y0 = y0.expand(2, -1) if batched else y0
                sol = adjoint.solve_ivp(volterra, (0.0, 5.0), y0, args=(p,), method=method, rtol=1e-4, batched=batched)
                steps.append(int(torch.as_tensor(sol.stats.n_steps).max()))
        assert len(set(steps)) == 1, (method, steps)


def test_oscillators_whose_components_differ_in_size_are_not_taken_for_stiff():
    """A round of power iteration is far from the size of complex eigenvalues there: up in one, down in the next."""

    def turning(t, y):
        return torch.stack([0.7 * y[..., 1], -(y[..., 0] ** 3) + torch.sin(t), 0 * y[..., 0]], -1)

    def decaying(t, y):
        return torch.stack([0 * y[..., 0], -0.1 * y[..., 1], 30 * (torch.cos(y[..., 0]) - y[..., 2])], -1)

    fun = adjoint.SplitFunction(turning, decaying)
    for batched in (False, True):
        steps = []
        for wanted in (False, True):
            y0 = torch.tensor([1.0, 0.3, 0.5], requires_grad=wanted)
            y0 = y0.expand(2, -1) if batched else y0
            sol = adjoint.solve_ivp(fun, (0.0, 1.0), y0, method="kencarp4", rtol=1e-4, atol=1e-6, batched=batched)
            steps.append(int(torch.as_tensor(sol.stats.n_steps).max()))
        assert steps[0] == steps[1]


@pytest.mark.parametrize("method", ["abm", "bdf"])
@pytest.mark.slow_cases("abm")
def test_rows_of_multistep_solves_do_not_know_of_each_other(method):
    """One at rest, which is solved again, beside one that is not, and one that fails."""

    def fun(t, y):
        return torch.where(y[..., :1].abs() > 5, torch.nan, y @ OSCILLATOR.T)

    def solve(y0, end, batched):
        y0 = y0.clone().requires_grad_()
        times = torch.linspace(0.0, 1.0, 4)[:, None] * end if batched else None
        sol = adjoint.solve_ivp(fun, (0.0, end), y0, method=method, batched=batched, t_eval=times, throw=False)
        return sol, torch.autograd.grad(sol.y[-1].nan_to_num().sin().sum(), y0)[0]

    starts, ends = torch.tensor([[0.0, 0.0], [1.0, -0.5], [6.0, 0.0]]), torch.tensor([20.0, 7.0, 3.0])
    together, bars = solve(starts, ends, True)
    assert (together.status >= 0).tolist() == [True, True, False]
    for i in range(2):
        one, bar = solve(starts[i], ends[i], False)
        assert together.stats.n_accepted[i] == one.stats.n_accepted
        assert torch.allclose(together.y[-1, i], one.y[-1], rtol=1e-9, atol=1e-12)
        assert torch.allclose(bars[i], bar, rtol=1e-7, atol=1e-9)
    truth = torch.linalg.matrix_exp(20.0 * OSCILLATOR).sum(0)
    assert torch.allclose(bars[0], truth, atol=1e-3)


def test_a_component_that_rests_in_tiny_steps_alone():
    """Its change in them is below rounding, and says nothing of what longer steps would do: one solve is enough."""
    k = torch.tensor([3.0, 1e6], dtype=torch.float64, requires_grad=True)

    def fun(t, y, k):
        a, b = y.unbind(-1)
        return torch.stack([-k[0] * 1e-3 * a * b, k[1] * (torch.cos(t) - b)], -1)

    y0 = torch.tensor([1.0, 0.9], dtype=torch.float64)
    sol = adjoint.solve_ivp(fun, (0.0, 5.0), y0, (k,), method="bdf", first_step=1e-17)
    plain = adjoint.solve_ivp(fun, (0.0, 5.0), y0, (k.detach(),), method="bdf", first_step=1e-17)
    assert sol.stats.n_steps == plain.stats.n_steps
    (slope,) = torch.autograd.grad(sol.y[-1, 0], k)
    # a is exp(-k0 sin(5) / 1000), but for what b is late by
    exact = -1e-3 * math.sin(5.0) * math.exp(-3e-3 * math.sin(5.0))
    torch.testing.assert_close(slope[0], torch.tensor(exact, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("method", ["kvaerno3", "rodas5p", "radau5", "tsit5"])
@pytest.mark.slow_cases("kvaerno3-True-False", "kvaerno3-False-True", "radau5-False-True", "kvaerno3-True-True")
def test_a_pulse_that_ends_a_rest(method, declared, batched):
    """A displaced time of a switch is another one, before which the solution jumps and its displaced one does not."""
    rate, (on, off) = 5.0, (0.3, 0.7)
    times, k = torch.tensor([on, off], requires_grad=True), torch.tensor([rate], requires_grad=True)

    def fun(t, y, k):
        inside = (t > times[0]) & (t <= times[1])
        return -k * (y - torch.where(inside, 1.0, 0.0).reshape(-1, 1) if batched else y - torch.where(inside, 1.0, 0.0))

    y0 = torch.zeros(2, 1) if batched else torch.zeros(1)
    keys = {"method": method, "rtol": 1e-6, "atol": 1e-8, "batched": batched, "step_ts": times if declared else None}
    with warnings.catch_warnings():
        # what is declared is no jump to be told of
        warnings.filterwarnings("error" if declared else "ignore", "fun jumps at")
        end = adjoint.solve_ivp(fun, (0.0, 1.0), y0, (k,), **keys).y[-1].mean()
    exact = math.exp(-rate * (1 - off)) - math.exp(-rate * (1 - on))
    assert float(end.detach()) == pytest.approx(exact, abs=1e-4)
    (by_k,) = torch.autograd.grad(end, k, retain_graph=True)
    slope = -(1 - off) * math.exp(-rate * (1 - off)) + (1 - on) * math.exp(-rate * (1 - on))
    assert float(by_k) == pytest.approx(slope, abs=1e-4)
    if declared:
        (by_times,) = torch.autograd.grad(end, times)
        wanted = torch.tensor([-rate * math.exp(-rate * (1 - on)), rate * math.exp(-rate * (1 - off))])
        torch.testing.assert_close(by_times, wanted, rtol=1e-4, atol=1e-4)


def evaluations(fun, span, y0, **options):
    """Of the solve without derivatives, and of the one whose derivatives are wanted."""
    plain = adjoint.solve_ivp(fun, span, y0, **options).stats.n_fun
    return torch.as_tensor(plain), torch.as_tensor(adjoint.solve_ivp(fun, span, y0.clone().requires_grad_(), **options).stats.n_fun)


@pytest.mark.parametrize("method", ["tsit5", "verner7", "dopri8"])
def test_rows_that_have_finished_are_no_reason_to_look(method):
    y0 = torch.tensor([[1.0, 0.3], [0.2, -0.4], [-1.0, 2.0]])
    end = torch.tensor([1.0, 0.35, 40.0])
    fun = lambda t, y: torch.stack([y[..., 1], -(y[..., 0] ** 3)], -1)  # noqa: E731
    plain, wanted = evaluations(fun, (0.0, end), y0, method=method, batched=True)
    # a look costs one to three evaluations; there are some ten of them
    assert (wanted >= plain).all() and (wanted - plain <= 45).all()


def test_components_of_other_sizes_and_rounding_are_no_reason_to_follow():
    """Of thousands of numbers in single precision some are near zero, and the errors of some are zero by rounding."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)]
    net = torch.nn.Sequential(*layers).float().requires_grad_(False)
    for weights in net.parameters():
        weights *= 8
    y0 = torch.randn(128, 64, dtype=torch.float32)
    plain, wanted = evaluations(lambda t, y: net(y), (0.0, 1.0), y0, method="dopri5", rtol=1e-5, atol=1e-6)
    assert 0 <= int(wanted - plain) <= 30


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("power", [0.3, 0.5, 0.8])
def test_no_step_is_short_enough_for_a_derivative_that_is_infinite(power, beside, batched):
    def fun(t, y):
        return torch.stack([-y[..., 0], -y[..., 1].abs() ** power], -1)

    y0 = torch.tensor([float(beside), 0.0])
    y0 = (torch.stack([y0, y0 + 1.0]) if batched else y0).requires_grad_()
    calls = {"method": "tsit5", "batched": batched}
    without = adjoint.solve_ivp(fun, (0.0, 1.0), y0.detach(), **calls)
    solution = adjoint.solve_ivp(fun, (0.0, 1.0), y0, **calls)
    rested = (lambda x: x[0]) if batched else (lambda x: x)
    assert int(rested(solution.stats.n_steps)) <= int(rested(without.stats.n_steps)) + 4
    torch.testing.assert_close(rested(solution.y[-1].detach()), rested(without.y[-1]), rtol=1e-6, atol=1e-9)
    if batched:
        assert torch.autograd.grad(solution.y[-1, 1].sum(), y0)[0][1].isfinite().all()
    else:
        with pytest.raises(adjoint.NonFiniteDerivative, match=r"component y\[1\]"):
            solution.y[-1].sum().backward()


def test_a_right_hand_side_that_jumps_at_rest_is_followed():
    y0 = torch.zeros(1, requires_grad=True)
    (grad,) = torch.autograd.grad(adjoint.solve_ivp(lambda t, y: -20 * y - 1e-8 * (y > 0), (0.0, 2.0), y0, method="tsit5").y[-1], y0)
    assert abs(float(grad)) < 1e-6
