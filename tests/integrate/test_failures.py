"""What goes wrong: a failure has a name, a time, a component, a trajectory and advice, and nothing after it looks plausible."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from adjoint import (
    AdjointError,
    Backprop,
    DiscreteAdjoint,
    InvalidInput,
    MaxStepsReached,
    NonFiniteState,
    RootError,
    SolveError,
    StepSizeTooSmall,
    solve_ivp,
    solve_root,
)
from adjoint.methods import METHODS

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

ADAPTIVE = [m for m in ("tsit5", "dopri5", "bosh3") if m in METHODS]


def blow_up(t, y):
    """``y_1 = 1 / (1 - t)``; the others decay."""
    return torch.stack([-y[..., 0], y[..., 1] ** 2, -y[..., 2]], -1)


def nan_after(t, y):
    """The last component's rate is NaN after t = 0.4."""
    bad = torch.where(t > 0.4, float("nan"), 1.0)
    return torch.stack([-y[..., 0], -y[..., 1], -y[..., 2] * bad], -1)


def kink(t, y):
    """A jump that no step of at least 1e-3 can pass at tight tolerances."""
    rate = torch.where(t > 0.4, 1e3, 0.0)
    return torch.stack([0 * y[..., 0], y[..., 1] * 0 + rate, 0 * y[..., 2]], -1)


def sine(t, y):
    return torch.stack([0 * y[..., 0], 0 * y[..., 1], torch.cos(50 * t) + 0 * y[..., 2]], -1)


# name: fun, error, options, time and its tolerance, worst component, a word of the message
CASES = {
    "max_steps": (
        sine,
        MaxStepsReached,
        {"max_steps": 7, "max_step": 0.05, "first_step": 0.05, "rtol": 1e-2, "atol": 1.0},
        (0.35, 1e-12),
        2,
        "7",
    ),
    "blow-up": (blow_up, (NonFiniteState, StepSizeTooSmall), {}, (1.0, 1e-3), 1, "blow"),
    "nan": (nan_after, NonFiniteState, {}, (0.4, 1e-8), 2, "fun"),
    "min_step": (kink, StepSizeTooSmall, {"min_step": 1e-3, "rtol": 1e-10, "atol": 1e-12, "max_step": 0.1}, (0.4, 2e-2), 1, "min_step"),
}
STATUS = {MaxStepsReached: -1, StepSizeTooSmall: -2, NonFiniteState: -3}


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("case", CASES)
def test_named_error(case, method):
    """The right class, time, component and trajectory; a message with all of them and advice; torchdiffeq's and SciPy's classes."""
    fun, error, options, (when, near), component, word = CASES[case]
    y0 = torch.ones(3)
    with pytest.raises(error) as caught:
        solve_ivp(fun, (0.0, 2.0), y0, method=method, **options)
    e, text = caught.value, str(caught.value)
    assert isinstance(e, SolveError) and isinstance(e, AdjointError) and isinstance(e, RuntimeError) and isinstance(e, AssertionError)
    assert abs(e.t - when) < near and e.component == component and e.trajectory is None
    assert f"{e.t:.8g}" in text and f"y[{component}]" in text and word in text and "Likely causes" in text and "trajectory" not in text
    assert method in text


@pytest.mark.parametrize("case", CASES)
def test_status_instead_of_an_error(case):
    """``throw=False``: the failure's status and words; right values before it, NaN from it on."""
    fun, error, options, (when, near), *_ = CASES[case]
    times = torch.cat([torch.linspace(0.0, 0.9 * when, 5), torch.tensor([when + near + 1e-6, 1.5, 2.0])])
    sol = solve_ivp(fun, (0.0, 2.0), torch.ones(3), t_eval=times, throw=False, **options)
    errors = error if isinstance(error, tuple) else (error,)
    assert sol.status in [STATUS[e] for e in errors] and not sol.success and isinstance(sol.message, str) and len(sol.message) > 10
    assert bool(torch.isfinite(sol.y[:5]).all()) and bool(sol.y[5:].isnan().all())
    if fun is blow_up:
        assert torch.allclose(sol.y[:5, 1], 1 / (1 - times[:5]), rtol=1e-4)
    if fun is nan_after:
        assert torch.allclose(sol.y[:5], torch.exp(-times[:5, None]).expand(-1, 3), rtol=1e-5)
    ends = solve_ivp(fun, (0.0, 2.0), torch.ones(3), throw=False, **options)
    assert torch.equal(ends.y[0], torch.ones(3)) and bool(ends.y[1].isnan().all())
    assert f"status: {ends.status}" in repr(ends) and ends.message in repr(ends)


