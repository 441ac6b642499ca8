"""The F-1 objective: trusted values, counts of factorisations and solves, the cache, agreement with nested automatic differentiation."""

from __future__ import annotations

import itertools

import pytest
import torch

from adjoint import InvalidInput, SingularJacobian, SteadyStateObjective, UnsupportedCombination, solve_root

from ..helpers.steady_problems import (
    REACTION_OBJECTIVE,
    REACTION_VALUES,
    SOURCE_GRADIENT,
    SOURCE_HESSIAN,
    SOURCE_VALUE,
    reaction_advection_diffusion,
    source_and_diffusion,
)


def _small():
    def F(x, p):
        return torch.stack([x[0] ** 2 + p[0] * x[1] - p[1], x[1] ** 3 + x[0] * p[1] - p[0] ** 2 * p[2].sin() + x[1]])

    def f(x, p):
        return (x**3).sum() * p[0] + (p**4).sum() * x[1]

    return f, F, torch.tensor([0.7, 1.3, 0.4])


def _exact(f, F, p, order):
    """Derivatives of ``f(s(p), p)`` by Newton's iteration in power series: four steps from the root carry every order up to 15."""
    root = solve_root(F, torch.ones(2), (p,)).x.detach()

    def fh(q):
        x = root
        for _ in range(4):
            x = x - torch.linalg.solve(torch.func.jacfwd(F)(x, q), F(x, q))
        return f(x, q)

    out = fh
    for _ in range(order):
        out = torch.func.jacfwd(out)
    return out(p)


def test_source_and_diffusion():
    f, F, p = source_and_diffusion()
    obj = SteadyStateObjective(f, F, torch.zeros(2000))
    assert abs(float(obj.value(p)) - SOURCE_VALUE) < 1e-9 * SOURCE_VALUE
    assert torch.allclose(obj.gradient(p), SOURCE_GRADIENT, rtol=1e-9)
    assert torch.allclose(obj.hessian(p), SOURCE_HESSIAN, rtol=1e-8)


@pytest.mark.parametrize("n", REACTION_VALUES)
def test_reaction_advection_diffusion(n):
    f, F, p = reaction_advection_diffusion(n)
    obj = SteadyStateObjective(f, F, torch.zeros(n * n))
    value, g1, h11, h12, h66 = REACTION_VALUES[n]
    H = obj.hessian(p)
    got = torch.stack([obj.value(p), obj.gradient(p)[0], H[0, 0], H[0, 1], H[5, 5]])
    assert torch.allclose(got, torch.tensor([value, g1, h11, h12, h66]), rtol=1e-8, atol=0)


@pytest.mark.parametrize("n", [64, pytest.param(128, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)])
def test_reaction_advection_diffusion_objective(n):
    f, F, p = reaction_advection_diffusion(n)
    assert abs(float(SteadyStateObjective(f, F, torch.zeros(n * n)).value(p)) / REACTION_OBJECTIVE[n] - 1) < 1e-10


def test_derivatives_to_third_order():
    f, F, p = _small()
    obj = SteadyStateObjective(f, F, torch.ones(2))
    v, w = torch.tensor([0.3, -1.0, 0.5]), torch.randn(3)
    assert torch.allclose(obj.value(p), _exact(f, F, p, 0), rtol=1e-13)
    assert torch.allclose(obj.gradient(p), _exact(f, F, p, 1), rtol=1e-12)
    H, T = _exact(f, F, p, 2), _exact(f, F, p, 3)
    # before and after the Hessian is known
    for _ in range(2):
        assert torch.allclose(obj.hvp(p, v), H @ v, rtol=1e-12)
        assert torch.allclose(obj.third_scalar(p, w), torch.einsum("ijk,i,j,k", T, w, w, w), rtol=1e-11)
        assert torch.allclose(obj.hessian(p), H, rtol=1e-12)
    assert torch.allclose(obj.third(p, v), T @ v, rtol=1e-11)


