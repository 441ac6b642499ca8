"""Functions that keep the tensor which they return, or change the one they are given."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from adjoint import Backprop, DiscreteAdjoint, SteadyStateObjective, odeint, odeint_event, solve_dae, solve_ivp, solve_root
from adjoint.errors import CapturedTensorLost, InvalidInput, UnsupportedCombination
from adjoint.system.ownership import own
from adjoint.torch_internals import differentiates_in_inference_mode

RATE = -1.3
SPAN = torch.tensor([0.0, 1.0])


def _truth(y0):
    return y0 * math.exp(RATE)


def _into_buffer():
    kept = torch.empty(2)
    return lambda t, y: torch.mul(y, RATE, out=kept)


def _view_of_buffer():
    kept = torch.empty(3, 2)

    def fun(t, y):
        torch.mul(y, RATE, out=kept[1])
        return kept[1]

    return fun


def _detached_buffer():
    kept = torch.empty(2)

    def fun(t, y):
        kept.copy_(y * RATE)
        return kept.data

    return fun


def _two_in_turn():
    kept, calls = torch.empty(2, 2), [0]

    def fun(t, y):
        calls[0] += 1
        return torch.mul(y, RATE, out=kept[calls[0] % 2])

    return fun


def _numpy_buffer():
    kept = np.empty(2)

    def fun(t, y):
        np.multiply(y.numpy(), RATE, out=kept)
        return torch.from_numpy(kept)

    return fun


def _late():
    """A tensor of its own only at first."""
    kept = torch.empty(2)
    return lambda t, y: torch.mul(y, RATE, out=kept if t > 0.4 else None)


class _Entries(torch.nn.Module):
    """Writes entry by entry into a tensor that it keeps, which autograd can follow."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(RATE))
        self.kept = torch.empty(2)

    def forward(self, t, y):
        self.kept = self.kept.detach()
        self.kept[0] = self.rate * y[0]
        self.kept[1] = self.rate * y[1]
        return self.kept


KEEPERS = [_into_buffer, _view_of_buffer, _detached_buffer, _two_in_turn, _numpy_buffer, _late]


@pytest.mark.parametrize("make", KEEPERS)
@pytest.mark.parametrize("method", ["tsit5", "abm"])
def test_a_tensor_used_again_for_the_result(make, method):
    y0 = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        y = solve_ivp(make(), (0.0, 1.0), y0, method=method, rtol=1e-8, atol=1e-10).y[-1]
        assert torch.allclose(y, _truth(y0), rtol=1e-7, atol=0)
        assert torch.allclose(odeint(make(), y0, SPAN)[-1], _truth(y0), rtol=1e-6, atol=0)
        several = y0.repeat(3, 1)
        if make in (_into_buffer, _detached_buffer):
            kept = torch.empty(3, 2)
            y = solve_ivp(lambda t, y: torch.mul(y, RATE, out=kept), (0.0, 1.0), several, batched=True, method=method, rtol=1e-8).y[-1]
            assert torch.allclose(y, _truth(several), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "radau5", "bdf", "tsit5"])
def test_results_written_to_out_are_named_where_derivatives_are_taken(method):
    """Also where nobody asked for one, but the method or the root finder needs the Jacobian."""
    y0, kept, named = torch.tensor([1.0, 2.0]), torch.empty(2), pytest.raises(UnsupportedCombination, match="out=")
    wanted = y0.clone().requires_grad_(method == "tsit5")
    with torch.set_grad_enabled(method == "tsit5"), named:
        solve_ivp(_into_buffer(), (0.0, 1.0), wanted, method=method)
    with torch.no_grad(), named:
        odeint(_into_buffer(), y0, SPAN, method="gl4", options={"step_size": 0.1})
    with torch.no_grad(), named:
        solve_dae(lambda t, y, yp: torch.sub(yp, y, out=kept), (0.0, 1.0), y0)
    with torch.no_grad(), named:
        solve_root(lambda x: torch.mul(x, x - 2, out=kept), y0)
    with named:
        SteadyStateObjective(lambda x, p: x.sum(), lambda x, p: torch.sub(x, p, out=kept), y0).gradient(y0)
    with named:
        torch.func.jvp(lambda y: solve_ivp(_into_buffer(), (0.0, 1.0), y).y[-1], (y0,), (y0,))


@pytest.mark.parametrize("method", ["tsit5", "abm"])
@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), DiscreteAdjoint(keep_bytes=0), Backprop()])
def test_derivatives_through_a_tensor_used_again(method, gradient):
    fun, y0 = _Entries(), torch.tensor([1.0, 2.0], requires_grad=True)
    y = solve_ivp(fun, (0.0, 1.0), y0, method=method, rtol=1e-8, atol=1e-10, gradient=gradient).y[-1]
    y_bar, rate_bar = torch.autograd.grad(y.sum(), [y0, fun.rate])
    assert torch.allclose(y_bar, torch.full((2,), math.exp(RATE)), rtol=1e-6)
    assert torch.allclose(rate_bar, torch.tensor(3 * math.exp(RATE)), rtol=1e-6)


