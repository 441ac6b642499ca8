"""The launcher of CUDA with a driver that runs kernels by the processor, and on a device where there is one."""

from __future__ import annotations

import pytest
import torch

from adjoint import solve_ivp
from adjoint.native import cuda, device
from adjoint.native.build import library

from ..helpers.problems import lotka_volterra
from .emulated import AFTER, BEFORE

#: what of the driver's interface is called, with the loader's functions in the place of modules; counts tell of contexts that are left
DRIVER = r"""
#include <dlfcn.h>
#include <stdio.h>
static int depth, retained;
static char path[4096];
extern "C" {
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* device, int index) { *device = index; return index < 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { retained++; *context = &retained; return 0; }
int cuCtxPushCurrent_v2(void* context) { depth++; return context != &retained; }
int cuCtxPopCurrent_v2(void** context) { *context = &retained; return --depth < 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen((const char*)image, RTLD_NOW);
  return depth != 1 || !*module ? 200 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  snprintf(path, sizeof path, "by_host_%s", name);
  return (*function = dlsym(module, path)) ? 0 : 500;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                   void** a, void** extra) {
  if (depth != 1 || gy != 1 || gz != 1 || by != 1 || bz != 1 || shared || stream != (void*)77 || extra) return 1;
  ((void (*)(long, long, void**))f)(gx, bx, a);
  return 0;
}
int cuGetErrorString(int status, const char** text) { *text = status == 500 ? "named symbol not found" : "other"; return 0; }
int contexts() { return depth; }
}
"""


@pytest.fixture
def driver(monkeypatch):
    """Tensors of the processor go the way of CUDA, but for memory and code."""
    made = library(DRIVER, False, ("-ldl",))
    for cached in (cuda._driver, cuda._context):
        cached.cache_clear()

    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(cuda, "cubin", lambda text, capability: library(BEFORE + text + AFTER, True)._name.encode())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Stream())
    monkeypatch.setitem(device.LAUNCHERS, "cpu", cuda.on_cuda)
    yield made
    cuda._context.cache_clear()


def _solved(where="cpu", compile=True, method="dopri5", rows=6):
    y0 = torch.ones(rows, 2, device=where, requires_grad=True)
    p = (torch.tensor([1.5, 1.0, 3.0, 1.0], device=where) * torch.linspace(0.9, 1.1, rows, device=where).unsqueeze(-1)).requires_grad_()
    times = torch.linspace(0.0, 20.0, 5, device=where)
    sol = solve_ivp(lotka_volterra, (0.0, 20.0), y0, (p,), t_eval=times, method=method, batched=True, compile=compile, rtol=1e-7, atol=1e-9)
    assert sol.y.device.type == torch.device(where).type
    return sol.y.detach(), *torch.autograd.grad(sol.y.square().sum(), (y0, p))


@pytest.mark.compile
def test_calls_of_the_driver(driver, monkeypatch):
    cuda._untried.cache_clear()
    with pytest.warns(RuntimeWarning, match="have not run on a GPU"):
        found = _solved()
    assert driver.contexts() == 0
    monkeypatch.delitem(device.LAUNCHERS, "cpu")
    for mine, other in zip(found, _solved(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.compile
def test_errors_of_the_driver_have_a_name(driver):
    nothing = "\n".join(f"static void {name}() {{}}" for name in ("measure", "solve", "fill_up"))
    launch = cuda.on_cuda(f"#define DISPLACED 1\n{nothing}", torch.device("cpu"))
    launch("measure", 1, ())
    with pytest.raises(cuda.CudaError, match=r"cuModuleGetFunction: named symbol not found \(500\)"):
        launch("sweep", 1, ())
    assert driver.contexts() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "rodas5p", "kvaerno5", "auto"])
def test_on_a_device(method, recwarn):
    for mine, other in zip(_solved("cuda", method=method, rows=500), _solved("cpu", method=method, rows=500), strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-6, atol=1e-7)
    assert not [x for x in recwarn if "uncompiled" in str(x.message)]


@pytest.mark.cuda
def test_the_same_bits_again_on_a_device():
    first, second = _solved("cuda", rows=5000), _solved("cuda", rows=5000)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
