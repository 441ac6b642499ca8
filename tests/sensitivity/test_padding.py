"""Trajectories that are done, or failed, beside others: derivatives of the others are as if they were alone."""

import math

import pytest
import torch

import adjoint

NAN = float("nan")
ONE = torch.ones(2, dtype=torch.float64)


def constrained(t, y, yp, p):
    """y' = -p z, 0 = z - y."""
    return torch.stack([yp[:, 0] + p * y[:, 1], y[:, 1] - y[:, 0]], 1)


def ragged(p, method):
    out = adjoint.solve_dae(
        constrained, (0.0, 1.0), torch.ones(2, 2, dtype=torch.float64), args=(p,), batched=True, method=method, rtol=1e-5, atol=1e-8
    )
    return out.y[-1, :, 0]


@pytest.mark.parametrize("method, p", [("radau", (1.0, 5.0)), ("radau3", (-1.0, 4.0)), ("bdf", (-1.0, 4.0))])
@pytest.mark.slow_cases("radau3-p1")
def test_tangents_of_constrained_trajectories_with_different_numbers_of_steps(method, p):
    p = torch.tensor(p, dtype=torch.float64)
    want = -torch.exp(-p)
    got = torch.func.jvp(lambda p: ragged(p, method), (p,), (ONE,))[1]
    torch.testing.assert_close(got, want, rtol=5e-3, atol=0.0)
    alone = torch.stack([torch.func.jvp(lambda q: ragged(q, method), (x.repeat(2),), (ONE,))[1][0] for x in p])
    torch.testing.assert_close(got, alone, rtol=1e-9, atol=0.0)


@pytest.mark.slow
def test_second_derivatives_of_constrained_trajectories_with_different_numbers_of_steps():
    p = torch.tensor([1.0, 5.0], dtype=torch.float64, requires_grad=True)
    want = torch.exp(-p.detach())
    forward = torch.func.jvp(torch.func.grad(lambda p: ragged(p, "radau").sum()), (p.detach(),), (ONE,))[1]
    torch.testing.assert_close(forward, want, rtol=5e-3, atol=1e-6)
    (first,) = torch.autograd.grad(ragged(p, "radau").sum(), p, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), p)
    torch.testing.assert_close(second, forward, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("method", ["radau5", "rodas5p"])
def test_forward_sensitivities_with_a_mass_matrix(method):
    p = torch.tensor([1.0, 5.0], dtype=torch.float64, requires_grad=True)
    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    fun = lambda t, y, p: torch.stack([-p * y[:, 1], y[:, 1] - y[:, 0]], 1)  # noqa: E731
    y = adjoint.solve_ivp(
        fun, (0.0, 1.0), torch.ones(2, 2, dtype=torch.float64), args=(p,), batched=True, mass_matrix=mass, method=method,
        gradient=adjoint.ForwardSensitivity(), rtol=1e-5, atol=1e-8,
    ).y  # fmt: skip
    (got,) = torch.autograd.grad(y[-1, :, 0].sum(), p)
    torch.testing.assert_close(got, -torch.exp(-p.detach()), rtol=5e-3, atol=0.0)


def spoiled(kind, k, method="tsit5", form="batched", second=False, samples=True, **options):
    """The gradient in ``k``, shared by all, of the two trajectories of y' = -k a y that do not fail; and what is right."""
    y0 = torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)
    a = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    if kind == "state":
        y0[1] = NAN
    elif kind == "parameter":
        a[1] = NAN
    elif kind == "root of a negative one":
        a[1] = -1.0
    y0.requires_grad_(True), a.requires_grad_(True)

    def fun(t, y, a):
        a = a.unsqueeze(-1)
        rate = -k * a * y
        if kind == "root of a negative one":
            rate = rate * torch.sqrt(a) / torch.sqrt(a.abs())
        if kind == "later":
            rate = rate * torch.where((t.unsqueeze(-1) > 0.5) & (y > 1.02), NAN, 1.0)
        return rate

    ts = torch.linspace(0.0, 1.0, 5, dtype=torch.float64) if samples else torch.tensor([1.0], dtype=torch.float64)
    options = {"rtol": 1e-6, "atol": 1e-8, "method": method, "throw": False, "args": (a,), "t_eval": ts, **options}
    if form == "vmap":
        one = lambda y, a: adjoint.solve_ivp(fun, (0.0, 1.0), y, **{**options, "args": (a,)}).y  # noqa: E731
        y = torch.vmap(one)(y0, a).transpose(0, 1)
    else:
        out = adjoint.solve_ivp(fun, (0.0, 1.0), y0, batched=True, **options)
        assert [int(s) < 0 for s in out.status] == [False, True, False]
        y = out.y
    loss = y[:, 0].sum() + y[:, 2].sum()
    got, y0_bar, a_bar = torch.autograd.grad(loss, (k, y0, a), create_graph=second)
    rate = torch.tensor([[1.0], [1.5]], dtype=torch.float64)
    decay = torch.exp(-k.detach() * rate * ts)
    if second:
        return torch.autograd.grad(got, k)[0], ((rate * ts) ** 2 * decay).sum(), y0_bar, a_bar
    return got, -(rate * ts * decay).sum(), y0_bar, a_bar


