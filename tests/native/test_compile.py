"""``compile=True`` from the door: the numbers of the eager engine whatever else is asked for, code that is used again, and remarks where
there is none. Methods, forms and times are held against the eager engine in `test_engine`."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

import adjoint
from adjoint import Backprop, DiscreteAdjoint, GaussAdjoint, InterpolatingAdjoint, QuadratureAdjoint, SplitFunction, solve_ivp
from adjoint.native import build, functions

from ..helpers.problems import lotka_volterra

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]


@pytest.fixture(autouse=True)
def _no_fallback(request):
    """Solves that are compiled say nothing."""
    with warnings.catch_warnings():
        if "remark" not in request.node.name:
            warnings.filterwarnings("error", message="compile=True", category=RuntimeWarning)
        yield


@pytest.fixture
def built(monkeypatch):
    """How often the compiler was called."""
    calls, compile = [], build._compile

    def counted(*args):
        calls.append(args[2:])
        compile(*args)

    monkeypatch.setattr(build, "_compile", counted)
    return calls


def data(rows):
    """Parameters and initial states, of one trajectory for no rows."""
    p = torch.tensor([1.5, 1.0, 3.0, 1.0]) * (1 + 0.1 * torch.rand(max(rows, 1), 4))
    y0 = torch.tensor([1.0, 0.7]).repeat(max(rows, 1), 1)
    p, y0 = (p, y0) if rows else (p[0], y0[0])
    return p.requires_grad_(), y0.requires_grad_()


def agree(solve, rtol=1e-9):
    """``solve(compile)`` gives a solution and tensors: the same ones to rounding, by the same steps."""
    (eager, first), (native, second) = solve(False), solve(True)
    assert torch.equal(torch.as_tensor(eager.stats.n_steps), torch.as_tensor(native.stats.n_steps))
    assert torch.equal(torch.as_tensor(eager.status), torch.as_tensor(native.status))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=rtol * float(a.detach().nan_to_num().abs().max()), equal_nan=True)


def of_volterra(rows, span=(0.0, 2.0), fun=lotka_volterra, **kwargs):
    """Values and gradients in everything, of a loss of all that is given."""
    p, y0 = data(rows)

    def solve(compile):
        given = () if fun is not lotka_volterra else (p,)
        sol = solve_ivp(fun if given else fun(p), span, y0, given, batched=rows > 0, compile=compile, **kwargs)
        loss = sol.y.nan_to_num().square().sum()
        return sol, [sol.t.detach(), sol.y.detach(), *torch.autograd.grad(loss, (p, y0))]

    return solve


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"rtol": torch.tensor([1e-4, 1e-8]), "atol": 1e-9},
        {"gradient": Backprop(), "t_eval": [0.7, 2.0]},
        {"gradient": DiscreteAdjoint(keep_bytes=0)},
        {"controller": adjoint.PIController()},
    ],
    ids=lambda x: "-".join(x) or "plain",
)
def test_options(rows, kwargs):
    agree(of_volterra(rows, method="dopri5", **kwargs))


@pytest.mark.parametrize("gradient", [None, InterpolatingAdjoint(), GaussAdjoint(), QuadratureAdjoint()], ids=lambda g: type(g).__name__)
def test_dense_output_and_the_way_back_of_continuous_adjoints(gradient):
    p, y0 = data(0)

    def solve(compile):
        dense = {"dense_output": True} if gradient is None else {"t_eval": [0.5, 2.0]}
        sol = solve_ivp(lotka_volterra, (0.0, 2.0), y0, (p,), gradient=gradient, compile=compile, method="dopri5", **dense)
        value = (sol(torch.linspace(0.0, 2.0, 9)) if gradient is None else sol.y).square().sum()
        return sol, [value.detach(), *torch.autograd.grad(value, (p, y0))]

    agree(solve)


def test_quadrature():
    p, y0 = data(0)

    def solve(compile):
        options = {"compile": compile, "method": "rk4", "first_step": 0.1}
        sol = solve_ivp(lotka_volterra, (0.0, 2.0), y0, (p,), quadrature=lambda t, u, p: u.prod(-1), **options)
        return sol, [sol.quadrature.detach(), *torch.autograd.grad(sol.quadrature + sol.y.sum(), (p, y0))]

    agree(solve)


def test_own_spans_and_rows_that_end_early():
    ends = torch.tensor([2.0, 0.5, 0.0])
    agree(of_volterra(3, span=(0.0, ends), t_eval=torch.linspace(0.0, 1.0, 4).unsqueeze(-1) * ends, method="dopri5"))


class _Rate(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = torch.nn.Parameter(p)

    def forward(self, t, u):
        return lotka_volterra(t, u, self.p)


def test_captured_tensors_and_modules(built):
    """They are inputs like any other: code that was compiled for arguments serves for them."""
    agree(of_volterra(0, method="dopri5"))
    agree(of_volterra(0, fun=lambda p: lambda t, u: lotka_volterra(t, u, p), method="dopri5"))
    p, y0 = data(0)
    rate, before = _Rate(p.detach()), len(built)

    def solve(compile):
        sol = solve_ivp(rate, (0.0, 2.0), y0, compile=compile, method="dopri5")
        return sol, [sol.y.detach(), *torch.autograd.grad(sol.y.square().sum(), (rate.p, y0))]

    agree(solve)
    assert len(built) == before


def test_network():
    """A batch of rows as one state, with parameters that all rows share."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    y0 = torch.randn(3, 2)

    def solve(compile):
        sol = solve_ivp(lambda t, y: net(y) * torch.cos(t), (0.0, 1.0), y0, compile=compile, method="dopri5", rtol=1e-6)
        return sol, [sol.y.detach(), *torch.autograd.grad(sol.y[-1].square().sum(), list(net.parameters()))]

    agree(solve)


