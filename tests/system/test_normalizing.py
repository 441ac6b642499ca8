"""Functions with layer, batch and instance norms: PyTorch's own second derivatives of these are wrong in some modes, without an error."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import adjoint
from adjoint.system.normalizing import NORMALIZATIONS, composing

SPAN = (0.0, 0.5)
POINT = torch.tensor([1.0, 0.5, 0.2, 0.7, 0.3, 1.1], dtype=torch.float64)
ALONG = torch.arange(1.0, 7.0, dtype=torch.float64)


def by_hand(t, y, k):
    c = y - y.mean(-1, keepdim=True)
    return k * c / (c.square().mean(-1, keepdim=True) + 1e-5).sqrt() - y


def by_torch(t, y, k):
    return functional.layer_norm(y, (3,), k) - y


def end(fun, method, **options):
    options = {"rtol": 1e-3, "atol": 1e-5, "first_step": 0.1} | options
    return lambda x: (adjoint.solve_ivp(fun, SPAN, x[:3], args=(x[3:],), method=method, **options).y[-1] * ALONG[:3]).sum()


def double(f):
    x = POINT.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g @ ALONG, x)[0]


WAYS = {
    "gradient": lambda f: torch.func.grad(f)(POINT),
    "backward": lambda f: torch.autograd.grad(f(x := POINT.clone().requires_grad_()), x)[0],
    "forward": lambda f: torch.func.jacfwd(f)(POINT),
    "double backward": double,
    "reverse over forward": lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (ALONG,))[1])(POINT),
    "forward over reverse": lambda f: torch.func.jvp(torch.func.grad(f), (POINT,), (ALONG,))[1],
    "hessian": lambda f: torch.func.hessian(f)(POINT),
}


@pytest.mark.parametrize(
    ("method", "way"),
    [(m, w) for m in ("tsit5", "rodas5p", "kvaerno5", "radau5") for w in WAYS if w.endswith("backward") or m in ("tsit5", "rodas5p")],
)
def test_derivatives_in_state_and_weights(method, way):
    torch.testing.assert_close(WAYS[way](end(by_torch, method)), WAYS[way](end(by_hand, method)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "kvaerno5"])
def test_groups(method):
    """PyTorch's own of group norms has no second derivatives of many cotangents at once: an error about shapes."""
    by_group = lambda t, y, k: functional.group_norm(y[None], 1, k)[0] - y  # noqa: E731
    found, truth = (double(end(fun, method)) for fun in (by_group, by_hand))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradient", [adjoint.ForwardSensitivity(), adjoint.InterpolatingAdjoint(), adjoint.DiscreteAdjoint(checkpoints=3)])
def test_strategies(gradient):
    found, truth = (WAYS["backward"](end(fun, "kvaerno5", gradient=gradient)) for fun in (by_torch, by_hand))
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_a_root():
    def root(fun):
        def residual(u, x):
            return fun(None, u, x[3:]) + 0.1 * (x[:3] - u)

        return lambda x: (adjoint.solve_root(residual, POINT[:3], args=(x,)).x * ALONG[:3]).sum()

    for way in ("backward", "forward", "double backward", "reverse over forward", "hessian"):
        torch.testing.assert_close(WAYS[way](root(by_torch)), WAYS[way](root(by_hand)), rtol=1e-7, atol=1e-7)


def torch_norm(y, k):
    return functional.layer_norm(y, (3,), k)


def hand_norm(y, k):
    return by_hand(None, y, k) + y


