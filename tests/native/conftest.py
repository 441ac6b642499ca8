"""What tests of compiled solves share."""

from __future__ import annotations

import warnings

import pytest

from adjoint.doors import prepared


@pytest.fixture
def no_fallback():
    """Solves that are compiled say nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True", category=RuntimeWarning)
        yield


@pytest.fixture
def counted(monkeypatch):
    """How many solves were made at once."""
    seen = []
    real = prepared.run_of

    def spy(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(prepared, "run_of", spy)
    # code that other tests have used may be due to be looked at
    monkeypatch.setattr("adjoint.native.program.Seldom.coming", lambda self: False)
    prepared.forget()
    return seen
