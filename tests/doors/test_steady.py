"""solve_root: trusted roots, derivatives of every order in every nesting, batches, sparse and matrix-free, failures."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import adjoint
from adjoint import InvalidInput, NewtonDidNotConverge, NonFiniteResidual, SingularJacobian, UnsupportedCombination, solve_root
from adjoint.linalg import GMRES, DenseLU, SparseLU

from ..helpers.steady_problems import bratu, chandrasekhar, reaction_advection_diffusion

BRATU = (0.140539214400471798, 0.159202806197079, 0.0451166766284626, 0.0292652371211558)


def coupled(x, p):
    return torch.stack([x[0] ** 2 + p[0] * x[1] - p[1], x[1] ** 3 + x[0] * p[1] - p[0] ** 2 * p[2].sin() + x[1]])


P = torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64)


def root(p, **options):
    return solve_root(coupled, torch.ones(2), (p,), **options).x


def by_series(p, steps=4):
    """The root as a function of p by Newton's iteration from the root itself: exact derivatives up to order 2^steps - 1."""
    x = root(P).detach()
    for _ in range(steps):
        x = x - torch.linalg.solve(jacfwd(coupled)(x, p), coupled(x, p))
    return x


def test_chandrasekhar():
    c = torch.tensor(0.9, requires_grad=True)
    sol = solve_root(chandrasekhar(), torch.ones(100), (c,))
    assert sol.success and sol.residual_norm < 1e-12
    x = sol.x
    got = torch.stack([x[0], x[-1], x.norm()])
    assert torch.allclose(got, torch.tensor([1.0145314757360013, 1.847721717856573, 15.368016943618473]), rtol=1e-11)
    (g,) = torch.autograd.grad(x.sum(), c)
    step = 1e-5
    ends = [solve_root(chandrasekhar(), torch.ones(100), (torch.tensor(0.9 + s * step),)).x.sum() for s in (1, -1)]
    assert abs(float(g - (ends[0] - ends[1]) / (2 * step))) < 1e-5 * float(g)