def test_residuals_roots_events_and_integrands_of_one_tensor():
    kept = torch.empty(2)

    def residual(t, y, yp):
        out = kept.detach()
        out[0] = yp[0] - RATE * y[0]
        out[1] = y[1] - 2 * y[0]
        return out

    with torch.no_grad():
        y = solve_dae(residual, (0.0, 1.0), torch.tensor([1.0, 2.0]), rtol=1e-8).y[-1]
    assert torch.allclose(y, _truth(torch.tensor([1.0, 2.0])), rtol=1e-6)

    def squares(x):
        out = kept.detach()
        out[0], out[1] = x[0] ** 2 - 2, x[1] ** 2 - 3
        return out

    for method in ("newton", "levenberg_marquardt", "broyden", "dogleg"):
        assert torch.allclose(solve_root(squares, torch.ones(2), method=method).x, torch.tensor([2.0, 3.0]).sqrt())
    level = torch.empty(())

    def event(t, y):
        return torch.sub(y[0], 0.5, out=level)

    event.terminal = True
    value = torch.empty(1)
    with torch.no_grad():
        for batched in (False, True):
            y0 = torch.ones(1, 1) if batched else torch.ones(1)
            one = event if not batched else (lambda t, y: torch.sub(y[:, 0], 0.5, out=value))
            one.terminal = True
            sol = solve_ivp(lambda t, y: -y, (0.0, 2.0), y0, events=one, batched=batched, rtol=1e-8)
            assert torch.allclose(sol.events[0].t.reshape(-1), torch.tensor([math.log(2.0)]), rtol=1e-6)
        sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(1), quadrature=lambda t, y: torch.mul(y, 1.0, out=value), rtol=1e-8)
        assert torch.allclose(sol.quadrature.reshape(-1)[-1], torch.tensor(1 - math.exp(-1.0)), rtol=1e-6)


def test_the_argument_and_rows_of_a_table_as_results():
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with torch.no_grad():
        y = solve_ivp(lambda t, y: y, (0.0, 1.0), torch.ones(2), rtol=1e-8).y[-1]
        assert torch.allclose(y, torch.full((2,), math.e), rtol=1e-6)
        y = solve_ivp(lambda t, y: table[int(t > 0.5)], (0.0, 1.0), torch.zeros(2), step_ts=[0.5]).y[-1]
    assert torch.allclose(y, torch.tensor([2.0, 3.0])) and torch.equal(table[0], torch.tensor([1.0, 2.0]))


def _clamped(t, y):
    return RATE * y.clamp_(max=1.5)


def _first_entry(t, y):
    y[0] = 0.0
    return -y


def _negated(t, y):
    return y.neg_()


def _only_late(t, y):
    return y.mul_(RATE) if t > 0.4 else RATE * y


def _the_clock(t, y):
    return y * t.add_(1.0)


@pytest.mark.parametrize("fun", [_clamped, _first_entry, _negated, _only_late, _the_clock])
@pytest.mark.parametrize("grad", [False, True])
def test_changing_the_argument_in_place_is_an_error_and_the_caller_keeps_its_state(fun, grad):
    y0 = torch.tensor([1.0, 2.0])
    many = torch.stack([y0, y0])
    with torch.set_grad_enabled(grad):
        calls = [lambda m=m: solve_ivp(fun, (0.0, 1.0), y0, method=m) for m in ("tsit5", "kvaerno5", "bdf", "abm")]
        calls += [lambda: odeint(fun, y0, SPAN), lambda: odeint(fun, y0, SPAN, method="rk4", options={"step_size": 0.3})]
        calls += [lambda: torch.vmap(lambda x: solve_ivp(fun, (0.0, 1.0), x).y)(many)] if fun is _clamped else []
        for call in calls:
            with pytest.raises(InvalidInput, match="in place"):
                call()
    assert y0.tolist() == [1.0, 2.0] and many.tolist() == [[1.0, 2.0]] * 2


def test_copies_where_changes_cannot_be_seen():
    """Inference mode: tensors without a version. Solves leave it where PyTorch (2.6) takes no derivatives in it, and see the change."""
    y0 = torch.tensor([1.0, 2.0])
    if not differentiates_in_inference_mode():
        with torch.inference_mode(), pytest.raises(InvalidInput, match="in place"):
            solve_ivp(_clamped, (0.0, 1.0), torch.tensor([1.0, 2.0]))
        return
    with torch.inference_mode():
        y = solve_ivp(_clamped, (0.0, 1.0), torch.tensor([1.0, 2.0]), rtol=1e-8).y[-1]
    want = solve_ivp(lambda t, y: RATE * y.clamp(max=1.5), (0.0, 1.0), y0, rtol=1e-8).y[-1]
    assert torch.allclose(y, want, rtol=1e-12)


