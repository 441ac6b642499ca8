"""Functions that are other ones later on: an objective solves anew, derivatives of a root that was found before are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adjoint import SolveError, SteadyStateObjective, solve_root
from adjoint.nn import DEQ
from adjoint.sensitivity.fingerprint import Fingerprint


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 2), nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(0.4))
        self.factor, self.target = 1.0, torch.ones(2)

    def forward(self, z, x):
        return self.dropout(torch.tanh(self.linear(z))) * self.scale * self.factor + x

    def loss(self, z, x):
        return (z - self.target).square().sum()


def _rebind(m):
    m.target = torch.tensor([0.3, -0.2])


def _slightly(m):
    m.target = m.target * (1 + 1e-12)


def _data(m):
    m.linear.weight.data = torch.randn(2, 2)


def _vector(m):
    nn.utils.vector_to_parameters(torch.randn(6), m.parameters())


def _buffer(m):
    m.scale = torch.tensor(0.3)


def _number(m):
    m.factor = 0.5


@pytest.mark.parametrize("change", [_rebind, _slightly, _data, _vector, _buffer, _number])
def test_an_objective_sees_every_change(change):
    m, p = _Layer().eval(), torch.tensor([0.7, 0.0])
    obj = SteadyStateObjective(m.loss, lambda x, p: m(x, p) - x, torch.zeros(2))
    obj.hessian(p)
    assert obj.stats.n_states == 1
    change(m)
    got = obj.value(p), obj.gradient(p), obj.hessian(p), obj.state(p)
    assert obj.stats.n_states == 2
    z = torch.zeros(2)
    for _ in range(200):
        z = m(z, p).detach()
    assert torch.allclose(got[3], z, atol=1e-12) and torch.allclose(got[0], m.loss(z, p), rtol=1e-10)
    new = SteadyStateObjective(m.loss, lambda x, p: m(x, p) - x, torch.zeros(2))
    assert torch.allclose(got[1], new.gradient(p), rtol=1e-9) and torch.allclose(got[2], new.hessian(p), rtol=1e-9)


def test_an_objective_sees_what_alters_only_higher_derivatives_and_totals():
    c, totals = [1.0], torch.tensor([1.0])
    obj = SteadyStateObjective(lambda x, p: x.square().sum(), lambda x, p: x - p + c[0] * (x - 1) * (p - 1), torch.zeros(1))
    p = torch.ones(1)
    before = obj.hessian(p)  # x' = 1, x'' = -2 c at p = 1
    c[0] = 2.0
    assert torch.allclose(before, torch.tensor([[-2.0]])) and torch.allclose(obj.hessian(p), torch.tensor([[-6.0]]))
    flow = SteadyStateObjective(
        lambda x, p: x[0], lambda x, p: torch.stack([p[0] * x[1] - x[0], x[0] - p[0] * x[1]]), torch.ones(2),
        conserved=(torch.ones(1, 2), totals),
    )  # fmt: skip
    assert torch.allclose(flow.value(p), torch.tensor(0.5))
    totals.mul_(2.0)
    assert torch.allclose(flow.value(p), torch.tensor(1.0))


def test_random_objectives_are_refused():
    obj = SteadyStateObjective(lambda x, p: (x * torch.rand(2)).sum(), lambda x, p: x - p, torch.zeros(2))
    with pytest.raises(SolveError, match="every call"):
        obj.gradient(torch.ones(2))


def test_the_gaussian_of_an_objective_that_has_changed():
    y = [torch.tensor([1.0, 2.0])]
    obj = SteadyStateObjective(lambda x, p: (x - y[0]).square().sum(), lambda x, p: x - p, torch.zeros(2))
    posterior = obj.laplace(y[0].clone())
    assert torch.allclose(posterior.predict_std(lambda x, p: x)[1], torch.full((2,), 0.5**0.5))
    y[0] = torch.zeros(2)
    with pytest.raises(SolveError, match="anew"):
        posterior.predict_std(lambda x, p: x)


@pytest.mark.parametrize("change", [_data, _buffer, _number, nn.Module.train])
@pytest.mark.parametrize("how", ["root", "vmap", "vjp", "anderson", "newton"])
def test_derivatives_of_another_function_are_refused(change, how):
    m, x = _Layer().eval(), torch.randn(3, 2)
    if how in ("anderson", "newton"):
        layer = DEQ(m, solver=how).eval()
        z = layer(x.requires_grad_())
        back = lambda: z.sum().backward()  # noqa: E731
    else:
        root = lambda x: solve_root(lambda z, x: m(z, x) - z, torch.zeros(2), (x,)).x  # noqa: E731
        if how == "vjp":
            pull = torch.func.vjp(root, x[0])[1]
            back = lambda: pull(torch.ones(2))  # noqa: E731
        else:
            z = torch.vmap(root)(x.requires_grad_()) if how == "vmap" else root(x[0].requires_grad_())
            back = lambda: z.sum().backward(retain_graph=True)  # noqa: E731
    if how in ("root", "vmap"):
        back()
    change(m)
    with pytest.raises(SolveError, match="another function"):
        back()


def test_changes_are_seen_at_a_root_of_zero_and_statistics_are_none():
    W, q = [2 * torch.eye(2)], torch.zeros(2, requires_grad=True)
    x = solve_root(lambda x, p: W[0] @ x - p, torch.zeros(2), (q,)).x  # zero, whatever W is
    W[0] = 3 * torch.eye(2)
    with pytest.raises(SolveError, match="another function"):
        x.sum().backward()
    norm = nn.BatchNorm1d(2)  # in training: its statistics change with every call, its values do not
    y = DEQ(lambda z, x: 0.1 * norm(z) + x, batched=False)(torch.randn(4, 2, requires_grad=True))
    y.square().sum().backward()


def test_fingerprints_keep_to_the_domain():
    near = Fingerprint.of(lambda x: torch.log(1 - x), torch.tensor([0.999]))
    assert torch.isfinite(near.values[0]).all() and near.points[0] > 0.999

    def picky(x):
        if x.max() > 1:
            raise ValueError("outside")
        return x

    assert Fingerprint.of(picky, torch.ones(1)).points[0] == 1
    with pytest.raises(ValueError, match="outside"):
        Fingerprint.of(picky, 2 * torch.ones(1))
