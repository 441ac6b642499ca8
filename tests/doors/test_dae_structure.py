"""What is said of equations before and after a solve: structure, initial values, failures, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adjoint import (
    HigherIndexDAE,
    InconsistentInitialCondition,
    InvalidInput,
    MaxStepsReached,
    SingularJacobian,
    solve_dae,
    solve_ivp,
)
from adjoint.system.structure import analyse

from ..helpers.dae_problems import (
    AKZO_Y0,
    PENDULUM_Y0,
    ROBERTSON_P,
    ROBERTSON_Y0,
    ROBERTSON_YP0,
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
ONE = torch.tensor(1.0, dtype=F64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random_pencil(n_differential: int, sizes: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``P (E, G) Q`` for the normal form of Weierstrass: an ODE and nilpotent blocks, the largest of which is the index."""
    generator = torch.Generator().manual_seed(seed)
    n = n_differential + sum(sizes)
    E, G = torch.zeros(n, n, dtype=F64), torch.zeros(n, n, dtype=F64)
    E[:n_differential, :n_differential] = torch.eye(n_differential, dtype=F64)
    G[:n_differential, :n_differential] = torch.randn(n_differential, n_differential, generator=generator, dtype=F64)
    at = n_differential
    for size in sizes:
        G[at : at + size, at : at + size] = torch.eye(size, dtype=F64)
        for i in range(size - 1):
            E[at + i, at + i + 1] = 1.0
        at += size

    def orthogonal():
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64)).Q

    left, right = orthogonal(), orthogonal()
    return (left @ E @ right).unsqueeze(0), (left @ G @ right).unsqueeze(0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 1000))
def test_index_of_weierstrass_forms(n_differential, sizes, seed):
    if n_differential + sum(sizes) == 0:
        return
    E, G = random_pencil(n_differential, sizes, seed)
    found = analyse(E, G)
    assert found.index == max(sizes, default=0)
    assert found.rank == n_differential + sum(s - 1 for s in sizes)


def test_a_singular_pencil_is_told():
    E, G = random_pencil(2, [2], 0)
    G[:, :, 0] = 0
    E[:, :, 0] = 0
    assert analyse(E, G).index == -1


def test_names_of_variables():
    E = torch.diag(tensor(1, 1, 0)).unsqueeze(0)
    G = tensor(1, 2, 3).diag().unsqueeze(0)
    found = analyse(E, G)
    assert found.differential.tolist() == [True, True, False] and found.variable_index.tolist() == [0, 0, 1]


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_index_does_not_depend_on_units_of_equations(scale):
    t, yp = tensor(0.0), torch.zeros(1, 5, dtype=F64)
    y = tensor(1.0, 0.1, 0.2, -0.3, 0.5).unsqueeze(0)
    factors = torch.tensor([1.0, scale, 1.0, 1 / scale, scale], dtype=F64)
    for index in (1, 2, 3):
        f = lambda pair, index=index: factors * pendulum(index)(t, pair[..., :5], pair[..., 5:], ONE, ONE)  # noqa: E731
        J = torch.func.vmap(torch.func.jacrev(f))(torch.cat([y, yp], -1))
        assert analyse(J[..., 5:], J[..., :5]).index == index


# ---- initial values


@pytest.mark.parametrize("rate", [1e10, 1e12, 1e14, 1e16])
@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_index_does_not_depend_on_fast_rates(rate, unit):
    """Fast exchange between two amounts, and their sum: derivatives are nothing beside the rates, and constraints beside them neither."""
    E = torch.diag(tensor(1.0, 1.0, 0.0))
    G = torch.tensor([[rate, -rate, 2.0], [-rate, rate, 0.0], [-1.0, -1.0, 1.0]], dtype=F64)
    units = tensor(1.0, unit, 1.0).unsqueeze(-1)
    found = analyse((units * E)[None], (units * G)[None])
    assert (found.rank, found.index, found.differential.tolist()) == (2, 1, [True, True, False])
    relaxed = analyse(E[None, 1:, 1:], torch.tensor([[[rate, -rate], [0.0, 1.0]]], dtype=F64))
    assert (relaxed.rank, relaxed.index) == (1, 1)
    noise = analyse(torch.diag(tensor(1.0, 1e-17))[None], torch.tensor([[[1.0, 0.0], [0.5, 1.0]]], dtype=F64))
    assert (noise.rank, noise.index) == (1, 1)


