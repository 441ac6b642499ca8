"""Second derivatives and tangents of compiled solves, by compiled code: as those that the eager engine records, which is not asked."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from adjoint import solve_dae, solve_ivp
from adjoint.methods import METHODS
from adjoint.native import reverse
from adjoint.native.emit import goes_along, takes
from adjoint.sensitivity import node, sweep_node

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]

F64 = torch.float64
OURS = [name for name, m in METHODS.items() if takes(m) and goes_along(m)]
FAST = {"tsit5", "rodas5p"}
each_method = pytest.mark.parametrize("method", OURS)
slow_ones = pytest.mark.slow_cases(*(m for m in OURS if m not in FAST))


def prey(t, y, p, shift):
    a, b, c, d = p.unbind(-1)
    u, v = y.unbind(-1)
    return torch.stack([a * u - b * u * v + shift * torch.sin(t), -c * v + d * u * v], -1)


P = torch.tensor([1.5, 0.1, 0.8, 0.05], dtype=F64)
Y0 = torch.tensor([10.0, 5.0], dtype=F64)
SHIFT = torch.tensor(0.1, dtype=F64)
ALONG = (torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=F64), torch.tensor(0.7, dtype=F64))


@pytest.fixture
def natively(monkeypatch):
    """Nothing is recorded, nor evaluated, of compiled solves."""

    def never(*_):
        raise AssertionError("derivatives were had in another way")

    for module, name in ((node, "functional_sweep"), (node, "tangents"), (node, "check_known"), (sweep_node, "functional_sweep")):
        monkeypatch.setattr(module, name, never)


def samples(method, compile, **more):
    """The samples as a function of start and arguments."""
    times = torch.tensor([0.0, 1.3, 3.0], dtype=F64)
    given = {"rtol": 1e-6, "atol": 1e-8} if METHODS[method].adaptive else {"first_step": 0.125}
    options = {"t_eval": times, "method": method, "compile": compile} | given | more
    return lambda y0, p, shift: solve_ivp(prey, (0.0, 3.0), y0, args=(p, shift), **options).y


def weighed(function):
    def loss(*xs):
        y = function(*xs)
        return (y * y).sum() + y[-1].prod(-1).sum()

    return loss


def twice(loss, xs, along):
    """By recorded gradients."""
    xs = [x.clone().requires_grad_() for x in xs]
    first = torch.autograd.grad(loss(*xs), xs, create_graph=True)
    return torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, along, strict=True)), xs)


def by_transforms(loss, xs, along):
    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    return *torch.func.jvp(gradient, xs, along)[1], *torch.func.vjp(gradient, *xs)[1](along)


def close(found, known, rtol=1e-10):
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@slow_ones
@each_method
def test_as_the_eager_engine(method, request):
    xs, eager = (Y0, P, SHIFT), samples(method, False)
    known = [*twice(weighed(eager), xs, ALONG), torch.func.jvp(eager, xs, ALONG)[1]]
    request.getfixturevalue("natively")
    ours = samples(method, True)
    of_transforms = by_transforms(weighed(ours), xs, ALONG)
    close([*twice(weighed(ours), xs, ALONG), torch.func.jvp(ours, xs, ALONG)[1]], known)
    close(of_transforms, [*known[:3], *known[:3]])


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p", "radau5", "bdf"])
@pytest.mark.slow_cases("tsit5-5", "rodas5p-5", "radau5-5", "bdf-40", "rodas5p-40", "kvaerno5-40")
def test_batches(method, rows, request):
    """Trajectories with ends of their own, some of no length, with arguments of their own beside one of all, side by side in vectors."""
    g = torch.Generator().manual_seed(1)
    p = P * (1 + 0.1 * torch.rand(rows, 4, generator=g, dtype=F64))
    y0 = Y0 * (1 + 0.1 * torch.rand(rows, 2, generator=g, dtype=F64))
    ends = 1 + 2 * torch.rand(rows, generator=g, dtype=F64)
    if method != "bdf":
        ends[2] = 0
    xs, along = (y0, p, SHIFT), tuple(torch.randn(x.shape, generator=g, dtype=F64) for x in (y0, p, SHIFT))
    times = torch.stack([0.3 * ends, ends])

    def of(compile):
        given = {"method": method, "rtol": 1e-6, "batched": True, "compile": compile, "t_eval": times}
        return lambda y0, p, shift: solve_ivp(prey, (torch.zeros(rows, dtype=F64), ends), y0, args=(p, shift), **given).y

    known = [*twice(weighed(of(False)), xs, along), torch.func.jvp(of(False), xs, along)[1]]
    request.getfixturevalue("natively")
    close([*twice(weighed(of(True)), xs, along), torch.func.jvp(of(True), xs, along)[1]], known)


def test_whole_matrices(natively):
    def loss(p, compile=True):
        return weighed(samples("tsit5", compile))(Y0, p, SHIFT)

    f = torch.func
    gradient = f.grad(loss)
    known = torch.stack([f.vjp(gradient, P)[1](e)[0] for e in torch.eye(4, dtype=F64)])
    step = 1e-5 * P
    differences = torch.stack([(gradient(P + step * e) - gradient(P - step * e)) / (2 * (step * e).sum()) for e in torch.eye(4, dtype=F64)])
    torch.testing.assert_close(known, differences, rtol=1e-3, atol=1e-3 * float(known.abs().max()))
    for found in (
        f.hessian(loss)(P),
        f.jacrev(f.jacrev(loss))(P),
        torch.autograd.functional.hessian(loss, P),
        torch.autograd.functional.hessian(loss, P, vectorize=True),
        f.vmap(lambda v: f.jvp(gradient, (P,), (v,))[1])(torch.eye(4, dtype=F64)),
    ):
        torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10 * float(known.abs().max()))


@pytest.mark.slow
def test_third_derivatives():
    """Of what compiled code gave the eager engine records them."""

    def third(compile):
        loss = weighed(samples("bosh3", compile, rtol=1e-3, atol=1e-4))
        gradient = torch.func.grad(lambda p: loss(Y0, p, SHIFT))
        along = lambda p: torch.func.jvp(gradient, (p,), (ALONG[1],))[1]  # noqa: E731
        p = P.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(Y0, p, SHIFT), p, create_graph=True)
        (second,) = torch.autograd.grad((first * ALONG[1]).sum(), p, create_graph=True)
        (recorded,) = torch.autograd.grad((second * ALONG[1]).sum(), p)
        return torch.func.jvp(along, (P,), (ALONG[1],))[1], torch.func.grad(lambda p: along(p) @ ALONG[1])(P), recorded

    close(third(True), third(False))


@pytest.mark.parametrize("method", ["kvaerno5", "radau5", "rodas5p", "bdf"])
@pytest.mark.slow_cases("1000000.0-rodas5p", "10000000000000.0-rodas5p", "1000000.0-bdf")
@pytest.mark.parametrize("rate", [1e6, 1e13])
def test_stiff(method, rate, natively):
    """Along a slow manifold u = q(p) + v, behind which stands a slow equation: v' = -p v**2, from v = 1."""

    def fun(t, y, p):
        u, v = y.unbind()
        return torch.stack([-rate * (u - p * p - v), -p * v * v])

    def end(p, start):
        y0 = torch.stack([p * p + start, start])
        return solve_ivp(fun, (0.0, 2.0), y0, args=(p,), method=method, rtol=1e-9, atol=1e-10, compile=True).y[-1]

    p, one = torch.tensor(0.7, dtype=F64), torch.tensor(1.0, dtype=F64)
    gradient = torch.func.grad(lambda p, s: end(p, s).square().sum(), argnums=(0, 1))
    found = torch.func.jvp(gradient, (p, one), (one, 0.5 * one))[1]

    def closed(p, start):
        v = start / (1 + 2 * p * start)
        return (p * p + v + p * v * v / rate).square() + v.square()

    known = torch.func.jvp(torch.func.grad(closed, argnums=(0, 1)), (p, one), (one, 0.5 * one))[1]
    close(found, known, 1e-5)


