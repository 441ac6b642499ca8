"""Complex states of functions that are not complex-differentiable: roots, objectives, implicit methods. Truth: closed forms, solves by an
explicit method, finite differences in real and imaginary parts."""

import pytest
import torch

import adjoint
from adjoint.errors import UnsupportedCombination
from adjoint.nonlinear import METHODS
from adjoint.system.jacobians import complex_differentiable

Z = torch.complex128
P = torch.tensor([1.0 + 2.0j, -0.3 + 0.5j], dtype=Z)


def leaning(x, p):
    return x + 0.1 * x.conj() - p


def exact(p):
    """The root of `leaning`."""
    return torch.complex(p.real / 1.1, p.imag / 0.9)


def measure(x):
    return (x.real**2 * x.imag + x.abs() ** 2).sum()


def power_flow(v, q):
    """A load of constant power at each of two buses behind impedances: ``v conj(i) = s``."""
    s = torch.complex(q, 0.5 * q)
    current = (v - 1.0) * (2.0 - 6.0j) + (v - v.flip(0)) * (1.0 - 3.0j)
    return v * current.conj() + s


def flow(t, y, a):
    return -2 * y + 1j * a * y.conj() - 0.3 * y.abs() ** 2 * y


@pytest.mark.parametrize(
    "f, holomorphic",
    [
        (lambda x: x * x + torch.exp(x), True),
        (lambda x: x + 1e-3 * x.conj(), False),
        (lambda x: x.abs() * x, False),
        (lambda x: torch.complex(x.real, x.real), False),
        (lambda x: x * x.imag, False),
        (lambda x: torch.ones_like(x), True),
    ],
)
def test_the_direction_tells(f, holomorphic):
    for x in (torch.zeros(1, 3, dtype=Z), torch.randn(1, 3, dtype=Z)):
        assert complex_differentiable(f, x) is holomorphic
        told = torch.vmap(lambda row: row.real * 0 + complex_differentiable(f, row.unsqueeze(0)))(x.expand(2, -1))
        assert bool((told == float(holomorphic)).all())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_root_method_has_the_gradients_and_hessian_of_the_closed_form(method):
    p = P.clone().requires_grad_()
    sign = -1 if method in ("fixed_point", "anderson", "pseudo_transient") else 1
    x = adjoint.solve_root(lambda x, p: sign * leaning(x, p), torch.zeros(2, dtype=Z), (p,), method=method).x

    def slopes(x):
        (g,) = torch.autograd.grad(measure(x), p, create_graph=True)
        return g, torch.autograd.grad(g.real.sum(), p)[0]

    for got, want in zip(slopes(x), slopes(exact(p)), strict=True):
        assert torch.allclose(got, want, atol=1e-8)


def test_power_flow_by_all_derivatives():
    q = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def loss(q, **options):
        return measure(adjoint.solve_root(power_flow, torch.ones(2, dtype=Z), (q,), **options).x)

    assert torch.autograd.gradcheck(loss, q) and torch.autograd.gradgradcheck(loss, q)
    whole = loss(q)
    sparse = loss(q, jac_sparsity=torch.ones(2, 2), linear_solver=adjoint.linalg.SparseLU())
    free = loss(q, linear_solver=adjoint.linalg.GMRES())
    want = torch.autograd.grad(whole, q)[0]
    for other in (sparse, free):
        assert torch.allclose(torch.autograd.grad(other, q)[0], want, rtol=1e-8)
    with pytest.raises(UnsupportedCombination, match="conj"):
        loss(q, jac=lambda v, q: torch.eye(2, dtype=Z))
    rows = torch.stack([q, 2 * q]).detach()
    assert torch.allclose(torch.vmap(torch.func.grad(loss))(rows)[0], want, rtol=1e-8)
    assert torch.allclose(torch.func.jacfwd(loss)(q.detach()), want, rtol=1e-8)


def test_real_leaves_beside_complex_ones():
    a = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)

    def fun(x, a):
        z, r = x["z"], x["r"]
        return {"z": z * z - a[0] * 1j + 0.1 * r, "r": r - (a[1] * z).abs().sum(0, keepdim=True)}

    def loss(a):
        guess = {"z": torch.tensor([0.6 + 0.6j], dtype=Z), "r": torch.ones(1, dtype=torch.float64)}
        x = adjoint.solve_root(fun, guess, (a,)).x
        assert x["r"].dtype == torch.float64 and x["z"].dtype == Z
        return measure(x["z"]) + x["r"].sum()

    assert torch.autograd.gradcheck(loss, a)


