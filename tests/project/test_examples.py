"""Every example runs, shortened, to its own assertion, and leaves its figure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


#: take ten seconds to a minute even so
LONG = {"stiff_neural_ode", "slider_crank", "church_bell", "glycolysis", "brusselator"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NAMES])
@pytest.mark.slow_cases("influenza_parameter_estimation", "deq_digits")
def test_example(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    if name in ("digits_neural_ode", "deq_digits"):
        pytest.importorskip("sklearn")
    if name == "battery_dfn":
        pytest.importorskip("pybamm")
    if name == "power_flow":
        pytest.importorskip("pandapower")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # as a module that can be imported, which the tracer of compiled solves wants
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main(quick=True, out=tmp_path)
    finally:
        torch.set_default_dtype(before)
    figures = list(tmp_path.glob("*.png"))
    assert len(figures) == 1 and figures[0].stat().st_size > 10_000
