# %% [markdown]
# A lithium-ion battery: PyBaMM's Doyle-Fuller-Newman model as a differential-algebraic system in torch
#
# PyBaMM discretises the model and writes it as Python source; that source runs on torch tensors with a few names put in the place of
# NumPy's. Concentrations in particles and electrolyte are differential, potentials algebraic: index 1, sparse (the pattern is found).
# `solve_dae` solves a discharge, which is held against PyBaMM's own solution by its own solver (IDA); then the diffusivities of both
# electrodes' particles are recovered from a voltage curve that PyBaMM computed, with noise of 1 mV, by Gauss-Newton steps with exact
# derivatives.
#
# Data: the parameter set Marquis2019 that comes with PyBaMM (BSD-3). The curve is computed, not measured; the noise is added here.
# Needs `pip install pybamm`.

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from adjoint import solve_dae

os.environ.setdefault("PYBAMM_DISABLE_TELEMETRY", "true")

import pybamm

NAMES = ("Negative particle diffusivity [m2.s-1]", "Positive particle diffusivity [m2.s-1]")
TRUTH = torch.tensor([3.9e-14, 1.0e-14], dtype=torch.float64)
NOISE = 1e-3


class TorchNames:
    """What the generated source calls ``np``."""

    exp, log, tanh, sinh = staticmethod(torch.exp), staticmethod(torch.log), staticmethod(torch.tanh), staticmethod(torch.sinh)

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        """Of a tensor and a number, either way round."""
        return torch.clamp(a, min=b) if isinstance(a, Tensor) else torch.clamp(b, min=a)

    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        """As `maximum`."""
        return torch.clamp(a, max=b) if isinstance(a, Tensor) else torch.clamp(b, max=a)

    @staticmethod
    def concatenate(parts: tuple[Tensor, ...]) -> Tensor:
        """Of columns."""
        return torch.cat(parts)


def as_torch(symbol: pybamm.Symbol) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """``f(t, y, inputs)`` on columns ``(n, 1)`` from PyBaMM's generated source."""
    constants, source = pybamm.to_python(symbol)
    names: dict[str, Any] = {"np": TorchNames}
    for key, value in constants.items():
        if callable(value):
            names[f"const_{str(key).replace('-', 'm')}"] = value
        else:
            dense = value.toarray() if hasattr(value, "toarray") else np.asarray(value)
            names[f"const_{str(key).replace('-', 'm')}"] = torch.tensor(dense, dtype=torch.float64)
    lines = source.strip().splitlines()
    result = lines[-1].split(" = ")[0]
    exec("def f(t, y, inputs):\n    " + "\n    ".join(lines) + f"\n    return {result}", names)
    return names["f"]


class Battery(NamedTuple):
    """The discretised model: right-hand sides, algebraic equations, voltage, start; and PyBaMM's simulation of it."""

    rates: Callable[..., Tensor]
    constraints: Callable[..., Tensor]
    voltage: Callable[..., Tensor]
    y0: Tensor
    n_rates: int
    simulation: Any


def inputs(p: Tensor) -> dict[str, Tensor]:
    """The parameters as the generated source wants them."""
    return {name: p[i].reshape(1, 1) for i, name in enumerate(NAMES)}


def build(points: int, seconds: float) -> Battery:
    """The model with ``points`` in each of its five dimensions; a discharge at 1 C."""
    model = pybamm.lithium_ion.DFN()
    values = model.default_parameter_values
    values.update(dict.fromkeys(NAMES, "[input]"))
    simulation = pybamm.Simulation(model, parameter_values=values, var_pts=dict.fromkeys(("x_n", "x_s", "x_p", "r_n", "r_p"), points))
    solution = simulation.solve([0, seconds], inputs=dict(zip(NAMES, TRUTH.tolist(), strict=True)))
    built = simulation.built_model
    voltage = built.get_processed_variable("Voltage [V]")
    start = torch.from_numpy(np.array(solution.y[:, 0], dtype=float).reshape(-1))
    return Battery(
        as_torch(built.concatenated_rhs), as_torch(built.concatenated_algebraic), as_torch(voltage), start, built.len_rhs, simulation
    )


def discharge(battery: Battery, p: Tensor, times: Tensor, rtol: float = 1e-5, **options: Any) -> Any:
    """The solution at ``times``."""

    def residual(t: Tensor, y: Tensor, yp: Tensor, p: Tensor) -> Tensor:
        column, given = y.unsqueeze(-1), inputs(p)
        rates = battery.rates(t, column, given)[:, 0]
        constraints = battery.constraints(t, column, given)[:, 0]
        return torch.cat([yp[: battery.n_rates] - rates, constraints])

    scale = torch.clamp(battery.y0.abs(), min=1e-3)
    return solve_dae(residual, (0.0, float(times[-1])), battery.y0, args=(p,), t_eval=times, rtol=rtol, atol=rtol * scale, **options)