def test_modules_and_what_they_capture(natively):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(F64)
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
    leaves = [*net.parameters(), scale]

    def products(compile):
        y = solve_ivp(lambda t, y: scale * net(y), (0.0, 1.0), Y0 / 10, compile=compile, rtol=1e-6).y[-1]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    found = products(True)
    step, before = 1e-6, [x.detach().clone() for x in leaves]
    direction = [torch.randn_like(x) for x in leaves]

    def size(sign):
        with torch.no_grad():
            for x, b, d in zip(leaves, before, direction, strict=True):
                x.copy_(b + sign * step * d)
        y = solve_ivp(lambda t, y: scale * net(y), (0.0, 1.0), Y0 / 10, compile=True, rtol=1e-6).y[-1]
        return sum((g * g).sum() for g in torch.autograd.grad(y.square().sum(), leaves))

    slope = (size(1) - size(-1)) / (2 * step)
    torch.testing.assert_close(sum((g * d).sum() for g, d in zip(found, direction, strict=True)), slope, rtol=1e-6, atol=0)


def reactions(t, y, yp, p):
    slow, fast = p[0] * y[0], 3e3 * p[1] * y[1] * y[1]
    return torch.stack([yp[0] + slow - p[2] * y[1], yp[1] - slow + p[2] * y[1] + fast, y.sum() - 1])