def test_value_differentiates_like_its_own_methods():
    f, F, p = _small()
    obj = SteadyStateObjective(f, F, torch.ones(2))
    gradient, hessian = obj.gradient(p), obj.hessian(p)
    for outer, inner in itertools.product([torch.func.jacrev, torch.func.jacfwd], repeat=2):
        assert torch.allclose(outer(inner(obj.value))(p), hessian, rtol=1e-11)
    q = p.clone().requires_grad_()
    factorizations = obj.stats.n_factorizations_at_solution
    (g,) = torch.autograd.grad(obj.value(q), q, create_graph=True)
    assert torch.allclose(g, gradient, rtol=1e-12)
    (row,) = torch.autograd.grad(g[1], q)
    assert torch.allclose(row, hessian[1], rtol=1e-11)
    assert obj.stats.n_factorizations_at_solution == factorizations  # autograd shares the factors
    assert torch.autograd.gradcheck(obj.value, q) and torch.autograd.gradgradcheck(obj.value, q)
    assert torch.allclose(torch.func.jacrev(obj.state)(p), obj.state_jacobian(p), rtol=1e-12)


def test_one_factorisation_and_as_many_solves_as_promised():
    f, F, p = reaction_advection_diffusion(12)
    obj = SteadyStateObjective(f, F, torch.zeros(144))
    obj.state(p)
    stats = obj.stats
    before, solves = stats.n_factorizations, stats.n_solves
    assert stats.n_factorizations_at_solution == 0
    obj.gradient(p)
    assert stats.n_solves - solves == 1
    obj.hessian(p)
    assert stats.n_solves - solves == len(p) + 1
    obj.hvp(p, torch.randn(6)), obj.value(p), obj.state_jacobian(p), obj.gradient(p), obj.hessian(p)
    assert stats.n_solves - solves == len(p) + 1
    assert stats.n_factorizations - before == stats.n_factorizations_at_solution <= 1
    obj.third(p, torch.randn(6))
    assert stats.n_solves - solves == len(p) + 1 + len(p) + 1
    assert stats.n_factorizations_at_solution <= 1 and stats.n_states == 1


def test_products_alone_cost_two_solves():
    f, F, p = reaction_advection_diffusion(12)
    obj = SteadyStateObjective(f, F, torch.zeros(144))
    obj.gradient(p)
    solves = obj.stats.n_solves
    v = torch.randn(6)
    product = obj.hvp(p, v)
    assert obj.stats.n_solves - solves == 2
    assert torch.allclose(product, obj.hessian(p) @ v, rtol=1e-9)


def test_cache_sees_changes_in_place():
    f, F, p = _small()
    scale = torch.ones(())
    obj = SteadyStateObjective(lambda x, p: scale * f(x, p), F, torch.ones(2))
    first = obj.gradient(p)
    same = obj.gradient(p.clone())
    assert torch.equal(first, same) and obj.stats.n_states == 1
    p[0] += 0.1
    second = obj.gradient(p)
    assert obj.stats.n_states == 2 and torch.allclose(second, SteadyStateObjective(f, F, torch.ones(2)).gradient(p), rtol=1e-12)
    scale.mul_(2.0)
    assert torch.allclose(obj.gradient(p), 2 * second, rtol=1e-12)
    second.zero_()  # what was given out is the caller's
    assert obj.gradient(p).abs().min() > 0
    obj.update(f=lambda x, p: x.sum())
    assert torch.allclose(obj.gradient(p), obj.state_jacobian(p).sum(0), rtol=1e-12)
    states = obj.stats.n_states
    obj.update(rtol=1e-3)
    obj.value(p)
    assert obj.stats.n_states == states + 1
    with pytest.raises(InvalidInput, match="rtoll"):
        obj.update(rtoll=1.0)


