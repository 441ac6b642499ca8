"""What goes in: bad arguments are named at the door, and states, times and tolerances of every form mean what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import adjoint
from adjoint import InvalidInput, UnsupportedCombination, solve_dae, solve_ivp

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
FEW = settings(max_examples=20, deadline=None, derandomize=True)


def decay(t, y, *args):
    return tree_map(lambda x: -x, y)


def _one():
    return torch.ones(2, dtype=torch.float64)


NAN, INF = float("nan"), float("inf")
BAD = {
    "integer y0": ("y0", {"y0": lambda: torch.ones(2, dtype=torch.int64)}),
    "boolean y0": ("y0", {"y0": lambda: torch.ones(2, dtype=torch.bool)}),
    "number as y0": ("y0", {"y0": lambda: 1.0}),
    "non-tensor leaf": ("y0.*'b'", {"y0": lambda: {"a": _one(), "b": 2.0}}),
    "no tensor": ("y0", {"y0": lambda: {}}),
    "NaN in y0": ("y0", {"y0": lambda: torch.tensor([1.0, NAN])}),
    "infinite leaf of y0": ("y0.*'b'", {"y0": lambda: {"a": _one(), "b": torch.tensor(INF)}}),
    "fun not callable": ("fun", {"fun": 3}),
    "y0 nested": ("nested", {"y0": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)}),
    "y0 without values": ("meta", {"y0": torch.ones(2, device="meta")}),
    "t_span a number": ("t_span", {"t_span": 1.0}),
    "t_span of three": ("t_span", {"t_span": (0.0, 1.0, 2.0)}),
    "t_span a word": ("t_span", {"t_span": ("a", "b")}),
    "t_span NaN": ("t_span", {"t_span": (0.0, NAN)}),
    "t_span infinite": ("t_span", {"t_span": (0.0, INF)}),
    "t_span complex": ("t_span", {"t_span": (0.0, torch.tensor(1j))}),
    "t_span a vector, not batched": ("t_span", {"t_span": (0.0, torch.ones(2))}),
    "t_eval outside": ("t_eval", {"t_eval": [0.5, 1.5]}),
    "t_eval before": ("t_eval", {"t_eval": [-0.5, 0.5]}),
    "t_eval not monotonic": ("t_eval", {"t_eval": [0.2, 0.1, 0.3]}),
    "t_eval empty": ("t_eval", {"t_eval": []}),
    "t_eval a word": ("t_eval", {"t_eval": "stepz"}),
    "t_eval NaN": ("t_eval", {"t_eval": [0.1, NAN]}),
    "t_eval with columns, not batched": ("t_eval", {"t_eval": torch.ones(2, 2)}),
    "step_ts NaN": ("step_ts", {"step_ts": [NAN]}),
    "rtol negative": ("rtol", {"rtol": -1e-3}),
    "rtol NaN": ("rtol", {"rtol": NAN}),
    "atol negative": ("atol", {"atol": -1.0}),
    "atol NaN entry": ("atol", {"atol": lambda: torch.tensor([1e-6, NAN])}),
    "atol negative entry": ("atol", {"atol": lambda: torch.tensor([1e-6, -1e-6])}),
    "atol of wrong shape": ("atol", {"atol": lambda: torch.full((3,), 1e-6)}),
    "atol of wrong structure": ("atol", {"atol": lambda: {"a": torch.tensor(1e-6)}}),
    "rtol a word": ("rtol", {"rtol": "small"}),
    "method unknown": ("method.*'rk99'.*tsit5", {"method": "rk99"}),
    "method a number": ("method", {"method": 3}),
    "fixed step without its size": ("first_step", {"method": "rk4"}),
    "first_step zero": ("first_step", {"first_step": 0.0}),
    "first_step negative": ("first_step", {"first_step": -0.1}),
    "max_step zero": ("max_step", {"max_step": 0.0}),
    "max_step NaN": ("max_step", {"max_step": NAN}),
    "min_step negative": ("min_step", {"min_step": -1.0}),
    "max_steps zero": ("max_steps", {"max_steps": 0}),
    "max_steps fractional": ("max_steps", {"max_steps": 1.5}),
    "norm unknown": ("norm", {"norm": "l7"}),
    "norm of wrong shape": ("norm", {"norm": lambda x: x}),
    "norm gives a float": ("norm", {"norm": lambda x: 1.0}),
    "gradient no strategy": ("gradient", {"gradient": "discrete"}),
    "fun of wrong shape": ("fun returned.*shape", {"fun": lambda t, y: y[:1]}),
    "fun of wrong dtype": ("fun returned.*dtype", {"fun": lambda t, y: y.float()}),
    "fun of wrong structure": ("fun returned", {"fun": lambda t, y: (y, y)}),
    "fun gives a float": ("fun returned", {"fun": lambda t, y: 1.0}),
    "fun gives None": ("fun returned", {"fun": lambda t, y: None}),
    "quadrature gives a float": ("quadrature", {"quadrature": lambda t, y: 1.0}),
    "quadrature of integers": ("quadrature", {"quadrature": lambda t, y: torch.tensor(1)}),
    "quadrature not callable": ("quadrature", {"quadrature": 1.0}),
    "quadrature of varying shape": ("quadrature", {"quadrature": lambda t, y: y if float(t) == 0.0 else y[:1]}),
    "event not callable": ("event", {"events": [1.0]}),
    "event not scalar": ("event", {"events": lambda t, y: y}),
    "event gives a float": ("event", {"events": lambda t, y: 1.0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case):
    """The error is ours and a ``ValueError``, and its message names the argument."""
    pattern, options = BAD[case]
    call = {"fun": decay, "t_span": (0.0, 1.0), "y0": _one}
    call |= options
    for name in ("y0", "atol"):
        if callable(call.get(name)):
            call[name] = call[name]()
    with pytest.raises(InvalidInput, match=pattern) as caught:
        solve_ivp(call.pop("fun"), call.pop("t_span"), call.pop("y0"), **call)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, adjoint.AdjointError)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("y0", {"y0": torch.tensor(1.0)}),
        ("y0", {"y0": (torch.ones(3, 1), torch.ones(2, 1))}),
        ("t_span", {"t_span": (torch.zeros(2), 1.0)}),
        ("t_eval.*2.*3", {"t_eval": torch.full((4, 2), 0.5)}),
        ("t_eval", {"t_eval": torch.tensor([[0.1, 0.1, 0.2], [0.2, 0.2, 0.1], [0.3, 0.3, 0.3]])}),
        ("t_eval", {"t_span": (0.0, torch.tensor([1.0, 2.0, 3.0])), "t_eval": [1.5]}),
        ("atol", {"atol": torch.full((2, 2), 1e-6)}),
        ("fun returned", {"fun": lambda t, y: y[0]}),
        ("norm", {"norm": lambda x: x.abs().amax()}),
        ("quadrature", {"quadrature": lambda t, y: y.sum()}),
        ("quadrature", {"quadrature": lambda t, y: y[:2]}),
    ],
)
def test_bad_argument_is_named_batched(pattern, options):
    call = {"fun": decay, "t_span": (0.0, 1.0), "y0": torch.ones(3, 2, dtype=torch.float64)} | options
    with pytest.raises(InvalidInput, match=pattern):
        solve_ivp(call.pop("fun"), call.pop("t_span"), call.pop("y0"), batched=True, **call)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("jac_sparsity", {"jac_sparsity": torch.eye(2)}),
        ("linear_solver", {"linear_solver": object()}),
    ],
)
def test_unsupported_combinations(pattern, options):
    with pytest.raises(UnsupportedCombination, match=pattern) as caught:
        solve_ivp(decay, (0.0, 1.0), torch.ones(2), **options)
    assert isinstance(caught.value, NotImplementedError)


def test_a_missing_dense_output_is_named():
    with pytest.raises(RuntimeError, match="dense_output"):
        solve_ivp(decay, (0.0, 1.0), torch.ones(2))(0.5)


# --- states ---

_SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0), (1, 3, 1)])
_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128])


@st.composite
def _leaf(draw):
    shape, dtype = draw(_SHAPES), draw(_DTYPES)
    torch.manual_seed(draw(st.integers(0, 99)))
    return torch.randn(shape, dtype=dtype)


_TREES = st.recursive(
    _leaf(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    ),
    max_leaves=4,
)


def _common(leaves):
    out = leaves[0].dtype
    for leaf in leaves:
        out = torch.promote_types(out, leaf.dtype)
    return out


@FEW
@given(_TREES)
def test_any_state_pytree(y0):
    """Structure, shapes and dtypes come back, time first; the values are those of one concatenated state in the common dtype."""
    leaves, tree = tree_flatten(y0)
    dtype = _common(leaves)
    rates = [-0.3 - 0.2 * i for i in range(len(leaves))]
    seen = []

    def fun(t, y):
        parts, same = tree_flatten(y)
        assert same == tree
        seen.append(([(x.shape, x.dtype) for x in parts], t.dtype, t.shape))
        return torch.utils._pytree.tree_unflatten([r * x for r, x in zip(rates, parts, strict=True)], tree)

    ts = [0.0, 0.4, 1.0]
    sol = solve_ivp(fun, (0.0, 1.0), y0, t_eval=ts)
    got, same = tree_flatten(sol.y)
    assert same == tree
    wanted = [(x.shape, x.dtype) for x in leaves]
    assert all(s == (wanted, dtype.to_real(), ()) for s in seen)
    assert [(x.shape, x.dtype) for x in got] == [((3, *x.shape), x.dtype) for x in leaves]
    for x, y, r in zip(got, leaves, rates, strict=True):
        assert torch.equal(x[0], y)
        tol = 2e-4 if dtype in (torch.float32, torch.complex64) else 1e-5
        factor = torch.exp(r * torch.tensor(ts, dtype=torch.float64)).reshape(-1, *[1] * y.dim())
        assert torch.allclose(x.to(torch.complex128), (factor * y).to(torch.complex128), rtol=tol, atol=tol)
    rate = torch.cat([torch.full((x.numel(),), r, dtype=torch.float64) for x, r in zip(leaves, rates, strict=True)]).to(dtype.to_real())
    flat = solve_ivp(lambda t, y: rate * y, (0.0, 1.0), torch.cat([x.reshape(-1).to(dtype) for x in leaves]), t_eval=ts)
    joined = torch.cat([x.reshape(3, -1).to(dtype) for x in got], dim=1)
    eps = 1e-4 if any(x.dtype in (torch.float32, torch.complex64) for x in leaves) else 1e-12
    assert torch.allclose(joined, flat.y, rtol=eps, atol=eps)


def test_mixed_dtypes_are_integrated_in_the_common_one():
    """The float64 leaf is as accurate as alone, though ``fun`` sees the other as float32."""
    y0 = {"low": torch.tensor([1.0], dtype=torch.float32), "high": torch.tensor([1.0], dtype=torch.float64)}
    sol = solve_ivp(decay, (0.0, 1.0), y0, **TIGHT)
    assert sol.y["low"].dtype == torch.float32 and sol.y["high"].dtype == torch.float64 and sol.t.dtype == torch.float64
    assert abs(float(sol.y["high"][-1]) - math.exp(-1)) < 1e-8
    assert abs(float(sol.y["low"][-1]) - math.exp(-1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_one_dtype_stays(dtype):
    y0 = torch.tensor([1.0, -2.0], dtype=dtype)
    sol = solve_ivp(lambda t, y: -y if not dtype.is_complex else 1j * y, (0.0, 1.0), y0)
    factor = math.exp(-1) if not dtype.is_complex else complex(math.cos(1), math.sin(1))
    assert sol.y.dtype == dtype and sol.t.dtype == dtype.to_real()
    assert torch.allclose(sol.y[-1], y0 * factor, rtol=1e-3 if dtype.itemsize <= 8 and dtype != torch.complex128 else 1e-5)


def test_empty_batch_and_empty_state():
    for shape, batched in [((0, 2), True), ((3, 0), True), ((0,), False)]:
        sol = solve_ivp(decay, (0.0, 1.0), torch.ones(shape), batched=batched, t_eval=[0.5, 1.0])
        assert sol.y.shape == (2, *shape) and bool(torch.as_tensor(sol.success).all())


# --- times ---


@FEW
@given(
    t0=st.floats(-2, 2),
    span=st.floats(0.1, 3),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    ends=st.booleans(),
    repeat=st.booleans(),
    forward=st.booleans(),
    reverse=st.booleans(),
)
def test_any_sample_times(t0, span, fractions, ends, repeat, forward, reverse):
    """Increasing or decreasing, with and without repetitions and the ends, forwards and backwards in time: the closed form."""
    t1 = t0 + (span if forward else -span)
    times = sorted(min(max(t0 + f * (t1 - t0), min(t0, t1)), max(t0, t1)) for f in fractions)
    times = times + [times[-1]] * repeat
    times = [min(t0, t1), *times, max(t0, t1)] if ends else times
    times = times[::-1] if reverse else times
    sol = solve_ivp(lambda t, y: torch.cos(t) * y, (t0, t1), torch.tensor([1.0, -2.0], dtype=torch.float64), t_eval=times, **TIGHT)
    t = torch.tensor(times, dtype=torch.float64)
    truth = torch.exp(torch.sin(t) - math.sin(t0)).unsqueeze(-1) * torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert torch.equal(sol.t.double(), t) and torch.allclose(sol.y, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda x: [torch.tensor(v) for v in x], np.array])
def test_times_in_any_form(form):
    sol = solve_ivp(decay, tuple(form([0.0, 1.0])), torch.ones(2), t_eval=form([0.25, 0.5]), **TIGHT)
    assert torch.allclose(sol.y[:, 0], torch.exp(-torch.tensor([0.25, 0.5])), rtol=1e-7)


def test_times_keep_their_dtype():
    """``sol.t`` in the dtype of the user's tensors, else in that of the state."""
    y = torch.ones(2, dtype=torch.float32)
    assert solve_ivp(decay, (0.0, 1.0), y, t_eval=torch.tensor([0.5], dtype=torch.float64)).t.dtype == torch.float64
    assert solve_ivp(decay, (0.0, 1.0), y, t_eval=[0.5]).t.dtype == torch.float32


