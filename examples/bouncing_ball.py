# %% [markdown]
# A bouncing ball heard: restitution and drag from times of contact
#
# A ball is dropped, and a microphone gives the times at which it meets the floor, with a jitter of a fifth of a millisecond. From these
# alone come the height that it was dropped from, the restitution of the floor and the drag of the air: contacts are events with a reset,
# and their times are differentiated through all bounces before. Gauss-Newton steps, then standard errors from the Jacobian.
#
# Data: synthetic, made here.

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import adjoint

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
GRAVITY, BOUNCES, JITTER = 9.81, 12, 2e-4
TRUTH = torch.tensor([1.0, 0.85, 0.03], dtype=torch.float64)
NAMES = ("height (m)", "restitution", "drag (1/m)")


# %%
def flight(t: Tensor, y: Tensor, drag: Tensor, restitution: Tensor) -> Tensor:
    """Height and velocity; quadratic drag."""
    return torch.stack([y[1], -GRAVITY - drag * y[1] * y[1].abs()])


def rebound(t: Tensor, y: Tensor, drag: Tensor, restitution: Tensor) -> Tensor:
    return torch.stack([y[0], -restitution * y[1]])


CONTACT = adjoint.Event(lambda t, y, *args: y[0], direction=-1, reset=rebound, terminal=BOUNCES, name="contact")


def drop(logs: Tensor, dense: bool = False) -> adjoint.Solution:
    """From the drop to the last contact, for the logarithms of height, restitution and drag."""
    height, restitution, drag = logs.exp()
    start = torch.stack([height, 0 * height])
    return adjoint.solve_ivp(flight, (0.0, 60.0), start, (drag, restitution), events=CONTACT, dense_output=dense, compile=True, **TIGHT)


def contacts(logs: Tensor) -> Tensor:
    return drop(logs).events["contact"].t


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> Tensor:
    """Listen, fit, draw. Returns the estimates."""
    with torch.no_grad():
        exact = contacts(TRUTH.log())
        heard = exact + JITTER * torch.randn(BOUNCES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logs = torch.tensor([0.8, 0.8, 0.01], dtype=torch.float64).log()
    for _ in range(15):
        logs = logs.requires_grad_()
        t = contacts(logs)
        slope = torch.stack([torch.autograd.grad(x, logs, retain_graph=True)[0] for x in t])
        step = torch.linalg.lstsq(slope, (heard - t).unsqueeze(-1).detach()).solution[:, 0]
        logs = (logs + step * (0.1 / step[:2].abs().max()).clamp(max=1.0)).detach()
    errors = JITTER * torch.linalg.inv(slope.T @ slope).diagonal().sqrt()
    p = logs.exp()
    for name, value, error, true in zip(NAMES, p, errors * p, TRUTH, strict=True):
        print(f"{name:12s} {float(value):.5f} +- {float(error):.5f} (true {float(true):g})")
    assert bool(((logs - TRUTH.log()).abs() < 4 * errors).all())
    draw(out, logs, heard, slope)
    return p


def draw(out: Path, logs: Tensor, heard: Tensor, slope: Tensor) -> None:
    """The flight, its velocity with jumps as jumps, and what later contacts tell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    t, y = drop(logs, dense=True).curve(60)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(t, y[:, 0], color="#1b6ca8")
    axes[0].plot(heard, 0 * heard, "|", color="#c8102e", ms=12, label="heard")
    axes[0].set(title="height (m)", xlabel="s")
    axes[0].legend(frameon=False)
    axes[1].plot(t, y[:, 1], color="#1b6ca8")
    axes[1].set(title="velocity (m/s)", xlabel="s")
    for i, name in enumerate(NAMES):
        axes[2].semilogy(range(1, BOUNCES + 1), slope[:, i].abs().masked_fill(slope[:, i] == 0, float("nan")) / 100, ".-", label=name)
    axes[2].set(title="seconds for 1 % more of", xlabel="contact")
    axes[2].legend(frameon=False)
    figure.savefig(out / "bouncing_ball.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    given = parser.parse_args()
    main(given.quick, given.out)