@pytest.fixture
def k():
    return torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


KINDS = ["state", "parameter", "root of a negative one", "later"]


@pytest.mark.parametrize(
    "kind, method",
    [*((kind, "tsit5") for kind in KINDS), ("later", "rodas5p")]
    + [pytest.param(kind, method, marks=pytest.mark.slow) for kind in KINDS[:3] for method in ("bdf", "kvaerno5", "radau5", "abm")],
)
def test_a_failed_trajectory_leaves_the_gradients_of_shared_parameters_alone(kind, method, k):
    got, want, y0_bar, a_bar = spoiled(kind, k, method)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)
    assert bool(torch.isfinite(y0_bar[[0, 2]]).all()) and bool(torch.isfinite(a_bar[[0, 2]]).all())
    if kind != "later":
        assert bool(y0_bar[1].isnan().all())
        assert kind == "state" or bool(a_bar[1].isnan())


@pytest.mark.parametrize("kind", ["parameter", pytest.param("later", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategy",
    [
        adjoint.Backprop(),
        adjoint.ForwardSensitivity(),
        adjoint.DiscreteAdjoint(checkpoints=3),
        adjoint.InterpolatingAdjoint(),
        adjoint.GaussAdjoint(method="kvaerno5"),
        adjoint.QuadratureAdjoint(),
    ],
)
def test_so_by_every_strategy(kind, strategy, k):
    got, want, *_ = spoiled(kind, k, gradient=strategy)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kind", ["parameter", pytest.param("state", marks=pytest.mark.slow)])
def test_so_under_vmap_and_in_second_derivatives(kind, k):
    got, want, *_ = spoiled(kind, k, form="vmap")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)
    got, want, *_ = spoiled(kind, k, second=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("second", [False, True])
def test_multistep_methods_do_not_look_at_initial_values_that_are_none(second):
    """Where the slope at the start is the first of the differences that steps hand on."""
    k, y0 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), torch.tensor([[1.0], [NAN], [1.5]], dtype=torch.float64)
    y = adjoint.solve_ivp(lambda t, y: -k * y, (0.0, 1.0), y0, method="abm", batched=True, throw=False, rtol=1e-5).y[-1]
    (got,) = torch.autograd.grad(y[[0, 2]].sum(), k, create_graph=second)
    want = torch.full_like(k, 2.5 * math.exp(-0.5)).detach()
    torch.testing.assert_close(torch.autograd.grad(got, k)[0] if second else -got, want, rtol=1e-3, atol=0.0)


def test_a_loss_on_a_trajectory_that_failed_has_no_gradient_there(k):
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    fun = lambda t, y: -k * y * torch.where((t.unsqueeze(-1) > 0.5) & (y > 1.02), NAN, 1.0)  # noqa: E731
    ts = torch.tensor([0.25, 1.0], dtype=torch.float64)
    y = adjoint.solve_ivp(fun, (0.0, 1.0), y0, t_eval=ts, batched=True, throw=False, rtol=1e-9, atol=1e-11).y
    before, after = (torch.autograd.grad(y[i].sum(), y0, retain_graph=True)[0][:, 0] for i in range(2))
    torch.testing.assert_close(before, torch.exp(-k.detach() * ts[0]).expand(2))
    assert float(after[0]) == pytest.approx(float(torch.exp(-k.detach())), rel=1e-6) and bool(after[1].isnan())


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "strategy", [adjoint.DiscreteAdjoint(), adjoint.InterpolatingAdjoint(), adjoint.GaussAdjoint(), adjoint.QuadratureAdjoint(), "implicit"]
)
def test_a_cotangent_that_is_not_a_number_comes_out_as_none(strategy, place):
    """Of the trajectory's own state and parameter, and of what all share; the others' are what they are without it."""
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    a, k = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    options = {"t_eval": torch.tensor([0.5, 1.0], dtype=torch.float64), "batched": True, "args": (a, k), "rtol": 1e-7, "atol": 1e-9}
    rate = lambda y, a, k: -k * a.unsqueeze(-1) * y  # noqa: E731
    if strategy == "implicit":
        options["gradient"] = adjoint.InterpolatingAdjoint()
        y = adjoint.solve_dae(lambda t, y, yp, a, k: yp - rate(y, a, k), (0.0, 1.0), y0, **options).y
    else:
        y = adjoint.solve_ivp(lambda t, y, a, k: rate(y, a, k), (0.0, 1.0), y0, gradient=strategy, **options).y
    bar = torch.ones_like(y)
    bar[place, 1] = NAN
    y0_bar, a_bar, k_bar = torch.autograd.grad(y, (y0, a, k), bar)
    assert bool(y0_bar[1].isnan()) and bool(a_bar[1].isnan()) and bool(k_bar.isnan())
    assert float(y0_bar[0]) == pytest.approx(math.exp(-0.2) + math.exp(-0.4), rel=1e-4)
    assert float(a_bar[0]) == pytest.approx(-0.5 * math.exp(-0.2) - math.exp(-0.4), rel=1e-4)


