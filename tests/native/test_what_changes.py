"""Between two solves by native code something changes that ``fun`` reads: attributes, bases of classes, objects without value, modules."""

from __future__ import annotations

import enum
import functools
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import adjoint

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]
F64 = torch.float64


def of_a_function():
    def fun(t, y):
        return -fun.rate * y

    fun.rate = 1.0
    return fun, lambda: setattr(fun, "rate", 2.0)


def of_a_wrapper():
    def scaled(f):
        @functools.wraps(f)
        def call(t, y):
            return call.rate * f(t, y)

        call.rate = 1.0
        return call

    fun = scaled(lambda t, y: -y)
    return fun, lambda: setattr(fun, "rate", 2.0)


def of_a_method():
    class Decay:
        def slope(self, t, y):
            return -self.slope.rate * y

    Decay.slope.rate = 1.0
    return Decay().slope, lambda: setattr(Decay.slope, "rate", 2.0)


def of_a_partial_function():
    twice = functools.partial(lambda y: y)
    twice.rate = 1.0
    return lambda t, y: -twice.rate * y, lambda: setattr(twice, "rate", 2.0)


def of_a_tensor():
    w = torch.ones((), dtype=F64)
    w.rate = 1.0
    return lambda t, y: -w.rate * w * y, lambda: setattr(w, "rate", 2.0)


def of_a_parameter():
    layer = torch.nn.Linear(1, 1, bias=False, dtype=F64)
    torch.nn.init.ones_(layer.weight)
    layer.weight.rate = 1.0
    return lambda t, y: -layer.weight.rate * layer(y), lambda: setattr(layer.weight, "rate", 2.0)


def of_a_member():
    class Kind(enum.Enum):
        FIRST = 1

        def speed(self):
            return self.rate

    kind = Kind.FIRST
    kind.rate = 1.0
    return lambda t, y: -kind.speed() * y, lambda: setattr(kind, "rate", 2.0)


def in_a_member():
    class Kind(enum.Enum):
        FIRST = ([1.0],)

    kind = Kind.FIRST
    return lambda t, y: -kind.value[0][0] * y, lambda: kind.value[0].__setitem__(0, 2.0)


def bases():
    class Slow:
        rate = 1.0

    class Fast:
        rate = 2.0

    class Decay(Slow):
        def __call__(self, t, y):
            return -self.rate * y

    return Decay(), lambda: setattr(Decay, "__bases__", (Fast,))


def bases_of_a_module():
    class Slow(torch.nn.Module):
        rate = 1.0

    class Fast(torch.nn.Module):
        rate = 2.0

    class Decay(Slow):
        def forward(self, t, y):
            return -self.rate * y

    return Decay(), lambda: setattr(Decay, "__bases__", (Fast,))


def which_of_two_objects():
    slow, fast = object(), object()
    chosen = SimpleNamespace(kind=slow)
    return lambda t, y: -(1.0 if chosen.kind is slow else 2.0) * y, lambda: setattr(chosen, "kind", fast)


def what_was_missing():
    options = {}

    def fun(t, y):
        try:
            rate = options["rate"]
        except KeyError:
            rate = 1.0
        return -rate * y

    return fun, lambda: options.update(rate=2.0)


def an_attribute_that_was_missing():
    options = SimpleNamespace()

    def fun(t, y):
        try:
            rate = options.rate
        except AttributeError:
            rate = 1.0
        return -rate * y

    return fun, lambda: setattr(options, "rate", 2.0)


def a_module_that_is_imported_anew():
    def put(rate):
        module = sys.modules["_rates_of_a_test"] = ModuleType("_rates_of_a_test")
        module.rate = rate

    def fun(t, y):
        import _rates_of_a_test  # type: ignore[import-not-found]

        return -_rates_of_a_test.rate * y

    put(1.0)
    return fun, lambda: put(2.0)


def a_global_of_one_code():
    def made(rate):
        space = {"rate": rate, "__name__": __name__}
        exec("def fun(t, y):\n    return -rate.value * y", space)
        return space["fun"]

    slow, fast = made(SimpleNamespace(value=1.0)), made(SimpleNamespace(value=2.0))
    chosen = [slow]
    return lambda t, y: chosen[0](t, y), lambda: chosen.__setitem__(0, fast)


CASES = [
    of_a_function, of_a_wrapper, of_a_method, of_a_partial_function, of_a_tensor, of_a_parameter, of_a_member, in_a_member, bases,
    bases_of_a_module, which_of_two_objects, what_was_missing, an_attribute_that_was_missing, a_module_that_is_imported_anew,
    a_global_of_one_code,
]  # fmt: skip