def test_bratu_and_its_derivatives_converge_at_fourth_order():
    def middle(lam, n):
        return solve_root(bratu(n), torch.zeros(n), (lam,)).x[n // 2]

    errors = []
    for n in (15, 31):
        f = lambda lam, n=n: middle(lam, n)  # noqa: E731
        one = torch.tensor(1.0)
        values = [f(one), grad(f)(one), grad(grad(f))(one), grad(grad(grad(f)))(one)]
        errors.append([abs(float(v) - exact) for v, exact in zip(values, BRATU, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 2e-6 and math.log2(coarse / fine) > 3.8


def test_gradient_grows_towards_the_fold_and_fails_beyond():
    def middle(lam):
        return solve_root(bratu(31), torch.zeros(31), (lam,)).x[15]

    slopes = [float(grad(middle)(torch.tensor(lam))) for lam in (3.0, 3.4, 3.5, 3.513)]
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(slopes)) and slopes[-1] > 10
    with pytest.raises(adjoint.AdjointError):
        middle(torch.tensor(3.6))


def test_three_orders_in_every_nesting():
    cost = lambda f: lambda p: (f(p) ** 3).sum()  # noqa: E731
    for outer, inner in itertools.product([jacrev, jacfwd], repeat=2):
        assert torch.allclose(outer(inner(cost(root)))(P), hessian(cost(by_series))(P), rtol=1e-11)
    third = jacfwd(hessian(cost(by_series)))(P)
    for a, b, c in itertools.product([jacrev, jacfwd], repeat=3):
        assert torch.allclose(a(b(c(cost(root))))(P), third, rtol=1e-10)


def test_one_attached_newton_step_has_a_wrong_hessian():
    """The trap that this library avoids: its gradient is right, its Hessian is not."""

    def cost(f):
        return lambda p: (f(p) ** 3).sum()

    one = cost(lambda p: by_series_frozen(p, 1))
    assert torch.allclose(grad(one)(P), grad(cost(root))(P), rtol=1e-10)
    assert not torch.allclose(hessian(one)(P), hessian(cost(root))(P), rtol=1e-2)
    two = cost(lambda p: by_series_frozen(p, 2))
    assert torch.allclose(hessian(two)(P), hessian(cost(root))(P), rtol=1e-10)


def by_series_frozen(p, steps):
    x = root(P).detach()
    A = jacfwd(coupled)(x, P)
    for _ in range(steps):
        x = x - torch.linalg.solve(A, coupled(x, p))
    return x


def test_gradcheck_and_forward_mode():
    p = P.clone().requires_grad_()
    assert torch.autograd.gradcheck(root, p, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(root, p, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_one_factorisation_for_every_derivative():
    p = P.clone().requires_grad_()
    sol = solve_root(coupled, torch.ones(2), (p,))
    before = sol.stats.n_factorizations
    cost = (sol.x**3).sum()
    (g,) = torch.autograd.grad(cost, p, create_graph=True)
    rows = [torch.autograd.grad(gi, p, retain_graph=True, create_graph=True)[0] for gi in g]
    torch.autograd.grad(rows[0][1], p)
    assert sol.stats.n_factorizations - before <= 1


def test_quadratic_rates_of_exactness():
    """A scalar root with known derivatives: x = p^(1/3)."""
    f = lambda p: solve_root(lambda x, p: x**3 - p, torch.tensor(1.0), (p,)).x  # noqa: E731
    p = torch.tensor(2.0)
    d = [f, grad(f), grad(grad(f)), grad(grad(grad(f)))]
    exact = [2 ** (1 / 3), 2 ** (-2 / 3) / 3, -2 * 2 ** (-5 / 3) / 9, 10 * 2 ** (-8 / 3) / 27]
    assert torch.allclose(torch.stack([g(p) for g in d]), torch.tensor(exact), rtol=1e-12)


@pytest.mark.parametrize("solver", [DenseLU(), SparseLU(), GMRES(rtol=1e-13)], ids=["dense", "sparse", "gmres"])
@pytest.mark.slow_cases("gmres")
def test_linear_solvers_agree(solver):
    _, F, p = reaction_advection_diffusion(10)

    def cost(q, **options):
        return solve_root(F, torch.zeros(100), (q,), **options).x.square().sum()

    want = hessian(cost)(p)
    f = lambda q: cost(q, linear_solver=solver)  # noqa: E731
    assert torch.allclose(jacrev(jacrev(f))(p), want, rtol=1e-7, atol=1e-9)
    assert torch.allclose(jacfwd(jacrev(f))(p), want, rtol=1e-7, atol=1e-9)


def test_sparse_jacobians_found_given_and_by_pattern():
    _, F, p = reaction_advection_diffusion(12)
    n = 144
    found = solve_root(F, torch.zeros(n), (p,))
    assert "entries" in found.note, found.note
    dense = torch.func.jacfwd(F)(found.x, p)
    pattern = (dense != 0).to_sparse()
    by_pattern = solve_root(F, torch.zeros(n), (p,), jac_sparsity=pattern)
    by_jac = solve_root(F, torch.zeros(n), (p,), jac=lambda x, q: jacfwd(F)(x, q))
    by_sparse_jac = solve_root(F, torch.zeros(n), (p,), jac=lambda x, q: jacfwd(F)(x, q).to_sparse())
    for other in (by_pattern, by_jac, by_sparse_jac):
        assert torch.allclose(other.x, found.x, rtol=1e-10)


class _Ring:
    def __init__(self, shift):
        self.shift = shift

    def residual(self, x, p):
        return x + 0.5 * torch.roll(x, self.shift, 0).sin() - p


def test_kept_patterns_are_those_of_the_very_function():
    """Methods of two objects, and one object that changes, have other patterns under the same name."""
    ring, n = _Ring(1), 150
    p, w = torch.ones(n), torch.arange(float(n))
    for step in range(3):
        if step == 1:
            ring = _Ring(7)
        if step == 2:
            ring.shift = 3
        x, pull = vjp(lambda p, ring=ring: solve_root(ring.residual, torch.zeros(n), (p,)).x, p)
        J = jacrev(lambda x, ring=ring: ring.residual(x, p))(x)
        assert torch.allclose(pull(w)[0], torch.linalg.solve(J.T, w), rtol=1e-10)


def test_user_jacobian_serves_derivatives_and_vmap():
    jac = lambda x, p: jacfwd(coupled)(x, p)  # noqa: E731
    f = lambda p: root(p, jac=jac).square().sum()  # noqa: E731
    assert torch.allclose(hessian(f)(P), hessian(lambda p: root(p).square().sum())(P), rtol=1e-10)
    many = P + 0.1 * torch.rand(4, 3)
    assert torch.allclose(vmap(grad(f))(many), torch.stack([grad(f)(q) for q in many]), rtol=1e-10)


def test_vmap_over_parameters_guesses_and_derivatives():
    many = P + 0.2 * torch.rand(5, 3)
    cost = lambda p: (root(p) ** 3).sum()  # noqa: E731
    for transform in (lambda f: f, grad, hessian, lambda f: jacrev(jacfwd(f))):
        assert torch.allclose(vmap(transform(cost))(many), torch.stack([transform(cost)(p) for p in many]), rtol=1e-10)
    guesses = torch.ones(3, 2) + 0.1 * torch.rand(3, 2)
    assert torch.allclose(vmap(lambda x: solve_root(coupled, x, (P,)).x)(guesses), root(P).expand(3, 2))
    assert torch.allclose(hessian(lambda m: vmap(cost)(m).sum())(many)[0, :, 0], hessian(cost)(many[0]), rtol=1e-10)
    nested = vmap(vmap(grad(cost)))(many[:4].reshape(2, 2, 3))
    assert torch.allclose(nested.reshape(4, 3), vmap(grad(cost))(many[:4]), rtol=1e-12)


def test_jvp_and_vjp_of_the_root():
    v, w = torch.randn(3), torch.randn(2)
    _, dot = jvp(root, (P,), (v,))
    bar = vjp(root, P)[1](w)[0]
    S = jacrev(root)(P)
    assert torch.allclose(dot, S @ v) and torch.allclose(bar, w @ S)


def test_batched_equals_one_by_one():
    torch.manual_seed(3)
    many = P + 0.3 * torch.rand(6, 3)
    guesses = 1 + torch.rand(6, 2)

    def fun(x, p):
        return torch.stack(
            [x[:, 0] ** 2 + p[:, 0] * x[:, 1] - p[:, 1], x[:, 1] ** 3 + x[:, 0] * p[:, 1] - p[:, 0] ** 2 * p[:, 2].sin() + x[:, 1]], 1
        )

    q = many.clone().requires_grad_()
    sol = solve_root(fun, guesses, (q,), batched=True)
    assert sol.success.shape == (6,) and bool(sol.success.all()) and sol.stats.n_steps.unique().numel() > 1
    (g,) = torch.autograd.grad(sol.x.square().sum(), q)
    for b in range(6):
        one = many[b].clone().requires_grad_()
        x = solve_root(coupled, guesses[b], (one,)).x
        assert torch.allclose(x, sol.x[b], rtol=0, atol=1e-14)
        assert torch.allclose(torch.autograd.grad(x.square().sum(), one)[0], g[b], rtol=1e-12)


def test_one_failing_system_fails_alone():
    def fun(x, p):
        return x.square() - p.unsqueeze(-1)

    p = torch.tensor([4.0, -1.0, 9.0], requires_grad=True)
    sol = solve_root(fun, torch.ones(3, 1), (p,), batched=True, throw=False)
    assert sol.success.tolist() == [True, False, True]
    assert torch.allclose(sol.x[[0, 2], 0], torch.tensor([2.0, 3.0])) and bool(sol.x[1].isnan().all())
    good = torch.where(sol.success.unsqueeze(-1), sol.x, 0.0)
    (g,) = torch.autograd.grad(good.sum(), p, retain_graph=True)
    assert torch.allclose(g, torch.tensor([0.25, 0.0, 1 / 6]))
    (g,) = torch.autograd.grad(sol.x.sum(), p)
    assert bool(g[1].isnan())
    with pytest.raises(adjoint.RootError, match=r"system 1 \(1 of 3 failed\)") as caught:
        solve_root(fun, torch.ones(3, 1), (p,), batched=True)
    assert caught.value.row == 1


@pytest.mark.parametrize("method", ["newton", "levenberg_marquardt", "broyden"])
@pytest.mark.parametrize("a", [float("nan"), float("inf"), -1.0])
@pytest.mark.slow_cases("-1.0-broyden")
def test_a_failed_system_leaves_derivatives_in_shared_parameters_alone(method, a):
    """``k x^2 = a``: the system with a parameter of its own that is not finite, or has no root, in first and second order."""
    k, own = torch.tensor(0.5, requires_grad=True), torch.tensor([1.0, a], requires_grad=True)

    def root(k, own):
        sol = solve_root(lambda x, a: k * x.square() - a.unsqueeze(-1), torch.ones(2, 1), (own,), batched=True, throw=False, method=method)
        # number by number: lists are refused inside of transforms by PyTorch 2.6
        assert [bool(status < 0) for status in sol.status] == [False, True]
        return sol.x

    first, second = -0.5 * 0.5**-1.5, 0.75 * 0.5**-2.5
    slope, of_own = torch.autograd.grad(root(k, own)[0].sum(), [k, own], create_graph=True)
    assert float(slope) == pytest.approx(first, rel=1e-7)
    assert float(of_own[0]) == pytest.approx(0.5**0.5, rel=1e-7) and bool(torch.isfinite(own[1]) | of_own[1].isnan())
    assert float(torch.autograd.grad(slope, k)[0]) == pytest.approx(second, rel=1e-6)
    assert float(torch.func.hessian(lambda k: root(k, own.detach())[0].sum())(k.detach())) == pytest.approx(second, rel=1e-6)
    # of a system that failed there is none
    assert bool(torch.autograd.grad(root(k, own).sum(), k)[0].isnan())


def test_pytree_states_captured_tensors_and_modules():
    a = torch.tensor(2.0, requires_grad=True)
    b = a * 3

    def fun(x):
        return {"u": x["u"] - a * torch.ones(2), "v": (x["v"][0] ** 2 - b,)}

    sol = solve_root(fun, {"u": torch.zeros(2), "v": (torch.ones(()),)})
    sol.x["v"][0].backward()
    assert torch.allclose(a.grad, torch.tensor(3 / (2 * 6**0.5)))
    layer = torch.nn.Linear(3, 3)
    torch.nn.init.orthogonal_(layer.weight, 0.5)
    sol = solve_root(lambda z: z - layer(z).tanh(), torch.zeros(3))
    sol.x.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_complex_roots():
    p = torch.tensor([1.0 + 2.0j, -0.5 + 0.3j], requires_grad=True)

    def f(p):
        return solve_root(lambda x, p: x**2 - p.exp(), torch.ones(2, dtype=torch.complex128), (p,)).x

    assert torch.allclose(f(p), (p / 2).exp())
    assert torch.autograd.gradcheck(f, p) and torch.autograd.gradgradcheck(f, p)


def test_guess_has_no_gradient():
    x0 = torch.ones(2, requires_grad=True)
    p = P.clone().requires_grad_()
    x = solve_root(coupled, x0, (p,)).x
    assert torch.autograd.grad(x.sum(), x0, allow_unused=True, retain_graph=True)[0] is None
    assert not solve_root(lambda x: coupled(x, P), x0).x.requires_grad


def test_scaling_the_residual_changes_nothing():
    scale = torch.tensor([1e8, 1e-9])
    x = solve_root(lambda x, p: scale * coupled(x, p), torch.ones(2), (P,)).x
    assert torch.allclose(x, root(P), rtol=1e-13)
    f = lambda p: solve_root(lambda x, p: scale * coupled(x, p), torch.ones(2), (p,)).x.sum()  # noqa: E731
    assert torch.allclose(grad(f)(P), grad(lambda p: root(p).sum())(P), rtol=1e-11)


def test_conserved_totals():
    """A + B <-> C with totals of A and B kept."""
    K = torch.tensor(2.0, requires_grad=True)
    W = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])

    def fun(x, K):
        rate = K * x[0] * x[1] - x[2]
        return torch.stack([-rate, -rate, rate])

    x0 = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    with pytest.raises(SingularJacobian, match="conserved"):
        solve_root(fun, x0.detach(), (K,), method="newton")
    sol = solve_root(fun, x0, (K,), conserved=W)
    c = (7 - 17**0.5) / 4  # 2 (1 - c)(2 - c) = c
    assert torch.allclose(sol.x, torch.tensor([1 - c, 2 - c, c]))
    g, gx = torch.autograd.grad(sol.x[2], [K, x0])
    step = 1e-6
    up = [solve_root(fun, x0.detach(), (K.detach() + s * step,), conserved=W).x[2] for s in (1, -1)]
    assert abs(float(g - (up[0] - up[1]) / (2 * step))) < 1e-8
    assert torch.allclose(gx[2], gx[0] + gx[1])  # a C more is an A and a B more
    given = solve_root(fun, torch.ones(3), (K,), conserved=(W, torch.tensor([1.0, 2.0]))).x
    assert torch.allclose(given, sol.x)
    with pytest.raises(InvalidInput, match="not conserved"):
        solve_root(fun, x0.detach(), (K,), conserved=torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(InvalidInput, match="dependent"):
        solve_root(fun, x0.detach(), (K,), conserved=torch.stack([W[0], 2 * W[0]]))


def test_least_squares_minimiser_is_differentiated_with_its_curvature():
    t = torch.linspace(0, 1, 9)
    data = (1.2 * torch.exp(0.7 * t) + 0.1 * torch.sin(20 * t)).requires_grad_()

    def fun(q, data):
        return q[0] * torch.exp(q[1] * t) - data

    def fit(data):
        return solve_root(fun, torch.tensor([1.0, 0.5]), (data,), least_squares=True, rtol=1e-12).x

    q = fit(data)
    residual = lambda q: fun(q, data).square().sum() / 2  # noqa: E731
    assert float(grad(residual)(q.detach()).norm()) < 1e-10
    assert torch.autograd.gradcheck(fit, data, atol=1e-6)
    with pytest.raises(UnsupportedCombination, match="levenberg"):
        solve_root(fun, torch.tensor([1.0, 0.5]), (data,), least_squares=True, method="newton")


def test_single_precision():
    p = P.float().requires_grad_()
    x = solve_root(coupled, torch.ones(2, dtype=torch.float32), (p,)).x
    assert x.dtype == torch.float32 and torch.allclose(x.double(), root(P), rtol=1e-5)
    assert torch.autograd.grad(x.sum(), p)[0].dtype == torch.float32


def test_shapes():
    assert solve_root(lambda x: x - 2, torch.tensor(1.0)).x.shape == ()
    assert solve_root(lambda x: x - 2, torch.ones(2, 3, 4)).x.shape == (2, 3, 4)
    assert solve_root(lambda x: x - 2, torch.ones(0, 3), batched=True).x.shape == (0, 3)
    assert solve_root(lambda x: x, torch.ones(0)).x.shape == (0,)


def test_bounds():
    f = lambda x: x**2 - 4  # noqa: E731
    assert torch.allclose(solve_root(f, torch.tensor([1.0]), bounds=(0.0, None)).x, torch.tensor([2.0]))
    assert torch.allclose(solve_root(f, torch.tensor([-1.0]), bounds=(None, 0.0)).x, torch.tensor([-2.0]))
    with pytest.raises(InvalidInput, match="outside"):
        solve_root(f, torch.tensor([-1.0]), bounds=(0.0, None))


@pytest.mark.parametrize("method", ["newton", "chord", "shamanskii", "dogleg", "broyden", "anderson", "fixed_point", "levenberg_marquardt"])
def test_every_method_finds_the_root_and_shares_the_derivative(method):
    def fun(x, p):  # a contraction as a fixed-point residual: g(x) - x
        return 0.4 * torch.sin(x.flip(0) + p) - x

    p = torch.tensor([0.3, 1.1, -0.4])
    f = lambda p: solve_root(fun, torch.zeros(3), (p,), method=method).x  # noqa: E731
    want = solve_root(fun, torch.zeros(3), (p,), method="newton").x
    assert torch.allclose(f(p), want, rtol=1e-8, atol=1e-9)
    exact = jacrev(lambda p: solve_root(fun, torch.zeros(3), (p,), method="newton").x)(p)
    assert torch.allclose(jacrev(f)(p), exact, rtol=1e-7, atol=1e-9)


def test_pseudo_transient_needs_no_good_guess():
    def fun(x, p):
        return p - x - 5 * torch.tanh(3 * x)

    sol = solve_root(fun, torch.full((2,), 30.0), (torch.tensor([2.0, -1.0]),), method="pseudo_transient")
    assert sol.success and float(fun(sol.x, torch.tensor([2.0, -1.0])).abs().max()) < 1e-9


def test_failures():
    with pytest.raises(NewtonDidNotConverge, match=r"guess|least_squares"):
        solve_root(lambda x: x**2 + 1, torch.tensor([1.0]), method="newton")
    with pytest.raises(NonFiniteResidual, match="bounds"):
        solve_root(lambda x: torch.log(x), torch.tensor([-1.0]), method="newton")
    with pytest.raises(NewtonDidNotConverge, match="after 3 iterations"):
        solve_root(lambda x: x**3 - 1e6, torch.tensor([1e-3]), max_steps=3, method="newton")
    sol = solve_root(lambda x: x**2 + 1, torch.tensor([1.0]), throw=False)
    assert not sol.success and bool(sol.x.isnan()) and sol.status < 0 and isinstance(sol.message, str)
    assert "RootSolution" in repr(sol)


def test_bad_input():
    ok = torch.ones(2)
    with pytest.raises(InvalidInput, match="callable"):
        solve_root(3, ok)
    with pytest.raises(InvalidInput, match="shape"):
        solve_root(lambda x: x[:1], ok)
    with pytest.raises(InvalidInput, match="non-finite"):
        solve_root(lambda x: x, torch.tensor([float("inf")]))
    with pytest.raises(InvalidInput, match="int64"):
        solve_root(lambda x: x, torch.tensor([1]))
    with pytest.raises(InvalidInput, match="nowton"):
        solve_root(lambda x: x, ok, method="nowton")
    with pytest.raises(InvalidInput, match="max_steps"):
        solve_root(lambda x: x, ok, max_steps=0)
    with pytest.raises(InvalidInput, match="jac_sparsity"):
        solve_root(lambda x: x, ok, jac_sparsity=torch.eye(3))
    with pytest.raises(InvalidInput, match="linear_solver"):
        solve_root(lambda x: x, ok, linear_solver="lu")
    with pytest.raises(InvalidInput, match="rtol"):
        solve_root(lambda x: x, ok, rtol=-1.0)
    with pytest.raises(InvalidInput, match="dtype"):
        solve_root(lambda x: x.float(), ok)
    with pytest.raises(InvalidInput, match="jac must return"):
        solve_root(lambda x: x, ok, jac=lambda x: torch.eye(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve_root(lambda x: x - 1, ok).success