@pytest.mark.parametrize("backwards", [False, True])
def test_step_ts_let_steps_end_at_a_jump(backwards):
    """A right-hand side that jumps: exact for a polynomial between the jumps, and no rejections."""
    jumps = [0.3, 0.7]

    def fun(t, y):
        return torch.where(t < 0.3, 1.0, torch.where(t < 0.7, -2.0, 5.0)) + 0 * y

    span = (1.0, 0.0) if backwards else (0.0, 1.0)
    sol = solve_ivp(fun, span, torch.zeros(1), step_ts=jumps, t_eval="steps", **TIGHT)
    change = 0.3 - 2 * 0.4 + 5 * 0.3
    assert abs(float(sol.y[-1]) - (-change if backwards else change)) < 1e-12
    assert sol.stats.n_rejected == 0 and all(float((sol.t - j).abs().min()) == 0 for j in jumps)


# --- tolerances and norms ---


def test_vector_tolerances_govern_their_components():
    """Loose everywhere but in one component gives that component its accuracy; scalars given as tensors mean the same."""

    def fun(t, y):
        return torch.stack([y[1], -y[0], 30 * y[3], -30 * y[2]])

    y0 = torch.tensor([1.0, 0.0, 1.0, 0.0])
    loose, tight = 1e6, 1e-10
    slow = solve_ivp(fun, (0.0, 2.0), y0, rtol=0.0, atol=torch.tensor([tight, tight, loose, loose]), first_step=0.01)
    fast = solve_ivp(fun, (0.0, 2.0), y0, rtol=0.0, atol=torch.tensor([loose, loose, tight, tight]), first_step=0.01)
    both = solve_ivp(fun, (0.0, 2.0), y0, rtol=0.0, atol=tight)
    assert abs(float(slow.y[-1, 0]) - math.cos(2)) < 1e-8 and abs(float(fast.y[-1, 2]) - math.cos(60)) < 1e-6
    assert abs(float(slow.y[-1, 2]) - math.cos(60)) > 1e-3 and slow.stats.n_steps * 3 < fast.stats.n_steps
    same = solve_ivp(fun, (0.0, 2.0), y0, rtol=torch.tensor(0.0), atol=torch.full((4,), tight))
    assert torch.equal(same.y, both.y) and same.stats.n_steps == both.stats.n_steps


