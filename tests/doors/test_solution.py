"""What comes out: words, aliases, honest counts, the solver's own steps and the dense output."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_map

from adjoint import Backprop, DiscreteAdjoint, Event, InterpolatingAdjoint, InvalidInput, solve_ivp
from adjoint.methods import METHODS

from ..helpers.problems import ALL, driven, lotka_volterra, options

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def rotate(t, y, w):
    return w * torch.stack([-y[..., 1], y[..., 0]], -1)


# --- words ---


def test_repr():
    """Status in words, shapes, and what else there is."""
    single = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), t_eval=[0.1, 0.5, 1.0])
    text = repr(single)
    for part in (
        "status: 0",
        single.message,
        "t: (3,)",
        "y: (3, 2) float64",
        f"{single.stats.n_accepted} accepted",
        f"{single.stats.n_fun} eval",
    ):
        assert part in text
    assert "events" not in text and "quadrature" not in text and "dense" not in text
    rich = solve_ivp(
        lambda t, y: -y, (0.0, 1.0), torch.ones(2), dense_output=True, quadrature=lambda t, y: y.sum(), events=lambda t, y: y[0] - 0.5
    )
    assert "events: 1" in repr(rich) and "quadrature: ()" in repr(rich) and "dense output: yes" in repr(rich)
    batched = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(4, 2), batched=True)
    assert "4 trajectories succeeded, 0 failed" in repr(batched) and "(2, 4, 2)" in repr(batched)
    tree = solve_ivp(lambda t, y: tree_map(torch.neg, y), (0.0, 1.0), {"x": torch.ones(3), "v": (torch.ones(()),)})
    assert "'x': (2, 3)" in repr(tree) and "'v': ((2,),)" in repr(tree)


def test_aliases_of_scipy():
    sol = solve_ivp(lambda t, y: -y, (0.0, 2.0), torch.ones(2), events=[lambda t, y: y[0] - 0.5, lambda t, y: y[0] - 3])
    assert sol.nfev == sol.stats.n_fun and sol.success is True and sol.status == 0
    assert [e.numel() for e in sol.t_events] == [1, 0] and [tuple(y.shape) for y in sol.y_events] == [(1, 2), (0, 2)]
    assert sol.t_events[0] is sol.events[0].t and sol.y_events[0] is sol.events[0].y


# --- counts ---


@pytest.mark.parametrize(
    "extra", [{}, {"t_eval": [0.31, 0.77, 1.9]}, {"dense_output": True}, {"step_ts": [0.5, 1.1]}, {"t_eval": "steps"}], ids=str
)
@pytest.mark.parametrize("method", ALL)
def test_counted_calls(method, extra, monkeypatch):
    """``n_fun`` is how often ``fun`` was called, not counting Jacobians (each calls it once), as in SciPy."""
    # nor does it count looks at a solve that has ended for jumps that nobody declared
    monkeypatch.setattr("adjoint.sensitivity.problem.tell_of_jumps", lambda *given: None)
    calls = [0]

    def fun(t, y):
        calls[0] += 1
        return torch.cos(3 * y) * (1 + t)

    with torch.no_grad():
        sol = solve_ivp(fun, (0.0, 2.0), torch.ones(2), **options(method, steps=7, span=2.0), **extra)
    s = sol.stats
    assert s.n_fun + s.n_jac == calls[0] and s.n_steps == s.n_accepted + s.n_rejected and s.n_accepted > 1
    assert METHODS[method].implicit or (s.n_jac, s.n_factorizations, s.n_solves, s.n_newton) == (0, 0, 0, 0)
    assert not METHODS[method].implicit or min(s.n_jac, s.n_factorizations, s.n_solves) > 0
    assert s.n_rejected == 0 or METHODS[method].adaptive


def test_rejections_are_counted():
    """A pulse that the steps run into."""
    sol = solve_ivp(lambda t, y: torch.exp(-((t - 5) ** 2) * 400) + 0 * y, (0.0, 10.0), torch.ones(1), max_step=0.3)
    assert sol.stats.n_rejected > 0 and sol.stats.n_steps == sol.stats.n_accepted + sol.stats.n_rejected
    assert abs(float(sol.y[-1]) - 1 - math.sqrt(math.pi) / 20) < 1e-4


@pytest.mark.parametrize("dense", [False, True])
def test_counts_of_a_batch(dense):
    p, u = torch.rand(3, 4) + 0.5, torch.rand(3, 2) + 0.5
    sol = solve_ivp(lotka_volterra, (0.0, 3.0), u, (p,), batched=True, dense_output=dense)
    s = sol.stats
    assert all(x.shape == (3,) for x in (s.n_steps, s.n_accepted, s.n_rejected, s.n_fun, sol.nfev))
    assert torch.equal(s.n_steps, s.n_accepted + s.n_rejected) and sol.success.tolist() == [True] * 3
    for i in range(3):
        alone = solve_ivp(lotka_volterra, (0.0, 3.0), u[i], (p[i],), dense_output=dense).stats
        assert alone.n_accepted == int(s.n_accepted[i]) and abs(alone.n_fun - int(s.n_fun[i])) <= s.n_rejected[i] + alone.n_rejected


@pytest.mark.parametrize("batched", [False, True])
def test_backward_counts(batched):
    """Zero before, one sweep's worth after each backward; every accepted step is taken back once."""
    p = torch.tensor([1.5, 1.0, 3.0, 1.0], requires_grad=True)
    u = torch.ones(2, 2) if batched else torch.ones(2)
    sol = solve_ivp(lotka_volterra, (0.0, 1.0), u, (p.expand(2, 4) if batched else p,), batched=batched)
    steps = int(torch.as_tensor(sol.stats.n_accepted).max())
    assert (sol.stats.backward.n_steps, sol.stats.backward.n_fun) == (0, 0)
    sol.y.sum().backward(retain_graph=True)
    first = sol.stats.backward.n_fun
    assert sol.stats.backward.n_steps == steps and first >= METHODS["tsit5"].order * steps
    sol.y.sum().backward()
    assert sol.stats.backward.n_steps == 2 * steps and sol.stats.backward.n_fun == 2 * first