def test_totals_of_complex_unknowns():
    # conj(x0) = 2 x1 and the total x0 + x1, which is given
    p = torch.tensor(2.0 + 1.0j, dtype=Z, requires_grad=True)

    def fun(x, p):
        r = x[0].conj() - p * x[1]
        return torch.stack([r, -r])

    total = torch.tensor([3.0 - 1.0j], dtype=Z)
    x = adjoint.solve_root(fun, torch.ones(2, dtype=Z), (p,), conserved=(torch.ones(1, 2, dtype=Z), total)).x
    assert torch.allclose(x.sum(), total[0]) and torch.allclose(x[0].conj(), p * x[1])


def test_objectives_are_real_whatever_the_state():
    q = torch.tensor([0.3, 0.2], dtype=torch.float64)
    for F, start in ((power_flow, torch.ones(2, dtype=Z)), (lambda x, q: x * x * x - torch.complex(q, 1 + q), torch.ones(2, dtype=Z))):
        f = lambda x, q: measure(x) + q.sum() ** 2  # noqa: E731
        objective = adjoint.SteadyStateObjective(f, F, start)

        def plain(q, F=F, start=start, f=f):
            split = lambda u, q: torch.view_as_real(F(torch.view_as_complex(u), q))  # noqa: E731
            u = adjoint.solve_root(split, torch.view_as_real(start), (q,)).x
            return f(torch.view_as_complex(u), q)

        assert torch.allclose(objective.gradient(q), torch.func.grad(plain)(q))
        H = objective.hessian(q)
        assert not H.is_complex() and torch.allclose(H, torch.func.hessian(plain)(q))
        S = objective.state_jacobian(q)
        assert S.dtype == Z and S.shape == (2, 2)
        h = 1e-6 * torch.tensor([1.0, 0.0], dtype=torch.float64)
        assert torch.allclose(S[:, 0], (objective.state(q + h) - objective.state(q - h)) / 2e-6, rtol=1e-6)


Y0 = torch.tensor([1.0 + 0.5j, 0.2 - 0.3j], dtype=Z)


def ivp_gradients(method, rtol=1e-8, **options):
    y0, a = Y0.clone().requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    y = adjoint.solve_ivp(flow, (0.0, 0.5), y0, args=(a,), method=method, rtol=rtol, atol=1e-10, **options).y[-1]
    return torch.autograd.grad(measure(y), (y0, a))


@pytest.fixture(scope="module")
def reference():
    return ivp_gradients("dopri8", 1e-11)


@pytest.mark.parametrize(
    "method, options",
    [
        ("kvaerno5", {}),
        ("kvaerno5", {"gradient": adjoint.ForwardSensitivity()}),
        ("kvaerno5", {"gradient": adjoint.InterpolatingAdjoint()}),
        ("radau5", {}),
        ("rodas5p", {}),
        ("bdf", {"rtol": 1e-9}),
        ("trbdf2", {"rtol": 1e-6}),
    ],
)
def test_implicit_methods_agree_with_an_explicit_one(method, options, reference):
    for got, want in zip(ivp_gradients(method, **options), reference, strict=True):
        assert torch.allclose(got, want, rtol=1e-4 if method == "trbdf2" else 1e-5, atol=1e-6)


def test_implicit_steps_of_the_drop_in_and_of_implicit_equations(reference):
    y0, a = Y0.clone().requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    # one step of Euler's implicit method is a root
    y = adjoint.odeint(lambda t, y: flow(t, y, a), y0, torch.tensor([0.0, 0.1], dtype=torch.float64), method="implicit_euler")[-1]
    root = adjoint.solve_root(lambda x, y0, a: x - y0 - 0.1 * flow(0.1, x, a), y0.detach(), (y0, a)).x
    for got, want in zip(torch.autograd.grad(measure(y), (y0, a)), torch.autograd.grad(measure(root), (y0, a)), strict=True):
        assert torch.allclose(got, want, rtol=1e-6)
    y = adjoint.solve_dae(lambda t, y, yp, a: yp - flow(t, y, a), (0.0, 0.5), y0, args=(a,), rtol=1e-7, atol=1e-9).y[-1]
    for got, want in zip(torch.autograd.grad(measure(y), (y0, a)), reference, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("door", ["batch", "implicit equations", "mass matrix"])
def test_complex_states_by_bdf(door):
    """``y' = i w y``, complex-differentiable: value, first and second derivatives in the real ``w``, and those in the end time."""
    w, end = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.3, 0.8))
    y0, options = torch.tensor([1.0, 0.5j], dtype=Z), {"method": "bdf", "rtol": 1e-8, "atol": 1e-10}
    if door == "batch":
        y = adjoint.solve_ivp(lambda t, y: 1j * w * y, (0.0, end), torch.stack([y0, 2 * y0]), batched=True, **options).y[-1, 0]
    elif door == "mass matrix":
        mass = torch.diag(torch.tensor([2.0, 1.0 + 1.0j], dtype=Z))
        y = adjoint.solve_ivp(lambda t, y: mass @ (1j * w * y), (0.0, end), y0, mass_matrix=mass, **options).y[-1]
    else:
        y = adjoint.solve_dae(lambda t, y, yp: yp - 1j * w * y, (0.0, end), y0, **options).y[-1]
    assert torch.allclose(y, y0 * torch.exp(1j * w * end), rtol=1e-6)
    first = torch.autograd.grad(y.real.sum(), (w, end), create_graph=True)
    true = torch.autograd.grad((y0 * torch.exp(1j * w * end)).real.sum(), (w, end), create_graph=True)
    assert torch.allclose(torch.stack(first), torch.stack(true), rtol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(g[0], w)[0] for g in (first, true)), rtol=1e-5)