def test_tolerances_as_pytrees():
    y0 = {"a": torch.ones(2), "b": torch.ones(())}
    scalar = solve_ivp(decay, (0.0, 1.0), y0, rtol=1e-5, atol=1e-7)
    tree = solve_ivp(decay, (0.0, 1.0), y0, rtol={"a": 1e-5, "b": 1e-5}, atol={"a": torch.full((2,), 1e-7), "b": torch.tensor(1e-7)})
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(scalar.y), tree_leaves(tree.y), strict=True))


def test_tolerances_per_trajectory():
    """``(B, 1)`` tolerances: the tighter trajectory takes more steps, and as many as alone."""
    y0, p = torch.ones(2, 2), torch.tensor([[-1.0, 2.0]])
    fun = lambda t, y: p * torch.cos(5 * y)  # noqa: E731
    sol = solve_ivp(fun, (0.0, 2.0), y0, batched=True, rtol=torch.tensor([[1e-4], [1e-9]]), atol=torch.tensor([[1e-5], [1e-10]]))
    assert sol.stats.n_accepted[1] > 2 * sol.stats.n_accepted[0]
    alone = solve_ivp(lambda t, y: p[0] * torch.cos(5 * y), (0.0, 2.0), y0[1], rtol=1e-9, atol=1e-10)
    assert torch.allclose(sol.y[-1, 1], alone.y[-1], rtol=1e-9) and int(sol.stats.n_accepted[1]) == alone.stats.n_accepted