def test_a_shared_tensor_of_the_length_of_the_batch_is_no_trajectories_own():
    # the rows of the matrix are summed for every trajectory: none may be replaced, though there are as many as trajectories
    weight = torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=torch.float64, requires_grad=True)

    def fun(t, y):
        return torch.where(y[:, :1] > 1.5, NAN, 1.0) * -(y @ weight)

    def end(y0, batched):
        return adjoint.solve_ivp(fun if batched else (lambda t, y: fun(t, y[None])[0]), (0.0, 1.0), y0, batched=batched, throw=False).y[-1]

    both = torch.autograd.grad(end(torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=torch.float64), True)[0].sum(), weight)[0]
    alone = torch.autograd.grad(end(torch.ones(2, dtype=torch.float64), False).sum(), weight)[0]
    torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-12)


def test_trajectories_that_end_where_the_derivative_is_infinite():
    # y' = -k sqrt(y): each trajectory is stopped above zero; the state at the end of its last step may be at it
    k = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    low = lambda t, y: y[:, 0] - 1e-12  # noqa: E731
    low.terminal = True
    y0 = torch.tensor([[0.01], [1.0]], dtype=torch.float64)
    fun = lambda t, y: -k * torch.sqrt(torch.clamp(y, min=0.0))  # noqa: E731
    out = adjoint.solve_ivp(fun, (0.0, 1.0), y0, batched=True, events=low, rtol=1e-6, atol=1e-9)
    (got,) = torch.autograd.grad(out.y[-1, 1].sum(), k)
    # y = (1 - k t / 2)^2
    assert float(got) == pytest.approx(-0.5, rel=1e-5)


def algebraic_ends(method, k, y0, form="batched", **options):
    """Both variables at t = 1 of y' = -k z, 0 = z - y from ``y0`` (B, 2)."""
    if method in ("rodas5p", "rodas4"):
        fun = lambda t, y, k: torch.stack([-k * y[..., 1], y[..., 1] - y[..., 0]], -1)  # noqa: E731
        mass = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
        solve, options = adjoint.solve_ivp, {"mass_matrix": mass, **options}
    else:
        fun = lambda t, y, yp, k: torch.stack([yp[..., 0] + k * y[..., 1], y[..., 1] - y[..., 0]], -1)  # noqa: E731
        solve = adjoint.solve_dae
    options = {"args": (k,), "method": method, "rtol": 1e-5, "atol": 1e-7, "throw": False, "max_steps": 2000, **options}
    if form == "vmap":
        return torch.vmap(lambda y0: solve(fun, (0.0, 1.0), y0, **options).y[-1])(y0)
    out = solve(fun, (0.0, 1.0), y0, batched=True, **options)
    assert ((out.status < 0) == y0.detach().isnan().any(-1)).all()
    return out.y[-1]


