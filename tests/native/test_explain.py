"""`adjoint.explain`."""

from __future__ import annotations

import logging

import torch

import adjoint


def decay(t, y, k):
    return torch.stack([-k[..., 0] * y[..., 0], k[..., 1] * y[..., 0] - torch.tanh(y[..., 1])], -1)


def test_what_would_be_compiled():
    y0, k = torch.ones(4, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    found = adjoint.explain(decay, y0, (k,), method="rodas5p", batched=True)
    assert found.native and found.unknowns == 2 and found.inputs == (((4, 2), "own"),) and found.jacobian == 3
    assert set(found.sources) == {"fun", "vjp", "jac", "bend"} and "m_tanh" in found.sources["fun"]
    assert "native code for 2 unknowns" in str(found) and "3 of 4 entries" in str(found)
    assert adjoint.explain(decay, y0, (k[0],), batched=True).inputs == (((2,), "share"),)
    # of two methods the implicit one needs more
    both = adjoint.explain(decay, y0, (k,), method="auto", batched=True)
    assert both.native and both.method == "auto" and both.jacobian == 3


def test_why_not():
    def branches(t, y):
        return y if float(y.sum()) > 0 else -y

    def sorts(t, y):
        return torch.sort(y).values

    y0 = torch.ones(3, dtype=torch.float64)
    assert "kencarp4" in str(adjoint.explain(decay, y0, (), method="kencarp4"))
    for fun, word in ((branches, ""), (sorts, "sort")):
        found = adjoint.explain(fun, y0)
        assert not found.native and word in found.reason and found.reason in str(found)
    assert "sort" in adjoint.explain(lambda t, y: 1j * sorts(t, y.real), y0.to(torch.complex128)).reason


def test_many_shapes():
    """Each has a graph of its own, of a function that only PyTorch's tracer can read: it has nothing to say to that."""

    def fun(t, y):
        hash(0)
        return -y

    told = []

    class Listener(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    log, listener = logging.getLogger("torch._dynamo.convert_frame"), Listener()
    log.addHandler(listener)
    try:
        for n in range(1, 12):
            found = adjoint.explain(fun, torch.ones(n, dtype=torch.float64))
            assert found.native and found.unknowns == n
    finally:
        log.removeHandler(listener)
    assert not told
