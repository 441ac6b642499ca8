"""Who listens to a tensor that the solve uses (a hook, ``retain_grad``) hears the whole gradient, once; who freezes one after the solve
gets none of it, as in any graph of PyTorch."""

from __future__ import annotations

import pytest
import torch

import adjoint

START = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
STRATEGIES = {
    "recorded": {},
    "discrete": {"gradient": adjoint.DiscreteAdjoint(keep_bytes=0)},
    "checkpoints": {"gradient": adjoint.DiscreteAdjoint(checkpoints=3)},
    "interpolating": {"gradient": adjoint.InterpolatingAdjoint()},
    "quadrature": {"gradient": adjoint.QuadratureAdjoint()},
    "backsolve": {"gradient": adjoint.BacksolveAdjoint()},
    "forward": {"gradient": adjoint.ForwardSensitivity()},
    "backprop": {"gradient": adjoint.Backprop()},
    "rodas5p": {"method": "rodas5p"},
    "kvaerno5": {"method": "kvaerno5"},
    "bdf": {"method": "bdf"},
    "abm": {"method": "abm"},
    "compiled": {"compile": True},
    "batched": {"batched": True},
    "root": None,
    "dae": None,
    "odeint": None,
    "odeint_adjoint": None,
}


def end(name, rate, as_argument):
    """Of the decay of three numbers, by ``rate``, which is an argument, or captured."""
    how, args = STRATEGIES[name], (rate,) if as_argument else ()
    fun = (lambda t, y, k: -k * y) if as_argument else (lambda t, y: -rate * y)
    if name == "root":
        return adjoint.solve_root(lambda x, *a: fun(0.0, x, *a) + START, START, args).x
    if name == "dae":
        return adjoint.solve_dae(lambda t, y, yp, *a: yp - fun(t, y, *a), (0.0, 1.0), START, args=args).y[-1]
    if name == "odeint":
        return adjoint.odeint(lambda t, y: fun(t, y, *args), START, torch.tensor([0.0, 1.0]))[-1]
    if name == "odeint_adjoint":
        options = {"adjoint_method": "dopri5", "adjoint_params": (rate,)}
        return adjoint.odeint_adjoint(lambda t, y: fun(t, y, *args), START, torch.tensor([0.0, 1.0]), **options)[-1]
    y0 = START.expand(2, 3) if "batched" in how else START
    return adjoint.solve_ivp(fun, (0.0, 1.0), y0, args, **how).y[-1]


def gradient(name, as_argument):
    rate = torch.tensor([0.7, 0.2, 1.1], requires_grad=True)
    return torch.autograd.grad(end(name, rate, as_argument).sum(), rate)[0]


@pytest.mark.parametrize("as_argument", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_hooks_and_retained_gradients(name, as_argument):
    base, heard = torch.tensor([0.7, 0.2, 1.1], requires_grad=True), []
    rate = base * 1.0
    rate.retain_grad()
    base.register_hook(lambda g: heard.append(g))
    rate.register_hook(lambda g: 2 * g)
    end(name, rate, as_argument).sum().backward()
    want = 2 * gradient(name, as_argument)
    assert len(heard) == 1
    torch.testing.assert_close(base.grad, want)
    torch.testing.assert_close(rate.grad, want)


@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_after_the_solve(name):
    rate, scale = torch.tensor([0.7, 0.2, 1.1], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = scale * end(name, rate, False)
    rate.requires_grad_(False)
    y.sum().backward()
    assert rate.grad is None
    torch.testing.assert_close(scale.grad, y.sum().detach())


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, bar):
        return bar.clamp(-0.05, 0.05)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, bar):
        return 2 * bar * ctx.saved_tensors[0]


def _hooked(alter):
    def fun(t, y, k):
        z = k * y
        if z.requires_grad:
            z.register_hook(alter)
        return -z * y

    return fun


