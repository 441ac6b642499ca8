"""Events under ``torch.vmap``: each copy is what it is when solved by itself, located times and all their derivatives included."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from adjoint import Backprop, ForwardSensitivity, SplitFunction, odeint_event, solve_dae, solve_ivp

#: drag of three balls; heights of the ground that they fall to, the third of which is out of reach
DRAG = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
GROUND = torch.tensor([0.0, 0.5, -9.0], dtype=torch.float64)
START = torch.tensor([1.0, 2.0], dtype=torch.float64)
#: explicit steps of one trajectory are sized by floats, of many by tensors: at fine tolerances both give the same solution
FINE = {"rtol": 1e-9, "atol": 1e-11}
#: where sizes of steps are chosen by numbers in single precision, but of one trajectory in double
ROUNDED = {"rodas4": 1e-8}
METHODS = ["tsit5", "rk4", "rodas4", "kencarp3", "bdf", "abm", "auto"]


def fall(t, y, drag, ground):
    """Height and velocity in a fluid."""
    v = y[..., 1]
    return torch.stack([v, -9.81 - drag * v - drag * v**3 / 50], -1)


def event(f, terminal=False, direction=0.0):
    g = lambda *args: f(*args)  # noqa: E731
    g.terminal, g.direction = terminal, direction
    return g


def level(terminal=False, direction=0.0):
    """Passed on the way up and on the way down."""
    return event(lambda t, y, drag, ground: y[..., 0] - 1.1 - ground / 100, terminal, direction)


LANDS = event(lambda t, y, drag, ground: y[..., 0] - ground, terminal=1, direction=-1)
TOP = event(lambda t, y, drag, ground: y[..., 1])
EVENTS = [LANDS, TOP, level(), level(direction=-1)]


def throw(method="tsit5", events=EVENTS, end=0.8, **more):
    """``(drag, ground, y0) -> Solution``."""
    tolerances = FINE if method in ("tsit5", "auto") else {"rtol": 1e-4, "atol": 1e-6}
    first = {"first_step": 0.1} if method in ("rk4", "rodas4", "kencarp3") else {}
    options = {"method": method, "events": events, **tolerances, **first, **more}
    half = lambda *args: fall(*args) / 2  # noqa: E731
    fun = SplitFunction(half, half) if method.startswith("kencarp") else fall
    return lambda drag, ground, y0=START: solve_ivp(fun, (0.0, end), y0, (drag, ground), **options)


def parts(sol):
    records = {f"{name}{i}": getattr(e, name) for i, e in enumerate(sol.events) for name in ("t", "y")}
    return {"t": sol.t, "y": sol.y, "status": torch.as_tensor(sol.status), **records}


def assert_padded(mine, theirs, tolerance=1e-12):
    """``mine`` is ``theirs`` with NaN behind it."""
    if not theirs.dim():
        assert torch.equal(mine, theirs)
        return
    assert len(mine) >= len(theirs) and bool(mine[len(theirs) :].isnan().all())
    assert torch.allclose(mine[: len(theirs)], theirs, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_as_one_by_one(method):
    """The first two land, the third does not: times, states and statuses are those of single solves, padded with NaN."""
    solve, sampled = throw(method), throw(method, t_eval=torch.tensor([0.1, 0.5, 0.8]))
    many = vmap(lambda *a: parts(solve(*a)))(DRAG, GROUND)
    samples = vmap(lambda *a: sampled(*a).y)(DRAG, GROUND)
    assert many["status"].tolist() == [1, 1, 0] and many["t0"].shape == (3, 1)
    for b in range(3):
        one = parts(solve(DRAG[b], GROUND[b]))
        assert [len(one[f"t{i}"]) for i in range(4)] == [int(b < 2), 1, 2, 1]
        for name, value in one.items():
            assert_padded(many[name][b], value, ROUNDED.get(method, 1e-12))
        assert_padded(samples[b], sampled(DRAG[b], GROUND[b]).y, ROUNDED.get(method, 1e-12))


def test_as_one_batch():
    """The layout is that of ``batched=True``, the copies in front."""
    many = vmap(lambda *a: parts(throw()(*a)))(DRAG, GROUND)
    batch = parts(throw(batched=True)(DRAG, GROUND, START.expand(3, 2)))
    for name, value in batch.items():
        assert torch.allclose(many[name].movedim(0, 1) if value.dim() > 1 else many[name], value, rtol=0, atol=1e-13, equal_nan=True)


def landing(method="tsit5", **more):
    """Time and speed of the landing, and the time of the second passage of a level: ``(drag, ground) -> (3,)``."""
    solve = throw(method, [LANDS, level()], **more)

    def values(x):
        sol = solve(x[0], x[1])
        return torch.stack([sol.t[-1], sol.y[-1, 1], sol.events[1].t[1]])

    return values


X = torch.stack([DRAG, GROUND], 1)[:2]


@pytest.mark.parametrize("gradient", [None, Backprop(), ForwardSensitivity()], ids=["discrete", "backprop", "forward"])
@pytest.mark.parametrize("method", ["tsit5", "rodas4", "bdf"])
@pytest.mark.slow_cases(
    "bdf-forward", "bdf-backprop", "rodas4-backprop", "tsit5-discrete", "rodas4-discrete", "bdf-discrete", "rodas4-forward",
)  # fmt: skip
def test_derivatives_as_one_by_one(method, gradient):
    """In every order of mapping and differentiating."""
    values = landing(method, gradient=gradient)
    want = []
    for x in X:
        leaf = x.clone().requires_grad_()
        want.append(torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in values(leaf)]))
    want, tolerance = torch.stack(want), ROUNDED.get(method, 1e-10)
    close = lambda got: torch.allclose(got, want, rtol=0, atol=tolerance)  # noqa: E731
    assert close(vmap(jacrev(values))(X)) and close(vmap(jacfwd(values))(X))
    assert torch.allclose(vmap(grad(lambda x: values(x)[0]))(X), want[:, 0], rtol=0, atol=tolerance)
    leaf = X.clone().requires_grad_()
    mapped = vmap(values)(leaf)
    assert torch.allclose(torch.autograd.grad(mapped[:, 0].sum(), leaf, retain_graph=True)[0], want[:, 0], rtol=0, atol=tolerance)
    across = jacrev(lambda x: vmap(values)(x).sum(0))(X)
    assert close(across.movedim(1, 0))


@pytest.mark.parametrize("method", [pytest.param("tsit5", marks=pytest.mark.slow), "rk4"])
def test_hessian(method):
    """Of the landing's time, by each nesting; against single solves, and with rk4, which falls exactly without drag, a closed form."""
    when = lambda x: landing(method)(x)[0]  # noqa: E731
    want = torch.stack([hessian(when)(x) for x in X])
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev), (jacfwd, jacfwd)):
        assert torch.allclose(vmap(outer(inner(when)))(X), want, rtol=0, atol=1e-9)
    if method == "rk4":
        v, g = 2.0, 9.81
        grounds = torch.tensor([0.0, 0.5])
        root = (v**2 + 2 * g * (1 - grounds)).sqrt()
        free = vmap(hessian(lambda ground: when(torch.stack([torch.zeros(()), ground]))))(grounds)
        assert torch.allclose(vmap(lambda x: when(x))(torch.stack([0 * grounds, grounds], 1)), (v + root) / g, rtol=0, atol=1e-12)
        assert torch.allclose(free, -g / root**3, rtol=0, atol=1e-10)


