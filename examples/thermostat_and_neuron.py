# %% [markdown]
# Two switches: a thermostat and a neuron
#
# A thermostat turns its heater on at one temperature and off at another: a mode, set by events. What a period costs, and how cost and
# number of switchings depend on the insulation and on the two settings, comes from one solve with an integral (`quadrature=`) across all
# switchings; the period is held against its closed form.
#
# A leaky integrate-and-fire neuron fires where its voltage meets a threshold, and is reset. Its input is a table of currents
# (`adjoint.Forcing`); gradient descent on that table moves its spikes to where they are wanted, through derivatives of spike times that
# go through every reset before.

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import adjoint

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


# %%
def room(t: Tensor, x: Tensor, heating: Tensor, loss: Tensor, power: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Warmth above that outside; the loss is the insulation's."""
    return torch.where(heating == 1, power, torch.zeros_like(power)) - loss * x


SWITCHES = [
    adjoint.Event(lambda t, x, m, loss, power, low, high: x[0] - high, 1, reset=lambda t, x, m, *p: (x, 0 * m), name="off"),
    adjoint.Event(lambda t, x, m, loss, power, low, high: x[0] - low, -1, reset=lambda t, x, m, *p: (x, 0 * m + 1), name="on"),
]


def thermostat(p: Tensor, hours: float = 24.0, **options: object) -> adjoint.Solution:
    """A day from the lower setting on, with the heat that was spent as its integral."""
    spent = lambda t, x, m, loss, power, low, high: power * m  # noqa: E731
    return adjoint.solve_ivp(
        room,
        (0.0, hours),
        p[2].reshape(1),
        args=tuple(p),
        events=SWITCHES,
        mode=torch.ones(()).double(),
        quadrature=spent,
        **TIGHT,
        **options,
    )


def period(p: Tensor) -> Tensor:
    """In closed form."""
    loss, power, low, high = p
    return (((power / loss - low) / (power / loss - high)).log() + (high / low).log()) / loss


# %%
THRESHOLD, MEMBRANE = 1.0, 10.0
WANTED = torch.tensor([14.0, 28.0, 52.0, 72.0, 86.0], dtype=torch.float64)
SPIKE = adjoint.Event(
    lambda t, v, u: v[0] - THRESHOLD, direction=1, reset=lambda t, v, u: torch.zeros_like(v), terminal=len(WANTED), name="spike"
)


def neuron(currents: Tensor, **options: object) -> adjoint.Solution:
    """Until the last spike that is wanted, with a current that is linear between its knots; times in ms."""
    knots = torch.linspace(0.0, 100.0, len(currents), dtype=currents.dtype)
    leak = lambda t, v, u: (u(t) - v) / MEMBRANE  # noqa: E731
    return adjoint.solve_ivp(
        leak, (0.0, 1000.0), torch.zeros(1).double(), (adjoint.Forcing(knots, currents),), events=SPIKE, compile=True, **TIGHT, **options
    )


def trained(steps: int) -> tuple[Tensor, list[float]]:
    """Currents whose spikes are where they are wanted, by Gauss-Newton steps that prefer plain currents, and the course of the misfit."""
    one = torch.eye(21, dtype=torch.float64)
    plain, usual = torch.cat([0.02 * one.diff(dim=0), 0.005 * one]), torch.full((21,), 1.2, dtype=torch.float64)
    currents, course = usual, []
    for _ in range(steps):
        currents = currents.requires_grad_()
        times = neuron(currents).events["spike"].t
        slope = torch.stack([torch.autograd.grad(x, currents, retain_graph=True)[0] for x in times])
        off = (WANTED[: len(times)] - times).detach()
        course.append(float(off.abs().max()))
        # no more than three milliseconds a step
        right = torch.cat([off.clamp(-3.0, 3.0), plain @ (usual - currents.detach())])
        currents = (currents + torch.linalg.lstsq(torch.cat([slope, plain]), right.unsqueeze(-1)).solution[:, 0]).detach()
    return currents, course


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> float:
    """Both, with figures. Returns the largest error of a spike time in ms."""
    p = torch.tensor([0.5, 12.0, 18.0, 21.0], dtype=torch.float64, requires_grad=True)
    sol = thermostat(p)
    on = sol.events["on"].t
    assert torch.allclose(on[1] - on[0], period(p), rtol=1e-8)
    found, wanted = (torch.autograd.grad(x, p, retain_graph=True)[0] for x in (on[1] - on[0], period(p)))
    print(f"thermostat: period {float(period(p).detach()):.6f} h, its derivatives {[round(float(x), 6) for x in found]}")
    assert torch.allclose(found, wanted, rtol=1e-6)
    (cost,) = torch.autograd.grad(sol.quadrature, p)
    print(f"heat of a day {float(sol.quadrature.detach()):.2f}; d/d(loss, power, low, high) {[round(float(x), 3) for x in cost]}")
    currents, course = trained(5 if quick else 12)
    spikes = neuron(currents).events["spike"].t
    print(f"neuron: misfit {course[0]:.1f} ms at first, {course[-1]:.4f} at last; spikes at {[round(float(x), 3) for x in spikes]} ms")
    assert course[-1] < (10.0 if quick else 0.01)
    draw(out, p.detach(), currents)
    return course[-1]


def draw(out: Path, p: Tensor, currents: Tensor) -> None:
    """Jumps are jumps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    day = thermostat(p, 12.0, dense_output=True)
    axes[0].plot(*day.curve(), color="#1b6ca8")
    for name, colour in (("on", "#c8102e"), ("off", "0.4")):
        record = day.events[name]
        axes[0].plot(record.t, record.y[:, 0], "o", color=colour, ms=5, label=name)
    axes[0].set(title="warmth of a room", xlabel="hours")
    axes[0].legend(frameon=False)
    fired = neuron(currents, dense_output=True)
    axes[1].plot(*fired.curve(), color="#1b6ca8", label="voltage")
    axes[1].plot(torch.linspace(0, 100, len(currents)), currents, color="#e8743b", label="current")
    axes[1].vlines(WANTED, 1.0, 1.15, color="#c8102e", label="wanted")
    axes[1].axhline(THRESHOLD, color="0.7", lw=0.8)
    axes[1].set(title="a neuron that learned when to fire", xlabel="ms")
    axes[1].legend(frameon=False)
    figure.savefig(out / "thermostat_and_neuron.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    given = parser.parse_args()
    main(given.quick, given.out)