@pytest.mark.parametrize("method", ["radau", "bdf", "rodas5p"])
def test_a_fast_exchange_beside_a_constraint(method):
    p = torch.tensor([1e12, 2.0], dtype=F64, requires_grad=True)
    options = {"args": (p,), "method": method, "rtol": 1e-6, "atol": 1e-8}

    def fun(t, y, p):
        flow = p[0] * (y[0] - y[1])
        return torch.stack([-flow - p[1] * y[2], flow, y[2] - y[0] - y[1]])

    matrix = torch.diag(tensor(1.0, 1.0, 0.0))
    if method == "rodas5p":
        sol = solve_ivp(fun, (0.0, 1.0), tensor(0.5, 0.5, 1.0), mass_matrix=matrix, **options)
    else:
        sol = solve_dae(lambda t, y, yp, p: matrix @ yp - fun(t, y, p), (0.0, 1.0), tensor(0.5, 0.5, 1.0), **options)
    truth = torch.exp(-p.detach()[1])
    torch.testing.assert_close(sol.y[-1, 2].detach(), truth, rtol=1e-5, atol=0)
    slope = torch.autograd.grad(sol.y[-1, 2], p)[0] * p.detach()
    torch.testing.assert_close(slope, torch.stack([0 * truth, -2 * truth]), rtol=0, atol=1e-4)


def test_index_three_names_the_multiplier_and_the_constraint():
    with pytest.raises(HigherIndexDAE, match=r"index of these equations is 3.*equation\(s\) 4 .*y\[4\]"):
        solve_dae(pendulum(3), (0.0, 1.0), PENDULUM_Y0, args=(ONE, ONE))


def test_inconsistent_values_are_told_with_rows_and_sizes():
    y0 = tensor(0.444, 0.00123, 0, 0.007, 0, 0.5)
    with pytest.raises(InconsistentInitialCondition, match=r"row\(s\).*5 \(residual -0.14.*differ in y\[5\].*consistent='solve'"):
        solve_dae(akzo, (0.0, 1.0), y0, torch.zeros(6, dtype=F64))
    solved = solve_dae(akzo, (0.0, 1.0), y0, torch.zeros(6, dtype=F64), consistent="solve")
    assert float(solved.y[0, 5]) == pytest.approx(115.83 * 0.444 * 0.007)
    # without slopes the algebraic part is a guess
    assert torch.equal(solve_dae(akzo, (0.0, 1.0), y0).y[0], solved.y[0])


def test_check_and_trust():
    given_y = solve_dae(robertson, (0.0, 1.0), ROBERTSON_Y0, ROBERTSON_YP0, args=(ROBERTSON_P,), consistent="check").y[0]
    assert torch.equal(given_y, ROBERTSON_Y0)
    with pytest.raises(InconsistentInitialCondition):
        solve_dae(robertson, (0.0, 1.0), ROBERTSON_Y0, torch.zeros(3, dtype=F64), args=(ROBERTSON_P,), consistent="check")
    p = tensor(1.5, 0.5)
    trusted = solve_dae(linear, (0.0, 1.0), tensor(2.0, 9.0), args=(p,), consistent="trust", rtol=1e-8, atol=1e-10)
    assert trusted.y[0, 1] == 9.0
    # Radau IIA does not look at algebraic values where a step starts
    torch.testing.assert_close(trusted.y[-1], linear_exact(ONE, 2 * ONE, p), rtol=0, atol=1e-8)


def test_a_violated_constraint_on_differential_variables_cannot_be_solved_for():
    with pytest.raises(InconsistentInitialCondition, match=r"differential variables only: row\(s\) 4"):
        solve_dae(pendulum(2), (0.0, 1.0), tensor(1.0, 0, 0.3, 0, 0), args=(ONE, ONE))


def test_no_solution_for_the_algebraic_variables():
    fun = lambda t, y, yp: torch.stack([yp[0] - y[1], y[1] ** 2 + 1 + y[0] ** 2])  # noqa: E731
    with pytest.raises((InconsistentInitialCondition, SingularJacobian)):
        solve_dae(fun, (0.0, 1.0), tensor(1.0, 0.5))


def test_singular_pencil():
    fun = lambda t, y, yp: torch.stack([yp[0] + y[0], y[0] - torch.exp(-t)])  # noqa: E731
    with pytest.raises(SingularJacobian, match=r"do not determine every variable.*y\[1\]"):
        solve_dae(fun, (0.0, 1.0), tensor(1.0, 0))