def test_start_and_end_of_the_span():
    """Mapped times: the event moves with the start, and ends that come before it leave the record empty."""

    def values(start, end):
        stop = event(lambda t, y: y[0] - 0.5, terminal=True)
        sol = solve_ivp(lambda t, y: -y, (start, end), torch.ones(1), events=stop, **FINE)
        return sol.t[-1], sol.events[0].t

    starts, ends = torch.tensor([0.0, 0.3, 0.1]), torch.tensor([2.0, 0.8, 1.0])
    last, found = vmap(values)(starts, ends)
    assert torch.allclose(last, torch.stack([starts[0] + torch.tensor(2.0).log(), ends[1], starts[2] + torch.tensor(2.0).log()]))
    assert found.isnan().tolist() == [[False], [True], [False]]
    slopes = vmap(grad(lambda *a: values(*a)[0], argnums=(0, 1)))(starts, ends)
    assert torch.allclose(slopes[0], torch.tensor([1.0, 0.0, 1.0]), atol=1e-9) and torch.allclose(slopes[1], torch.tensor([0.0, 1.0, 0.0]))


def test_no_copy_has_an_event():
    sol = vmap(lambda *a: parts(throw(events=[LANDS], end=0.1)(*a)))(DRAG, GROUND)
    assert sol["t0"].shape == (3, 0) and sol["y0"].shape == (3, 0, 2) and sol["status"].tolist() == [0, 0, 0]


def test_captured_and_module_parameters():
    """Of the event function alone: tensors that it closes over, and those of a module, mapped or not."""
    net = torch.nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.05]]))
        net.bias.fill_(-0.4)
    stacked = {name: torch.stack([p.detach(), p.detach() + 0.1]) for name, p in net.named_parameters()}

    def when(parameters, shift):
        stop = event(lambda t, y, *args: functional_call(net, parameters, (y,))[0] + shift, terminal=True)
        return solve_ivp(fall, (0.0, 0.8), START, (DRAG[0], GROUND[0]), events=stop, **FINE).t[-1]

    shifts = torch.tensor([0.0, 0.1])
    got = vmap(grad(when, argnums=(0, 1)))(stacked, shifts)
    for b in range(2):
        want = grad(when, argnums=(0, 1))({name: p[b] for name, p in stacked.items()}, shifts[b])
        assert all(torch.allclose(got[0][name][b], p, rtol=0, atol=1e-10) for name, p in want[0].items())
        assert torch.allclose(got[1][b], want[1], rtol=0, atol=1e-10) and float(want[1].abs()) > 0.05
    only = vmap(when, in_dims=(None, 0))({name: p.detach() for name, p in net.named_parameters()}, shifts)
    assert torch.allclose(only[0], when({name: p[0] for name, p in stacked.items()}, shifts[0]), rtol=0, atol=1e-12)


