"""Constrained mechanisms: against trusted values, minimal coordinates, and conservation."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import ForwardSensitivity, InterpolatingAdjoint, InvalidInput, SingularJacobian, UnsupportedCombination, mechanics, solve_ivp

#: of REFERENCES: x, y, u, v and the multiplier at t = 10 for g = L = 1, and their derivatives in g
PENDULUM = [-0.8115864461913029, -0.584232351345397, -0.6315291490650206, 0.8772887988410706, 1.7526970540361941]
SLOPES = [-3.1576457453251, 4.3864439942053, 6.7965612921435, 0.5585560047991, -11.4066349285799]


def gravity(t, q, v, g):
    return torch.stack([torch.zeros_like(q[..., 0]), -g.expand_as(q[..., 1])], -1)


def rod(t, q, g):
    return ((q**2).sum(-1, keepdim=True) - 1) / 2


@pytest.fixture
def pendulum():
    return mechanics(torch.ones(2), gravity, rod)


def flat(y):
    return torch.cat([y.q, y.v, y.lam], -1)


@pytest.mark.slow
def test_pendulum_against_trusted_values(pendulum):
    g = torch.tensor(1.0, requires_grad=True)
    sol = pendulum.solve((0.0, 10.0), torch.tensor([1.0, 0.0]), torch.zeros(2), (g,), rtol=1e-8, atol=1e-10)
    last = flat(sol.y)[-1]
    assert torch.allclose(last, torch.tensor(PENDULUM), rtol=1e-7)
    slopes = [float(torch.autograd.grad(x, g, retain_graph=True)[0]) for x in last]
    assert slopes == pytest.approx(SLOPES, rel=1e-6)


def test_pendulum_against_its_angle(pendulum):
    """Minimal coordinates, also of the multiplier: ``lam = v^2 - g y``; both constraints hold all the way, energy to tolerance."""
    g = torch.tensor(1.3, requires_grad=True)
    times = torch.linspace(0.0, 0.8, 5)
    sol = pendulum.solve((0.0, 0.8), torch.tensor([1.0, 0.0]), torch.zeros(2), (g,), t_eval=times, rtol=1e-6, atol=1e-8)
    swing = lambda t, y, g: torch.stack([y[1], -g * torch.sin(y[0])])  # noqa: E731
    angle = solve_ivp(swing, (0.0, 0.8), torch.tensor([math.pi / 2, 0.0]), (g,), t_eval=times, method="dopri8", rtol=1e-11, atol=1e-12).y
    a, w = angle.unbind(-1)
    truth = torch.stack([a.sin(), -a.cos(), w * a.cos(), w * a.sin(), w**2 + g * a.cos()], -1)
    assert torch.allclose(flat(sol.y), truth, atol=1e-4)
    weights = torch.cos(torch.arange(25.0)).reshape(5, 5)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), g)[0] for x in (flat(sol.y), truth))
    assert torch.allclose(mine, theirs, rtol=1e-4)
    q, v = sol.y.q.detach(), sol.y.v.detach()
    assert float(rod(None, q, None).abs().max()) < 1e-8 and float((q * v).sum(-1).abs().max()) < 1e-7
    energy = (v**2).sum(-1) / 2 + g.detach() * q[:, 1]
    assert float((energy - energy[0]).abs().max()) < 1e-4 and float(sol.y.mu.detach().abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [ForwardSensitivity(), InterpolatingAdjoint()], ids=["forward", "interpolating"])
def test_other_strategies(pendulum, gradient):
    def derivative(strategy):
        g = torch.tensor(1.0, requires_grad=True)
        q0 = torch.tensor([0.6, -0.8], requires_grad=True)
        sol = pendulum.solve((0.0, 1.0), q0, torch.tensor([0.4, 0.3]), (g,), gradient=strategy, rtol=1e-8, atol=1e-10)
        return torch.autograd.grad(sol.y.q[-1, 0], (g, q0))

    for mine, theirs in zip(derivative(gradient), derivative(None), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_batch(pendulum):
    g = torch.tensor([1.0, 2.0], requires_grad=True)
    q0, v0 = torch.tensor([[1.0, 0.0], [0.6, -0.8]]), torch.zeros(2, 2)
    many = pendulum.solve((0.0, 0.6), q0, v0, (g,), batched=True, rtol=1e-5, first_step=0.05)
    (bars,) = torch.autograd.grad(many.y.q[-1, :, 0].sum(), g)
    for b in range(2):
        k = g[b].detach().clone().requires_grad_(True)
        one = pendulum.solve((0.0, 0.6), q0[b], v0[b], (k,), rtol=1e-5, first_step=0.05)
        assert torch.allclose(many.y.q[-1, b], one.y.q[-1], atol=1e-9) and torch.allclose(many.y.lam[-1, b], one.y.lam[-1], atol=1e-7)
        assert torch.allclose(bars[b], torch.autograd.grad(one.y.q[-1, 0], k)[0], rtol=1e-6)


def test_start_is_projected_and_differentiable(pendulum):
    """Off the circle and with a velocity across it; the nearest point of the circle lies along the gradient of the constraint."""
    g = torch.tensor(1.0)
    q0 = torch.tensor([0.6, -0.9], requires_grad=True)
    y, yp = pendulum.initial(q0, torch.tensor([1.0, 1.0]), g)
    along = q0.detach() / q0.detach().norm()
    assert torch.allclose(y.q, along, atol=1e-12)
    tangent = torch.stack([-along[1], along[0]])
    assert torch.allclose(y.v, tangent * (tangent @ torch.ones(2)), atol=1e-12)
    assert torch.allclose(yp.v, gravity(None, y.q, y.v, g) - y.lam * y.q, atol=1e-12)
    assert float(y.lam) == pytest.approx(float(y.v @ y.v) - float(along[1]), abs=1e-12)
    jacobian = torch.stack([torch.autograd.grad(y.q[i], q0, retain_graph=True)[0] for i in range(2)])
    expected = (torch.eye(2) - torch.outer(along, along)) / q0.detach().norm()
    assert torch.allclose(jacobian, expected, atol=1e-10)


def test_driven_constraint_and_full_mass_matrix():
    """A bead on a wire that rises with speed: ``q2 = q1^2 / 2 + s(t)``, against its equation in ``q1``; mass that depends on ``q``."""
    s = lambda t: torch.sin(t) / 3  # noqa: E731

    def mass(q, c):
        diagonal = torch.stack([1 + c * q[..., 0] ** 2, torch.ones_like(q[..., 0])], -1)
        return torch.diag_embed(diagonal)

    def force(t, q, v, c):
        # that of a kinetic energy (1 + c x^2) x'^2 / 2: minus c x x'^2
        return torch.stack([-c * q[..., 0] * v[..., 0] ** 2, torch.full_like(q[..., 0], -1.0)], -1)

    wire = lambda t, q, c: (q[..., 1] - q[..., 0] ** 2 / 2 - s(t)).unsqueeze(-1)  # noqa: E731
    c = torch.tensor(0.5, requires_grad=True)
    q0 = torch.tensor([1.0, 0.5])
    sol = mechanics(mass, force, wire).solve((0.0, 1.0), q0, torch.tensor([0.0, 0.0]), (c,), rtol=1e-8, atol=1e-10)
    # the start is projected: v on q1 v1 + s' = v2 with the metric of the mass
    y = mechanics(mass, force, wire).initial(q0, torch.zeros(2), c)[0]

    def reduced(t, z, c):
        x, w = z
        # (1 + c x^2 + x^2) x'' = -c x x'^2 - x (1 + x'^2 + s'')
        return torch.stack([w, (-c * x * w**2 - x * (1 + w**2 - torch.sin(t) / 3)) / (1 + (c + 1) * x**2)])

    truth = solve_ivp(reduced, (0.0, 1.0), torch.stack([y.q[0], y.v[0]]), (c,), method="dopri8", rtol=1e-11, atol=1e-12).y[-1]
    assert torch.allclose(torch.stack([sol.y.q[-1, 0], sol.y.v[-1, 0]]), truth, atol=1e-6)
    mine, theirs = (torch.autograd.grad(x, c)[0] for x in (sol.y.q[-1, 0], truth[0]))
    assert torch.allclose(mine, theirs, rtol=1e-5)


def test_what_is_refused(pendulum):
    twice = mechanics(torch.ones(2), gravity, lambda t, q, g: torch.cat([rod(t, q, g), 2 * rod(t, q, g)], -1))
    with pytest.raises(SingularJacobian, match="redundant"):
        twice.initial(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(InvalidInput, match="batched"):
        pendulum.solve((0.0, 1.0), torch.ones(3, 2), torch.zeros(3, 2), (torch.tensor(1.0),))
    with pytest.raises(InvalidInput, match="one shape"):
        pendulum.initial(torch.ones(2), torch.zeros(3), torch.tensor(1.0))
    with pytest.raises(InvalidInput, match="consistent"):
        pendulum.solve((0.0, 1.0), torch.ones(2), torch.zeros(2), (torch.tensor(1.0),), consistent="solve")
    with pytest.raises(InvalidInput, match="mass"):
        mechanics(3.0, gravity, rod)
    with pytest.raises(InvalidInput, match="mass has shape"):
        mechanics(torch.ones(3), gravity, rod).initial(torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor(1.0))
    start = torch.tensor([1.0, 0.0]), torch.zeros(2), torch.tensor(1.0)
    wrong = [
        (torch.ones(2), gravity, lambda t, q, g: rod(t, q, g)[0], r"constraint must return .* shape \(m,\)"),
        (torch.ones(2), lambda t, q, v, g: -g, rod, r"force must return .* shape \(2,\).* got shape \(\)"),
        (torch.ones(2), lambda t, q, v, g: [0.0, -1.0], rod, "force must return .* got a list"),
        (lambda q, g: [1.0, 1.0], gravity, rod, "mass must be a tensor .* got list"),
    ]
    for *parts, match in wrong:
        with pytest.raises(InvalidInput, match=match):
            mechanics(*parts).initial(*start)
    with torch.autograd.graph.save_on_cpu(), pytest.raises(UnsupportedCombination, match="hooks on saved tensors"):
        pendulum.solve((0.0, 1.0), torch.tensor([1.0, 0.0]), torch.zeros(2), (torch.tensor(1.0, requires_grad=True),))
    # diagonals of each trajectory, which would be taken for one matrix where there are as many of them as coordinates
    for rows, match in ((3, "torch.diag_embed"), (2, "one matrix, or diagonals")):
        model = mechanics(lambda q, g: torch.ones_like(q), gravity, rod)
        with pytest.raises(InvalidInput, match=match):
            model.initial(torch.eye(3)[:rows, :2] + 0.1, torch.zeros(rows, 2), torch.tensor(1.0))
    # a mass that constraints carry along is none either
    with pytest.raises(SingularJacobian, match="every coordinate needs a mass"):
        mechanics(torch.tensor([1.0, 0.0]), gravity, rod).initial(torch.tensor([0.6, 0.8]), torch.zeros(2), torch.tensor(1.0))


def test_mapped_motions_are_those_one_by_one(pendulum):
    angle, g = torch.tensor([0.3, -1.0]), torch.tensor(1.0)

    def height(angle, g):
        q = torch.stack([angle.sin(), -angle.cos()])
        return pendulum.solve((0.0, 0.3), q, torch.zeros(2), (g,), rtol=1e-6, atol=1e-8).y.q[-1, 1]

    def by_angle(angle, g):  # theta'' = -g sin theta, by the series in t
        s, c = angle.sin(), angle.cos()
        t = 0.3
        theta = angle - g * s * t**2 / 2 + g**2 * s * c * t**4 / 24 - g**3 * (s * c**2 - 3 * s**3) * t**6 / 720
        return -theta.cos()

    assert torch.allclose(torch.vmap(height, (0, None))(angle, g), by_angle(angle, g), atol=1e-5)
    slope = torch.vmap(torch.func.grad(height), (0, None))(angle, g)
    assert torch.allclose(slope, torch.vmap(torch.func.grad(by_angle), (0, None))(angle, g), atol=1e-4)


def test_derivatives_of_batches_and_maps_are_those_of_each(pendulum):
    """Forward mode under ``torch.vmap``, and forward over reverse mode of a batch."""
    angles = torch.tensor([1.0, 0.5])
    q0, g = torch.stack([angles.sin(), -angles.cos()], -1), torch.tensor(9.81)

    def end(q, **batched):
        return pendulum.solve((0.0, 0.3), q, torch.zeros_like(q), (g,), rtol=1e-4, atol=1e-5, first_step=0.05, **batched).y.q[-1, ..., 0]

    slopes = torch.stack([torch.func.jacrev(end)(q) for q in q0])
    torch.testing.assert_close(torch.vmap(torch.func.jacfwd(end))(q0), slopes, rtol=1e-6, atol=1e-9)
    step = torch.tensor([1.0, 0.0]).expand(2, 2)
    product = torch.func.jvp(torch.func.grad(lambda q: end(q, batched=True).sum()), (q0,), (step,))[1]
    alone = torch.stack([torch.func.jvp(torch.func.grad(end), (q,), (step[0],))[1] for q in q0])
    torch.testing.assert_close(product, alone, rtol=1e-6, atol=1e-9)