@pytest.mark.parametrize("batched", [False, True])
def test_norms(batched):
    """ "max" and a custom maximum are one and the same; both are stricter than "rms"; a norm of a part ignores the rest."""
    quick = torch.tensor([9.0, 1.0, 1.0, 1.0])
    y0 = {"a": torch.ones(3, 4), "b": torch.ones(3, 1)}
    y0 = y0 if batched else tree_map(lambda x: x[0], y0)
    fun = lambda t, y: {"a": torch.cos(quick * y["a"]) * quick, "b": -y["b"]}  # noqa: E731

    def steps(norm):
        sol = solve_ivp(fun, (0.0, 1.0), y0, norm=norm, batched=batched, rtol=1e-7, atol=1e-9)
        assert torch.allclose(sol.y["b"][-1], math.exp(-1) * y0["b"], rtol=1e-5)
        return int(torch.as_tensor(sol.stats.n_steps).max())

    largest = lambda x: torch.maximum(x["a"].abs().amax(-1), x["b"].abs().amax(-1))  # noqa: E731
    assert steps("rms") == steps(None) < steps("max") == steps(largest)
    assert steps(lambda x: x["b"].abs().amax(-1)) < steps("rms") / 2


def test_default_tolerances_follow_the_dtype():
    """Documented: 1e-6 and 1e-9 in double, 1e-4 and 1e-6 in single precision."""
    fun = lambda t, y: torch.cos(3 * y)  # noqa: E731
    for dtype, rtol, atol in [(torch.float64, 1e-6, 1e-9), (torch.float32, 1e-4, 1e-6), (torch.complex64, 1e-4, 1e-6)]:
        y0 = torch.ones(2, dtype=dtype)
        default, given = solve_ivp(fun, (0.0, 2.0), y0), solve_ivp(fun, (0.0, 2.0), y0, rtol=rtol, atol=atol)
        other = solve_ivp(fun, (0.0, 2.0), y0, rtol=rtol / 10, atol=atol)
        assert torch.equal(default.y, given.y) and not torch.equal(default.y, other.y)