@pytest.mark.parametrize("way", ["double backward", "reverse over forward", "forward over reverse"])
@pytest.mark.parametrize("kind", ["terminal", "reset", "quadrature"])
def test_events_resets_and_integrals(kind, way):
    def result(norm):
        def f(x):
            reset = (lambda t, y, k: y + norm(y, k)) if kind == "reset" else None
            event = adjoint.Event(lambda t, y, k: norm(y, k)[0] + 4 * y[2] - 2.5, 1, kind == "terminal", reset)
            integrand = (lambda t, y, k: norm(y, k).square().sum()) if kind == "quadrature" else None
            fun = lambda t, y, k: torch.stack([-y[1], y[0], 1.0 + 0 * t])  # noqa: E731
            events = None if integrand else event
            sol = adjoint.solve_ivp(fun, (0.0, 0.8), x[:3], args=(x[3:],), events=events, quadrature=integrand, rtol=1e-6, atol=1e-8)
            assert integrand or sol.events[0].t.shape[0] >= 1
            return sol.quadrature if integrand else sol.t[-1] if kind == "terminal" else (sol.y[-1] * ALONG[:3]).sum()

        return f

    torch.testing.assert_close(WAYS[way](result(torch_norm)), WAYS[way](result(hand_norm)), rtol=1e-7, atol=1e-8)


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 6), norm, nn.Linear(6, 4)

    def forward(self, t, y):
        return self.outer(torch.tanh(self.norm(self.inner(y))))


NORMS = {"layer": nn.LayerNorm(6), "batch": nn.BatchNorm1d(6, track_running_stats=False), "running": nn.BatchNorm1d(6).eval()}


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_in_the_parameters_of_a_network(norm):
    torch.manual_seed(0)
    net, y0 = Net(NORMS[norm]).double(), torch.randn(3, 4)
    parameters = [p for p in net.parameters() if p.requires_grad]

    directions = [torch.cos(torch.arange(p.numel(), dtype=p.dtype)).reshape(p.shape) for p in parameters]

    def squared():
        end = adjoint.solve_ivp(net, (0.0, 0.3), y0, method="kvaerno5").y[-1]
        return sum(g.square().sum() for g in torch.autograd.grad(end.square().sum(), parameters, create_graph=True))

    def moved(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        return squared().detach()

    slope = torch.autograd.grad(squared(), parameters)
    along = sum((g * d).sum() for g, d in zip(slope, directions, strict=True))
    ahead, behind = moved(1e-5), moved(-2e-5)
    torch.testing.assert_close(along, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)


class _Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


X, CHANNELS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.rand(3, dtype=torch.float64)
MEAN, VAR = torch.linspace(0, 1, 3, dtype=torch.float64), torch.linspace(1, 2, 3, dtype=torch.float64)
CALLS = {
    "layer": lambda m, v: functional.layer_norm(X, (5,), torch.rand(5, generator=torch.Generator().manual_seed(1)), None, 1e-3),
    "layer of two": lambda m, v: functional.layer_norm(X, [3, 5]),
    "plain layer": lambda m, v: torch.layer_norm(X, (5,)),
    "batch": lambda m, v: functional.batch_norm(X, m, v, CHANNELS, CHANNELS, training=True, momentum=0.3),
    "batch without": lambda m, v: functional.batch_norm(X[..., 0], None, None, training=True),
    "running": lambda m, v: functional.batch_norm(X, m, v, weight=CHANNELS),
    "plain batch": lambda m, v: torch.batch_norm(X, CHANNELS, None, m, v, True, 0.1, 1e-5, False),
    "instance": lambda m, v: functional.instance_norm(X, m, v, CHANNELS, CHANNELS, momentum=0.2),
    "instance without": lambda m, v: functional.instance_norm(X),
    "running instance": lambda m, v: functional.instance_norm(X, m, v, use_input_stats=False),
    "plain instance": lambda m, v: torch.instance_norm(X, None, CHANNELS, m, v, True, 0.1, 1e-5, False),
    "group": lambda m, v: functional.group_norm(X.movedim(1, 0), 2, torch.rand(4, generator=torch.Generator().manual_seed(1)), None, 1e-3),
    "plain group": lambda m, v: torch.group_norm(X, 1, CHANNELS, CHANNELS),
    "module": lambda m, v: nn.LayerNorm(5, dtype=torch.float64)(X),
}


@pytest.mark.parametrize("call", CALLS)
def test_formulas_are_the_functions(call):
    """Values, and the running statistics that they leave."""
    found, truth = [MEAN.clone(), VAR.clone()], [MEAN.clone(), VAR.clone()]
    seen = _Seen()
    with seen:
        out = composing(CALLS[call])(*found)
    torch.testing.assert_close([out, *found], [CALLS[call](*truth), *truth])
    # PyTorch's own keep the running statistics
    kept = set() if torch.equal(found[0], MEAN) else {torch.batch_norm, torch.instance_norm}
    assert not seen.seen & set(NORMALIZATIONS) - kept


def test_operators_without_the_derivative_are_named():
    y0 = torch.randn(1, 1, 3, 4).requires_grad_()
    attention = lambda t, y: functional.scaled_dot_product_attention(y, y, y) - y  # noqa: E731
    torch.autograd.grad(adjoint.solve_ivp(attention, SPAN, y0, method="kvaerno5").y[-1].sum(), y0)
    with pytest.raises(adjoint.UnsupportedCombination, match=r"SDPBackend\.MATH"):
        torch.autograd.grad(adjoint.solve_ivp(attention, SPAN, y0, method="rodas5p").y[-1].sum(), y0)
    pairs = lambda t, y: torch.cdist(y[0, 0], y[0, 0]).sum(1, keepdim=True) - y  # noqa: E731
    with pytest.raises(adjoint.UnsupportedCombination, match="cdist"):
        torch.autograd.grad(adjoint.solve_ivp(pairs, SPAN, y0, method="rodas5p").y[-1].sum(), y0)
    with pytest.raises(adjoint.UnsupportedCombination, match="no derivative"):
        adjoint.solve_ivp(lambda t, y: -y, SPAN, y0, events=lambda t, y: torch.heaviside(y.sum() - 0.5, torch.zeros(())))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "bdf"])