_LINEAR = torch.nn.Linear(3, 3, dtype=torch.float64)
_LINEAR.register_full_backward_hook(lambda module, given, bar: None if given[0] is None else (given[0].clamp(-0.01, 0.01),))


def _on_the_node(t, y, k):
    z = k * y
    if z.grad_fn is not None:
        z.grad_fn.register_hook(lambda given, bar: tuple(None if x is None else x.clamp(-0.05, 0.05) for x in given))
    return -z * y


ALTERED = {
    "node": _on_the_node,
    "clipped": _hooked(lambda bar: bar.clamp(-0.05, 0.05)),
    "positive": _hooked(lambda bar: bar.clamp(min=0)),
    "function": lambda t, y, k: -_Clip.apply(k * y) * y,
    "module": lambda t, y, k: -k * _LINEAR(y),
}
RATE = torch.tensor([0.7, 0.2, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("fun", ALTERED.values(), ids=ALTERED.keys())
def test_what_comes_back_is_altered(fun):
    def solve(y0, **options):
        return adjoint.solve_ivp(fun, (0.0, 1.0), y0, (RATE,), rtol=1e-4, **options).y[-1].sum()

    y0 = START.clone().requires_grad_()
    for options in (
        {"method": "kvaerno5"}, {"method": "bdf"}, {"method": "rodas5p", "compile": True}, {"gradient": adjoint.GaussAdjoint()},
        {"method": "kvaerno5", "gradient": adjoint.Backprop()},
    ):  # fmt: skip
        with pytest.raises(adjoint.UnsupportedCombination, match="alters what comes back"):
            solve(y0, **options)
    with pytest.raises(adjoint.UnsupportedCombination, match="alters what comes back"):
        adjoint.solve_dae(lambda t, y, yp, k: yp - fun(t, y, k), (0.0, 1.0), y0, args=(RATE,))
    with pytest.raises(adjoint.UnsupportedCombination, match="alters what comes back"):
        adjoint.odeint(lambda t, y: fun(t, y, RATE), y0, torch.tensor([0.0, 1.0]), method="implicit_midpoint")
    # explicit steps are those of PyTorch
    steps = [torch.autograd.grad(solve(y0, gradient=g), y0)[0] for g in (adjoint.Backprop(), adjoint.DiscreteAdjoint(keep_bytes=0))]
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        solve(y0, method="kvaerno5")


@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "bdf"])
def test_what_comes_back_is_no_other(method):
    seen = []
    listened = _hooked(seen.append)
    for fun in (listened, lambda t, y, k: -k * _Square.apply(y)):
        y0 = START.clone().requires_grad_()
        y = adjoint.solve_ivp(fun, (0.0, 1.0), y0, (RATE,), method=method, rtol=1e-8, atol=1e-10).y[-1]
        (slope,) = torch.autograd.grad(y.sum(), y0)
        torch.testing.assert_close(slope, (1 + RATE * START) ** -2, rtol=1e-5, atol=0)
    assert seen


@pytest.mark.parametrize("fun", [ALTERED["clipped"], ALTERED["node"], ALTERED["function"]], ids=["clipped", "node", "function"])
def test_roots_of_what_alters(fun):
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    F = lambda x, p: fun(0.0, x, 1.0) + 4 * p  # noqa: E731
    with pytest.raises(adjoint.UnsupportedCombination, match="alters what comes back"):
        adjoint.solve_root(F, 1.5 * torch.ones(3, dtype=torch.float64), args=(p,))
    objective = adjoint.SteadyStateObjective(lambda x, p: x.sum(), F, 1.5 * torch.ones(3, dtype=torch.float64))
    with pytest.raises(adjoint.UnsupportedCombination, match="alters what comes back"):
        objective.gradient(p.detach())
    with torch.no_grad():
        x = adjoint.solve_root(F, 1.5 * torch.ones(3, dtype=torch.float64), args=(p,)).x
    torch.testing.assert_close(x, 2 * torch.ones_like(x))
