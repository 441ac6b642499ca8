"""`adjoint.continuation`: branches, folds and their derivatives; time integration as the last resort of `solve_root`."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from adjoint import InvalidInput, UnsupportedCombination, continuation, solve_root

from ..helpers.steady_problems import bratu


def cubic(x, lam, a):
    """Folds at ``lam = -+2 (a/3)^(3/2)``, ``x = -+sqrt(a/3)``."""
    return lam - a * x + x**3


def test_cubic_with_two_folds():
    sol = continuation(cubic, torch.tensor([1.0]), (-1.0, 1.0), torch.tensor(1.0), max_step=0.3)
    assert sol.success and sol.status == "end" and float(sol.lam[-1]) == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(cubic(sol.x[:, 0], sol.lam, 1.0), torch.zeros(()), atol=1e-10)
    turn = 2 * 3**-1.5
    assert [float(f.lam) for f in sol.folds] == pytest.approx([turn, -turn], abs=1e-10)
    assert [float(f.x) for f in sol.folds] == pytest.approx([3**-0.5, -(3**-0.5)], abs=1e-7)


def test_derivatives_of_folds_to_second_order():
    a = torch.tensor(1.2, requires_grad=True)
    sol = continuation(cubic, torch.tensor([1.2]), (-1.0, 1.0), (a,))
    fold = sol.fold(0)
    exact = 2 * (a / 3) ** 1.5
    assert torch.allclose(fold.lam, exact, rtol=1e-9) and torch.allclose(fold.x[0], (a / 3).sqrt(), rtol=1e-9)
    (mine,) = torch.autograd.grad(fold.lam, a, create_graph=True)
    (theirs,) = torch.autograd.grad(exact, a, create_graph=True)
    assert torch.allclose(mine, theirs, rtol=1e-9)
    assert torch.allclose(torch.autograd.grad(mine, a)[0], torch.autograd.grad(theirs, a)[0], rtol=1e-7)


def test_points_are_differentiable_roots():
    a = torch.tensor(1.0, requires_grad=True)
    sol = continuation(lambda s, lam, a: {"x": cubic(s["x"], lam, a)}, {"x": torch.tensor(1.0)}, (-1.0, 1.0), (a,))
    k = len(sol.lam) // 4
    lam = sol.lam[k].clone().requires_grad_(True)
    x = sol.root(k, lam).x["x"]
    assert torch.allclose(x, sol.x["x"][k], rtol=1e-9)
    # dx/da = x / (3 x^2 - a), dx/dlam = -1 / (3 x^2 - a)
    slope = 3 * float(x) ** 2 - 1
    assert [float(g) for g in torch.autograd.grad(x, (a, lam))] == pytest.approx([float(x) / slope, -1 / slope], rel=1e-8)


@pytest.mark.parametrize("n", [31, 101])
def test_bratu(n):
    """The fold at 3.5138307... of the continuous problem, dense and sparse; its parameter scales with a coefficient of the exponential."""
    F = bratu(n)
    c = torch.tensor(2.0, requires_grad=True)
    sol = continuation(lambda x, lam, c: F(x, c * lam), torch.zeros(n), (0.5, 3.0), (c,), max_step=0.4, max_points=60)
    assert len(sol.folds) == 1
    fold = sol.fold(0)
    assert float(fold.lam.detach()) == pytest.approx(3.51383071912516 / 2, abs=5e-6)
    (slope,) = torch.autograd.grad(fold.lam, c)
    assert float(slope) == pytest.approx(-float(fold.lam.detach()) / 2, rel=1e-8)


def test_natural_continuation_ends_at_a_fold():
    sol = continuation(cubic, torch.tensor([1.0]), (-1.0, 1.0), torch.tensor(1.0), kind="natural")
    assert sol.status == "step_too_small" and not sol.success and "arclength" in sol.message
    assert float(sol.lam[-1]) == pytest.approx(2 * 3**-1.5, abs=1e-3)


def test_what_is_refused():
    run = lambda **o: continuation(cubic, **({"x0": torch.tensor([1.0]), "lam_span": (-1.0, 1.0), "args": torch.tensor(1.0)} | o))  # noqa: E731
    for options, match in [
        ({"lam_span": 3.0}, "lam_span"),
        ({"lam_span": (1.0, 1.0)}, "lam_end"),
        ({"kind": "magic"}, "kind"),
        ({"x0": torch.tensor([float("nan")])}, "non-finite"),
        ({"x0": torch.tensor([1])}, "x0"),
        ({"linear_solver": "lu"}, "linear_solver"),
    ]:
        with pytest.raises(InvalidInput, match=match):
            run(**options)
    with pytest.raises(InvalidInput, match="callable"):
        continuation(3.0, torch.tensor([1.0]), (0.0, 1.0))
    lost = continuation(lambda x, lam: x**2 + 1 + lam**2, torch.tensor([1.0]), (0.0, 1.0))
    assert lost.status == "no_start" and lost.x.shape == (0, 1)


# --- time integration ---


def brusselator(x, a, b):
    """Its steady state ``(a, b / a)`` is stable for ``b < 1 + a^2``."""
    u, v = x[..., 0], x[..., 1]
    return torch.stack([a - (b + 1) * u + u**2 * v, b * u - u**2 * v], -1)


def test_time_integration_by_name():
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(1.7, requires_grad=True)
    sol = solve_root(brusselator, torch.tensor([30.0, 0.01]), (a, b), method="time_integration")
    assert torch.allclose(sol.x, torch.tensor([1.0, 1.7]), rtol=1e-10) and "time integration" in sol.note
    (bar,) = torch.autograd.grad(sol.x[1], a)
    assert float(bar) == pytest.approx(-1.7, rel=1e-9)


def test_time_integration_finds_the_state_that_the_flow_goes_to():
    """Of three steady states of ``x' = x - x^3`` Newton's method from 0.4 takes another one than the flow does."""
    f = lambda x: x - x**3  # noqa: E731
    x0 = torch.tensor([[0.4], [0.05], [-0.7]])
    sol = solve_root(f, x0, batched=True, method="time_integration")
    assert torch.allclose(sol.x, torch.tensor([[1.0], [1.0], [-1.0]]), atol=1e-10)


def test_stiff_sparse_flow():
    """Diffusion and reaction on 100 points: the pattern is found, and its diagonal is there for the stages."""
    n = 100
    h = 1 / (n + 1)

    def f(u, k):
        padded = torch.nn.functional.pad(u, (1, 1))
        return (padded[2:] - 2 * u + padded[:-2]) / h**2 + k * torch.exp(u)

    sol = solve_root(f, torch.full((n,), 2.0), (torch.tensor(1.0),), method="time_integration")
    reference = solve_root(f, torch.zeros(n), (torch.tensor(1.0),), method="newton")
    assert torch.allclose(sol.x, reference.x, atol=1e-9)


def test_auto_ends_with_time_integration():
    """A tendency that other methods lose their way with: the note says who found the root."""

    def far(x):
        # nearly flat far from the root, with a wiggle that makes minima of the residual
        return -torch.atan(x) * (1 + 0.9 * torch.sin(5 * x)) - 0.02 * x

    sol = solve_root(far, torch.tensor([40.0]), throw=False)
    assert sol.success and abs(float(sol.x)) < 1e-9
    assert math.isfinite(sol.residual_norm) and "time integration found the root" in sol.note and sol.stats.n_fun > 1000


def _end(fun, x0, span, **options):
    branch = continuation(fun, torch.as_tensor(x0), span, **options)
    assert branch.status == "end", branch.status
    return branch, branch.x[-1]


@pytest.mark.parametrize(
    "gap, span, options",
    [
        (1e-2, 1.0, {}),
        (1e-6, 1.0, {}),
        (1e-2, 1.0, {"kind": "natural"}),
        (1e2, 300.0, {"step": 10.0, "max_step": 100.0}),
    ],
)
def test_two_branches_that_turn_away_from_each_other(gap, span, options):
    # x^2 - lam^2 = gap: the line through both arms leads from the upper one to the lower one, with the same direction there
    start = (span**2 + gap) ** 0.5
    _, x = _end(lambda x, lam: x**2 - lam**2 - gap, [start], (-span, span), **options)
    assert abs(float(x) / start - 1) < 1e-9


@pytest.mark.parametrize("n", [2, 100])
def test_an_even_number_of_jumps_at_once(n):
    # the determinant of the bordered matrix has one sign on all branches
    gaps = 0.01 + 0.01 * (torch.arange(n) % 2)
    _, x = _end(lambda x, lam: x**2 - lam**2 - gaps, (1 + gaps).sqrt(), (-1.0, 1.0))
    assert torch.allclose(x, (1 + gaps).sqrt())


def test_imperfect_and_perfect_bifurcations_and_neighbours_in_parallel():
    # the root of x - x^3 + 0.01 that is connected with the one near zero at lam = -1
    _, x = _end(lambda x, lam: lam * x - x**3 + 0.01, [0.01], (-1.0, 1.0))
    assert abs(float(x - x**3 + 0.01)) < 1e-9 and float(x) > 1
    branch, x = _end(lambda x, lam: x * (x - lam), [0.0], (-1.0, 1.0))
    assert float(x) == 0 and branch.x.shape[0] < 10
    below = lambda x, lam: x - lam.sin()  # noqa: E731
    _, x = _end(lambda x, lam: below(x, lam) * (below(x, lam) - 0.1) * (below(x, lam) - 0.2), [-0.9], (-1.2, 1.2))
    assert abs(float(x - torch.tensor(1.2).sin())) < 1e-9


def _dual(function, x, dot):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, dot))).tangent


WAYS = {
    "jvp": lambda function, x, dot: torch.func.jvp(function, (x,), (dot,))[1],
    "dual": _dual,
    "jacrev": lambda function, x, dot: torch.func.jacrev(function)(x) @ dot,
    "jacfwd": lambda function, x, dot: torch.func.jacfwd(function)(x) @ dot,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.slow_cases(
    "False-False-jvp", "False-False-jacrev", "False-True-jacfwd", "False-True-dual", "True-False-jacfwd", "True-True-jacrev",
)
def test_points_and_folds_have_no_derivatives_of_the_search(folds, captures, way):
    """``lam`` of a point moves with the parameters of the search; what a transform sees is the root there, or the fold."""

    def found(a):
        if captures:
            sol = continuation(lambda x, lam: cubic(x, lam, a), torch.ones(1), (-1.0, 1.0))
        else:
            sol = continuation(cubic, torch.ones(1), (-1.0, 1.0), (a,))
        assert not sol.lam.requires_grad and not sol.x.requires_grad
        fold = sol.fold(0)
        return torch.stack([fold.x[0], fold.lam[0] if fold.lam.dim() else fold.lam]) if folds else sol.root(2).x

    a, dot = torch.tensor([1.2]), torch.ones(1)
    if folds:
        want = torch.stack([(a / 3).sqrt() / (2 * a), (a / 3).sqrt()]).squeeze(-1)
    else:
        x = continuation(cubic, torch.ones(1), (-1.0, 1.0), (a,)).x[2]
        want = x / (3 * x**2 - a)
    torch.testing.assert_close(WAYS[way](found, a, dot), want, rtol=1e-6, atol=1e-9)


def test_copies_of_a_vmap_have_branches_of_their_own():
    with pytest.raises(UnsupportedCombination, match="a branch of its own: call continuation outside"):
        torch.vmap(lambda a: continuation(lambda x, lam: cubic(x, lam, a), torch.ones(1), (-1.0, 1.0)).root(2).x)(torch.ones(2, 1))
