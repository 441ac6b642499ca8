"""Shared settings: double precision unless a test says otherwise, one thread, fixed seeds."""

from __future__ import annotations

import pytest
import torch


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
def _sweeps(monkeypatch):
    """Tests are so small that every gradient would come from recorded solves: the sweep is what they are to test."""
    monkeypatch.setattr("adjoint.sensitivity.strategies.KEEP_BYTES", 0)


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
