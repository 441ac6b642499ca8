"""The discrete adjoint with a bounded number of states: the schedule, its memory, and the same gradients to the last bit."""

from __future__ import annotations

import math
import weakref
from functools import cache

import pytest
import torch

from adjoint import DiscreteAdjoint, InvalidInput, SolveError, UnsupportedCombination, solve_dae, solve_ivp
from adjoint.integrate.schedule import Schedule
from adjoint.methods import METHODS
from adjoint.native import again

from ..helpers.stiff_problems import ROBER_40_JACOBIAN, ROBER_P, rober

F64 = torch.float64
METHODS_TRIED = [
    "tsit5",
    "dopri8",
    "bosh3",
    "rk4",
    "kvaerno3",
    "rodas5p",
    "radau5",
    pytest.param("verner7", marks=pytest.mark.slow),
    pytest.param("kvaerno5", marks=pytest.mark.slow),
    pytest.param("gl4", marks=pytest.mark.slow),
]


# ---- the schedule


@cache
def fewest(length: int, slots: int) -> int:
    """Steps taken again, by trying every place for the next state (Griewank & Walther 2000, equation 2)."""
    if length == 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(m + fewest(length - m, slots - 1) + fewest(m, slots) for m in range(1, length))


class Counting:
    """A schedule of states that are the numbers of their steps."""

    def __init__(self, slots: int) -> None:
        self.schedule, self.n_steps = Schedule(0, slots), 0

    def __getitem__(self, k):
        return self.schedule.start(k, self._advance)

    def _advance(self, start, k, stop):
        assert start == k
        self.n_steps += stop - k
        return stop


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 40])
def test_no_schedule_takes_fewer_steps_again(slots):
    for length in (1, 2, 3, 4, 7, 10, 15, 16, 21, 35, 36, 60):
        recall = Counting(slots)
        for k in reversed(range(length)):
            assert recall[k] == k
        assert recall.n_steps == fewest(length, slots), (length, slots)
        assert recall.schedule.peak <= slots


def test_many_steps_need_few_repetitions():
    recall, length = Counting(10), 1000
    for k in reversed(range(length)):
        assert recall[k] == k
    # C(10 + 4, 4) = 1001: no step is taken again more than four times
    assert recall.n_steps <= 4 * length and recall.schedule.peak == 10


# ---- the same gradients


def lotka(t, y, p):
    a, b, c, d = p.unbind(-1)
    u, v = y.unbind(-1)
    return torch.stack([a * u - b * u * v + 0.1 * torch.sin(t), -c * v + d * u * v], -1)


def gradients(strategy, method, batched=False, **options):
    p = torch.tensor([1.5, 1, 3, 1], dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.0, 1.2], dtype=F64, requires_grad=True)
    times = torch.tensor([0.0, 0.7, 1.9], dtype=F64, requires_grad=True)
    start, stop = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.0, 2.0))
    y, q = (torch.stack([y0, 1.1 * y0, 2 * y0]), torch.stack([p, 1.05 * p, 0.7 * p])) if batched else (y0, p)
    size = {"rtol": 1e-3, "atol": 1e-3} if METHODS[method].adaptive else {"first_step": 0.11}
    sol = solve_ivp(
        lotka, (start, stop), y, args=(q,), t_eval=times, method=method, batched=batched, gradient=strategy,
        quadrature=lambda t, y, p: y[..., 0] ** 2, **size, **options,
    )  # fmt: skip
    weights = torch.arange(1.0, 4.0).reshape(3, *[1] * (sol.y.dim() - 1))
    return torch.autograd.grad((sol.y.square() * weights).sum() + sol.quadrature.sum(), (p, y0, times, start, stop))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.slow_cases("kvaerno3-False", "rodas5p-True", "kvaerno3-True")