def test_other_values_compile_nothing(built):
    """The code of a solve serves for all tolerances, spans, values and objects."""

    def solve(scale, end, tolerance):
        p = torch.full((3, 4), scale, requires_grad=True)
        options = {"rtol": tolerance, "atol": tolerance, "method": "dopri5", "compile": True}
        y = solve_ivp(lambda t, u: -p[:, :1] * u, (0.0, end), torch.ones(3, 2), batched=True, **options).y[-1]
        return y, torch.autograd.grad(y.sum(), p)[0]

    solve(0.5, 1.0, 1e-4)
    before = len(built)
    for scale, end, tolerance in ((0.9, 1.0, 1e-9), (0.9, -1.0, 1e-8)):
        y, bar = solve(scale, end, tolerance)
        exact = torch.exp(torch.tensor(-scale * end))
        torch.testing.assert_close(y, exact.expand(3, 2), rtol=1e-6, atol=0)
        torch.testing.assert_close(bar, (-2 * end * exact * torch.eye(4)[0]).expand(3, 4), rtol=1e-6, atol=0)
    assert len(built) == before


def test_another_constant_of_python_is_another_function():
    p, y0 = (x.detach() for x in data(0))
    for scale in (1.0, 0.5):
        fun = lambda t, u, p: scale * lotka_volterra(t, u, p)  # noqa: E731, B023
        a, b = (solve_ivp(fun, (0.0, 1.0), y0, (p,), compile=compile, method="dopri5").y for compile in (False, True))
        torch.testing.assert_close(b, a, rtol=1e-9, atol=0)


