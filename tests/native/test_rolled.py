"""Loops over tables of indices compute what the written-out text does, and are short."""

from __future__ import annotations

import shutil

import pytest
import torch

from adjoint.native.alike import Loops, groups_of, kept_values
from adjoint.native.chained import Chained
from adjoint.native.reading import read
from adjoint.native.reverse import jacobian
from adjoint.native.rolled import rolled

from .compiled import called, compiled, leaf_name

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def heat(t, y, p, q):
    """Both ends held."""
    inner = y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2]
    return torch.nn.functional.pad(p[0] * inner, (1, 1)) + q[:, :1] * y


def brusselator(t, y, p, q):
    u, v = y.view(-1, 2, 8, 8).unbind(1)

    def laplace(w):
        return w.roll(1, 1) + w.roll(-1, 1) + w.roll(1, 2) + w.roll(-1, 2) - 4 * w

    first = p[0] + u * u * v - (p[1] + 1) * u + p[2] * laplace(u)
    return torch.stack([first, p[1] * u - u**2 * v + q[:, :1, None] * laplace(v)], 1).reshape(y.shape)


def network(t, y, p, q):
    """Hidden units are kept."""
    hidden = torch.tanh(y @ p[:768].view(32, 24))
    return hidden @ p[768:].view(24, 32) * q[:, :1]


def bodies(t, y, p, q):
    x, v = y.view(-1, 2, 6, 3).unbind(1)
    gap = x[:, None] - x[:, :, None]
    pull = (p[:6, None] * gap * ((gap**2).sum(-1, keepdim=True) + 0.1) ** -1.5).sum(2)
    return torch.stack([v, pull], 1).reshape(y.shape)


def lorenz(t, y, p, q):
    return (y.roll(-1, 1) - y.roll(2, 1)) * y.roll(1, 1) - y + torch.linspace(7, 9, 40)


CASES = [(heat, 256), (brusselator, 128), (network, 32), (bodies, 36), (lorenz, 40)]


def cotangent_name(data):
    kind, *index = data
    return f"o[{2 * N}+{index[0]}]" if kind == "y" else {0: f"o[{3 * N}+{index[1]}]", 1: f"o[{2 * N + N}+{P}+{index[1]}]"}[index[0]]


N, P = 256, 1536


def test_a_network_of_few_outputs():
    """Hidden units are kept, whatever the number of outputs."""

    def deep(t, y, p):
        hidden = torch.tanh(torch.tanh(y @ p[:256].view(8, 32)) @ p[256:1280].view(32, 32))
        return hidden @ p[1280:].view(32, 8)

    reading = read(deep, torch.zeros(()), torch.rand(3, 8), [torch.rand(P)], batched=True)
    made = rolled(reading.graph, reading.outputs, leaf_name, cotangent_name)
    assert made is not None and made.loops == 3 and made.size < 1000 and len(made.pattern) == 64


@needs_compiler
@pytest.mark.parametrize("function, n", CASES, ids=[f.__name__ for f, _ in CASES])
@pytest.mark.parametrize("lanes", [0, 4])
def test_functions(tmp_path, function, n, lanes):
    g = torch.Generator().manual_seed(0)
    y, p, q, v = (torch.rand(*shape, generator=g) for shape in ((4, n), (P,), (4, 1), (4, n)))
    reading = read(function, torch.zeros(()), y, [p, q], batched=True)
    made = rolled(reading.graph, reading.outputs, leaf_name, cotangent_name, shared={0}, entry_name=f"o[{3 * N + P + 1}+{{}}]".format)
    assert made is not None and made.loops < 10 and made.size < 800
    count = 3 * N + P + 1 + len(made.pattern)
    library = compiled(tmp_path, f"{{{made.fun}}}\n{{{made.vjp}}}\n{{{made.jac}}}", torch.float64, lanes, made.tables)
    found = called(library, lanes, count, y, p, q, v)
    inputs = [x.clone().requires_grad_() for x in (y, p, q)]
    truth = function(None, *inputs)
    torch.testing.assert_close(found[:, :n], truth.detach())
    wanted = torch.autograd.grad((truth * v).sum(), inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found[:, 2 * N : 2 * N + n], wanted[0])
    torch.testing.assert_close(found[:, 3 * N : 3 * N + P].sum(0), wanted[1])
    torch.testing.assert_close(found[:, 3 * N + P : 3 * N + P + 1], wanted[2])
    every = function in (network, bodies)
    assert set(made.pattern) == ({(i, j) for i in range(n) for j in range(n)} if every else set(jacobian(reading.graph, reading.outputs)))
    full = torch.func.vmap(torch.func.jacrev(lambda x, q: function(None, x[None], p, q[None])[0]))(y, q)
    rows, columns = zip(*made.pattern, strict=True)
    torch.testing.assert_close(found[:, 3 * N + P + 1 :], full[:, rows, columns])