def layers(t, y, p):
    return torch.tanh(y @ (p[0] * LAYER).T) @ (p[1] * LAYER) - p[2] * y


def kept_sum(method, p, compile):
    start = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    return solve_dae(reactions, (0.0, 10.0), start, None, args=(p,), method=method, compile=compile, rtol=1e-5, step_ts=[4.0])


LAYER = torch.linspace(-1.0, 1.0, 6, dtype=F64).reshape(3, 2).cos()
MATRICES = {
    # what stands in front of the slopes depends on the parameters, too
    "mass matrix": lambda p, c: solve_ivp(
        lambda t, y, p: torch.stack([-p[0] * y[0] * y[1], p[1] * y[0] - y[1]]),
        (0.0, 2.0),
        torch.tensor([1.0, 0.5], dtype=F64),
        args=(p,),
        mass_matrix=torch.stack([torch.stack([p[0], p[2]]), torch.stack([0 * p[0], p[3]])]),
        method="rodas4",
        t_eval=torch.tensor([0.7, 2.0], dtype=F64),
        compile=c,
    ),
    "radau": lambda p, c: kept_sum("radau", p, c),
    "bdf": lambda p, c: kept_sum("bdf", p, c),
    "rows as one state": lambda p, c: solve_ivp(layers, (0.0, 1.0), torch.linspace(-1, 1, 74, dtype=F64).view(37, 2), args=(p,), compile=c),
}


@pytest.mark.slow_cases("bdf")
@pytest.mark.parametrize("what", MATRICES)
def test_other_equations(what, request):
    def loss(compile):
        return lambda p: MATRICES[what](p, compile).y.square().sum()

    p, along = P[:1] * torch.tensor([0.5, 0.7, 0.6, 0.8], dtype=F64), ALONG[1]
    known = torch.func.jvp(torch.func.grad(loss(False)), (p,), (along,))[1]
    request.getfixturevalue("natively")
    q = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(True)(q), q, create_graph=True)
    close([torch.autograd.grad(gradient, q, along)[0], torch.func.jvp(torch.func.grad(loss(True)), (p,), (along,))[1]], [known] * 2)


@pytest.mark.parametrize("what", ["times", "events", "a row that fails", "single precision"])
def test_what_else_there_is(what):
    """Where compiled code has no second derivatives, those of the eager engine are had."""
    dtype = torch.float32 if what == "single precision" else F64
    y0, p = Y0.to(dtype), P.to(dtype)
    many = what == "a row that fails"

    def fun(t, y, p):
        out = prey(t, y, p, 0.1)
        return torch.where((t > 0.5).unsqueeze(-1) & (y[..., :1] > 50), math.nan, out) if many else out

    def loss(y0, p, end, compile):
        options = {"events": lambda t, y, p: y[0] - 12.0} if what == "events" else {}
        if many:
            y0, options = torch.stack([y0, 7 * y0]), {"batched": True, "throw": False}
        sol = solve_ivp(fun, (0.0, end), y0, args=(p,), rtol=1e-5, compile=compile, **options)
        values = sol.events[0].y.square().sum() if what == "events" else 0.0
        return (sol.y[-1][:1] if many else sol.y[-1]).square().sum() + values

    def product(compile):
        xs = [x.clone().requires_grad_() for x in (y0, p, torch.tensor(1.0, dtype=F64))]
        given = xs if what == "times" else [*xs[:2], 1.0]
        xs = xs if what == "times" else xs[:2]
        first = torch.autograd.grad(loss(*given, compile), xs, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), xs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(product(True), product(False), 1e-3 if dtype is torch.float32 else 1e-9)


def test_code_that_is_wrong(monkeypatch):
    """Code for tangents is compared with those of the function where it is used first."""

    def fun(t, y, p):
        return torch.sinh(-p * y)

    def product(compile):
        p = torch.tensor(0.7, dtype=F64, requires_grad=True)
        y = solve_ivp(fun, (0.0, 1.0), torch.ones(1, dtype=F64), args=(p,), compile=compile).y[-1].sum()
        (first,) = torch.autograd.grad(y, p, create_graph=True)
        return torch.autograd.grad(first, p)[0]

    known = product(False)
    product_of = reverse.RULES["cosh"]
    monkeypatch.setitem(reverse.RULES, "cosh", lambda g, node, args, v: [g.op("neg", x) for x in product_of(g, node, args, v)])
    torch.testing.assert_close(product(True), known, rtol=1e-12, atol=0)