def test_failures_stay_alone_and_are_reported_alike():
    p = torch.tensor([1.0, 0.25, -1.0]).unsqueeze(-1).repeat(1, 4).requires_grad_()

    ones = torch.ones(3, 2)

    def solve(compile, y0=ones, **kwargs):
        fun = lambda t, u, p: p[:, :2] * u * u  # noqa: E731
        return solve_ivp(fun, (0.0, 2.0), y0, (p,), batched=True, method="dopri5", compile=compile, **kwargs)

    def found(compile):
        sol = solve(compile, throw=False)
        # y(2) = 1 / (1 - 2 p)
        return sol, [sol.y.detach(), torch.autograd.grad(sol.y[-1, 1:].sum(), p)[0][1:]]

    agree(found)
    assert solve(True, throw=False).status.lt(0).tolist() == [True, False, False]
    dead = solve(True, torch.tensor([[1.0], [float("nan")], [1.0]]).repeat(1, 2), throw=False)
    assert dead.status.lt(0).tolist() == [True, True, False]
    messages = []
    for compile in (False, True):
        for kwargs in ({}, {"max_steps": 3, "rtol": 1e-10}):
            with pytest.raises(adjoint.AdjointError) as error:
                solve(compile, **kwargs)
            # steps of batches follow each other by powers in single precision, natively of few rows in double
            messages.append((type(error.value), re.sub(r"(\.\d{5})\d+", r"\1", str(error.value))))
    assert messages[:2] == messages[2:]


# ---- what runs uncompiled, and what is said about it


def _square(t, y):
    return -y * y


def _reads_numbers(t, y):
    return y if float(y.sum()) > 1e9 else -y * y


UNCOMPILED = {
    "split": ("'kencarp4' has no native form", {"fun": SplitFunction(_square, _square), "method": "kencarp4"}),
    "jac": ("leave jac= or compile out", {"method": "rodas4", "jac": lambda t, y: torch.diag(-2 * y)}),
    "linear_solver": ("leave linear_solver= or compile out", {"method": "rodas4", "linear_solver": adjoint.linalg.DenseLU()}),
    "event of a sign": ("an event", {"events": lambda t, y: y[0] > 0.7}),
    "norm": ("norm= is", {"norm": lambda y: y.abs().amax()}),
    "numbers": ("", {"fun": _reads_numbers}),
}


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("name", UNCOMPILED)
def test_remark(name):
    """One for a right-hand side and reason, and the solution of the eager engine."""
    words, given = UNCOMPILED[name]
    # code of its own: what was said before is not said again
    scope: dict = {"inner": given.get("fun", _square)}
    exec("def fun(t, y):\n    return inner(t, y)", scope)
    fun = given["fun"] if isinstance(given.get("fun"), SplitFunction) else scope["fun"]
    kwargs = {"method": "dopri5"} | {k: v for k, v in given.items() if k not in ("fun", "y0")}

    def solve(compile):
        return solve_ivp(fun, (0.0, 1.0), given.get("y0", torch.ones(2, dtype=torch.float64)), compile=compile, **kwargs)

    with pytest.warns(RuntimeWarning, match=f"compile=True: this solve runs uncompiled, because .*({words})"):
        first = solve(True)
    assert torch.equal(first.y, solve(False).y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(solve(True).y, first.y)


@pytest.mark.parametrize("gradient", [None, adjoint.Backprop()], ids=["default", "backprop"])
def test_what_runs_uncompiled_is_differentiated_as_without_compile(gradient):
    """The loop is recorded as it goes, and not evaluated once more on the way back."""
    weight = torch.linspace(-0.1, 0.1, 300 * 300, dtype=torch.float64).reshape(300, 300).sin().requires_grad_()
    y0 = torch.linspace(0, 1, 300, dtype=torch.float64)

    def solve(compile):
        count = [0]

        def fun(t, y):
            count[0] += 1
            return torch.tanh(weight @ y) - y

        sol = solve_ivp(fun, (0.0, 1.0), y0, method="dopri5", gradient=gradient, compile=compile)
        (slope,) = torch.autograd.grad(sol.y[-1].square().sum(), weight)
        return count[0], sol.stats.backward.n_fun, slope

    with warnings.catch_warnings():
        # said once, in the first of these tests
        warnings.simplefilter("ignore", RuntimeWarning)
        solve(True)
        mine, theirs = solve(True), solve(False)
    assert mine[1] == theirs[1] and mine[0] <= theirs[0] + 2
    assert torch.equal(mine[2], theirs[2])


BRANCHES = {
    "float": lambda t, y: -2 * y if float(t) > 0.5 else -y,
    "item": lambda t, y: -2 * y if t.item() > 0.5 else -y,
    "tensor": lambda t, y: -2 * y if t > 0.5 else -y,
    "int": lambda t, y: -2 * y if int(2 * t) > 0 else -y,
    "range": lambda t, y: -y * sum(1 for k in range(2) if t >= k * 0.5),
    "state": lambda t, y: -2 * y if float(y) < math.exp(-0.5) else -y,
}


@pytest.mark.parametrize("name", BRANCHES)
def test_remark_of_branches_on_numbers(name):
    """A tracer knows the number in an input without dimensions: what is done at the start is not what is done later."""
    y0 = torch.ones(() if name == "state" else 1, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"depends on the value of a tensor .*use torch\.where"):
        y = solve_ivp(BRANCHES[name], (0.0, 1.0), y0, compile=True, method="dopri5", rtol=1e-8, atol=1e-10).y[-1]
    torch.testing.assert_close(y, torch.full_like(y0, math.exp(-1.5)), rtol=1e-5, atol=0)


def potential(x, k):
    return (k * x**4 / 4 + torch.cos(x)).sum()


FORCES = {
    "grad": lambda t, y, k: -torch.func.grad(potential)(y, k),
    "vjp": lambda t, y, k: -torch.func.vjp(lambda x: potential(x, k), y)[1](torch.ones((), dtype=y.dtype))[0] * torch.exp(-t),
    "jvp": lambda t, y, k: -torch.func.jvp(lambda x: k * x**3 - torch.sin(x), (y,), (y,))[1],
    "hessian": lambda t, y, k: -torch.func.hessian(potential)(y, k) @ y,
    "jacrev": lambda t, y, k: -torch.func.jacrev(lambda x: k * x**3)(y) @ y,
    "vmap": lambda t, y, k: -torch.vmap(torch.func.grad(potential), (0, None))(y, k),
}


@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
@pytest.mark.parametrize("name", FORCES)
@pytest.mark.slow_cases("hessian-rodas5p", "vjp-rodas5p", "vmap-dopri5")
def test_functions_that_take_derivatives(name, method):
    k, y0 = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 0.4], dtype=torch.float64, requires_grad=True)

    def solve(compile):
        sol = solve_ivp(FORCES[name], (0.0, 1.0), y0, (k,), compile=compile, method=method, rtol=1e-6, atol=1e-8)
        return sol, [sol.y.detach(), *torch.autograd.grad(sol.y.square().sum(), (k, y0))]

    agree(solve, 1e-8)