@pytest.mark.parametrize(
    "method, form, strategy, dead",
    [("rodas4", "batched", None, 0), ("radau3", "batched", None, 1), ("radau3", "vmap", None, 0)]
    + [
        pytest.param(method, "batched", strategy, dead, marks=pytest.mark.slow)
        for method, strategy in (("bdf", None), ("radau", adjoint.InterpolatingAdjoint()), ("radau", adjoint.ForwardSensitivity()))
        for dead in (0, 1)
    ],
)
def test_constrained_trajectories_beside_one_without_initial_values(method, form, strategy, dead, k):
    # the guess of the algebraic variable is solved for, also where the first trajectory is the one that has no values
    y0 = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.5, 0.0]], dtype=torch.float64)
    y0[dead, 0] = NAN
    y0.requires_grad_(True)
    y = algebraic_ends(method, k, y0, form, gradient=strategy)
    live = [i for i in range(3) if i != dead]
    decay = torch.exp(-k.detach())
    want = (y0.detach()[live, :1] * decay).expand(2, 2)
    torch.testing.assert_close(y[live], want, rtol=1e-3, atol=0.0)
    k_bar, y0_bar = torch.autograd.grad(y[live].sum(), (k, y0))
    torch.testing.assert_close(k_bar, -want.sum(), rtol=3e-3, atol=0.0)
    torch.testing.assert_close(y0_bar[live, 0], 2 * decay.expand(2), rtol=3e-3, atol=0.0)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_no_trajectory_has_initial_values(method):
    """Nothing can be said of the equations then, but that the solve failed."""
    solve = lambda **o: adjoint.solve_dae(  # noqa: E731
        constrained, (0.0, 1.0), torch.full((2, 2), NAN, dtype=torch.float64), args=(ONE,), batched=True, method=method, **o
    )
    out = solve(throw=False)
    assert out.status.tolist() == [-3, -3] and bool(out.y[-1].isnan().all())
    with pytest.raises(adjoint.NonFiniteState, match="2 of 2 failed"):
        solve()


