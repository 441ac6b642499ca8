"""Times as users have them: single precision beside numbers, lists of tensors, spans of no length."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import adjoint

DOUBLE = {"dtype": torch.float64}


def decay(t, y):
    return -y


def test_times_in_single_precision_over_a_span_of_numbers():
    ts = torch.linspace(0, 7.3, 11, dtype=torch.float32)
    assert float(ts[-1]) > 7.3
    for y0 in (torch.ones(1, dtype=torch.float32), torch.ones(1, **DOUBLE)):
        out = adjoint.solve_ivp(decay, (0.0, 7.3), y0, t_eval=ts, dense_output=True, step_ts=ts)
        torch.testing.assert_close(out(ts), out.y)
        torch.testing.assert_close(out(7.3), out.y[-1])
    batch = adjoint.solve_ivp(decay, (0.0, torch.tensor([7.3, 7.3], **DOUBLE)), torch.ones(2, 1, **DOUBLE), t_eval=ts, batched=True)
    torch.testing.assert_close(batch.y[-1, :, 0], torch.full((2,), math.exp(-7.3)), rtol=1e-2, atol=1e-5)
    with pytest.raises(adjoint.errors.InvalidInput, match="outside"):
        adjoint.solve_ivp(decay, (0.0, 7.3), torch.ones(1), t_eval=[0.0, 7.30001])


def test_a_time_that_is_an_end_but_for_rounding_keeps_its_derivative():
    ts = torch.tensor([7.3], dtype=torch.float32, requires_grad=True)
    y = adjoint.solve_ivp(decay, (0.0, 7.3), torch.ones(1, **DOUBLE), t_eval=ts).y
    assert float(torch.autograd.grad(y.sum(), ts)[0]) == pytest.approx(-math.exp(-7.3), rel=1e-3)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "bdf"])
def test_a_span_of_no_length_is_its_initial_state(method):
    start, end = (torch.tensor(0.5, **DOUBLE, requires_grad=True) for _ in range(2))
    y0 = torch.tensor([2.0], **DOUBLE, requires_grad=True)
    out = adjoint.solve_ivp(decay, (start, end), y0, method=method)
    assert out.status == 0 and float(out.y[-1]) == 2.0
    by_start, by_end, by_state = torch.autograd.grad(out.y[-1].sum(), (start, end, y0))
    assert (float(by_start), float(by_end), float(by_state)) == pytest.approx((2.0, -2.0, 1.0))
    times = adjoint.solve_ivp(decay, (0.5, 0.5), y0, t_eval=[0.5, 0.5], method=method).y
    assert times[:, 0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "bdf"])
def test_one_trajectory_of_a_batch_with_a_span_of_no_length(method):
    y0 = torch.tensor([[2.0], [1.0]], **DOUBLE, requires_grad=True)
    spans = (torch.tensor([0.5, 0.0], **DOUBLE), torch.tensor([0.5, 1.0], **DOUBLE))
    out = adjoint.solve_ivp(decay, spans, y0, t_eval=torch.stack([*spans, spans[1]]), batched=True, method=method)
    assert out.status.tolist() == [0, 0]
    assert out.y[:, 0, 0].tolist() == [2.0, 2.0, 2.0]
    (bar,) = torch.autograd.grad(out.y[1:].sum(), y0)
    torch.testing.assert_close(bar[:, 0], torch.tensor([2.0, 2 * math.exp(-1)], **DOUBLE), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_constrained_trajectories_with_a_span_of_no_length(method):
    residual = lambda t, y, yp: torch.stack([yp[..., 0] + y[..., 1], y[..., 1] - y[..., 0]], -1)  # noqa: E731
    spans = (torch.tensor([0.5, 0.0], **DOUBLE), torch.tensor([0.5, 1.0], **DOUBLE))
    y = adjoint.solve_dae(residual, spans, torch.ones(2, 2, **DOUBLE), method=method, batched=True).y[-1, :, 0]
    torch.testing.assert_close(y, torch.tensor([1.0, math.exp(-1)], **DOUBLE), rtol=1e-4, atol=0.0)
    assert adjoint.solve_dae(residual, (0.5, 0.5), torch.ones(2, **DOUBLE), method=method).y.tolist() == [[1.0, 1.0]] * 2


def forms(solve, y0, end, ts):
    """One call for each form: ``solve(end, y0, ts, **options)``."""
    yield lambda: solve(end, y0, ts, batched=True)
    yield lambda: torch.vmap(solve, in_dims=(0, 0, 1))(end, y0, ts)


@pytest.mark.parametrize("moving", ["end", "samples"])
@pytest.mark.parametrize("method", ["bdf", "abm", "tsit5"])
def test_derivatives_in_times_where_some_spans_have_no_length(method, moving):
    """A multistep method takes no step there: it says so, mapped or not, and one-step methods give the slope."""
    y0 = torch.tensor([[2.0], [1.0]], **DOUBLE)
    end, ts = torch.tensor([0.0, 1.0], **DOUBLE), torch.tensor([[0.0, 0.5]], **DOUBLE)
    moved = (end if moving == "end" else ts).requires_grad_()

    def solve(end, y0, ts, **options):
        samples = {} if moving == "end" else {"t_eval": ts}
        return adjoint.solve_ivp(decay, (0.0, end), y0, method=method, **samples, **options).y[-1]

    for call in forms(solve, y0, end, ts):
        if method != "tsit5":
            with pytest.raises(adjoint.errors.UnsupportedCombination, match="some have no length"):
                call()
            with torch.no_grad():
                assert torch.isfinite(call()).all()
        else:
            slopes = torch.autograd.grad(call().sum(), moved)[0].flatten()
            assert float(slopes[0]) == pytest.approx(-2.0)
    # what is only mapped over does not move
    fixed = [x.detach() for x in (end, ts)]
    assert torch.vmap(solve, in_dims=(0, 0, 1))(fixed[0], y0, fixed[1])[0].item() == 2.0


@pytest.mark.parametrize("named", [[0.3], [0.1, 0.9], [0.3, 0.3, 0.9]])
def test_ends_that_are_one_have_their_own_derivatives_beside_named_times(named):
    """``y' = 2 y`` over no length: -2 in the start and 2 in the end, in rows beside one that has a length, too."""
    start, end = torch.tensor([0.3, 0.3], **DOUBLE, requires_grad=True), torch.tensor([0.3, 0.8], **DOUBLE, requires_grad=True)
    y = adjoint.solve_ivp(lambda t, y: 2 * y, (start, end), torch.ones(2, 1, **DOUBLE), step_ts=torch.tensor(named), batched=True).y[-1]
    grown = 2 * math.exp(1.0)
    for x, wanted in ((start, [-2.0, -grown]), (end, [2.0, grown])):
        (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.testing.assert_close(found, torch.tensor(wanted, **DOUBLE), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", ["bdf", "tsit5"])
def test_mapped_ends_in_forward_mode(method):
    y0, end = torch.tensor([[2.0], [1.0]], **DOUBLE), torch.tensor([0.5, 1.0], **DOUBLE)
    solve = torch.vmap(lambda end, y0: adjoint.solve_ivp(decay, (0.0, end), y0, method=method, rtol=1e-6).y[-1])
    with torch.autograd.forward_ad.dual_level():
        moved = torch.autograd.forward_ad.make_dual(end, torch.ones(2, **DOUBLE))
        slopes = torch.autograd.forward_ad.unpack_dual(solve(moved, y0)).tangent[:, 0]
    torch.testing.assert_close(slopes, torch.tensor([-2 * math.exp(-0.5), -math.exp(-1)], **DOUBLE), rtol=1e-4, atol=0.0)
    spans = torch.zeros(2, **DOUBLE)
    with torch.autograd.forward_ad.dual_level():
        moved = torch.autograd.forward_ad.make_dual(torch.stack([end[0], spans[0]]), torch.ones(2, **DOUBLE))
        if method == "bdf":
            with pytest.raises(adjoint.errors.UnsupportedCombination, match="some have no length"):
                solve(moved, y0)
        else:
            assert float(torch.autograd.forward_ad.unpack_dual(solve(moved, y0)).tangent[1]) == pytest.approx(-1.0)


@pytest.mark.parametrize("gradient", [adjoint.DiscreteAdjoint(), adjoint.Backprop()])
@pytest.mark.parametrize("method", ["bdf", "abm", "kvaerno3"])
def test_a_mapped_span_of_no_length_does_no_harm(method, gradient):
    y0, end = torch.tensor([[2.0], [1.0]], **DOUBLE), torch.tensor([0.0, 1.0], **DOUBLE)
    rate = torch.tensor(1.0, **DOUBLE, requires_grad=True)

    def solve(end, y0):
        return adjoint.solve_ivp(lambda t, y, k: -k * y, (0.0, end), y0, (rate,), method=method, gradient=gradient, rtol=1e-6).y[-1]

    (bar,) = torch.autograd.grad(torch.vmap(solve)(end, y0).sum(), rate)
    assert float(bar) == pytest.approx(-math.exp(-1), rel=1e-4)


@pytest.mark.parametrize("door", ["solve_dae", "mass_matrix"])
def test_derivatives_in_times_of_constraints_over_a_span_of_no_length(door):
    mass, end = torch.diag(torch.tensor([1.0, 0.0], **DOUBLE)), torch.tensor(0.5, **DOUBLE, requires_grad=True)
    rate = lambda t, y: torch.stack([-y[1], y[0] - y[1]])  # noqa: E731
    solve, fun, options = adjoint.solve_dae, lambda t, y, yp: mass @ yp - rate(t, y), {}
    if door == "mass_matrix":
        solve, fun, options = adjoint.solve_ivp, rate, {"method": "radau5", "mass_matrix": mass}
    with pytest.raises(adjoint.errors.UnsupportedCombination, match="span of no length"):
        solve(fun, (0.5, end), torch.ones(2, **DOUBLE), **options)


@pytest.mark.parametrize("method", ["radau5", "rodas5p", "bdf"])
def test_mass_matrices_in_single_precision_beside_a_span_of_no_length(method):
    mass = torch.tensor([[1.0, -0.25], [0.5, 1.0]])
    fun = lambda t, y: torch.stack([y[..., 1], -y[..., 0]], -1) @ mass.mT  # noqa: E731
    y0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    ends = torch.tensor([0.5, 0.0], **DOUBLE)
    y = adjoint.solve_ivp(fun, (0.0, ends), y0, method=method, batched=True, mass_matrix=mass, rtol=1e-4, atol=1e-6).y[-1]
    torch.testing.assert_close(y, torch.tensor([[math.cos(0.5), -math.sin(0.5)], [0.0, 1.0]]), rtol=1e-3, atol=1e-3)
    (bar,) = torch.autograd.grad(y.sum(), y0)
    want = torch.tensor([[math.cos(0.5) - math.sin(0.5), math.cos(0.5) + math.sin(0.5)], [1.0, 1.0]])
    torch.testing.assert_close(bar, want, rtol=1e-3, atol=1e-3)


def test_lists_of_tensors_as_times_keep_their_derivatives():
    T, w = torch.tensor(0.8, **DOUBLE, requires_grad=True), torch.tensor(1.0, **DOUBLE)
    one, want = torch.ones(1, **DOUBLE), -0.8 * math.exp(-0.32)
    slope = lambda t, y: -w * y * t  # noqa: E731
    rows = lambda t, y: -w * y * t[:, None]  # noqa: E731

    def by(y):
        return float(torch.autograd.grad(y.sum(), T)[0])

    assert by(adjoint.solve_ivp(slope, (0.0, 1.0), one, t_eval=[T]).y) == pytest.approx(want, rel=1e-4)
    assert by(adjoint.solve_ivp(slope, (0.0, 1.0), one, t_eval=(0.0, T)).y[1]) == pytest.approx(want, rel=1e-4)
    assert by(adjoint.solve_ivp(slope, (0.0, 1.0), one, dense_output=True)([T])) == pytest.approx(want, rel=1e-4)
    assert by(adjoint.solve_ivp(rows, (0.0, [T, 1.0]), torch.ones(2, 1, **DOUBLE), batched=True).y[-1]) == pytest.approx(want, rel=1e-4)
    own = adjoint.solve_ivp(rows, (0.0, 1.0), torch.ones(2, 1, **DOUBLE), t_eval=[[0.1, 0.2], [T, 0.9]], batched=True).y
    assert by(own[1]) == pytest.approx(want, rel=1e-4)
    jump = lambda t, y: -w * torch.where(t <= T, y, 3 * y)  # noqa: E731
    assert by(adjoint.solve_ivp(jump, (0.0, 2.0), one, step_ts=[T]).y[-1]) == pytest.approx(2 * math.exp(-4.4), rel=1e-3)


@pytest.mark.parametrize("method", ["tsit5", "radau5", "bdf"])
def test_many_times_of_many_trajectories_are_those_of_every_one(method):
    # some of them twice, of which each step holds many: as if the solve had been asked for each of a few alone
    p, y0 = torch.tensor([1.0, 1.7, 3.0], dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    times = torch.linspace(0.0, 1.0, 2000, dtype=torch.float64)
    times = torch.cat([times, times[::400]]).sort().values
    ends = torch.tensor([1.0, 1.5, -2.0], dtype=torch.float64)
    fun = lambda t, y, p: -p.unsqueeze(-1) * y * (1 + t.unsqueeze(-1))  # noqa: E731

    def solve(ts):
        options = {"method": method, "rtol": 1e-7, "atol": 1e-10, "batched": True, "args": (p,)}
        return adjoint.solve_ivp(fun, (0.0, ends), y0, t_eval=ts, **options).y

    t = times.unsqueeze(-1) * ends
    many = solve(t)
    torch.testing.assert_close(many[..., 0], torch.exp(-p * (t + t**2 / 2)), rtol=2e-5, atol=1e-8)
    for i in (0, 7, 1000, 2001):
        torch.testing.assert_close(solve(t[i : i + 1])[0], many[i], rtol=1e-13, atol=1e-15)


def test_batched_sampling_takes_as_many_operators_however_many_times():
    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))

    def operators(n):
        with torch.no_grad(), Count() as count:
            ts = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
            adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2, 3, dtype=torch.float64), t_eval=ts, batched=True)
        return count.n

    # but for a step that holds none of the fewer ones
    assert abs(operators(2000) - operators(200)) < 50
