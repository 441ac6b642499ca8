"""How implicit methods choose their steps: the predictive controller, and what follows an iteration that does not converge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipy_solve

from adjoint import IController, PIDController, solve_ivp

F64 = torch.float64
PREDICTIVE = PIDController(shrink_accepted=True, predictive=True)


def vdpol(t, y, mu=1e6):
    return torch.stack([y[..., 1], mu * ((1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0])], -1)


def test_the_predicted_factor_is_that_of_the_formula():
    memory = PREDICTIVE.remember(0.2, 0.5, (1.0, 1.0))
    # at the beginning, and where the error falls, the plain factor
    assert PREDICTIVE.accepted(4, 0.6, (1.0, 1.0), 1.0) == pytest.approx(0.9 * 0.6**-0.25)
    assert PREDICTIVE.accepted(4, 0.1, memory, 0.5) == pytest.approx(0.9 * 0.1**-0.25)
    # the error tripled in a step of the same length, and will again
    assert PREDICTIVE.accepted(4, 0.6, memory, 0.5) == pytest.approx(0.9 * 0.6**-0.25 * (0.2 / 0.6) ** 0.25)
    # it did so in a step of half the length
    assert PREDICTIVE.accepted(4, 0.6, memory, 0.25) == pytest.approx(0.9 * 0.6**-0.25 * 0.5 * (0.2 / 0.6) ** 0.25)
    # an error that vanished by luck is no beginning of a rise, and no factor leaves its bounds
    lucky = PREDICTIVE.remember(1e-10, 0.5, (1.0, 1.0))
    assert PREDICTIVE.accepted(4, 0.5, lucky, 0.5) == pytest.approx(0.9 * 0.5**-0.25 * (0.01 / 0.5) ** 0.25)
    assert PREDICTIVE.accepted(4, 1.0, lucky, 0.05) == 0.2


def test_numbers_and_tensors_come_to_the_same():
    errors, lengths = [0.3, 1e-9, 0.9, 0.02], [1.0, 1e-7, 3e9, 0.5]
    memory, many = (1.0, 1.0), (torch.ones(1), torch.ones(1))
    for error, length in zip(errors, lengths, strict=True):
        level, size = torch.tensor([error]), torch.tensor([length], dtype=F64)
        assert float(PREDICTIVE.both(4, level, many, size)[0]) == pytest.approx(PREDICTIVE.accepted(4, error, memory, length), rel=1e-5)
        memory, many = PREDICTIVE.remember(error, length, memory), PREDICTIVE.remember(level, size, many)


def test_a_predictive_controller_has_no_other_memory():
    with pytest.raises(ValueError, match="pcoeff and dcoeff must be zero"):
        PIDController(pcoeff=0.4, icoeff=0.3, predictive=True)


@pytest.mark.parametrize("method", ["radau5", "rodas5p"])
def test_few_steps_of_a_relaxation_oscillation_fail(method):
    options = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    y0 = torch.tensor([2.0, 0.0], dtype=F64)
    with torch.no_grad():
        stats = solve_ivp(vdpol, (0.0, 1.0), y0, **options).stats
        plain = solve_ivp(vdpol, (0.0, 1.0), y0, controller=IController(), **options).stats
    assert stats.n_rejected < 0.15 * stats.n_steps and stats.n_fun < plain.n_fun
    if method == "radau5":
        right = lambda t, y: np.array([y[1], 1e6 * ((1 - y[0] ** 2) * y[1] - y[0])])  # noqa: E731
        peer = scipy_solve(right, (0.0, 1.0), y0.numpy(), method="Radau", rtol=1e-4, atol=1e-4)
        assert stats.n_accepted < 1.1 * len(peer.t) and stats.n_fun < 1.25 * peer.nfev


def test_rows_of_a_batch_are_controlled_each_by_itself():
    mu = torch.tensor([30.0, 300.0], dtype=F64)
    y0 = torch.tensor([[2.0, 0.0], [1.5, 0.0]], dtype=F64)
    options = {"method": "radau5", "rtol": 1e-3, "atol": 1e-3}
    with torch.no_grad():
        many = solve_ivp(vdpol, (0.0, 0.9), y0, args=(mu,), batched=True, **options)
        for row in range(2):
            one = solve_ivp(vdpol, (0.0, 0.9), y0[row], args=(mu[row],), **options)
            assert (one.stats.n_accepted, one.stats.n_rejected) == (many.stats.n_accepted[row], many.stats.n_rejected[row])
            torch.testing.assert_close(many.y[-1, row], one.y[-1], rtol=1e-6, atol=1e-8)