# --- the solver's own steps ---


@pytest.mark.parametrize("end", [2.0, -2.0])
@pytest.mark.parametrize("method", ALL)
def test_own_steps(method, end):
    """Monotone, from end to end, as many as were accepted, and on the solution."""
    fine = {"rtol": 1e-8, "atol": 1e-10} if METHODS[method].adaptive and METHODS[method].order > 3 else {}
    sol = solve_ivp(rotate, (0.0, end), torch.tensor([1.0, 0.0]), (1.0,), t_eval="steps", **options(method, 40, 2.0, **fine))
    assert sol.t.shape == (sol.stats.n_accepted + 1,) and bool((sol.t.diff() * end > 0).all())
    assert float(sol.t[0]) == 0.0 and sol.t[-1].item() == end
    tol = 0.1 if METHODS[method].order == 1 else 1e-2 if METHODS[method].order < 4 else 1e-4
    assert torch.allclose(sol.y, torch.stack([sol.t.cos(), sol.t.sin()], -1), atol=tol)
    assert torch.equal(sol.y[-1], solve_ivp(rotate, (0.0, end), torch.tensor([1.0, 0.0]), (1.0,), **options(method, 40, 2.0, **fine)).y[-1])


def test_own_steps_of_a_batch():
    """Padded with NaN behind the last step; each column is that of the trajectory alone."""
    w = torch.tensor([0.5, 8.0, 2.0])
    y0 = torch.tensor([1.0, 0.0]).expand(3, 2)
    t1 = torch.tensor([1.0, 2.0, -1.5])
    fun = lambda t, y, w: rotate(t, y, w.unsqueeze(-1))  # noqa: E731
    sol = solve_ivp(fun, (0.0, t1), y0, (w,), batched=True, t_eval="steps", **TIGHT)
    n = sol.stats.n_accepted + 1
    assert sol.t.shape == (int(n.max()), 3) and sol.y.shape == (int(n.max()), 3, 2)
    for i in range(3):
        alone = solve_ivp(rotate, (0.0, float(t1[i])), y0[i], (w[i],), t_eval="steps", **TIGHT)
        k = int(n[i])
        t = sol.t[:k, i]
        assert alone.t.shape == (k,) and torch.allclose(t, alone.t, atol=1e-6)
        assert torch.allclose(sol.y[:k, i], torch.stack([(w[i] * t).cos(), (w[i] * t).sin()], -1), atol=1e-7)
        assert float(sol.t[k - 1, i]) == float(t1[i]) and bool(sol.t[k:, i].isnan().all()) and bool(sol.y[k:, i].isnan().all())


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
@pytest.mark.parametrize("batched", [False, True])
def test_gradients_of_own_steps(batched, gradient):
    """States of all steps: the closed form's derivative in the rate."""
    w = torch.tensor(1.3, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.0]] if batched else [1.0, 0.0])
    sol = solve_ivp(rotate, (0.0, 2.0), y0, (w,), batched=batched, t_eval="steps", gradient=gradient, **TIGHT)
    t, y = sol.t.reshape(-1), sol.y.reshape(-1, 2)
    weights = torch.linspace(-1, 2, t.numel())
    (got,) = torch.autograd.grad((weights * y[:, 0]).sum(), w)
    assert torch.allclose(got, (weights * -t * torch.sin(w * t)).sum().detach(), rtol=1e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_own_steps_move_with_the_ends(batched):
    """First and last time are the ends, also for derivatives; the last state moves by ``fun``, the first not at all."""
    t0, t1 = torch.tensor(0.2, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.0]] if batched else [1.0, 0.0])
    sol = solve_ivp(rotate, (t0, t1), y0, (1.3,), batched=batched, t_eval="steps", **TIGHT)
    t, y = sol.t.reshape(-1), sol.y.reshape(-1, 2)
    for value, want in [(t[0], (1.0, 0.0)), (t[-1], (0.0, 1.0)), (y[0].sum(), (0.0, 0.0))]:
        got = torch.autograd.grad(value, (t0, t1), retain_graph=True, materialize_grads=True)
        assert torch.stack(got).tolist() == list(want)
    (rate,) = torch.autograd.grad(y[-1, 0], t1)
    assert rate.item() == pytest.approx(-1.3 * math.sin(1.3 * 1.3), rel=1e-7)