def test_nested_maps_and_batches():
    """A map of a map and a map of batches: the same numbers in other places."""
    grounds = GROUND[:2].unsqueeze(1) + torch.tensor([0.0, 0.1, 0.2])
    once = lambda drag, ground: throw(events=[LANDS])(drag, ground).t[-1]  # noqa: E731
    want = torch.stack([torch.stack([once(DRAG[i], grounds[i, j]) for j in range(3)]) for i in range(2)])
    twice = vmap(lambda drag, row: vmap(lambda ground: once(drag, ground))(row))
    batches = vmap(lambda drag, row: throw(events=[LANDS], batched=True)(drag, row, START.expand(3, 2)).t[-1])
    slope = vmap(grad(lambda drag, row: vmap(lambda ground: once(drag, ground))(row).sum(), argnums=1))
    assert torch.allclose(twice(DRAG[:2], grounds), want, rtol=0, atol=1e-12)
    assert torch.allclose(batches(DRAG[:2].unsqueeze(1), grounds), want, rtol=0, atol=1e-12)
    expected = vmap(vmap(grad(once, argnums=1), (None, 0)))(DRAG[:2], grounds)
    assert torch.allclose(slope(DRAG[:2], grounds), expected, rtol=0, atol=1e-10)


def test_own_steps_and_dense_output_end_at_the_event():
    solve, inside = throw(t_eval="steps", dense_output=True), torch.tensor([0.0, 0.25, 0.5, 0.79])

    def values(drag, ground):
        sol = solve(drag, ground)
        last = sol.t.nan_to_num(-1.0).max()
        return sol.t, sol.y, sol(inside), sol(last)

    t, y, dense, last = vmap(values)(DRAG, GROUND)
    assert t.isnan().any(1).sum() == 2
    for b in range(3):
        one = solve(DRAG[b], GROUND[b])
        n = len(one.t)
        assert bool(t[b, n:].isnan().all()) and torch.allclose(t[b, :n], one.t, rtol=1e-6)
        assert bool(y[b, n:].isnan().all()) and torch.allclose(y[b, : n - 1], one(t[b, : n - 1]), rtol=0, atol=1e-10)
        assert torch.allclose(y[b, n - 1], one.y[-1], rtol=0, atol=1e-12) and torch.allclose(last[b], one(one.t[-1]), rtol=0, atol=1e-12)
        reached = inside <= one.t[-1]
        assert torch.allclose(dense[b, reached], one(inside[reached]), rtol=0, atol=1e-12) and bool(dense[b, ~reached].isnan().all())
    assert bool(dense[0, -1].isnan().all()) and not bool(dense[2].isnan().any())


def test_dense_output_at_the_event_that_ended_it():
    """Its time is located on the dense output and refined: rounding must not put it outside."""
    for shift in torch.linspace(0.0, 0.1, 8):
        sol = throw(events=[LANDS], dense_output=True)(DRAG[0].clone().requires_grad_(), shift)
        assert torch.allclose(sol(sol.t[-1]), sol.y[-1], rtol=0, atol=1e-12)