def test_transistor_keeps_what_is_differentiated():
    # neither single variable is differential: only differences and some
    sol = solve_dae(transistor, (0.0, 1e-4), TRANSISTOR_Y0 + 0.01, TRANSISTOR_YP0, consistent="solve")
    moved = sol.y[0] - (TRANSISTOR_Y0 + 0.01)
    for i, j in ((0, 1), (3, 4), (6, 7)):
        assert abs(float(moved[i] - moved[j])) < 1e-9
    assert abs(float(moved[2])) < 1e-9 and abs(float(moved[5])) < 1e-9
    assert float(transistor(torch.zeros((), dtype=F64), sol.y[0], sol.yp[0]).abs().max()) < 1e-12


# ---- failures in mid-run


def test_a_constraint_that_loses_its_hold():
    fun = lambda t, y, yp: torch.stack([yp[0] - 1, y[0] - 1 + y[1] ** 2])  # noqa: E731
    with pytest.raises(SingularJacobian, match=r"stop determining y\[1\] at t = (1\b|0\.999|1\.000)"):
        solve_dae(fun, (0.0, 2.0), tensor(0.0, 1))
    sol = solve_dae(fun, (0.0, 2.0), tensor(0.0, 1), throw=False)
    assert sol.status < 0 and bool(sol.y[-1].isnan().all())


def test_one_trajectory_fails_alone():
    def fun(t, y, yp, p):
        return torch.stack([yp[:, 0] - p, y[:, 0] - 1 + y[:, 1] ** 2], -1)

    p, y0 = tensor(1.0, 0.1), tensor(0.0, 1).repeat(2, 1)
    sol = solve_dae(fun, (0.0, 2.0), y0, args=(p,), batched=True, throw=False)
    assert sol.status.tolist()[0] < 0 and sol.status.tolist()[1] == 0
    assert bool(sol.y[-1, 0].isnan().all())
    torch.testing.assert_close(sol.y[-1, 1], torch.stack([tensor(0.2)[0], tensor(0.8).sqrt()[0]]), rtol=1e-6, atol=1e-8)
    with pytest.raises(SingularJacobian, match="trajectory 0"):
        solve_dae(fun, (0.0, 2.0), y0, args=(p,), batched=True)


def test_max_steps():
    with pytest.raises(MaxStepsReached):
        solve_dae(robertson, (0.0, 1e5), ROBERTSON_Y0, args=(ROBERTSON_P,), max_steps=5)


# ---- bad input


@pytest.mark.parametrize(
    "options, match",
    [
        ({"method": "tsit5"}, "no method 'tsit5'"),
        ({"consistent": "maybe"}, "consistent must be one of"),
        ({"max_steps": 0}, "max_steps"),
        ({"yp0": torch.zeros(2, dtype=F64)}, "yp0"),
        ({"differential": [True, True]}, "differential must have one flag"),
        ({"differential": [True, True, True]}, "rank 2"),
        ({"y0": torch.ones(3, dtype=torch.int64)}, "dtype"),
        ({"y0": tensor(1, 0, float("nan"))}, "non-finite"),
        ({"linear_solver": "lu"}, "linear_solver"),
        ({"jac_sparsity": torch.eye(3)}, "pair"),
    ],
)
def test_bad_arguments(options, match):
    options = {"y0": ROBERTSON_Y0, "args": (ROBERTSON_P,)} | options
    y0 = options.pop("y0")
    with pytest.raises(InvalidInput, match=match):
        solve_dae(robertson, (0.0, 1.0), y0, **options)


def test_a_residual_of_the_wrong_length_or_dtype():
    with pytest.raises(InvalidInput, match=r"2 residuals.*3 entries"):
        solve_dae(lambda t, y, yp: (yp - y)[:2], (0.0, 1.0), ROBERTSON_Y0)
    with pytest.raises(InvalidInput, match="float32"):
        solve_dae(lambda t, y, yp: (yp - y).float(), (0.0, 1.0), ROBERTSON_Y0)


def test_akzo_start_is_made_consistent_to_rounding():
    sol = solve_dae(akzo, (0.0, 1.0), AKZO_Y0)
    assert float(akzo(torch.zeros((), dtype=F64), sol.y[0], sol.yp[0]).abs().max()) < 1e-15
