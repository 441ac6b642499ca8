"""Small solves are recorded by autograd within a budget; beyond it the sweep takes over, with the same numbers."""

from __future__ import annotations

import pytest
import torch

from adjoint import DiscreteAdjoint, InvalidInput, odeint, odeint_adjoint, solve_ivp
from adjoint.integrate import recording
from adjoint.sensitivity import strategies

SWEEP, RECORDED = DiscreteAdjoint(keep_bytes=0), DiscreteAdjoint(keep_bytes=2**24)


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def forward(self, t, y):
        return torch.sin(t) * self.net(y)


@pytest.fixture
def problem():
    return _Net(), torch.randn(5, 2, requires_grad=True)


def _gradients(problem, gradient, **options):
    net, y0 = problem
    sol = solve_ivp(net, (0.0, 3.0), y0, t_eval=torch.linspace(0.0, 3.0, 7), rtol=1e-8, gradient=gradient, **options)
    return sol, torch.autograd.grad(sol.y.square().sum(), [y0, *net.parameters()])


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "verner7", "rk4", "bosh3"])
def test_same_gradients(problem, method):
    options = {"method": method} | ({"first_step": 0.1} if method == "rk4" else {})
    one, recorded = _gradients(problem, RECORDED, **options)
    other, swept = _gradients(problem, SWEEP, **options)
    assert one.stats.backward.n_fun == 0 < other.stats.backward.n_fun
    assert torch.allclose(one.y, other.y, rtol=1e-13, atol=1e-13)
    for a, b in zip(recorded, swept, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_what_grows_beyond_the_budget_is_swept(problem, steps, monkeypatch):
    """Recording stops after some steps: the values go on unchanged, and the gradient is the sweep's."""
    accepted = recording.Recording.accepted
    monkeypatch.setattr(recording.Recording, "accepted", lambda self, i, part: accepted(self, i if i + 1 < steps else 10**9, part))
    one, cut = _gradients(problem, RECORDED)
    other, swept = _gradients(problem, SWEEP)
    assert one.stats.backward.n_fun == other.stats.backward.n_fun > 0
    assert one.stats.n_fun == other.stats.n_fun
    for a, b in zip([one.y, *cut], [other.y, *swept], strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


def test_rejected_steps(problem):
    """A first step far too large is rejected."""
    options = {"first_step": 3.0, "t_eval": [0.5, 0.5, 2.0, 3.0]}
    net, y0 = problem
    got = []
    for gradient in (RECORDED, SWEEP):
        sol = solve_ivp(net, (0.0, 3.0), y0, rtol=1e-8, gradient=gradient, **options)
        assert sol.stats.n_rejected > 0
        got.append(torch.autograd.grad((sol.y * torch.arange(4.0)[:, None, None]).sum(), [y0, *net.parameters()]))
    for a, b in zip(*got, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def _saved(gradient, steps):
    """Distinct bytes that autograd has saved when the solve is done."""
    net, y0, kept = _Net(), torch.randn(500, 2), {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sol = solve_ivp(net, (0.0, 1.0), y0, method="rk4", first_step=1.0 / steps, gradient=gradient)
    return sum(s.nbytes() for s in kept.values()), sol.stats.backward, sol.y.sum()


def test_the_budget_bounds_what_is_recorded():
    state, stage = 500 * 2 * 8, 500 * 16 * 8
    budget = 2**23
    few, backward, value = _saved(DiscreteAdjoint(keep_bytes=budget), 2)
    value.backward()
    assert backward.n_fun == 0 and few > 2 * 4 * stage
    many, backward, value = _saved(DiscreteAdjoint(keep_bytes=budget), 60)
    value.backward()
    assert backward.n_fun == 60 * 4
    # what was saved before the budget was full, and the states that the sweep needs
    assert many < budget + 1.3 * 61 * state
    assert _saved(DiscreteAdjoint(keep_bytes=2**26), 60)[0] > 60 * 4 * stage


@pytest.mark.parametrize(("end", "recorded"), [(1.0, True), (40.0, False)])
def test_a_long_solve_is_given_up_early(end, recorded, monkeypatch):
    """Long before the budget is full, where the steps so far cover too little of the span."""
    net, y0, seen = _Net(), torch.randn(500, 2), []
    accepted = recording.Recording.accepted

    def watched(self, index, fraction):
        stopped = accepted(self, index, fraction)
        seen.append((index, self.on))
        return stopped

    monkeypatch.setattr(recording.Recording, "accepted", watched)
    gradient = DiscreteAdjoint(keep_bytes=20 * 4 * 500 * 18 * 8)
    sol = solve_ivp(net, (0.0, end), y0, method="rk4", first_step=0.1, gradient=gradient)
    sol.y.sum().backward()
    assert (sol.stats.backward.n_fun == 0) == recorded
    on = [index for index, still in seen if still]
    assert len(on) == 10 if recorded else len(on) < 6


def test_backward_twice_and_derivatives_of_derivatives(problem):
    net, y0 = problem
    results = []
    for gradient in (RECORDED, SWEEP):
        y = solve_ivp(net, (0.0, 1.0), y0, rtol=1e-8, gradient=gradient).y[-1]
        (first,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
        (again,) = torch.autograd.grad(y.square().sum(), y0, retain_graph=True)
        assert torch.allclose(first, again, rtol=1e-10)
        results.append(torch.autograd.grad(first.square().sum(), [y0, *net.parameters()]))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


def test_changing_a_parameter_before_the_backward_pass_is_an_error(problem):
    net, y0 = problem
    y = solve_ivp(net, (0.0, 1.0), y0, gradient=RECORDED).y[-1]
    with torch.no_grad():
        net.net[2].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_the_default_budget(problem, monkeypatch):
    monkeypatch.setattr(strategies, "KEEP_BYTES", 2**22)
    sol, _ = _gradients(problem, None)
    assert sol.stats.backward.n_fun == 0


@pytest.mark.parametrize("budget, recorded", [(2**22, (True, True)), (2**16, (True, False)), (2**12, (False, False))])
def test_the_drop_in_records_more_where_it_promises_no_memory(problem, monkeypatch, budget, recorded):
    """torchdiffeq's `odeint` keeps all evaluations: so may this one, but `odeint_adjoint` may not."""
    monkeypatch.setattr(strategies, "KEEP_BYTES", budget)
    net, y0 = problem
    gradients = []
    for interface, once in zip((odeint, odeint_adjoint), recorded, strict=True):
        calls = []

        def counted(t, y, calls=calls):
            calls.append(1)
            return net(t, y)

        owner = {} if interface is odeint else {"adjoint_params": tuple(net.parameters())}
        y = interface(counted, y0, torch.linspace(0.0, 1.0, 41, dtype=y0.dtype), method="rk4", **owner)
        evaluated = len(calls)
        gradients.append(torch.autograd.grad(y[-1].square().sum(), [y0, *net.parameters()]))
        assert (len(calls) == evaluated) == once
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_gradient_mode_is_as_before(problem):
    net, y0 = problem
    for budget in (0, 1, 30_000, 2**22):
        solve_ivp(net, (0.0, 3.0), y0, rtol=1e-8, gradient=DiscreteAdjoint(keep_bytes=budget))
        assert torch.is_grad_enabled()
    with torch.no_grad():
        assert solve_ivp(net, (0.0, 3.0), y0, gradient=RECORDED).y.grad_fn is None


@pytest.mark.parametrize("wrong", [-1, 1.5, "4 MiB"])
def test_keep_bytes_is_checked(wrong):
    with pytest.raises(InvalidInput, match="keep_bytes"):
        DiscreteAdjoint(keep_bytes=wrong)
