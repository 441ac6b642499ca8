"""What PyTorch shows to no mode: custom functions, TorchScript, hooks of modules. Tensors that they capture have their derivatives, or it
is said why not."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

import adjoint

from ..helpers.custom_functions import OldProduct

START = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, bar):
        a, b = ctx.saved_tensors
        return bar * b, bar * a

    @staticmethod
    def jvp(ctx, a_dot, b_dot):
        a, b = ctx.saved_tensors
        return a_dot * b + a * b_dot


# taken from the class once, as many do
early = Product.apply


@torch.jit.script
def scripted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b


PRODUCTS = {"new": lambda a, b: Product.apply(a, b), "early": early, "old": OldProduct.apply}
SOLVES = {
    "tsit5": {},
    "discrete": {"gradient": adjoint.DiscreteAdjoint(keep_bytes=0)},
    "rodas5p": {"method": "rodas5p"},
    "kvaerno5": {"method": "kvaerno5"},
    "bdf": {"method": "bdf"},
    "interpolating": {"gradient": adjoint.InterpolatingAdjoint()},
    "forward": {"gradient": adjoint.ForwardSensitivity()},
    "compiled": {"compile": True},
    "dae": None,
    "root": None,
}


def end(name, product, rate, scale):
    fun = lambda t, y: -scale * product(rate, y)  # noqa: E731
    if name == "dae":
        return adjoint.solve_dae(lambda t, y, yp: yp - fun(t, y), (0.0, 1.0), START).y[-1]
    if name == "root":
        return adjoint.solve_root(lambda x: fun(0.0, x) + START, START).x
    return adjoint.solve_ivp(fun, (0.0, 1.0), START, **SOLVES[name]).y[-1]


def derivatives(name, product, computed, order):
    base, scale = torch.tensor([0.7, 0.2, 1.1], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = end(name, product, base * 1.0 if computed else base, scale)
    found = torch.autograd.grad(y.sum(), (base, scale), create_graph=order == 2)
    return torch.autograd.grad(found[0].sum(), (base, scale)) if order == 2 else found


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", SOLVES)
def test_custom_functions(name, product, computed):
    if product == "old" and name == "forward":
        pytest.skip("PyTorch: functions with a context in forward are for no transform")
    want = derivatives(name, torch.mul, computed, 1)
    torch.testing.assert_close(derivatives(name, PRODUCTS[product], computed, 1), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", ["tsit5", "discrete", "rodas5p", "root"])
def test_second_derivatives(name, product):
    if product == "old" and name == "rodas5p":
        pytest.skip("PyTorch: functions with a context in forward are for no transform")
    want = derivatives(name, torch.mul, False, 2)
    torch.testing.assert_close(derivatives(name, PRODUCTS[product], False, 2), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["tsit5", "discrete", "rodas5p", "kvaerno5", "bdf", "interpolating"])
def test_torchscript(name):
    torch.testing.assert_close(derivatives(name, scripted, False, 1), derivatives(name, torch.mul, False, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward", "dae", "root"])
def test_torchscript_where_tensors_are_replaced(name):
    with pytest.raises(adjoint.UnsupportedCombination, match="fun is TorchScript or an extension"):
        derivatives(name, scripted, False, 1)


@pytest.mark.parametrize("door", ["layer", "branch"])
def test_torchscript_that_no_search_finds(door):
    """In a function that an object holds: what hides its operators is known by its results."""
    rate = torch.tensor([0.7, 0.2, 1.1], requires_grad=True)
    fun = lambda x, s: 0.3 * scripted(rate, x) - x + s  # noqa: E731
    layer = adjoint.nn.DEQ(lambda z, x: fun(z, x) + z)
    branch = lambda: adjoint.continuation(fun, START, (0.2, 0.4)).root(1).x  # noqa: E731
    solve = branch if door == "branch" else lambda: layer(START.unsqueeze(0))
    with pytest.raises(adjoint.UnsupportedCombination, match="fun is TorchScript or an extension"):
        solve().sum().backward()


def test_a_module_in_torchscript():
    class Decay(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor([0.7, 0.2, 1.1], dtype=torch.float64))

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -self.rate * y

    module = torch.jit.script(Decay())
    adjoint.solve_ivp(module, (0.0, 1.0), START, rtol=1e-9, atol=1e-12).y[-1].sum().backward()
    torch.testing.assert_close(module.rate.grad, -torch.exp(-module.rate.detach()) * START)


def test_hooks_of_modules():
    net, heard = torch.nn.Linear(3, 3).double(), []
    want = torch.autograd.grad(adjoint.solve_ivp(lambda t, y: net(y), (0.0, 1.0), START).y[-1].sum(), list(net.parameters()))
    net.register_full_backward_hook(lambda *a: heard.append(1))
    found = torch.autograd.grad(adjoint.solve_ivp(lambda t, y: net(y), (0.0, 1.0), START).y[-1].sum(), list(net.parameters()))
    assert heard
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "kvaerno5", "bdf"])
def test_checkpoints_inside(method):
    """Operators that are made again serve one way back, and Jacobians are taken by many at a time. PyTorch 2.6 makes them for each."""
    rate = torch.tensor([0.7, 0.2, 1.1], requires_grad=True)
    plain = lambda t, y: -torch.tanh(rate * y)  # noqa: E731
    fun = lambda t, y: torch.utils.checkpoint.checkpoint(plain, t, y, use_reentrant=False)  # noqa: E731
    slope = lambda f: torch.autograd.grad(adjoint.solve_ivp(f, (0.0, 1.0), START, method=method).y[-1].sum(), rate)[0]  # noqa: E731
    try:
        found = slope(fun)
    except adjoint.UnsupportedCombination as error:
        assert method != "tsit5"
        assert "fun calls torch.utils.checkpoint" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, slope(plain))


def test_tracers_of_graphs_are_refused():
    with pytest.raises(adjoint.UnsupportedCombination, match=r"take torch\.func\.jvp in the place of linearize"):
        torch.func.linearize(lambda y: adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), y).y[-1], START)
    with pytest.raises(adjoint.UnsupportedCombination, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda y: adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), y).y[-1], (START.detach(),))
    with pytest.raises(adjoint.UnsupportedCombination, match=r"torch\.export"):
        torch.export.export(adjoint.nn.NeuralODE(torch.nn.Tanh()), (START.detach(),), strict=False)
