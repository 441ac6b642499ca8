"""One state of many rows, such as a mini-batch, whose native functions go row by row: values and derivatives of the eager engine."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import adjoint
from adjoint.native import direct, recognise
from adjoint.native.program import Program

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults, pytest.mark.usefixtures("no_fallback")]
F64 = torch.float64


@pytest.fixture
def made(monkeypatch):
    """The programs that were made."""
    found: list[Program] = []
    real = recognise.program_of
    monkeypatch.setattr(recognise, "program_of", lambda *a, **k: found.append(real(*a, **k)) or found[-1])
    direct.forget()
    return found


def driven(t, y, w, c, x):
    """Of shared and own inputs, and of the time."""
    return torch.tanh(y @ w) * torch.cos(t) - c * y + x


def given(rows, dtype=F64):
    generator = torch.Generator().manual_seed(rows)
    y0, x = torch.randn(2, rows, 3, generator=generator, dtype=dtype)
    w = torch.randn(3, 3, generator=generator, dtype=dtype)
    return [v.requires_grad_() for v in (y0, w, torch.tensor([0.5, 1.0, 1.5], dtype=dtype), 0.1 * x)]


def found(compile, rows, fun=driven, dtype=F64, **options):
    y0, *args = given(rows, dtype)
    times = options.pop("t_eval", None)
    times = None if times is None else times.clone().requires_grad_()
    span = torch.tensor([0.1, 1.6], dtype=F64, requires_grad=True)
    options = {"method": "tsit5", "rtol": 1e-6, "atol": 1e-8} | options
    sol = adjoint.solve_ivp(fun, tuple(span), y0, args, t_eval=times, compile=compile, **options)
    y = sol(torch.tensor([0.3, 1.1], dtype=F64)) if options.get("dense_output") else sol.y
    total = (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)).sum()
    total = total if sol.quadrature is None else total + sol.quadrature.sum()
    wanted = [y0, *args, span, *([] if times is None else [times])]
    return sol, y.detach(), torch.autograd.grad(total, wanted, allow_unused=True)


def agree(rows, tolerance=1e-8, **options):
    (mine, y, slopes), (theirs, other, others) = (found(compile, rows, **options) for compile in (True, False))
    assert (mine.stats.n_steps, mine.stats.n_accepted, mine.status) == (theirs.stats.n_steps, theirs.stats.n_accepted, theirs.status)
    torch.testing.assert_close(y, other, rtol=tolerance, atol=tolerance)
    for a, b in zip(slopes, others, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("method", ["euler", "heun3", "bosh3", "dopri5", "tsit5", "dopri8", "verner7"])
@pytest.mark.parametrize("rows", [8, 19, 64])
def test_methods(method, rows, made):
    first = {"first_step": 0.05} if method in ("euler", "heun3") else {}
    agree(rows, method=method, **first)
    assert [p.joint for p in made] == [rows]


@pytest.mark.parametrize(
    "options",
    [
        {"t_eval": torch.tensor([0.1, 0.4, 0.9, 1.6], dtype=F64)},
        {"t_eval": torch.tensor([1.5, 1.2, 0.4], dtype=F64)},
        {"dense_output": True},
        {"step_ts": torch.tensor([0.7, 1.0], dtype=F64)},
        {"controller": adjoint.PIDController(pcoeff=0.3, icoeff=0.4)},
        {"max_step": 0.1},
        {"rtol": torch.tensor([1e-3, 1e-5, 1e-7], dtype=F64)},
        {"norm": "rms"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_around(options, made):
    agree(19, **options)
    assert [p.joint for p in made] == [19]


def test_single_precision(made):
    agree(21, 1e-4, dtype=torch.float32, rtol=1e-4, atol=1e-5)
    assert [p.joint for p in made] == [21]


def test_rows_that_know_of_each_other(made):
    def coupled(t, y, w, c, x):
        return driven(t, y, w, c, x) - 0.1 * (y - y.mean(0))

    agree(8, fun=coupled)
    assert [p.joint for p in made] == [0]


def test_a_quadrature_and_events_go_another_way():
    agree(8, quadrature=lambda t, y, *args: y.square().sum(-1))
    agree(8, events=lambda t, y, *args: y[0, 0] - 100.0)


def test_inputs_of_other_shapes(made):
    """Of rows behind a leading dimension of one, and of more rows than there are."""
    table = torch.randn(1, 19, 3, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()

    def fun(t, y, w, c, x):
        return driven(t, y, w, c, x) + table[0] * 0.1

    agree(19, fun=fun)
    results = []
    for compile in (True, False):
        sol = adjoint.solve_ivp(fun, (0.0, 1.0), (args := given(19))[0], args[1:], compile=compile, rtol=1e-8)
        results.append(torch.autograd.grad(sol.y[-1].square().sum(), table)[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert all(p.joint == 19 for p in made)
    # of a batch of trajectories too
    y0 = torch.randn(19, 3, dtype=F64)
    ends = [
        adjoint.solve_ivp(lambda t, y: -(table[0] ** 2) * y, (0.0, 1.0), y0, batched=True, compile=c, rtol=1e-8).y[-1]
        for c in (True, False)
    ]
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)
    slopes = [torch.autograd.grad(end.sum(), table)[0] for end in ends]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


def test_a_network(made):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y**3)

    field, y0 = Field(), torch.randn(20, 2, dtype=F64)
    grads = []
    for compile in (True, True, False):
        field.zero_grad()
        adjoint.solve_ivp(field, (0.0, 1.0), y0, compile=compile, rtol=1e-8).y[-1].square().mean().backward()
        grads.append([p.grad.clone() for p in field.parameters()])
    for a, b, c in zip(*grads, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-9)
    assert [p.joint for p in made] == [20]


def test_second_order():
    y0, w, c, x = given(9)

    def end(w, compile):
        return (
            adjoint.solve_ivp(driven, (0.0, 1.0), y0.detach(), (w, c.detach(), x.detach()), compile=compile, rtol=1e-8).y[-1].square().sum()
        )

    found = []
    for compile in (True, False):
        (slope,) = torch.autograd.grad(end(w, compile), w, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), w)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_failures(made):
    def explodes(t, y, w, c, x):
        return y**2

    y0 = torch.full((8, 3), 0.9, dtype=F64)
    y0[3] = 2.0
    for compile in (True, False):
        with pytest.raises(adjoint.SolveError):
            adjoint.solve_ivp(explodes, (0.0, 1.0), y0, given(8)[1:], compile=compile)
        sol = adjoint.solve_ivp(explodes, (0.0, 1.0), y0, given(8)[1:], compile=compile, throw=False)
        assert sol.status < 0 and bool(sol.y[-1].isnan().all())
    assert all(p.joint == 8 for p in made)


def test_more_steps_than_room(made):
    def fast(t, y, w, c, x):
        return 40 * torch.stack([y[..., 1], -y[..., 0], 0 * y[..., 2]], -1)

    with warnings.catch_warnings():
        # of a component at rest, for whose derivatives steps are shortened after all
        warnings.filterwarnings("ignore", message="compile=True.*at rest")
        agree(8, fun=fast, tolerance=1e-6)
    assert [p.joint for p in made] == [8]
