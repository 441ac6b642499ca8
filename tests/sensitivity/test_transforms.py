"""Every torch.func transform, forward mode, double backward and their nestings, for every strategy and kind of input."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from adjoint import Backprop, DiscreteAdjoint, solve_ivp

from ..helpers.problems import ALL, driven, options

STRATEGIES = [DiscreteAdjoint(), Backprop()]
IDS = ["discrete", "backprop"]
pytestmark = pytest.mark.parametrize("gradient", STRATEGIES, ids=IDS)

Y0 = torch.tensor([0.5, -1.0], dtype=torch.float64)
P = torch.tensor([0.9, 1.3], dtype=torch.float64)
TIMES = torch.tensor([0.25, 0.6, 1.0], dtype=torch.float64)
#: what is compared goes by the same steps, however few they are
LOOSE = functools.partial(options, rtol=1e-3, atol=1e-5)


def _loss(gradient, method="dopri5", **more):
    def loss(p, y0=Y0, times=TIMES, end=1.0):
        return solve_ivp(driven, (0.0, end), y0, (p,), t_eval=times, gradient=gradient, **{**LOOSE(method), **more}).y.sin().sum()

    return loss


def _reference_gradient(loss, p):
    q = p.clone().requires_grad_()
    return torch.autograd.grad(loss(q), q)[0]


@pytest.mark.parametrize("method", ALL)
@pytest.mark.slow_cases("kvaerno3-backprop", "rodas4-discrete")
def test_first_order(gradient, method):
    loss = _loss(gradient, method)
    want = _reference_gradient(loss, P)
    for got in (grad(loss)(P), jacrev(loss)(P), jacfwd(loss)(P), vjp(loss, P)[1](torch.tensor(1.0))[0]):
        assert torch.allclose(got, want, rtol=1e-10)
    direction = torch.tensor([0.3, -2.0])
    value, tangent = jvp(loss, (P,), (direction,))
    assert torch.allclose(value, loss(P))
    assert torch.allclose(tangent, want @ direction, rtol=1e-10)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(P, direction))
        assert torch.allclose(forward_ad.unpack_dual(dual).tangent, want @ direction, rtol=1e-10)


@pytest.mark.parametrize("outer, inner", list(itertools.product([jacfwd, jacrev], repeat=2)))
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_second_order_in_every_nesting(gradient, method, outer, inner):
    loss = _loss(gradient, method)
    want = torch.autograd.functional.hessian(loss, P)
    assert torch.allclose(outer(inner(loss))(P), want, rtol=1e-9, atol=1e-11)


@pytest.mark.slow_cases("backprop")
def test_third_order(gradient):
    loss = _loss(gradient, "rk4", first_step=0.25)
    want = jacfwd(jacfwd(jacfwd(loss)))(P)
    for outer, middle, inner in ((jacfwd, jacfwd, jacrev), (jacrev, jacfwd, jacrev), (jacfwd, jacrev, jacfwd), (jacrev, jacrev, jacrev)):
        assert torch.allclose(outer(middle(inner(loss)))(P), want, rtol=1e-8, atol=1e-10)


def test_forward_over_reverse_hessian_vector_product(gradient):
    loss, v = _loss(gradient), torch.tensor([1.0, 2.0])
    product = jvp(grad(loss), (P,), (v,))[1]
    assert torch.allclose(product, hessian(loss)(P) @ v, rtol=1e-9)


@pytest.mark.parametrize("over", ["p", "y0", "times", "end", "p, y0, times, end"])
@pytest.mark.parametrize("transform", ["value", "grad", "jvp", "hessian"])
@pytest.mark.slow_cases(
    "hessian-p-discrete", "hessian-y0-discrete", "hessian-times-discrete", "hessian-end-discrete", "hessian-p-backprop",
    "hessian-y0-backprop", "hessian-times-backprop", "hessian-end-backprop", "hessian-p, y0, times, end-discrete",
)  # fmt: skip
def test_vmap_is_a_loop_of_single_solves(gradient, over, transform):
    """Over parameters, states, sample times and ends, together and alone, with derivatives inside."""
    n = 2
    scale = torch.linspace(0.9, 1.1, n).unsqueeze(-1)
    full = {"p": P * scale, "y0": Y0 * scale, "times": TIMES * scale.min() * scale / scale.max(), "end": torch.linspace(1.0, 1.2, n)}
    names = over.split(", ")
    # sizes of steps differ by the rounding of controllers: results by so much of an error
    loss = _loss(gradient, rtol=1e-5, atol=1e-7)

    def evaluate(p, y0, times, end):
        def scalar(p):
            return loss(p, y0, times, end)

        if transform == "grad":
            return grad(scalar)(p)
        if transform == "jvp":
            return jvp(scalar, (p,), (torch.ones_like(p),))[1]
        return hessian(scalar)(p) if transform == "hessian" else scalar(p)

    alone = {"p": P, "y0": Y0, "times": TIMES, "end": torch.tensor(1.0)}
    arguments = [full[k] if k in names else alone[k] for k in alone]
    got = vmap(evaluate, in_dims=tuple(0 if k in names else None for k in alone))(*arguments)
    want = torch.stack([evaluate(*(full[k][i] if k in names else alone[k] for k in alone)) for i in range(n)])
    assert torch.allclose(got, want, rtol=1e-7, atol=1e-10)


def test_vmap_of_a_batched_solve(gradient):
    y0, p = torch.randn(3, 4, 2), torch.rand(3, 4, 2)

    def solve(y0, p):
        return solve_ivp(driven, (0.0, 1.0), y0, (p,), batched=True, t_eval=TIMES, gradient=gradient).y

    got = vmap(solve)(y0, p)
    assert torch.allclose(got, torch.stack([solve(*x) for x in zip(y0, p, strict=True)]), rtol=1e-9)
    twice = vmap(vmap(lambda y, q: solve_ivp(driven, (0.0, 1.0), y, (q,), t_eval=TIMES, gradient=gradient).y))(y0, p)
    assert torch.allclose(twice.movedim(1, 2), got, rtol=1e-9)


def test_backward_through_vmap(gradient):
    """Plain reverse mode outside of a vmapped solve."""
    p = (P + torch.rand(4, 2)).requires_grad_()
    loss = _loss(gradient)
    got = torch.autograd.grad(vmap(loss)(p).square().sum(), p)[0]
    want = torch.autograd.grad(torch.stack([loss(q) for q in p]).square().sum(), p)[0]
    assert torch.allclose(got, want, rtol=1e-8)


def test_per_sample_gradients_of_a_module(gradient):
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    parameters = dict(net.named_parameters())
    y0 = torch.randn(3, 2)

    def loss(parameters, y):
        def fun(t, x):
            return functional_call(net, parameters, (x,))

        return solve_ivp(fun, (0.0, 1.0), y, gradient=gradient).y[-1].square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, y0)
    for i in range(3):
        value = solve_ivp(lambda t, x: net(x), (0.0, 1.0), y0[i], gradient=gradient).y[-1].square().sum()
        for name, g in zip(parameters, torch.autograd.grad(value, list(net.parameters())), strict=True):
            assert torch.allclose(got[name][i], g, rtol=1e-7, atol=1e-10)


@pytest.mark.slow_cases("backprop")
def test_captured_tensors_under_transforms(gradient):
    """A closure over the transformed tensor: nothing is passed, and nothing may be lost."""

    def end(w):
        options = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10, "gradient": gradient}
        return solve_ivp(lambda t, y: -w * y, (0.0, 1.0), torch.ones(1), **options).y[-1, 0]

    w = torch.tensor(1.3)
    exact = torch.exp(-w)
    assert float(grad(end)(w)) == pytest.approx(-float(exact), rel=1e-8)
    assert float(jvp(end, (w,), (torch.tensor(1.0),))[1]) == pytest.approx(-float(exact), rel=1e-8)
    for second in (grad(grad(end)), jacfwd(grad(end)), jacfwd(jacfwd(end)), grad(jacfwd(end))):
        assert float(second(w)) == pytest.approx(float(exact), rel=1e-7)
    ws = torch.tensor([0.5, 1.3])
    assert torch.allclose(vmap(end)(ws), torch.exp(-ws), rtol=1e-8)
    assert torch.allclose(vmap(hessian(end))(ws), torch.exp(-ws), rtol=1e-7)
    leaf = w.clone().requires_grad_()
    assert float(torch.autograd.grad(grad(end)(leaf), leaf)[0]) == pytest.approx(float(exact), rel=1e-7)


def test_quadrature_and_dense_output_under_transforms(gradient):
    def values(p):
        sol = solve_ivp(
            driven, (0.0, 1.0), Y0, (p,), quadrature=lambda t, y, p: (y**2).sum() * p[0], dense_output=True, gradient=gradient, rtol=1e-4
        )
        return torch.stack([sol.quadrature, sol(torch.tensor(0.4)).sum()])

    q = P.clone().requires_grad_()
    want = torch.stack([torch.autograd.grad(v, q, retain_graph=True)[0] for v in values(q)])
    assert torch.allclose(jacrev(values)(P), want, rtol=1e-8)
    assert torch.allclose(jacfwd(values)(P), want, rtol=1e-8)
    assert torch.allclose(jacfwd(jacrev(values))(P), jacrev(jacfwd(values))(P), rtol=1e-8)


@pytest.mark.parametrize("method", ["tsit5", pytest.param("rodas5p", marks=pytest.mark.slow), pytest.param("bdf", marks=pytest.mark.slow)])
def test_forward_mode_through_a_gradient_is_a_second_sweep_of_plain_steps(method, gradient):
    """Along parameter, first state, end of the span and sample times at once; ``fun`` runs on plain tensors but where the solve begins."""
    seen = []

    def loss(p, y0, end):
        def fun(t, y):
            seen.append(torch._C._functorch.is_functorch_wrapped_tensor(y))
            return -p * y**2

        # y = y0 / (1 + p y0 t)
        span, times = torch.stack([0.0 * end, end]), torch.stack([0.5 * end, end])
        return solve_ivp(fun, span, y0, t_eval=times, method=method, gradient=gradient, rtol=1e-8, atol=1e-10).y.square().sum()

    def exact(p, y0, end):
        return sum((y0 / (1 + p * y0 * t)).square().sum() for t in (0.5 * end, end))

    z = torch.tensor(1.3, dtype=torch.float64), torch.tensor([1.0, 0.7], dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    v = torch.tensor(0.4, dtype=torch.float64), torch.tensor([-0.3, 1.0], dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    found = jvp(grad(loss, argnums=(0, 1, 2)), z, v)
    wanted = jvp(grad(exact, argnums=(0, 1, 2)), z, v)
    for a, b in zip(itertools.chain(*found), itertools.chain(*wanted), strict=True):
        # second derivatives in times are those of the interpolant
        assert torch.allclose(a, b, rtol=1e-2 if method == "bdf" else 1e-3, atol=1e-4), (a, b)
    # beside the look at the start and one for tensors that fun meets late, once a step
    assert isinstance(gradient, Backprop) or method != "tsit5" or sum(seen) <= 0.1 * len(seen)
    # a third derivative goes through the same node
    third = grad(lambda p: jvp(grad(lambda q: loss(q, *z[1:])), (p,), (v[0],))[1])(z[0])
    true = grad(lambda p: jvp(grad(lambda q: exact(q, *z[1:])), (p,), (v[0],))[1])(z[0])
    assert torch.allclose(third, true, rtol=2e-2 if method == "bdf" else 1e-4)


@pytest.mark.parametrize("method", ["trapezoid", "trbdf2", "kvaerno3"])
def test_forward_mode_through_a_gradient_sees_the_slopes_that_steps_hand_on(method, gradient):
    """A step of these methods begins with the last slope of the step before: a second way from one to the next beside the state."""
    ends = torch.tensor([1.0, 0.4], dtype=torch.float64)

    def loss(p):
        more = {"method": method, "gradient": gradient, "step_ts": [0.3], "batched": True, "rtol": 1e-3}
        return solve_ivp(lambda t, y: -p * y**2, (0.0, ends), Y0.abs().unsqueeze(-1), **more).y[-1].sum()

    found = jvp(grad(loss), (P[0],), (torch.ones_like(P[0]),))[1]
    assert torch.allclose(found, grad(grad(loss))(P[0]), rtol=1e-10)
    # y = y0 / (1 + p y0 t)
    y0 = Y0.abs()
    assert torch.allclose(found, (2 * y0**3 * ends**2 / (1 + P[0] * y0 * ends) ** 3).sum(), rtol=0.05)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
def test_second_order_in_times_by_bdf(gradient, outer):
    """Its table is brought to other step sizes by products of which factors are zero: forward mode twice had twice the derivative."""

    def loss(end):
        y0 = torch.ones(1, dtype=torch.float64)
        return solve_ivp(lambda t, y: -y * y, (0.0, end), y0, method="bdf", gradient=gradient, rtol=1e-4, atol=1e-6).y[-1, 0]

    end = torch.tensor(0.6, dtype=torch.float64)
    # y = 1 / (1 + t)
    assert float(outer(jacfwd(loss))(end)) == pytest.approx(2 / 1.6**3, rel=0.05)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "many"])
def test_many_cotangents_at_once(gradient, method, batched):
    """``is_grads_batched=True``, which is how ``torch.autograd.functional.jacobian(vectorize=True)`` asks."""
    y0, p, times = Y0.clone().requires_grad_(), P.clone().requires_grad_(), TIMES.clone().requires_grad_()
    state = torch.stack([y0, 2 * y0]) if batched else y0
    more = {**LOOSE(method), "gradient": gradient, "batched": batched}
    y = solve_ivp(driven, (0.0, 1.0), state, (p,), t_eval=times, **more).y[1].reshape(-1)
    bars = torch.eye(y.numel(), dtype=y.dtype)
    found = torch.autograd.grad(y, [y0, p, times], bars, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, [y0, p, times], bar, retain_graph=True) for bar in bars]
    for name, x, rows in zip(("y0", "p", "times"), found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(rows), rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
