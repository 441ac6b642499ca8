"""What a function of Python depends on, found in its code; and solves that go by it."""

from __future__ import annotations

import functools
import math
import random
import threading
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import adjoint
from adjoint.native.fingerprint import fingerprint

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]
F64 = torch.float64


def solve(fun, y0, span=(0.0, 2.0)):
    return adjoint.solve_ivp(fun, span, y0, method="dopri5", rtol=1e-9, compile=True)


def twice(fun):
    """The end of ``exp(-k t)`` at 1, from the general way and from the short one if there is one."""
    return [float(solve(fun, torch.ones(1, dtype=F64), (0.0, 1.0)).y[-1]) for _ in range(2)]


class _Own:
    rate = 1.0


class _Sly:
    def __getattr__(self, name):
        return 1.0


own, sly = _Own(), _Sly()
calls = []


def matching(t, y):
    match own:
        case _Own(rate=k):
            return -k * y
    return y


def counting(t, y):
    calls.append(1)
    return -y


@pytest.mark.parametrize(
    "fun",
    [
        lambda t, y: -getattr(own, "".join("rate")) * y,
        lambda t, y: print(y) or -y,
        lambda t, y: -y * torch.rand(1),
        lambda t, y: -y if y.requires_grad else y,
        lambda t, y: -y * float(torch.ones(1).item()),
        counting,
        lambda t, y: -sly.rate * y,
        lambda t, y: -own.__getattribute__("rate") * y,
        matching,
        lambda t, y: -math.fsum([1.0]) * torch.as_tensor(random.random()) * y,
    ],
)
def test_none(fun):
    assert fingerprint(fun) is None


def test_objects():
    @dataclass(frozen=True)
    class Rates:
        k: float
        w: torch.Tensor

        @property
        def both(self):
            return self.k * self.w

        def of(self, y):
            return self.both * y

    class Pair(NamedTuple):
        a: float
        b: torch.Tensor

        def times(self, y):
            return self.a * self.b * y

    class Plain:
        factor = 2.0

        def __init__(self, k):
            self.k = k

        def __call__(self, t, y):
            return -self.scaled() * y

        def scaled(self):
            return self.k * self.factor * own.rate

    w = torch.ones(1, dtype=F64)

    def ends(fun):
        return [float(solve(fun, torch.ones(1, dtype=F64)).y[-1]) for _ in range(2)]

    for k in (1.0, 0.5):
        rates, pair, plain = Rates(k, w), Pair(k, w), Plain(k / 2)
        for fun in (lambda t, y, r=rates: -r.of(y), lambda t, y, r=pair: -r.times(y), plain, plain.__call__):
            assert fingerprint(fun) is not None
            assert ends(fun) == pytest.approx([math.exp(-2 * k)] * 2, rel=1e-7)
    own.rate = 0.5
    assert ends(plain) == pytest.approx([math.exp(-0.5)] * 2, rel=1e-7)
    own.rate = 1.0
    Plain.factor = 4.0
    assert ends(plain) == pytest.approx([math.exp(-2)] * 2, rel=1e-7)
    Plain.scaled = lambda self: 3.0
    assert ends(plain) == pytest.approx([math.exp(-6)] * 2, rel=1e-7)


def test_what_is_named_of_an_object():
    """A runner with much that a right-hand side has nothing to do with."""

    class Runner:
        def __init__(self, k):
            self.case = SimpleNamespace(k=k, data=np.zeros(100_000))
            self.lock, self.solve = threading.Lock(), adjoint.solve_ivp

        def fun(self, t, y):
            return -self.case.k * y

    for k in (1.0, 2.0):
        runner = Runner(k)
        assert fingerprint(runner.fun) is not None
        ends = [float(solve(runner.fun, torch.ones(1, dtype=F64)).y[-1]) for _ in range(2)]
        runner.case.k = 0.5
        ends.append(float(solve(runner.fun, torch.ones(1, dtype=F64)).y[-1]))
        runner.case = SimpleNamespace(k=1.5)
        ends.append(float(solve(runner.fun, torch.ones(1, dtype=F64)).y[-1]))
        assert ends == pytest.approx([math.exp(-2 * k)] * 2 + [math.exp(-1), math.exp(-3)], rel=1e-7)


