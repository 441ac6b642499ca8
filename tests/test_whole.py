"""Small compiled solves run as one loop, forward and back: the same numbers as step by step."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import solve_ivp
from adjoint.integrate import whole
from adjoint.integrate.gathered import gathering_pass
from adjoint.methods import METHODS

from .problems import ADAPTIVE, FIXED, lotka_volterra, options

pytestmark = pytest.mark.filterwarnings("default")
#: compilers of older versions do not take all of these loops: there steps are compiled one by one
COMPILES_LOOPS = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
EXPLICIT = [m for m in (*ADAPTIVE, *FIXED) if hasattr(METHODS[m], "tableau") and not METHODS[m].implicit]
formulas = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def counted(monkeypatch):
    """How many loops ran, forward and back."""
    runs = {"forward": 0, "back": 0}
    forward, back = adjoint.integrate.integrate_whole, adjoint.sensitivity.discrete.whole_sweep

    def count(name, function):
        def call(*args):
            result = function(*args)
            runs[name] += result is not None
            return result

        return call

    monkeypatch.setattr("adjoint.integrate.integrate_whole", count("forward", forward))
    monkeypatch.setattr("adjoint.sensitivity.discrete.whole_sweep", count("back", back))
    return runs


def _parameters(rows):
    p = torch.tensor([1.5, 1.0, 3.0, 1.0]) * (1 + 0.1 * torch.rand(max(rows, 1), 4))
    y0 = torch.tensor([1.0, 0.7]).repeat(max(rows, 1), 1)
    p, y0 = (p, y0) if rows else (p[0], y0[0])
    return p.requires_grad_(), y0.requires_grad_()


def _both(rows, span=(0.0, 2.0), weights=None, **kwargs):
    """Values, gradients and steps, eager and compiled."""
    p, y0 = _parameters(rows)
    found = []
    for compiled in (False, True):
        sol = solve_ivp(lotka_volterra, span, y0, (p,), batched=rows > 0, compile=compiled, **kwargs)
        y = sol.y if weights is None else sol.y * weights
        found.append((sol, [sol.y.detach(), *torch.autograd.grad(y.square().sum(), (p, y0))]))
    return found


def _agree(found, rtol=1e-8):
    (eager, first), (compiled, second) = found
    assert torch.as_tensor(eager.stats.n_steps == compiled.stats.n_steps).all()
    # sizes of steps are chosen by numbers in single precision for batches: they round otherwise for one
    return all(torch.allclose(x, y, rtol=rtol, atol=rtol * float(y.abs().max())) for x, y in zip(first, second, strict=True))


@formulas
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("method", EXPLICIT)
def test_every_explicit_method(method, rows, counted):
    """Samples inside and at the ends, one of them twice; with fixed steps more of them than one call takes."""
    t_eval = torch.tensor([0.0, 0.4, 0.4, 1.3, 2.0])
    assert _agree(_both(rows, t_eval=t_eval, **options(method, steps=whole.ROOM + 10)))
    assert counted == {"forward": 1, "back": 1}


@formulas
@pytest.mark.parametrize("method", ["rodas3p", "rodas4", "rodas5p"])
def test_rosenbrock_methods(method, counted):
    assert _agree(_both(0, t_eval=torch.tensor([0.0, 0.4, 1.3, 2.0]), method=method, rtol=1e-5, atol=1e-8))
    assert counted == {"forward": 1, "back": 1}


@formulas
@pytest.mark.parametrize("rows", [0, 3])
def test_many_calls(rows, counted):
    """Rows of different lengths, over several calls forward and back."""
    span = (0.0, torch.linspace(3.0, 12.0, rows)) if rows else (0.0, 12.0)
    times = torch.linspace(0.0, 1.0, 7)
    t_eval = times[:, None] * span[1] if rows else times * 12.0
    found = _both(rows, span=span, t_eval=t_eval, method="tsit5", rtol=1e-9, atol=1e-11)
    assert int(torch.as_tensor(found[0][0].stats.n_steps).max()) > 2 * whole.ROOM
    assert _agree(found, 1e-7)
    assert counted == {"forward": 1, "back": 1}


@formulas
@pytest.mark.parametrize("kwargs", [{}, {"t_eval": [2.0]}, {"t_eval": "steps"}, {"first_step": 0.1}, {"max_step": 0.05}])
def test_other_times(kwargs, counted):
    kwargs = {"span": (2.0, 0.0), **kwargs} if "t_eval" in kwargs and kwargs["t_eval"] != [2.0] else kwargs
    # states at the steps themselves differ as their times do
    assert _agree(_both(0, method="dopri5", **kwargs), 1e-5 if "t_eval" in kwargs else 1e-8)
    assert counted == {"forward": 1, "back": 1}


@formulas
def test_discontinuities_go_step_by_step_on_the_way_back(counted):
    assert _agree(_both(3, step_ts=[0.5, 1.25], t_eval=[0.7, 2.0], method="dopri5"))
    assert counted == {"forward": 1, "back": 0}


@formulas
def test_derivatives_in_times_go_step_by_step_on_the_way_back(counted):
    p, y0 = _parameters(0)
    grads = []
    for compiled in (False, True):
        end = torch.tensor(2.0, requires_grad=True)
        y = solve_ivp(lotka_volterra, (0.0, end), y0, (p,), compile=compiled, rtol=1e-8).y
        grads.append(torch.autograd.grad(y.square().sum(), (p, y0, end)))
    assert all(torch.allclose(x, y, rtol=1e-8) for x, y in zip(*grads, strict=True))
    assert counted == {"forward": 1, "back": 0}


@formulas
def test_dense_output_and_quadrature(counted):
    p, y0 = _parameters(0)
    found = []
    for compiled in (False, True):
        sol = solve_ivp(
            lotka_volterra, (0.0, 2.0), y0, (p,), dense_output=True, quadrature=lambda t, u, p: u.prod(-1), compile=compiled, rtol=1e-8
        )
        loss = sol(torch.linspace(0.0, 2.0, 9)).square().sum() + sol.quadrature
        found.append((loss.detach(), *torch.autograd.grad(loss, (p, y0))))
    assert all(torch.allclose(x, y, rtol=1e-8) for x, y in zip(*found, strict=True))
    assert counted["forward"] == 1


@formulas
def test_what_a_loop_is_not_for(counted):
    """Large states and events."""
    p, y0 = _parameters(0)
    wide = torch.rand(2000, 2)
    solve_ivp(lotka_volterra, (0.0, 0.1), wide, (p,), compile=True)
    solve_ivp(lotka_volterra, (0.0, 0.1), y0, (p,), events=lambda t, u, p: u[0] - 5.0, compile=True)
    assert counted == {"forward": 0, "back": 0}


@formulas
def test_failures_are_reported_alike():
    """Blow-up, and too few steps: the same errors with the same words."""
    messages = []
    for compiled in (False, True):
        for rate, kwargs in ((lambda t, y: y * y, {}), (lambda t, y: -y, {"max_steps": 3, "rtol": 1e-10})):
            with pytest.raises(adjoint.AdjointError) as error:
                solve_ivp(rate, (0.0, 2.0), torch.ones(2), compile=compiled, **kwargs)
            messages.append((type(error.value), str(error.value).split(" ")[:3]))
    assert messages[:2] == messages[2:]


@formulas
def test_second_derivatives(counted):
    p, y0 = _parameters(0)

    def value(p, compiled):
        return solve_ivp(lotka_volterra, (0.0, 1.0), y0.detach(), (p,), compile=compiled, rtol=1e-8).y[-1].square().sum()

    hessians = [torch.autograd.functional.hessian(lambda p, c=c: value(p, c), p.detach()) for c in (False, True)]
    assert torch.allclose(*hessians, rtol=1e-7)


def test_where_a_loop_cannot_be_compiled_steps_are(counted, monkeypatch):
    """No warning: the steps are compiled all the same."""
    monkeypatch.setattr("adjoint.integrate.whole.compiled_loop", lambda function, key, device, width: lambda *args: None)
    monkeypatch.setattr("adjoint.integrate.single.compiled", lambda function, key, columns=False: function)
    p, y0 = _parameters(0)
    with torch.no_grad():
        a, b = (solve_ivp(lotka_volterra, (0.0, 1.0), y0, (p,), compile=c).y for c in (False, True))
    assert torch.allclose(a, b)
    assert counted["forward"] == 0


@pytest.mark.compile
@pytest.mark.parametrize(
    "method", ["dopri5", pytest.param("tsit5", marks=pytest.mark.slow), pytest.param("rodas3p", marks=pytest.mark.slow)]
)
def test_compiled(method, counted):
    """The real thing, in one call and in several, and a network with its narrow products."""
    t_eval = torch.tensor([0.0, 0.4, 1.3, 2.0])
    assert _agree(_both(0, t_eval=t_eval, method=method, rtol=1e-6, atol=1e-9))
    assert counted == {"forward": 1, "back": 1} or not COMPILES_LOOPS
    assert METHODS[method].name == method


@pytest.mark.compile
def test_other_tolerances_compile_nothing(counted):
    """The code of a solve serves for all tolerances, spans and initial values."""
    p, y0 = _parameters(0)
    frames = torch._dynamo.utils.counters["stats"]
    seen = []
    for tolerance, end in ((1e-8, 2.0), (1e-4, 1.0), (1e-6, -1.0)):
        y = solve_ivp(lotka_volterra, (0.0, end), y0, (p,), method="bosh3", compile=True, rtol=tolerance, atol=tolerance).y
        torch.autograd.grad(y.sum(), (p, y0))
        seen.append(frames["unique_graphs"])
    assert seen[0] > 0 and seen[1:] == [seen[0]] * 2
    assert counted == {"forward": 3, "back": 3} or not COMPILES_LOOPS


@pytest.mark.compile
def test_compiled_network(counted):
    net = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 2))

    class Rate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y) * torch.cos(t)

    rate, y0, found = Rate(), torch.randn(16, 2), []
    for compiled in (False, True):
        y = solve_ivp(rate, (0.0, 3.0), y0, t_eval=[0.5, 3.0], compile=compiled, rtol=1e-8, method="dopri5").y
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), tuple(rate.parameters()))))
    assert all(torch.allclose(x, y, rtol=1e-7, atol=1e-9) for x, y in zip(*found, strict=True))
    assert counted == {"forward": 1, "back": 1} or not COMPILES_LOOPS


def test_products_are_gathered_and_turned():
    """The rewritten graph computes the same with fewer products."""

    def graph(total, *operands):
        for a, b in zip(operands[::2], operands[1::2], strict=True):
            total = total + a.t() @ b
        return total, operands[1] @ operands[1].new_ones(2, 3)

    operands = [torch.randn(9, 20) if i % 2 == 0 else torch.randn(9, 2) for i in range(8)]
    inputs = (torch.randn(20, 2), *operands)
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(graph, tracing_mode="fake")(*inputs)
    before = sum(node.target is torch.ops.aten.mm.default for node in traced.graph.nodes)
    gathering_pass(traced.graph)
    traced.recompile()
    after = sum(node.target is torch.ops.aten.mm.default for node in traced.graph.nodes)
    assert (before, after) == (5, 2)
    assert all(torch.allclose(x, y) for x, y in zip(graph(*inputs), traced(*inputs), strict=True))
