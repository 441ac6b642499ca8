"""Shared settings: double precision unless a test says otherwise, one thread, fixed seeds."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from adjoint.methods import METHODS, ExplicitRungeKutta
from adjoint.native.build import LEVELS, NoCompiler, compiler
from adjoint.sensitivity import strategies


def pytest_configure(config):
    """Compiled so often, code is not optimised; in the slow run as little as lets the compiler move things about."""
    LEVELS.update({False: "-O0", True: "-O0" if "not slow" in config.getoption("-m") else "-O1"})


def pytest_collection_finish():
    """What was imported and collected stays: it is not looked through again and again for what can be freed."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _cache_of_native_code(tmp_path_factory):
    """What is compiled serves the tests of one run, in all of its processes, and no later ones."""
    if "ADJOINT_CACHE" in os.environ:
        return
    base = tmp_path_factory.getbasetemp()
    os.environ["ADJOINT_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native")


def _has_compiler() -> bool:
    try:
        return bool(compiler())
    except NoCompiler:
        return False


#: without a device its seed is put down for later with all of the stack, each time
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _defaults():
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    SEED(0)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _sweeps(request, monkeypatch):
    """Tests are so small that every gradient would come from recorded solves: the sweep is what they are to test.

    Those marked ``users_defaults`` keep what users have.
    """
    if request.node.get_closest_marker("users_defaults") is None:
        monkeypatch.setattr(strategies, "KEEP_BYTES", 0)


#: the shared matrices of tests run these implicit methods always, the other ones in the slow run: each has tests of its own
QUICK_IMPLICIT = {"kvaerno3", "rodas4"}
MATRICES = {"test_batched", "test_gradients", "test_order", "test_quadrature", "test_solution", "test_transforms", "test_memory"}
#: of explicit Runge-Kutta methods, whose code is one: of first order, without error control, and of those with it one that has its last
#: slope for the next step, one with a dense output of its own, and one that takes more stages for that
QUICK_EXPLICIT = {"euler", "rk4", "dopri5", "tsit5", "verner7"}
LONG_MATRICES = {"test_batched", "test_gradients", "test_solution", "test_transforms"}
LONG_MATRICES |= {"test_companion", "test_engine", "test_jointly", "test_resets"}


def _mark_slow_cases(config, items):
    """``pytest.mark.slow_cases`` names cases of a test, as in its brackets, that are slow ones beside neighbours with the same code."""
    left = {}
    for item in items:
        for mark in item.iter_markers("slow_cases"):
            unseen = left.setdefault(item.nodeid.split("[")[0], set(mark.args))
            if item.callspec.id in mark.args:
                item.add_marker(pytest.mark.slow)
                unseen.discard(item.callspec.id)
    # of single cases that were asked for nothing is known of the others
    few = config.getoption("lf", False) or any("::" in arg for arg in config.args)
    unknown = [] if few else [f"{test}[{case}]" for test, cases in left.items() for case in cases]
    if unknown:
        raise pytest.UsageError(f"slow_cases names cases that there are not: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(config, items):
    _mark_slow_cases(config, items)
    implicit = {name for name, method in METHODS.items() if method.implicit} - QUICK_IMPLICIT
    explicit = {name for name, method in METHODS.items() if isinstance(method, ExplicitRungeKutta)} - QUICK_EXPLICIT
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        used = {value for value in values if isinstance(value, str)}
        if (item.path.stem in MATRICES and used & implicit) or (item.path.stem in LONG_MATRICES and used & explicit):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("compile") and not _has_compiler():
            item.add_marker(pytest.mark.skip(reason="needs a C++ compiler: g++, clang++, or the package ziglang"))
