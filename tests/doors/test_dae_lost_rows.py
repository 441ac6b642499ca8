"""Trajectories of implicit equations that cannot start, beside others that can: those are what they are without them."""

from __future__ import annotations

import pytest
import torch

from adjoint import ForwardSensitivity, InconsistentInitialCondition, solve_dae, solve_ivp

nan, inf = float("nan"), float("inf")
P, S = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64), torch.tensor([1.0, 1.2, 0.8], dtype=torch.float64)
Y = torch.tensor([[1.0, 0.8], [1.2, 1.0], [0.8, 1.0]], dtype=torch.float64)
Q = torch.tensor([1.0, 0.3], dtype=torch.float64)
#: which parameter is what, and for which trajectory
BAD = {
    "nan": (0, nan, 1),
    "inf": (0, inf, 0),
    "no root": (0, -50.0, 2),
    "singular": (1, 0.0, 0),
    "factor": (1, nan, 2),
    "state": (2, nan, 0),
}


def rate(x, z, p, q):
    return -p * x * z * q[0]


def constraint(x, z, p, s, q):
    return s * (z**2 + z) - q[1] * x - p


def implicit(t, y, yp, p, s, q):
    x, z = y.unbind(-1)
    return torch.stack([yp[..., 0] - rate(x, z, p, q), constraint(x, z, p, s, q)], -1)


def turned(t, y, yp, p, s, q):
    """The same in other unknowns and equations, none of them algebraic by itself."""
    turn = torch.tensor([[1.0, 0.3], [-0.2, 1.0]], dtype=torch.float64)
    a, b = implicit(t, y @ turn.mT, yp @ turn.mT, p, s, q).unbind(-1)
    return torch.stack([a + b, a - 2 * b], -1)


def explicit(t, y, p, s, q):
    x, z = y.unbind(-1)
    return torch.stack([rate(x, z, p, q), constraint(x, z, p, s, q)], -1)


def held(t, y, yp, p, s, q):
    """Of index 2."""
    x, v, force = y.unbind(-1)
    return torch.stack([yp[..., 0] + p * x * q[0] - force * s, yp[..., 1] - x * v * q[1] - force * s, x + v - 2.0], -1)


def solved(form, p, s, q, y, **options):
    options = {"rtol": 1e-5, "atol": 1e-7, "first_step": 0.05, "throw": False, "batched": True, "t_eval": [0.0, 0.2, 0.5]} | options
    if form in ("rodas5p", "bdf"):
        options |= {"method": form, "mass_matrix": torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))}
        return solve_ivp(explicit, (0.0, 0.5), y, args=(p, s, q), **options)
    if form == "captured":
        return solve_dae(lambda t, y, yp, q: implicit(t, y, yp, p, s, q), (0.0, 0.5), y, args=(q,), **options)
    if form == "held":
        y = torch.stack([y[:, 0], 2.0 - y[:, 0], y[:, 1]], -1)
        return solve_dae(held, (0.0, 0.5), y, args=(p, s, q), **options)
    if form == "slopes":
        slope = torch.stack([-0.4 * y[:, 1], 0 * y[:, 1]], -1)
        return solve_dae(implicit, (0.0, 0.5), y, slope, args=(p, s, q), consistent="slopes", **options)
    return solve_dae(turned if form == "turned" else implicit, (0.0, 0.5), y, args=(p, s, q), **options)


def with_and_without(kind):
    """Inputs with the trajectory, and without; and the others among them."""
    place, value, row = BAD[kind]
    given = [P.clone(), S.clone(), Y.clone()]
    given[place].reshape(3, -1)[row, 0] = value
    others = [i for i in range(3) if i != row]
    p, s, y = given
    return (p, s, Q, y), (p[others], s[others], Q, y[others]), others, row


def same(found, true, others):
    for i, (a, b) in enumerate(zip(found, true, strict=True)):
        a = a if i == 2 else a[others]
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


FORMS = ["implicit", "captured", "turned", "slopes", "rodas5p", "bdf", "held"]
CASES = [(form, kind) for i, form in enumerate(FORMS) for kind in (BAD if form == "implicit" else ["nan", list(BAD)[1 + i % 5]])]


@pytest.mark.parametrize(("form", "kind"), [*(c for c in CASES if c[0] != "held"), ("held", "nan"), ("held", "singular")])
def test_values_and_derivatives_of_the_others(form, kind):
    given, fewer, others, row = with_and_without(kind)

    def loss(rows, out, *x):
        sol = solved(form, *x)
        out.append(sol)
        return (sol.y[1:, rows] ** 2).sum() + sol.y[-1, rows].prod(-1).sum()

    def all_of(x, rows):
        own, out = [v.clone().requires_grad_() for v in x], []
        first = torch.autograd.grad(loss(rows, out, *own), own, create_graph=True)
        asked = sum((g if i == 2 else g[rows]).square().sum() for i, g in enumerate(first))
        return out[0], [g.detach() for g in first], torch.autograd.grad(asked, own)

    sol, first, second = all_of(given, others)
    less, first_true, second_true = all_of(fewer, slice(None))
    assert int(sol.status[row]) < 0 and bool((sol.status[others] == 0).all())
    assert not bool(torch.isfinite(sol.y[-1, row]).any())
    torch.testing.assert_close(sol.y[:, others], less.y, rtol=1e-9, atol=1e-11)
    same(first, first_true, others)
    same(second, second_true, others)