@pytest.mark.parametrize("made", CASES)
def test_solves_follow(made):
    # at rest, where a factor of the state is seen only beside it, and in derivatives
    fun, change, start = *made(), 0.0

    def ends():
        y0 = torch.tensor([start], dtype=F64, requires_grad=True)
        sol = adjoint.solve_ivp(fun, (0.0, 1.0), y0, method="dopri5", rtol=1e-9, atol=1e-11, compile=True)
        return float(sol.y[-1]), float(torch.autograd.grad(sol.y[-1].sum(), y0)[0])

    slow, fast = ((start * math.exp(-rate), math.exp(-rate)) for rate in (1.0, 2.0))
    assert ends() == pytest.approx(slow, abs=1e-7)
    assert ends() == pytest.approx(slow, abs=1e-7)
    change()
    assert ends() == pytest.approx(fast, abs=1e-7)
    assert ends() == pytest.approx(fast, abs=1e-7)


class Keeping(torch.nn.Module):
    """What a call computes is kept: weights and a grid that are made once, the last activation, a buffer that is exchanged."""

    def __init__(self):
        super().__init__()
        self.grid, self.weights, self.last = None, None, None
        self.rate = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, t, y):
        if self.grid is None:
            self.grid = torch.linspace(0.2, 0.7, 2, dtype=F64)
        if self.weights is None:
            self.weights = 2 * self.rate.exp()
        self.last, self.calls = y * self.grid, self.calls + 1
        return -self.weights * self.last


def test_what_fun_keeps_is_what_it_computed():
    """The tracer writes what it found in place of the call onto the user's objects: later calls, and the user, read it there."""
    fun, y0 = Keeping(), torch.tensor([1.0, 0.5], dtype=F64)
    for _ in range(3):
        y = adjoint.solve_ivp(fun, (0.0, 1.0), y0, rtol=1e-10, atol=1e-12, compile=True).y[-1]
        fast = 2 * fun.rate.detach().exp() * fun.grid
        torch.testing.assert_close(y.detach(), y0 * torch.exp(-fast), rtol=1e-8, atol=1e-10)
        (found,) = torch.autograd.grad(y.sum(), fun.rate, retain_graph=True)
        torch.testing.assert_close(found, -fast * y.detach(), rtol=1e-7, atol=1e-9)
    assert fun.grid.tolist() == pytest.approx([0.2, 0.7])
    # before PyTorch 2.7 what is written is left to it
    assert 0 < float(fun.calls) < (100 if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks") else 3000)
    assert bool(((fun.last / fun.grid).detach().abs() <= 2).all())


@pytest.mark.filterwarnings("ignore:compile=True")
@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_iterations_of_spectral_norm_are_those_of_calls(method):
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 2, dtype=F64))
    for _ in range(60):
        layer(torch.ones(2, dtype=F64))  # until the norm has converged
    y0 = torch.tensor([0.5, -1.0], dtype=F64)
    found, want = (
        adjoint.solve_ivp(lambda t, y: layer(y), (0.0, 1.0), y0, method=method, compile=compiled).y[-1] for compiled in (True, False)
    )
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="PyTorch does not tell of hooks")
@pytest.mark.parametrize("door", ["solve_ivp", "solve_dae", "background", "stiff"])
def test_checkpoints_of_pytorch_see_the_same_calls(door):
    """`torch.utils.checkpoint` counts what is saved for backward, in the first solve of a function and in the same one again; at some
    solves of a function Jacobians are looked at."""
    p = torch.tensor(0.7, dtype=F64, requires_grad=True)
    y0 = torch.ones(2, dtype=F64)

    def end(p):
        if door == "solve_dae":
            fun = lambda t, y, yp, p: torch.stack([yp[0] + p * y[0], y[1] - y[0]])  # noqa: E731
            return adjoint.solve_dae(fun, (0.0, 1.0), y0, args=(p,), compile=True).y[-1, 1]
        options = {"compile": "background" if door == "background" else True, "method": "kvaerno5" if door == "stiff" else "tsit5"}
        return adjoint.solve_ivp(lambda t, y, p: -p * y, (0.0, 1.0), y0, args=(p,), **options).y[-1, 1]

    for _ in range(3):
        again = torch.utils.checkpoint.checkpoint(end, p, use_reentrant=False)
        (found,) = torch.autograd.grad(again, p)
        assert float(found) == pytest.approx(-math.exp(-0.7), abs=1e-5)
