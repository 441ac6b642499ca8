"""Solves that go on after events with a reset: a bouncing ball against its closed form, in every form."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import Event, solve_ivp

from ..helpers.bouncing import BOUNCE, between, contact, fall, flight

FINE = {"rtol": 1e-9, "atol": 1e-11}
#: one of each family whose dense output follows a parabola
FAMILIES = ["tsit5", "dopri8", "verner7", "verner9", "kvaerno5", "rodas5p", "radau5", "gl4", "auto", "abm", "bdf", "rk4", "kencarp5"]
NATIVE = ["tsit5", "dopri8", "kvaerno5", "rodas5p", "radau5"]


def values(*numbers):
    return [torch.tensor(x, requires_grad=True) for x in numbers]


def right(method):
    if method.startswith("kencarp"):
        half = lambda *a: fall(*a) / 2  # noqa: E731
        return adjoint.SplitFunction(half, half)
    return fall


def options(method):
    # a parabola is exact in any step: most others would be first ones behind contacts, which grow. Multistep methods begin at first order
    return {"method": method, **FINE, **({} if method in ("bdf", "abm", "auto") else {"first_step": 0.05})}


def compared(found, wanted, inputs, tol=1e-9):
    """Values, first and second derivatives."""
    assert torch.allclose(found, wanted, rtol=tol, atol=tol)
    weights = torch.linspace(1.0, 2.0, found.numel()).reshape(found.shape)
    for order in range(2):
        # of second derivatives those of one first derivative after the other
        one, other = (
            torch.autograd.grad((x * weights).sum() if order == 0 else x, inputs, create_graph=True, materialize_grads=True)
            for x in (found, wanted)
        )
        for a, b in zip(one, other, strict=True):
            scale = 1 + float(b.detach().abs().max())
            assert torch.allclose(a, b, rtol=tol, atol=tol * scale), (order, a, b)
        found, wanted = (sum(x.sum() for x in xs) + 0 * sum(x.sum() ** 2 for x in inputs) for xs in (one, other))


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.slow_cases("kencarp5", "gl4", "bdf")
def test_a_ball_that_bounces(method):
    """End state after n contacts, one trajectory: values and derivatives to the second in restitution, height and gravity."""
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    for n in (1, 2, 5) if method == "tsit5" else (3,):
        t = between(n, *inputs)
        sol = solve_ivp(right(method), (0.0, t), torch.stack([h, 0 * h]), (e, g), events=BOUNCE, **options(method))
        assert sol.status == 0 and sol.events["bounce"].t.shape == (n,)
        compared(sol.y[-1], flight(t, n, *inputs), inputs)


#: where restarts at the first order leave errors of the size of the tolerance
FINER = {"bdf": {"rtol": 1e-11, "atol": 1e-13}}
#: and contacts, of which each takes long
FEWER = {"bdf": 6}


@pytest.mark.parametrize("method", ["tsit5", *(pytest.param(m, marks=pytest.mark.slow) for m in FAMILIES[1:])])
def test_twenty_contacts(method):
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    keys, many = options(method) | FINER.get(method, {}), FEWER.get(method, 20)
    sol = solve_ivp(right(method), (0.0, between(many, *inputs)), torch.stack([h, 0 * h]), (e, g), events=BOUNCE, **keys)
    record = sol.events["bounce"]
    times = torch.stack([contact(k, *inputs) for k in range(1, many + 1)])
    compared(record.t, times, inputs)
    compared(sol.y[-1], flight(between(many, *inputs), many, *inputs), inputs)
    assert torch.allclose(record.after[:, 1], -e * record.y[:, 1]) and float(record.y[:, 0].detach().abs().max()) < 1e-11


@pytest.mark.parametrize("gradient", [adjoint.DiscreteAdjoint(), adjoint.GaussAdjoint()])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_what_lies_behind_an_event_is_not_swept_for_it(gradient, compile):
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    end, start = between(8, *inputs).detach(), torch.stack([h, 0 * h])
    sol = solve_ivp(fall, (0.0, end), start, (e, g), events=BOUNCE, gradient=gradient, compile=compile, **FINE)
    times = sol.events["bounce"].t
    for k in (0, 3):
        before = sol.stats.backward.n_steps
        found = torch.autograd.grad(times[k], inputs, retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(contact(k + 1, *inputs), inputs, materialize_grads=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert 0 < sol.stats.backward.n_steps - before < sol.stats.n_accepted * (k + 3) / 9


@pytest.mark.parametrize("method", [*FAMILIES, "native tsit5", "native rodas5p"])
@pytest.mark.slow_cases("bdf", "kvaerno5", "kencarp5")
def test_every_trajectory_of_a_batch_has_its_own_contacts(method):
    native, method = method.startswith("native"), method.removeprefix("native ")
    h, e, g = inputs = [torch.tensor(x, requires_grad=True) for x in ([2.0, 1.0, 0.5], [0.8, 0.5, 0.9], [9.81, 9.0, 8.0])]
    counts = (1, 0, 3)
    t = torch.stack([between(n, *(x[i] for x in inputs)) if n else torch.tensor(0.3) for i, n in enumerate(counts)])
    y0 = torch.stack([h, 0 * h], -1)
    sol = solve_ivp(right(method), (0.0, t), y0, (e, g), events=BOUNCE, batched=True, compile=native, **options(method))
    wanted = torch.stack([flight(t[i], n, *(x[i] for x in inputs)) for i, n in enumerate(counts)])
    assert sol.status.tolist() == [0, 0, 0] and (~sol.events[0].t.isnan()).sum(0).tolist() == list(counts)
    compared(sol.y[-1], wanted, inputs)


SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in ("kvaerno5", "native rodas5p")]


@pytest.mark.parametrize("method", ["tsit5", "native tsit5", *SLOW])
@pytest.mark.slow_cases("native tsit5")
def test_one_to_twenty_contacts(method):
    """Of twenty trajectories the n-th has n: values and derivatives to the second."""
    native, method = method.startswith("native"), method.removeprefix("native ")
    h, e, g = inputs = [torch.linspace(*ends, 20).requires_grad_() for ends in ((1.0, 2.0), (0.8, 0.85), (9.0, 10.0))]
    t = torch.stack([between(n + 1, *(x[n] for x in inputs)) for n in range(20)])
    y0 = torch.stack([h, 0 * h], -1)
    sol = solve_ivp(fall, (0.0, t), y0, (e, g), events=BOUNCE, batched=True, compile=native, **options(method))
    assert (~sol.events[0].t.isnan()).sum(0).tolist() == list(range(1, 21))
    compared(sol.y[-1], torch.stack([flight(t[n], n + 1, *(x[n] for x in inputs)) for n in range(20)]), inputs)


@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.slow_cases("kvaerno5")
def test_native(method, recwarn):
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    t = between(4, *inputs)
    sol = solve_ivp(fall, (0.0, t), torch.stack([h, 0 * h]), (e, g), events=BOUNCE, compile=True, **options(method))
    compared(sol.y[-1], flight(t, 4, *inputs), inputs)
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]


GRADIENTS = {
    "discrete": adjoint.DiscreteAdjoint(),
    "checkpoints": adjoint.DiscreteAdjoint(checkpoints=3),
    "backprop": adjoint.Backprop(),
    "forward": adjoint.ForwardSensitivity(),
    "interpolating": adjoint.InterpolatingAdjoint(rtol=1e-10, atol=1e-12),
    "quadrature": adjoint.QuadratureAdjoint(rtol=1e-10, atol=1e-12),
    "gauss": adjoint.GaussAdjoint(rtol=1e-10, atol=1e-12),
    "backsolve": adjoint.BacksolveAdjoint(rtol=1e-10, atol=1e-12),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.slow_cases("forward-True", "backprop-True", "interpolating-True", "gauss-True", "quadrature-True", "checkpoints-True")
def test_every_strategy(name, batched):
    """A ball with drag, by every strategy as by recording all."""

    def drag(t, y, e, c):
        return torch.stack([y[..., 1], -9.81 - c * y[..., 1]], -1)

    h, e, c = values(2.0, 0.8, 0.3)
    if batched and name == "backsolve":
        pytest.skip("of one trajectory only")

    def gradients(gradient):
        y0 = torch.stack([h, 0 * h])
        y0 = torch.stack([y0, 0.5 * y0]) if batched else y0
        keys = {"events": BOUNCE, "batched": batched, "gradient": gradient, "t_eval": [0.3, 1.1, 2.5], **FINE}
        sol = solve_ivp(drag, (0.0, 2.5), y0, (e, c), quadrature=lambda t, y, *a: (y**2).sum(-1), **keys)
        return torch.autograd.grad((sol.y**2).sum() + sol.events[0].t[:2].sum() + sol.quadrature.sum(), [h, e, c])

    found, wanted = gradients(GRADIENTS[name]), gradients(adjoint.Backprop())
    assert torch.allclose(torch.stack(found), torch.stack(wanted), rtol=1e-7)


@pytest.mark.parametrize("name", ["checkpoints", "interpolating"])
def test_integrals_of_rounds_whose_end_is_known(name):
    """The speed jumps where rounds end, so that the integral of it depends on when they do: it is the height."""
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    keys = {"events": BOUNCE, "gradient": GRADIENTS[name], "quadrature": lambda t, y, *a: y[..., 1], **options("dopri8")}
    sol = solve_ivp(fall, (0.0, 2.0), torch.stack([h, 0 * h]), (e, g), **keys)
    compared(sol.quadrature, flight(torch.tensor(2.0), 2, *inputs)[0] - h, inputs, 1e-8)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("door", ["ivp", "mass", "dae"])
@pytest.mark.slow_cases("mass-True", "dae-False", "dae-True")
def test_steps_of_rounds_whose_end_is_known(door, batched):
    """Times and states of steps that a reset ends move with it, in batches beside trajectories that reach theirs later."""
    level = torch.tensor(1.0, requires_grad=True)
    event = Event(lambda t, y: y[..., 0] - level, direction=1, reset=lambda t, y: 0.2 * y, name="event")
    fun = lambda t, y: torch.stack([1.0 + 0.1 * y[..., 1], torch.sin(3 * t) - y[..., 1]], -1)  # noqa: E731
    y0 = torch.tensor([[0.3, 0.5], [0.6, 0.2]]) if batched else torch.tensor([0.3, 0.5])

    def solved(gradient):
        keys = {"events": event, "batched": batched, "t_eval": "steps", "gradient": gradient, "rtol": 1e-6, "atol": 1e-8}
        if door == "dae":
            return adjoint.solve_dae(lambda t, y, yp: yp - fun(t, y), (0.0, 1.2), y0, **keys)
        mass = {"mass_matrix": torch.eye(2), "method": "radau5"} if door == "mass" else {}
        return solve_ivp(fun, (0.0, 1.2), y0, **mass, **keys)

    def slopes(gradient):
        sol = solved(gradient)
        same = sol.t.diff(dim=0) == 0
        states = [x[same].sum() for x in (sol.y[:-1], sol.y[1:])]
        return torch.stack([torch.autograd.grad(x, level, retain_graph=True)[0] for x in (sol.t[:-1][same].sum(), *states)])

    assert torch.allclose(slopes(adjoint.InterpolatingAdjoint()), slopes(adjoint.Backprop()), rtol=1e-4)
    if door == "dae":
        sol = solved(adjoint.InterpolatingAdjoint())
        with pytest.raises(adjoint.InvalidInput, match=r"the slope .* at an event that ends a step"):
            sol.yp.nansum().backward()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_samples_on_both_sides(batched, backwards):
    """What is returned at the time of a reset is the state after it; times may be given in either order."""
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    first = contact(1, *inputs).detach()
    when = torch.stack([torch.tensor(0.0), first - 0.1, first, first + 0.1, first + 1.0, torch.tensor(2.0)])
    times = when.flip(0) if backwards else when
    y0 = torch.stack([h, 0 * h])
    y0 = torch.stack([y0, 2 * y0]) if batched else y0
    sol = solve_ivp(fall, (0.0, 2.0), y0, (e, g), events=BOUNCE, t_eval=times, batched=batched, **FINE)
    y = sol.y.flip(0) if backwards else sol.y
    counts = [sum(bool(contact(k, *inputs) < t) for k in (1, 2, 3)) for t in when]
    for k, t in enumerate(when):
        if k != 2:
            own = y[k, 0] if batched else y[k]
            compared(own, flight(t, counts[k], *inputs), inputs)
    # the event is found at one of the two sides of its rounded time
    assert abs(float((y[2, 0] if batched else y[2])[0].detach())) < 1e-10
    if batched:
        compared(y[4, 1], flight(when[4], 1, 2 * h, e, g), inputs)


def test_the_state_at_the_very_time_of_a_reset():
    def clock(t, y):
        return torch.ones_like(y)

    event = Event(lambda t, y: y[0] - 0.5, reset=lambda t, y: y - 0.5, name="tick")
    sol = solve_ivp(clock, (0.0, 1.25), torch.zeros(1), events=event, t_eval=[0.25, 0.5, 0.75, 1.0, 1.25], dense_output=True)
    assert torch.allclose(sol.y[:, 0], torch.tensor([0.25, 0.0, 0.25, 0.0, 0.25]), atol=1e-12)
    assert torch.allclose(sol.events["tick"].t, torch.tensor([0.5, 1.0]))
    assert torch.allclose(sol.events["tick"].y, torch.full((2, 1), 0.5)) and torch.allclose(
        sol.events["tick"].after, torch.zeros(2, 1), atol=1e-12
    )
    at = sol.events["tick"].t[0]
    assert abs(float(sol(at)[0])) < 1e-12 and abs(float(sol(at, side="left")[0]) - 0.5) < 1e-12
    assert torch.allclose(sol(torch.tensor([0.0, 0.3, 0.6, 1.25]))[:, 0], torch.tensor([0.0, 0.3, 0.1, 0.25]), atol=1e-12)
    steps = solve_ivp(clock, (0.0, 1.25), torch.zeros(1), events=event, t_eval="steps")
    twice = (steps.t - 0.5).abs() < 1e-12
    assert twice.sum() == 2 and torch.allclose(steps.y[twice][:, 0], torch.tensor([0.5, 0.0]), atol=1e-12)
    bell = Event(lambda t, y: t - 0.5, reset=lambda t, y: y - 0.5)
    at_the_end = solve_ivp(clock, (0.0, 0.5), torch.zeros(1), events=bell, t_eval=[0.25, 0.5], dense_output=True)
    assert torch.allclose(at_the_end.y[:, 0], torch.tensor([0.25, 0.0]), atol=1e-12) and at_the_end.status == 0
    assert abs(float(at_the_end(0.5)[0])) < 1e-12 and abs(float(at_the_end(0.5, side="left")[0]) - 0.5) < 1e-12


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.slow_cases("True")
def test_steps_dense_output_and_integrals_of_a_batch(native):
    h, e, g = inputs = [torch.tensor(x, requires_grad=True) for x in ([2.0, 1.0], [0.8, 0.7], [9.81, 9.0])]
    y0 = torch.stack([h, 0 * h], -1)
    keys = {"events": BOUNCE, "batched": True, "compile": native, **FINE}
    sol = solve_ivp(fall, (0.0, 1.6), y0, (e, g), dense_output=True, quadrature=lambda t, y, *a: y[..., 1], t_eval="steps", **keys)
    # the integral of the velocity: the way that was covered is the height, less nothing at contacts
    assert torch.allclose(sol.quadrature, solve_ivp(fall, (0.0, 1.6), y0, (e, g), **keys).y[-1, :, 0] - h, atol=1e-9)
    n = [sum(bool(contact(k, *(x[i] for x in inputs)) < 1.6) for k in range(1, 9)) for i in (0, 1)]
    assert (~sol.events[0].t.isnan()).sum(0).tolist() == n
    for i in (0, 1):
        own = [x[i] for x in inputs]
        t = sol.t[:, i]
        t, y = t[~t.isnan()], sol.y[:, i][~t.isnan()]
        assert bool((t.diff() >= 0).all()) and int((t.diff() == 0).sum()) == n[i] and float(t[-1]) == 1.6
        compared(sol(torch.tensor(1.5))[i], flight(torch.tensor(1.5), sum(bool(contact(k, *own) < 1.5) for k in range(1, 9)), *own), inputs)
        assert torch.allclose(sol(t.unsqueeze(-1).expand(-1, 2)[: len(t) // 2], side="left")[:, i][:1], y[:1])


@pytest.mark.parametrize("transform", ["vmap", "jacrev", "jacfwd", "hessian", "vmap grad", "jvp"])
def test_under_transforms(transform):
    e, g = torch.tensor(0.8), torch.tensor(9.81)

    def end(h, e=e, g=g, **keys):
        return solve_ivp(fall, (0.0, 2.0), torch.stack([h, 0 * h]), (e, g), events=BOUNCE, **FINE, **keys).y[-1]

    def true(h):
        n = sum(bool(contact(k, h.detach(), e, g) < 2.0) for k in range(1, 9))
        return flight(torch.tensor(2.0), n, h, e, g)

    def derivative(h):
        return torch.func.jacrev(true)(h)

    h = torch.tensor([2.0, 1.0, 3.0])
    if transform == "vmap":
        assert torch.allclose(torch.vmap(end)(h), torch.stack([true(x) for x in h]), atol=1e-9)
        samples = torch.vmap(
            lambda x: solve_ivp(fall, (0.0, 2.0), torch.stack([x, 0 * x]), (e, g), events=BOUNCE, t_eval=[0.2, 1.9], **FINE).y
        )(h)
        assert torch.allclose(samples[1, 0], flight(torch.tensor(0.2), 0, h[1], e, g), atol=1e-9)
    elif transform == "vmap grad":
        found = torch.vmap(torch.func.jacrev(end))(h)
        wanted = []
        for x in h:
            x = x.clone().requires_grad_()
            n = sum(bool(contact(k, x.detach(), e, g) < 2.0) for k in range(1, 9))
            y = flight(torch.tensor(2.0), n, x, e, g)
            wanted.append(torch.stack([torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in (0, 1)]))
        assert torch.allclose(found, torch.stack(wanted), atol=1e-8)
    else:
        x = h[0].clone().requires_grad_()
        y = flight(torch.tensor(2.0), 2, x, e, g)
        first = [torch.autograd.grad(y[i], x, create_graph=True)[0] for i in (0, 1)]
        second = torch.stack([torch.autograd.grad(f, x, retain_graph=True)[0] for f in first])
        first = torch.stack(first).detach()
        found = {
            "jacrev": lambda: torch.func.jacrev(end)(h[0]),
            "jacfwd": lambda: torch.func.jacfwd(end)(h[0]),
            "hessian": lambda: torch.func.hessian(end)(h[0]),
            "jvp": lambda: torch.func.jvp(end, (h[0],), (torch.ones(()),))[1],
        }[transform]()
        assert torch.allclose(found, second if transform == "hessian" else first, rtol=1e-8)
