"""What is read of a function is what PyTorch computes; what cannot be read is refused by name."""

from __future__ import annotations

import time

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
        (lambda t, y: y.half().sin().double(), "float16"),
        (lambda t, y: torch.fft.rfft(y).real, "no scalar form"),
    ],
)
def test_refused(function, word):
    with pytest.raises(Unreadable, match=word) as caught:
        read(function, torch.rand(5, dtype=F64), torch.rand(5, 2, dtype=F64), [], batched=True)
    assert "test_reading.py" in caught.value.line


def test_rows_are_told_apart_by_their_indices():
    """Ways to write one thing for every row, all of which are read, and give what they are."""
    ways = [
        lambda t, y, p: y[torch.arange(6), 1, None] * p[torch.arange(6)],
        lambda t, y, p: (y.T.reshape(2, 6) * p.T).T,
        lambda t, y, p: y.reshape(-1).view(6, 2).flip(0).flip(0) + p,
        lambda t, y, p: y.index_select(0, torch.arange(6)) * p,
        lambda t, y, p: torch.stack([y, p])[1] - torch.stack([y, p], 2)[:, :, 0],
        lambda t, y, p: torch.func.vmap(lambda a, b: a * b.sum() + a[0])(y, p),
        lambda t, y, p: y.gather(0, torch.arange(6)[:, None].expand(6, 2)) + t[:, None] * p.sum(1, keepdim=True),
    ]
    t, y, p = torch.rand(6, dtype=F64), torch.rand(6, 2, dtype=F64), torch.rand(6, 2, dtype=F64)
    for way in ways:
        reading = read(way, t, y, [p], batched=True)
        torch.testing.assert_close(values(reading, reading.outputs, t, y, [p]), way(t, y, p))


def test_one_trajectory_may_read_all_of_itself():
    y, p = torch.rand(1, 6, dtype=F64), torch.rand(3, dtype=F64)
    for function in (lambda t, y, p: y - y.mean() * p[0], lambda t, y, p: (p.view(3, 1) * y.view(3, 2)).flip(0).reshape(1, 6) * t):
        reading = read(function, torch.tensor(0.5, dtype=F64), y, [p], batched=False)
        assert reading.strides == (0,)
        got = values(reading, reading.outputs, torch.tensor(0.5, dtype=F64), y, [p])
        torch.testing.assert_close(got, function(torch.tensor(0.5, dtype=F64), y, p))


def test_many_rows_cost_no_more_than_few():
    net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()
    t, y, p = torch.zeros(10_000, dtype=F64), torch.rand(10_000, 2, dtype=F64), torch.rand(10_000, 4, dtype=F64)
    start = time.process_time()
    reading = read(lambda t, y, p: net(y) + lotka_volterra(t, y, p), t, y, [p], batched=True)
    assert time.process_time() - start < 1
    assert reading.strides == (4,)