def test_the_same_to_the_last_bit(method, batched):
    want = gradients(DiscreteAdjoint(), method, batched)
    found = [gradients(DiscreteAdjoint(checkpoints=count), method, batched) for count in (2, 5, 1000)]
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))
    # iterations for coupled stages begin elsewhere if steps are to be taken again: there it is the same to their tolerance
    same = torch.equal if method not in ("radau5", "gl4") else lambda a, b: torch.allclose(a, b, rtol=1e-4)
    if method in ("kvaerno3", "kvaerno5", "rodas5p") and not batched:
        # with all states at hand their steps are linearised together
        same = lambda a, b: torch.allclose(a, b, rtol=1e-11)  # noqa: E731
    assert all(same(a, b) for a, b in zip(found[0], want, strict=True))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ["tsit5", "rk4", "kvaerno3"])
def test_steps_that_must_end_somewhere(method, batched):
    # fun jumps there: on either side it is seen from within the step
    options = {"step_ts": [0.5, 1.25]}
    want = gradients(DiscreteAdjoint(), method, batched, **options)
    for a, b in zip(gradients(DiscreteAdjoint(checkpoints=3), method, batched, **options), want, strict=True):
        assert torch.equal(a, b)


def test_modules_pytrees_complex_states_and_backwards_in_time():
    module = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    x0 = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    z0 = torch.tensor([[1.0 + 0.5j]], dtype=torch.complex128, requires_grad=True)

    def fun(t, y):
        return {"x": module(y["x"]) * scale, "z": 1j * y["z"] * y["x"].sum()}

    found = []
    for strategy in (DiscreteAdjoint(), DiscreteAdjoint(checkpoints=2)):
        sol = solve_ivp(fun, (1.0, 0.0), {"x": x0, "z": z0}, gradient=strategy)
        loss = sol.y["x"][-1].square().sum() + sol.y["z"][-1].abs().sum() + sol.y["z"][-1].real.sum()
        wanted = (x0, z0, scale, *module.parameters())
        found.append(torch.autograd.grad(loss, wanted, retain_graph=True))
        found.append(torch.autograd.grad(loss, wanted))
    for grads in found[1:]:
        for a, b in zip(grads, found[0], strict=True):
            assert torch.equal(a, b)


def test_robertson():
    p = ROBER_P.clone().requires_grad_()
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    gradient = DiscreteAdjoint(checkpoints=8)
    sol = solve_ivp(rober, (0.0, 40.0), y0, args=(p,), method="kvaerno5", rtol=1e-8, atol=1e-12, gradient=gradient)
    assert sol.stats.n_accepted > 45  # one repetition would not do
    (grad,) = torch.autograd.grad(sol.y[-1, 0], p)
    torch.testing.assert_close(grad, ROBER_40_JACOBIAN[0], rtol=1e-5, atol=0)


def test_failed_trajectories():
    found = []
    for strategy in (DiscreteAdjoint(), DiscreteAdjoint(checkpoints=2)):
        y0 = torch.tensor([[0.5], [3.0]], dtype=F64, requires_grad=True)
        # the second one explodes at t = 1/3
        sol = solve_ivp(lambda t, y: y**2, (0.0, 1.0), y0, t_eval=[0.2, 1.0], batched=True, throw=False, gradient=strategy)
        assert sol.status.tolist()[0] == 0 and sol.status.tolist()[1] < 0
        found.append((sol.y.detach(), torch.autograd.grad(torch.nan_to_num(sol.y).sum(), y0)[0]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1][1], found[0][1]) and bool((found[0][1] != 0).all())


# ---- derivatives of derivatives and transforms


