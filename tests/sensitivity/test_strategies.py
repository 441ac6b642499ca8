"""Gradient strategies beside the discrete adjoint: forward sensitivities and continuous adjoints."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    InvalidInput,
    QuadratureAdjoint,
    SolveError,
    UnsupportedCombination,
    solve_dae,
    solve_ivp,
)

from ..helpers.dae_problems import PENDULUM_END_BY_G, PENDULUM_Y0, ROBERTSON_P, ROBERTSON_Y0, ROBERTSON_YP0, pendulum, robertson

F64 = torch.float64
CONTINUOUS = [InterpolatingAdjoint, GaussAdjoint, QuadratureAdjoint]
QUICK, SLOW = ["tsit5", "dopri8", "kvaerno5", "radau5", "abm"], ["kvaerno3", "rodas5p"]
METHODS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
#: batches take the same ways back by every method
FORMS = [(name, False) for name in QUICK] + [("tsit5", True), ("kvaerno5", True)]
FORMS += [pytest.param(name, True, marks=pytest.mark.slow) for name in QUICK if (name, True) not in FORMS]
FORMS += [pytest.param(name, batched, marks=pytest.mark.slow) for name in SLOW for batched in (False, True)]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def lotka(t, y, p):
    a, b, c, d = p.unbind(-1)
    u, v = y.unbind(-1)
    return torch.stack([a * u - b * u * v + 0.1 * torch.sin(t), -c * v + d * u * v], -1)


def gradients(strategy, method="tsit5", tolerance=1e-5, batched=False, end=1.0):
    """In parameters, initial state, sample times and the end of the span, of a loss on samples, end and an integral."""
    p = tensor(1.5, 1, 3, 1).requires_grad_()
    y0 = tensor(1.0, 1.2).requires_grad_()
    times = tensor(0.0, 0.35, 0.95).requires_grad_()
    stop = torch.tensor(end, dtype=F64, requires_grad=True)
    y, q = (torch.stack([y0, 1.1 * y0]), torch.stack([p, 1.05 * p])) if batched else (y0, p)
    sol = solve_ivp(
        lotka, (0.0, stop), y, args=(q,), t_eval=times, method=method, rtol=tolerance, atol=tolerance, batched=batched,
        gradient=strategy, quadrature=lambda t, y, p: y[..., 0] ** 2,
    )  # fmt: skip
    loss = (sol.y.square() * torch.arange(1.0, 4.0, dtype=F64).reshape(3, *[1] * (sol.y.dim() - 1))).sum() + sol.quadrature.sum()
    return torch.autograd.grad(loss, (p, y0, times, stop))


@pytest.fixture(scope="module")
def truth():
    return {batched: gradients(DiscreteAdjoint(), "dopri8", 1e-12, batched) for batched in (False, True)}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow_cases("kvaerno5-True", "abm-False")
def test_forward_sensitivities_are_the_discrete_adjoint(method, batched):
    tolerance = 1e-3
    want = gradients(DiscreteAdjoint(), method, tolerance, batched)
    options = [ForwardSensitivity(), ForwardSensitivity(chunk_size=3)] + ([ForwardSensitivity(rowwise=True)] if batched else [])
    for strategy in options:
        for a, b in zip(gradients(strategy, method, tolerance, batched), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method, batched", FORMS)
@pytest.mark.parametrize("strategy", CONTINUOUS)
def test_continuous_adjoints_converge(strategy, method, batched, truth):
    errors = []
    for tolerance in (1e-4, 1e-6):
        found = gradients(strategy(), method, tolerance, batched)
        errors.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, truth[batched], strict=True)))
    assert errors[1] < 3e-4 and errors[1] < 0.25 * errors[0], errors


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("strategy", [InterpolatingAdjoint(), GaussAdjoint()], ids=lambda s: type(s).__name__)
@pytest.mark.slow_cases("GaussAdjoint-False", "InterpolatingAdjoint-True")
def test_a_loss_on_the_way_costs_no_start_anew(strategy, batched):
    """One step from loss to loss where losses lie closer than steps; a first step found anew at each took three."""

    def run(gradient, count, tolerance):
        p = tensor(1.5, 1, 3, 1).requires_grad_()
        y0 = tensor(1.0, 1.2)
        y, q = (torch.stack([y0, 1.1 * y0]), torch.stack([p, 1.05 * p])) if batched else (y0, p)
        times = torch.linspace(0, 6.0, count + 1, dtype=F64)[1:]
        options = dict(rtol=tolerance, atol=tolerance, batched=batched, gradient=gradient)
        sol = solve_ivp(lotka, (0.0, 6.0), y, args=(q,), t_eval=times, method="dopri8", **options)
        (grad,) = torch.autograd.grad(sol.y.square().sum() / count, (p,))
        return grad, sol.stats.backward.n_steps

    exact, _ = run(DiscreteAdjoint(), 30, 1e-10)
    one, many = run(strategy, 1, 1e-7)[1], run(strategy, 30, 1e-7)
    assert many[1] <= 30 + one
    assert torch.allclose(many[0], exact, rtol=1e-5)


def test_an_own_method_and_own_tolerances(truth):
    loose = gradients(InterpolatingAdjoint(rtol=1e-2, atol=1e-2), "dopri8", 1e-10)
    tight = gradients(InterpolatingAdjoint(method="dopri8", rtol=1e-10, atol=1e-10), "dopri8", 1e-10)
    size = truth[False][0].abs().max()
    assert float((tight[0] - truth[False][0]).abs().max() / size) < 1e-9 < float((loose[0] - truth[False][0]).abs().max() / size)


def test_backsolve_is_right_where_it_can_be(truth):
    for a, b in zip(gradients(BacksolveAdjoint(), tolerance=1e-8), truth[False], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_backwards_in_time_and_modules():
    module = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    y0 = tensor(0.3, -0.2).requires_grad_()
    unused = torch.nn.Parameter(torch.ones(2, dtype=F64))
    module.register_parameter("unused", unused)

    def run(strategy):
        sol = solve_ivp(lambda t, y: module(y), (2.0, 0.5), y0, t_eval=[1.5, 0.5], rtol=1e-9, atol=1e-9, method="dopri8", gradient=strategy)
        return torch.autograd.grad(sol.y.square().sum(), (y0, *module[0].parameters()))

    want = run(DiscreteAdjoint())
    for strategy in (*(s() for s in CONTINUOUS), BacksolveAdjoint(), ForwardSensitivity()):
        for a, b in zip(run(strategy), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("strategy", [InterpolatingAdjoint(), GaussAdjoint(), ForwardSensitivity()], ids=lambda s: type(s).__name__)
def test_transforms_and_second_derivatives(strategy):
    from torch.func import grad, hessian, jacrev, vmap

    p = tensor(1.5, 1, 3, 1)

    def objective(p, gradient=strategy):
        return solve_ivp(lotka, (0.0, 1.0), tensor(1.0, 1.2), args=(p,), rtol=1e-6, atol=1e-8, gradient=gradient).y[-1, 0]

    plain = lambda p: objective(p, DiscreteAdjoint())  # noqa: E731
    torch.testing.assert_close(grad(objective)(p), grad(plain)(p), rtol=1e-10, atol=0)
    torch.testing.assert_close(hessian(objective)(p), hessian(plain)(p), rtol=1e-9, atol=1e-10)
    many = torch.stack([p, 1.1 * p])
    torch.testing.assert_close(vmap(jacrev(objective))(many), vmap(jacrev(plain))(many), rtol=1e-9, atol=1e-10)
    q = p.clone().requires_grad_()
    (first,) = torch.autograd.grad(objective(q), q, create_graph=True)
    (second,) = torch.autograd.grad(first[0], q)
    torch.testing.assert_close(second, hessian(plain)(p)[0], rtol=1e-9, atol=1e-10)


# ---- stiff problems and implicit equations


def robertson_ode(t, y, p):
    p1, p2, p3 = p.unbind(-1)
    y1, y2, y3 = y.unbind(-1)
    a, b, c = p1 * y1, p2 * y2 * y3, p3 * y2**2
    return torch.stack([-a + b, a - b - c, c], -1)


@pytest.mark.parametrize("strategy", [InterpolatingAdjoint(), QuadratureAdjoint(), ForwardSensitivity()], ids=lambda s: type(s).__name__)
@pytest.mark.slow_cases("QuadratureAdjoint", "InterpolatingAdjoint")
def test_robertson_as_an_ode(strategy):
    p = ROBERTSON_P.clone().requires_grad_()
    sol = solve_ivp(
        robertson_ode, (0.0, 50.0), ROBERTSON_Y0, args=(p,), method="kvaerno5", rtol=1e-7, atol=1e-11, gradient=strategy,
        quadrature=lambda t, y, p: y[2],
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.quadrature, p)
    torch.testing.assert_close(grad, tensor(1.73414089144977e02, -5.05919140558619e-04, 8.43234646542261e-08), rtol=5e-5, atol=0)


def relaxing(t, y, p):
    """Towards the cosine, and the integral."""
    return torch.stack([p[0] * (torch.cos(p[1] * t) - y[..., 0]), y[..., 0]], -1)


def integral_of_relaxing(p, end=1.0):
    share, turn = p[0] ** 2 / (p[0] ** 2 + p[1] ** 2), p[0] * p[1] / (p[0] ** 2 + p[1] ** 2)
    angle = p[1] * end
    return (share * torch.sin(angle) + turn * (1 - torch.cos(angle))) / p[1] - share * (1 - torch.exp(-p[0] * end)) / p[0]


@pytest.mark.parametrize("strategy", [InterpolatingAdjoint, GaussAdjoint, QuadratureAdjoint])
@pytest.mark.parametrize(
    "method, back", [("rodas5p", None), ("kvaerno5", None), ("radau5", "kvaerno5"), ("radau5", "trbdf2"), ("radau", None)]
)
@pytest.mark.slow_cases(
    "radau-None-GaussAdjoint", "radau-None-QuadratureAdjoint", "radau5-trbdf2-QuadratureAdjoint", "kvaerno5-None-QuadratureAdjoint",
    "radau5-kvaerno5-GaussAdjoint", "kvaerno5-None-GaussAdjoint",
)
def test_layers_of_the_solution_within_steps_of_the_adjoint(strategy, method, back):
    """The rate counts in the layer at the start alone, where the adjoint is smooth: what its steps looked at was off by 1e3 to 1e14."""
    p = tensor(1e3, 2.0).requires_grad_()
    start, gradient = torch.zeros(2, dtype=F64), strategy(method=back, rtol=1e-6)
    # kvaerno5 by itself is not as exact in layers
    rtol = 1e-8 if method == "kvaerno5" else 1e-6
    options = dict(args=(p,), method=method, rtol=rtol, atol=1e-4 * rtol, gradient=gradient)
    if method == "radau":
        sol = solve_dae(lambda t, y, yp, p: yp - relaxing(t, y, p), (0.0, 1.0), start, tensor(1e3, 0.0), **options)
    else:
        sol = solve_ivp(relaxing, (0.0, 1.0), start, **options)
    (found,) = torch.autograd.grad(sol.y[-1, 1], p)
    (exact,) = torch.autograd.grad(integral_of_relaxing(p), p)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("strategy", [InterpolatingAdjoint, GaussAdjoint, QuadratureAdjoint])
def test_pulses_between_steps_of_the_adjoint(strategy, batched):
    height = tensor(1.0).requires_grad_()
    fun = lambda t, y, p: p * torch.exp(-(((t - 1.0) / 0.01) ** 2)).unsqueeze(-1) - y  # noqa: E731
    start = torch.ones((3, 1) if batched else 1, dtype=F64)
    sol = solve_ivp(fun, (0.0, 2.0), start, args=(height,), max_step=0.02, rtol=1e-8, atol=1e-10, batched=batched, gradient=strategy())
    (found,) = torch.autograd.grad(sol.y[-1].mean(), height)
    torch.testing.assert_close(found, tensor(0.01 * math.sqrt(math.pi) * math.exp(-1.0 + 2.5e-5)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method, tolerance", [("kvaerno5", 1e-2), ("rodas5p", 1e-4), ("bdf", 1e-4)])
@pytest.mark.slow_cases("kvaerno5-0.01", "bdf-0.0001")
def test_stiff_derivatives_in_times(method, tolerance):
    """Between steps and at the end: slopes of a tight solve. `fun` magnifies errors of states to three times the slope, and 1 %."""
    times, end = tensor(0.1, 10.0).requires_grad_(), tensor(1e2).requires_grad_()
    options = dict(method=method, rtol=1e-7, atol=1e-11, gradient=InterpolatingAdjoint(method="radau5"))
    sol = solve_ivp(robertson_ode, (0.0, end[0]), ROBERTSON_Y0, args=(ROBERTSON_P,), t_eval=torch.cat([times, end]), **options)
    found = torch.autograd.grad((sol.y * tensor(1.0, 1e4, 1.0)).sum(), (times, end))
    exact = tensor(-7.00016388e-02, -6.24811213e-03, -2.74810476e-04)
    torch.testing.assert_close(torch.cat(found), exact, rtol=tolerance, atol=0)


def test_robertson_as_a_dae():
    p, errors = ROBERTSON_P.clone().requires_grad_(), []
    want = tensor(1.73414089144977e02, -5.05919140558619e-04, 8.43234646542261e-08)
    for tolerance in (1e-3, 1e-5):
        sol = solve_dae(
            robertson, (0.0, 50.0), ROBERTSON_Y0, ROBERTSON_YP0, args=(p,), rtol=tolerance, atol=tolerance * 1e-4,
            gradient=InterpolatingAdjoint(), quadrature=lambda t, y, p: y[2],
        )  # fmt: skip
        (grad,) = torch.autograd.grad(sol.quadrature, p, retain_graph=True)
        errors.append(float((grad / want - 1).abs().max()))
        # the end value of an algebraic variable has a term of its own
        (by_end,) = torch.autograd.grad(sol.y[-1, 2], p)
        torch.testing.assert_close(by_end, tensor(4.47082, -1.48789e-5, 2.47985e-9), rtol=10 * tolerance, atol=0)
    assert errors[1] < 1e-5 and errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.slow_cases("1")
def test_pendulum_with_losses_on_the_multiplier_at_many_times(index):
    one = torch.ones((), dtype=F64)
    y0 = PENDULUM_Y0.clone().requires_grad_()
    found = []
    for strategy, tolerance in ((DiscreteAdjoint(), 1e-9), (InterpolatingAdjoint(), 1e-7)):
        g, times = one.clone().requires_grad_(), tensor(0.4, 0.8)
        sol = solve_dae(pendulum(index), (0.0, 0.9), y0, args=(g, one), t_eval=times, rtol=tolerance, atol=tolerance, gradient=strategy)
        found.append(torch.autograd.grad(sol.y[:, 4].square().sum() + sol.y[:, 0].sum(), (g, y0)))
    for a, b in zip(*found, strict=True):
        # multipliers of index 2 are known to lower order
        torch.testing.assert_close(a, b, rtol=0, atol=3e-5 if index == 1 else 3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 2])
def test_pendulum_end_values(index):
    g, one = torch.ones((), dtype=F64, requires_grad=True), torch.ones((), dtype=F64)
    sol = solve_dae(pendulum(index), (0.0, 10.0), PENDULUM_Y0, args=(g, one), rtol=1e-7, atol=1e-7, gradient=InterpolatingAdjoint())
    found = torch.stack([torch.autograd.grad(sol.y[-1, i], g, retain_graph=True)[0] for i in range(5)])
    torch.testing.assert_close(found, PENDULUM_END_BY_G, rtol=0, atol=1e-5)


def test_batched_dae_is_one_by_one():
    p = (ROBERTSON_P * torch.tensor([[1.0], [1.2]], dtype=F64)).requires_grad_()
    options = dict(rtol=1e-4, atol=1e-8, gradient=InterpolatingAdjoint(rtol=1e-5, atol=1e-5))
    sol = solve_dae(robertson, (0.0, 0.1), ROBERTSON_Y0.repeat(2, 1), args=(p,), batched=True, **options)
    (together,) = torch.autograd.grad(sol.y[-1, :, 2].sum(), p)
    for i in range(2):
        q = p[i].detach().clone().requires_grad_()
        one = solve_dae(robertson, (0.0, 0.1), ROBERTSON_Y0, args=(q,), **options)
        torch.testing.assert_close(together[i], torch.autograd.grad(one.y[-1, 2], q)[0], rtol=1e-6, atol=0)


# ---- what is refused


def test_rowwise_is_checked():
    p = tensor(1.0, 2.0).requires_grad_()
    y0 = torch.ones(2, 1, dtype=F64)
    mixed = lambda t, y, p: -y * p.flip(0).unsqueeze(-1)  # noqa: E731
    with pytest.raises(InvalidInput, match="other rows"):
        solve_ivp(mixed, (0.0, 1.0), y0, args=(p,), batched=True, gradient=ForwardSensitivity(rowwise=True))
    with pytest.raises(InvalidInput, match="leading dimension"):
        solve_ivp(lambda t, y, q: -y * q, (0.0, 1.0), y0, args=(p[0],), batched=True, gradient=ForwardSensitivity(rowwise=True))
    with pytest.raises(UnsupportedCombination, match="2 directions"):
        solve_ivp(mixed, (0.0, 1.0), y0, args=(p,), batched=True, gradient=ForwardSensitivity(max_directions=1))


@pytest.mark.parametrize("strategy", [InterpolatingAdjoint(), BacksolveAdjoint()], ids=lambda s: type(s).__name__)
def test_options_that_do_not_go_together(strategy):
    y0, f = tensor(1.0).requires_grad_(), lambda t, y: -y
    event = lambda t, y: y[0] - 0.5  # noqa: E731
    with pytest.raises(UnsupportedCombination, match="events="):
        solve_ivp(f, (0.0, 1.0), y0, events=event, gradient=strategy)


def test_losses_on_steps_and_dense_output_go_through_the_steps():
    y0, f = tensor(1.0).requires_grad_(), lambda t, y: -y
    for options, loss in (({"t_eval": "steps"}, lambda sol: sol.y.sum()), ({"dense_output": True}, lambda sol: sol(0.5).sum())):
        found = []
        for strategy in (InterpolatingAdjoint(), ForwardSensitivity(), DiscreteAdjoint()):
            found.append(torch.autograd.grad(loss(solve_ivp(f, (0.0, 1.0), y0, gradient=strategy, **options)), y0)[0])
        torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)
        torch.testing.assert_close(found[1], found[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: InterpolatingAdjoint(rtol=-1.0), "rtol"),
        (lambda: GaussAdjoint(method="nothing"), "no method"),
        (lambda: QuadratureAdjoint(max_steps=0), "max_steps"),
        (lambda: ForwardSensitivity(chunk_size=0), "chunk_size"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(InvalidInput, match=match):
        make()


def test_methods_that_cannot_go_back():
    y0, f = tensor(1.0).requires_grad_(), lambda t, y: -y
    with pytest.raises(InvalidInput, match="no error control"):
        solve_ivp(f, (0.0, 1.0), y0, gradient=InterpolatingAdjoint(method="rk4"))
    with pytest.raises(UnsupportedCombination, match="rodas5p"):
        solve_ivp(f, (0.0, 1.0), y0, gradient=InterpolatingAdjoint(method="rodas5p"))
    with pytest.raises(UnsupportedCombination, match="kvaerno5"):
        solve_ivp(f, (0.0, 1.0), y0, gradient=BacksolveAdjoint(method="kvaerno5"))


def test_an_adjoint_that_fails_says_so():
    y0 = tensor(1.0, 0.0, 0.0).requires_grad_()
    sol = solve_ivp(
        robertson_ode, (0.0, 50.0), y0, args=(ROBERTSON_P,), method="kvaerno5", rtol=1e-6, atol=1e-10,
        gradient=InterpolatingAdjoint(method="tsit5", max_steps=50),
    )  # fmt: skip
    with pytest.raises(SolveError, match=r"could not be solved back.*MAX_STEPS.*stiff"):
        sol.y[-1, 2].backward()


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p", "abm", "bdf"])
@pytest.mark.parametrize("wanted", [{"t_eval": "steps"}, {"dense_output": True}], ids=["steps", "dense"])
def test_backsolve_refuses_what_it_does_not_keep(method, wanted):
    p = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(UnsupportedCombination, match="dense_output=True or t_eval='steps' with BacksolveAdjoint"):
        solve_ivp(lambda t, y: -p * y, (0.0, 1.0), torch.ones(2), method=method, gradient=BacksolveAdjoint(method="dopri5"), **wanted)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno3"])
def test_sample_times_of_any_layout_get_their_derivatives(method):
    """Times that stand in memory the other way round, as under a map: ``dy/dt`` at each."""
    t = torch.tensor([[0.2, 0.5, 1.0], [0.1, 0.4, 0.8]]).T.detach().requires_grad_()
    assert not t.is_contiguous()
    y = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2, 1), t_eval=t, method=method, batched=True, rtol=1e-5, atol=1e-7).y
    (slopes,) = torch.autograd.grad(y.sum(), t)
    torch.testing.assert_close(slopes, -torch.exp(-t.detach()), rtol=1e-3, atol=1e-4)


def test_backsolve_counts_a_captured_view_once():
    w = torch.tensor([0.7, 0.3], requires_grad=True)
    y0 = torch.tensor([1.0, 2.0])
    for other in (w[0], 2 * w[0] * 0.5, w.view_as(w)[0]):
        end = solve_ivp(lambda t, y, o=other: -(0.5 * w[0] + 0.5 * o) * y, (0.0, 1.0), y0, gradient=BacksolveAdjoint()).y[-1].sum()
        slope = torch.autograd.grad(end, w)[0]
        torch.testing.assert_close(slope, torch.tensor([-3 * math.exp(-0.7), 0.0]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("door", ["solve_ivp", "batch", "solve_dae"])
@pytest.mark.parametrize("gradient", [InterpolatingAdjoint(), GaussAdjoint(), QuadratureAdjoint()])
def test_a_loss_that_is_not_followed_back_has_derivatives_of_zero(gradient, door):
    """A penalty that is not active, a loss on the initial state: zeros for what ``fun`` uses, as with the other strategies, not None."""
    p, y0 = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, [2.0]))
    at = y0.expand(2, 1) if door == "batch" else y0
    options = {"gradient": gradient, "t_eval": [0.0, 0.5]}
    if door == "solve_dae":
        y = solve_dae(lambda t, y, yp, p: yp + p * y, (0.0, 1.0), at, args=(p,), **options).y
    else:
        y = solve_ivp(lambda t, y, p: -p * y, (0.0, 1.0), at, (p,), batched=door == "batch", **options).y
    for loss, want in ((torch.relu(y[-1] - 5.0).sum(), 0.0), (y[0].flatten()[0], 1.0)):
        by_p, by_y0 = torch.autograd.grad(loss, (p, y0), retain_graph=True)
        assert float(by_p) == 0.0
        assert float(by_y0) == want


@pytest.mark.parametrize("method", ["tsit5", "kvaerno3", "bdf"])
def test_backprop_of_nothing(method):
    """All steps are asked for, but no derivative: there is nothing to take again."""
    y0 = torch.ones(1, dtype=torch.float64)
    steps = lambda gradient: solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, method=method, t_eval="steps", gradient=gradient).y  # noqa: E731
    assert torch.equal(steps(Backprop()), steps(DiscreteAdjoint()))