def test_derivatives_inside():
    """By torch.func, and by torch.autograd; what is detached, or computed without gradients, has no derivative."""

    def by_func(t, y):
        return torch.func.grad(lambda x: (x.exp() * x.roll(1, 1)).sum())(y)

    def by_autograd(t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            return torch.autograd.grad((y.exp() * y.roll(1, 1)).sum(), y, create_graph=True)[0]

    def stopped(t, y):
        with torch.no_grad():
            rate = y.sin()
        return rate * y + y.data.cos() * y.detach()

    y = torch.rand(4, 3, dtype=F64, requires_grad=True)
    t = torch.zeros((), dtype=F64)
    for function in (by_func, by_autograd, stopped):
        reading = read(function, t, y.detach(), [], batched=True)
        out = function(t, y)
        torch.testing.assert_close(values(reading, reading.outputs, t, y.detach(), []), out.detach())
        entries = jacobian(reading.graph, reading.outputs)
        for i in range(3):
            row = torch.autograd.grad(out[:, i].sum(), y, retain_graph=True)[0]
            for j in range(3):
                node = entries.get((i, j), reading.graph.constant(0.0))
                torch.testing.assert_close(values(reading, [node], t, y.detach(), [])[:, 0], row[:, j])


class _Cube(torch.autograd.Function):
    """With a derivative that its operators do not tell."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, bar):
        return bar * 7


def _hidden(y):
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        return torch.autograd.grad(_Cube.apply(y).sum(), y)[0]


@pytest.mark.parametrize(
    "function", [lambda t, y: _Cube.apply(y), lambda t, y: _hidden(y), lambda t, y: torch.tensor(y.tolist()), lambda t, y: y * float(t)]
)
def test_hidden_numbers_are_refused(function):
    with pytest.raises(Unreadable):
        read(function, torch.zeros((), dtype=F64), torch.rand(2, 3, dtype=F64), [], batched=True)


def test_the_line_of_a_graph_that_was_traced_before():
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module.forward

    def function(t, y):
        z = y.sin()
        return z + torch.special.bessel_j0(y)

    y = torch.rand(2, 3, dtype=F64)
    torch.compile(function, backend=keep)(torch.zeros((), dtype=F64), y)
    with pytest.raises(Unreadable) as caught:
        read(lambda t, y: graphs[0](y)[0], torch.zeros((), dtype=F64), y, [], batched=True)
    assert caught.value.line == f"{__file__}:{function.__code__.co_firstlineno + 2}"


def test_what_is_given_is_not_written():
    held = torch.zeros(2, 3, dtype=F64)
    y = torch.rand(2, 3, dtype=F64)
    before = y.clone()
    for function in (lambda t, y: y.mul_(2), lambda t, y: held.copy_(y) + 1):
        with pytest.raises(Unreadable, match="writes"):
            read(function, torch.zeros((), dtype=F64), y, [], batched=True)
    assert torch.equal(y, before)
    reading = read(lambda t, y: torch.nn.functional.silu(y * 1, inplace=True), torch.zeros((), dtype=F64), y, [], batched=True)
    torch.testing.assert_close(values(reading, reading.outputs, torch.zeros((), dtype=F64), y, []), torch.nn.functional.silu(y))


def test_operators_whose_pieces_write_in_place():
    cell, attention = torch.nn.GRUCell(6, 3).double(), torch.nn.TransformerEncoderLayer(2, 1, 4, batch_first=True).double().eval()
    y = torch.rand(4, 6, dtype=F64)
    for function in (lambda t, y: cell(y), lambda t, y: attention(y.view(4, 3, 2)).reshape(4, 6)):
        reading = read(function, torch.zeros((), dtype=F64), y, [], batched=True)
        truth = function(None, y).detach()
        torch.testing.assert_close(values(reading, reading.outputs, torch.zeros((), dtype=F64), y, []), truth)


def test_inside_of_a_transform():
    def end(y):
        read(lambda t, y: y, torch.zeros(()), y[None], [], batched=False)
        return y

    with pytest.raises(Unreadable, match="transform"):
        torch.func.vmap(end)(torch.rand(2, 3))


def test_single_precision_inside_of_double():
    net = torch.nn.Linear(3, 3)
    y = torch.rand(4, 3, dtype=F64)
    with pytest.raises(Unreadable, match="replaced"):
        read(lambda t, y: net.float()(y.float()), torch.zeros((), dtype=F64), y, [], batched=True)
    net.float()
    reading = read(lambda t, y: net(y.float()).tanh().double() * y, torch.zeros((), dtype=F64), y, [], batched=True)
    got = values(reading, reading.outputs, torch.zeros((), dtype=F64), y, [])
    torch.testing.assert_close(got, net(y.float()).tanh().double() * y, rtol=1e-6, atol=1e-7)


def test_second_derivatives():
    """Derivatives of derivatives, of operators whose derivative is told or has kinks."""

    def function(t, y):
        inverse = torch.linalg.inv(y[:, :4].view(-1, 2, 2)).sum((1, 2))
        a = torch.stack([y.logsumexp(1), torch.logaddexp(y[:, 0], y[:, 1]), y.norm(dim=1), inverse])
        soft = torch.nn.functional.softplus(y).pow(2.5).sum(1)
        b = torch.stack([torch.nn.functional.elu(y).prod(1), y.std(1), soft, torch.atan2(y[:, 0], y[:, 1])])
        return torch.cat([a, b]).T

    y = torch.rand(5, 6, dtype=F64) + 0.2
    t = torch.zeros((), dtype=F64)
    reading = read(function, t, y, [], batched=True)
    g = reading.graph
    first = cotangents(g, dict.fromkeys(reading.outputs, g.constant(1.0)), ("y",))
    gradient = [first[g.leaf("y", i)] for i in range(6)]
    entries = jacobian(g, gradient)
    hessian = torch.func.vmap(torch.func.hessian(lambda x: function(None, x[None]).sum()))(y)
    got = values(reading, [entries[i, j] for i in range(6) for j in range(6)], t, y, []).view(-1, 6, 6)
    torch.testing.assert_close(got, hessian)


def test_an_index_that_is_computed_picks_one_number():
    knots, table = torch.linspace(0, 1, 9, dtype=F64), torch.rand(9, 2, dtype=F64)

    def function(t, y, p):
        i = torch.searchsorted(knots, t.reshape(1))[0].clamp(1, 8)
        w = (t - knots[i - 1]) / (knots[i] - knots[i - 1])
        return y * (table[i - 1] + w * (table[i] - table[i - 1])) + p[i, 1]

    y, p = torch.rand(1, 2, dtype=F64), torch.rand(9, 2, dtype=F64)
    for time_ in (0.0, 0.3, 0.99):
        t = torch.tensor(time_, dtype=F64)
        reading = read(function, torch.tensor(0.7, dtype=F64), y, [p], batched=False)
        i = int(torch.searchsorted(knots, t.reshape(1))[0].clamp(1, 8))
        w = (t - knots[i - 1]) / (knots[i] - knots[i - 1])
        truth = y * (table[i - 1] + w * (table[i] - table[i - 1])) + p[i, 1]
        torch.testing.assert_close(values(reading, reading.outputs, t, y, [p]), truth)
