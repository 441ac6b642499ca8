"""What Rosenbrock and fully implicit methods must do alike: trusted values of stiff problems, and every kind of derivative."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.methods import CollocationTableau, FullyImplicitRungeKutta
from adjoint.methods.collocation import IMPLICIT_TABLEAUX
from adjoint.methods.tableaux_rosenbrock import ROSENBROCK_TABLEAUX

from ..helpers import stiff_problems as stiff
from ..helpers.problems import check_drawn_to_a_cosine

ROSENBROCK, COLLOCATION = sorted(ROSENBROCK_TABLEAUX), sorted(IMPLICIT_TABLEAUX)
NAMES = [*ROSENBROCK, *COLLOCATION]
#: those without an error estimate, whose steps are given
CONSTANT = [name for name in COLLOCATION if IMPLICIT_TABLEAUX[name].error is None]
#: so loose that nothing is refused, and so tight that what is left of the iterations is rounding
EXACT, TIGHT = {"rtol": 1e30, "atol": 1e30}, {"rtol": 1e-12, "atol": 1e-14}
STIFF = {
    "hires": (stiff.hires, stiff.HIRES_END, stiff.HIRES_Y0, stiff.HIRES),
    "orego": (stiff.orego, 360.0, stiff.OREGO_Y0, stiff.OREGO),
    "vdpol": (stiff.vdpol, 2.0, stiff.VDPOL_Y0, stiff.VDPOL),
}
P, Y0 = (1.3, 4.0), (0.8, -0.4)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def constant(name):
    """A fully implicit method with constant steps, also where it has an error estimate: a function of its arguments that is smooth to
    rounding."""
    tab = IMPLICIT_TABLEAUX[name]
    given = {f.name: getattr(tab, f.name) for f in fields(tab) if f.init}
    return FullyImplicitRungeKutta(CollocationTableau(**(given | {"gamma": None})))


def held(name, size):
    """Options by which all steps have this size."""
    if name in COLLOCATION:
        return {"method": constant(name), "first_step": size} | TIGHT
    return {"method": name, "first_step": size, "max_step": size} | EXACT


def free(name, rtol, atol, size=0.1):
    """Options by which steps are chosen, or have this size where they cannot be."""
    return {"method": name, "rtol": rtol, "atol": atol, "first_step": size if name in CONSTANT else None}


# ---------------------------------------------------------------------------------------------- stiff references


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        *((problem, "rodas5p") for problem in STIFF),
        *(slow(problem, "rodas4") for problem in STIFF),
        *(("hires", "radau5"), slow("orego", "radau5"), slow("vdpol", "radau5")),
    ],
)
@pytest.mark.slow_cases("orego-rodas5p", "hires-rodas5p", "vdpol-rodas5p")
def test_stiff_references(problem, name):
    fun, end, y0, truth = STIFF[problem]
    sol = solve_ivp(fun, (0.0, end), y0, method=name, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sol.y[-1], truth, rtol=1e-7 if name == "radau5" else 1e-5, atol=0)


@pytest.mark.parametrize("name", [slow("rodas4"), "rodas5p", "radau5"])
@pytest.mark.slow_cases("radau5")
def test_rober_over_eleven_decades(name):
    sol = solve_ivp(stiff.rober, (0.0, 1e11), torch.tensor([1.0, 0, 0]), (stiff.ROBER_P,), method=name, rtol=1e-8, atol=1e-18)
    torch.testing.assert_close(sol.y[-1], stiff.ROBER_1E11, rtol=1e-7 if name == "radau5" else 1e-5, atol=0)


@pytest.mark.parametrize(("name", "value", "slope"), [slow("rodas4", 1e-7, 1e-6), ("rodas5p", 1e-7, 1e-6), ("radau5", 1e-8, 1e-7)])
def test_rober_gradients(name, value, slope):
    p = stiff.ROBER_P.clone().requires_grad_()
    sol = solve_ivp(stiff.rober, (0.0, 40.0), torch.tensor([1.0, 0, 0]), (p,), method=name, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(sol.y[-1, :2], stiff.ROBER_40, rtol=value, atol=0)
    for i, expected in enumerate(stiff.ROBER_40_JACOBIAN):
        (found,) = torch.autograd.grad(sol.y[-1, i], p, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=slope, atol=0)


# ---------------------------------------------------------------------------------------------- derivatives


def small(t, y, p):
    t = t.unsqueeze(-1) if t.dim() else t
    return torch.sin(p[..., :1] * y.flip(-1)) - p[..., 1:] * y * torch.cos(t * y)


def loss(options, **more):
    def run(y0, p, start, end, inner):
        times = torch.stack([start + inner, end - inner, end])
        sol = solve_ivp(small, torch.stack([start, end]), y0, (p,), t_eval=times, **options, **more)
        return (sol.y * torch.tensor([[1.0, 0.5], [-0.7, 2.0], [0.3, 1.1]])).sum(-1)

    return run


def arguments():
    """State, parameters, both ends of the span, and a distance from these of samples."""
    numbers = (torch.tensor(Y0), torch.tensor(P), torch.tensor(0.1), torch.tensor(1.05), torch.tensor(0.31))
    return tuple(x.requires_grad_(True) for x in numbers)


@pytest.mark.parametrize("name", NAMES)
def test_discrete_adjoint_is_backprop(name):
    """To rounding, with everything that can be asked for, adaptive steps included."""
    options = held(name, 0.25) if name in CONSTANT else free(name, 1e-4, 1e-5)
    found = []
    for gradient in (DiscreteAdjoint(), Backprop()):
        args = arguments()
        found.append(torch.autograd.grad(loss(options, gradient=gradient)(*args).square().sum(), args))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_cases("rodas4-gradient1", "rodas3p-gradient0")
def test_gradcheck(name, gradient):
    """Of the computed solution, not of the exact one."""
    assert gradcheck(loss(held(name, 0.25 if name in ROSENBROCK else 0.5), gradient=gradient), arguments(), fast_mode=True)


@pytest.mark.parametrize(("name", "size"), [("rodas3p", 0.5), slow("rodas5p", 0.5), ("gl4", 0.6), slow("radau5", 0.6)])
def test_gradgradcheck(name, size):
    assert gradgradcheck(loss(held(name, size)), arguments(), fast_mode=True)


@pytest.mark.parametrize("name", ["rodas3p", slow("rodas5p"), "radauIIA3", slow("radau5"), slow("gl6")])
def test_hessian_in_every_nesting(name):
    y0 = torch.tensor(Y0)

    def value(p):
        return solve_ivp(small, (0.0, 1.0), y0, (p,), **held(name, 0.5)).y[-1].square().sum()

    p = torch.tensor(P)
    step = 1e-4
    eye = torch.eye(2) * step
    differences = torch.stack([(torch.func.grad(value)(p + e) - torch.func.grad(value)(p - e)) / (2 * step) for e in eye])
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in ((forward, forward), (forward, reverse), (reverse, forward), (reverse, reverse)):
        torch.testing.assert_close(outer(inner(value))(p), differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name):
    args = arguments()
    run = loss(held(name, 0.25))
    dots = tuple(torch.randn_like(x) for x in args)
    _, dot = torch.func.jvp(run, tuple(x.detach() for x in args), dots)
    weights = torch.tensor([0.3, -1.0, 2.0])
    grads = torch.autograd.grad((run(*args) * weights).sum(), args)
    expected = sum((g * d).sum() for g, d in zip(grads, dots, strict=True))
    torch.testing.assert_close((dot * weights).sum(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*ROSENBROCK, "radau5", "radauIIA3", "gl4"])
def test_batched_is_one_by_one(name):
    y0 = torch.tensor([Y0, (2.0, 1.0), (-1.0, 0.1)])
    p = torch.tensor([P, (0.5, 30.0), (2.0, 100.0)])
    times = torch.tensor([0.4, 1.0])

    def solve(y0, p, batched):
        return solve_ivp(small, (0.0, 1.0), y0, (p,), batched=batched, t_eval=times, **free(name, 1e-5, 1e-7))

    y0.requires_grad_(True), p.requires_grad_(True)
    together = solve(y0, p, True)
    grads = torch.autograd.grad(together.y.square().sum(), (y0, p))
    values, slopes = ((1e-8, 1e-11), (1e-9, 1e-11)) if name in ROSENBROCK else ((1e-9, 1e-11), (1e-7, 1e-9))
    for b in range(3):
        a, q = y0[b].detach().requires_grad_(True), p[b].detach().requires_grad_(True)
        alone = solve(a, q, False)
        # the loop for one trajectory rounds its step sizes elsewhere
        torch.testing.assert_close(together.y[:, b], alone.y, rtol=values[0], atol=values[1])
        for count in ("n_steps", "n_newton", "n_solves", "n_fun"):
            assert int(getattr(together.stats, count)[b]) == getattr(alone.stats, count), count
        one = torch.autograd.grad(alone.y.square().sum(), (a, q))
        for x, y in zip(grads, one, strict=True):
            torch.testing.assert_close(x[b], y, rtol=slopes[0], atol=slopes[1])


@pytest.mark.parametrize("name", ["rodas4", "radau5", "gl4"])
def test_vmap_of_grad(name):
    y0 = torch.tensor([Y0, (2.0, 1.0), (-1.0, 0.1)])

    def value(y0, p):
        return solve_ivp(small, (0.0, 1.0), y0, (p,), **free(name, 1e-4, 1e-6)).y[-1].square().sum()

    p = torch.tensor(P)
    mapped = torch.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(0, None))(y0, p)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if name in ROSENBROCK else {"rtol": 1e-7, "atol": 1e-9}
    for b in range(3):
        for x, y in zip(mapped, torch.func.grad(value, argnums=(0, 1))(y0[b], p), strict=True):
            torch.testing.assert_close(x[b], y, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_complex_states(name):
    """A holomorphic right-hand side: y' = lam (y - y^2), the logistic equation."""
    lam = torch.tensor(-2.0 + 6.0j, requires_grad=True)
    y0 = torch.tensor([0.6 + 0.2j, 0.3 - 0.1j], dtype=torch.complex128)
    options = free(name, 1e-6, 1e-8, 0.002 if name == "implicit_midpoint" else 0.02)
    sol = solve_ivp(lambda t, y, lam: lam * (y - y * y), (0.0, 1.0), y0, (lam,), **options)

    def truth(lam):
        growth = y0 * torch.exp(lam)
        return growth / (1 - y0 + growth)

    torch.testing.assert_close(sol.y[-1], truth(lam), rtol=1e-4, atol=1e-5)
    weights = torch.tensor([1.0 - 0.5j, 0.2j])
    (found,) = torch.autograd.grad((sol.y[-1] * weights).sum().real, lam)
    (expected,) = torch.autograd.grad((truth(lam) * weights).sum().real, lam)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_and_pytrees(name):
    first_step = 0.01 if name in CONSTANT else None
    check_drawn_to_a_cosine(lambda *problem: solve_ivp(*problem, method=name, first_step=first_step))