def test_functions_that_torch_has_compiled_have_no_jacobian(method):
    torch.manual_seed(0)
    net, y0 = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.randn(5, 3)
    plain = lambda t, y: net(y) * torch.cos(t)  # noqa: E731
    fun = torch.compile(plain)
    ends = (adjoint.solve_ivp(f, SPAN, y0, method="tsit5").y[-1] for f in (fun, plain))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), list(net.parameters())) for y in ends))
    with pytest.raises(adjoint.UnsupportedCombination, match="as it was"):
        adjoint.solve_ivp(fun, SPAN, y0, method=method)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("call", [torch.linalg.det, torch.Tensor.det])
def test_determinants(call, n):
    """Values, third derivatives in every order of nesting, and first ones of a matrix of zeros."""
    base = torch.randn(2, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    f = composing(lambda p: call(base + p * torch.eye(n, dtype=torch.float64) + p**2).sum())
    p = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(f(p), torch.linalg.det(base + p * torch.eye(n) + p**2).sum())
    # a polynomial of degree 2 n at most
    nodes = torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64)
    values = torch.stack([torch.linalg.det(base + x * torch.eye(n) + x**2).sum() for x in nodes])
    weights = torch.linalg.solve(nodes.unsqueeze(-1) ** torch.arange(2 * n + 1), values)
    truth = sum(w * k * (k - 1) * (k - 2) * p ** max(k - 3, 0) for k, w in enumerate(weights))
    for first in (torch.func.jacrev, torch.func.jacfwd):
        for second in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(torch.func.jacrev(second(first(f)))(p), truth, rtol=1e-6, atol=1e-6)
    zero = torch.zeros(1, n, n, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(composing(call)(zero).sum(), zero)[0]
    assert torch.equal(slope, torch.ones_like(zero) if n == 1 else torch.zeros_like(zero))


def by_permutations(a):
    """A determinant as Leibniz has it, whose derivatives are those of products."""
    every = torch.tensor(list(itertools.permutations(range(len(a)))))
    signs = torch.linalg.det(torch.eye(len(a), dtype=torch.float64)[every])
    return (functools.reduce(torch.mul, a[torch.arange(len(a)), every].unbind(-1)) * signs).sum()


DRAWN = torch.randint(-3, 4, (2, 6, 6), generator=torch.Generator().manual_seed(1)).double()
SINGULAR = {
    "regular": lambda a: a,
    "badly scaled": lambda a: a * 10.0 ** torch.arange(0, 2 * len(a), 2)[:, None],
    "two alike": lambda a: torch.cat([a[1:], a[1:2]]),
    "a column of zeros": lambda a: a * (torch.arange(len(a)) > 0),
    "two ways": lambda a: torch.cat([a[1:], a[1:2]]) * (torch.arange(len(a)) > 0),
    "one entry": lambda a: torch.nn.functional.pad(a[:1, :1], (2, len(a) - 3, 1, len(a) - 2)),
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("n", [5, 6])
@pytest.mark.parametrize("kind", SINGULAR)
def test_determinants_of_singular_matrices(kind, n):
    """Derivatives up to the third one, alone, mapped and of complex matrices."""
    a, along = SINGULAR[kind](DRAWN[0, :n, :n]), DRAWN[1, :n, :n]
    ours, truth = (lambda p, f=f: f(a + p * along) for f in (composing(torch.linalg.det), by_permutations))
    p = torch.zeros((), dtype=torch.float64)
    for _ in range(3):
        ours, truth = torch.func.jacrev(ours), torch.func.jacfwd(truth)
        want = truth(p)
        torch.testing.assert_close(ours(p), want, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.func.vmap(ours)(p.expand(2)), want.expand(2), rtol=1e-11, atol=1e-11)
    whole = torch.complex(a, 2 * a)
    slopes = [torch.autograd.grad(f(x := whole.clone().requires_grad_()).real, x)[0] for f in (composing(torch.det), by_permutations)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11 * slopes[1].abs().max().item())


@pytest.mark.parametrize("kind", ["two alike", "two ways", "one entry"])
@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("error:compile=True")
def test_solves_with_singular_matrices(kind, method, compiled):
    a, along = SINGULAR[kind](DRAWN[0, :5, :5]), DRAWN[1, :5, :5] / 8

    def end(p):
        fun = lambda t, y: 1 + torch.linalg.det(a + p * along).expand(1) / 64 + 0 * y  # noqa: E731
        return adjoint.solve_ivp(fun, (0.0, 1.0), torch.zeros(1).double(), method=method, compile=compiled).y[-1, 0]

    p, truth = torch.zeros((), dtype=torch.float64, requires_grad=True), lambda p: by_permutations(a + p * along) / 64
    (slope,) = torch.autograd.grad(end(p), p, create_graph=True)
    torch.testing.assert_close(slope, torch.func.grad(truth)(p), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(slope, p)[0], torch.func.hessian(truth)(p), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("call", [torch.cholesky_inverse, torch.Tensor.cholesky_inverse])
def test_inverses_by_cholesky_factors(call):
    """Second derivatives in every order of nesting, those of the inverse of a matrix that is known, and values of upper factors."""
    base = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.5, 0.2], [0.1, 0.2, 1.8]], dtype=torch.float64)
    move = torch.tensor([[0.5, 0.1, 0.0], [0.1, -0.2, 0.3], [0.0, 0.3, 0.4]], dtype=torch.float64)
    f = composing(lambda p: call(torch.linalg.cholesky(base + p * move)))
    p, inverse = torch.tensor(0.3, dtype=torch.float64), torch.linalg.inv(base + 0.3 * move)
    torch.testing.assert_close(f(p), inverse)
    torch.testing.assert_close(composing(lambda: call(torch.linalg.cholesky(base + p * move).mT, True))(), inverse)
    truth = 2 * inverse @ move @ inverse @ move @ inverse
    for first in (torch.func.jacrev, torch.func.jacfwd):
        for second in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(second(first(f))(p), truth)


@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5"])
def test_second_derivatives_with_a_determinant(method):
    """``y' = -y det``, whose decay is ``exp(-(2 + p) p + p^3)`` after a unit of time; of Rosenbrock methods they were NaN."""

    def end(p):
        entries = torch.stack([torch.stack([p, p**2, 0 * p]), torch.stack([p, 2 + p, 0 * p]), torch.stack([0 * p, 0 * p, 1 + 0 * p])])
        fun = lambda t, y: -y * torch.linalg.det(entries + 0 * y)  # noqa: E731
        return adjoint.solve_ivp(fun, (0.0, 1.0), torch.ones(1).double(), method=method, rtol=1e-8, atol=1e-10).y[-1, 0]

    p = torch.tensor(0.3, dtype=torch.float64)
    want = torch.func.hessian(lambda p: torch.exp(p**3 - (2 + p) * p))(p)
    torch.testing.assert_close(torch.func.hessian(end)(p), want, rtol=1e-5, atol=0)
