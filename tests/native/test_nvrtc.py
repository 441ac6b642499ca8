"""The kernels of solves, compiled for CUDA devices. That takes NVRTC, and no device."""

from __future__ import annotations

import pytest
import torch

from adjoint.methods import METHODS
from adjoint.native import nvrtc
from adjoint.native.build import NoCompiler
from adjoint.native.emit import DEVICE_METHODS
from adjoint.native.program import program_of
from adjoint.native.reading import read

try:
    nvrtc.nvrtc()
except NoCompiler:
    pytest.skip("there is no libnvrtc", allow_module_level=True)

ALL = sorted(name for name, method in METHODS.items() if isinstance(method, DEVICE_METHODS))
QUICK = ("dopri5", "rodas5p", "kvaerno5")
KNOTS = torch.linspace(0, 2, 40)


def swings(t, y, p, q):
    """Depends on the time, shared and own parameters, and a table that is looked up."""
    x, v = y.unbind(-1)
    pulse = KNOTS.to(y.dtype)[(t * 10).long().clamp(0, 39)]
    return torch.stack([v, -p[:, 0] * x - q * v.tanh() * x * x + pulse * torch.sin(t)], -1)


def text(method, dtype, fun=swings):
    rows = 3
    y0, inputs = torch.ones(rows, 2, dtype=dtype), [torch.ones(rows, 1, dtype=dtype), torch.ones((), dtype=dtype)]
    reading = read(fun, torch.zeros(rows, dtype=dtype), y0, inputs, True)
    return program_of([reading], METHODS[method], y0, inputs).kernel_text()


def cases():
    for method in ALL:
        for dtype in (torch.float64, torch.float32):
            quick = method in QUICK and (dtype == torch.float64 or method == "dopri5")
            yield pytest.param(method, dtype, marks=[] if quick else [pytest.mark.slow], id=f"{method}-{dtype}")


@pytest.mark.parametrize(("method", "dtype"), list(cases()))
def test_every_method(method, dtype):
    code = nvrtc.cubin(text(method, dtype), (9, 0))
    # an object file, with all kernels in it
    assert code[:4] == b"\x7fELF"
    for kernel in (b"solve", b"fill_up", b"sweep", b"add_up", b"measure"):
        assert b".text." + kernel in code


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_devices(capability):
    assert nvrtc.cubin(text("tsit5", torch.float64), capability)[:4] == b"\x7fELF"


def test_made_once(monkeypatch):
    given = text("heun2", torch.float64)
    first = nvrtc.cubin(given, (9, 0))
    nvrtc.cubin.cache_clear()
    monkeypatch.setattr(nvrtc, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin(given, (9, 0)) == first


def test_what_fails_says_so():
    with pytest.raises(NoCompiler, match="error: identifier"):
        nvrtc.cubin("void f() { undeclared(); }", (9, 0))