@pytest.mark.parametrize("method", ["tsit5", "kvaerno3"])
@pytest.mark.slow_cases("kvaerno3")
def test_higher_orders_and_transforms(method):
    p = torch.tensor([1.5, 1, 3, 1], dtype=F64)

    def value(p, gradient=DiscreteAdjoint(checkpoints=2)):  # noqa: B008
        # y0 depends on p too: no derivative may be counted twice
        return solve_ivp(lotka, (0.0, 0.5), p[:2] + 0.2, args=(p,), method=method, rtol=1e-4, atol=1e-4, gradient=gradient).y[-1]

    plain = lambda p: value(p, DiscreteAdjoint())  # noqa: E731
    want = torch.func.hessian(plain)(p)
    q = p.clone().requires_grad_()
    for i in range(2):
        (first,) = torch.autograd.grad(value(q)[i], q, create_graph=True)
        second = torch.stack([torch.autograd.grad(x, q, retain_graph=True)[0] for x in first])
        torch.testing.assert_close(second, want[i], rtol=1e-10, atol=1e-12)
    out = value(q)
    rows = torch.vmap(lambda v: torch.autograd.grad(out, q, v, retain_graph=True)[0])(torch.eye(2, dtype=F64))
    torch.testing.assert_close(rows, torch.func.jacrev(plain)(p), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.jacrev(value)(p), torch.func.jacrev(plain)(p), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.func.jvp(value, (p,), (p,))[1], torch.func.jvp(plain, (p,), (p,))[1], rtol=1e-12, atol=0)


# ---- memory


def _saved(gradient, steps, batched):
    y0 = torch.randn(4, 500, dtype=F64, requires_grad=True)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, method="rk4", first_step=1.0 / steps, batched=batched, gradient=gradient)
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("batched", [False, True])
def test_what_is_kept_until_the_backward_pass(batched):
    few, many = (_saved(DiscreteAdjoint(checkpoints=3), n, batched) for n in (10, 50))
    # times and sizes: a few numbers for each step and trajectory, and not a state of 2,000
    assert (many - few) / 40 <= 4 * 5 * 8
    assert (_saved(DiscreteAdjoint(), 50, batched) - _saved(DiscreteAdjoint(), 10, batched)) / 40 >= 2000 * 8


def _most_alive(gradient, method):
    """The most states at which ``fun`` was called in the backward pass, and that are still there when it is called again."""
    seen: list[weakref.ref] = []
    most, watching = 0, False

    def fun(t, y):
        nonlocal most, seen
        if watching:
            alive = [x for r in seen if (x := r()) is not None]
            most = max(most, len({x.data_ptr() for x in alive}))
            seen = [*(weakref.ref(x) for x in alive), weakref.ref(y)]
        return -y + 0.1 * torch.sin(y)

    y0 = torch.randn(50, dtype=F64, requires_grad=True)
    sol = solve_ivp(fun, (0.0, 1.0), y0, method=method, first_step=1 / 60, gradient=gradient)
    watching = True
    sol.y[-1].sum().backward()
    return most


@pytest.mark.parametrize("method", ["rk4", "kvaerno3"])
def test_how_many_states_live_in_the_backward_pass(method):
    few, more, all_of_them = (_most_alive(DiscreteAdjoint(checkpoints=n), "rk4") for n in (3, 13, 100))
    # beside them there are the stages of a step
    assert few <= 3 + 8 and few < more <= few + 10 and all_of_them > 55


# ---- by compiled code


def _of_both(method, count, batched=False, **options):
    """With all states, and with few; the largest difference beside the largest number."""
    want, found = (gradients(DiscreteAdjoint(checkpoints=n), method, batched, compile=True, **options) for n in (None, count))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, want, strict=True))


@pytest.mark.compile
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.slow_cases("bosh3-False", "bosh3-True", "rk4-True", "dopri8-True", "rodas5p-False", "radau5-True", "kvaerno3-False")
def test_compiled_they_are_those_of_all_states(method, batched, monkeypatch):
    """Jumps, samples, integrals, derivatives in times; what the parts of the steps hand on to each other, one step and many at a time."""
    parts = []
    taken = again._Again.part
    monkeypatch.setattr(again._Again, "part", lambda self, start, k, stop: parts.append(stop - k) or taken(self, start, k, stop))
    # iterations for coupled stages begin elsewhere if steps are to be taken again
    close = 1e-4 if method in ("radau5", "gl4") else 1e-13
    for count in (1, 5, 1000):
        assert _of_both(method, count, batched, step_ts=[0.5, 1.25]) < close
    assert min(parts) == 1 and max(parts) > 3