def voltages(battery: Battery, p: Tensor, times: Tensor, rtol: float = 1e-5) -> Tensor:
    """``(T,)``, volts."""
    y = discharge(battery, p, times, rtol).y
    return torch.stack([battery.voltage(t, state.unsqueeze(-1), inputs(p)).reshape(()) for t, state in zip(times, y, strict=True)])


# %%
def main(quick: bool = False, out: Path | None = None) -> float:
    """Solve, compare, fit, draw. Returns the largest error of a parameter in its own standard deviations."""
    out = Path(__file__).parent / "figures" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    seconds = 600.0 if quick else 3000.0
    battery = build(5 if quick else 10, seconds)
    times = torch.linspace(0.0, seconds, 13 if quick else 31, dtype=torch.float64)
    solution = battery.simulation.solve([0, seconds], inputs=dict(zip(NAMES, TRUTH.tolist(), strict=True)), t_interp=times.numpy())
    theirs = torch.from_numpy(solution["Voltage [V]"](times.numpy()))
    begin = time.perf_counter()
    sol = discharge(battery, TRUTH, times)
    taken = time.perf_counter() - begin
    mine = voltages(battery, TRUTH, times)
    n = len(battery.y0)
    distance = float((mine - theirs).abs().max())
    print(f"{battery.n_rates} differential and {n - battery.n_rates} algebraic equations: {sol.stats.n_steps} steps, {taken:.1f} s")
    print(f"voltage: largest distance from PyBaMM's {1e3 * distance:.3f} mV")

    noise = torch.randn(len(times), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen, guess = theirs + NOISE * noise, TRUTH * torch.tensor([0.5, 2.0], dtype=torch.float64)
    residual = lambda z: (voltages(battery, guess * z.exp(), times) - seen) / NOISE  # noqa: E731
    begin = time.perf_counter()
    fit = least_squares(
        lambda z: residual(torch.from_numpy(z)).numpy(),
        np.zeros(2),
        jac=lambda z: torch.func.jacfwd(residual)(torch.from_numpy(z)).numpy(),
        xtol=1e-2 if quick else 1e-4,
        max_nfev=6 if quick else 10,
    )
    found = guess * torch.from_numpy(fit.x).exp()
    deviations = torch.from_numpy(np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac))))
    scores = ((found / TRUTH).log() / deviations).abs()
    print(f"fit: {fit.nfev} solves and {fit.njev} with derivatives, {time.perf_counter() - begin:.0f} s")
    for i, name in enumerate(NAMES):
        print(f"  {name}: {found[i]:.3e} +- {100 * deviations[i]:.1f} % (true {TRUTH[i]:.3e}, begun at {guess[i]:.3e})")
    rms = float(torch.from_numpy(fit.fun).square().mean().sqrt())
    print(f"  residual {rms:.2f} of the noise")
    draw(out, battery, times, seen, guess, found)
    assert distance < 5e-4 and float(scores.max()) < 4 and 0.5 < rms < 1.5
    return float(scores.max())


def draw(out: Path, battery: Battery, times: Tensor, seen: Tensor, guess: Tensor, found: Tensor) -> None:
    """Voltage curves, what is left, and concentrations in the particles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    fitted, first = voltages(battery, found, times), voltages(battery, guess, times)
    axes[0].plot(times / 60, seen, "o", ms=3, color="#444444", label="PyBaMM, with noise")
    axes[0].plot(times / 60, first, "--", color="#e8743b", lw=1, label="first guess")
    axes[0].plot(times / 60, fitted, color="#1b6ca8", label="fitted")
    axes[0].set(title="discharge at 1 C", xlabel="minutes", ylabel="V")
    axes[0].legend(frameon=False)
    axes[1].axhline(0, color="0.7", lw=0.8)
    axes[1].plot(times / 60, 1e3 * (seen - fitted), "o-", ms=3, lw=0.8, color="#c8102e")
    axes[1].set(title="measured minus fitted", xlabel="minutes", ylabel="mV")
    values = pybamm.ParameterValues("Marquis2019")
    solution = battery.simulation.solve([0, float(times[-1])], inputs=dict(zip(NAMES, found.tolist(), strict=True)), t_interp=times.numpy())
    for name, colour in (("Negative", "#8c6bb1"), ("Positive", "#2e8b57")):
        top = values[f"Maximum concentration in {name.lower()} electrode [mol.m-3]"]
        at = solution[f"{name} particle surface concentration [mol.m-3]"](times.numpy())
        axes[2].fill_between(times / 60, at.min(0) / top, at.max(0) / top, color=colour, alpha=0.4, label=name.lower())
    axes[2].set(title="surfaces of the particles", xlabel="minutes", ylabel="part of the maximum")
    axes[2].legend(frameon=False)
    figure.savefig(out / "battery_dfn.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(given.quick, given.out)