@pytest.mark.parametrize("method", ["tsit5", "abm"])
def test_tangents_of_what_a_failed_trajectory_did_not_get_to(method):
    """NaN, as its values; those of the other one, and of samples before the failure, are numbers."""
    p = torch.tensor(0.5, dtype=torch.float64)
    times = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    blows_up = torch.tensor([[0.0], [2.0]], dtype=torch.float64)

    def solve(p):
        y0 = torch.ones(2, 1, dtype=torch.float64)
        rate = lambda t, y, p: p * y + blows_up * torch.where(y > 20.0, NAN, y**2)  # noqa: E731
        return adjoint.solve_ivp(rate, (0.0, 1.0), y0, (p,), batched=True, throw=False, method=method, t_eval=times, rtol=1e-5).y[:, :, 0]

    value, dot = torch.func.jvp(solve, (p,), (torch.ones_like(p),))
    assert dot.isnan().tolist() == value.isnan().tolist() == [[False, False], [False, False], [False, True]]
    torch.testing.assert_close(dot[:, 0], times * torch.exp(p * times), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("options", [{"keep_bytes": 0}, {"checkpoints": 3}], ids=["sweep", "checkpoints"])
def test_a_mass_matrix_is_nobodys_part(options):
    """Of as many rows as there are trajectories: beside one that failed it stays what it is, though fun does not see it."""
    nan = float("nan")
    mass = torch.diag(torch.tensor([2.0, 1.0, 0.0]))

    def gradients(rows):
        y0 = torch.tensor([[1.0, -0.4, 0.6], [0.8, 0.5, 1.3], [1.0, 1.0, 2.0]], requires_grad=True)
        p = torch.tensor([[1.3], [0.9], [1.0]], requires_grad=True)
        start = y0[:rows] + (torch.tensor([0.0, 0.0, nan])[:rows, None])

        def fun(t, y, p):
            return torch.stack([-p[:, 0] * y[:, 0], torch.cos(t) - 0.5 * y[:, 1], y[:, 0] + y[:, 1] - y[:, 2]], -1)

        sol = adjoint.solve_ivp(
            fun, (0.0, 1.0), start, (p[:rows],), method="rodas5p", batched=True, t_eval=[0.3, 1.0], throw=False, mass_matrix=mass,
            gradient=adjoint.DiscreteAdjoint(**options), rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        return [x[:2] for x in torch.autograd.grad(sol.y[:, :2].square().sum(), (y0, p))]

    torch.testing.assert_close(gradients(3), gradients(2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [adjoint.InterpolatingAdjoint, adjoint.GaussAdjoint, adjoint.QuadratureAdjoint])
@pytest.mark.parametrize("early", [0.0, 1.0], ids=["nothing asked", "asked before it failed"])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_failed_trajectory_is_followed_back_from_where_something_is_asked_of_it(kind, early, backwards):
    """It ends where `fun` is no number, and so is that times a cotangent of zero."""
    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    sign = -1.0 if backwards else 1.0

    def decay(t, y, p):
        return -p * y * torch.where(sign * t.unsqueeze(-1) > torch.tensor([[2.0], [0.45]], dtype=t.dtype), NAN, 1.0)

    y0, times = torch.tensor([[1.0], [2.0]], dtype=torch.float64), sign * torch.tensor([0.2, 0.35, 1.0], dtype=torch.float64)
    options = {"method": "euler", "first_step": 0.1, "t_eval": times, "batched": True, "throw": False, "gradient": kind(method="tsit5")}
    sol = adjoint.solve_ivp(decay, (0.0, sign), y0, args=(p,), **options)
    assert (sol.status >= 0).tolist() == [True, False]
    (got,) = torch.autograd.grad(sol.y[:, 0].sum() + early * sol.y[0, 1].sum(), p)
    # the adjoint equation along lines that are the steps of Euler's method
    alone = adjoint.solve_ivp(lambda t, y, p: -p * y, (0.0, sign), y0, args=(p,), **options)
    (want,) = torch.autograd.grad(alone.y[:, 0].sum() + early * alone.y[0, 1].sum(), p)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("method", ["abm", "bdf", pytest.param("tsit5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", [False, True])
def test_a_span_of_no_length_is_looked_at_where_it_is(method, again, k):
    """The second trajectory has no function where the first one goes."""
    good = torch.tensor([9.0, 0.5], dtype=torch.float64)
    fun = lambda t, y, k: -k * y * torch.where(t > good, NAN, 1.0).unsqueeze(-1)  # noqa: E731
    start, y0 = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    end = torch.tensor([2.0, 0.0], dtype=torch.float64)
    y = adjoint.solve_ivp(fun, (start, end), y0, (k,), method=method, batched=True, rtol=1e-7, atol=1e-9).y[-1]
    by_k, by_start = torch.autograd.grad(y.sum(), (k, y0), create_graph=again)
    decay = math.exp(-0.5)
    torch.testing.assert_close(by_start.detach().flatten(), torch.tensor([decay, 1.0], dtype=torch.float64), rtol=1e-5, atol=0.0)
    want = torch.full_like(k, decay).detach()
    torch.testing.assert_close(torch.autograd.grad(by_k, k)[0] if again else -by_k, want, rtol=1e-4, atol=0.0)


STRATEGIES = {
    "steps": adjoint.DiscreteAdjoint(),
    "sweep": adjoint.DiscreteAdjoint(keep_bytes=0),
    "checkpoints": adjoint.DiscreteAdjoint(checkpoints=3),
    "autograd": adjoint.Backprop(),
    "forward": adjoint.ForwardSensitivity(),
    "continuous": adjoint.InterpolatingAdjoint(rtol=1e-10, atol=1e-12),
}


CASES = [*((m, "steps") for m in ("radau5", "rodas5p", "bdf", "abm")), *(("tsit5", s) for s in STRATEGIES), ("bdf", "autograd")]


@pytest.mark.parametrize(("method", "strategy", "captured"), [("tsit5", "steps", "a number"), *((*case, "a table") for case in CASES)])
def test_what_a_failed_trajectory_captured_without_a_derivative(method, strategy, captured):
    """A factor or a time from which on it is no number, neither an argument nor differentiated: no point is one where ``fun`` is finite."""
    factor = torch.tensor([1.0, NAN], dtype=torch.float64)
    last = torch.tensor([9.0, -1.0], dtype=torch.float64)

    def decay(t, y, p):
        return -p * y * (factor if captured == "a number" else torch.where(t > last, NAN, 1.0)).unsqueeze(-1)

    p = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    options = {"batched": True, "throw": False, "method": method, "gradient": STRATEGIES[strategy], "rtol": 1e-6, "atol": 1e-8}
    sol = adjoint.solve_ivp(decay, (0.0, 1.0), torch.ones(2, 1, dtype=torch.float64), args=(p,), **options)
    assert (sol.status >= 0).tolist() == [True, False]
    twice = strategy in ("steps", "autograd")
    (first,) = torch.autograd.grad(sol.y[-1, 0, 0], p, create_graph=twice)
    torch.testing.assert_close(first, -torch.exp(-p), rtol=1e-4, atol=0.0)
    if twice:
        torch.testing.assert_close(torch.autograd.grad(first, p)[0], torch.exp(-p), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("method", ["kvaerno5", "kencarp4", "radau5", "tsit5", "rodas5p"])
@pytest.mark.parametrize("rows", [0, 2])
def test_slopes_of_steps_of_no_length(method, rows):
    """Of ``y' = -t y`` dense output at the one time of the span: mixed second derivatives are those of slopes at the start in the state."""
    start, end, at, y0 = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, 0.2, 0.2, 2.0))
    whole = lambda t, y: -t.unsqueeze(-1) * y  # noqa: E731
    parts = adjoint.SplitFunction(lambda t, y: 0.4 * whole(t, y), lambda t, y: 0.6 * whole(t, y))
    fun = parts if method == "kencarp4" else whole
    state = torch.stack([torch.ones_like(y0), y0])[:, None] if rows else y0[None]
    ends = torch.stack([torch.full_like(end, 0.6), end]) if rows else end
    sol = adjoint.solve_ivp(fun, (start, ends), state, method=method, batched=rows > 0, dense_output=True)
    x = sol(at.reshape(1))[0].flatten()[-1]
    firsts = torch.autograd.grad(x, (y0, start, at), create_graph=True)
    found = [torch.autograd.grad(f, y0, retain_graph=True, materialize_grads=True)[0] for f in firsts]
    # y(at) = y0 exp((start^2 - at^2) / 2)
    want = torch.tensor([0.0, 0.2, -0.2], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(found), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["abm", "bdf"])
def test_times_that_are_computed_within_a_transform_do_not_move_for_it(method):
    """Whatever is computed there is wrapped; a row of no length is refused only where ends are differentiated."""
    ends, y0 = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    k, one = torch.tensor(0.7, dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def total(k, end=ends):
        span = (torch.zeros(2, dtype=torch.float64), end * 1)
        return adjoint.solve_ivp(lambda t, y, k: -k * y, span, y0, args=(k,), batched=True, method=method, rtol=1e-8).y[-1].sum()

    value, slope = math.exp(-1.4), -2 * math.exp(-1.4)
    torch.testing.assert_close(torch.func.jvp(total, (k,), (one,)), (one + value, one * slope), rtol=1e-5, atol=0)
    found = torch.func.jvp(torch.func.grad(total), (k,), (one,)) if method == "bdf" else (torch.func.grad(total)(k), one * 4 * value)
    torch.testing.assert_close(found, (one * slope, one * 4 * value), rtol=1e-4, atol=0)
    for moved in (lambda: torch.func.grad(total, argnums=1)(k, ends), lambda: torch.func.jvp(lambda e: total(k, e), (ends,), (ends,))):
        with pytest.raises(adjoint.UnsupportedCombination, match="no length"):
            moved()
