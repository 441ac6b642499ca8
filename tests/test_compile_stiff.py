"""compile=True with Rosenbrock methods gives the numbers of the eager loop, derivatives included."""

from __future__ import annotations

import warnings

import pytest
import torch

from adjoint import Backprop, UnsupportedCombination, solve_ivp
from adjoint.linalg import DenseLU
from adjoint.linalg.elimination import Elimination

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _no_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True", category=RuntimeWarning)
        yield


def _kinetics(t, y, p):
    """Robertson's kinetics of two species (the third is what is left), with a source that varies in time."""
    a, b = y.unbind(-1)
    first, second, third = p.unbind(-1)
    back = second * b * (1 - a - b)
    return torch.stack([back - first * a, first * a - back - third * b * b + 1e-6 * torch.sin(t)], -1)


def _parameters(rows):
    return (torch.tensor([0.04, 1e4, 3e7]) * (1 + 0.1 * torch.rand(rows, 3))).requires_grad_()


def _solve(p, compiled, method="rodas3p", end=10.0, **options):
    y0 = torch.tensor([1.0, 0.0]).expand(*p.shape[:-1], 2).contiguous().requires_grad_()
    options = {"batched": p.dim() > 1, "rtol": 1e-4, "atol": 1e-8, **options}
    return y0, solve_ivp(_kinetics, (0.0, end), y0, (p,), method=method, compile=compiled, **options)


def _close(x, y, rtol=1e-9):
    return float((x - y).abs().max()) <= rtol * float(y.abs().max())


def _agree(p, exact=False, **options):
    found = []
    for compiled in (False, True):
        y0, sol = _solve(p, compiled, **options)
        found.append((sol.y.detach(), *torch.autograd.grad(sol.y.square().sum(), (p, y0))))
        assert torch.as_tensor(sol.stats.n_solves).sum() > 0
    # sizes of steps are chosen by numbers in single precision: they round otherwise in compiled code
    return all(_close(c, e, 1e-12 if exact else 1e-8) for e, c in zip(*found, strict=True))


def _times_agree(rows):
    p, found = _parameters(rows).detach(), []
    p = (p if rows > 1 else p[0]).requires_grad_()
    for compiled in (False, True):
        end = torch.tensor(10.0, requires_grad=True)
        y0, sol = _solve(p, compiled, end=end, t_eval=torch.stack([end / 3, end]))
        found.append((sol.y.detach(), *torch.autograd.grad(sol.y.square().sum(), (p, y0, end))))
    # one trajectory has a loop of its own without compile=, which does not round sizes of steps to single precision
    return all(_close(c, e, 1e-9 if rows > 1 else 1e-7) for e, c in zip(*found, strict=True))


def _module_agrees():
    """Wide states are factorised by LAPACK; the parameters of a module are differentiated in the compiled adjoint."""
    n = 8
    rate, y0 = torch.nn.Linear(n, n).double(), torch.randn(2, n)

    class Rate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = rate

        def forward(self, t, y):
            return torch.tanh(self.inner(y)) - 50 * y

    found = []
    for compiled in (False, True):
        y = solve_ivp(Rate(), (0.0, 1.0), y0, batched=True, method="rodas3p", rtol=1e-3, compile=compiled).y
        found.append((y.detach(), *torch.autograd.grad(y[-1].sum(), list(rate.parameters()))))
    return all(_close(c, e) for e, c in zip(*found, strict=True))


@pytest.mark.usefixtures("uncompiled")
def test_formulas_of_a_module_of_more_unknowns():
    assert _module_agrees()


@pytest.mark.slow
def test_module_of_more_unknowns():
    assert _module_agrees()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", ["rodas3p", "rodas4", "rodas5p"])
@pytest.mark.parametrize("rows", [3, 130], ids=["rows", "columns"])
def test_formulas(method, rows):
    """Long ensembles are carried by columns."""
    assert _agree(_parameters(rows), method=method, t_eval=[1.0, 10.0], exact=True)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("rows", [1, 3, 130], ids=["single", "rows", "columns"])
def test_formulas_of_derivatives_in_times(rows):
    assert _times_agree(rows)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", ["tsit5", "rodas5p"])
