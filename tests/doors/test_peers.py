"""Problems of the test suites and examples of other packages, with the numbers that they publish, or closed forms."""

import pytest
import torch

import adjoint
from adjoint import Event

D = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=D)


# --- SUNDIALS (cvodes, idas): printed to five digits ---


def quadratic(t, y, p):
    return torch.stack([-p[0] * y[0] ** 2 - y[2], -y[1], -(p[1] ** 2) * y[1] * y[2]])


NATIVE = pytest.param("tsit5", True, marks=pytest.mark.compile)


@pytest.mark.parametrize("method, compiled", [("tsit5", False), ("rodas5p", False), NATIVE])
@pytest.mark.slow_cases("tsit5-True", "rodas5p-False")
def test_cvodes_hessian(method, compiled):
    """cvsHessian_ASA_FSA: integral, gradient and Hessian."""

    def integral(p):
        options = {"method": method, "rtol": 1e-8, "atol": 1e-10, "compile": compiled}
        half = lambda t, y, p: 0.5 * (y**2).sum()  # noqa: E731
        return adjoint.solve_ivp(quadratic, (0.0, 2.0), torch.ones(3, dtype=D), (p,), quadrature=half, **options).quadrature

    p = tensor(1.0, 2.0)
    near = {"rtol": 2e-4, "atol": 0.0}
    torch.testing.assert_close(integral(p), torch.tensor(5.3088e-01, dtype=D), **near)
    torch.testing.assert_close(torch.func.grad(integral)(p), tensor(-1.2838e-01, 1.8036e-02), **near)
    wanted = torch.tensor([[1.5628e-01, -7.8678e-02], [-7.8678e-02, 8.9814e-02]], dtype=D)
    torch.testing.assert_close(torch.func.hessian(integral)(p), wanted, **near)


def robertson(t, y, p):
    one, two, three = p[0] * y[0], p[1] * y[1] * y[2], p[2] * y[1] ** 2
    return torch.stack([two - one, one - two - three, three])


@pytest.mark.parametrize("door", ["ode", "dae"])
@pytest.mark.slow_cases("dae")
def test_cvodes_robertson(door):
    """cvsRoberts_ASAi_dns, idasRoberts_ASAi_dns: the integral up to 50, with an absolute tolerance for each variable."""
    p = tensor(0.04, 1e4, 3e7).requires_grad_()
    options = {"args": (p,), "rtol": 1e-7, "atol": tensor(1e-8, 1e-14, 1e-6), "quadrature": lambda t, y, p: y[2]}
    if door == "ode":
        sol = adjoint.solve_ivp(robertson, (0.0, 50.0), tensor(1.0, 0.0, 0.0), method="rodas5p", **options)
    else:
        whole = lambda t, y, yp, p: torch.cat([yp[:2] - robertson(t, y, p)[:2], (y.sum() - 1).reshape(1)])  # noqa: E731
        sol = adjoint.solve_dae(whole, (0.0, 50.0), tensor(1.0, 0.0, 0.0), **options)
    found = torch.autograd.grad(sol.quadrature, p)[0]
    torch.testing.assert_close(found, tensor(1.7341e02, -5.0592e-04, 8.4323e-08), rtol=2e-4, atol=0.0)


@pytest.mark.parametrize("atol", [tensor(1e-9, 1e-10), (tensor(1e-9), tensor(1e-10))], ids=["tensor", "tree"])
def test_tolerances_like_the_state_beside_an_integral(atol):
    tree = isinstance(atol, tuple)
    y0 = (torch.ones(1, dtype=D), torch.ones(1, dtype=D)) if tree else torch.ones(2, dtype=D)
    fun = (lambda t, y: (-y[0], -2 * y[1])) if tree else (lambda t, y: torch.stack([-y[0], -2 * y[1]]))
    sol = adjoint.solve_ivp(fun, (0.0, 1.0), y0, quadrature=lambda t, y: {"all": (y[0] + y[1]).sum()}, rtol=1e-8, atol=atol)
    wanted = 1 - torch.exp(tensor(-1.0)) + (1 - torch.exp(tensor(-2.0))) / 2
    torch.testing.assert_close(sol.quadrature["all"], wanted[0], rtol=1e-7, atol=0.0)


# --- SciMLSensitivity: two callbacks at one time ---


def axis(x, v, a, e, end):
    """A part that falls to zero from ``x``, bounces, and is where then, and how fast."""
    t = (-v - (v * v - 2 * a * x).sqrt()) / a
    rest = end - t
    return -e * (v + a * t) * rest + a * rest**2 / 2, -e * (v + a * t) + a * rest