def test_pytrees_and_shapes():
    f, F, p = _small()
    tree = {"a": p[:1].clone(), "b": (p[1].clone(), p[2].clone())}
    flat = lambda q: torch.stack([q["a"][0], *q["b"]])  # noqa: E731
    obj = SteadyStateObjective(lambda x, q: f(x, flat(q)), lambda x, q: F(x, flat(q)), torch.ones(2))
    ref = SteadyStateObjective(f, F, torch.ones(2))
    g = obj.gradient(tree)
    assert g["a"].shape == (1,) and g["b"][0].shape == ()
    assert torch.allclose(flat(g), ref.gradient(p))
    assert torch.allclose(obj.hessian(tree), ref.hessian(p))
    assert torch.allclose(flat(obj.hvp(tree, tree)), ref.hvp(p, p))
    matrix = SteadyStateObjective(lambda x, q: f(x, q[0]), lambda x, q: F(x, q[0]), torch.ones(2))
    assert matrix.hessian(p.unsqueeze(0)).shape == (1, 3, 1, 3)
    assert matrix.state_jacobian(p.unsqueeze(0)).shape == (2, 1, 3)
    scalar = SteadyStateObjective(lambda x, c: x.square(), lambda x, c: x - c.exp(), torch.ones(()))
    c = torch.tensor(0.3)
    assert torch.allclose(scalar.hessian(c), 4 * torch.exp(2 * c)) and torch.allclose(scalar.third(c, torch.ones(())), 8 * torch.exp(2 * c))
    pair = SteadyStateObjective(
        lambda x, p: x["u"].sum() * x["v"],
        lambda x, p: {"u": x["u"] - p, "v": x["v"] - p.sum()},
        {"u": torch.zeros(2), "v": torch.zeros(())},
    )
    assert torch.allclose(pair.hessian(torch.ones(2)), torch.full((2, 2), 2.0))


def test_parameters_that_nothing_uses_have_zero_derivatives():
    obj = SteadyStateObjective(lambda x, p: x.sum(), lambda x, p: x - p[0], torch.zeros(3))
    p = torch.tensor([2.0, 5.0])
    assert torch.equal(obj.gradient(p), torch.tensor([3.0, 0.0]))
    assert torch.equal(obj.hessian(p), torch.zeros(2, 2))
    assert torch.equal(obj.third(p, p), torch.zeros(2, 2))
    assert torch.equal(obj.hvp(p, p), torch.zeros(2))


def test_many_parameters_take_the_batched_path():
    torch.manual_seed(1)
    n, m = 5, 40
    W = torch.randn(n, m) / m**0.5

    def F(x, p):
        return x + 0.1 * x**3 - W @ p.tanh()

    def f(x, p):
        return (x.square().sum() + x.sin().sum()) * p.cos().mean()

    obj = SteadyStateObjective(f, F, torch.zeros(n))
    p = torch.randn(m)
    H = torch.func.hessian(obj.value)(p)
    assert torch.allclose(obj.hessian(p), H, rtol=1e-9, atol=1e-12)
    v = torch.randn(m)
    T = torch.func.jvp(torch.func.hessian(obj.value), (p,), (v,))[1]
    assert torch.allclose(obj.third(p, v), T, rtol=1e-8, atol=1e-11)


def test_least_squares_objective():
    t = torch.linspace(0.1, 2.0, 20)
    truth = torch.tensor([1.0, 0.5])

    def F(x, p):  # one unknown per time: x + p1 x^3 = p0 t
        return x + p[1] * x**3 - p[0] * t

    data = solve_root(F, torch.ones(20), (truth,)).x
    obj = SteadyStateObjective(lambda x, p: x - data, F, torch.ones(20), residuals=True)
    p = torch.tensor([0.8, 0.8])
    J = torch.func.jacrev(lambda q: solve_root(F, torch.ones(20), (q,)).x)(p)
    assert torch.allclose(obj.residual_jacobian(p), J, rtol=1e-9)
    assert torch.allclose(obj.gauss_newton(p), J.T @ J, rtol=1e-9)
    assert torch.allclose(obj.gradient(p), J.T @ obj.residual(p), rtol=1e-9)
    fit = obj.least_squares(p, xtol=1e-12, ftol=1e-12, gtol=1e-12)
    assert torch.allclose(fit.p, truth, rtol=1e-8)
    few = SteadyStateObjective(lambda x, p: x[:1] - data[:1], F, torch.ones(20), residuals=True)
    solves = few.stats.n_solves
    few.state(p)
    solves = few.stats.n_solves
    assert torch.allclose(few.residual_jacobian(p), J[:1], rtol=1e-9) and few.stats.n_solves - solves == 1
    with pytest.raises(UnsupportedCombination, match="residuals=True"):
        SteadyStateObjective(lambda x, p: x.sum(), F, torch.ones(20)).gauss_newton(p)