def test_single_tensor_as_args():
    p = torch.tensor(-0.5)
    fun = lambda t, y, p: p * y  # noqa: E731
    assert torch.equal(solve_ivp(fun, (0.0, 1.0), torch.ones(2), p).y, solve_ivp(fun, (0.0, 1.0), torch.ones(2), (p,)).y)


@pytest.mark.parametrize("step", [{"max_step": 0.03}, {"first_step": 0.013, "max_step": 0.1}])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_step_sizes_are_kept(step, end):
    sol = solve_ivp(decay, (0.0, end), torch.ones(2), t_eval="steps", rtol=1e-3, **step)
    sizes = sol.t.diff().abs()
    assert float(sizes.max()) <= step["max_step"] * (1 + 1e-12)
    if "first_step" in step:
        assert abs(float(sizes[0]) - step["first_step"]) < 1e-15


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "radau5", "rodas5p", "bdf"])
@pytest.mark.parametrize(("shape", "batched"), [((0, 2), True), ((3, 0), True), ((0,), False), ((2, 0), False)])
def test_empty_states_have_gradients(shape, batched, method):
    y0, p = torch.ones(shape, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    sol = solve_ivp(lambda t, y: -p * y, (0.0, 1.0), y0, batched=batched, t_eval=[0.5, 1.0], method=method)
    gy, gp = torch.autograd.grad(sol.y.sum(), (y0, p), allow_unused=True)
    assert gy.shape == shape and (gp is None or float(gp) == 0.0)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "radau5", "bdf", "abm"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_tolerances_of_states_of_any_shape(method, shape):
    y0 = torch.linspace(0.5, 1.5, math.prod(shape)).reshape(shape)
    each = torch.logspace(-4, -6, shape[-1])

    def ends(y0, rtol, fun):
        return solve_ivp(fun, (0.0, 1.0), y0, method=method, rtol=rtol, atol=1e-9).y[-1].reshape(-1)

    found = ends(y0, each, lambda t, y: -(y**2))
    flat = ends(y0.reshape(-1), each.expand(shape).reshape(-1), lambda t, y: -(y**2))
    assert torch.allclose(found, flat, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"mass_matrix": torch.eye(2)}])