# --- dense output ---


def _dense(method, batched, t_span=(0.0, 2.0), **kwargs):
    fine = {"rtol": 1e-8, "atol": 1e-10} if METHODS[method].adaptive and METHODS[method].order > 3 else {}
    y0 = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    p = torch.tensor([[0.7, 0.3], [1.1, 0.2], [0.4, 0.9]], requires_grad=True)
    y0, p = (y0, p) if batched else (y0[0], p[0].detach().requires_grad_())
    return p, solve_ivp(driven, t_span, y0, (p,), batched=batched, dense_output=True, **options(method, 20, 2.0, **fine), **kwargs)


@pytest.mark.parametrize("t_span", [(0.0, 2.0), (2.0, 0.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_dense_output_is_that_of_the_samples(method, batched, t_span):
    """``sol(t)`` and ``t_eval`` agree in values and gradients, at any order of times, repeated ones and ends included."""
    times = torch.tensor([0.0, 0.31, 0.32, 1.0, 1.0, 1.7, 2.0])
    p, sol = _dense(method, batched, t_span)
    q, at = _dense(method, batched, t_span, t_eval=times)
    shuffled = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    got = sol(times[shuffled])
    assert got.shape == at.y.shape and torch.allclose(got, at.y[shuffled], rtol=1e-10, atol=1e-12)
    c = torch.randn_like(at.y)
    (ga,), (gb,) = torch.autograd.grad((c[shuffled] * got).sum(), p), torch.autograd.grad((c * at.y).sum(), q)
    assert torch.allclose(ga, gb, rtol=1e-9, atol=1e-12)


def test_dense_output_forms():
    """``()``, ``(T,)``, numbers; batched also ``(T, B)``; pytrees."""
    _, sol = _dense("tsit5", False)
    assert sol(0.5).shape == (2,) and sol(torch.tensor(0.5)).shape == (2,) and sol([0.5, 0.6]).shape == (2, 2)
    assert torch.equal(sol(torch.tensor([0.5]))[0], sol(0.5)) and torch.equal(sol(1), sol(1.0))
    assert sol(torch.empty(0)).shape == (0, 2)
    _, sol = _dense("tsit5", True)
    times = torch.tensor([[0.1, 0.2, 0.3], [2.0, 0.0, 1.0]])
    assert sol(0.5).shape == (3, 2) and sol(times[0]).shape == (3, 3, 2) and sol(times).shape == (2, 3, 2)
    for i in range(2):
        for b in range(3):
            assert torch.allclose(sol(times)[i, b], sol(times[i, b])[b], rtol=1e-12)
    tree = solve_ivp(lambda t, y: tree_map(torch.neg, y), (0.0, 1.0), {"x": torch.ones(3), "v": (torch.ones(()),)}, dense_output=True)
    assert tree([0.1, 0.2])["x"].shape == (2, 3) and tree(0.1)["v"][0].shape == ()
    assert abs(float(tree(0.3)["v"][0]) - math.exp(-0.3)) < 1e-6


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", [m for m in ALL if METHODS[m].order >= 4])
def test_slope_of_dense_output_is_fun(method, batched):
    p, sol = _dense(method, batched)
    times = torch.tensor([0.05, 0.5, 1.0, 1.99])
    y, slope = torch.func.jvp(sol, (times,), (torch.ones_like(times),))
    for i, t in enumerate(times):
        rate = driven(t.expand(3) if batched else t, y[i], p)
        # on two stages it is a line within each step
        assert torch.allclose(slope[i], rate, rtol=1e-3, atol=1e-3 if method == "gl4" else 1e-4)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("t_span", [(0.0, 2.0), (2.0, 0.0)])
def test_dense_output_has_an_end(batched, t_span):
    _, sol = _dense("tsit5", batched, t_span)
    for outside in (-1e-6, 2.0 + 1e-6, [0.5, 2.5], float("nan")):
        with pytest.raises(InvalidInput, match="t "):
            sol(outside)
    with pytest.raises(InvalidInput):
        sol(torch.zeros(2, 2))


def test_dense_output_of_own_spans():
    """Every trajectory has its own span; asking beyond that of one raises."""
    t1 = torch.tensor([1.0, 2.0, -1.0])
    w = torch.tensor([1.0, 2.0, 3.0])
    fun = lambda t, y, w: rotate(t, y, w.unsqueeze(-1))  # noqa: E731
    sol = solve_ivp(fun, (0.0, t1), torch.tensor([1.0, 0.0]).expand(3, 2), (w,), batched=True, dense_output=True, **TIGHT)
    times = torch.linspace(0, 1, 5).unsqueeze(-1) * t1
    assert torch.allclose(sol(times), torch.stack([(w * times).cos(), (w * times).sin()], -1), atol=1e-7)
    with pytest.raises(InvalidInput):
        sol(0.5)


def test_derivatives_of_dense_output():
    """First and second, in time and in the rate, against the closed form."""
    w = torch.tensor(1.3, requires_grad=True)
    t = torch.tensor([0.4, 1.1], requires_grad=True)
    sol = solve_ivp(rotate, (0.0, 2.0), torch.tensor([1.0, 0.0]), (w,), dense_output=True, max_step=0.05, rtol=1e-11, atol=1e-13)
    value = sol(t)[:, 0].sum()
    gt, gw = torch.autograd.grad(value, (t, w), create_graph=True)
    assert torch.allclose(gt, -w * torch.sin(w * t), atol=1e-7) and torch.allclose(gw, (-t * torch.sin(w * t)).sum(), atol=1e-8)
    (gwt,) = torch.autograd.grad(gt.sum(), w, retain_graph=True)
    (gww,) = torch.autograd.grad(gw, w)
    assert torch.allclose(gwt, (-torch.sin(w * t) - w * t * torch.cos(w * t)).sum(), atol=1e-5)
    assert torch.allclose(gww, (-t * t * torch.cos(w * t)).sum(), atol=1e-7)


def test_dense_output_across_a_jump():
    sol = solve_ivp(lambda t, y: torch.where(t < 0.5, 1.0, -3.0) + 0 * y, (0.0, 1.0), torch.zeros(1), step_ts=[0.5], dense_output=True)
    t = torch.tensor([0.25, 0.5, 0.75, 1.0])
    assert torch.allclose(sol(t)[:, 0], torch.where(t < 0.5, t, 0.5 - 3 * (t - 0.5)), atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_progress_bar(batched, capsys):
    """The bar reaches 100 % and goes to stderr; without it nothing is written."""
    pytest.importorskip("tqdm")
    for progress in (False, True):
        solve_ivp(lambda t, y: -y, (0.0, 5.0), torch.ones(3, 1), batched=batched, progress=progress)
        shown = capsys.readouterr().err
        assert ("100.0/100" in shown) == progress
        assert bool(shown) == progress


def ball(t, y):
    return torch.stack([y[..., 1], 0 * y[..., 1] - 9.81], -1)


def van_der_pol(t, y):
    return torch.stack([y[..., 1], 1e3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", ["rounds", "rounds, continuous adjoint", "phases"])
def test_one_progress_bar_for_all_parts(kind, compile, monkeypatch):
    """Rounds between resets and phases of switching methods cover the span once, from its start to its end."""
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    shown: list[list[float]] = []

    class Bar(tqdm):
        def __init__(self, *args, **named):
            shown.append([0.0])
            super().__init__(*args, **named)

        def update(self, n=1):
            super().update(n)
            shown[-1].append(self.n)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    if kind == "phases":
        solve_ivp(van_der_pol, (0.0, 2000.0), torch.tensor([2.0, 0.0]), method="auto", progress=True, compile=compile)
    else:
        bounce = Event(lambda t, y: y[0], direction=-1, reset=lambda t, y: torch.stack([0 * y[0], -0.8 * y[1]]))
        y0 = torch.tensor([1.0, 0.0], requires_grad=kind != "rounds")
        gradient = None if kind == "rounds" else InterpolatingAdjoint()
        solve_ivp(ball, (0.0, 2.0), y0, events=bounce, progress=True, compile=compile, gradient=gradient)
    (bar,) = shown
    assert all(b >= a - 1e-9 for a, b in pairwise(bar))
    assert bar[-1] == pytest.approx(100.0)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "bdf"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("True-tsit5")
def test_progress_bar_of_compiled_code(method, batched, monkeypatch):
    """It is told of what is covered while the solve goes on, which stays compiled; time that runs back too."""
    pytest.importorskip("tqdm")
    from adjoint.doors import progress
    from adjoint.native import progress as told

    parts: list[float] = []
    monkeypatch.setattr(progress._Bar, "advanced", lambda self, part: parts.append(part))
    monkeypatch.setattr(told, "_PAUSE", 0.0)
    y0 = torch.tensor([[1.0, 0.0]]).expand(3 if batched else 1, 2).contiguous().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a remark would say that the solve runs uncompiled
        for span in ((0.0, 2e4), (0.0, -2e4)):
            parts.clear()
            settings = {"method": method, "batched": True, "rtol": 1e-6, "atol": 1e-6, "compile": True, "max_steps": 10**7}
            fun = lambda t, y: torch.stack([y[..., 1], -y[..., 0] ** 3], -1)  # noqa: E731
            plain = solve_ivp(fun, span, y0, **settings)
            parts.clear()
            sol = solve_ivp(fun, span, y0, progress=True, **settings)
            torch.testing.assert_close(sol.y, plain.y, rtol=0, atol=0)
            assert parts == sorted(parts) and parts[-1] == 1.0 and any(0 < x < 1 for x in parts)


def test_complex_numbers_that_are_lost_are_lost_in_both_parts():
    """An imaginary part of zero beside NaN would be a plausible number."""
    y0 = torch.tensor([[1.0 + 1.0j], [-1.0 + 0.5j]])
    fun = lambda t, y: torch.where(t.unsqueeze(-1) > 0.7, float("nan"), 1.0) + 0 * y  # noqa: E731
    back = Event(lambda t, y: y[:, 0].real - 1.5, reset=lambda t, y: y - 1)
    plain = {"quadrature": lambda t, y: y[:, 0], "throw": False, "batched": True}
    for events in (None, back, Event(back.function, terminal=True)):
        sol = solve_ivp(fun, (0.0, 1.0), y0, events=events, t_eval=[0.1, 0.9], **plain)
        found = [sol.y, sol.quadrature] + ([sol.events[0].y, sol.events[0].after] if events is not None else [])
        for x in found:
            assert x is None or torch.equal(x.real.isnan(), x.imag.isnan())
        assert sol.y[-1].imag.isnan().all()
    many = solve_ivp(fun, (0.0, 0.6), y0, events=back, max_events=1, **plain)
    assert many.status.tolist() == [-5, 0] and bool(many.y[-1, 0].imag.isnan().all()) and bool(many.quadrature[0].imag.isnan())


@pytest.mark.parametrize("options", [{}, {"gradient": DiscreteAdjoint(keep_bytes=0)}, {"dense_output": True}, {"batched": True}])
@pytest.mark.parametrize("t_eval", [None, "steps", [0.5, 1.0]])
def test_results_are_the_users_own(t_eval, options):
    """What is written into them changes neither the way back nor the dense output."""

    def solved():
        y0 = torch.tensor([[1.0], [2.0]] if options.get("batched") else [1.0, 2.0], requires_grad=True)
        return y0, solve_ivp(lambda t, y: -(y**2), (0.0, 1.0), y0, t_eval=t_eval, **options)

    y0, sol = solved()
    (want,) = torch.autograd.grad(sol.y.nan_to_num().square().sum(), y0)
    y0, sol = solved()
    inside = None if sol.interpolant is None else sol(0.3).detach().clone()
    sol.y.mul_(2.0)
    sol.t.zero_()
    assert inside is None or torch.equal(sol(0.3), inside)
    torch.testing.assert_close(torch.autograd.grad(sol.y.nan_to_num().square().sum() / 4, y0)[0], want)
