"""Implicit differential-algebraic equations: values, derivatives and invariances."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import Backprop, DiscreteAdjoint, solve_dae, solve_ivp

from ..helpers.dae_problems import (
    AKZO_END,
    AKZO_Y0,
    PENDULUM_END,
    PENDULUM_END_BY_G,
    PENDULUM_Y0,
    ROBERTSON_P,
    ROBERTSON_Y0,
    ROBERTSON_YP0,
    TRANSISTOR_END,
    TRANSISTOR_Y0,
    TRANSISTOR_YP0,
    akzo,
    linear,
    linear_exact,
    pendulum,
    robertson,
    transistor,
)

F64 = torch.float64
STRATEGIES = [DiscreteAdjoint(), Backprop()]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def solve_robertson(p, end=50.0, **options):
    options = {"rtol": 1e-8, "atol": 1e-12} | options
    return solve_dae(robertson, (0.0, end), ROBERTSON_Y0, ROBERTSON_YP0, args=(p,), **options)


# ---- values


def test_robertson_integral_and_gradient():
    p = ROBERTSON_P.clone().requires_grad_()
    sol = solve_robertson(p, quadrature=lambda t, y, p: y[2])
    assert abs(float(sol.quadrature) - 10.94864848057496) < 1e-8
    (grad,) = torch.autograd.grad(sol.quadrature, p)
    torch.testing.assert_close(grad, tensor(1.73414089144977e02, -5.05919140558619e-04, 8.43234646542261e-08), rtol=1e-8, atol=0)
    sol = solve_robertson(p, 0.4, quadrature=lambda t, y, p: y[2])
    assert abs(float(sol.quadrature) - 0.00302627479108158) < 1e-11
    (grad,) = torch.autograd.grad(sol.quadrature, p)
    torch.testing.assert_close(grad, tensor(7.37798474579300e-02, -1.32810837233758e-08, 2.43170073079312e-12), rtol=1e-7, atol=0)


def test_robertson_end_value_of_an_algebraic_variable():
    p = ROBERTSON_P.clone().requires_grad_()
    (grad,) = torch.autograd.grad(solve_robertson(p).y[-1, 2], p)
    torch.testing.assert_close(grad, tensor(4.47082, -1.48789e-5, 2.47985e-9), rtol=3e-6, atol=0)


@pytest.mark.slow
def test_robertson_hessian():
    def objective(p):
        return solve_robertson(p, 80.0, rtol=1e-9, quadrature=lambda t, y, p: y.square().sum() / 2).quadrature

    p = ROBERTSON_P.clone()
    assert abs(float(objective(p)) - 25.0423975286182) < 1e-8
    hessian = torch.func.hessian(objective)(p)
    want = torch.tensor(
        [
            [4424.29331245017, -2.77790890848501e-03, 4.63001613055955e-07],
            [-2.77790890848501e-03, -2.41734113084251e-08, -2.896476217638e-12],
            [4.63001613055955e-07, -2.896476217638e-12, 2.79077686811035e-15],
        ],
        dtype=F64,
    )
    torch.testing.assert_close(hessian, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tolerance, error", [(1e-3, 1e-2), pytest.param(1e-7, 1e-7, marks=pytest.mark.slow)])
def test_transistor_amplifier(tolerance, error):
    sol = solve_dae(transistor, (0.0, 0.2), TRANSISTOR_Y0, TRANSISTOR_YP0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sol.y[-1], TRANSISTOR_END, rtol=0, atol=error)


def test_akzo_nobel():
    sol = solve_dae(akzo, (0.0, 180.0), AKZO_Y0, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(sol.y[-1], AKZO_END, rtol=1e-8, atol=1e-11)
    assert float(sol.y[0, 5]) == pytest.approx(115.83 * 0.444 * 0.007, rel=1e-12)


@pytest.mark.parametrize("index", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_pendulum(index):
    g, length = tensor(1.0).squeeze().requires_grad_(), tensor(1.0).squeeze().requires_grad_()
    integrand = lambda t, s, g, L: s[4] ** 2  # noqa: E731
    sol = solve_dae(pendulum(index), (0.0, 10.0), PENDULUM_Y0, args=(g, length), rtol=1e-6, atol=1e-6, quadrature=integrand)
    # the multiplier of index 2 is the least exact: ten tolerances of its size
    torch.testing.assert_close(sol.y[-1], PENDULUM_END, rtol=1e-5, atol=1e-5)
    assert abs(float(sol.quadrature) - 32.63186639652321) < 1e-4
    # the multiplier too
    for i in (0, 4):
        (by_g,) = torch.autograd.grad(sol.y[-1, i], g, retain_graph=True)
        assert abs(float(by_g - PENDULUM_END_BY_G[i])) < 1e-4
    by_g, by_length = torch.autograd.grad(sol.quadrature, (g, length), allow_unused=True)
    assert abs(float(by_g) - 64.3075344109204) < 1e-3
    # index 1 and 2 do not hold the length: it is that of y0
    assert by_length is None or float(by_length) == 0


def test_linear_with_its_closed_form_at_many_times_and_slopes():
    p, times = tensor(1.5, 0.5), torch.linspace(0, 3, 17, dtype=F64)
    sol = solve_dae(linear, (0.0, 3.0), tensor(2.0, 0.0), args=(p,), t_eval=times, rtol=1e-9, atol=1e-11, dense_output=True)
    exact = linear_exact(times, tensor(2.0).squeeze(), p)
    torch.testing.assert_close(sol.y, exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(sol(times), exact, rtol=0, atol=1e-7)
    slope = -p[0] * exact[:, 0] + exact[:, 1]
    torch.testing.assert_close(sol.yp[:, 0], slope, rtol=0, atol=1e-4)
    ends = solve_dae(linear, (0.0, 3.0), tensor(2.0, 0.0), args=(p,), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ends.y[-1], exact[-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(ends.yp[-1, 0], slope[-1], rtol=0, atol=1e-9)
    back = solve_dae(linear, (3.0, 0.0), ends.y[-1], args=(p,), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(back.y[-1], exact[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name, order", [("radau", 5), ("radau3", 3)])
def test_order(name, order):
    p, errors = tensor(1.5, 0.5), []
    for n in (4, 8):
        steps = 3.0 / n
        sol = solve_dae(linear, (0.0, 3.0), tensor(2.0, 0.0), args=(p,), method=name, first_step=steps, max_step=steps, rtol=1e3, atol=1e3)
        assert sol.stats.n_accepted == n
        errors.append((sol.y[-1] - linear_exact(tensor(3.0).squeeze(), tensor(2.0).squeeze(), p)).abs())
    observed = torch.log2(errors[0] / errors[1])
    assert bool(((observed - order).abs() < 0.3).all()), observed


def test_an_ode_as_residual_is_the_ode():
    p = tensor(0.7)
    f = lambda t, y, p: torch.stack([y[1], p[0] * (1 - y[0] ** 2) * y[1] - y[0]])  # noqa: E731
    y0 = tensor(2.0, 0.0)
    options = dict(rtol=1e-8, atol=1e-10)
    one = solve_ivp(f, (0.0, 3.0), y0, args=(p,), method="radau5", **options)
    two = solve_dae(lambda t, y, yp, p: yp - f(t, y, p), (0.0, 3.0), y0, args=(p,), **options)
    torch.testing.assert_close(one.y[-1], two.y[-1], rtol=0, atol=1e-7)


def test_pytrees_and_single_precision():
    def fun(t, y, yp, p):
        return {"rate": yp["a"] + p * y["a"], "constraint": (y["b"] - y["a"].sum(-1)).reshape(1, 1)}

    y0 = {"a": torch.ones(2, dtype=torch.float32), "b": torch.zeros((), dtype=torch.float32)}
    p = torch.tensor(0.5, requires_grad=True)
    sol = solve_dae(fun, (0.0, 1.0), y0, args=(p,))
    assert sol.y["a"].dtype == torch.float32 and sol.y["b"].shape == (2,) and sol.yp["a"].shape == (2, 2)
    assert float(sol.y["b"][-1].detach()) == pytest.approx(2 * 2.718281828**-0.5, rel=1e-4)
    (grad,) = torch.autograd.grad(sol.y["b"][-1], p)
    assert float(grad) == pytest.approx(-2 * 2.718281828**-0.5, rel=1e-3)


# ---- derivatives


def batch_of_two():
    return tensor(2.0, 0.0).repeat(2, 1), torch.stack([tensor(1.5, 0.5), tensor(0.8, -0.3)])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("False-Backprop", "True-DiscreteAdjoint")
def test_gradcheck(strategy, batched):
    times = tensor(0.15, 0.4)
    y0, p = batch_of_two() if batched else (tensor(2.0, 0.0), tensor(1.5, 0.5))

    def solve(y0, p, end, times):
        sol = solve_dae(
            linear, (0.0, end), y0, args=(p,), t_eval=times, gradient=strategy, batched=batched, first_step=0.25, max_step=0.25,
            rtol=1e3, atol=1e3,
        )  # fmt: skip
        return sol.y, sol.yp[:, ..., 0]

    # tolerances as loose as that leave the steps alone
    args = [x.clone().requires_grad_() for x in (y0, p, tensor(0.45).squeeze(), times)]
    assert torch.autograd.gradcheck(solve, args, atol=1e-7, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, args, atol=1e-6, fast_mode=True)


def test_discrete_adjoint_is_backprop():
    p = ROBERTSON_P.clone().requires_grad_()
    grads = []
    for strategy in STRATEGIES:
        sol = solve_robertson(p, 4.0, rtol=1e-6, gradient=strategy, t_eval=torch.linspace(0, 4, 5, dtype=F64))
        grads.append(torch.autograd.grad((sol.y[:, 2] + 1e3 * sol.yp[:, 1]).sum(), p)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=0)


def test_nestings():
    from torch.func import grad, hessian, jacfwd, jacrev

    def objective(p):
        return solve_dae(linear, (0.0, 1.0), tensor(2.0, 0.0), args=(p,), rtol=1e-6, atol=1e-8).y[-1, 1].square()

    p = tensor(1.5, 0.5)
    exact = lambda p: linear_exact(tensor(1.0).squeeze(), tensor(2.0).squeeze(), p)[1].square()  # noqa: E731
    want = hessian(exact)(p)
    torch.testing.assert_close(grad(objective)(p), grad(exact)(p), rtol=1e-6, atol=1e-8)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            torch.testing.assert_close(outer(inner(objective))(p), want, rtol=1e-5, atol=1e-7)


def test_vmap_and_batched_are_one_by_one():
    y0, p = batch_of_two()
    options = dict(rtol=1e-6, atol=1e-9)
    one = torch.stack([solve_dae(linear, (0.0, 2.0), y0[i], args=(p[i],), **options).y[-1] for i in range(2)])
    together = solve_dae(linear, (0.0, 2.0), y0, args=(p,), batched=True, **options)
    torch.testing.assert_close(together.y[-1], one, rtol=0, atol=1e-13)
    mapped = torch.vmap(lambda y, q: solve_dae(linear, (0.0, 2.0), y, args=(q,), **options).y[-1])(y0, p)
    torch.testing.assert_close(mapped, one, rtol=0, atol=1e-13)
    per_row = torch.func.vmap(torch.func.jacrev(lambda q, y: solve_dae(linear, (0.0, 2.0), y, args=(q,), **options).y[-1]))(p, y0)
    for i in range(2):
        single = torch.func.jacrev(lambda q, i=i: solve_dae(linear, (0.0, 2.0), y0[i], args=(q,), **options).y[-1])(p[i])
        torch.testing.assert_close(per_row[i], single, rtol=0, atol=1e-12)


def test_batch_of_robertson_with_parameters_of_their_own():
    p = (ROBERTSON_P * torch.tensor([[1.0], [1.1], [0.7]], dtype=F64)).requires_grad_()
    y0, yp0 = ROBERTSON_Y0.repeat(3, 1), torch.zeros(3, 3, dtype=F64)
    sol = solve_dae(robertson, (0.0, 10.0), y0, yp0, args=(p,), batched=True, rtol=1e-5, atol=1e-9)
    (grad,) = torch.autograd.grad(sol.y[-1, :, 2].sum(), p)
    for i in range(3):
        q = p[i].detach().clone().requires_grad_()
        one = solve_robertson(q, 10.0, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(sol.y[-1, i], one.y[-1], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(grad[i], torch.autograd.grad(one.y[-1, 2], q)[0], rtol=1e-8, atol=0)


def test_the_algebraic_guess_has_no_gradient():
    y0, yp0 = tensor(2.0, 0.3).requires_grad_(), tensor(-1.0, 0.2).requires_grad_()
    p = tensor(1.5, 0.5)
    sol = solve_dae(linear, (0.0, 1.0), y0, yp0, args=(p,), consistent="solve", t_eval=tensor(0.0, 0.01, 1.0), rtol=1e-6)
    by_y, by_yp = torch.autograd.grad(sol.y.sum(), (y0, yp0), allow_unused=True)
    assert float(by_y[1]) == 0 and (by_yp is None or not bool(by_yp.any())) and float(by_y[0]) != 0
    other = solve_dae(linear, (0.0, 1.0), tensor(2.0, -5.0), args=(p,), t_eval=tensor(0.0, 0.01, 1.0), rtol=1e-6)
    torch.testing.assert_close(other.y, sol.y.detach(), rtol=1e-9, atol=1e-12)


def test_closures_and_modules():
    weight = tensor(1.5).requires_grad_()

    class Constraint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p2 = torch.nn.Parameter(tensor(0.5))

        def forward(self, t, y, yp):
            return linear(t, y, yp, torch.cat([weight, self.p2]))

    module = Constraint()
    sol = solve_dae(module, (0.0, 1.0), tensor(2.0, 0.0), rtol=1e-8, atol=1e-10)
    got = torch.autograd.grad(sol.y[-1, 1], (weight, module.p2))
    p = tensor(1.5, 0.5).requires_grad_()
    (want,) = torch.autograd.grad(linear_exact(tensor(1.0).squeeze(), tensor(2.0).squeeze(), p)[1], p)
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-6, atol=0)


# ---- invariances


def test_rows_may_be_scaled_and_permuted():
    p = ROBERTSON_P.clone().requires_grad_()
    factors, order = tensor(1e6, 1e-7, 300.0), [2, 0, 1]

    def scrambled(t, y, yp, p):
        return (factors * robertson(t, y, yp, p))[..., order]

    found = []
    for fun in (robertson, scrambled):
        sol = solve_dae(fun, (0.0, 40.0), ROBERTSON_Y0, ROBERTSON_YP0, args=(p,), rtol=1e-7, atol=1e-11)
        found.append((sol.y[-1].detach(), torch.autograd.grad(sol.y[-1, 2], p)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=0)


def test_auxiliary_variables_change_nothing():
    def longer(t, y, yp, p):
        # the product is a variable of its own
        y1, y2, y3, product = y.unbind(-1)
        d1, d2, *_ = yp.unbind(-1)
        p1, p2, p3 = p.unbind(-1)
        return torch.stack([d1 + p1 * y1 - product, d2 - p1 * y1 + product + p3 * y2**2, y1 + y2 + y3 - 1, product - p2 * y2 * y3], -1)

    p = ROBERTSON_P.clone().requires_grad_()
    loose = {"rtol": 1e-6, "atol": 1e-10}
    plain = solve_robertson(p, 40.0, **loose)
    more = solve_dae(longer, (0.0, 40.0), tensor(1, 0, 0, 0), args=(p,), **loose)
    torch.testing.assert_close(more.y[-1, :3], plain.y[-1], rtol=1e-5, atol=1e-10)
    got, want = (torch.autograd.grad(sol.y[-1, 2], p)[0] for sol in (more, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_autonomous_shift_in_time():
    t0, end = tensor(0.0).squeeze().requires_grad_(), tensor(5.0).squeeze().requires_grad_()
    fun = lambda t, y, yp: robertson(t, y, yp, ROBERTSON_P)  # noqa: E731
    sol = solve_dae(fun, (t0, end), ROBERTSON_Y0, ROBERTSON_YP0, rtol=1e-8, atol=1e-12, quadrature=lambda t, y: y[2])
    by_start, by_end = torch.autograd.grad(sol.quadrature, (t0, end))
    assert abs(float(by_start + by_end)) < 1e-7 * abs(float(by_end))
    assert float(by_end) == pytest.approx(float(sol.y[-1, 2].detach()), rel=1e-6)


# ---- large and sparse


def heat_with_flux(n: int):
    """Diffusion on ``n`` points with the fluxes as algebraic variables: 2 n unknowns, checked against the ODE."""

    def fun(t, y, yp, k):
        u, q = y[:n], y[n:]
        left = torch.cat([u.new_zeros(1), u[:-1]])
        flux = q - k * n * (u - left)
        out = torch.cat([q[1:], -k * n * u[-1:]])
        return torch.cat([yp[:n] - n * (out - q), flux])

    return fun


def test_sparse_is_dense_and_the_ode():
    n, k = 40, tensor(0.05).requires_grad_()
    start = torch.sin(torch.linspace(0, 3.0, n, dtype=F64))
    y0 = torch.cat([start, torch.zeros(n, dtype=F64)])
    found = []
    for solver in (adjoint.linalg.SparseLU(), adjoint.linalg.DenseLU()):
        sol = solve_dae(heat_with_flux(n), (0.0, 0.5), y0, args=(k,), rtol=1e-6, atol=1e-9, linear_solver=solver)
        found.append((sol.y[-1].detach(), torch.autograd.grad(sol.y[-1, :n].square().sum(), k)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)

    def ode(t, u, k):
        padded = torch.cat([u.new_zeros(1), u, u.new_zeros(1)])
        return k * n * n * (padded[2:] - 2 * u + padded[:-2])

    sol = solve_ivp(ode, (0.0, 0.5), start, args=(k,), method="radau5", rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(found[0][0][:n], sol.y[-1].detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0][1], torch.autograd.grad(sol.y[-1].square().sum(), k)[0], rtol=1e-4, atol=0)


def test_start_next_to_what_rounding_allows():
    """An algebraic variable that is the small difference of large ones: no Newton step settles it further than that, and that is enough."""

    def f(t, y, yp):
        return torch.stack([yp[0], ((y[0] + y[1]) - y[0]) - 1.23456789])

    sol = solve_dae(f, (0.0, 1.0), torch.tensor([1e8, 0.5]), rtol=1e-3, atol=1e-3)
    assert float(sol.y[-1, 1]) == pytest.approx(1.23456789, abs=1e-6)