def test_what_is_no_method_is_named(options):
    with pytest.raises(InvalidInput, match=r"adjoint\.methods\.Method"):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), method=object(), **options)
    with pytest.raises(InvalidInput, match="method object for residuals"):
        solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), torch.ones(2), method=object())


def test_precisions_that_forward_mode_mixes_do_not_matter():
    """PyTorch gives a number times a 0-d tensor a tangent in double precision; ``fun`` is called beneath the transform only."""
    turn = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float32)

    def end(y0, single):
        rate = (lambda y: torch.stack([0.5 * y[0], y[1]])) if single else (lambda y: torch.cat([0.5 * y[:1], y[1:]]))
        return solve_ivp(lambda t, y: -rate(y) @ turn, (0.0, 1.0), y0).y[-1].sum()

    y0 = torch.ones(2, dtype=torch.float32)
    along = torch.func.jvp(lambda y: end(y, True), (y0,), (y0,))[1]
    torch.testing.assert_close(along, torch.func.jvp(lambda y: end(y, False), (y0,), (y0,))[1])
    torch.testing.assert_close(along, torch.func.grad(lambda y: end(y, True))(y0).sum(), rtol=1e-3, atol=0.0)


class Table:
    """What it has stands in a table, by whose error it says what it has not."""

    def __init__(self, **table):
        self.__dict__["table"] = table

    def __getattr__(self, name):
        return self.table[name]

    def __call__(self, t, y):
        return self.rate * y


@pytest.mark.parametrize("compile", [False, True])
def test_objects_whose_missing_attributes_are_other_errors(compile):
    rate = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    stop = Table(rate=torch.ones((), dtype=torch.float64))
    sol = solve_ivp(Table(rate=rate), (0.0, 2.0), _one()[:1], method="rodas5p", events=stop, compile=compile, rtol=1e-6)
    (found,) = torch.autograd.grad(sol.y[-1, 0], rate)
    assert found.item() == pytest.approx(2 / math.e, rel=1e-4) and sol.status == 0
    assert adjoint.odeint(Table(rate=rate), _one(), torch.tensor([0.0, 2.0]))[-1, 0].item() == pytest.approx(1 / math.e, rel=1e-4)
    with pytest.raises(KeyError, match="lost"):
        solve_ivp(decay, (0.0, 1.0), _one(), events=type("Broken", (Table,), {"terminal": property(lambda self: self.lost)})(rate=1.0))


@pytest.mark.parametrize(
    ("name", "value"), [("gradient", adjoint.DiscreteAdjoint), ("controller", "pi"), ("controller", adjoint.PIController)]
)
def test_objects_not_classes_or_names(name, value):
    with pytest.raises(InvalidInput, match=f"{name} must be"):
        solve_ivp(decay, (0.0, 1.0), _one(), **{name: value})