@pytest.mark.parametrize("norm", [None, lambda state: state[0].abs().max() + state[1].abs().max()], ids=["mixed", "own"])
@pytest.mark.parametrize("rtol", [1e-7, (1e-7, torch.full((3,), 1e-7))], ids=["number", "by entry"])
def test_norms_and_tolerances_of_states_in_parts(norm, rtol):
    """Implicit steps of the drop-in, for a state of complex and real tensors: the norm sees the state, tolerances hold for both parts."""
    y0 = (torch.tensor([1.0 + 0.5j, 0.2], dtype=Z), torch.ones(3, dtype=torch.float64))
    f = lambda t, y: (-0.3 * y[0].conj(), -y[1])  # noqa: E731
    options = {"step_size": 0.1} | ({} if norm is None else {"norm": norm})
    z, y = adjoint.odeint(f, y0, torch.tensor([0.0, 1.0], dtype=torch.float64), method="gl4", options=options, rtol=rtol)
    decay = torch.exp(torch.tensor([-0.3, 0.3, -1.0], dtype=torch.float64))
    assert torch.allclose(z[-1], torch.complex(y0[0].real * decay[0], y0[0].imag * decay[1]), rtol=1e-6)
    assert torch.allclose(y[-1], decay[2].expand(3), rtol=1e-6)


class TestNotHolomorphic:
    """What `fun` makes of real and imaginary parts is no function of the complex number: derivatives along both axes differ."""

    @staticmethod
    def pendulum(t, y, p):
        x, v = torch.view_as_real(y).unbind(-1)
        m, k = torch.view_as_real(p).unbind(-1)
        return torch.complex(v, m * (1 - x * x) * v - k * x)

    @staticmethod
    def real(t, y, p):
        x, v = y.unbind(-1)
        m, k = p.unbind(-1)
        return torch.stack([v, m * (1 - x * x) * v - k * x], -1)

    @pytest.mark.parametrize("method", ["dopri5", "kvaerno5", "rodas5p", "bdf"])
    @pytest.mark.parametrize(
        "gradient",
        [adjoint.DiscreteAdjoint(), adjoint.Backprop(), adjoint.ForwardSensitivity(), adjoint.ForwardSensitivity(rowwise=True)],
        ids=["discrete", "backprop", "forward", "rowwise"],
    )
    @pytest.mark.slow_cases("rowwise-rodas5p", "rowwise-kvaerno5", "forward-bdf")
    def test_gradients_are_those_of_real_and_imaginary_parts(self, method, gradient):
        y0 = torch.tensor([[2.01, 0.57], [2.26, 0.51]], dtype=torch.float64)
        p = torch.tensor([[1.3, 0.9], [1.1, 1.2]], dtype=torch.float64)
        rows = p if getattr(gradient, "rowwise", False) else p[0]
        options = {"method": method, "rtol": 1e-6, "atol": 1e-8, "batched": True, "gradient": gradient}

        def slopes(packed):
            start, parameters = (torch.view_as_complex(x.contiguous()) if packed else x.clone() for x in (y0, rows))
            start, parameters = start.requires_grad_(), parameters.requires_grad_()
            fun = self.pendulum if packed else self.real
            sol = adjoint.solve_ivp(fun, (0.0, 0.25), start, args=(parameters,), **options)
            y = torch.view_as_real(sol.y) if packed else sol.y
            found = torch.autograd.grad((y[-1] * torch.tensor([1.0, 0.3], dtype=torch.float64)).sum(), (start, parameters))
            return [torch.view_as_real(x) for x in found] if packed else found

        for mine, theirs in zip(slopes(True), slopes(False), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
