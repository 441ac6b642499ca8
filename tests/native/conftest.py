"""What tests of compiled solves share."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture
def no_fallback():
    """Solves that are compiled say nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True", category=RuntimeWarning)
        yield
