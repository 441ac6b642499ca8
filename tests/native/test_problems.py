"""Equations of the benchmarks and published test problems are read, and are what they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adjoint.native.reading import read
from adjoint.native.reverse import cotangents, jacobian
from benchmarks import dae_problems, ivp_testset, stiff_problems
from benchmarks.frameworks import torch_function

from .interpreter import values

F64 = torch.float64


def one(function, y: Tensor, *inputs: Tensor, t: float = 0.3) -> None:
    """Read for one trajectory, with its derivative along a random direction."""
    time = torch.tensor(t, dtype=F64)

    def rate(t, y, *inputs):
        out = function(t, y[0], *inputs)
        return (torch.stack(list(out)) if isinstance(out, (list, tuple)) else out)[None]

    reading = read(rate, time, y[None], inputs, batched=False)
    truth = rate(time, y[None], *inputs)
    torch.testing.assert_close(values(reading, reading.outputs, time, y[None], inputs), truth, rtol=1e-10, atol=1e-10)
    g = reading.graph
    v = torch.rand(len(reading.outputs), dtype=F64, generator=torch.Generator().manual_seed(0))
    seeds: dict[int, int] = {}
    for i, node in enumerate(reading.outputs):
        seeds[node] = g.op("add", seeds[node], g.leaf("v", i)) if node in seeds else g.leaf("v", i)
    slopes = cotangents(g, seeds, ("y",))
    x = y.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((rate(time, x[None], *inputs)[0] * v).sum(), x)
    found = values(reading, list(slopes.values()), time, y[None], inputs, {"v": v})[0]
    got = torch.zeros_like(y)
    for leaf, value in zip(slopes, found, strict=True):
        got[g.data[leaf][1]] = value
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got / scale, wanted / scale, rtol=1e-9, atol=1e-12)
    assert len(jacobian(g, reading.outputs)) <= len(reading.outputs) * y.numel()


@pytest.mark.parametrize("name", list(stiff_problems.STIFF))
def test_stiff(name):
    problem = stiff_problems.STIFF[name]
    function = torch_function(problem.rate, problem.vector)
    if problem.y0.size > 3000:
        pytest.skip("large")
    y = torch.from_numpy(problem.y0).to(F64)
    one(function, y + 0.01 * torch.rand(y.shape, dtype=F64), torch.from_numpy(problem.p))


@pytest.mark.parametrize("name", ["ring", "beam", "nand", "tube"])
def test_published(name):
    problem = ivp_testset.PROBLEMS[name]
    y = torch.tensor(problem.y0, dtype=F64)
    y = y * 1.01 + 0.001 * torch.rand(y.shape, dtype=F64)
    if not problem.implicit:
        one(lambda t, y: problem.fun(t, y), y, t=2e-4 if name == "ring" else math.e / 2)
        return
    n = y.numel()
    one(lambda t, y: problem.fun(t, y[:n], y[n:]), torch.cat([y, torch.rand(n, dtype=F64)]), t=7.3)


@pytest.mark.parametrize("name", list(dae_problems.DAE))
def test_dae(name):
    problem = dae_problems.DAE[name]
    y = torch.rand(2 * (problem.x0.size + problem.z0.size), dtype=F64) * 0.1 + 0.5
    if y.numel() > 3000:
        pytest.skip("large")
    residual = torch_function(dae_problems.residual(problem), problem.vector)
    n = y.numel() // 2
    one(lambda t, y, p: residual(t, y[:n], y[n:], p), y, torch.from_numpy(problem.p))