def test_remark_of_functions_that_take_derivatives_and_are_not_read():
    """Whatever goes wrong on the way, transforms that were entered are left again."""
    y0 = torch.tensor([1.0, 0.4], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="uncompiled"):
        solve_ivp(lambda t, y: -torch.func.hessian(lambda x: torch.sort(x).values.prod())(y) @ y, (0.0, 0.1), y0, compile=True)
    x = y0.clone().requires_grad_()
    # as without compile, where it is an error too
    with pytest.warns(RuntimeWarning, match=r"use torch\.func\.grad"), pytest.raises(adjoint.UnsupportedCombination):
        solve_ivp(lambda t, y: -torch.autograd.grad((x * y).sum(), x, create_graph=True)[0], (0.0, 0.1), y0, compile=True)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0 and torch._C._autograd._saved_tensors_hooks_is_enabled()
    slope = torch.func.jvp(torch.sin, (y0,), (torch.ones_like(y0),))[1]
    torch.testing.assert_close(slope, torch.cos(y0))


def damped(t, y, p, q):
    return torch.stack([y[..., 1], -p * y[..., 0] - q * y[..., 1] + torch.sin(t)], -1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_mapped_solves(dims):
    """``torch.vmap`` over any of the arguments, and derivatives inside and outside of it."""
    p, q = torch.linspace(0.5, 1.5, 5, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    p, q = (x if dim == 0 else x[2] for x, dim in zip((p, q), dims, strict=True))
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def value(p, q, compile):
        return solve_ivp(damped, (0.0, 1.0), y0, (p, q), method="dopri8", rtol=1e-10, atol=1e-12, compile=compile).y[-1].square().sum()

    def outside(p, q, compile):
        return torch.vmap(lambda p, q: value(p, q, compile), in_dims=dims)(p, q).sum()

    for call in (
        lambda c: torch.vmap(lambda p, q: value(p, q, c), in_dims=dims)(p, q),
        lambda c: torch.vmap(torch.func.grad(lambda p, q: value(p, q, c)), in_dims=dims)(p, q),
        lambda c: torch.func.grad(outside, argnums=1)(p, q, c),
    ):
        torch.testing.assert_close(call(True), call(False), rtol=1e-8, atol=1e-9)


def test_remark_without_a_compiler(monkeypatch):
    def none():
        raise build.NoCompiler("no C++ compiler was found")

    monkeypatch.setattr(build, "compiler", none)
    fun = lambda t, y: -y * torch.tensor([1.0, 2.0, 3.0])  # noqa: E731
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        y = solve_ivp(fun, (0.0, 1.0), torch.ones(3), compile=True, method="heun2", first_step=0.1).y
    assert torch.equal(y, solve_ivp(fun, (0.0, 1.0), torch.ones(3), method="heun2", first_step=0.1).y)


@pytest.mark.parametrize("method", ["rodas5p", "rodas4", "rodas3p"])
@pytest.mark.parametrize("rows", [0, 2, 9])
def test_an_infinite_jacobian_is_named(method, rows):
    """Linear systems with it have the solution zero, as if the state were at rest."""
    y0 = torch.tensor([0.0, 1.0])
    fun = lambda t, y: torch.stack([1 - torch.sqrt(y[..., 0]), -y[..., 1]], -1)  # noqa: E731
    with pytest.raises(adjoint.NonFiniteDerivative, match="at t = 0"):
        solve_ivp(fun, (0.0, 1.0), y0.expand(rows, 2) if rows else y0, batched=rows > 0, method=method, compile=True)


def test_remark_of_changes_in_place():
    """The eager engine refuses them; a buffer that ``fun`` writes its result to it copies."""
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="in place"), pytest.raises(adjoint.InvalidInput, match="in place"):
        solve_ivp(lambda t, y: -y.sub_(0.1), (0.0, 1.0), torch.ones(2), compile=True, method="dopri5")
    kept = torch.zeros(2)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="uncompiled"):
        y = solve_ivp(lambda t, y: torch.mul(y, -1.0, out=kept), (0.0, 1.0), torch.ones(2), compile=True, method="dopri5", rtol=1e-8).y[-1]
    torch.testing.assert_close(y, torch.exp(torch.tensor(-1.0)).expand(2), rtol=1e-6, atol=0)


