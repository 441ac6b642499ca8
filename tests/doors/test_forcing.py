"""Inputs by tables: values against SciPy, solves against closed forms, derivatives in knots and values, everywhere."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.interpolate
import torch
from torch.utils._pytree import tree_map

import adjoint
from adjoint import Forcing, Schedule, solve_dae, solve_ivp

#: all native solves here are
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

FINE = {"rtol": 1e-9, "atol": 1e-11}
#: of implicit methods, whose steps are of fifth order
FAIR = {"rtol": 1e-8, "atol": 1e-10}
TIMES, VALUES = [0.2, 0.5, 0.9, 1.4], [1.0, -0.5, 2.0, 0.3]


def values(*numbers):
    return [torch.tensor(x, requires_grad=True) for x in numbers]


def relax(t, y, k, u):
    return -k * y + u(t).unsqueeze(-1)


def response(end, k, times, table, kind):
    """``int exp(-k (end - s)) u(s) ds`` in closed form for constant and linear tables."""
    ends = [torch.zeros(()), *times, torch.tensor(end)]
    levels = [table[0], *table, table[-1]]
    total = 0.0
    for j in range(len(ends) - 1):
        a, b = ends[j], torch.minimum(ends[j + 1], torch.tensor(end))
        if float(a) >= end:
            break
        low = levels[j]
        slope = torch.zeros(()) if kind == "constant" or j in (0, len(ends) - 2) else (levels[j + 1] - low) / (ends[j + 1] - a)
        decayed = lambda s, a=a, low=low, slope=slope: (-k * (end - s)).exp() * ((low + slope * (s - a)) / k - slope / k**2)  # noqa: E731
        total = total + decayed(b) - decayed(a)
    return total


def agree(found, wanted, inputs, tol=1e-7, second=True):
    assert torch.allclose(found, wanted, rtol=tol, atol=tol)
    one, other = (
        torch.autograd.grad(x.sum(), inputs, create_graph=second, retain_graph=True, materialize_grads=True) for x in (found, wanted)
    )
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=tol, atol=tol), (one, other)
    if second:
        one, other = (
            torch.autograd.grad(sum((x**2).sum() for x in xs), inputs, retain_graph=True, materialize_grads=True) for xs in (one, other)
        )
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=1000 * tol, atol=1000 * tol), (one, other)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["constant", "linear", "cubic"])
def test_values(kind, own):
    """Against SciPy, within the table and beyond, of one table and of one for each trajectory."""
    t = torch.linspace(0.0, 1.6, 33)
    known = {
        "constant": lambda t: np.array(VALUES)[np.clip(np.searchsorted(TIMES, t, side="right") - 1, 0, 3)],
        "linear": lambda t: np.interp(t, TIMES, VALUES),
        "cubic": scipy.interpolate.CubicSpline(TIMES, VALUES, bc_type="natural"),
    }[kind]
    wanted = torch.tensor(known(np.clip(t.numpy(), TIMES[0], TIMES[-1])))
    times, table = torch.tensor(TIMES), torch.tensor(VALUES)
    if own:
        times, table = (torch.stack([x] * len(t), 1) for x in (times, table))
    assert torch.allclose(Forcing(times, table, kind)(t), wanted, atol=1e-14)
    pairs = torch.stack([table, 2 * table], -1)
    assert torch.allclose(Forcing(times, pairs, kind)(t), torch.stack([wanted, 2 * wanted], -1), atol=1e-14)
    if not own:
        assert torch.allclose(Forcing(TIMES, VALUES, kind)(torch.tensor(0.7)), torch.tensor(float(known(0.7))))


@pytest.mark.parametrize(
    "kind, method",
    [(kind, method) for kind in ("constant", "linear") for method in ("dopri5", "rodas5p", "native dopri5", "native rodas5p")]
    + [("constant", "radau5"), pytest.param("linear", "radau5", marks=pytest.mark.slow)],
)
@pytest.mark.slow_cases("linear-dopri5", "linear-native rodas5p")
def test_knots_are_ends_of_steps(kind, method):
    """Derivatives in knots and values to the second, those of jumps too."""
    native, method = method.startswith("native"), method.removeprefix("native ")
    k, times, table = p = values(0.8, TIMES, VALUES)
    u, options = Forcing(times, table, kind), {"method": method, **(FAIR if method == "rodas5p" else FINE)}
    sol = solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, u), t_eval=[0.7, 1.2], compile=native, **options)
    wanted = torch.stack([response(t, *p, kind) for t in (0.7, 1.2)])
    agree(sol.y[:, 0], wanted, p)
    steps = solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, u), t_eval="steps", **options)
    assert all(bool(((steps.t - t).abs() < 1e-12).any()) for t in TIMES[:3])


def test_a_spline_by_forward_mode_differentiated_once_more():
    k, dot = torch.tensor(TIMES), torch.tensor([0.3, -0.2, 0.5, 0.7])
    value = lambda k: Forcing(k, torch.tensor(VALUES), "cubic")(torch.tensor([0.6, 1.0])).sum()  # noqa: E731
    over = torch.func.grad(lambda k: torch.func.jvp(value, (k,), (dot,))[1])(k)
    h = 1e-5
    differences = (torch.func.grad(value)(k + h * dot) - torch.func.grad(value)(k - h * dot)) / (2 * h)
    assert torch.allclose(over, differences, rtol=1e-7, atol=1e-7)


def test_a_spline():
    """Its differentiated knots and values, against differences of tight solves."""
    p = values(0.8, TIMES, VALUES)

    def end(k, times, table):
        return solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, Forcing(times, table, "cubic")), method="verner7", **FINE).y[-1, 0]

    assert torch.autograd.gradcheck(end, p, eps=1e-4, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("native", [False, True])
def test_tables_of_each_trajectory(native):
    k = torch.tensor([0.8, 1.1], requires_grad=True)
    times = torch.stack([torch.tensor(TIMES), torch.tensor(TIMES) + 0.1], 1).requires_grad_()
    table = torch.stack([torch.tensor(VALUES), -torch.tensor(VALUES)], 1).requires_grad_()
    fun = lambda t, y, k, u: -k.unsqueeze(-1) * y + u(t).unsqueeze(-1)  # noqa: E731
    sol = solve_ivp(
        fun, (0.0, 1.2), torch.zeros(2, 1), (k, Forcing(times, table, "constant")), batched=True, compile=native, method="dopri5", **FINE
    )
    wanted = torch.stack([response(1.2, k[i], times[:, i], table[:, i], "constant") for i in (0, 1)])
    agree(sol.y[-1, :, 0], wanted, [k, times, table])


@pytest.mark.parametrize("kind", ["linear", "cubic", "constant", "schedule"])
def test_tables_of_different_lengths_are_padded_with_nan(kind):
    """In a batch and under `torch.vmap` they are the tables alone, values and derivatives."""
    lone, nan = int(kind == "schedule"), float("nan")
    times = torch.tensor([[0.2, 0.3], [0.5, 0.9], [0.9, nan], [1.4, nan]])
    levels = torch.tensor([[1.0, 0.5], [-0.5, 2.0], [2.0, nan], [0.3, nan], [0.7, nan]])
    levels = levels[: 4 + lone].clone()
    levels[2, 1] = 1.5 if lone else nan
    k, ends, counts = torch.tensor(0.7, requires_grad=True), torch.tensor([1.2, 2.0]), (4, 2)

    def made(times, levels):
        return Schedule(times, levels) if lone else Forcing(times, levels, kind)

    def alone(j, times, levels):
        u = made(times[: counts[j], j], levels[: counts[j] + lone, j])
        return solve_ivp(relax, (0.0, ends[j]), torch.zeros(1), args=(k, u), **FINE).y[-1]

    def batched(times, levels):
        return solve_ivp(relax, (0.0, ends), torch.zeros(2, 1), args=(k, made(times, levels)), batched=True, **FINE).y[-1]

    def mapped(times, levels):
        one = lambda s, x, end: solve_ivp(relax, (0.0, end), torch.zeros(1), args=(k, made(s, x)), **FINE).y[-1]  # noqa: E731
        return torch.vmap(one, (1, 1, 0))(times, levels, ends)

    given = [times.requires_grad_(), levels.requires_grad_(), k]
    want = torch.stack([alone(j, times, levels) for j in range(2)])
    slopes = torch.autograd.grad(want.square().sum(), given)
    for found in (batched, mapped):
        got = found(times, levels)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), given), slopes, rtol=1e-6, atol=1e-8)


def test_captured():
    """By a closure or a module, where the times of its jumps are found as well."""
    k, times, table = p = values(0.8, TIMES, VALUES)
    u = Forcing(times, table, "constant")
    agree(
        solve_ivp(lambda t, y: relax(t, y, k, u), (0.0, 1.2), torch.zeros(1), method="dopri5", **FINE).y[-1, 0],
        response(1.2, *p, "constant"),
        p,
    )

    class Driven(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.input = u

        def forward(self, t, y):
            return relax(t, y, k, self.input)

    agree(solve_ivp(Driven(), (0.0, 1.2), torch.zeros(1), method="dopri5", **FINE).y[-1, 0], response(1.2, *p, "constant"), p)

    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.parts = torch.nn.ModuleList([inner])

        def forward(self, t, y):
            return self.parts[0](t, y)

    for inner in (Driven(), Around(Around(Driven()))):
        layer = adjoint.nn.NeuralODE(inner, t_span=(0.0, 1.2), time_dependent=True, method="dopri5", **FINE)
        agree(layer(torch.zeros(1))[0], response(1.2, *p, "constant"), p)


def test_implicit_equations_and_mass_matrices():
    k, times, table = p = values(0.8, TIMES, VALUES)
    u = Forcing(times, table, "constant")
    wanted = response(1.2, *p, "constant")
    dae = solve_dae(lambda t, y, yp, k, u: yp - relax(t, y, k, u), (0.0, 1.2), torch.zeros(1), args=(k, u), **FAIR)
    agree(dae.y[-1, 0], wanted, p, second=False)
    for method in ("radau5", "rodas5p"):
        mass = solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, u), mass_matrix=torch.eye(1), method=method, **FAIR)
        agree(mass.y[-1, 0], wanted, p, second=False)


def test_between_events():
    """Knots end steps in every round."""
    k, times, table = p = values(0.8, TIMES, VALUES)
    event = adjoint.Event(lambda t, y, k, u: t - 0.6, reset=lambda t, y, k, u: y + 1.0)
    sol = solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, Forcing(times, table, "constant")), events=event, method="dopri5", **FINE)
    agree(sol.y[-1, 0], response(1.2, *p, "constant") + (-k * 0.6).exp(), p)


def test_between_events_of_mapped_states():
    k, table = torch.tensor(0.8), Forcing(TIMES, VALUES, "constant")
    event = adjoint.Event(lambda t, y, k: y[0] - 0.5, direction=-1, reset=lambda t, y, k: y + 1.0)
    fun = lambda t, y, k: table(t) - k * y  # noqa: E731
    end = lambda y0: solve_ivp(fun, (0.0, 1.2), y0, (k,), events=event, **FINE).y[-1]  # noqa: E731
    starts = torch.tensor([[0.6], [0.7]])
    assert torch.allclose(torch.vmap(end)(starts), torch.stack([end(y0) for y0 in starts]), atol=1e-9)


def test_vmap_and_user_jumps():
    k, times = torch.tensor(0.8), torch.tensor(TIMES)
    tables = torch.tensor([VALUES, [1.0, 1.0, 1.0, 1.0]])
    end = lambda v: solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, Forcing(times, v, "constant")), step_ts=[0.3], **FINE).y[-1, 0]  # noqa: E731
    found = torch.vmap(end)(tables)
    assert torch.allclose(found, torch.stack([response(1.2, k, times, v, "constant") for v in tables]), atol=1e-7)
    assert torch.allclose(torch.func.jacrev(end)(tables[0]), torch.func.jacfwd(end)(tables[0]), atol=1e-9)


def switched(end, k, times, levels):
    """As `response`, of a schedule."""
    ends = [torch.zeros(()), *times, torch.tensor(end)]
    total = 0.0
    for a, b, level in zip(ends, ends[1:], levels, strict=False):
        total = total + level / k * ((-k * (end - b)).exp() - (-k * (end - a)).exp())
    return total


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("radau5", "bdf")]


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "rodas5p", *SLOW, "abm", "native tsit5", "native rodas5p"])
@pytest.mark.slow_cases("native rodas5p", "abm")
def test_a_schedule(method):
    """First and second derivatives in its times and values, in arguments and captured."""
    name = method.split()[-1]
    options = {"method": name, "compile": method != name, **(FAIR if name == "rodas5p" else FINE)}
    k, times, levels = p = values(0.8, [0.2, 0.5, 0.9], [1.0, -0.5, 2.0, 0.3])
    tol = 1e-6 if name in ("bdf", "abm") else 1e-7
    wanted = switched(1.2, *p)
    agree(solve_ivp(relax, (0.0, 1.2), torch.zeros(1), (k, Schedule(times, levels)), **options).y[-1, 0], wanted, p, tol)
    u = Schedule(times, levels)
    agree(solve_ivp(lambda t, y: relax(t, y, k, u), (0.0, 1.2), torch.zeros(1), **options).y[-1, 0], wanted, p, tol)


def test_schedules_of_each_trajectory_and_of_implicit_equations():
    k, times, levels = p = values([0.8, 1.2], [[0.2, 0.1], [0.5, 0.7]], [[1.0, 2.0], [-0.5, 0.0], [0.3, 1.0]])
    fun = lambda t, y, k, u: -k.unsqueeze(-1) * y + u(t).unsqueeze(-1)  # noqa: E731
    wanted = torch.stack([switched(1.2, k[i], times[:, i], levels[:, i]) for i in (0, 1)])
    given = ((0.0, 1.2), torch.zeros(2, 1))
    for native in (False, True):
        sol = solve_ivp(fun, *given, (k, Schedule(times, levels)), batched=True, method="dopri5", compile=native, **FINE)
        agree(sol.y[-1, :, 0], wanted, p)
    residual = lambda t, y, yp, k, u: yp - fun(t, y, k, u)  # noqa: E731
    sol = solve_dae(residual, *given, args=(k, Schedule(times, levels)), batched=True, **FAIR)
    agree(sol.y[-1, :, 0], wanted, p, second=False)


def test_values_of_a_schedule():
    """On either side of its times; without a time; as a pytree, and backwards."""
    u = Schedule([1.0, 2.0], [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]])
    assert u(torch.tensor([0.5, 1.0, 1.5, 2.0, 9.0]))[:, 0].tolist() == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert u.values.shape == (3, 2) and u.times.shape == (2,)
    again = torch.utils._pytree.tree_map(lambda x: 2 * x, u)
    assert again(torch.tensor(3.0)).tolist() == [4.0, 12.0]
    assert float(Schedule([], [4.0])(torch.tensor(0.3))) == 4.0
    sol = solve_ivp(lambda t, y, u: u(t)[:1], (3.0, 0.0), torch.zeros(1), (u,), **FINE)
    assert abs(float(sol.y[-1, 0]) + 6.0) < 1e-12


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Schedule([0.0, 1.0], [1.0, 2.0]), "3 values"),
        (lambda: Schedule([1.0, 0.0], [1.0, 2.0, 3.0]), "increase"),
        (lambda: Schedule([0.0, 1.0], [1.0, 2.0, 3.0, 4.0]), "one more than times"),
        (lambda: Forcing([0.0, 1.0], [1.0, 2.0], "square"), "kind"),
        (lambda: Forcing([1.0, 0.0], [1.0, 2.0]), "increase"),
        (lambda: Forcing([0.0, 1.0], [1.0]), "values"),
        (lambda: Forcing([0.0], [1.0]), "at least 2"),
        (lambda: Forcing([0.0, 0.0], [1.0, 2.0], "constant"), "increase"),
        (lambda: Forcing([0.0, float("nan"), 1.0], [1.0, 2.0, 3.0]), "behind the last"),
        (lambda: Forcing([[0.0, 0.0], [1.0, float("nan")]], torch.ones(2, 2)), "at least 2 of them"),
    ],
)
def test_wrong_tables(make, match):
    with pytest.raises(adjoint.InvalidInput, match=match):
        make()


def test_a_linear_table_that_jumps():
    u = Forcing([0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 3.0, 3.0])
    assert u(torch.tensor([0.25, 0.5, 0.75])).tolist() == [0.5, 3.0, 3.0]
    sol = solve_ivp(lambda t, y, u: u(t).reshape(1), (0.0, 1.0), torch.zeros(1), (u,), **FINE)
    assert abs(float(sol.y[-1, 0]) - 1.75) < 1e-12


def test_the_same_solve_again():
    """With other knots, by native code that knows the solve already: in arguments and captured."""
    k = torch.tensor(0.8)
    for shift in (0.0, 0.01, 0.02):
        times, table = (torch.tensor(TIMES) + shift).requires_grad_(), torch.tensor(VALUES, requires_grad=True)
        u = Forcing(times, table, "constant")
        for fun, args in ((relax, (k, u)), (lambda t, y, u=u: -k * y + u(t).unsqueeze(-1), ())):
            sol = solve_ivp(fun, (0.0, 1.2), torch.zeros(1), args, compile=True, method="dopri5", **FINE)
            agree(sol.y[-1, 0], response(1.2, k, times, table, "constant"), [times, table], second=False)


def algebraic(t, y, k, u):
    """``y[1]`` jumps where the table does."""
    a, z = y.unbind(-1)
    return torch.stack([u(t) - k * a, z - a - u(t)], -1)


def implicit(t, y, yp, k, u):
    slope, constraint = algebraic(t, y, k, u).unbind(-1)
    return torch.stack([yp[..., 0] - slope, constraint], -1)


FORMS = ["radau", "bdf", "radau batched", "radau native", "rodas5p", "radau5 native"]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_knots_at_the_ends_of_the_span(form, backwards):
    """They are seen from within it, in samples, steps and dense output; a sample at one within the span is on the side that is left."""
    method, *how = form.split()
    k, knots, levels = torch.tensor(0.8), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1.0, -2.0, 5.0])
    ends = [torch.tensor(0.5)]
    for level, length in ((levels[0], 0.4), (levels[1], 0.6)):
        ends.append(level / k + (ends[-1] - level / k) * torch.exp(-k * length))
    wanted = torch.stack([torch.stack([y, y + u]) for y, u in zip(ends, levels[[0, 1, 1] if backwards else [0, 0, 1]], strict=True)])
    span, times, wanted = ((1.0, 0.0), [1.0, 0.4, 0.0], wanted.flip(0)) if backwards else ((0.0, 1.0), [0.0, 0.4, 1.0], wanted)
    y0 = torch.stack([wanted[0, 0], torch.tensor(0.0)])
    y0 = torch.stack([y0, y0]) if "batched" in how else y0
    options = {"args": (k, Forcing(knots, levels, "constant")), "batched": "batched" in how, "compile": "native" in how}
    options |= {"rtol": 1e-9, "atol": 1e-11, "method": method, "dense_output": True}

    def solve(t_eval):
        if method in ("radau", "bdf"):
            return solve_dae(implicit, span, y0, t_eval=t_eval, **options)
        return solve_ivp(algebraic, span, y0, mass_matrix=torch.diag(torch.tensor([1.0, 0.0])), t_eval=t_eval, **options)

    sol, steps = solve(times), solve("steps")
    assert steps.t[0].unique().tolist() == [span[0]] and steps.t[-1].unique().tolist() == [span[1]]
    found = [sol.y, sol(torch.tensor(times)), steps.y[[0, -1]]]
    for y, true in zip(found, (wanted, wanted, wanted[[0, -1]]), strict=True):
        true = true.unsqueeze(1).expand_as(y) if "batched" in how else true
        torch.testing.assert_close(y, true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.slow_cases("False")
def test_derivatives_in_a_knot_at_the_end(native):
    """With the end that moves along, the slope is that within; alone it leaves the span, and nothing depends on it."""
    k, levels = torch.tensor(0.8), torch.tensor([1.0, -2.0, 5.0])
    end = torch.tensor(1.0, requires_grad=True)
    for solve, fun, y0 in ((solve_ivp, relax, torch.ones(1)), (solve_dae, implicit, torch.ones(2))):
        knots = torch.tensor([0.0, 0.4, 1.0], requires_grad=True)
        moving = (end, torch.cat([knots[:2].detach(), end.reshape(1)])), (1.0, knots)
        last = [solve(fun, (0.0, e), y0, args=(k, Forcing(x, levels, "constant")), compile=native, **FINE).y[-1] for e, x in moving]
        slope = -0.8 * float(last[0][0]) - 2.0
        first = torch.autograd.grad(last[0].sum(), end, create_graph=True)[0]
        assert float(first) == pytest.approx(len(y0) * slope, rel=1e-7)
        assert float(torch.autograd.grad(first, end)[0]) == pytest.approx(-0.8 * len(y0) * slope, rel=1e-5)
        moved = torch.autograd.grad(last[1][0], knots)[0].tolist()
        assert moved == pytest.approx([0.0, 3.0 * float(torch.exp(-k * 0.6)), 0.0], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("made", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, lambda x: tree_map(torch.clone, x)])
def test_a_table_that_was_made_without_its_constructor_is_found(made, monkeypatch):
    first = Forcing([0.0, 0.4, 2.0], [0.0, 1.0, 3.0], "constant")
    monkeypatch.setattr(Forcing, "met", False)
    table = made(first)
    sol = solve_ivp(lambda t, y: table(t) + 0 * y, (0.0, 1.0), torch.zeros(1, dtype=torch.float64), t_eval="steps")
    assert (sol.t == 0.4).any()
    assert float(sol.y[-1]) == pytest.approx(0.6, abs=1e-12)
