"""Tensors of a transform that fun meets after the start of the span: an error, as without transforms, and no derivative of zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from adjoint import Backprop, CapturedTensorLost, DiscreteAdjoint, UnsupportedCombination, solve_ivp

W = torch.tensor(1.3, dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


def end(w, known=1.0, **options):
    """y' = -known y, from the middle on -w known y."""

    class Late:
        def __init__(self):
            self.held = {"w": [w]}

        def __call__(self, t, y):
            return -known * y if float(t) < 0.5 else -known * y * self.held["w"][0]

    return solve_ivp(Late(), (0.0, 1.0), torch.ones(2, dtype=torch.float64), rtol=1e-4, **options).y[-1].sum()


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(W),
    "jvp": lambda f: torch.func.jvp(f, (W,), (ONE,)),
    "vmap": lambda f: torch.vmap(f)(W.repeat(2)),
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f))(W.repeat(2)),
    "jvp of grad": lambda f: torch.func.jvp(torch.func.grad(f), (W,), (ONE,)),
}


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "bdf"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_is_named(transform, method):
    with pytest.raises(CapturedTensorLost):
        TRANSFORMS[transform](lambda w: end(w, method=method))


@pytest.mark.parametrize("known", [1.0, W])
def test_is_named_in_forward_mode(known):
    with forward_ad.dual_level():
        known = known if known is not W else forward_ad.make_dual(W.clone(), ONE)
        w = forward_ad.make_dual(W.clone(), ONE)
        with pytest.raises(CapturedTensorLost):
            end(w, known)


def test_plain_differentiation_sees_it():
    """It goes through the steps where they are, at the level of the transform."""
    got = torch.func.grad(lambda w: end(w, gradient=Backprop(), method="rk4", first_step=0.05))(W)
    # y(1) = exp(-0.5 - 0.5 w), twice; steps meet the middle, where a stage sees the other side
    assert float(got) == pytest.approx(-float(torch.exp(-0.5 - 0.5 * W)), rel=0.1)


def test_what_is_in_reach_but_not_used_is_no_matter():
    def of(w):
        def fun(t, y):
            return -y if float(t) < 2.0 else -y * w

        return (w * solve_ivp(fun, (0.0, 1.0), torch.ones(2, dtype=torch.float64)).y[-1]).sum()

    assert float(torch.func.grad(of)(W)) == pytest.approx(2 / 2.718281828, rel=1e-4)


@pytest.mark.parametrize(
    "method, derivative",
    [
        ("rodas5p", lambda f: torch.func.grad(f)(W)),
        ("kvaerno5", lambda f: torch.func.jvp(f, (W,), (ONE,))),
        ("tsit5", lambda f: torch.autograd.grad(f(w := W.clone().requires_grad_()), w)),
    ],
)
def test_functions_that_write_into_a_buffer_of_theirs(method, derivative):
    """Forward, and on the way back: where the derivative cannot be had, an error that says how to write it."""

    def of(w, **options):
        buffer = torch.empty(2, dtype=torch.float64)

        def fun(t, y):
            buffer[:] = -w * y
            return buffer

        y0 = torch.ones(2, dtype=torch.float64)
        return solve_ivp(fun, (0.0, 1.0), y0, method=method, gradient=DiscreteAdjoint(keep_bytes=0), rtol=1e-3).y[-1].sum()

    with pytest.raises((UnsupportedCombination, CapturedTensorLost)):
        derivative(of)
