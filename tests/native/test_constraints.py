"""Equations with constraints by compiled code: the steps, values and first derivatives of the eager engine, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults, pytest.mark.usefixtures("no_fallback")]
F64 = torch.float64
MASS = torch.tensor([[1.2, 0.3, 0.0], [-0.2, 0.8, 0.0], [0.0, 0.0, 0.0]], dtype=F64)


def driven(t, y, p):
    """Of ``M y'``: two differential variables and one that a constraint fixes, non-linear in it."""
    a, b, z = y.unbind(-1)
    k, c = p.unbind(-1)
    return torch.stack([-k * a + z * b, torch.sin(t) - b * z, z + 0.2 * z**3 - c * a * torch.cos(t) - 0.1 * b], -1)


def given(rows, dtype=F64):
    """Initial states, parameters and matrices; of one trajectory for no rows."""
    scale = torch.linspace(1, 1.3, max(rows, 1), dtype=dtype)
    y0, p = (torch.tensor(x, dtype=dtype) * scale.unsqueeze(-1) for x in ([0.9, 0.4, 0.3], [0.7, 1.1]))
    mass = MASS.to(dtype) * scale[:, None, None]
    return [x.requires_grad_() for x in ((y0, p, mass) if rows else (y0[0], p[0], mass[0]))]


def by_matrix(compile, y0, p, mass, span=(0.0, 2.0), fun=driven, **options):
    return adjoint.solve_ivp(fun, span, y0, (p,), mass_matrix=mass, batched=y0.dim() == 2, compile=compile, **options)


def by_residual(compile, y0, p, mass, span=(0.0, 2.0), fun=driven, **options):
    def residual(t, y, yp, p, mass):
        return (mass @ yp.unsqueeze(-1)).squeeze(-1) - fun(t, y, p)

    given = {"events": [_without_matrix(e) for e in options.pop("events")]} if "events" in options else {}
    if "quadrature" in options:
        given["quadrature"] = _without_matrix(options.pop("quadrature"))
    return adjoint.solve_dae(residual, span, y0, args=(p, mass), batched=y0.dim() == 2, compile=compile, **given, **options)


def _without_matrix(event):
    def call(t, y, p, mass):
        return event(t, y, p)

    call.terminal = getattr(event, "terminal", False)
    return call


def found(solve, compile, rows, dtype=F64, shared=False, **options):
    """A solution, and the gradients of a sum of all that it holds in all that it depends on."""
    xs = given(rows, dtype)
    if shared:
        xs[2] = xs[2][0].detach().requires_grad_()
    times = [options[name].clone().requires_grad_() for name in ("t_eval", "span") if isinstance(options.get(name), torch.Tensor)]
    names = [name for name in ("t_eval", "span") if isinstance(options.get(name), torch.Tensor)]
    options = options | dict(zip(names, times, strict=True))
    sol = solve(compile, *xs, **({"rtol": 1e-4, "atol": 1e-6} | options))
    values = [sol.y, *([] if sol.yp is None else [sol.yp]), *([] if sol.quadrature is None else [sol.quadrature])]
    values += [x for e in sol.events for x in (e.t, e.y)]
    total = sum((x.nan_to_num() * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)).sum() for x in values)
    grads = torch.autograd.grad(total, [*xs, *times], allow_unused=True)
    return sol, [x.detach() for x in values], grads


