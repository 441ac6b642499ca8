"""Every operator that is read, against PyTorch: values and derivatives, at random numbers, at ties and at numbers that are none."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from adjoint.native.reading import Reading, Unreadable, read
from adjoint.native.reverse import cotangents

from .cases import GROUPS, Case
from .interpreter import values

NAMES = [(group, name) for group, cases in GROUPS.items() for name in cases]
#: there is none in eager mode, or it is not read
NO_DERIVATIVE = {"floor_divide", "trigamma", "heaviside"}
#: infinities are summed or multiplied in another order, or taken for numbers by ATen
FINITE_ONLY = {"hardswish", "var_mean", "cumprod", "bilinear", "gelu"}
#: ATen computes the derivative with 1 / 6 in single precision
LOOSE = {"hardsigmoid"}
REGULAR = 12  # rows of random numbers


def states(dtype: torch.dtype) -> Tensor:
    """Random rows, and rows of ties, zeros, integers, large numbers, infinities and NaN."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 6, generator=g, dtype=torch.float64), torch.rand(4, 6, generator=g, dtype=torch.float64)]
    nan, inf = torch.nan, torch.inf
    edges = [
        [0.0] * 6, [1.0] * 6, [0.5, 0.5, -0.5, -0.5, 0.5, 0.0], [-0.0, 0.0, 1.0, -1.0, 2.0, -2.0], [3.0, -3.0, 6.0, -6.0, 6.0, 3.0],
        [30.0, -30.0, 25.0, -25.0, 21.0, 100.0], [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0],
        [inf, 1.0, -inf, 2.0, inf, 0.0], [nan, 1.0, 0.0, nan, -1.0, 2.0], [-inf] * 6,
    ]  # fmt: skip
    return torch.cat([*rows, torch.tensor(edges, dtype=torch.float64)]).to(dtype)


PARAMETERS = torch.tensor([-0.5, 0.25, 0.4, 0.7, 1.1, 0.3, 2.0, 0.6], dtype=torch.float64)


@functools.cache
def group_read(group: str, dtype: torch.dtype) -> tuple[Reading, dict[str, slice]]:
    """One trace of all cases of a group, and which outputs are whose."""
    y, p = states(dtype), PARAMETERS.to(dtype)
    slices, start = {}, 0
    for name, case in GROUPS[group].items():
        width = flat(case, y, p).shape[1]
        slices[name] = slice(start, start + width)
        start += width
    together = read(
        lambda t, y, p: torch.cat([flat(c, y, p) for c in GROUPS[group].values()], 1), torch.zeros((), dtype=dtype), y, [p], True
    )
    return together, slices


def flat(case: Case, y: Tensor, p: Tensor) -> Tensor:
    return case(y, p).reshape(y.shape[0], -1).to(y.dtype)


@pytest.fixture
def _default(dtype):
    """ATen's derivatives of determinants make tensors of the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def _bent_below() -> bool:
    """Whether PyTorch (2.6) takes the slope from above where hardswish begins; later ones take that from below, zero."""
    x = torch.tensor(-3.0, requires_grad=True)
    return bool(torch.autograd.grad(torch.nn.functional.hardswish(x), x)[0])


@pytest.mark.usefixtures("_default")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("group, name", NAMES)
def test_values_and_derivatives(group, name, dtype):
    reading, slices = group_read(group, dtype)
    outputs = reading.outputs[slices[name]]
    y, p = states(dtype).requires_grad_(), PARAMETERS.to(dtype).requires_grad_()
    t = torch.zeros((), dtype=dtype)
    truth = flat(GROUPS[group][name], y, p)
    rtol = 1e-7 if name in LOOSE else 1e-10 if dtype == torch.float64 else 2e-4
    near = functools.partial(torch.testing.assert_close, rtol=rtol, atol=rtol / 10, equal_nan=True)
    counts = torch.ones(len(y), dtype=torch.bool)
    if name in FINITE_ONLY:
        counts = y.isfinite().all(1)
    elif group == "complex":
        # infinite parts, and quotients by zero, come out in many ways
        counts = y.isfinite().all(1) & (y != 0).all(1)
    near(values(reading, outputs, t, y.detach(), [p.detach()])[counts], truth.detach()[counts])
    if not truth.requires_grad or name in NO_DERIVATIVE:
        return
    v = torch.rand(len(outputs), generator=torch.Generator().manual_seed(1), dtype=dtype)
    g = reading.graph
    seeds: dict[int, int] = {}
    for i, node in enumerate(outputs):
        leaf = g.leaf("v", i)
        seeds[node] = g.op("add", seeds[node], leaf) if node in seeds else leaf
    slopes = cotangents(g, seeds, ("y", "a"))
    found = values(reading, list(slopes.values()) or [g.constant(0.0)], t, y.detach(), [p.detach()], {"v": v})
    ours = [torch.zeros(len(y), 6, dtype=dtype), torch.zeros(len(y), 8, dtype=dtype)]
    for leaf, value in zip(slopes, found.T, strict=False):
        kind, *index = g.data[leaf]
        if g.names[leaf] == "look":
            _, base, step, _ = index
            at = values(reading, g.arguments[leaf], t, y.detach(), [p.detach()]).long()
            ours[1].scatter_add_(1, base + step * at, value[:, None])
        else:
            ours[kind == "a"][:, index[-1]] += value
    (wanted,) = torch.autograd.grad((truth * v).sum(), y, retain_graph=True, allow_unused=True)
    wanted = torch.zeros_like(y) if wanted is None else wanted
    # an infinity times a zero which stands for no dependence is NaN in eager mode only
    sure = wanted.isfinite() & ~y.isnan()
    if name == "hardswish" and _bent_below():
        sure &= y != -3
    for row in counts.nonzero()[:, 0].tolist():
        near(ours[0][row][sure[row]], wanted[row][sure[row]], msg=lambda m, row=row: f"row {row} {y[row].tolist()}: {m}")
        # an infinity is no number here either
        endless = wanted[row].isinf() & y[row].isfinite()
        assert not ours[0][row][endless].isfinite().any(), f"row {row} {y[row].tolist()}: {ours[0][row]} for {wanted[row]}"
    regular = flat(GROUPS[group][name], y[:REGULAR].detach(), p)
    (wanted,) = torch.autograd.grad((regular * v).sum(), p, allow_unused=True) if regular.requires_grad else (None,)
    wanted = torch.zeros_like(p) if wanted is None else wanted
    near(ours[1][:REGULAR].sum(0)[wanted.isfinite()], wanted[wanted.isfinite()])


@pytest.mark.parametrize(
    "function, operator",
    [
        (lambda y: torch.linalg.eigvalsh(y.view(-1, 2, 3)[:, :, :2]), "_linalg_eigh"),
        (lambda y: y + torch.rand_like(y), "rand_like"),
        (lambda y: y.sort(-1)[0], "sort"),
        (lambda y: y[y > 0].sum() * y, "index"),
        (lambda y: torch.special.bessel_j0(y), "special_bessel_j0"),
    ],
)
def test_refused_by_name(function, operator):
    with pytest.raises(Unreadable) as caught:
        read(lambda t, y: function(y), torch.zeros(()), torch.rand(4, 6), [], True)
    assert caught.value.operator == operator
    assert "test_operators.py" in caught.value.line