@pytest.mark.compile
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("method", ["tsit5", pytest.param("kvaerno3", marks=pytest.mark.slow)])
def test_compiled_beside_rows_that_end_or_fail(method, rows):
    """y' = p y^2: y = 1 / (1/y0 - p t), which is infinite at t = 1 / (p y0)."""
    y0 = torch.linspace(0.2, 0.5, rows, dtype=F64)
    y0[1] = 4.0
    ends = torch.linspace(0.5, 1.0, rows, dtype=F64)

    def solve(y0, p, ends):
        def fun(t, y, p):
            return p * y**2

        options = {"t_eval": [0.05], "method": method, "gradient": DiscreteAdjoint(checkpoints=4), "compile": True, "max_steps": 1500}
        return solve_ivp(fun, (0.0, ends), y0.unsqueeze(-1), (p,), batched=True, throw=False, rtol=1e-9, atol=1e-9, **options)

    p = torch.tensor(1.0, dtype=F64, requires_grad=True)
    tensors = y0.requires_grad_(), p, ends.requires_grad_()
    sol = solve(*tensors)
    assert sol.status[1] < 0 and (sol.status != 0).sum() == 1
    found = torch.autograd.grad(sol.y.square().sum(), tensors)
    want = torch.autograd.grad((1 / (1 / tensors[0] - tensors[1] * 0.05)).square().sum(), tensors[:2])
    for a, b in zip(found, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert not found[2].any()


@pytest.mark.compile
def test_compiled_without_any_step():
    y0, p = torch.full((1, 2), math.nan, dtype=F64, requires_grad=True), torch.ones((), dtype=F64, requires_grad=True)
    options = {"batched": True, "throw": False, "gradient": DiscreteAdjoint(checkpoints=2), "compile": True}
    sol = solve_ivp(lambda t, y, p: -p * y, (0.0, 1.0), y0, (p,), method="tsit5", **options)
    assert sol.status[0] < 0 and not sol.stats.n_accepted.any()
    assert not any(x.any() for x in torch.autograd.grad(sol.y[-1].nan_to_num().sum(), (y0, p)))


@pytest.mark.compile
@pytest.mark.parametrize("compiled", [False, True])
def test_an_initial_state_that_is_written_into_by_data(compiled):
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    options = {"rtol": 1e-9, "gradient": DiscreteAdjoint(checkpoints=3), "compile": compiled}
    sol = solve_ivp(lambda t, y: -(y**2), (0.0, 1.0), y0, **options)
    y0.data.zero_()
    # y = y0 / (1 + y0 t)
    torch.testing.assert_close(torch.autograd.grad(sol.y[-1].sum(), y0)[0], torch.full((2,), 0.25, dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.compile
def test_compiled_a_state_that_rests():
    """Steps are short enough for a displacement of what rests, which is known without the states of the steps."""
    y0 = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)

    def fun(t, y):
        return torch.stack([-y[0], 30 * y[1]])

    for compiled in (False, True):
        gradient = DiscreteAdjoint(checkpoints=5)
        sol = solve_ivp(fun, (0.0, 0.5), y0, method="tsit5", gradient=gradient, compile=compiled)
        (found,) = torch.autograd.grad(sol.y[-1, 1], y0)
        assert float(found[1]) == pytest.approx(math.exp(15.0), rel=1e-2)


@pytest.mark.compile
@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_that_rests_beside_a_constraint(compiled):
    """An oscillator at rest: its steps are as short as derivatives need them."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    mass, y0 = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64)), torch.zeros(3, dtype=F64, requires_grad=True)

    def fun(t, y):
        return torch.cat([turn @ y[:2], (y[2] - y[0] - y[1]).reshape(1)])

    options = {"mass_matrix": mass, "method": "rodas5p", "gradient": DiscreteAdjoint(checkpoints=5), "compile": compiled}
    (found,) = torch.autograd.grad(solve_ivp(fun, (0.0, 10.0), y0, **options).y[-1, 0], y0)
    torch.testing.assert_close(found[:2], torch.linalg.matrix_exp(10 * turn)[0], rtol=0, atol=1e-3)


@pytest.mark.compile
def test_compiled_second_derivatives_and_all_that_has_no_compiled_form():
    """Derivatives of derivatives keep all states; what compiled code cannot read runs as ever, with a word."""

    def end(p, fun=lambda t, y, p: -p * y, **options):
        options = {"gradient": DiscreteAdjoint(checkpoints=3), "compile": True, "rtol": 1e-10, "atol": 1e-12} | options
        return solve_ivp(fun, (0.0, 1.0), torch.ones(1, dtype=F64), (p,), **options).y[-1, 0]

    p, truth = torch.tensor(0.5, dtype=F64, requires_grad=True), math.exp(-0.5)
    (first,) = torch.autograd.grad(end(p), p, create_graph=True)
    assert float(first) == pytest.approx(-truth, rel=1e-8)
    assert float(torch.autograd.grad(first, p)[0]) == pytest.approx(truth, rel=1e-7)
    assert float(torch.func.hessian(end)(p.detach())) == pytest.approx(truth, rel=1e-7)
    assert float(torch.func.jvp(end, (p.detach(),), (torch.ones_like(p),))[1]) == pytest.approx(-truth, rel=1e-8)

    def unread(t, y, p):
        return -p * torch.linalg.lu_solve(*torch.linalg.lu_factor(torch.eye(1, dtype=F64)), y.unsqueeze(-1))[:, 0]

    with pytest.warns(RuntimeWarning, match="runs uncompiled"):
        assert float(end(p, unread)) == pytest.approx(truth, rel=1e-8)


# ---- what is refused


def test_bad_settings():
    for value in (0, -3, 2.5, True):
        with pytest.raises(InvalidInput, match="checkpoints"):
            DiscreteAdjoint(checkpoints=value)
    with pytest.raises(InvalidInput, match="one of the two"):
        DiscreteAdjoint(checkpoints=3, keep_bytes=1000)
    assert DiscreteAdjoint(checkpoints=3, keep_bytes=0).checkpoints == 3


def test_options_that_ask_for_the_states():
    y0, f, gradient = torch.ones(1, dtype=F64, requires_grad=True), lambda t, y: -y, DiscreteAdjoint(checkpoints=3)
    for options in ({"dense_output": True}, {"t_eval": "steps"}, {"events": lambda t, y: y[0] - 0.5}):
        with pytest.raises(UnsupportedCombination, match="leave checkpoints out"):
            solve_ivp(f, (0.0, 1.0), y0, gradient=gradient, **options)
    with pytest.raises(UnsupportedCombination, match="solve_dae"):
        solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), y0, -y0, gradient=gradient)


def test_a_function_that_changes_is_found_out():
    calls = 0

    def fun(t, y):
        nonlocal calls
        calls += 1
        return -y * (1 + calls / 100)

    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    sol = solve_ivp(fun, (0.0, 1.0), y0, method="rk4", first_step=0.1, gradient=DiscreteAdjoint(checkpoints=2))
    with pytest.raises(SolveError, match="same value"):
        sol.y[-1].sum().backward()


def test_backward_work_is_counted():
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    counts = []
    for strategy in (DiscreteAdjoint(), DiscreteAdjoint(checkpoints=2)):
        sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, method="rk4", first_step=0.1, gradient=strategy)
        sol.y[-1].sum().backward()
        counts.append(sol.stats.backward.n_fun)
    # the steps taken again, the last one once more to see that it ends where it did
    again = fewest(10, 2) + 1
    assert counts[1] == counts[0] + 4 * again
