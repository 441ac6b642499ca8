"""Complex states by compiled code, which carries real and imaginary parts: against closed forms, and against the eager engine in parts."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint.doors import prepared
from adjoint.native.build import NoCompiler, compiler

try:
    compiler()
except NoCompiler:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("error:compile=True")
C128, F64 = torch.complex128, torch.float64
METHODS = ["dopri5", "tsit5", "rk4", "rodas5p", "kvaerno5", "radau5", "bdf"]


def spins(t, y, g, c):
    """Not complex-differentiable; ``c`` is complex, of all trajectories or of each."""
    along = torch.sin(3 * torch.as_tensor(t)).unsqueeze(-1)
    return -1j * g * y + c.unsqueeze(-1) * y.conj() * along - 0.3 * y * y.abs() ** 2


def inputs(rows, dtype=C128):
    real = dtype.to_real()
    y0 = torch.tensor([1.0 + 0.2j, -0.4j, 0.3], dtype=dtype)
    c = torch.tensor(0.4 - 0.3j, dtype=dtype)
    if rows:
        scale = torch.linspace(0.8, 1.2, rows, dtype=real)
        y0, c = y0 * scale.unsqueeze(-1), c * scale
    return y0.requires_grad_(), torch.tensor(1.3, dtype=real, requires_grad=True), c.requires_grad_()


def solve(fun, y0, args, method, rows=0, span=(0.0, 2.0), rtol=1e-6, **options):
    fixed = {"first_step": 0.05} if method == "rk4" else {}
    return adjoint.solve_ivp(fun, span, y0, args, method=method, rtol=rtol, atol=1e-3 * rtol, batched=rows > 0, **fixed, **options)


def weighed(y):
    """A number that depends on both parts of everything."""
    weights = torch.cos(torch.arange(y.numel(), dtype=F64)).reshape(y.shape)
    return (weights * (y.real.sin() + 2 * y.imag)).sum()


def in_parts(t, y, g, c):
    """Written by hand on real and imaginary parts."""
    return torch.view_as_real(spins(t, torch.view_as_complex(y.contiguous()), g, torch.view_as_complex(c.contiguous())))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [0, 3, 20])
@pytest.mark.slow_cases("3-rodas5p", "3-bdf", "20-kvaerno5", "20-radau5")
def test_as_the_eager_engine_in_parts(method, rows):
    times = torch.linspace(0, 2, 5, dtype=F64)
    y0, g, c = inputs(rows)
    sol = solve(spins, y0, (g, c), method, rows, t_eval=times, compile=True)
    grads = torch.autograd.grad(weighed(sol.y), (y0, g, c))
    parts = torch.view_as_real(y0.detach()).requires_grad_(), g, torch.view_as_real(c.detach()).requires_grad_()
    eager = solve(in_parts, parts[0], parts[1:], method, rows, t_eval=times)
    theirs = torch.autograd.grad(weighed(torch.view_as_complex(eager.y)), parts)
    assert torch.equal(torch.as_tensor(sol.stats.n_steps), torch.as_tensor(eager.stats.n_steps)) and sol.y.dtype == C128
    torch.testing.assert_close(torch.view_as_real(sol.y), eager.y, rtol=1e-9, atol=1e-11)
    for mine, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(torch.view_as_real(mine) if mine.is_complex() else mine, other, rtol=1e-7, atol=1e-9)


@pytest.mark.users_defaults
@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "bdf"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.slow_cases("False-0-bdf", "False-3-rodas5p", "True-0-rodas5p", "True-3-bdf", "True-3-rodas5p", "False-3-bdf")
def test_solves_like_one_before(method, rows, sampled, monkeypatch):
    """Compiled code is called at once; second derivatives go the general way again."""
    made, real = [], prepared.run_of
    monkeypatch.setattr(prepared, "run_of", lambda *args: made.append(real(*args)) or made[-1])
    prepared.forget()
    found = []
    for _ in range(3):
        y0, g, c = inputs(rows)
        times = torch.linspace(0, 0.6, 5, dtype=F64) if sampled else None
        sol = solve(spins, y0, (g, c), method, rows, (0.0, 0.6), t_eval=times, compile=True)
        grads = torch.autograd.grad(weighed(sol.y), (y0, g, c), create_graph=True)
        (second,) = torch.autograd.grad(grads[1], g, retain_graph=True)
        found.append((sol.t, sol.y, *torch.autograd.grad(weighed(sol.y), (y0, g, c)), second))
        sol.y.detach().mul_(2)
    # those with many rejected steps are looked at once more by the general way
    assert len(made) == 2 and any(x is not None for x in made)
    for mine in found[1:]:
        for a, b in zip(mine, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5"])
@pytest.mark.parametrize("captured", [True, False])
def test_a_unitary_evolution(method, captured):
    """The Hamiltonian is a captured tensor, or an argument; the truth is the exponential of a matrix."""
    H = torch.tensor([[1.0, 0.3j, 0.2], [-0.3j, -1.0, 0.1], [0.2, 0.1, 0.5]], dtype=C128, requires_grad=True)
    y0 = torch.tensor([1.0, 0.5j, -0.2], dtype=C128, requires_grad=True)
    args = () if captured else (H,)

    def fun(t, y, *args):
        return -1j * ((args[0] if args else H) @ y)

    y = solve(fun, y0, args, method, rtol=1e-10, compile=True).y[-1]
    true = torch.matrix_exp(-2j * H) @ y0
    torch.testing.assert_close(y, true, rtol=1e-8, atol=1e-8)
    found, wanted = (torch.autograd.grad(weighed(x), (H, y0)) for x in (y, true))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
@pytest.mark.slow_cases("rodas5p")
def test_derivatives_of_derivatives_and_forward_mode(method):
    """Go on from the record: against differences."""
    y0, g, c = (x.detach() for x in inputs(0))

    def value(g, c):
        return weighed(solve(spins, y0, (g, c), method, span=(0.0, 0.5), rtol=1e-9, compile=True).y[-1])

    def slope(g):
        return torch.func.grad(value)(g, c)

    eps = 1e-4
    torch.testing.assert_close(torch.func.grad(slope)(g), (slope(g + eps) - slope(g - eps)) / (2 * eps), rtol=1e-5, atol=1e-6)
    _, tangent = torch.func.jvp(lambda c: value(g, c), (c,), (torch.ones_like(c) * (1 + 2j),))
    ahead, behind = (value(g, c + sign * eps * (1 + 2j)) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-7)


def test_real_leaves_beside_complex_ones():
    """A field and an inversion: the same by methods that take parts anyhow."""

    def fun(t, y, k):
        field, inversion = y["field"], y["inversion"]
        return {"field": 1j * inversion * field.conj() - field, "inversion": k - (field.abs() ** 2).sum() * inversion}

    results = []
    for compile in (True, False):
        k = torch.tensor(0.7, dtype=F64, requires_grad=True)
        y0 = {"field": torch.tensor([0.3 + 0.1j, -0.2j], dtype=C128), "inversion": torch.tensor(0.5, dtype=F64)}
        sol = solve(fun, y0, (k,), "kvaerno5", compile=compile)
        total = weighed(sol.y["field"]) + sol.y["inversion"][-1]
        results.append((sol, torch.autograd.grad(total, k)[0]))
    (mine, slope), (theirs, other) = results
    assert mine.stats.n_steps == theirs.stats.n_steps and mine.y["inversion"].dtype == F64
    torch.testing.assert_close(mine.y["field"], theirs.y["field"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(slope, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
def test_events_dense_output_and_integrals(method):
    """A rotation y = exp(i t): its real part is zero at pi / 2, and the integral of its imaginary part to there is one."""

    def event(t, y, w):
        return y.real.sum()

    event.terminal = True
    w = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y0 = torch.ones(1, dtype=C128)
    options = {"events": event, "quadrature": lambda t, y, w: y.imag.sum(), "dense_output": True, "compile": True}
    found = solve(lambda t, y, w: 1j * w * y, y0, (w,), method, span=(0.0, 3.0), rtol=1e-9, **options)
    (end,) = found.events[0].t
    quarter, at = (torch.tensor(x, dtype=F64) for x in (torch.pi / 2, 0.7))
    torch.testing.assert_close(end, quarter, rtol=1e-8, atol=0)
    torch.testing.assert_close(torch.autograd.grad(end, w, retain_graph=True)[0], -quarter, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.quadrature, torch.ones_like(w), rtol=1e-7, atol=0)
    torch.testing.assert_close(found(at), torch.exp(1j * at * torch.ones(1)).to(C128), rtol=1e-6, atol=0)


def test_copies_of_a_map_and_single_precision():
    y0, g, c = inputs(4, torch.complex64)
    copies = torch.vmap(lambda y, c: solve(spins, y, (g, c), "dopri5", rtol=1e-4, compile=True).y[-1])(y0, c)
    whole = solve(spins, y0, (g, c), "dopri5", 4, rtol=1e-4, compile=True).y[-1]
    assert whole.dtype == torch.complex64
    for mine, theirs in zip(*(torch.autograd.grad(weighed(x), (y0, g, c)) for x in (copies, whole)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 3])
def test_implicit_equations(rows):
    """``y' = (i - 1) z`` with ``z = y conj(c)``, c of size one: y = y0 exp((i - 1) conj(c) t)."""

    def residual(t, y, slope, c):
        first, second = y.unbind(-1)
        return torch.stack([slope[..., 0] - (1j - 1) * second, second - first * c.conj()], -1)

    c = torch.tensor(0.6 + 0.8j, dtype=C128, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, 0.0], dtype=C128)
    y0 = y0.expand(rows, 2) if rows else y0
    options = {"rtol": 1e-8, "atol": 1e-10, "batched": rows > 0, "consistent": "solve", "compile": True}
    sol = adjoint.solve_dae(residual, (0.0, 1.0), y0, torch.zeros_like(y0), (c,), **options)
    true = y0[..., 0] * torch.exp((1j - 1) * c.conj())
    torch.testing.assert_close(sol.y[-1][..., 0], true, rtol=1e-6, atol=0)
    mine, theirs = (torch.autograd.grad(weighed(x), c)[0] for x in (sol.y[-1][..., 0], true))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "radau"])
def test_it_is_explained(method):
    y0, _, _ = inputs(0)
    fun = (lambda t, y, yp: yp - 1j * y) if method == "radau" else (lambda t, y: 1j * y)
    found = adjoint.explain(fun, y0, method=method)
    assert found.native and found.unknowns == 6
