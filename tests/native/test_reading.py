"""What is read of a function is what PyTorch computes; what cannot be read is refused by name."""

from __future__ import annotations

import pytest
import torch

from adjoint.native.reading import Unreadable, read
from adjoint.native.reverse import cotangents, jacobian

from .interpreter import values

torch.manual_seed(0)
F64 = torch.float64


def lotka_volterra(t, y, p):
    a, b = y.unbind(-1)
    p0, p1, p2, p3 = p.unbind(-1)
    return torch.stack([p0 * a - p1 * a * b, p3 * a * b - p2 * b], -1)


def pendulum(t, y, p):
    out = torch.empty_like(y)
    out[..., 0] = y[..., 1]
    out[..., 1] = -p[..., 0] * torch.sin(y[..., 0]) - p[..., 1] * y[..., 1] * torch.cos(t)
    return out


@pytest.mark.parametrize("function, shape, stride", [(lotka_volterra, (5, 4), 4), (lotka_volterra, (4,), 0), (pendulum, (5, 2), 2)])
def test_values_and_derivatives(function, shape, stride):
    t, y, p = torch.rand(5, dtype=F64), torch.rand(5, 2, dtype=F64, requires_grad=True), torch.rand(shape, dtype=F64, requires_grad=True)
    reading = read(function, t, y.detach(), [p.detach()], batched=True)
    assert reading.strides == (stride,)
    out = function(t, y, p)
    v = torch.rand(2, dtype=F64)
    g = reading.graph
    slopes = cotangents(g, {node: g.leaf("v", i) for i, node in enumerate(reading.outputs)}, ("y", "a"))
    entries = jacobian(g, reading.outputs)
    plain = (t, y.detach(), [p.detach()])
    assert torch.equal(values(reading, reading.outputs, *plain), out)
    found = values(reading, list(slopes.values()), *plain, {"v": v})
    entry = dict(zip(entries, values(reading, list(entries.values()), *plain).T, strict=True))
    for row in range(5):
        wanted = torch.autograd.grad((out[row] * v).sum(), [y, p], retain_graph=True)
        for leaf, value in zip(slopes, found[row], strict=True):
            kind, *index = g.data[leaf]
            truth = wanted[0][row, index[0]] if kind == "y" else wanted[1].reshape(-1)[stride * row + index[1]]
            torch.testing.assert_close(value, truth)
        full = torch.autograd.functional.jacobian(lambda z, n=row: function(t, z, p)[n], y)[:, row]
        for (i, j), value in entry.items():
            torch.testing.assert_close(value[row], full[i, j])
            full[i, j] = 0
        assert not full.any()


@pytest.mark.parametrize(
    "function, word",
    [
        (lambda t, y: y[0] + y, "row 0"),
        (lambda t, y: y - y.mean(0), "row 0"),
        (lambda t, y: y.flip(0) * 1, "another"),
        (lambda t, y: torch.cat([y[:3] * 2, y[3:]]), "differently"),
        (lambda t, y: y if y[0, 0] > 0 else -y, "torch.where"),
        (lambda t, y: y + torch.arange(5.0, dtype=F64)[:, None], "other numbers"),
        (lambda t, y: y.float().sin().double(), "float32"),
        (lambda t, y: torch.fft.rfft(y).real, "no scalar form"),
    ],
)
def test_refused(function, word):
    with pytest.raises(Unreadable, match=word) as caught:
        read(function, torch.rand(5, dtype=F64), torch.rand(5, 2, dtype=F64), [], batched=True)
    assert "test_reading.py" in caught.value.line
