"""What a refusal advises works where it was refused; options that nobody refuses together work together."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import adjoint
from adjoint import UnsupportedCombination, solve_dae, solve_ivp
from adjoint.errors import InvalidInput

STRATEGIES = {
    "InterpolatingAdjoint": adjoint.InterpolatingAdjoint(),
    "BacksolveAdjoint": adjoint.BacksolveAdjoint(),
    "ForwardSensitivity": adjoint.ForwardSensitivity(),
    "checkpoints": adjoint.DiscreteAdjoint(checkpoints=2),
}
#: options that strategies may refuse, by themselves and in pairs
OPTIONS: dict[str, dict[str, Any]] = {
    "batched": {"batched": True},
    "events": {"events": lambda t, y, p: y.real.sum(-1) - 0.5},
    "dense": {"dense_output": True},
    "steps": {"t_eval": "steps"},
    "step_ts": {"step_ts": [0.1]},
    "complex": {},
    "auto": {"method": "auto"},
    "euler": {"method": "euler", "first_step": 0.05},
    "rodas5p": {"method": "rodas5p"},
    "bdf": {"method": "bdf"},
    "mass": {"method": "rodas5p", "mass_matrix": torch.eye(2, dtype=torch.float64)},
    "matrix of radau5": {"method": "radau5", "mass_matrix": torch.eye(2, dtype=torch.float64)},
    "dae": {},
}
PAIRS = [(name,) for name in OPTIONS] + [
    ("batched", "events"),
    ("batched", "step_ts"),
    ("batched", "auto"),
    ("batched", "mass"),
    ("batched", "complex"),
    ("events", "dense"),
    ("events", "dae"),
    ("dense", "complex"),
    ("dense", "euler"),
    ("complex", "bdf"),
]


def gradient(strategy, names, changed=None):
    """Of the sum of the last state in a parameter."""
    p = torch.tensor(0.9, requires_grad=True)
    options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "t_eval": [0.1, 0.2]}
    for name in names:
        options |= OPTIONS[name]
    options |= changed or {}
    y0 = torch.ones(2, 2) if "batched" in names else torch.ones(2)
    y0 = y0 + 0j if "complex" in names else y0
    fun = (lambda t, y, p: -p * y) if "complex" not in names else (lambda t, y, p: 1j * p * y)
    if "dae" in names:
        sol = solve_dae(lambda t, y, yp, p: yp - fun(t, y, p), (0.0, 0.2), y0, args=(p,), gradient=strategy, **options)
    else:
        sol = solve_ivp(fun, (0.0, 0.2), y0, (p,), gradient=strategy, **options)
    last = sol.y[-1] if "steps" not in names else sol.y[~sol.y.isnan()][-2:]
    return torch.autograd.grad((last.real + last.imag if last.is_complex() else last).sum(), p)[0]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.slow_cases("ForwardSensitivity")
def test_advice_of_strategies(name):
    """Every gradient that a message names works there, every method, and what is to be left out."""
    tried = 0
    for names in PAIRS:
        try:
            gradient(STRATEGIES[name], names)
            continue
        except UnsupportedCombination as error:
            message = str(error)
        except InvalidInput as error:
            message = str(error)
            if "such as 'tsit5'" not in message:
                raise
        advice = message.split(": use", 1)[-1] if ": use" in message else message
        advised = [getattr(adjoint, kind)() for kind in re.findall(r"(\w+Adjoint)\(\)", advice)]
        # methods, and what to leave out
        methods = re.findall(r"such as '(\w+)'", message)
        out = re.findall(r"leave (checkpoints) out", message)
        assert advised or methods or out, message
        for strategy in advised:
            assert torch.isfinite(gradient(strategy, names)), message
        for method in methods:
            if "no error control" in message:
                found = gradient(type(STRATEGIES[name])(method=method), names)
            else:
                found = gradient(STRATEGIES[name], names, {"method": method})
            assert torch.isfinite(found), message
        if out:
            assert torch.isfinite(gradient(adjoint.DiscreteAdjoint(), names)), message
        tried += 1
    assert tried > 3 or name == "ForwardSensitivity"


def test_forward_sensitivity_of_complex_states_by_bdf():
    assert gradient(adjoint.ForwardSensitivity(), ["complex", "bdf"]).item() == pytest.approx(
        # of cos(p t) + sin(p t), twice
        2 * 0.2 * (torch.cos(torch.tensor(0.18)) - torch.sin(torch.tensor(0.18))).item(),
        rel=1e-2,
    )