def test_remark_of_too_many_unknowns():
    """Full matrices of native code against those of libraries; banded ones are taken on."""
    y0 = torch.sin(torch.linspace(0.0, 3.0, 160, dtype=torch.float64))
    fun = lambda t, y: 50.0 * torch.tanh(y.mean() - y)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="160 unknowns, and beyond 150"):
        solve_ivp(fun, (0.0, 0.1), y0, method="radau5", compile=True)
    found = adjoint.explain(fun, y0, method="radau5")
    assert not found.native and "160 unknowns" in found.reason and adjoint.explain(fun, y0, method="kvaerno5").native
    assert adjoint.explain(lambda t, y: torch.roll(y, 1) - 2 * y + torch.roll(y, -1), y0, method="radau5").native


def test_remark_of_too_many_formulas(built, monkeypatch):
    monkeypatch.setattr(functions, "MOST_VALUES", 10)
    w = torch.rand(5, 5)
    fun = lambda t, y: torch.tanh(w @ y)  # noqa: E731
    with pytest.warns(RuntimeWarning, match="more than 10"):
        y = solve_ivp(fun, (0.0, 0.1), torch.ones(5), compile=True, method="dopri5").y
    assert torch.equal(y, solve_ivp(fun, (0.0, 0.1), torch.ones(5), method="dopri5").y)
    assert not built
