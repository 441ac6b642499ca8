"""Roots that are right, or an error that says why not: sizes, multiplicity, wrong Jacobians, wrong totals. Truth: closed forms."""

import pytest
import scipy.optimize
import scipy.sparse as sp
import torch

import adjoint
from adjoint import solve_root
from adjoint.errors import InvalidInput, RootError, SingularJacobian, UnsupportedCombination
from adjoint.linalg import DenseLU

DOTTIE, DOTTIE_SLOPE = 0.7390851332151607, -0.2974743415098323  # of cos(p x) = x, at p = 1


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def slope(x, p):
    return torch.autograd.grad(x.sum(), p)[0].item()


METHODS = [
    "auto",
    "newton",
    "chord",
    "shamanskii",
    "dogleg",
    "levenberg_marquardt",
    "pseudo_transient",
    "fixed_point",
    "anderson",
    "broyden",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-14, 1e-9])
def test_small_unknowns_have_as_many_digits_as_large_ones(method, size):
    p = torch.tensor(1.0, requires_grad=True)
    x = solve_root(lambda x, p: size * torch.cos(p * x / size) - x, torch.tensor([0.1 * size]), (p,), method=method).x
    assert abs(x.item() / size - DOTTIE) < 1e-9 and abs(slope(x, p) / size - DOTTIE_SLOPE) < 1e-9

    def coupled(x, p):
        trace = x[0] - size * p
        return torch.stack([-trace - 0.3 * trace * x[1], torch.cos(x[1] * p) - x[1]])

    x = solve_root(coupled, torch.tensor([0.0, 0.5]), (p,), method=method).x
    assert abs(x[0].item() / size - 1) < 1e-8 and abs(slope(x[0], p) / size - 1) < 1e-8 and abs(x[1].item() - DOTTIE) < 1e-9


def test_a_tolerance_that_is_given_is_kept_to():
    f = lambda x: x * x - 1e-28  # noqa: E731
    rough = solve_root(f, torch.ones(1), method="newton", atol=1e-6)
    fine = solve_root(f, torch.ones(1), method="newton")
    assert abs(rough.x.item()) < 1e-5 and rough.stats.n_steps < fine.stats.n_steps and abs(fine.x.item() - 1e-14) < 1e-23


def test_unknowns_that_vanish_end_the_iteration():
    def f(x):
        return torch.stack([torch.tanh(x[0]) * 0.5 - x[0], (1 + x[1]) ** 2 - 1, x[2] - 1])

    for method in ("newton", "dogleg", "anderson"):
        sign = 1 if method == "anderson" else -1
        scale = torch.tensor([1.0, -0.3, -1.0])
        found = solve_root(lambda x: sign * scale * f(x), torch.tensor([0.5, 0.5, 0.5]), method=method)  # noqa: B023
        assert torch.allclose(found.x, torch.tensor([0.0, 0.0, 1.0]), atol=1e-12)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point", "newton"])
def test_deep_equilibrium_in_small_units_and_single_precision(solver):
    w = torch.tensor([[0.3, 0.2], [0.1, -0.4]], dtype=torch.float32)
    x = torch.tensor([[2e-6, 1e-6]], dtype=torch.float32)
    z = adjoint.nn.DEQ(lambda z, x: z @ w.T + x, solver=solver)(x)
    assert torch.allclose(z, x @ torch.linalg.inv(torch.eye(2, dtype=torch.float32) - w).T, rtol=1e-4, atol=0.0)
    tendency = solve_root(lambda x: 1e-9 * (3.0 - x), torch.ones(1), method="anderson").x
    assert abs(tendency.item() - 3) < 1e-6


@pytest.mark.parametrize(
    "f",
    [
        lambda x, p: (x - p) ** 2,
        lambda x, p: (x - p) ** 3,
        lambda x, p: x**2 + 0 * p,
        lambda x, p: x**2 - (p - 1),
    ],
)
@pytest.mark.parametrize("method", ["auto", "dogleg"])
def test_multiple_roots_have_no_derivatives(f, method):
    p = torch.tensor(1.0, requires_grad=True)
    x = solve_root(f, torch.tensor([2.0]), (p,), method=method).x
    with pytest.raises(SingularJacobian, match="no derivatives"):
        slope(x, p)