def test_automatic_switching():
    """Events in phases of either kind, counted through: ``y`` goes to ``cos t`` fast, stiff then, and slowly."""
    relax = lambda t, y, k: -k * (y - torch.cos(t))  # noqa: E731
    stop = event(lambda t, y, k: ((y - 1.5) * (y - 0.5)).squeeze(-1), terminal=2)
    ks, y0 = torch.tensor([1.0, 2000.0, 500.0]), torch.full((1,), 2.0)

    def solve(k):
        return solve_ivp(relax, (0.0, 3.0), y0, (k,), events=stop, method="auto", rtol=1e-6, atol=1e-8)

    t, status, work, last = vmap(lambda k: (solve(k).events[0].t, solve(k).status, solve(k).stats.n_jac, solve(k).t[-1]))(ks)
    slopes = vmap(grad(lambda k: solve(k).t[-1]))(ks)
    assert status.tolist() == [1, 1, 1] and work[0] == 0 and bool((work[1:] > 0).all())
    for b in range(3):
        leaf = ks[b].clone().requires_grad_()
        one = solve(leaf)
        assert_padded(t[b], one.events[0].t.detach(), 1e-6)
        assert torch.allclose(last[b], one.t[-1], rtol=0, atol=1e-6)
        assert torch.allclose(slopes[b], torch.autograd.grad(one.t[-1], leaf)[0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("method", ["radau", "bdf"])
@pytest.mark.slow_cases("bdf")
def test_implicit_equations(method):
    """``z = exp(-2 k t)`` passes 1/4 at ``log 2 / k``; the slopes there are ``-k/2`` both."""
    residual = lambda t, y, yp, k: torch.stack([yp[0] + k * y[0], y[1] - y[0] ** 2])  # noqa: E731
    quarter = event(lambda t, y, k: y[1] - 0.25, terminal=True)

    def solve(k):
        return solve_dae(residual, (0.0, 2.0), torch.ones(2), args=(k,), method=method, events=quarter, rtol=1e-6, atol=1e-8)

    ks = torch.tensor([2.0, 0.5, 0.1])
    t, yp, status = vmap(lambda k: (solve(k).t, solve(k).yp[-1], solve(k).status))(ks)
    assert status.tolist() == [1, 1, 0]
    for b in range(3):
        one = solve(ks[b])
        assert torch.allclose(t[b], one.t, rtol=0, atol=1e-12) and torch.allclose(yp[b], one.yp[-1], rtol=0, atol=1e-11)
    slopes = vmap(grad(lambda k: solve(k).t[-1]))(ks)
    assert torch.allclose(slopes, torch.tensor([-1.0, -1.0, 0.0]) * torch.tensor(2.0).log() / ks**2, atol=1e-4)
    one = torch.stack([grad(lambda k: solve(k).t[-1])(k) for k in ks])
    assert torch.allclose(slopes, one, rtol=0, atol=1e-10)


def test_odeint_event():
    """torchdiffeq's form; the first of several functions counts."""

    def when(g, v):
        fun = lambda t, y: torch.stack([y[1], -g])  # noqa: E731
        first = lambda t, y: torch.stack([y[0], 9.0 - t])  # noqa: E731
        return odeint_event(fun, torch.stack([torch.ones(()), v]), torch.tensor(0.0), event_fn=first, rtol=1e-9, atol=1e-11)[0]

    closed = lambda g, v: (v + (v * v + 2 * g).sqrt()) / g  # noqa: E731
    g, v = torch.tensor([9.81, 1.6, 0.01]), torch.tensor([0.0, 0.5, 0.1])
    got, want = vmap(when)(g, v), torch.minimum(closed(g, v), torch.tensor(9.0))
    assert torch.allclose(got, want, rtol=1e-9) and float(got[2]) == pytest.approx(9.0)
    slopes = vmap(grad(when, argnums=(0, 1)))(g, v)
    for mine, theirs in zip(slopes, vmap(grad(closed, argnums=(0, 1)))(g, v), strict=True):
        assert torch.allclose(mine[:2], theirs[:2], rtol=1e-8) and abs(float(mine[2])) < 1e-12


def test_quadrature_stops_at_the_event():
    """The integral of the speed is the way fallen."""
    stop = event(lambda t, y, g: y[0], terminal=True)

    def fallen(g):
        fun = lambda t, y, g: torch.stack([y[1], -g])  # noqa: E731
        sol = solve_ivp(fun, (0.0, 1.0), torch.tensor([1.0, 0.0]), (g,), events=stop, quadrature=lambda t, y, g: -y[1], **FINE)
        return sol.quadrature

    g = torch.tensor([9.81, 4.0, 1.0])
    assert torch.allclose(vmap(fallen)(g), torch.tensor([1.0, 1.0, 0.5]), rtol=1e-9)
    assert torch.allclose(vmap(grad(fallen))(g), torch.tensor([0.0, 0.0, 0.5]), atol=1e-9)


def test_forward_mode_in_single_precision():
    """Tangents have the type of what they are of."""
    grounds = torch.tensor([0.3, 0.5], dtype=torch.float32)

    def when(ground):
        event = lambda t, y: y[0] - ground  # noqa: E731
        event.terminal = True
        sol = solve_ivp(lambda t, y: -y, (0.0, 5.0), torch.ones(1, dtype=torch.float32), events=event, rtol=1e-4, atol=1e-6)
        return sol.events[0].t[0], sol.y[-1, 0]

    with torch.autograd.forward_ad.dual_level():
        found = vmap(when)(torch.autograd.forward_ad.make_dual(grounds, torch.ones_like(grounds)))
        times, states = (torch.autograd.forward_ad.unpack_dual(x).tangent for x in found)
    assert torch.allclose(times.float(), -1 / grounds, rtol=1e-3)
    assert torch.allclose(states.float(), torch.ones(2, dtype=torch.float32), rtol=1e-3)
