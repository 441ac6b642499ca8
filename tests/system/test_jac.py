"""``jac=``: a Jacobian that the user gives for implicit stages."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import SplitFunction, solve_ivp
from adjoint.errors import InvalidInput, UnsupportedCombination

METHODS = ["implicit_euler", "trapezoid", "kvaerno3", "kvaerno5", "rodas4", "rodas5p", "radau5", "bdf"]
SPAN, TIGHT = (0.0, 10.0), {"rtol": 1e-6, "atol": 1e-10}
K = [0.04, 1e4, 3e7]


def robertson(t, y, k):
    a, b, c = k[0] * y[..., 0], k[1] * y[..., 1] * y[..., 2], k[2] * y[..., 1] ** 2
    return torch.stack([b - a, a - b - c, c], -1)


class Jacobian:
    """Counts its calls, and sees what it is called with."""

    def __init__(self, sparse=False, factor=1.0):
        self.calls, self.sparse, self.factor, self.times = 0, sparse, factor, []

    def __call__(self, t, y, k):
        self.calls += 1
        self.times.append(t.shape)
        zero, a = torch.zeros_like(y[..., 0]), k[0].expand_as(y[..., 0])
        b1, b2, c = k[1] * y[..., 2], k[1] * y[..., 1], 2 * k[2] * y[..., 1]
        rows = [torch.stack(r, -1) for r in ([-a, b1, b2], [a, -b1 - c, -b2], [zero, c, zero])]
        out = torch.stack(rows, -2) * self.factor
        return out.to_sparse() if self.sparse else out


def solved(method, jac, batched=False, **options):
    """End, gradients in parameters and start, statistics."""
    k = torch.tensor(K, requires_grad=True)
    y0 = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    start = torch.stack([y0, y0 * 0.9]) if batched else y0
    span = (0.0, 2.0) if method in ("implicit_euler", "trapezoid") else SPAN
    tol = {"rtol": 1e-3, "atol": 1e-6} if method in ("implicit_euler", "trapezoid") else TIGHT
    sol = solve_ivp(robertson, span, start, (k,), method=method, jac=jac, batched=batched, **tol, **options)
    weights = torch.tensor([1.0, 1e4, -1.0])
    grads = torch.autograd.grad((sol.y[-1] * weights).sum(), (k, y0))
    return sol, grads


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("form", ["dense", "sparse", "batched"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow_cases("kvaerno3-batched")
def test_same_as_automatic(method, form):
    jac = Jacobian(form == "sparse")
    sol, grads = solved(method, jac, form == "batched")
    plain, expected = solved(method, None, form == "batched")
    assert jac.calls > 0 and jac.times[-1] == ((2,) if form == "batched" else ())
    assert torch.allclose(sol.y[-1], plain.y[-1], rtol=1e-8, atol=1e-11)
    for mine, theirs in zip(grads, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-8)
    assert torch.equal(torch.as_tensor(sol.stats.n_steps), torch.as_tensor(plain.stats.n_steps))


def test_second_derivatives_and_transforms():
    y0 = torch.tensor([1.0, 0.0, 0.0])

    def end(k, jac=None):
        return solve_ivp(robertson, (0.0, 1.0), y0, (k,), method="kvaerno5", jac=jac, rtol=1e-4, atol=1e-8).y[-1, 2]

    k = torch.tensor(K)
    for transform in (torch.func.grad, torch.func.hessian):
        mine, theirs = transform(lambda p: end(p, Jacobian()))(k), transform(end)(k)
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-20)
    ks = torch.stack([k, k * 1.1])
    assert torch.allclose(torch.vmap(lambda p: end(p, Jacobian()))(ks), torch.stack([end(p) for p in ks]), rtol=1e-7)


def test_wrong_one_costs_iterations_not_gradients():
    plain, expected = solved("kvaerno5", None)
    with pytest.warns(UserWarning, match="does not agree"):
        sol, grads = solved("kvaerno5", Jacobian(factor=1.05))
    assert sol.stats.n_newton > plain.stats.n_newton
    assert torch.allclose(sol.y[-1], plain.y[-1], rtol=1e-6, atol=1e-9)
    for mine, theirs in zip(grads, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_wrong_one_is_refused_where_it_is_part_of_the_method():
    with pytest.raises(InvalidInput, match="jac does not agree"):
        solved("rodas5p", Jacobian(factor=1.05))


def test_implicit_part_of_a_split():
    k = torch.tensor([50.0], requires_grad=True)
    parts = SplitFunction(lambda t, y, k: torch.cos(t) * torch.ones_like(y), lambda t, y, k: -k * y)
    calls = []

    def jac(t, y, k):
        calls.append(0)
        return torch.diag_embed(-k.expand_as(y))

    y0 = torch.tensor([1.0, 2.0])
    ends = [solve_ivp(parts, (0.0, 1.0), y0, (k,), method="kencarp4", jac=j).y[-1] for j in (jac, None)]
    grads = [torch.autograd.grad(e.sum(), k)[0] for e in ends]
    assert calls and torch.allclose(ends[0], ends[1], rtol=1e-10) and torch.allclose(grads[0], grads[1], rtol=1e-8)


@pytest.mark.parametrize(
    "jac, match",
    [
        (torch.eye(3), "callable"),
        (lambda t, y, k: torch.eye(2), "shape"),
        (lambda t, y, k: torch.eye(3, dtype=torch.float32), "float32"),
        (lambda t, y, k: 1.0, "tensor"),
    ],
)
def test_bad_input(jac, match):
    with pytest.raises(InvalidInput, match=match):
        solved("kvaerno5", jac)


def test_refused_combinations():
    with pytest.raises(UnsupportedCombination, match="for implicit methods"):
        solved("tsit5", Jacobian())
    with pytest.raises(UnsupportedCombination, match="quadrature"):
        solved("kvaerno5", Jacobian(), quadrature=lambda t, y, k: y[0])
    with pytest.raises(UnsupportedCombination, match="one tensor"):
        solve_ivp(lambda t, y: {"a": -y["a"]}, SPAN, {"a": torch.ones(3)}, method="kvaerno5", jac=lambda t, y: -torch.eye(3))


def test_module_parameters_reach_it():
    class Decay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor([3.0, 40.0], dtype=torch.float64))

        def forward(self, t, y):
            return -self.rate * y

    model = Decay()
    y0 = torch.ones(2)
    sol = solve_ivp(model, (0.0, 1.0), y0, method="radau5", jac=lambda t, y: torch.diag(-model.rate))
    (grad,) = torch.autograd.grad(sol.y[-1].sum(), model.rate)
    assert torch.allclose(grad, -torch.exp(-model.rate.detach()), rtol=1e-4, atol=1e-7)
    assert adjoint.__version__