@pytest.mark.parametrize("kind", ["nan", "no root", "state"])
@pytest.mark.slow_cases("nan", "no root")
def test_forward_mode_and_maps(kind):
    given, fewer, others, _ = with_and_without(kind)
    every, ways = slice(None), [torch.ones_like(x) for x in given]
    loose = {"rtol": 1e-3, "atol": 1e-5}

    def loss(rows, gradient=None):
        return lambda *x: (solved("implicit", *x, **loose, gradient=gradient).y[1:, rows] ** 2).sum()

    short = [torch.ones_like(x) for x in fewer]
    for gradient in (None, ForwardSensitivity()):
        found = torch.func.jvp(loss(others, gradient), given, tuple(ways))[1]
        torch.testing.assert_close(found, torch.func.jvp(loss(every, gradient), fewer, tuple(short))[1], rtol=1e-8, atol=1e-10)
    by_all = (0, 1, 2, 3)
    found = torch.func.jvp(torch.func.grad(loss(others), argnums=by_all), given, tuple(ways))[1]
    same(found, torch.func.jvp(torch.func.grad(loss(every), argnums=by_all), fewer, tuple(short))[1], others)

    def one(p, s, q, y):
        return (solved("implicit", p[None], s[None], q, y[None], **loose).y[1:] ** 2).sum()

    def of_batch(rows, p, s, q, y):
        return torch.vmap(torch.func.grad(lambda q: loss(rows)(p, s, q, y)))(torch.stack([q, 1.1 * q]))

    torch.testing.assert_close(of_batch(others, *given), of_batch(every, *fewer), rtol=1e-8, atol=1e-10)
    mapped = torch.vmap(torch.func.grad(one, argnums=by_all), (0, 0, None, 0))
    for a, b in zip(mapped(*given), mapped(*fewer), strict=True):
        torch.testing.assert_close(a[others], b, rtol=1e-8, atol=1e-10)


def test_samples_at_the_start_that_move():
    given, fewer, others, _ = with_and_without("nan")

    def slopes(x, rows):
        q, times = x[2].clone().requires_grad_(), torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
        sol = solved("implicit", x[0], x[1], q, x[3], t_eval=times)
        return torch.autograd.grad((sol.y[:, rows] ** 2).sum(), [q, times])

    for a, b in zip(slopes(given, others), slopes(fewer, slice(None)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_none_can_start(compile):
    q = Q.clone().requires_grad_()
    sol = solved("implicit", P * nan, S, q, Y, compile=compile)
    assert sol.status.tolist() == [-3, -3, -3]
    alone = solve_dae(implicit, (0.0, 1.0), Y[0], args=(P[0] * nan, S[0], q), throw=False)
    assert alone.status == -3 and not alone.success


def test_given_values_that_are_not_consistent():
    yp = torch.zeros_like(Y)
    y = torch.stack([Y[:, 0], (-1 + (1 + 4 * (0.3 * Y[:, 0] + P) / S).sqrt()) / 2], -1)
    wrong = y + torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    sol = solve_dae(implicit, (0.0, 1.0), wrong, yp, args=(P, S, Q), batched=True, throw=False)
    assert [int(s) < 0 for s in sol.status] == [False, True, False]
    with pytest.raises(InconsistentInitialCondition, match="of trajectory 1 do not satisfy"):
        solve_dae(implicit, (0.0, 1.0), wrong, yp, args=(P, S, Q), batched=True)


def test_errors_name_the_trajectory():
    (p, s, q, y), *_ = with_and_without("nan")
    with pytest.raises(InconsistentInitialCondition, match="trajectory 1 are not finite"):
        solved("implicit", p, s, q, y, throw=True)
    (p, s, q, y), *_ = with_and_without("singular")
    with pytest.raises(InconsistentInitialCondition, match="trajectory 0: Newton"):
        solved("implicit", p, s, q, y, throw=True)


def test_the_first_trajectory_does_not_speak_for_others():
    """Its mass is zero, so that nothing in it is differentiated."""
    mass = torch.zeros(3, 2, 2, dtype=torch.float64)
    mass[1:, 0, 0] = torch.tensor([1.2, 0.8])

    def last(mass, p, s, y, **options):
        return solve_ivp(explicit, (0.0, 1.0), y, args=(p, s, Q), mass_matrix=mass, batched=True, throw=False, **options)

    for method in ("rodas5p", "radau5"):
        sol = last(mass, P, S, Y, method=method)
        true = last(mass[1:], P[1:], S[1:], Y[1:], method=method)
        assert int(sol.status[0]) < 0
        torch.testing.assert_close(sol.y[:, 1:], true.y, rtol=1e-6, atol=1e-8)
        mapped = torch.vmap(lambda m, p, s, y, by=method: last(m[None], p[None], s[None], y[None], method=by).y[-1, 0])
        torch.testing.assert_close(mapped(mass, P, S, Y)[1:], true.y[-1], rtol=1e-6, atol=1e-8)