def test_messages_differ():
    cases = [CASES[c] for c in ("max_steps", "nan", "min_step")]
    assert len({solve_ivp(fun, (0.0, 2.0), torch.ones(3), throw=False, **options).message for fun, _, options, *_ in cases}) == 3


# --- one of a batch ---


def mixed(t, y, p):
    """Row i: ``y' = p_i y^2``, blows up at ``1 / p_i`` for positive p."""
    return p.unsqueeze(-1) * y**2


RATES = [-1.0, 2.0, 0.25, -0.5, 1.5]
FAILS = [1, 4]


@pytest.mark.parametrize("t_eval", [None, [0.1, 0.3, 0.9, 1.0]], ids=["ends", "samples"])
def test_a_trajectory_fails_alone(t_eval):
    p = torch.tensor(RATES)
    y0 = torch.ones(5, 2)
    with pytest.raises(SolveError) as caught:
        solve_ivp(mixed, (0.0, 1.0), y0, (p,), batched=True, t_eval=t_eval)
    e = caught.value
    assert e.trajectory == 1 and abs(e.t - 0.5) < 1e-3 and "trajectory 1 (2 of 5 failed)" in str(e)
    sol = solve_ivp(mixed, (0.0, 1.0), y0, (p,), batched=True, t_eval=t_eval, throw=False)
    assert sol.success.tolist() == [i not in FAILS for i in range(5)] and len(sol.message) == 5
    assert "3 trajectories succeeded, 2 failed" in repr(sol)
    t = torch.tensor([0.0, 1.0] if t_eval is None else t_eval).unsqueeze(-1)
    truth = torch.where(t < torch.where(p > 0, 1 / p, math.inf), 1 / (1 - p * t), math.nan)
    assert torch.allclose(sol.y[..., 0], truth, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("y0", [float("nan"), float("inf")])
def test_a_bad_start_fails_alone(y0):
    start = torch.ones(3, 2)
    start[1, 0] = y0
    sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), start, batched=True, throw=False)
    assert sol.status.tolist()[::2] == [0, 0] and sol.status[1] < 0 and bool(sol.y[-1, 1].isnan().all())
    assert torch.allclose(sol.y[-1, ::2], torch.full((2, 2), math.exp(-1)), rtol=1e-5)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
@pytest.mark.parametrize("t_eval", [None, [0.3, 0.9]], ids=["end", "samples"])
@pytest.mark.slow_cases("end-backprop", "samples-discrete")
def test_survivors_keep_their_gradients(gradient, t_eval):
    """Sums over survivors only: finite and right for them, zero for the failed."""
    p, y0 = torch.tensor(RATES, requires_grad=True), torch.ones(5, 2).requires_grad_()
    alive = [i for i in range(5) if i not in FAILS]
    sol = solve_ivp(mixed, (0.0, 1.0), y0, (p,), batched=True, t_eval=t_eval, throw=False, gradient=gradient, rtol=1e-9, atol=1e-11)
    got_p, got_y = torch.autograd.grad(sol.y[-1, alive].sum(), (p, y0))
    t = 1.0 if t_eval is None else t_eval[-1]
    expect = (t / (1 - p * t) ** 2).detach()
    assert torch.allclose(got_p[alive], 2 * expect[alive], rtol=1e-6) and torch.equal(got_p[FAILS], torch.zeros(2))
    assert torch.allclose(got_y[alive], (1 / (1 - p * t) ** 2).detach()[alive].unsqueeze(-1).expand(-1, 2), rtol=1e-6)
    assert torch.equal(got_y[FAILS], torch.zeros(2, 2))


