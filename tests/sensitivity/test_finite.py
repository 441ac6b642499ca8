"""Derivatives of ``fun`` that are not finite where ``fun`` is: named on the way there and on the way back, never a NaN gradient."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint.errors import NonFiniteDerivative
from adjoint.sensitivity import finite

GRADIENTS = {
    "recorded": adjoint.DiscreteAdjoint(keep_bytes=2**25),
    "discrete": adjoint.DiscreteAdjoint(keep_bytes=0),
    "checkpoints": adjoint.DiscreteAdjoint(checkpoints=3),
    "backprop": adjoint.Backprop(),
    "forward": adjoint.ForwardSensitivity(),
}


@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "radau5", "trbdf2"])
def test_infinite_jacobian_at_the_start_is_named(method):
    with pytest.raises(NonFiniteDerivative, match=r"derivative of fun is not finite at t = 0, component y\[1\]") as caught:
        adjoint.solve_ivp(lambda t, y: torch.stack([-y[0], 1 - torch.sqrt(y[1])]), (0.0, 1.0), torch.tensor([1.0, 0.0]), method=method)
    assert caught.value.component == 1
    assert caught.value.t == 0.0


def test_function_that_is_not_finite_itself_is_still_what_is_blamed():
    with pytest.raises(adjoint.NonFiniteState) as caught:
        adjoint.solve_ivp(lambda t, y: y / (t - 0.5).clamp(max=0) * 0 + 1, (0.0, 1.0), torch.ones(1), method="kvaerno5")
    assert not isinstance(caught.value, NonFiniteDerivative)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_way_back_through_a_corner_at_the_start(name, method):
    """y' = k - sqrt(y) from 0: the solution is smooth in k, the derivative in y0 at the start is not finite."""
    options = {"first_step": 0.1} if method == "rk4" else {}
    y0 = torch.zeros(1, requires_grad=True)

    def gradient():
        y = adjoint.solve_ivp(lambda t, y: 1 - torch.sqrt(y), (0.0, 1.0), y0, method=method, gradient=GRADIENTS[name], **options).y[-1]
        y.sum().backward()

    with pytest.raises(NonFiniteDerivative, match=r"t = 0, component y\[0\]"):
        gradient()


@pytest.mark.parametrize("name", ["discrete", "checkpoints", "forward"])
def test_tank_that_runs_empty(name):
    """A clamp hides the corner from reverse mode and not from the Jacobian's own derivative, which Rosenbrock methods hold."""
    k = torch.tensor(1.0, requires_grad=True)

    def tank(t, y, k):
        flow = k * torch.sqrt(torch.clamp(y[0], min=0))
        return torch.stack([-flow, flow])

    options = {"args": (k,), "method": "rodas5p", "rtol": 1e-4, "atol": 1e-6, "gradient": GRADIENTS[name]}

    def gradient():
        y = adjoint.solve_ivp(tank, (0.0, 3.0), torch.tensor([1.0, 0.0]), **options).y[-1]
        torch.autograd.grad(y[1], k)

    with pytest.raises(NonFiniteDerivative, match="component"):
        gradient()


@pytest.mark.parametrize("name", GRADIENTS)
def test_second_derivatives_are_looked_at_too(name):
    """|y|^1.5 has no second derivative at zero."""
    if name == "forward":
        pytest.skip("hands derivatives of derivatives to the discrete adjoint")
    y0 = torch.zeros(1, requires_grad=True)
    y = adjoint.solve_ivp(lambda t, y: (1 + torch.sqrt(y * y)) * y, (0.0, 1.0), y0, rtol=1e-6, gradient=GRADIENTS[name]).y[-1]
    with pytest.raises(NonFiniteDerivative):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_loss_that_is_not_finite_is_the_users_own(name):
    k = torch.tensor(1.0, requires_grad=True)
    y = adjoint.solve_ivp(lambda t, y: -k * y, (0.0, 1.0), torch.ones(1), gradient=GRADIENTS[name]).y[-1]
    assert torch.autograd.grad((y * float("nan")).sum(), k)[0].isnan()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_in_a_batch_the_trajectory_is_named(name, compiled):
    """The first one starts in the corner; the gradient of the second one is its own."""
    if compiled and name in ("forward", "recorded"):
        pytest.skip("without compiled code, or the same as 'discrete'")
    y0, k = torch.tensor([[0.0, 2.0], [1.0, 2.0]], requires_grad=True), torch.tensor(1.0, requires_grad=True)

    def fun(t, y, k):
        return torch.stack([k - torch.sqrt(y[..., 0]), -y[..., 1]], -1)

    y = adjoint.solve_ivp(fun, (0.0, 1.0), y0, (k,), batched=True, gradient=GRADIENTS[name], compile=compiled).y[-1]
    with pytest.warns(RuntimeWarning, match=r"t = 0 in trajectory 0, component y\[0\] of its result.*shares with others"):
        found = torch.autograd.grad(y[:, 0].sum(), y0)[0]
    assert not found[0].isfinite().all()
    alone = y0[1].detach().requires_grad_()
    want = torch.autograd.grad(adjoint.solve_ivp(fun, (0.0, 1.0), alone, (k,)).y[-1, 0], alone)[0]
    torch.testing.assert_close(found[1], want)


def test_a_batch_with_a_row_that_failed_is_not_blamed(recwarn, monkeypatch):
    """Nor are the steps of the others gone through."""
    asked = []
    monkeypatch.setattr(finite, "bad_component", lambda *args: asked.append(args))
    y0 = torch.tensor([[1.0], [2.0]], requires_grad=True)
    fun = lambda t, y: y * torch.where(y > 1.5, float("nan"), 1.0)  # noqa: E731
    sol = adjoint.solve_ivp(fun, (0.0, 0.3), y0, batched=True, throw=False)
    found = torch.autograd.grad(sol.y[-1].sum(), y0)[0]
    assert found[0].isfinite() and not found[1].isfinite() and not asked and not [w for w in recwarn if "not finite" in str(w.message)]
