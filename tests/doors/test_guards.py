"""What cannot be right is refused by name: half precision, tolerances below rounding, states that do not come back, endless attempts."""

import pytest
import torch

import adjoint
from adjoint import errors


def decay(t, y):
    return -y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    y0 = torch.ones(1, dtype=dtype)
    for solve in (
        lambda: adjoint.solve_ivp(decay, (0.0, 1.0), y0),
        lambda: adjoint.solve_ivp(decay, (0.0, 1.0), y0[None], batched=True),
        lambda: adjoint.solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), y0),
        lambda: adjoint.odeint(decay, y0, torch.tensor([0.0, 1.0])),
        lambda: adjoint.odeint_adjoint(decay, y0, torch.tensor([0.0, 1.0]), adjoint_params=()),
        # beside other leaves too, whose type would be that of the solve
        lambda: adjoint.solve_ivp(lambda t, y: {k: -v for k, v in y.items()}, (0.0, 1.0), {"a": y0, "b": torch.ones(1)}),
        lambda: adjoint.solve_root(lambda x: x * x - 2, y0),
        lambda: adjoint.SteadyStateObjective(lambda x, p: x.sum(), lambda x, p: x * x - p, y0).value(y0),
        lambda: adjoint.continuation(lambda x, lam: x - lam, y0, (0.0, 1.0)),
    ):
        with pytest.raises(errors.InvalidInput, match="float"):
            solve()


def test_tolerances_below_rounding_are_refused():
    single = torch.ones(2, dtype=torch.float32)
    for rtol in (1e-9, torch.tensor([1e-3, 1e-9])):
        with pytest.raises(errors.InvalidInput, match="resolution"):
            adjoint.solve_ivp(decay, (0.0, 1.0), single, rtol=rtol)
    assert adjoint.solve_ivp(decay, (0.0, 1.0), single.double(), rtol=1e-9).status == 0
    # that rtol is not used: the tolerance is absolute
    assert adjoint.solve_ivp(decay, (0.0, 1.0), single, rtol=0.0, atol=1e-4).status == 0


def contracting(mu):
    return lambda t, y: torch.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def test_a_state_that_does_not_come_back_is_an_error():
    mu = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    tolerances = {"rtol": 1e-6, "atol": 1e-8}
    y = adjoint.solve_ivp(contracting(mu), (0.0, 5.0), start, gradient=adjoint.BacksolveAdjoint(), **tolerances).y[-1, 0]
    with pytest.raises(errors.BacksolveDiverged, match="DiscreteAdjoint"):
        y.backward()
    ts = torch.tensor([0.0, 5.0], dtype=torch.float64)
    y = adjoint.odeint_adjoint(contracting(mu), start, ts, adjoint_rtol=1e-6, adjoint_params=(mu,), **tolerances)[-1, 0]
    with pytest.raises(errors.BacksolveDiverged, match="adjoint_rtol"):
        y.backward()


def test_a_state_that_comes_back_is_none():
    mu = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    got, want = (
        torch.autograd.grad(adjoint.solve_ivp(contracting(mu), (0.0, 3.0), start, gradient=g, rtol=1e-8, atol=1e-10).y[-1, 0], mu)[0]
        for g in (adjoint.BacksolveAdjoint(), adjoint.DiscreteAdjoint())
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0.0)


def test_backsolve_does_not_know_of_jumps():
    T = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.UnsupportedCombination, match="step_ts"):
        adjoint.solve_ivp(decay, (0.0, 2.0), torch.ones(1, dtype=torch.float64), step_ts=T, gradient=adjoint.BacksolveAdjoint())


def test_the_smallest_step_is_final_in_batches_too():
    fun = lambda t, y: -y * torch.where(t > 0.5, float("nan"), 1.0)  # noqa: E731
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    one = lambda y0: adjoint.odeint(fun, y0, ts, method="dopri5", options={"min_step": 1e-2, "max_num_steps": 300})  # noqa: E731
    for run in (lambda: one(torch.ones(2, dtype=torch.float64)), lambda: torch.vmap(one)(torch.ones(3, 2, dtype=torch.float64))):
        with pytest.raises(errors.NonFiniteState, match="5 accepted and 3 rejected"):
            run()