def test_changes_by_others_are_errors_too():
    def fun(t, y):
        return -y

    def event(t, y):
        return y.sub_(0.5)[0]

    def residual(t, y, yp):
        return yp + y.mul_(2.0)

    def root(x):
        return x.sub_(2.0)

    y0 = torch.ones(1)
    for call in (
        lambda: solve_ivp(fun, (0.0, 1.0), y0, events=event),
        lambda: odeint_event(fun, y0, torch.tensor(0.0), event_fn=event),
        lambda: solve_dae(residual, (0.0, 1.0), y0),
        lambda: solve_root(root, y0),
    ):
        with torch.no_grad(), pytest.raises(InvalidInput, match="in place"):
            call()
    assert y0.tolist() == [1.0]

    class Watched(torch.nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t, y, dt):
            y.zero_()

    with pytest.raises(InvalidInput, match="callback_step changes"):
        odeint(Watched(), y0, SPAN)


@pytest.mark.parametrize("traced", [False, True])
def test_only_what_others_hold_is_copied(traced):
    # a tracer (a debugger, a measurement of coverage, torch.compile's own hook) makes Python's calls hold their arguments longer
    before = sys.gettrace()
    if traced:
        sys.settrace(lambda *_: None)
    try:
        _only_what_others_hold_is_copied()
    finally:
        sys.settrace(before)


def _only_what_others_hold_is_copied():
    kept = torch.ones(4)
    layer = torch.nn.Linear(2, 2)
    x = torch.ones(2)
    for make in (lambda: kept * 2, lambda: (kept * 2).reshape(2, 2), lambda: torch.stack([kept, kept])[0], lambda: layer(x)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                address: list[int] = []

                def noted(make=make, address=address):
                    out = make()
                    address.append(out.data_ptr())
                    return out

                got = own(noted)
                assert got.data_ptr() == address[0]
    for make in (lambda: kept, lambda: kept[:2], lambda: kept.data, lambda: torch.from_numpy(np.ones(2))):
        got = own(make)
        assert got.data_ptr() != make().data_ptr()


def _through_an_event(y0):
    kept = torch.empty(2, dtype=y0.dtype)

    def fun(t, y):
        kept[:] = y * RATE
        return kept.view(2)

    options = {"method": "implicit_midpoint", "options": {"step_size": 0.1}}
    return odeint_event(fun, y0, torch.tensor(0.0), event_fn=lambda t, y: y[0] - 0.5, **options)[0]


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), DiscreteAdjoint(keep_bytes=0)])
def test_going_back_twice_is_said_by_pytorch(gradient):
    """Its error names ``retain_graph``: nothing is wrong with ``fun``."""
    y0 = torch.ones(2, requires_grad=True)
    loss = solve_ivp(lambda t, y: RATE * y, (0.0, 1.0), y0, method="kvaerno3", gradient=gradient).y.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time") as caught:
        loss.backward()
    assert not isinstance(caught.value, UnsupportedCombination)


def test_a_buffer_is_named_on_the_way_back_from_an_event():
    when = _through_an_event(torch.ones(2, requires_grad=True))
    with pytest.raises((UnsupportedCombination, CapturedTensorLost), match="keeps a tensor from call to call"):
        when.backward()


def _written_each_time(p, batch, late=0.5):
    """y' = -p y, NaN behind a ``late`` time in the first trajectory, by a tensor that is written into over and over."""
    kept = torch.empty(batch, 1)

    def fun(t, y):
        lost = (t > late) & (torch.arange(batch) == 0)
        kept[:] = -p * y * torch.where(lost, float("nan"), 1.0).unsqueeze(-1)
        return kept

    return fun


@pytest.mark.parametrize("lost", ["later", "at the start", "at both"])
@pytest.mark.parametrize("method", ["adaptive_heun", "tsit5"])
def test_what_is_written_into_over_and_over_has_no_history_of_trajectories_that_failed(lost, method):
    p = torch.tensor(1.3, requires_grad=True)
    y0 = torch.ones(3, 1)
    y0[1] = float("nan") if lost != "later" else 1.0
    fun = _written_each_time(p, 3) if lost != "at the start" else _written_each_time(p, 3, late=2.0)
    sol = solve_ivp(fun, (0.0, 1.0), y0, gradient=Backprop(), method=method, batched=True, throw=False, rtol=1e-6)
    assert (sol.status >= 0).tolist() == [lost == "at the start", lost == "later", True]
    end = sol.y[-1, 2, 0]
    assert float(torch.autograd.grad(end, p)[0]) == pytest.approx(-math.exp(-1.3), rel=1e-4)


@pytest.mark.parametrize("weight", [torch.neg, torch.square], ids=["plain", "with a graph that is kept"])
def test_weights_that_are_written_once_keep_their_derivatives(weight):
    p, kept = torch.tensor(1.3, requires_grad=True), torch.empty(1)
    for gradient in (Backprop(), DiscreteAdjoint()):
        written = []

        def fun(t, y, written=written):
            if not written:
                written.append(kept.new_empty(1))
                written[0][:] = weight(p)
            return written[0] * y

        end = solve_ivp(fun, (0.0, 1.0), torch.ones(1), gradient=gradient, rtol=1e-6).y[-1, 0]
        (want,) = torch.autograd.grad(weight(p).exp(), p)
        torch.testing.assert_close(torch.autograd.grad(end, p)[0], want, rtol=1e-4, atol=0)