def agree(solve, tolerance=1e-7, rows=0, **options):
    (mine, values, slopes), (theirs, other_values, other_slopes) = (found(solve, x, rows, **options) for x in (True, False))
    assert torch.equal(torch.as_tensor(mine.stats.n_steps), torch.as_tensor(theirs.stats.n_steps))
    assert torch.equal(torch.as_tensor(mine.status), torch.as_tensor(theirs.status))
    for a, b in zip(values, other_values, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    for a, b in zip(slopes, other_slopes, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # sizes of steps of eager batches are powers in single precision
            torch.testing.assert_close(a, b, rtol=40 * tolerance, atol=40 * tolerance * float(b.abs().max()) + 1e-300)
    return mine, theirs


def rises(t, y, p):
    return y[..., 2] - 0.35


def ends(t, y, p):
    return t - 1.4 + 0.01 * y[..., 0]


ends.terminal = True
SOLVES = [
    pytest.param((by_matrix, "rodas3p"), id="rodas3p", marks=pytest.mark.slow),
    pytest.param((by_matrix, "rodas5p"), id="rodas5p"),
    pytest.param((by_matrix, "radau5"), id="radau5"),
    pytest.param((by_residual, "radau"), id="residual radau"),
    pytest.param((by_residual, "radau3"), id="residual radau3", marks=pytest.mark.slow),
    pytest.param((by_residual, "bdf"), id="residual bdf"),
    pytest.param((by_matrix, "bdf"), id="bdf", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("form", SOLVES)
class TestAgainstEager:
    @pytest.mark.parametrize("rows, shared", [(0, False), pytest.param(3, False, marks=pytest.mark.slow), (18, False), (18, True)])
    @pytest.mark.slow_cases(
        "0-False-rodas5p", "0-False-residual radau", "18-False-radau5", "18-False-residual bdf", "18-True-rodas5p",
        "18-True-residual radau",
    )
    def test_samples(self, form, rows, shared):
        solve, method = form
        agree(solve, rows=rows, shared=shared, method=method, t_eval=torch.linspace(0.1, 1.9, 5, dtype=F64))
        agree(solve, rows=rows, shared=shared, method=method)

    @pytest.mark.parametrize("rows", [0, 18])
    def test_the_same_steps_to_rounding(self, form, rows):
        # with sizes that no error decides there is no difference but that of rounding, and of iterations
        solve, method = form
        fixed = {"first_step": 0.1, "max_step": 0.1, "rtol": 1e3, "atol": 1e3}
        agree(solve, 1e-10, rows=rows, method=method, t_eval=torch.tensor([0.33, 1.1, 2.0], dtype=F64), **fixed)

    @pytest.mark.parametrize("rows", [0, 18])
    @pytest.mark.slow_cases("0-rodas5p", "0-residual bdf", "18-radau5", "18-residual radau")
    def test_derivatives_in_times(self, form, rows):
        solve, method = form
        options = {"t_eval": torch.tensor([0.4, 1.1, 1.9], dtype=F64), "span": torch.tensor([0.1, 2.0], dtype=F64)}
        agree(solve, 1e-6, rows=rows, method=method, **options)
        options = {"t_eval": torch.tensor([1.9, 0.2], dtype=F64), "span": torch.tensor([2.0, 0.1], dtype=F64)}
        agree(solve, 1e-6, rows=rows, method=method, **options)

    @pytest.mark.parametrize("rows", [0, 18])
    def test_own_spans_and_one_of_no_length(self, form, rows):
        solve, method = form
        end = torch.linspace(0.0, 2.0, rows, dtype=F64) if rows else torch.tensor(0.0, dtype=F64)
        agree(solve, rows=rows, method=method, span=(0.0, end))

    @pytest.mark.parametrize("rows", [0, 18])
    @pytest.mark.slow_cases("0-radau5", "0-residual radau", "18-rodas5p", "18-residual bdf")
    def test_jumps(self, form, rows):
        def kicked(t, y, p):
            push = 1 - 3 * (t > 0.7).to(t.dtype) + 3 * (t > 1.3).to(t.dtype)
            return driven(t, y, p) + torch.stack([0 * push, push, 0 * push], -1)

        solve, method = form
        # the slope with which bdf goes on is a difference over a step of almost no length: steps follow its rounding
        close = 1e-4 if method == "bdf" else 1e-6
        agree(solve, close, rows=rows, method=method, fun=kicked, step_ts=[0.7, 1.3], t_eval=torch.tensor([0.5, 0.9, 2.0], dtype=F64))

    @pytest.mark.parametrize("rows", [0, 18])
    @pytest.mark.slow_cases("0-rodas5p", "0-residual bdf", "18-radau5", "18-residual radau", "0-radau5", "18-residual bdf")
    def test_events_quadrature_all_steps_and_dense_output(self, form, rows):
        solve, method = form
        mine, _ = agree(solve, 1e-6, rows=rows, method=method, events=[rises, ends], quadrature=lambda t, y, p: y[..., 0] * y[..., 2])
        assert bool((torch.as_tensor(mine.status) == 1).all()) and mine.events[1].t.numel() == max(rows, 1)
        # one of them comes to steps of 1e-7, whose rounding the derivative in the matrix shows
        agree(solve, 1e-5 if method == "rodas3p" else 1e-6, rows=rows, method=method, t_eval="steps")
        mine, theirs = agree(solve, rows=rows, method=method, dense_output=True)
        torch.testing.assert_close(mine(1.234), theirs(1.234), rtol=1e-7, atol=1e-7)

    def test_single_precision(self, form):
        solve, method = form
        mine, theirs = (found(solve, x, 18, torch.float32, method=method, rtol=1e-3, atol=1e-4, max_step=0.05) for x in (True, False))
        for a, b in zip((*mine[1], *mine[2]), (*theirs[1], *theirs[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=5e-3 * float(b.abs().max()))

    def test_failures_stay_alone(self, form):
        def stops(t, y, p):
            fine = 1 - ((t > 1) & (p[..., 0] > 0.85)).to(y.dtype).unsqueeze(-1)
            return driven(t, y, p) / fine + 0 / fine

        solve, method = form
        xs = [given(18) for _ in range(2)]
        mine, theirs = (solve(c, *x, fun=stops, method=method, throw=False) for c, x in zip((True, False), xs, strict=True))
        assert torch.equal(mine.status, theirs.status) and 0 < int((mine.status < 0).sum()) < 18
        for sol, x in zip((mine, theirs), xs, strict=True):
            sol.y[-1, mine.status == 0].sum().backward()
            x.append(sol)
        for a, b in zip(xs[0][:3], xs[1][:3], strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)
        dead = given(18)[0].detach()
        dead[4] = math.nan
        mine = solve(True, dead, *given(18)[1:], method=method, throw=False)
        assert int(mine.status[4]) < 0 and int((mine.status < 0).sum()) == 1

    @pytest.mark.slow_cases("rodas5p", "residual bdf")
    def test_second_derivatives_and_forward_mode_go_on_from_the_record(self, form):
        solve, method = form
        y0, p, mass = (x.detach() for x in given(0))
        options = {"method": method, "first_step": 0.1, "rtol": 1e-4, "atol": 1e-6}
        end = lambda p, compile: solve(compile, y0, p, mass, (0.0, 0.3), **options).y[-1].square().sum()  # noqa: E731
        for transform in (torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
            mine, theirs = (transform(lambda p, x=x: end(p, x))(p) for x in (True, False))
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, None), (None, None, 0)])
    @pytest.mark.slow_cases(
        "dims0-rodas5p", "dims0-residual bdf", "dims1-radau5", "dims1-residual radau", "dims2-rodas5p", "dims2-residual bdf",
    )
    def test_mapped(self, form, dims):
        solve, method = form
        xs = [x.detach() if d == 0 else x[0].detach() for x, d in zip(given(3), dims, strict=True)]

        def value(y0, p, mass, compile):
            options = {"method": method, "first_step": 0.1, "rtol": 1e-5, "atol": 1e-7}
            return solve(compile, y0, p, mass, (0.0, 0.5), **options).y[-1].square().sum()

        def total(p, compile):
            return torch.vmap(lambda *x: value(*x, compile), in_dims=dims)(xs[0], p, xs[2]).sum()

        mine, theirs = (torch.func.grad_and_value(total)(xs[1], x) for x in (True, False))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def curve(t, y, p):
    """``y1' = y2 z``, ``y2' = -y1 z``, ``0 = z - p (1 + sin(t) / 2) (y1^2 + y2^2)``: an angle of ``p (t + (1 - cos t) / 2)``."""
    a, b, z = y.unbind(-1)
    return torch.stack([b * z, -a * z, p * (1 + torch.sin(t) / 2) * (a**2 + b**2) - z], -1)


@pytest.mark.parametrize("rows", [0, 18])
def test_a_closed_form(rows):
    p = torch.linspace(0.9, 1.4, max(rows, 1), dtype=F64)
    y0 = torch.tensor([0.0, 1.0, 0.5], dtype=F64).repeat(len(p), 1)
    p, y0 = (p, y0) if rows else (p[0], y0[0])
    p.requires_grad_()
    options = {"method": "rodas5p", "mass_matrix": torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64)), "compile": True}
    sol = adjoint.solve_ivp(curve, (0.0, 2.0), y0, (p,), batched=bool(rows), rtol=1e-9, atol=1e-11, **options)
    speed = 2 + (1 - math.cos(2.0)) / 2
    exact = torch.stack([torch.sin(speed * p), torch.cos(speed * p), p * (1 + math.sin(2.0) / 2)], -1)
    torch.testing.assert_close(sol.y[-1], exact, rtol=1e-7, atol=1e-8)
    (slope,) = torch.autograd.grad(sol.y[-1].sum(), p)
    wanted = speed * (torch.cos(speed * p) - torch.sin(speed * p)) + 1 + math.sin(2.0) / 2
    torch.testing.assert_close(slope, wanted.detach(), rtol=1e-6, atol=1e-7)


def test_a_matrix_that_fun_uses_too():
    """It is an input once, and gets one cotangent: m y' = -m y does not depend on m."""
    mass = torch.diag(torch.tensor([2.0, 3.0], dtype=F64)).requires_grad_()
    fun = lambda t, y, m: -m.diagonal(dim1=-2, dim2=-1) * y  # noqa: E731
    for compile in (True, False):
        options = {"method": "rodas5p", "rtol": 1e-9, "atol": 1e-11, "compile": compile}
        y = adjoint.solve_ivp(fun, (0.0, 1.0), torch.ones(2, dtype=F64), (mass,), mass_matrix=mass, **options).y[-1]
        torch.testing.assert_close(y, torch.full((2,), math.exp(-1), dtype=F64), rtol=1e-8, atol=0)
        slope = torch.autograd.grad(y.sum(), mass)[0].diagonal()
        torch.testing.assert_close(slope, torch.zeros(2, dtype=F64), rtol=0, atol=1e-7)


def multiplier(t, y, yp, w):
    """Of index 2: ``x' = -x + 2 z``, ``x = w sin t``, so ``z = w (sin t + cos t) / 2``."""
    x, z = y.unbind(-1)
    return torch.stack([yp[..., 0] + x - 2 * z, x - w * torch.sin(t)], -1)


@pytest.mark.parametrize("method, rows", [("radau", 0), ("radau", 18), ("radau3", 3)])
def test_index_two(method, rows):
    """Errors of the multiplier count in the iteration by their power of h, and have a test of their own."""
    found = []
    times = torch.linspace(0.1, 2.0, 9, dtype=F64)
    for compile in (True, False):
        w = torch.linspace(0.7, 1.2, max(rows, 1), dtype=F64)
        y0 = torch.stack([0 * w, w / 2], -1)
        w, y0 = (w, y0) if rows else (w[0], y0[0])
        w.requires_grad_()
        options = {"t_eval": times, "rtol": 1e-5, "atol": 1e-7, "compile": compile}
        sol = adjoint.solve_dae(multiplier, (0.0, 2.0), y0, args=(w,), batched=bool(rows), method=method, **options)
        found.append((sol, torch.autograd.grad(sol.y.sum() + sol.yp[..., 0].sum(), w)[0]))
        exact = w.detach() * (torch.sin(times) + torch.cos(times)).reshape(-1, *[1] * bool(rows)) / 2
        torch.testing.assert_close(sol.y[..., 1].detach(), exact, rtol=0, atol=1e-4)
    (mine, slope), (theirs, other) = found
    assert torch.equal(torch.as_tensor(mine.stats.n_steps), torch.as_tensor(theirs.stats.n_steps))
    torch.testing.assert_close(mine.y, theirs.y, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(slope, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["radau", "bdf"])
@pytest.mark.parametrize("rows", [0, 18])
def test_algebraic_variables_out_of_the_error_test(rows, method):
    fine = {"rows": rows, "method": method, "rtol": 1e-5, "atol": 1e-7}
    mine, _ = agree(by_residual, suppress_algebraic=True, **fine)
    everything, _ = agree(by_residual, **fine)
    assert int(torch.as_tensor(mine.stats.n_steps).sum()) < int(torch.as_tensor(everything.stats.n_steps).sum())


def bent(t, y, yp, p):
    """Not linear in the slopes, of pytrees, in units of its own: ``a' + a'^3 / 100 = -p b``, ``b = a cos t``."""
    da = yp["a"]
    return [1e6 * (da + da**3 / 100 + p * y["b"]), 1e-3 * (y["b"] - y["a"] * torch.cos(t))]


@pytest.mark.parametrize("rows", [0, 3])
def test_fully_implicit_equations_of_pytrees(rows):
    found = []
    for compile in (True, False):
        p = torch.linspace(0.7, 1.2, max(rows, 1), dtype=F64)
        p = (p if rows else p[0]).requires_grad_()
        start = {"a": 0 * p.detach() + 2, "b": 0 * p.detach() + 2}
        sol = adjoint.solve_dae(bent, (0.0, 1.5), start, args=(p,), batched=bool(rows), compile=compile, rtol=1e-7, atol=1e-9)
        found.append([sol.y["a"], sol.yp["a"], torch.autograd.grad((sol.y["a"] * sol.yp["a"]).sum(), p)[0]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class _Circuit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
        self.rate = torch.nn.Parameter(torch.tensor(1.3, dtype=F64))

    def forward(self, t, y, yp):
        return torch.cat([yp[:1] + self.rate * y[:1], yp[1:2] - y[2:], y[2:] - self.net(y[:2])])


def test_modules_and_captured_tensors():
    torch.manual_seed(0)
    circuit, y0 = _Circuit(), torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    found = []
    for compile in (True, False):
        y = adjoint.solve_dae(circuit, (0.0, 2.0), y0, compile=compile, rtol=1e-8, atol=1e-10).y[-1]
        found.append([y, *torch.autograd.grad(y.square().sum(), list(circuit.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_matrix_that_varies():
    """``(1 + y^2) y' = -k y``: ``log y + y^2 / 2 = 1/2 - k t``."""
    k = torch.tensor(0.8, dtype=F64, requires_grad=True)
    mass = lambda t, y, k: (1 + y**2).reshape(1, 1)  # noqa: E731
    options = {"method": "radau5", "mass_matrix": mass, "rtol": 1e-9, "atol": 1e-11, "compile": True}
    y = adjoint.solve_ivp(lambda t, y, k: -k * y, (0.0, 1.0), torch.ones(1, dtype=F64), (k,), **options).y[-1, 0]
    (slope,) = torch.autograd.grad(y, k)
    value = y.detach()
    torch.testing.assert_close(torch.log(value) + value**2 / 2, 0.5 - k.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(slope, -1 / (1 / value + value), rtol=1e-7, atol=0)


def test_what_says_why_it_is_not_compiled():
    y0, residual = torch.ones(2, dtype=F64), lambda t, y, yp: yp + y
    options = {"linear_solver": adjoint.linalg.DenseLU()}
    with pytest.warns(RuntimeWarning, match="compile=True: this solve runs uncompiled, because .*leave linear_solver="):
        mine = adjoint.solve_dae(residual, (0.0, 1.0), y0, compile=True, **options).y
    assert torch.equal(mine, adjoint.solve_dae(residual, (0.0, 1.0), y0, **options).y)
    found = adjoint.explain(residual, y0, method="radau")
    assert found.native and found.unknowns == 2 and found.jacobian == 4 and set(found.sources) == {"fun", "vjp", "jac"}
    assert "4 of 8 entries" in str(found)


def test_what_was_captured_is_known_at_the_next_solve():
    """And is another tensor there: it is the one that counts."""
    y0 = torch.tensor([1.0, 0.0], dtype=F64)

    def solved(k, compile):
        residual = lambda t, y, yp: torch.stack([yp[0] + k * y[0], y[1] - k * y[0] ** 2])  # noqa: E731
        y = adjoint.solve_dae(residual, (0.0, 1.0), y0, compile=compile, rtol=1e-9, atol=1e-11).y[-1]
        return y, torch.autograd.grad(y.sum(), k)[0]

    for value in (0.5, 0.8, 1.1):
        k = torch.tensor(value, dtype=F64, requires_grad=True)
        (mine, slope), (theirs, other) = solved(k, True), solved(k, False)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)
        torch.testing.assert_close(slope, other, rtol=1e-8, atol=0)
    with pytest.raises(adjoint.InvalidInput, match="as many equations as unknowns"):
        adjoint.solve_dae(lambda t, y, yp: (yp + y)[:1], (0.0, 1.0), y0, compile=True)
    with pytest.raises(adjoint.InvalidInput, match=r"returned torch\.float32"):
        adjoint.solve_dae(lambda t, y, yp: (yp + y).float(), (0.0, 1.0), y0, compile=True)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.slow_cases("0")
def test_mechanics(rows):
    """Derivatives of constraints are taken in the equations: a pendulum, whose energy stays."""
    model = adjoint.mechanics(
        torch.eye(2, dtype=F64),
        lambda t, q, v, length: torch.stack([0 * q[..., 0], 0 * q[..., 1] - 9.81], -1),
        lambda t, q, length: (q.square().sum(-1, keepdim=True) - length**2) / 2,
    )
    found = []
    for compile in (True, False) if not rows else (True,):
        length = torch.linspace(1.0, 1.2, max(rows, 1), dtype=F64).unsqueeze(-1)
        start = torch.cat([length, 0 * length], -1)
        length, start = (length.detach() if rows else length[0].detach()).requires_grad_(), start if rows else start[0]
        options = {"args": (length,), "batched": bool(rows), "compile": compile, "rtol": 1e-6, "atol": 1e-8}
        sol = model.solve((0.0, 0.6), start.detach(), torch.zeros_like(start), **options)
        q, v = sol.y.q[-1], sol.y.v[-1]
        torch.testing.assert_close(v.square().sum(-1) / 2 + 9.81 * q[..., 1], 0 * q[..., 1], rtol=0, atol=1e-5)
        found.append([q, v, torch.autograd.grad(q.sum() + v.sum(), length)[0]])
    for a, b in zip(found[0], found[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [0, 18])
def test_initial_values(rows, monkeypatch):
    """They are found natively where Newton's method goes straight to them, and by the search with its bounds and messages elsewhere."""
    searches, solve = [], adjoint.nonlinear.Newton.solve
    monkeypatch.setattr(adjoint.nonlinear.Newton, "solve", lambda *a: searches.append(1) or solve(*a))

    def residual(t, y, yp, k):
        x, z = y.unbind(-1)
        return torch.stack([yp[..., 0] + k * x * z, torch.atan(z) - x], -1)

    def start(guess, compile):
        k = torch.linspace(0.5, 0.9, max(rows, 1), dtype=F64)
        x = torch.linspace(0.3, 0.8, max(rows, 1), dtype=F64)
        y0 = torch.stack([x, torch.full_like(x, guess)], -1)
        k, y0 = (k, y0) if rows else (k[0], y0[0])
        k, y0 = k.requires_grad_(), y0.requires_grad_()
        sol = adjoint.solve_dae(residual, (0.0, 0.1), y0, args=(k,), batched=bool(rows), compile=compile)
        torch.testing.assert_close(sol.y[0, ..., 1], torch.tan(y0[..., 0]), rtol=1e-11, atol=0)
        torch.testing.assert_close(sol.yp[0, ..., 0], -k * y0[..., 0] * torch.tan(y0[..., 0]), rtol=1e-11, atol=0)
        return torch.autograd.grad((sol.y * torch.cos(sol.y)).sum() + sol.yp[0, ..., 0].sum(), (k, y0))

    near, far = start(0.4, True), start(40.0, True)
    assert len(searches) == 1
    for found in (near, far):
        for a, b in zip(found, start(0.4, False), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_initial_values_that_do_not_exist():
    y0 = torch.tensor([2.0, 0.1], dtype=F64)
    residual = lambda t, y, yp: torch.stack([yp[0] + y[1], y[1] ** 2 + y[0]])  # noqa: E731
    with pytest.raises(adjoint.InconsistentInitialCondition, match="no consistent initial values"):
        adjoint.solve_dae(residual, (0.0, 1.0), y0, compile=True)