@pytest.mark.parametrize("method", ["trust-exact", "trust-ncg", "trust-krylov", "Newton-CG", "BFGS", "L-BFGS-B"])
def test_minimize(method):
    f, F, p = reaction_advection_diffusion(8)
    obj = SteadyStateObjective(f, F, torch.zeros(64))
    trust = method in ("trust-exact", "trust-ncg")
    result = obj.minimize(p, method, options={"gtol": 1e-8} if trust else None)
    assert float(obj.gradient(result.p).norm()) < (1e-8 if trust else 1e-3)
    assert result.fun < float(obj.value(p)) and result.failed_states == 0


@pytest.mark.slow
def test_minimize_steps_back_from_where_there_is_no_steady_state():
    # x^2 = p has no root for p < 0
    obj = SteadyStateObjective(lambda x, p: (x - 0.1).square().sum() + 0.0 * p.sum(), lambda x, p: x.square() - p, torch.ones(1))
    result = obj.minimize(torch.tensor([4.0]), "trust-exact", options={"initial_trust_radius": 50.0, "max_trust_radius": 100.0})
    assert result.failed_states > 0
    assert abs(float(result.p) - 0.01) < 1e-5


def test_observations_more_and_fewer_than_parameters():
    f, F, p = _small()
    for g in (lambda x, p: x.prod() * p[0], lambda x, p: torch.cat([x.square(), p, x.sum() * p.sin(), x])):
        obj = SteadyStateObjective(f, F, torch.ones(2))
        value, J = obj._observation_jacobian(obj._at(p), g)
        h = lambda q, g=g: g(solve_root(F, torch.ones(2), (q,)).x, q).reshape(-1)  # noqa: E731
        assert torch.allclose(value, h(p)) and torch.allclose(J, torch.func.jacrev(h)(p), rtol=1e-10, atol=1e-13)


def test_laplace_is_exact_for_a_linear_model():
    torch.manual_seed(0)
    A = torch.randn(4, 2)
    data = torch.randn(4)
    obj = SteadyStateObjective(lambda x, p: x - data, lambda x, p: x - A @ p, torch.zeros(4), residuals=True)
    best = torch.linalg.lstsq(A, data.unsqueeze(-1)).solution.squeeze(-1)
    laplace = obj.laplace(best)
    C = torch.linalg.inv(A.T @ A)
    assert torch.allclose(laplace.covariance, C)
    value, covariance = laplace.predict(lambda x, p: x)
    assert torch.allclose(value, A @ best) and torch.allclose(covariance, A @ C @ A.T)
    assert torch.allclose(laplace.predict_std(lambda x, p: x)[1], (A @ C @ A.T).diagonal().sqrt())
    assert torch.allclose(obj.laplace(best, dispersion=2.0, gauss_newton=True).covariance, 2 * C)
    draws = laplace.sample(best, 20000)
    assert torch.allclose(draws.T.cov(), C, rtol=0.1, atol=0.02)
    with pytest.raises(InvalidInput, match="not positive definite"):
        SteadyStateObjective(lambda x, p: -x.square().sum(), lambda x, p: x - p, torch.zeros(2)).laplace(torch.zeros(2))


def test_bad_input():
    f, F, p = _small()
    obj = SteadyStateObjective(f, F, torch.ones(2))
    with pytest.raises(InvalidInput, match="real floating"):
        obj.value(torch.tensor([1, 2, 3]))
    with pytest.raises(InvalidInput, match="non-finite"):
        obj.value(torch.tensor([1.0, float("nan"), 0.0]))
    with pytest.raises(InvalidInput, match="like the parameters"):
        obj.hvp(p, torch.ones(2))
    with pytest.raises(InvalidInput, match="batched"):
        SteadyStateObjective(f, F, torch.ones(2), batched=True)
    with pytest.raises(InvalidInput, match="one element"):
        SteadyStateObjective(lambda x, p: x, F, torch.ones(2)).value(p)
    with pytest.raises(UnsupportedCombination, match="value"):
        torch.func.grad(lambda q: obj.gradient(q).sum())(p)
    with pytest.raises(InvalidInput, match="callables"):
        SteadyStateObjective(3, F, torch.ones(2))