def test_which_object_has_it():
    """One of two objects has a number of its own, the other one that of their class."""

    class Part:
        k = 2.0

    keys, ends = [], []
    for own in (0, 1):
        parts = Part(), Part()
        parts[own].k = 1.0

        def fun(t, y, parts=parts):
            return -(parts[0].k + 3 * parts[1].k) * y

        keys.append(fingerprint(fun).key)
        ends += [float(solve(fun, torch.ones(1, dtype=F64), (0.0, 0.5)).y[-1]) for _ in range(2)]
    assert keys[0] != keys[1]
    assert ends == pytest.approx([math.exp(-3.5)] * 2 + [math.exp(-2.5)] * 2, rel=1e-7)


def test_which_global_it_is():
    def made(space):
        return FunctionType(compile("lambda t, y: max(y, 1) + min(y, 1)", "<text>", "eval").co_consts[0], space)

    other = lambda x, k: k * x  # noqa: E731
    assert fingerprint(made({"max": other})).key != fingerprint(made({"min": other})).key


def test_a_function_that_a_layer_holds():
    def layer(k):
        return nn.TransformerEncoderLayer(4, 1, 4, activation=lambda x: k * x)

    keys = [fingerprint(layer(k)) for k in (1.0, 2.0)]
    assert None in keys or keys[0].key != keys[1].key


def test_hooks():
    net = nn.Linear(2, 2)
    assert fingerprint(net) is not None
    net.register_forward_hook(lambda *_: None)
    assert fingerprint(net) is None


def test_equal_functions():
    def made(k, w):
        return lambda t, y: -k * w * y

    w = torch.ones(2, dtype=torch.float32)
    keys = [fingerprint(made(*x)).key for x in ((1.0, w), (1.0, w + 1), (1, w), (2.0, w), (1.0, w.double()), (-0.0, w), (0.0, w))]
    assert keys[0] == keys[1] and len(set(keys)) == 6


def test_which_tensors_are_one():
    def fun(t, y, a, b):
        return a * y + b

    x, z = torch.ones(2), torch.ones(2)
    assert fingerprint(fun, (x, x)).key != fingerprint(fun, (x, z)).key


def test_functions_that_call_each_other():
    def even(n, y):
        return y if n == 0 else odd(n - 1, y)

    def odd(n, y):
        return -y if n == 0 else even(n - 1, y)

    assert fingerprint(lambda t, y: even(3, y)) is not None


def test_slices():
    part, other = slice(0, 1), slice(1, None)
    keys = [fingerprint(lambda t, y, s=s: -y[s]).key for s in (part, other)]
    assert hash(keys[0]) and keys[0] != keys[1]
    assert twice(lambda t, y: -y[part]) == pytest.approx([math.exp(-1)] * 2, rel=1e-7)


def test_wrappers_around_functions_of_pytorch():
    """One that goes by the name of PyTorch's own is not one of its own."""
    rates = [1.0]

    @functools.wraps(nn.functional.softmax)
    def disguised(x):
        return -rates[0] * x

    mapped = torch.vmap(lambda x: -rates[0] * x)
    for rate in (1.0, 2.0):
        rates[0] = rate
        for inner in (disguised, mapped):
            assert twice(lambda t, y, f=inner: f(y)) == pytest.approx([math.exp(-rate)] * 2, rel=1e-7)


def test_names_of_parts_that_are_no_tuple():
    class Listed:
        _fields = ("k",)

    listed = Listed()
    for rate in (1.0, 2.0):
        listed.k = rate
        assert twice(lambda t, y: -listed.k * y) == pytest.approx([math.exp(-rate)] * 2, rel=1e-7)


def test_a_function_inside_that_writes():
    def made():
        count = 0

        def fun(t, y):
            def one_more():
                nonlocal count
                count += 1

            one_more()
            return -y

        return fun

    assert fingerprint(made()) is None
