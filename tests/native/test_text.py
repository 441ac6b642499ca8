"""Emitted C++, for one trajectory and for several at once, computes what the expressions are."""

from __future__ import annotations

import functools
import shutil
import subprocess

import pytest
import torch

from adjoint.native.expressions import FUNCTIONS, Graph
from adjoint.native.reading import read
from adjoint.native.reverse import cotangents
from adjoint.native.text import Scatter, header, statements

from .cases import GROUPS
from .compiled import SIGNATURE, called, compiled, leaf_name
from .interpreter import values
from .test_operators import PARAMETERS, group_read, states

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

LANES = {"one": (torch.float64, 0), "four": (torch.float64, 4), "eight single": (torch.float32, 8), "pairs of pairs": (torch.float64, 32)}


@pytest.mark.parametrize(
    "dtype, lanes", [pytest.param(*x, id=name, marks=[pytest.mark.slow] * (name == "pairs of pairs")) for name, x in LANES.items()]
)
@pytest.mark.slow_cases("four", "eight single")
def test_all_operators(tmp_path, dtype, lanes):
    """Values, and all derivatives where they are not scattered."""
    y, p = states(dtype), PARAMETERS.to(dtype)
    for group in GROUPS:
        rows = slice(12) if group == "complex" else slice(None)
        reading, slices = group_read(group, dtype)
        g = reading.graph
        nodes = list(reading.outputs)
        for name, part in slices.items():
            if name == "trigamma":
                continue
            one = cotangents(g, dict.fromkeys(reading.outputs[part], g.constant(1.0)), ("y",))
            nodes += [node for leaf, node in one.items()]
        body, count = statements(g, [(f"o[{i}]", node, "=") for i, node in enumerate(nodes)], leaf_name, shared={0})
        assert count > 100
        library = compiled(tmp_path, body, dtype, lanes)
        found = called(library, lanes, len(nodes), y, p, y, y, reading.tables)
        truth = values(reading, nodes, torch.zeros((), dtype=dtype), y, [p])
        names = {i: name for name, part in slices.items() for i in range(part.start, part.stop)}
        near = functools.partial(torch.testing.assert_close, equal_nan=True)
        rtol = 1e-9 if dtype == torch.float64 else 1e-3
        for i in range(len(nodes)):
            what = f"{group} {names.get(i, 'derivative')}: {y[:, 0].tolist()}, {truth[:, i].tolist()}, {found[:, i].tolist()}"
            near(found[rows, i], truth[rows, i], rtol=rtol, atol=rtol / 10, msg=what)


def by_tables(t, y, shared, own):
    """Look-ups and searches in tables that are shared, and in others."""
    i = torch.bucketize(y[:, :2], torch.tensor([0.0, 0.5, 1.0, 1.5])).clamp(max=3)
    first = shared[i].sum(1) + own.gather(1, i).prod(1)
    j = torch.searchsorted(own.cumsum(1), y[:, 2:3].contiguous())
    k = torch.searchsorted(shared, y[:, 3].contiguous(), right=True)
    same = own[:, (shared[0] * 2).long()] * shared[(shared[1] * 2).long()]
    return torch.stack([first, j[:, 0] + k * y[:, 4], same], 1)


@pytest.mark.parametrize("lanes", [0, 4, 16])
def test_tables(tmp_path, lanes):
    y, own, shared = states(torch.float64)[:10], torch.rand(10, 4), torch.tensor([0.1, 0.6, 0.9, 1.2])
    reading = read(by_tables, torch.zeros(()), y, [shared, own], batched=True)
    assert reading.strides == (0, 4)
    g = reading.graph
    seeds = {node: g.leaf("v", i) for i, node in enumerate(reading.outputs)}
    slopes = cotangents(g, seeds, ("a", "y"))
    places = {("a", 0): 3, ("a", 1): 7, ("y",): 11}
    targets = [(f"o[{i}]", node, "=") for i, node in enumerate(reading.outputs)]
    for leaf, node in slopes.items():
        kind, *index = g.data[leaf]
        start = places[(kind, *index[:1])] if kind == "a" else places["y",]
        if g.names[leaf] == "look":
            targets.append(Scatter(f"(o+{start})", leaf, node))
        else:
            targets.append((f"o[{start + index[-1]}]", node, "+="))
    body, _ = statements(g, targets, leaf_name, shared={0})
    v = torch.rand(10, 3)
    found = called(compiled(tmp_path, body, torch.float64, lanes), lanes, 17, y, shared, own, v, reading.tables)
    inputs = [x.clone().requires_grad_() for x in (shared, own, y)]
    truth = by_tables(None, inputs[2], inputs[0], inputs[1])
    torch.testing.assert_close(found[:, :3], truth.detach())
    wanted = torch.autograd.grad((truth * v).sum(), inputs)
    torch.testing.assert_close(found[:, 3:7].sum(0), wanted[0])
    torch.testing.assert_close(found[:, 7:11], wanted[1])
    torch.testing.assert_close(found[:, 11:], wanted[2])


def test_shared_values_are_numbers():
    """What is made of shared inputs only is computed once for all lanes."""
    reading = read(lambda t, y, p: y * (p[0].exp() + p[1]).sqrt(), torch.zeros(()), torch.rand(3, 2), [torch.rand(2)], batched=True)
    body, _ = statements(reading.graph, [("o[0]", reading.outputs[0], "="), ("o[1]", reading.outputs[1], "=")], leaf_name, shared={0})
    assert body.count("const R ") == 3 and body.count("const S ") == 2


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_same_text_is_cuda(tmp_path):
    """All functions that text may call, as a kernel."""
    g = Graph()
    x, y = g.leaf("y", 0), g.leaf("y", 1)
    nodes = [g.op(name, x) for name in FUNCTIONS]
    nodes += [g.op(name, x, y) for name in ("add", "max", "min", "pow", "atan2", "fmod", "remainder", "floordiv", "hypot")]
    nodes += [g.op("sel", g.op("not", g.op("lt", x, y)), x, g.look("a", 0, 0, 1, 4, g.as_int(y)))]
    body, _ = statements(g, [(f"o[{i}]", node, "=") for i, node in enumerate(nodes)], leaf_name, shared={0})
    source = tmp_path / "f.cu"
    source.write_text(header(single=False) + f'extern "C" __global__ void f{SIGNATURE} {{\n{body}\n}}\n')
    subprocess.run(["nvcc", "-ptx", "-w", str(source), "-o", str(tmp_path / "f.ptx")], check=True)
    assert ".entry f" in (tmp_path / "f.ptx").read_text()
