"""Forward mode through gradients, in parameters and in times: what is recorded of it, and what its derivatives are."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp

from adjoint import solve_ivp
from adjoint.sensitivity import sweep_node

F64 = torch.float64
METHODS = ["tsit5", "rodas5p", "kvaerno5"]


def end(p, t1, method, batched=False, sampled=False):
    """``exp(-p t1)``."""
    y0 = torch.ones((2, 1) if batched else 1, dtype=F64)
    options = dict(method=method, rtol=1e-6, atol=1e-7, first_step=0.2, batched=batched)
    if sampled:
        return solve_ivp(lambda t, y, p: -p * y, (0.0, 2.0), y0, args=(p,), t_eval=t1.reshape(1), **options).y[-1].mean()
    return solve_ivp(lambda t, y, p: -p * y, (0.0, t1), y0, args=(p,), **options).y[-1].mean()


def given():
    return torch.tensor(0.7, dtype=F64), torch.tensor(1.3, dtype=F64)


def exact(p, t1, *orders):
    """The derivative of ``exp(-p t1)`` in ``p`` (0) and ``t1`` (1)."""
    at = [x.clone().requires_grad_() for x in (p, t1)]
    out = torch.exp(-at[0] * at[1])
    for i in orders:
        (out,) = torch.autograd.grad(out, at[i], create_graph=True)
    return out.detach()


@pytest.mark.parametrize("batched, sampled", [(False, False), (True, False), (False, True)], ids=["one", "batched", "sample"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [0, 1], ids=["parameter", "time"])
@pytest.mark.parametrize("second", [0, 1], ids=["parameter", "time"])
@pytest.mark.slow_cases(
    "parameter-parameter-kvaerno5-one", "parameter-parameter-rodas5p-sample", "parameter-time-kvaerno5-sample",
    "parameter-time-rodas5p-batched", "time-parameter-kvaerno5-batched", "time-parameter-rodas5p-sample", "time-time-kvaerno5-one",
    "time-time-kvaerno5-batched",
)
def test_parameters_and_times(method, batched, sampled, first, second):
    p, t1 = given()
    f = lambda p, t1: end(p, t1, method, batched, sampled)  # noqa: E731
    dots = [torch.zeros_like(p), torch.zeros_like(t1)]
    dots[second] = torch.ones_like(p)
    forward = jvp(grad(f, argnums=first), (p, t1), tuple(dots))[1]
    at = [p.requires_grad_(), t1.requires_grad_()]
    (once,) = torch.autograd.grad(f(*at), at[first], create_graph=True)
    (twice,) = torch.autograd.grad(once, at[second])
    want = exact(p, t1, first, second)
    # samples are differentiated in their times on the dense output
    tolerance = 1e-3 if sampled and first == second == 1 else 1e-4
    for found in (forward, twice):
        torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow_cases("kvaerno5")
def test_it_is_recorded_only_for_who_differentiates_it(method, monkeypatch):
    counts = {"functional_sweep": 0, "_eager": 0}
    for name in counts:
        plain = getattr(sweep_node, name)

        def counted(asked, name=name, plain=plain):
            counts[name] += 1
            return plain(asked)

        monkeypatch.setattr(sweep_node, name, counted)
    p, t1 = given()
    product = lambda p: jvp(grad(lambda p: end(p, t1, method)), (p,), (torch.ones_like(p),))[1]  # noqa: E731
    found = product(p)
    torch.testing.assert_close(found, exact(p, t1, 0, 0), rtol=1e-4, atol=0)
    # the gradient itself, and its tangent, of which only what bends the steps has to be recorded
    assert counts == {"functional_sweep": 1, "_eager": 2}
    want = exact(p, t1, 0, 0, 0)
    q = p.clone().requires_grad_()
    for third in (torch.autograd.grad(product(q), q)[0], grad(product)(p)):
        torch.testing.assert_close(third, want, rtol=1e-4, atol=0)