@pytest.mark.parametrize("method", ["auto", "levenberg_marquardt", "dogleg"])
def test_a_multiple_root_where_the_residual_vanishes_by_rounding(method):
    """``(x - 1)^3`` multiplied out is zero in a whole interval, in which Newton's steps are zero and the Jacobian is not."""
    p = torch.tensor(0.0, requires_grad=True)
    for f, start in (
        (lambda x, p: x**3 - 3 * x**2 + 3 * x - 1 - p, [3.0]),
        (lambda x, p: torch.stack([1e6 * (x[0] ** 3 - 3 * x[0] ** 2 + 3 * x[0] - 1 - p), x[1] - 2 * x[0]]), [3.0, 0.0]),
    ):
        with pytest.raises(SingularJacobian, match="no derivatives"):
            slope(solve_root(f, torch.tensor(start), (p,), method=method).x.sum(), p)


def test_near_a_fold_and_steep_and_tiny_there_are_derivatives():
    p = torch.tensor(1.0, requires_grad=True)
    for f, start, want, rtol in (
        (lambda x, p: x**2 - (p - 1 + 1e-8), 1.0, 0.5e4, 1e-6),
        (lambda x, p: torch.exp(50 * x * p) - 1e10, 0.5, -torch.log(torch.tensor(1e10)).item() / 50, 1e-9),
        (lambda x, p: x**2 - 1e-24 * p, 1e-11, 0.5e-12, 1e-9),
        (lambda x, p: (1e8 + x) - (1e8 + p), 1.0, 1.0, 1e-7),
        (lambda x, p: x + 0.5 * x.abs() - p, 1.0, 2 / 3, 1e-9),
    ):
        x = solve_root(f, torch.tensor([start]), (p,)).x
        assert abs(slope(x, p) / want - 1) < rtol


def test_of_a_batch_only_what_is_asked_for_counts():
    p = torch.tensor(4.0, requires_grad=True)
    f = lambda x, p: x**2 - torch.tensor([[1.0], [0.0]]) * p  # noqa: E731
    x = solve_root(f, torch.ones(2, 1), (p,), batched=True).x
    assert slope(x[0], p) == 0.25
    x = solve_root(f, torch.ones(2, 1), (p,), batched=True).x
    with pytest.raises(SingularJacobian, match="system 1"):
        slope(x[1], p)
    x = solve_root(f, torch.ones(2, 1), (p,), batched=True, throw=False).x
    assert torch.isnan(torch.autograd.grad(x[1].sum(), p)[0])


def test_an_approximate_jacobian_serves_the_iteration_only():
    p = torch.tensor(4.0, requires_grad=True)
    found = solve_root(lambda x, p: x**2 - p, torch.tensor([1.9]), (p,), jac=lambda x, p: torch.diag(x), max_steps=2000)
    (g,) = torch.autograd.grad(found.x.sum(), p, create_graph=True)
    assert g.item() == 0.25 and abs(torch.autograd.grad(g, p)[0].item() + 1 / 32) < 1e-12
    objective = adjoint.SteadyStateObjective(
        lambda x, p: (x**2 * p).sum(), lambda x, p: x**2 - p**3, torch.tensor([1.0]), jac=lambda x, p: torch.diag(x), max_steps=2000
    )
    q = torch.tensor([1.3])  # p^4
    assert torch.allclose(objective.gradient(q), 4 * q**3) and torch.allclose(objective.hessian(q).reshape(-1), 12 * q**2)


def test_a_pattern_that_lacks_entries_at_the_solution():
    p = torch.tensor(1.0, requires_grad=True)

    def f(x, p):
        return torch.stack([x[0] + 0.1 * torch.relu(x[1] - 0.5) - p, x[1] - p])

    x = solve_root(f, torch.zeros(2), (p,), jac_sparsity=torch.eye(2), method="chord").x
    with pytest.raises(InvalidInput, match="lacks entries"):
        slope(x, p)