def fluxes(t, y, p, q):
    """Two levels of kept values, each of which neighbours share, and the time in both."""
    flux = torch.exp(p[0] * (y - y.roll(1, 1))) * torch.sin(q[:, :1] + t)
    eddy = torch.tanh(flux * flux.roll(1, 1) * y + t)
    return flux.roll(-1, 1) - flux + eddy * eddy.roll(2, 1) * q[:, :1] - 3 * y


def second_input_is_time(name):
    def named(data):
        return name(("a", 1, 1) if data == ("t",) else data)

    return named


@needs_compiler
@pytest.mark.parametrize("lanes", [0, 4])
def test_derivatives_through_kept_values(tmp_path, lanes):
    n, at = 30, 3 * N + P + 2
    g = torch.Generator().manual_seed(0)
    y, p, q, v = (torch.rand(*shape, generator=g) for shape in ((4, n), (P,), (4, 2), (4, n)))
    reading = read(fluxes, torch.zeros(()), y, [p, q[:, :1].clone()], batched=True)
    kept = kept_values(reading.graph, reading.outputs)
    levels = groups_of(reading.graph, reading.outputs, kept)
    assert len(kept) == 2 * n + 1 and len(levels) == 4
    writer = Loops(second_input_is_time(leaf_name), {0})
    forward = [f"  S w[{len(kept)}], wb[{len(kept)}];", *(writer.values(group, "w[{}]".format) for level in levels[:-1] for group in level)]
    chain = Chained(writer, levels)
    assert len(chain.pattern) == 6 * n and not chain.steady()
    slope, phi = f"o[{at + len(chain.pattern)}+{{}}]".format, at + len(chain.pattern) + n
    jac = chain.jacobian(forward, f"o[{at}+{{}}]".format, slope)
    forward.append(f"  for (int i = 0; i < {len(kept)}; i++) wb[i] = K(R(0));\n  const S* x = v;\n  S* phi = o + {phi};")
    bend = chain.bend(forward, "K(R(1 + {} % 3))".format, "x[{}]".format, second_input_is_time(cotangent_name), ("y", "t", "a"))
    library = compiled(tmp_path, f"{{{jac}}}\n{{{bend}}}", torch.float64, lanes, "".join(writer.tables))
    found = called(library, lanes, phi + 1, y, p, q, v)
    rows, columns = zip(*chain.pattern, strict=True)
    weights = 1.0 + torch.arange(len(rows)) % 3
    by_state = torch.func.jacrev(lambda y, t, p, q: fluxes(t, y[None], p, q[None])[0])
    by_time = torch.func.jacfwd(lambda y, t, p, q: fluxes(t, y[None], p, q[None])[0], argnums=1)

    def total(y, t, p, q, v):
        return (weights * by_state(y, t, p, q)[rows, columns]).sum() + (v * by_time(y, t, p, q)).sum()

    for r in range(4):
        here = y[r], q[r, 1], p, q[r, :1]
        full = by_state(*here)
        mine = torch.zeros(n, n).index_put((torch.tensor(rows), torch.tensor(columns)), found[r, at : at + len(rows)])
        torch.testing.assert_close(mine, full)
        torch.testing.assert_close(found[r, phi - n : phi], by_time(*here))
        torch.testing.assert_close(found[r, phi], total(*here, v[r]))
        of_y, of_t, of_p, of_q = torch.func.grad(total, argnums=(0, 1, 2, 3))(*here, v[r])
        torch.testing.assert_close(found[r, 2 * N : 2 * N + n], of_y)
        torch.testing.assert_close(found[r, 3 * N : 3 * N + P], of_p)
        torch.testing.assert_close(found[r, 3 * N + P : 3 * N + P + 2], torch.stack([of_q[0], of_t]))


def test_few_or_unlike_outputs_are_written_out():
    few = read(lambda t, y: y.sin(), torch.zeros(()), torch.rand(3, 5), [], batched=True)
    assert rolled(few.graph, few.outputs, leaf_name, leaf_name) is None
    functions = [torch.sin, torch.cos, torch.exp, torch.tanh, torch.sqrt]

    def unlike(t, y):
        out = []
        for i, x in enumerate(y.unbind(1)):
            for n in range(i // 5 + 1):
                x = functions[(i + n) % 5](x)
            out.append(x)
        return torch.stack(out, 1)

    reading = read(unlike, torch.zeros(()), torch.rand(3, 30), [], batched=True)
    assert rolled(reading.graph, reading.outputs, leaf_name, leaf_name) is None
