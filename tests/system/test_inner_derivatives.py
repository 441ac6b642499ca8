"""Functions that take derivatives themselves (forces, divergences), by torch.func and by torch.autograd.grad, inside of solves."""

import math

import pytest
import torch
from torch.autograd import forward_ad

import adjoint
from adjoint import (
    Backprop,
    BacksolveAdjoint,
    CapturedTensorLost,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    UnsupportedCombination,
    solve_dae,
    solve_ivp,
    solve_root,
)

from ..helpers.custom_functions import OldProduct

# y' = -2 k y, y0 = 1, two components: sum of the state at 1, its first and second derivative in k
K = 1.3
VALUE, FIRST, SECOND = 2 * math.exp(-2 * K), -4 * math.exp(-2 * K), 8 * math.exp(-2 * K)
STRATEGIES = {
    "default": DiscreteAdjoint(keep_bytes=2**25),
    "discrete": DiscreteAdjoint(keep_bytes=0),
    "checkpoints": DiscreteAdjoint(checkpoints=3),
    "interpolating": InterpolatingAdjoint(),
    "gauss": GaussAdjoint(),
    "forward": ForwardSensitivity(),
    "backprop": Backprop(),
}


def energy(k, y):
    return (0.5 * k * y**2).sum()


# half of each right-hand side (but for the last ones) is a force, the other half written out: a force that is lost halves derivatives
FORCES = {
    "grad in the state": lambda k: lambda t, y: -torch.func.grad(energy, argnums=1)(k, y) - k * y,
    "grad in the parameter": lambda k: lambda t, y: -torch.func.grad(lambda p: 0.5 * p**2)(k) * y - k * y,
    "vjp": lambda k: lambda t, y: -torch.func.vjp(energy, k, y)[1](torch.ones(()))[1] - k * y,
    "jvp in the parameter": lambda k: lambda t, y: -torch.func.jvp(lambda p: 0.5 * p**2 * y, (k,), (torch.ones(()),))[1] - k * y,
    "vmapped grad": lambda k: lambda t, y: -torch.vmap(torch.func.grad(energy, argnums=1), in_dims=(None, 0))(k, y) - k * y,
    "hessian": lambda k: lambda t, y: -torch.func.hessian(energy, argnums=1)(k, y) @ y - k * y,
}


def asked(create_graph, enable, require):
    """The same force by `torch.autograd.grad`, with and without what makes it differentiable."""

    def right_hand_side(k):
        def force(y):
            if require:
                y.requires_grad_(True)
            return torch.autograd.grad(energy(k, y), y, create_graph=create_graph)[0]

        def fun(t, y):
            if not enable:
                return -force(y) - k * y
            with torch.enable_grad():
                return -force(y) - k * y

        return fun

    return right_hand_side


FORCES |= {
    "autograd.grad": asked(True, True, True),
    "autograd.grad, no graph": asked(False, True, True),
    "autograd.grad, gradients as they are": asked(True, False, False),
}


def end(fun, gradient=None, method="tsit5", y0=None):
    y0 = torch.ones(2) if y0 is None else y0
    return solve_ivp(fun, (0.0, 1.0), y0, rtol=1e-4, atol=1e-6, gradient=gradient, method=method).y[-1].sum()


def close(x, truth, rtol=2e-3):
    return float(x.detach()) == pytest.approx(truth, rel=rtol)


@pytest.mark.parametrize("force", FORCES)
def test_forces_are_differentiated_to_the_second_order(force):
    fun, gradient = FORCES[force], DiscreteAdjoint(keep_bytes=0)
    k, y0 = torch.tensor(K, requires_grad=True), torch.ones(2, requires_grad=True)
    first, at_start = torch.autograd.grad(end(fun(k), gradient, y0=y0), (k, y0))
    assert close(first, FIRST) and close(at_start.sum(), VALUE)
    first, at_start = torch.autograd.grad(end(fun(k), gradient, y0=y0), (k, y0), create_graph=True)
    assert close(first, FIRST) and close(at_start.sum(), VALUE)
    assert close(torch.autograd.grad(first, k)[0], SECOND)


QUICK = ("grad in the parameter", "autograd.grad, no graph")


