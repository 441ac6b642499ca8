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
