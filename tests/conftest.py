"""Shared settings: double precision unless a test says otherwise, one thread, fixed seeds."""

from __future__ import annotations

import pytest
import torch

from adjoint.methods import METHODS


@pytest.fixture(autouse=True)
def _defaults():
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _sweeps(request, monkeypatch):
    """Tests are so small that every gradient would come from recorded solves: the sweep is what they are to test.

    Those marked ``users_defaults`` keep what users have.
    """
    if request.node.get_closest_marker("users_defaults") is None:
        monkeypatch.setattr("adjoint.sensitivity.strategies.KEEP_BYTES", 0)


@pytest.fixture
def uncompiled(monkeypatch):
    """The code of compiled steps and loops, run as it is: that takes no seconds."""

    def loop(cond, body, carried):
        while bool(cond(*carried)):
            carried = body(*carried)
        return carried

    for module in ("integrate.batched", "integrate.single", "sensitivity.compiled"):
        monkeypatch.setattr(f"adjoint.{module}.compiled", lambda function, key, columns=False: function)
    for module in ("integrate.whole", "sensitivity.whole"):
        monkeypatch.setattr(f"adjoint.{module}.compiled_loop", lambda function, key, device, width: function)
    monkeypatch.setattr(torch, "while_loop", loop)


#: the shared matrices of tests run these implicit methods always, the other ones in the slow run: each has tests of its own
QUICK_IMPLICIT = {"kvaerno3", "rodas4"}
MATRICES = {"test_batched", "test_gradients", "test_order", "test_quadrature", "test_solution", "test_transforms", "test_memory"}


def pytest_collection_modifyitems(items):
    implicit = {name for name, method in METHODS.items() if method.implicit} - QUICK_IMPLICIT
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        used = {value for value in values if isinstance(value, str)}
        if item.path.stem in MATRICES and used & implicit:
            item.add_marker(pytest.mark.slow)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
