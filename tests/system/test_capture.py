"""Everything that fun depends on gets its gradient, however it got there; nothing else breaks."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from adjoint import Backprop, CapturedTensorLost, DiscreteAdjoint, solve_ivp

pytestmark = pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
ONE = torch.ones(1, dtype=torch.float64)
GLOBAL = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)


def _end(fun, args=(), gradient=None, **options):
    return solve_ivp(fun, (0.0, 1.0), ONE, args, rtol=1e-9, atol=1e-9, gradient=gradient, **options).y[-1].sum()


class _Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7))
        self.unused = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, t, y):
        return -self.w * y + self.shift


def _ways(w):
    module = _Decay()
    module.w = torch.nn.Parameter(w.detach().clone())
    holder = {"deep": [w]}
    return {
        "args": (lambda t, y, w: -w * y, (w,), w),
        "args pytree": (lambda t, y, q: -q["a"][0] * y, ({"a": [w], "n": 3},), w),
        "closure leaf": (lambda t, y: -w * y, (), w),
        "container": (lambda t, y: -holder["deep"][0] * y, (), w),
        "partial": (functools.partial(lambda w, t, y: -w * y, w), (), w),
        "module": (module, (), module.w),
        "module in closure": (lambda t, y: module(t, y), (), module.w),
        "bound method": (module.forward, (), module.w),
        "global": (lambda t, y: -GLOBAL * y, (), GLOBAL),
        "inside cat": (lambda t, y: -torch.cat([w.reshape(1), w.reshape(1)]).mean() * y, (), w),
        "as it is": (lambda t, y: -w.to(y) * y, (), w),
        "as it is, twice": (lambda t, y: -(0.5 * w.contiguous() + 0.5 * w.double()) * y, (), w),
        "as it is, and returned so": (lambda t, y: -w.reshape(1).flatten().to(y).contiguous() * y, (), w),
        "twice": (lambda t, y, a, b: -(0.5 * a + 0.5 * b) * y, (w, w), w),
        "args and closure": (lambda t, y, a: -(0.5 * a + 0.5 * w) * y, (w,), w),
    }


@pytest.mark.parametrize("way", sorted(_ways(GLOBAL)))
def test_every_way(way, gradient):
    w = torch.tensor(0.7, requires_grad=True)
    fun, args, target = _ways(w)[way]
    first = torch.autograd.grad(_end(fun, args, gradient), target, create_graph=True)[0]
    assert float(first) == pytest.approx(-float(torch.exp(-w.detach())), rel=1e-7)
    second = torch.autograd.grad(first, target)[0]
    assert float(second) == pytest.approx(float(torch.exp(-w.detach())), rel=1e-6)


def test_non_leaf(gradient):
    """A captured tensor that was computed: the gradient goes on to what it was computed from."""
    base = torch.tensor(0.35, requires_grad=True)
    w = 2 * base
    first = torch.autograd.grad(_end(lambda t, y: -w * y, (), gradient), base, create_graph=True)[0]
    assert float(first) == pytest.approx(-2 * float(torch.exp(-w.detach())), rel=1e-7)
    assert float(torch.autograd.grad(first, base)[0]) == pytest.approx(4 * float(torch.exp(-w.detach())), rel=1e-6)


def test_unused_and_frozen(gradient):
    """Unused parameters get no gradient, frozen and integer arguments are left alone."""
    module = _Decay()
    frozen, count = torch.tensor(1.0), torch.tensor(2)

    def fun(t, y, frozen, count, text):
        assert text == "keep"
        return module(t, y) * frozen * count / 2

    value = _end(fun, (frozen, count, "keep"), gradient)
    got = torch.autograd.grad(value, [module.w, module.unused], allow_unused=True)
    assert float(got[0]) == pytest.approx(-float(torch.exp(torch.tensor(-0.7))), rel=1e-7)
    assert got[1] is None or float(got[1]) == 0.0
    assert not frozen.requires_grad


def test_backward_accumulates_into_grad(gradient):
    module = _Decay()
    for _ in range(2):
        _end(module, (), gradient).backward()
    assert float(module.w.grad) == pytest.approx(-2 * float(torch.exp(torch.tensor(-0.7))), rel=1e-7)


def test_several_backward_passes(gradient):
    w = torch.tensor(0.7, requires_grad=True)
    value = _end(lambda t, y: -w * y, (), gradient)
    grads = [torch.autograd.grad(value, w, retain_graph=True)[0] for _ in range(3)]
    assert grads[0] == grads[1] == grads[2]


def test_no_grad_and_inference(gradient):
    w = torch.tensor(0.7, requires_grad=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not _end(lambda t, y: -w * y, (), gradient).requires_grad


def test_fun_without_any_derivative(gradient):
    """Constant right-hand sides: the gradient in the state is the identity."""
    y0 = torch.ones(3, requires_grad=True)
    y = solve_ivp(lambda t, y: torch.ones(3), (0.0, 1.0), y0, gradient=gradient).y[-1]
    assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.ones(3))


def test_a_tensor_that_appears_later(gradient):
    """Used only after t = 0.5: found by neither strategy at the start. Right with Backprop, an error (never silence) with the adjoint."""
    w = torch.tensor(0.7, requires_grad=True)
    q = torch.tensor(1.0, requires_grad=True)

    def fun(t, y):
        return -q * y if t < 0.5 else -w * y

    value = _end(fun, (), gradient, step_ts=[0.5])
    if isinstance(gradient, Backprop):
        got = torch.autograd.grad(value, w)[0]
        assert float(got) == pytest.approx(-0.5 * float(value.detach()), rel=1e-6)
    else:
        with pytest.raises(CapturedTensorLost, match="args="):
            torch.autograd.grad(value, q)


def test_autocast_does_not_leak_in(gradient):
    """Lower precision of the surroundings is not imposed on a solve."""
    net = torch.nn.Linear(2, 2).float()
    y0 = torch.ones(2, dtype=torch.float32)
    plain = solve_ivp(lambda t, y: net(y), (0.0, 1.0), y0, gradient=gradient).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = solve_ivp(lambda t, y: net(y), (0.0, 1.0), y0, gradient=gradient).y
    assert cast.dtype == torch.float32
    assert torch.allclose(plain, cast)


def test_second_thread(gradient):
    """Backward passes run on threads of their own: no state is kept between or beside solves."""
    import concurrent.futures

    def work(value):
        w = torch.tensor(value, requires_grad=True)
        return float(torch.autograd.grad(_end(lambda t, y: -w * y, (), gradient), w)[0])

    values = [0.1 * i for i in range(1, 9)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, values))
    assert got == pytest.approx([-float(torch.exp(torch.tensor(-v))) for v in values], rel=1e-7)


@pytest.mark.parametrize("make", [lambda raw: raw + 0.0, lambda raw: raw.exp()], ids=["no buffers", "buffers"])
@pytest.mark.parametrize("way", ["module cache", "args", "closure"])
def test_a_tensor_computed_from_another_input_counts_once(gradient, make, way):
    """A cached weight next to the parameter it was made from: each path of the derivative is taken once."""
    module = _Decay()
    raw = module.w
    made = make(raw)
    if way == "module cache":
        module.forward = lambda t, y: -made * raw * y
        end = _end(module, gradient=gradient)
    elif way == "args":
        end = _end(lambda t, y, a, b: -b * a * y, (raw, made), gradient=gradient)
    else:
        end = _end(lambda t, y: -made * raw * y, gradient=gradient)
    (g,) = torch.autograd.grad(end, raw)
    fresh = raw.detach().clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(torch.exp(-make(fresh) * fresh), fresh)
    torch.testing.assert_close(g, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("batched", [False, True])
def test_fun_that_differentiates(gradient, batched):
    """A Hamiltonian network takes a gradient inside of fun; the energy is conserved, and parameters get their derivatives."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def fun(t, y):
        with torch.enable_grad():
            y = y.requires_grad_(True)
            slope = torch.autograd.grad(net(y).sum(), y, create_graph=True)[0]
        return torch.stack([slope[..., 1], -slope[..., 0]], -1)

    y0 = torch.randn(3, 2)
    sol = solve_ivp(fun, (0.0, 1.0), y0, gradient=gradient, batched=batched, rtol=1e-10, atol=1e-10)
    assert torch.allclose(net(sol.y[0]), net(sol.y[1]), atol=1e-9)
    weight = net[0].weight
    (got,) = torch.autograd.grad(sol.y[-1].square().sum(), weight)
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
            ends.append(solve_ivp(fun, (0.0, 1.0), y0, batched=batched, rtol=1e-10, atol=1e-10).y[-1].square().sum())
            weight[0, 0] -= sign * step
    assert float(got[0, 0]) == pytest.approx(float((ends[0] - ends[1]) / (2 * step)), rel=1e-5)
    assert not y0.requires_grad


