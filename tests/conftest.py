"""Shared settings: double precision unless a test says otherwise, one thread, fixed seeds."""

from __future__ import annotations

import os

import pytest
import torch

from adjoint.methods import METHODS
from adjoint.native.build import LEVELS, NoCompiler, compiler


@pytest.fixture(autouse=True, scope="session")
def _cache_of_native_code(tmp_path_factory):
    """What is compiled serves the tests of one run, in all of its processes, and no later ones; compiled so often, it is optimised less."""
    LEVELS.update({False: "-O0", True: "-O1"})
    if "ADJOINT_CACHE" in os.environ:
        return
    base = tmp_path_factory.getbasetemp()
    os.environ["ADJOINT_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native")


def _has_compiler() -> bool:
    try:
        return bool(compiler())
    except NoCompiler:
        return False


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
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("compile") and not _has_compiler():
            item.add_marker(pytest.mark.skip(reason="needs a C++ compiler: g++, clang++, or the package ziglang"))