def _solved(name, value):
    room, _, argument = name.partition(".")
    start = torch.ones(2, dtype=torch.float64)
    if room in ("tsit5", "bdf"):
        return adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), start, method=room, **{argument: value})
    if room == "dae":
        return adjoint.solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), start, -start, **{argument: value})
    if room == "root":
        return adjoint.solve_root(lambda x: x**2 - 2, start, **{argument: value})
    if room == "branch":
        return adjoint.continuation(lambda x, lam: x**2 + lam - 3, start[:1], (0.0, 1.0), **{argument: value})
    if room == "odeint":
        return adjoint.odeint(lambda t, y: -y, start, torch.tensor([0.0, 1.0]), **{argument: value})
    if room in ("dopri5", "rk4"):
        return adjoint.odeint(lambda t, y: -y, start, torch.tensor([0.0, 1.0]), method=room, options={argument: value})
    made = {"gauss": adjoint.GaussAdjoint, "back": adjoint.BacksolveAdjoint, "pid": adjoint.PIDController, "gmres": adjoint.linalg.GMRES}
    if room == "deq":
        return adjoint.nn.DEQ(torch.nn.Identity(), **{argument: value})
    return made[room](**{argument: value})


NUMBERS = [
    "tsit5.rtol", "tsit5.atol", "tsit5.first_step", "tsit5.max_step", "tsit5.min_step", "tsit5.max_steps", "tsit5.max_events", "bdf.rtol",
    "dae.rtol", "dae.atol", "dae.first_step", "dae.max_step", "dae.max_steps", "root.rtol", "root.atol", "root.ftol", "root.x_scale",
    "root.f_scale", "root.max_steps", "branch.step", "branch.min_step", "branch.max_step", "branch.max_points", "branch.tol", "odeint.rtol",
    "odeint.atol", "dopri5.first_step", "dopri5.max_num_steps", "dopri5.safety", "dopri5.ifactor", "dopri5.max_step", "rk4.step_size",
    "gauss.rtol", "gauss.atol", "gauss.max_steps", "back.rtol", "back.atol", "back.max_steps", "pid.safety", "pid.max_factor", "gmres.rtol",
    "gmres.atol", "gmres.restart", "gmres.max_iterations", "deq.tol", "deq.backward_tol", "deq.max_steps", "deq.backward_max_steps",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_told_by_the_name_of_the_argument(name):
    odd = [{"a": 1.0}, "abc", "1e-3", True, 1e-3 + 1j, float("nan"), -1.0, torch.ones(3, 5), torch.tensor(1e-3 + 1j), torch.tensor(True)]
    for value in [*odd, torch.tensor(float("nan")), object()]:
        with pytest.raises(adjoint.InvalidInput) as told:
            _solved(name, value)
        assert name.partition(".")[2].removeprefix("backward_") in str(told.value) or "controller" in str(told.value)


@pytest.mark.parametrize("room", ["tsit5", "bdf", "dae"])
def test_no_tolerance_at_all(room):
    zeros = torch.tensor([0.0, 1.0], dtype=torch.float64)
    fun, start = (lambda t, y: -y), torch.ones(2, dtype=torch.float64)
    dae = lambda **k: adjoint.solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), start, **k)  # noqa: E731
    solve = dae if room == "dae" else lambda **k: adjoint.solve_ivp(fun, (0.0, 1.0), start, method=room, **k)
    for atol in (0.0, zeros):
        with pytest.raises(adjoint.InvalidInput, match="both zero"):
            solve(rtol=0.0, atol=atol)
    # a method of constant steps has no use for them
    adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), method="euler", first_step=0.1, rtol=0.0, atol=0.0)


def test_numbers_of_any_kind_are_numbers():
    numpy = pytest.importorskip("numpy")
    for value in (1e-3, numpy.float64(1e-3), torch.tensor(1e-3), numpy.float32(1e-3)):
        for name in ("tsit5.rtol", "tsit5.first_step", "root.ftol", "branch.tol", "gmres.rtol", "back.rtol"):
            _solved(name, value)
    for value in (1000, numpy.int64(1000), torch.tensor(1000)):
        for name in ("tsit5.max_steps", "root.max_steps", "gmres.restart", "dopri5.max_num_steps"):
            _solved(name, value)
    _solved("dopri5.max_num_steps", 1e5)