def test_gradient_of_long_ensembles_across_jumps(method):
    """Their adjoints run uncompiled, on states that are not carried by columns."""
    w, found = torch.rand(130, 2, requires_grad=True), []
    for compiled in (False, True):
        y0, step_ts = torch.ones(130, 2), torch.tensor([0.5])
        y = solve_ivp(
            lambda t, y, w: -w * y.flip(-1), (0.0, 1.0), y0, (w,), batched=True, method=method, step_ts=step_ts, compile=compiled
        ).y
        found.append(torch.autograd.grad(y.square().sum(), w)[0])
    assert _close(found[1], found[0])


@pytest.mark.usefixtures("uncompiled")
def test_backprop():
    assert _agree(_parameters(3), gradient=Backprop(), exact=True)


def test_batched():
    assert _agree(_parameters(3), t_eval=[1.0, 10.0])


@pytest.mark.slow
def test_batched_by_columns():
    assert _agree(_parameters(130), method="rodas5p")


@pytest.mark.slow
def test_single_with_derivatives_in_times():
    assert _times_agree(1)


def test_failures_stay_alone_and_code_is_kept():
    """A trajectory that blows up is the only one that fails; a second solve with other values and another closure compiles nothing."""
    from torch._dynamo.utils import counters

    def solve(scale, throw=False):
        w = torch.tensor([1.0, scale, -1.0], requires_grad=True)
        fun = lambda t, y: w.unsqueeze(-1) * y * y  # noqa: E731
        return w, solve_ivp(fun, (0.0, 2.0), torch.ones(3, 1), batched=True, method="rodas3p", compile=True, throw=throw)

    _, sol = solve(-2.0)
    before = counters["stats"]["unique_graphs"]
    w, sol = solve(0.25)
    assert counters["stats"]["unique_graphs"] == before
    assert sol.status[0] < 0 and torch.equal(sol.success, torch.tensor([False, True, True]))
    assert torch.isnan(sol.y[-1, 0]).all()
    assert torch.allclose(sol.y[-1, 1:, 0], torch.tensor([2.0, 1 / 3.0]), rtol=1e-4)
    # the adjoint of a captured tensor runs eagerly: y(2) = 1 / (1 - 2 w)
    assert torch.allclose(torch.autograd.grad(sol.y[-1, 1:].sum(), w)[0][1:], torch.tensor([8.0, 2 / 9.0]), rtol=1e-3)


def test_what_cannot_be_compiled_runs_eagerly():
    def rate(t, y):
        if float(y.sum()) > 1e9:
            return y
        return -y

    with pytest.warns(RuntimeWarning, match="compile=True"):
        y = solve_ivp(rate, (0.0, 1.0), torch.ones(2), compile=True, method="rodas3p", rtol=1e-6).y[-1]
    assert torch.allclose(y, torch.exp(torch.tensor(-1.0)).expand(2), rtol=1e-4)


@pytest.mark.parametrize("options", [{"method": "kvaerno5"}, {"method": "bdf"}, {"method": "rodas5p", "linear_solver": DenseLU()}])
def test_what_is_refused(options):
    with pytest.raises(UnsupportedCombination, match="compile"):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), compile=True, **options)
    for y0, why in ((torch.ones(600), "512"), (torch.ones(2, dtype=torch.complex128), "real")):
        with pytest.raises(UnsupportedCombination, match=why):
            solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, compile=True, method="rodas5p")


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_elimination(n):
    """Against LAPACK, with pivots that are zero at first; a singular matrix gives NaN and leaves the others alone."""
    a, b = torch.randn(40, n, n), torch.randn(40, n)
    a[:20].diagonal(dim1=-2, dim2=-1).zero_()
    if n == 1:
        a[:20] = 2.0
    a[7] = 0.0
    factors = Elimination([list(row.unbind(-1)) for row in a.unbind(1)])
    right = torch.arange(40) != 7
    for matrix, found in ((a, factors.solve(b.unbind(-1))), (a.mT, factors.solve_transposed(b.unbind(-1)))):
        x = torch.stack(found, -1)
        assert torch.isnan(x[7]).any()
        assert torch.allclose(x[right], torch.linalg.solve(matrix[right], b[right]), rtol=1e-8, atol=1e-10)


def test_a_mass_matrix_is_refused():
    y0 = torch.ones(2)
    with pytest.raises(UnsupportedCombination, match="leave out mass_matrix="):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, method="rodas5p", mass_matrix=torch.eye(2), compile=True)