def corner(z):
    (x, v), (y, w) = (axis(z[k], z[2 + k], z[4 + k], z[6], 1.7) for k in range(2))
    return torch.stack([x, y, v, w])


def flies(t, y, g):
    return torch.stack([y[2], y[3], g[0] + 0 * y[2], g[1] + 0 * y[3]])


FIRST = Event(lambda t, y, g: y[0], reset=lambda t, y, g: torch.stack([y[0], y[1], -g[2] * y[2], y[3]]))
SECOND = Event(lambda t, y, g: y[1], reset=lambda t, y, g: torch.stack([y[0], y[1], y[2], -g[2] * y[3]]))


@pytest.mark.parametrize("gradient", [adjoint.DiscreteAdjoint(), adjoint.ForwardSensitivity(), adjoint.InterpolatingAdjoint()])
@pytest.mark.parametrize("order", [1, -1])
def test_each_of_two_events_at_one_time_moves_alone(order, gradient):
    """A corner: two walls at one time, to second order."""
    weights = tensor(1.0, 2.0, 0.5, -0.7)

    def value(z):
        events = [FIRST, SECOND][::order]
        sol = adjoint.solve_ivp(flies, (0.0, 1.7), z[:4], (z[4:],), events=events, rtol=1e-9, atol=1e-10, gradient=gradient)
        return ((weights + sol.y[-1]) * sol.y[-1]).sum()

    wanted = lambda z: ((weights + corner(z)) * corner(z)).sum()  # noqa: E731
    z = tensor(1.0, 1.0, -1.0, -1.0, -0.4, -0.4, 0.8)
    torch.testing.assert_close(torch.func.grad(value)(z), torch.func.grad(wanted)(z), rtol=1e-6, atol=1e-7)
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(value, z), hessian(wanted, z), rtol=1e-6, atol=1e-6)


def test_two_events_that_are_one():
    """The function of one is twice that of the other: they stay at one time, and the second reset changes nothing."""
    none = Event(lambda t, y, g: 2 * y[0], reset=lambda t, y, g: y)
    z = tensor(1.0, 9.0, -1.0, -1.0, -0.4, 0.0, 0.8)
    end = lambda z, events: adjoint.solve_ivp(flies, (0.0, 1.7), z[:4], (z[4:],), events=events, rtol=1e-9, atol=1e-10).y[-1]  # noqa: E731
    jacobian = torch.func.jacrev(end)
    torch.testing.assert_close(jacobian(z, [FIRST, none]), jacobian(z, [FIRST]), rtol=1e-9, atol=1e-9)


def test_one_of_a_batch_and_implicit_equations():
    z = tensor(1.0, 1.0, -1.0, -1.0, -0.4, -0.4, 0.8)
    both = torch.stack([z, z + tensor(0.3, 0, 0, 0, 0, 0, 0)])
    events = [Event(*(lambda t, y, g, k=k: y[..., k],), reset=lambda t, y, g, k=k: turned(y, g, k)) for k in (0, 1)]

    def turned(y, g, k):
        return torch.where(torch.arange(4) == 2 + k, -g[..., 2:3] * y, y)

    def residual(t, y, yp, g):
        return yp - torch.cat([y[..., 2:], g[..., :2]], -1)

    def value(both):
        sol = adjoint.solve_dae(residual, (0.0, 1.7), both[:, :4], args=(both[:, 4:],), events=events, batched=True, rtol=1e-9, atol=1e-10)
        return (sol.y[-1] ** 2).sum()

    wanted = lambda both: (corner(both[0]) ** 2).sum() + (corner(both[1]) ** 2).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(value)(both), torch.func.grad(wanted)(both), rtol=1e-5, atol=1e-6)


# --- diffrax: the time of an event, mapped ---


def test_diffrax_time_of_a_bounce():
    def time(height):
        fall = lambda t, y: torch.stack([y[1], -8.0 + 0 * y[1]])  # noqa: E731
        down = Event(lambda t, y: y[0], direction=-1, terminal=True)
        return adjoint.solve_ivp(fall, (0.0, 1e30), torch.stack([height, 0 * height]), events=down).t[-1]

    heights = tensor(1.0, 3.0, 10.0)
    slopes = torch.func.vmap(torch.func.grad(time))(heights)
    torch.testing.assert_close(slopes, 0.25 / heights.sqrt(), rtol=1e-6, atol=0.0)