ORDERS = {
    "reverse twice": lambda f, p: torch.func.grad(torch.func.grad(f))(p),
    "forward over reverse": lambda f, p: torch.func.jvp(torch.func.grad(f), (p,), (torch.ones_like(p),))[1],
    "forward twice": lambda f, p: torch.func.jacfwd(torch.func.jacfwd(f))(p),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["tsit5", "trbdf2"])
@pytest.mark.slow_cases("trbdf2-forward twice-backprop", "trbdf2-reverse twice-discrete")
def test_masks_and_indices_made_within_a_transform(method, gradient, order):
    """They wear its wrapper, though nothing is differentiated in them: ``fun``, which runs below it, is given others in their place."""

    def loss(p):
        index, mask = torch.tensor([1, 0]), torch.tensor([True, False])
        rate = lambda t, y: -torch.stack([p, 2 * p])[index] * y * torch.where(mask & (t < 9.0), 1.0, 0.5)  # noqa: E731
        y0 = torch.ones(2, dtype=torch.float64)
        return solve_ivp(rate, (0.0, 1.0), y0, method=method, gradient=gradient, rtol=1e-4).y[-1].sum()

    # y = exp(-2 p t), exp(-p t / 2)
    p = torch.tensor(0.7, dtype=torch.float64)
    true = 4 * math.exp(-1.4) + 0.25 * math.exp(-0.35)
    assert float(ORDERS[order](loss, p)) == pytest.approx(true, rel=2e-2)


def test_mapped_indices_are_captured(gradient):
    table = torch.tensor([[1.0, 2.0], [0.5, 1.5]], dtype=torch.float64)
    y0 = torch.ones(2, dtype=torch.float64)
    solve = lambda i: solve_ivp(lambda t, y: -table[i.reshape(1)][0] * y, (0.0, 1.0), y0, gradient=gradient).y[-1]  # noqa: E731
    assert torch.allclose(torch.vmap(solve)(torch.arange(2)), torch.exp(-table), rtol=1e-5)