@pytest.mark.filterwarnings("ignore:the sparsity", "ignore:the traced")
def test_a_branch_that_is_met_at_the_solution_only():
    n = 80
    p = torch.tensor(4.0, requires_grad=True)
    weight = torch.linspace(0.1, 0.5, n)

    def f(x, p):
        near = bool(torch.func.debug_unwrap(x.detach(), recurse=True).real.reshape(-1, n)[0, 0] > 1.99)
        return x**2 - p + (weight * (x.roll(1) - x.roll(7) - p + 4) if near else 0 * x)

    got = slope(solve_root(f, torch.full((n,), 1.9), (p,)).x, p)
    J = torch.func.jacrev(lambda x: x**2 - 4 + weight * (x.roll(1) - x.roll(7)))(torch.full((n,), 2.0))
    assert abs(got - torch.linalg.solve(J, 1 + weight).sum().item()) < 1e-8


def test_totals_that_are_none():
    lucky = lambda x: torch.stack([x[0] - 3, x[1] - 1])  # the sum vanishes at the guess  # noqa: E731
    with pytest.raises(InvalidInput, match="not conserved"):
        solve_root(lucky, torch.tensor([2.0, 2.0]), conserved=torch.ones(1, 2))
    product = lambda x: torch.stack([x[0] * x[1] - 1, 1 - x[0] * x[1] + 1e-3 * (x[0] - 2) * (x[0] - 0.4)])  # noqa: E731
    with pytest.raises(InvalidInput, match="not conserved"):
        solve_root(product, torch.tensor([2.0, 0.5]), conserved=torch.ones(1, 2))


def dimer(x, p):
    return torch.stack([-x[0] * p + 2 * x[1] ** 2, x[0] * p - 2 * x[1] ** 2])


@pytest.mark.parametrize("weights", [[[1.0, 1.0]], [1.0, 1.0], torch.ones(1, 2), ([[1.0, 1.0]], [1.0]), (torch.ones(2), torch.tensor(1.0))])
def test_forms_of_totals_also_inside_of_transforms(weights):
    solve = lambda p: solve_root(dimer, torch.tensor([1.0, 0.0]), (p,), conserved=weights).x[0]  # noqa: E731
    p = torch.tensor(1.0)
    exact = lambda p: 1 - (-p + torch.sqrt(p**2 + 8 * p)) / 4  # noqa: E731
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert torch.allclose(transform(solve)(p), transform(exact)(p))
    assert torch.allclose(torch.vmap(solve)(torch.stack([p, 2 * p])), exact(torch.stack([p, 2 * p])))