@pytest.mark.parametrize("batched", [False, True])
def test_samples_before_a_failure_keep_their_gradients(batched):
    """What was computed before the failure is right, and so are its derivatives."""
    p = torch.tensor([2.0], requires_grad=True)
    y0 = torch.ones(1, 2) if batched else torch.ones(2)
    fun = mixed if batched else lambda t, y, p: p * y**2
    sol = solve_ivp(fun, (0.0, 1.0), y0, (p,), t_eval=[0.1, 0.25, 0.9], throw=False, batched=batched, rtol=1e-9, atol=1e-11)
    (got,) = torch.autograd.grad(sol.y[1].sum(), p)
    assert torch.allclose(got, 2 * torch.tensor([0.25 / (1 - 0.5) ** 2]), rtol=1e-6) and bool(sol.y[2].isnan().all())


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "bdf", "abm", "rk4"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("True-bdf", "False-abm")
def test_the_sample_at_the_start_is_there_though_no_step_was(batched, method):
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64).expand((2, 2) if batched else (2,))
    options = {"first_step": 0.1} if method == "rk4" else {}
    options |= {"t_eval": [0.0, 0.5, 1.0], "throw": False, "batched": batched}
    sol = solve_ivp(lambda t, y: y * math.nan, (0.0, 1.0), y0, method=method, **options)
    torch.testing.assert_close(sol.y[0], y0, rtol=0, atol=0)
    assert bool(sol.y[1:].isnan().all()) and bool((torch.as_tensor(sol.status) < 0).all())


@pytest.mark.parametrize("batched", [False, True])
def test_dense_output_and_steps_of_a_failed_solve(batched):
    """Right up to the failure, NaN behind it, and an error only outside of the span."""
    p = torch.tensor([2.0, -1.0]) if batched else torch.tensor([2.0])
    y0 = torch.ones(2, 1) if batched else torch.ones(1)
    fun = mixed if batched else lambda t, y, p: p * y**2
    t = torch.tensor([0.2, 0.4, 0.8, 1.0])
    sol = solve_ivp(fun, (0.0, 1.0), y0, (p,), throw=False, batched=batched, dense_output=True, rtol=1e-8, atol=1e-10)
    truth = torch.where(p * t.unsqueeze(-1) < 1, 1 / (1 - p * t.unsqueeze(-1)), math.nan)
    assert torch.allclose(sol(t).reshape(truth.shape), truth, rtol=1e-5, equal_nan=True)
    with pytest.raises(InvalidInput):
        sol(1.1)
    own = solve_ivp(fun, (0.0, 1.0), y0, (p,), throw=False, batched=batched, t_eval="steps")
    first = own.t.reshape(own.t.shape[0], -1)[:, 0]
    assert float(first[~first.isnan()].max()) < 0.5 + 1e-6


# --- components ---


def test_component_names_in_pytrees():
    y0 = {"a": torch.ones(2), "b": [torch.ones(()), torch.ones(2, 3)]}
    hit = torch.zeros(2, 3)
    hit[1, 2] = 1.0

    def fun(t, y):
        return {"a": -y["a"], "b": [-y["b"][0], -y["b"][1] + torch.where(hit > 0, torch.log(0.4 - t), 0.0)]}

    with pytest.raises(NonFiniteState, match=r"y\['b'\]\[1\]\[1, 2\]") as caught:
        solve_ivp(fun, (0.0, 1.0), y0)
    assert caught.value.component == 2 + 1 + 5 and abs(caught.value.t - 0.4) < 1e-6


def test_message_is_one_readable_line():
    with pytest.raises(MaxStepsReached) as caught:
        solve_ivp(sine, (0.0, 2.0), torch.ones(3), max_steps=3, max_step=0.01)
    assert "\n" not in str(caught.value) and "3 accepted and 0 rejected" in str(caught.value) and "stiff" in str(caught.value)


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].adaptive])
def test_fixed_steps_fail_too(method):
    with pytest.raises(NonFiniteState) as caught:
        solve_ivp(nan_after, (0.0, 1.0), torch.ones(3), method=method, first_step=0.1)
    assert 0.29 < caught.value.t < 0.51 and caught.value.component == 2
    sol = solve_ivp(nan_after, (0.0, 1.0), torch.ones(3), method=method, first_step=0.1, t_eval=[0.2, 1.0], throw=False)
    assert sol.status == -3 and bool(torch.isfinite(sol.y[0]).all()) and bool(sol.y[1].isnan().all())


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].adaptive])
def test_failed_final_state_is_all_nan_with_fixed_steps(method, batched):
    """Components that stayed finite do not look plausible."""
    y0 = torch.ones(1, 3) if batched else torch.ones(3)
    fun = (lambda t, y: nan_after(t[:, None], y[:, None])[:, 0]) if batched else nan_after
    sol = solve_ivp(fun, (0.0, 1.0), y0, method=method, first_step=0.1, throw=False, batched=batched)
    assert bool((torch.as_tensor(sol.status) == -3).all()) and bool(sol.y[1].isnan().all())