def test_no_derivatives_where_the_jacobian_is_singular():
    # at p = 0 both roots of x^2 = p meet; the guess is the root itself
    obj = SteadyStateObjective(lambda x, p: x.sum(), lambda x, p: x.square() - p, torch.zeros(1), method="newton")
    with pytest.raises(SingularJacobian):
        obj.gradient(torch.zeros(1))


def test_warm_start_uses_the_derivative():
    f, F, p = _small()
    warm, cold = (SteadyStateObjective(f, F, torch.ones(2), warm_start=w) for w in (True, False))
    for obj in (warm, cold):
        obj.hessian(p)
        obj.value(p + 1e-3)
    assert warm.stats.n_newton < cold.stats.n_newton
    assert torch.allclose(warm.value(p + 1e-3), cold.value(p + 1e-3), rtol=1e-12)


@pytest.mark.parametrize("x_type, p_type", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_state_and_parameters_of_two_precisions(x_type, p_type):
    p, v = torch.tensor([1.0, 2.0], dtype=p_type), torch.tensor([0.5, -1.0], dtype=p_type)

    def make():
        return SteadyStateObjective(lambda x, p: x.square().sum(), lambda x, p: x**3 + x - p.to(x), torch.ones(2, dtype=x_type))

    x = make().state(p).double()
    slope = 1 / (3 * x**2 + 1)
    bend = 2 * slope**2 - 12 * x**2 * slope**3  # of x^2 in p
    obj = make()
    for _ in range(2):  # before and after the Hessian is known
        assert torch.allclose(obj.hvp(p, v).double(), bend * v, rtol=1e-5)
        assert torch.allclose(obj.hessian(p).double(), torch.diag(bend), rtol=1e-5)
    third = obj.third(p, v).double()
    assert torch.allclose(torch.einsum("ij,i,j->", third, v.double(), v.double()), obj.third_scalar(p, v).double(), rtol=1e-4)


def test_inside_of_transforms():
    f, F, p = _small()
    obj = SteadyStateObjective(f, F, torch.ones(2))
    H = obj.hessian(p)
    for call in (lambda v: obj.hvp(p, v), lambda v: obj.hessian(p + v), lambda v: obj.third(p, v)):
        with pytest.raises(UnsupportedCombination, match="value"):
            torch.vmap(call)(torch.eye(3))
    assert torch.allclose(torch.vmap(torch.func.hessian(obj.value))(p.expand(2, 3))[1], H, rtol=1e-9)
    constant = torch.func.grad(lambda q: obj.value(p) * q.sum())(p)
    assert torch.allclose(constant, obj.value(p).expand(3), rtol=1e-10)


def test_tensors_that_functions_captured():
    """Derivatives in them are there whether or not ``p`` asks for any."""
    theta, p = torch.tensor([0.5, 0.7], requires_grad=True), torch.tensor([0.3, 0.2])
    F = lambda x, p: x**3 + theta * x - p  # noqa: E731
    f = lambda x, p: (x**2).sum() + theta.sum() * x[0]  # noqa: E731
    x = solve_root(lambda x: F(x, p), torch.ones(2)).x
    (want,) = torch.autograd.grad(f(x, p), theta)
    for given in (p, p.clone().requires_grad_()):
        obj = SteadyStateObjective(f, F, torch.ones(2))
        torch.testing.assert_close(torch.autograd.grad(obj.value(given), theta)[0], want)
        torch.testing.assert_close(torch.autograd.grad(f(obj.state(given), p), theta)[0], want)
    with torch.no_grad():
        assert not obj.value(p).requires_grad
    theta.requires_grad_(False)
    assert not obj.value(p).requires_grad


def test_a_method_is_known_by_name_at_once():
    f, F = (lambda x, p: x.sum()), (lambda x, p: x - p)
    with pytest.raises(InvalidInput, match="no root method 'nwton'"):
        SteadyStateObjective(f, F, torch.ones(2), method="nwton")
    objective = SteadyStateObjective(f, F, torch.ones(2))
    with pytest.raises(InvalidInput, match="no root method 'nwton'"):
        objective.update(method="nwton")