@pytest.mark.parametrize("force", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORCES])
def test_forces_under_transforms(force):
    fun, k = FORCES[force], torch.tensor(K)
    value = lambda k: end(fun(k))  # noqa: E731
    assert close(torch.func.grad(value)(k), FIRST)
    assert close(torch.func.jvp(value, (k,), (torch.ones(()),))[1], FIRST)
    assert close(torch.func.jvp(torch.func.grad(value), (k,), (torch.ones(()),))[1], SECOND)
    if "autograd.grad" in force:
        with pytest.raises(UnsupportedCombination, match=r"torch\.func\.grad"):
            torch.vmap(value)(k.expand(2))
        return
    assert close(torch.vmap(torch.func.grad(value))(torch.tensor([0.5, K]))[1], FIRST)
    if force not in ("jvp in the parameter", "hessian"):  # forward mode in forward mode, which PyTorch does not have at plain dual levels
        with forward_ad.dual_level():
            assert close(forward_ad.unpack_dual(value(forward_ad.make_dual(k, torch.ones(())))).tangent, FIRST)


@pytest.mark.parametrize("force", ["grad in the parameter", "autograd.grad, no graph"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_sees_the_force(strategy, force):
    k = torch.tensor(K, requires_grad=True)
    value = end(FORCES[force](k), STRATEGIES[strategy])
    value.backward(retain_graph=True)
    assert close(k.grad, FIRST)
    first = torch.autograd.grad(value, k, create_graph=True)[0]
    assert close(first, FIRST) and close(torch.autograd.grad(first, k)[0], SECOND)


def test_backsolve_sees_the_force():
    k = torch.tensor(K, requires_grad=True)
    end(FORCES["grad in the state"](k), BacksolveAdjoint()).backward()
    assert close(k.grad, FIRST)


@pytest.mark.parametrize("method", ["kvaerno5", *(pytest.param(m, marks=pytest.mark.slow) for m in ("rodas5p", "radau5", "bdf"))])
def test_forces_in_implicit_methods(method):
    k = torch.tensor(K, requires_grad=True)
    for force in ("grad in the state", "autograd.grad"):
        first = torch.autograd.grad(end(FORCES[force](k), method=method), k, create_graph=True)[0]
        # bdf: to the error of the solution
        assert close(first, FIRST, 1e-2) and close(torch.autograd.grad(first, k)[0], SECOND, 3e-2)
        end(FORCES[force](k), method=method).backward()
        assert close(k.grad, FIRST, 1e-2)
        k.grad = None
    assert close(torch.func.grad(lambda p: end(FORCES["grad in the state"](p), method=method))(torch.tensor(K)), FIRST, 1e-2)


def test_forces_in_the_other_doors():
    k, fun = torch.tensor(K, requires_grad=True), FORCES["grad in the state"]
    times = torch.tensor([0.0, 1.0])
    for run in (
        lambda k: adjoint.odeint(fun(k), torch.ones(2), times, rtol=1e-4, atol=1e-6)[-1].sum(),
        lambda k: solve_dae(lambda t, y, yp: yp - fun(k)(t, y), (0.0, 1.0), torch.ones(2), rtol=1e-4, atol=1e-6).y[-1].sum(),
        lambda k: solve_root(lambda x: torch.func.grad(lambda p: 0.5 * p**2)(k) * x - 1.0, torch.ones(2)).x.sum() * 0.5 * K**2 * -FIRST,
    ):
        first = torch.autograd.grad(run(k), k, create_graph=True)[0]
        assert close(first, FIRST)
        assert close(torch.func.grad(run)(torch.tensor(K)), FIRST)


class Hamiltonian(torch.nn.Module):
    """A pendulum-like field from an energy with learned weights; ``written``: the same by hand."""

    def __init__(self, written):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(torch.randn(3, 2, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(3, generator=generator))
        self.written = written

    def forward(self, t, y):
        if self.written:
            slope = (self.b * (1 - torch.tanh(self.a @ y) ** 2)) @ self.a
        else:
            slope = torch.func.grad(lambda a, b, y: torch.tanh(a @ y) @ b, argnums=2)(self.a, self.b, y)
        return torch.stack([slope[1], -slope[0]])


@pytest.mark.slow
def test_a_module_with_an_energy():
    got = []
    for written in (True, False):
        net, y0 = Hamiltonian(written), torch.tensor([0.4, -0.3])

        def loss(parameters, net=net, y0=y0):
            call = lambda t, y: torch.func.functional_call(net, parameters, (t, y))  # noqa: E731
            return solve_ivp(call, (0.0, 2.0), y0, rtol=1e-5, atol=1e-7).y[-1].square().sum()

        gradients = torch.autograd.grad(solve_ivp(net, (0.0, 2.0), y0, rtol=1e-5, atol=1e-7).y[-1].square().sum(), list(net.parameters()))
        second = torch.func.hessian(loss)(dict(net.named_parameters()))
        got.append([*gradients, *(second[i][j] for i in ("a", "b") for j in ("a", "b"))])
    for a, b in zip(*got, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_the_divergence_of_a_flow():
    # d log p / dt = -trace of the Jacobian: for y' = A y it is -trace A, whatever the state
    a = torch.tensor([[0.3, -1.0], [0.8, -0.7]], requires_grad=True)

    def fun(t, state):
        y, _ = state
        return a @ y, -torch.trace(torch.func.jacrev(lambda a, y: a @ y, argnums=1)(a, y)).reshape(1)

    for gradient in (None, DiscreteAdjoint(keep_bytes=0)):
        _, logp = solve_ivp(fun, (0.0, 1.0), (torch.ones(2), torch.zeros(1)), gradient=gradient).y
        got = torch.autograd.grad(logp[-1].sum(), a, create_graph=True)[0]
        assert torch.allclose(got, -torch.eye(2), atol=1e-10)


def test_custom_functions_and_a_backward_inside():
    k = torch.tensor(K, requires_grad=True)
    fun = lambda t, y: -OldProduct.apply(k.expand_as(y), y) - k * y  # noqa: E731
    gradient = DiscreteAdjoint(keep_bytes=0)
    assert close(torch.autograd.grad(end(fun, gradient), k)[0], FIRST)
    first = [torch.autograd.grad(end(f, gradient), k, create_graph=True)[0] for f in (fun, lambda t, y: -2 * k * y)]
    torch.testing.assert_close(*(torch.autograd.grad(x, k)[0] for x in first), rtol=1e-9, atol=1e-12)

    def into_grad(t, y):
        y.requires_grad_(True)
        energy(k, y).backward()
        return -y.grad

    with pytest.raises(UnsupportedCombination, match=r"torch\.autograd\.grad"):
        end(into_grad)


@pytest.mark.parametrize("kind", ["tensor", "module"])
@pytest.mark.parametrize("strategy", ["discrete", "checkpoints", "forward", "backsolve", "interpolating"])
def test_a_captured_tensor_first_met_late_is_never_lost(strategy, kind):
    a, y0 = torch.tensor(0.7, requires_grad=True), torch.ones(1, requires_grad=True)
    net = torch.nn.Linear(1, 1, bias=False)
    rate = (lambda y: a * y) if kind == "tensor" else net
    gradient = {**STRATEGIES, "backsolve": BacksolveAdjoint()}[strategy]
    with pytest.raises(CapturedTensorLost, match="args="):
        solve_ivp(lambda t, y: -2 * rate(y) if float(t) > 0.5 else -2 * y, (0.0, 1.0), y0, gradient=gradient).y[-1].sum().backward()


def test_a_captured_tensor_first_met_late_and_derivatives_of_derivatives():
    a, y0 = torch.tensor(0.7, requires_grad=True), torch.ones(1, requires_grad=True)
    fun = lambda t, y: -2 * a * y**2 if float(t) > 0.5 else -2 * y**2  # noqa: E731
    value = solve_ivp(fun, (0.0, 1.0), y0, gradient=DiscreteAdjoint(keep_bytes=0)).y[-1].sum()
    with pytest.raises(CapturedTensorLost, match="args="):
        torch.autograd.grad(value, y0, create_graph=True)
    with pytest.raises(CapturedTensorLost, match="args="):
        torch.func.jvp(lambda y: solve_ivp(fun, (0.0, 1.0), y, gradient=DiscreteAdjoint(keep_bytes=0)).y[-1], (y0,), (y0,))


@pytest.mark.parametrize("strategy", ["default", pytest.param("discrete", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["tsit5", pytest.param("kvaerno5", marks=pytest.mark.slow)])
def test_shooting(method, strategy):
    # y'' = -y, y(0) = 0, y(pi / 2) = p: the slope at 0 is p. With y(pi / 2)^3 = p it is the cube root
    def shoot(p):
        def miss(s, p):
            y0 = torch.stack([0 * s, s])
            y = solve_ivp(lambda t, y: torch.stack([y[1], -y[0]]), (0.0, math.pi / 2), y0, method=method, gradient=STRATEGIES[strategy]).y
            return y[-1, 0] ** 3 - p

        return solve_root(miss, torch.tensor(1.2), (p,)).x

    p = torch.tensor(2.0, requires_grad=True)
    x = shoot(p)
    x.backward()
    first, second = 2 ** (-2 / 3) / 3, -2 * 2 ** (-5 / 3) / 9
    assert close(x, 2 ** (1 / 3)) and close(p.grad, first)
    q = torch.tensor(2.0)
    assert close(torch.func.grad(shoot)(q), first)
    assert close(torch.func.jvp(shoot, (q,), (torch.ones(()),))[1], first)
    if method == "tsit5":
        assert close(torch.func.grad(torch.func.grad(shoot))(q), second)
        assert close(torch.func.hessian(shoot)(q), second)
        assert close(torch.vmap(torch.func.grad(shoot))(torch.tensor([1.0, 2.0]))[1], first)


def test_a_periodic_orbit():
    # y'' = -w^2 y - w^2 y^3 (Duffing), at rest at amplitude a: the period is 4 / (w sqrt(1 + a^2)) times the complete elliptic integral
    # of the first kind with parameter m = a^2 / (2 (1 + a^2)), so its derivative in w is -period / w
    from scipy.special import ellipk

    amplitude, w0 = 1.0, 1.7
    period = 4 / (w0 * math.sqrt(1 + amplitude**2)) * float(ellipk(amplitude**2 / (2 * (1 + amplitude**2))))

    def quarter(w):
        def fun(t, y, w, end):
            return torch.stack([y[1], -(w**2) * (y[0] + y[0] ** 3)]) * end

        def miss(end, w):
            return solve_ivp(fun, (0.0, 1.0), torch.tensor([amplitude, 0.0]), args=(w, end), rtol=1e-6, atol=1e-8).y[-1, 0]

        return 4 * solve_root(miss, torch.tensor(0.6), (w,)).x

    w = torch.tensor(w0)
    assert close(quarter(w), period, 1e-4)
    assert close(torch.func.grad(quarter)(w), -period / w0, 1e-3)
    assert close(torch.func.hessian(quarter)(w), 2 * period / w0**2, 1e-2)


@pytest.mark.parametrize("strategy", [DiscreteAdjoint(), DiscreteAdjoint(keep_bytes=0), Backprop()], ids=repr)
def test_derivatives_in_a_parameter_are_taken_by_torch_func(strategy):
    # y' = -d/dk (k^2 y / 2): through autograd.grad the steps before would count too, as y depends on k
    k = torch.tensor(0.7, requires_grad=True)

    def end(rate):
        return solve_ivp(lambda t, y: -rate(y), (0.0, 1.0), torch.ones(1), rtol=1e-7, atol=1e-9, gradient=strategy).y[-1].sum()

    with pytest.raises(UnsupportedCombination, match="in a parameter"):
        end(lambda y: torch.autograd.grad((0.5 * k**2 * y).sum(), k, create_graph=True)[0] * y / y.detach().sum()).backward()
    slope = torch.autograd.grad(end(lambda y: torch.func.grad(lambda q: (0.5 * q**2 * y).sum())(k) * torch.ones(1)), k)[0]
    assert close(slope, -math.exp(-0.7), 1e-5)


def guarded(k):
    """A rate that takes a derivative in ``k`` itself where ``k`` requires grad; ``k y`` in both branches."""

    def fun(t, y):
        if k.requires_grad:
            return -2 * y * torch.autograd.grad((0.5 * k**2 * y).sum() / y.detach().sum(), k, create_graph=True)[0]
        return -2 * k * y

    return fun


class Guarded(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = torch.nn.Parameter(k, requires_grad=False)

    def forward(self, t, y):
        return guarded(self.k)(t, y)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_a_function_that_asks_if_a_parameter_requires_grad_takes_one_way_throughout(method):
    k, one = torch.tensor(K), torch.ones(())
    value = lambda k: end(guarded(k), method=method)  # noqa: E731
    assert close(torch.func.jvp(value, (k,), (one,))[1], FIRST)
    with forward_ad.dual_level():
        assert close(forward_ad.unpack_dual(value(forward_ad.make_dual(k, one))).tangent, FIRST)
    module = Guarded(k)
    swapped = lambda k: end(lambda t, y: torch.func.functional_call(module, {"k": k}, (t, y)), method=method)  # noqa: E731
    assert close(torch.func.jvp(swapped, (k,), (one,))[1], FIRST)
    for ask in (lambda: torch.func.grad(value)(k), lambda: value(k.clone().requires_grad_(True)).backward()):
        with pytest.raises(UnsupportedCombination, match="in a parameter"):
            ask()
    # as an argument it may be another tensor in every call: refused, not taken for the one of the solve
    passed = lambda k: solve_ivp(lambda t, y, p: guarded(p)(t, y), (0.0, 1.0), torch.ones(2), args=(k,), method=method).y[-1].sum()  # noqa: E731
    with pytest.raises(UnsupportedCombination, match="in a parameter"):
        torch.func.jvp(passed, (k,), (one,))


@pytest.mark.parametrize(("method", "gradient"), [("tsit5", DiscreteAdjoint(keep_bytes=0)), ("kvaerno5", None)])
@pytest.mark.parametrize("variable", ["time", "copy", pytest.param("state where it does not", marks=pytest.mark.slow)])
def test_what_a_function_differentiates_by_may_be_its_own(variable, method, gradient):
    def right_hand_side(k):
        def fun(t, y):
            if variable == "time":
                t.requires_grad_()
                return -k * y - y * torch.autograd.grad(k * t, t, create_graph=True)[0]
            if variable == "copy":
                x = y.detach().clone().requires_grad_()
                return -2 * k * y - y * (torch.autograd.grad((k * x**2).sum(), x, create_graph=True)[0] - 2 * k * x)
            x = y if y.requires_grad else y.detach().requires_grad_()
            return -k * y - torch.autograd.grad(energy(k, x), x, create_graph=True)[0]

        return fun

    value = lambda k: end(right_hand_side(k), gradient, method)  # noqa: E731
    k = torch.tensor(K, requires_grad=True)
    first = torch.autograd.grad(value(k), k, create_graph=True)[0]
    assert close(first, FIRST) and close(torch.autograd.grad(first, k)[0], SECOND)
    assert close(torch.func.grad(value)(torch.tensor(K)), FIRST)
    assert close(torch.func.jvp(value, (torch.tensor(K),), (torch.ones(()),))[1], FIRST)
    with torch.no_grad(), pytest.raises(UnsupportedCombination, match="enable_grad"):
        end(lambda t, y: -2 * torch.autograd.grad(energy(K, y), y)[0])


@pytest.mark.parametrize("where", ["parameter", "state", "root"])
def test_linearize_is_refused(where):
    k = torch.tensor(K, requires_grad=True)
    pushed = {
        "parameter": lambda y: torch.func.linearize(lambda p: 0.5 * p**2 * y, k)[1](torch.ones(())),
        "state": lambda y: torch.func.linearize(lambda x: 0.5 * k * x**2, y)[1](torch.ones_like(y)),
    }
    root = lambda: solve_root(lambda x: pushed["state"](x) - 1, torch.ones(2))  # noqa: E731
    ask = root if where == "root" else lambda: end(lambda t, y: -2 * pushed[where](y))
    with pytest.raises(UnsupportedCombination, match=r"torch\.func\.jvp"):
        ask()


@pytest.mark.parametrize("mode", ["grad", "jvp"])
@pytest.mark.parametrize("given", ["captured", "argument"])
@pytest.mark.parametrize("inner", ["root", pytest.param("solve", marks=pytest.mark.slow)])
@pytest.mark.slow_cases("root-argument-jvp", "root-captured-grad")
def test_a_solve_in_the_function_of_another_one_is_differentiated(inner, given, mode):
    # the inner root is 2 k y, the end of the inner solve exp(-2 k)
    def fun(k):
        args = (k,) if given == "argument" else ()
        root = lambda y: solve_root(lambda x, *a: x - 2 * (a or (k,))[0] * y, torch.zeros(2), args=args).x  # noqa: E731
        rate = lambda: solve_ivp(lambda s, x, *a: -2 * (a or (k,))[0] * x, (0.0, 1.0), torch.ones(1), args=args).y[-1].log()  # noqa: E731
        return lambda t, y: -root(y) if inner == "root" else rate() * y

    value, k = lambda k: end(fun(k), method="bosh3"), torch.tensor(K)
    found = torch.func.grad(value)(k) if mode == "grad" else torch.func.jvp(value, (k,), (torch.ones(()),))[1]
    assert close(found, FIRST, 5e-3)


def cubic(x):
    return 2 * x**3 + x - 0.1 * x.roll(1, -1) - 1


@pytest.mark.parametrize(
    "solve",
    [
        lambda x0: solve_root(cubic, x0).x,
        lambda x0: solve_root(lambda x: x - 0.1 * cubic(x), x0, method="anderson").x,
        lambda x0: solve_root(cubic, x0.repeat(2, 1), batched=True).x,
        lambda x0: solve_root(cubic, x0.repeat(20)).x,
        lambda x0: solve_dae(lambda t, y, yp: torch.stack([yp[0] + cubic(y)[0], cubic(y)[1] - yp[0]]), (0.0, 1.0), x0).y[-1],
        lambda x0: solve_ivp(lambda t, y: -1e3 * cubic(y), (0.0, 1.0), x0, method="bdf").y[-1],
        lambda x0: adjoint.odeint(
            lambda t, y: -cubic(y), x0, torch.tensor([0.0, 1.0]), method="implicit_midpoint", options={"step_size": 0.5}
        ),
    ],
    ids=["root", "fixed point", "roots", "sparse root", "dae", "stiff", "grid"],
)
def test_jacobians_in_inference_mode(solve):
    """Nothing is recorded there, so that plain autograd would give zeros: singular equations, and iterations that stall."""
    x0 = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        want = solve(x0)
    with torch.inference_mode():
        found = solve(x0.clone())
    assert torch.allclose(found, want, rtol=1e-9)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        y0, k = torch.ones(1), torch.tensor(1.3)
    found = solve_dae(lambda t, y, yp: yp + 1.3 * y, (0.0, 1.0), y0, method="radau", rtol=1e-4).y[-1]
    assert close(found, math.exp(-1.3))
    with pytest.raises(UnsupportedCombination, match="inference_mode"):
        solve_root(lambda x: 1 - k * x, torch.ones(1))


@pytest.mark.parametrize("method", ["rodas3p", "rodas5p", "kvaerno5", "radau5"])
@pytest.mark.parametrize("batched", [False, True])
def test_slopes_in_time_where_nobody_takes_derivatives(method, batched):
    """y' = -k y + cos t, whose first part is the slope of an energy that fun lets by itself require grad."""

    def fun(t, y):
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_()
            return -torch.autograd.grad(energy(K, x), x, create_graph=True)[0] + torch.cos(t).unsqueeze(-1)

    y0 = torch.full((2, 1) if batched else (1,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        end = solve_ivp(fun, (0.0, 2.0), y0, method=method, batched=batched, rtol=1e-8, atol=1e-10).y[-1]
    forced = lambda t: (K * math.cos(t) + math.sin(t)) / (K**2 + 1)  # noqa: E731
    want = forced(2.0) + (0.5 - forced(0.0)) * math.exp(-K * 2)
    torch.testing.assert_close(end, torch.full_like(end, want), rtol=1e-6, atol=0.0)