# --- errors from inside fun ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_errors_of_fun_pass_through_at_once(error, where):
    """The next evaluation after the one that raises never happens, and a later solve is untouched."""
    calls, limit = [0], [10**9]

    def fun(t, y, p):
        calls[0] += 1
        if calls[0] == limit[0]:
            raise error("from fun")
        return p * y

    p = torch.tensor(-1.0, requires_grad=True)

    def solve():
        return solve_ivp(fun, (0.0, 1.0), torch.ones(2), (p,), rtol=1e-8, atol=1e-10).y[-1].sum()

    if where == "forward":
        limit[0] = 20
        with pytest.raises(error, match="from fun"):
            solve()
    else:
        value = solve()
        limit[0] = calls[0] + 5
        with pytest.raises(error, match="from fun"):
            value.backward()
    assert calls[0] == limit[0]
    limit[0] = 10**9
    (got,) = torch.autograd.grad(solve(), p)
    assert abs(float(got) - 2 * math.exp(-1)) < 1e-6


def test_errors_of_events_and_integrands_pass_through():
    def interrupt(t, y):
        if t > 0.3:
            raise KeyboardInterrupt
        return y[0]

    for options in ({"events": interrupt}, {"quadrature": interrupt}):
        with pytest.raises(KeyboardInterrupt):
            solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), max_step=0.1, **options)
    assert solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2)).success


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "bdf"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("True-bdf")
def test_an_error_norm_of_zero_by_zero_is_not_the_fault_of_fun(method, batched):
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    atol = torch.tensor([1e-8, 0.0], dtype=torch.float64)
    fun = lambda t, y: torch.stack([-y[..., 0], 0 * y[..., 1]], -1)  # noqa: E731
    with pytest.raises(NonFiniteState, match=r"error norm is 0/0: atol is zero, and so is y\[1\]") as found:
        solve_ivp(fun, (0.0, 1.0), y0.repeat(2, 1) if batched else y0, method=method, atol=atol, batched=batched)
    assert found.value.component == 1


def test_tolerances_of_zero_are_not_the_fault_of_fun():
    with pytest.raises(InvalidInput, match="rtol and atol are both zero"):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["tsit5", "rk4", "kvaerno3", "bdf", "abm"])
def test_a_trajectory_that_begins_with_nan_makes_no_attempts(method):
    y0 = torch.tensor([[1.0], [float("nan")], [float("inf")]])
    sizes = {"first_step": 0.1} if method == "rk4" else {}
    sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, method=method, batched=True, throw=False, rtol=1e-4, atol=1e-6, **sizes)
    assert sol.stats.n_steps[1:].tolist() == [0, 0]
    assert sol.status.tolist() == [0, -3, -3]
    assert float(sol.y[-1, 0]) == pytest.approx(math.exp(-1.0), rel=1e-3)
    assert bool(torch.isnan(sol.y[-1, 1:]).all())


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5"])
@pytest.mark.slow_cases("tsit5")
def test_a_function_that_gives_other_values_each_time_is_called_that(method):
    """Dropout in train mode: neither stiff nor without a root, as the usual advice has it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    with pytest.raises(SolveError, match="another value when it is called again"):
        solve_ivp(lambda t, y: net(y), (0.0, 1.0), torch.ones(2), method=method, max_steps=60)
    with pytest.raises(RootError, match="another value when it is called again"):
        solve_root(lambda x: x - net(x), torch.ones(2), max_steps=5)
    net.eval()
    with pytest.raises(SolveError) as failure:
        solve_ivp(lambda t, y: net(y), (0.0, 1.0), torch.ones(2), method=method, max_steps=1)
    assert "another value" not in str(failure.value)


@pytest.mark.parametrize("method", ["rodas3p", "rodas5p", "radau5", "kvaerno5", "bdf"])
@pytest.mark.parametrize(
    "fun, start",
    [
        (lambda t, y: torch.where(t > 1, float("inf"), 1.0) * y, 1.0),
        (lambda t, y: torch.exp(50 * y), 1.0),
        (lambda t, y: 1 - torch.sqrt(y), 0.0),
        (lambda t, y: 1e300 - 1e200 * y, 1.0),
    ],
    ids=["infinite", "explodes", "jacobian", "large"],
)
def test_what_is_not_finite_is_said_by_status_alone(method, fun, start):
    """One small state is solved for by NumPy, which warns of such numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sol = solve_ivp(fun, (0.0, 3.0), torch.tensor([start], dtype=torch.float64), method=method, max_steps=500, throw=False)
    assert sol.success == bool(torch.isfinite(sol.y).all())
