"""The deep-equilibrium layer, against explicit linear solves and plain iteration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adjoint import solve_root
from adjoint.errors import InvalidInput, RootError, SingularJacobian, UnsupportedCombination
from adjoint.linalg import DenseLU
from adjoint.nn import DEQ

SOLVERS = ["anderson", "broyden", "fixed_point", "newton"]
LINEAR = ["lu", "gmres", "bicgstab", "anderson", "broyden", "fixed_point"]
TIGHT = dict(tol=1e-12, backward_tol=1e-12)


def _matrix(n: int, norm: float) -> torch.Tensor:
    W = torch.randn(n, n)
    return norm * W / torch.linalg.matrix_norm(W, 2)


class Cell(nn.Module):
    """``tanh(W z + U x + b)``."""

    def __init__(self, n: int = 4, m: int = 3, norm: float = 0.7) -> None:
        super().__init__()
        self.W = nn.Parameter(_matrix(n, norm))
        self.U = nn.Linear(m, n)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ self.W.T + self.U(x))


def _iterate(module, x, z):
    """The fixed point by brute force; with autograd it is the derivative of 200 passes, which is that of the fixed point."""
    for _ in range(200):
        z = module(z, x)
    return z


def _affine(W, U, b, x):
    """The fixed point of ``W z + U x + b``, by one explicit solve."""
    return torch.linalg.solve(torch.eye(len(W)) - W, (x @ U.T + b).T).T


@pytest.mark.parametrize("linear_solver", LINEAR)
@pytest.mark.parametrize("solver", SOLVERS)
def test_fixed_point_and_gradients_of_an_affine_module(solver, linear_solver):
    W, U, b = _matrix(4, 0.7), torch.randn(4, 3), torch.randn(4)
    x, bar = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4)
    tensors = [t.requires_grad_() for t in (W, U, b)]  # captured by the function below
    layer = DEQ(lambda z, x: z @ W.T + x @ U.T + b, solver=solver, linear_solver=linear_solver, state_shape=(4,), **TIGHT)
    z, want = layer(x), _affine(W, U, b, x)
    assert torch.allclose(z, want, atol=1e-10)
    got = torch.autograd.grad((z * bar).sum(), [x, *tensors], create_graph=True)
    true = torch.autograd.grad((want * bar).sum(), [x, *tensors], create_graph=True)
    for g, t in zip(got, true, strict=True):
        assert torch.allclose(g, t, rtol=1e-8, atol=1e-9)
    again = torch.autograd.grad(sum(g.square().sum() for g in got), [x, *tensors])
    for g, t in zip(again, torch.autograd.grad(sum(g.square().sum() for g in true), [x, *tensors]), strict=True):
        assert torch.allclose(g, t, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_gradients_of_a_network_are_those_of_endless_iteration(linear_solver):
    cell, x = Cell(), torch.randn(6, 3, requires_grad=True)
    layer = DEQ(cell, linear_solver=linear_solver, state_shape=(4,), **TIGHT)
    z, want = layer(x), _iterate(cell, x, torch.zeros(6, 4))
    assert torch.allclose(z, want, atol=1e-10)
    wanted = [x, *cell.parameters()]
    for g, t in zip(torch.autograd.grad(z.square().sum(), wanted), torch.autograd.grad(want.square().sum(), wanted), strict=True):
        assert torch.allclose(g, t, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("linear_solver", ["lu", "gmres", "anderson"])
def test_gradcheck_to_second_order(linear_solver):
    cell = Cell(n=3, m=2)
    layer = DEQ(cell, linear_solver=linear_solver, state_shape=(3,), tol=1e-13, backward_tol=1e-13)

    def solve(x, W):
        return torch.func.functional_call(layer, {"module.W": W}, (x,))

    inputs = (torch.randn(2, 2, requires_grad=True), cell.W.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-5)


def test_transforms():
    cell, x = Cell(n=3, m=2), torch.randn(4, 2)
    layer = DEQ(cell, linear_solver="lu", state_shape=(3,), **TIGHT)
    J = torch.func.jacrev(layer)(x)
    z = layer(x).detach()
    slope = 1 - z.square()
    for i in range(4):
        # dz/dx = (I - D W)^-1 D U with D = diag(1 - z^2)
        truth = torch.linalg.solve(torch.eye(3) - slope[i, :, None] * cell.W, slope[i, :, None] * cell.U.weight)
        assert torch.allclose(J[i, :, i], truth, atol=1e-9)
        assert J[i, :, torch.arange(4) != i].abs().max() == 0
    assert torch.allclose(torch.func.jacfwd(layer)(x), J, atol=1e-9)
    several = torch.randn(3, 4, 2)
    assert torch.allclose(torch.vmap(layer)(several), torch.stack([layer(s) for s in several]), atol=1e-9)
    parameters = dict(layer.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    true = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for g, t in zip(got.values(), true, strict=True):
        assert torch.allclose(g, t, atol=1e-10)


@pytest.mark.parametrize("linear_solver", ["lu", "gmres", "anderson"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_its_samples_one_by_one(solver, linear_solver):
    # samples whose convergence differs
    cell, x = Cell(norm=0.9), torch.randn(5, 3) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0]).unsqueeze(1)
    layer = DEQ(cell, solver=solver, linear_solver=linear_solver, state_shape=(4,), **TIGHT)
    x.requires_grad_()
    z = layer(x)
    steps = layer.stats.n_steps
    g = torch.autograd.grad(z.square().sum(), x)[0]
    for i in range(5):
        one = x[i : i + 1].detach().requires_grad_()
        alone = layer(one)
        assert torch.allclose(alone, z[i : i + 1], atol=1e-10)
        assert int(layer.stats.n_steps) == int(steps[i])
        assert torch.allclose(torch.autograd.grad(alone.square().sum(), one)[0], g[i : i + 1], atol=1e-9)
    assert int(steps.min()) < int(steps.max())


def test_large_states_are_solved_without_matrices():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight *= 0.8
    x = torch.randn(3, 2, 9, 9, requires_grad=True)
    layer = DEQ(lambda z, x: torch.tanh(conv(z) + x), **TIGHT)
    z = layer(x)
    assert layer.stats.n_factorizations <= 3  # an iterative solver may count its set-ups; 162 unknowns are not factorised densely
    want = _iterate(layer.module, x, torch.zeros_like(x))
    assert torch.allclose(z, want, atol=1e-10)
    wanted = [x, conv.weight, conv.bias]
    for g, t in zip(torch.autograd.grad(z.sum(), wanted), torch.autograd.grad(want.sum(), wanted), strict=True):
        assert torch.allclose(g, t, rtol=1e-7, atol=1e-8)
    assert layer.stats.log.n_iterations > 0


def test_pytrees():
    a = torch.tensor(0.4, requires_grad=True)

    def module(z, x):
        return {"u": a * torch.cos(z["v"]).mean(-1) + x["shift"], "v": 0.5 * torch.sin(z["u"]).unsqueeze(-1) * torch.ones(2)}

    z0 = {"u": torch.zeros(3, 2), "v": torch.zeros(3, 2, 2)}
    x = {"shift": torch.randn(3, 2, requires_grad=True), "label": 3}
    z = DEQ(module, **TIGHT)(x, z0)
    want = _iterate(module, x, z0)
    assert torch.allclose(z["u"], want["u"], atol=1e-10) and torch.allclose(z["v"], want["v"], atol=1e-10)
    got = torch.autograd.grad(z["v"].square().sum(), [a, x["shift"]])
    for g, t in zip(got, torch.autograd.grad(want["v"].square().sum(), [a, x["shift"]]), strict=True):
        assert torch.allclose(g, t, atol=1e-9)


def test_modules_that_couple_samples_are_one_system():
    x = torch.randn(4, 3, requires_grad=True)
    norm = nn.BatchNorm1d(3)
    W = _matrix(3, 0.4)

    def module(z, x):
        return torch.tanh(norm(z @ W.T + x))

    with pytest.raises(UnsupportedCombination, match="batched=False"):
        DEQ(module)(x)
    layer = DEQ(module, batched=False, linear_solver="gmres", **TIGHT)
    z, want = layer(x), _iterate(module, x, torch.zeros_like(x))
    assert torch.allclose(z, want, atol=1e-9)
    got, true = torch.autograd.grad(z.pow(3).sum(), x)[0], torch.autograd.grad(want.pow(3).sum(), x)[0]
    assert torch.allclose(got, true, atol=1e-8)
    norm.eval()  # fixed statistics: samples are independent
    assert torch.allclose(DEQ(module, **TIGHT)(x), _iterate(module, x, torch.zeros_like(x)), atol=1e-9)


def test_random_modules_are_refused_and_fixed_masks_are_not():
    drop, x = nn.Dropout(0.5), torch.randn(4, 3)
    layer = DEQ(lambda z, x: 0.5 * torch.tanh(drop(z) + x))
    with pytest.raises(UnsupportedCombination, match="dropout"):
        layer(x)
    with pytest.raises(UnsupportedCombination, match="dropout"):
        layer(x[:1])
    drop.eval()
    assert torch.isfinite(layer(x)).all()
    mask = torch.randint(0, 2, (4, 3))
    masked = DEQ(lambda z, x: 0.5 * torch.tanh(x[1] * z + x[0]), state_shape=(3,))
    z = masked((x, mask))
    assert torch.allclose(z, 0.5 * torch.tanh(mask * z + x), atol=1e-9)


def test_warm_start():
    cell, x = Cell(norm=0.9), torch.randn(5, 3)
    layer = DEQ(cell, state_shape=(4,), tol=1e-8)
    z = layer(x)
    cold = layer.stats.n_steps.sum()
    guess = layer.solution.x.requires_grad_()
    warm = layer(x + 1e-6, z0=guess)
    assert layer.stats.n_steps.sum() < cold / 2
    assert torch.allclose(warm, z, atol=1e-4)
    assert torch.autograd.grad(warm.sum(), guess, allow_unused=True)[0] is None


def test_jacobian_norm_is_unbiased_and_differentiable():
    cell, x = Cell(), torch.randn(3, 3)
    layer = DEQ(cell, state_shape=(4,))
    z = layer(x).detach()
    J = torch.vmap(torch.func.jacrev(cell))(z, x)
    true = J.square().sum((1, 2))
    mean = layer.jacobian_norm(z, x, samples=4000)
    assert mean.shape == (3,) and torch.allclose(mean, true, rtol=0.1)
    # one unknown: no randomness is left
    tiny = Cell(n=1, m=1)
    z, x = torch.randn(2, 1), torch.randn(2, 1)
    value = DEQ(tiny).jacobian_norm(z, x).sum()
    want = (tiny.W * (1 - tiny(z, x).square())).square().sum()
    assert torch.allclose(value, want)
    for g, t in zip(torch.autograd.grad(value, list(tiny.parameters())), torch.autograd.grad(want, list(tiny.parameters())), strict=True):
        assert torch.allclose(g, t)
    one, two = (layer.jacobian_norm(torch.zeros(3, 4), torch.zeros(3, 3), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    single = DEQ(cell, batched=False).jacobian_norm(torch.zeros(4), torch.zeros(3))
    assert single.shape == ()


@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point"])
def test_failures_of_the_fixed_point_are_told(solver):
    # no fixed point in the second sample: z = z + 1
    def module(z, x):
        return torch.where(x > 0, z + 1, 0.5 * z + 1)

    x = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    with pytest.raises(RootError):
        DEQ(module, solver=solver, max_steps=20)(x)
    layer = DEQ(module, solver=solver, max_steps=60, throw=False, tol=1e-8)
    z = layer(x)
    assert torch.allclose(z[0], torch.full((1,), 2.0), atol=1e-6) and torch.isnan(z[1]).all()
    assert layer.solution.status[0] == 0 and layer.solution.status[1] < 0
    assert not layer.solution.success[1]


@pytest.mark.parametrize("linear_solver", ["gmres", "bicgstab", "anderson", "broyden", "fixed_point"])
def test_failures_of_the_derivative_are_told(linear_solver):
    rotation = torch.linalg.qr(torch.randn(12, 12))[0]
    W = 0.99 * rotation  # a spectral radius next to one: two iterations are not enough
    x = torch.randn(3, 12, requires_grad=True)
    true = torch.linalg.solve(torch.eye(12) - W.T, torch.ones(12)).expand(3, 12)
    z0 = torch.linalg.solve(torch.eye(12) - W, x.detach().T).T  # no iteration on the way there
    layer = DEQ(lambda z, x: z @ W.T + x, linear_solver=linear_solver, backward_max_steps=2, backward_tol=1e-10)
    with pytest.raises(RootError, match="linear solver did not converge"):
        layer(x, z0).sum().backward()
    layer.throw = False
    assert torch.isnan(torch.autograd.grad(layer(x, z0).sum(), x)[0]).all()
    layer.backward_max_steps = 20_000
    assert torch.allclose(torch.autograd.grad(layer(x, z0).sum(), x)[0], true, rtol=1e-5, atol=1e-5)


def test_a_singular_jacobian_is_told():
    # z = z^2 - z + x with x = 1: the double root z = 1, where the derivative is infinite
    layer = DEQ(lambda z, x: z * z - z + x, solver="fixed_point", linear_solver=DenseLU())
    x = torch.ones(2, 1, requires_grad=True)
    z = layer(x, z0=torch.ones(2, 1))
    with pytest.raises(SingularJacobian, match="sample 0"):
        z.sum().backward()


def test_it_is_a_module():
    layer = DEQ(Cell(), state_shape=(4,), throw=False, max_steps=77, rtol=1e-9)
    assert layer.solution is None and layer.stats is None
    for piece in ("solver='anderson'", "max_steps=77", "state_shape=(4,)", "throw=False", "rtol=1e-09"):
        assert piece in repr(layer)
    x = torch.randn(2, 3)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.stats.n_solves > 0 and not layer.solution.x.requires_grad
    other = DEQ(Cell(), state_shape=(4,))
    other.load_state_dict(layer.state_dict())
    assert torch.allclose(other(x), layer(x))
    assert torch.allclose(copy.deepcopy(layer)(x), layer(x))


def test_parameters_that_are_swapped_in():
    cell, x = Cell(n=3, m=2), torch.randn(4, 2)
    layer = DEQ(cell, state_shape=(3,), **TIGHT)
    W = torch.randn(3, 3, requires_grad=True)
    small = 0.1 * W
    got = torch.autograd.grad(torch.func.functional_call(layer, {"module.W": small}, (x,)).square().sum(), W)[0]
    own = Cell(n=3, m=2)
    own.load_state_dict({**cell.state_dict(), "W": small.detach()})
    true = torch.autograd.grad(_iterate(own, x, torch.zeros(4, 3)).square().sum(), own.W)[0]
    assert torch.allclose(got, 0.1 * true, atol=1e-10)
    ensemble = {name: torch.stack([p.detach(), 0.5 * p.detach()]) for name, p in layer.named_parameters()}
    both = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(ensemble)
    assert torch.allclose(both[0], layer(x), atol=1e-10)


def test_complex_states():
    W, b = _matrix(3, 0.4) + 1j * _matrix(3, 0.3), torch.randn(3, dtype=torch.complex128)
    x = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    true = torch.linalg.solve(torch.eye(3) - W, (x + b).unsqueeze(-1)).squeeze(-1)
    wanted = torch.autograd.grad(true.abs().square().sum(), x)[0]
    for linear_solver in LINEAR:
        z = DEQ(lambda z, x: z @ W.T + x + b, linear_solver=linear_solver, **TIGHT)(x)
        assert torch.allclose(z, true, atol=1e-10)
        assert torch.allclose(torch.autograd.grad(z.abs().square().sum(), x)[0], wanted, atol=1e-9), linear_solver


def test_an_empty_batch():
    layer = DEQ(Cell(), state_shape=(4,))
    z = layer(torch.zeros(0, 3))
    assert z.shape == (0, 4)
    z.sum().backward()
    assert layer.module.W.grad.abs().max() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("linear_solver", LINEAR)
def test_on_cuda(linear_solver):
    cell, x = Cell(), torch.randn(5, 3)
    true = torch.autograd.grad(_iterate(cell, x, torch.zeros(5, 4)).square().sum(), list(cell.parameters()))
    layer = DEQ(cell, linear_solver=linear_solver, state_shape=(4,), **TIGHT).cuda()
    z = layer(x.cuda())
    assert z.is_cuda
    for g, t in zip(torch.autograd.grad(z.square().sum(), list(layer.parameters())), true, strict=True):
        assert torch.allclose(g.cpu(), t, atol=1e-9)


def test_single_precision():
    cell = Cell().float()
    layer = DEQ(cell, state_shape=(4,))
    x = torch.randn(4, 3, dtype=torch.float32, requires_grad=True)
    z = layer(x)
    assert z.dtype == torch.float32
    double = _iterate(copy.deepcopy(cell).double(), x.double(), torch.zeros(4, 4))
    assert torch.allclose(z.double(), double, atol=1e-4)
    got, true = torch.autograd.grad(z.sum(), x)[0], torch.autograd.grad(double.sum(), x)[0]
    assert torch.allclose(got, true.float(), atol=1e-4)


def test_bad_arguments():
    with pytest.raises(InvalidInput, match="callable"):
        DEQ(3)
    with pytest.raises(InvalidInput, match="method"):
        DEQ(Cell(), method="newton")
    with pytest.raises(InvalidInput, match="linear_solver 'qr'"):
        DEQ(Cell(), linear_solver="qr")
    with pytest.raises(InvalidInput, match="linear_solver"):
        DEQ(Cell(), linear_solver=3)
    with pytest.raises(InvalidInput, match="tol must be greater than zero"):
        DEQ(Cell(), tol=0.0)
    with pytest.raises(InvalidInput, match="newtron"):
        DEQ(Cell(), solver="newtron", state_shape=(4,))(torch.zeros(1, 3))
    with pytest.raises(InvalidInput, match="state_shape"):
        DEQ(Cell())({"a": torch.zeros(1, 3)})
    with pytest.raises(InvalidInput, match="z0"):
        DEQ(Cell(), state_shape=(4,))(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="samples"):
        DEQ(Cell()).jacobian_norm(torch.zeros(1, 4), torch.zeros(1, 3), samples=0)


def test_behind_half_precision_under_autocast():
    """What comes out of a layer there is single precision inside, as in `NeuralODE`, and autocast is off."""
    torch.manual_seed(0)
    first, inner = torch.nn.Linear(3, 3).float(), torch.nn.Linear(3, 3).float()
    deq = DEQ(lambda z, x: torch.tanh(0.1 * inner(z) + x))
    x = torch.ones(2, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = deq(first(x))
        root = solve_root(lambda z, x: torch.tanh(0.1 * inner(z) + x) - z, torch.zeros(2, 3).to(x), (first(x),)).x
    assert z.dtype == root.dtype == torch.float32
    torch.testing.assert_close(z, deq(first(x)), rtol=0, atol=2e-2)
    torch.testing.assert_close(root, z, rtol=0, atol=1e-4)
    z.sum().backward()
    assert first.weight.grad.dtype == torch.float32 and bool(first.weight.grad.abs().sum() > 0)


def test_weights_that_are_made_once_for_all_calls():
    class Half(torch.nn.Module):
        def forward(self, weight):
            return 0.5 * weight

    torch.manual_seed(0)
    cell, x = Cell(), torch.ones(2, 3)
    torch.nn.utils.parametrize.register_parametrization(cell, "W", Half())
    weight = cell.parametrizations.W.original
    (want,) = torch.autograd.grad(DEQ(cell, state_shape=(4,))(x).sum(), weight)
    with torch.nn.utils.parametrize.cached():
        (found,) = torch.autograd.grad(DEQ(cell, state_shape=(4,))(x).sum(), weight)
    torch.testing.assert_close(found, want)


def test_the_first_call_within_a_checkpoint():
    deq, x = DEQ(lambda z, x: torch.tanh(0.5 * z + x)), torch.ones(2, 3, requires_grad=True)
    (found,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(deq, x, use_reentrant=False).sum(), x)
    (want,) = torch.autograd.grad(deq(x).sum(), x)
    torch.testing.assert_close(found, want)