@pytest.mark.parametrize("form", [lambda m: m, lambda m: m.tolist(), lambda m: m.to_sparse(), lambda m: sp.csr_array(m.numpy())])
def test_patterns_inside_of_transforms(form):
    pattern = form(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    solve = lambda p: solve_root(  # noqa: E731
        lambda x, p: torch.stack([x[0] ** 2 - p, x[1] * p - x[0]]), torch.ones(2), (p,), jac_sparsity=pattern
    ).x[1]
    p = torch.tensor(2.0)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert torch.allclose(transform(solve)(p), transform(lambda p: p**-0.5)(p))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("n", [3, 90])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_matrices_in_the_function(layout, n):
    p = torch.tensor(1.5, requires_grad=True)
    dense = 2 * torch.eye(n) + torch.diag(torch.ones(n - 1), 1)
    A = getattr(dense, layout)()
    got = slope(solve_root(lambda x, p: A @ x - p * torch.ones(n), torch.zeros(n), (p,)).x, p)
    assert abs(got - torch.linalg.solve(dense, torch.ones(n)).sum().item()) < 1e-9


def test_a_linear_solver_that_does_not_converge_is_no_singular_jacobian():
    p = torch.tensor(1.5, requires_grad=True)
    f = lambda x, p: torch.logspace(0, 8, 60) * x**3 + x.flip(0) * 1e3 - p  # noqa: E731
    with pytest.raises(RootError, match="linear solver") as caught:
        solve_root(f, torch.ones(60), (p,), method="newton", linear_solver=adjoint.linalg.GMRES(max_iterations=3))
    assert not isinstance(caught.value, SingularJacobian)


def _rosenbrock(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@pytest.mark.parametrize(
    "lower, upper, start",
    [(None, [0.5, 10.0], [-1.0, 2.0]), ([1.5, -10.0], None, [1.7, 3.0]), ([-2.0, 2.0], None, [1.7, 3.0]), (None, [0.5, 0.1], [0.3, 0.05])],
)
def test_least_squares_at_a_bound(lower, upper, start):
    bounds = [torch.full((2,), s * float("inf")) if b is None else torch.tensor(b) for b, s in ((lower, -1), (upper, 1))]
    want = scipy.optimize.least_squares(
        lambda x: _rosenbrock(torch.tensor(x)).numpy(), start, bounds=[b.numpy() for b in bounds], xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    shift = torch.zeros((), requires_grad=True)
    x = solve_root(lambda x, s: _rosenbrock(x) + s, torch.tensor(start), (shift,), least_squares=True, bounds=tuple(bounds)).x
    assert torch.allclose(x, torch.as_tensor(want.x), rtol=1e-5) and _rosenbrock(x).square().sum() / 2 <= want.cost * (1 + 1e-12)
    with pytest.raises(UnsupportedCombination, match="lies at a bound"):
        x.sum().backward()


def test_sparse_least_squares_are_the_dense_ones():
    n = 200
    k = torch.arange(1.0, n + 1) / n

    def fun(x, k):
        return torch.cat([x**2 - k, 0.1 * (x[1:] - x[:-1])])

    k.requires_grad_()
    sparse = solve_root(fun, torch.ones(n), (k,), least_squares=True)
    assert "sparse: " in sparse.note
    dense = solve_root(fun, torch.ones(n), (k,), least_squares=True, linear_solver=DenseLU())
    assert torch.allclose(sparse.x, dense.x, rtol=1e-8) and abs(sparse.stats.n_steps - dense.stats.n_steps) <= 1
    # a minimum: perturbations do not lower the sum of squares
    with torch.no_grad():
        assert all(fun(sparse.x + 1e-3 * torch.randn(n), k).norm() > fun(sparse.x, k).norm() for _ in range(5))
    assert torch.allclose(torch.autograd.grad(sparse.x.sum(), k)[0], torch.autograd.grad(dense.x.sum(), k)[0], rtol=1e-6)


def test_levenberg_marquardt_on_a_large_diagonal_stays_sparse(monkeypatch):
    monkeypatch.setattr("adjoint.nonlinear.trust_region.as_dense", None)
    k = torch.arange(1.0, 2001.0)
    x = solve_root(lambda x: x**3 + x - k, torch.ones(2000), method="levenberg_marquardt").x
    assert torch.allclose(x**3 + x, k, rtol=1e-12)
    bounds = (None, torch.full((2000,), 5.0))
    x = solve_root(lambda x: x**3 + x - k, torch.ones(2000), least_squares=True, bounds=bounds).x
    want = torch.minimum(x, torch.tensor(5.0))
    assert torch.equal(x, want) and torch.allclose((x**3 + x)[x < 5], k[x < 5]) and int((x == 5).sum()) in (1870, 1871)


def test_singular_but_consistent_at_the_start():
    two = lambda z: torch.stack([(z[0] - 1) ** 2, (z[1] - 2) ** 2])  # noqa: E731
    found = solve_root(two, torch.tensor([2.0, 2.0]))
    assert found.status == 0 and torch.allclose(found.x, torch.tensor([1.0, 2.0]), atol=1e-6)
    line = lambda z: torch.stack([z[0] ** 2 - z[1], (z[1] - 4) * (z[0] + 1)])  # noqa: E731
    found = solve_root(line, torch.tensor([-1.0, 4.0]), method="auto")
    assert torch.allclose(line(found.x), torch.zeros(2), atol=1e-9)
    circle = lambda z: torch.stack([z.square().sum() - 1, 2 * z.square().sum() - 2])  # noqa: E731
    with pytest.raises(SingularJacobian, match="one of many"):
        solve_root(circle, torch.tensor([0.5, 0.0]))
