# %% [markdown]
# A power network after a fault: swings, a relay that trips a line, and what the first peak depends on
#
# Three machines swing against each other through a network whose voltages are algebraic: six differential equations (rotor angles and
# speeds, classical model), eighteen algebraic ones (complex currents balance at nine buses), and the heat of an inverse-time relay. A short
# circuit near bus 7 begins at t = 0. The relay of the line 5-7 takes up |I|^2, and trips when it has had enough: an event that changes the
# mode of the equations, in which the line and the fault on it are gone, and from which the solve goes on with new consistent voltages. A
# second event is the first peak of the angle between machines 2 and 1, which must not pass about 180 degrees if they are to stay in step.
#
# The derivatives of that peak in the inertias and in the setting of the relay go through both events and the power flow that the start
# comes from. They are held against central differences.
#
# Data: the nine-bus system of Anderson & Fouad, Power System Control and Stability (WSCC case): lines, loads, machines. The fault's
# impedance and the relay are chosen here.

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adjoint import Event, Solution, solve_dae, solve_root
from adjoint.sensitivity import Gradient

OMEGA = 2 * math.pi * 60
#: from, to (counted from 1), resistance, reactance, half of the charging susceptance; per unit of 100 MVA
LINES = [
    (1, 4, 0.0, 0.0576, 0.0), (2, 7, 0.0, 0.0625, 0.0), (3, 9, 0.0, 0.0586, 0.0), (4, 5, 0.01, 0.085, 0.088), (4, 6, 0.017, 0.092, 0.079),
    (5, 7, 0.032, 0.161, 0.153), (6, 9, 0.039, 0.17, 0.179), (7, 8, 0.0085, 0.072, 0.0745), (8, 9, 0.0119, 0.1008, 0.1045),
]  # fmt: skip
TRIPPED = 5
LOADS = {5: 1.25 + 0.5j, 6: 0.9 + 0.3j, 8: 1.0 + 0.35j}
VOLTAGES, POWERS = (1.04, 1.025, 1.025), (1.63, 0.85)  # of buses 1 to 3; of machines 2 and 3
REACTANCE = torch.tensor([0.0608, 0.1198, 0.1813], dtype=torch.float64)
FAULT = 0.002j  # impedance of the short circuit
#: inertia constants H of the machines (s), and what the relay takes until it trips (per unit squared, times s)
P0 = torch.tensor([23.64, 6.4, 3.01, 0.75], dtype=torch.float64)
NAMES = ("inertia 1", "inertia 2", "inertia 3", "relay")
#: places in the state: angles, speeds, heat, voltages (real, imaginary)
ANGLE, SPEED, HEAT, REAL, IMAGINARY = slice(0, 3), slice(3, 6), 6, slice(7, 16), slice(16, 25)


def admittance(lines: list[tuple[int, int, float, float, float]]) -> Tensor:
    """The matrix of the network without machines and loads."""
    Y = torch.zeros(9, 9, dtype=torch.complex128)
    for a, b, r, x, half in lines:
        y = 1 / complex(r, x)
        Y[a - 1, a - 1] += y + 1j * half
        Y[b - 1, b - 1] += y + 1j * half
        Y[a - 1, b - 1] -= y
        Y[b - 1, a - 1] -= y
    return Y


class Start(NamedTuple):
    """The steady state before the fault: voltages, electromotive forces and powers of the machines, and loads as admittances."""

    V: Tensor
    E: Tensor
    angle: Tensor
    power: Tensor
    loads: Tensor


def power_flow() -> Start:
    """Voltages from powers, by Newton's method."""
    Y = admittance(LINES)
    size = torch.tensor([*VOLTAGES, *[1.0] * 6], dtype=torch.float64)
    drawn = torch.zeros(9, dtype=torch.complex128)
    for bus, s in LOADS.items():
        drawn[bus - 1] = s

    def voltage(x: Tensor) -> Tensor:
        return torch.polar(torch.cat([size[:3], x[8:]]), torch.cat([torch.zeros(1, dtype=x.dtype), x[:8]]))

    def balance(x: Tensor) -> Tensor:
        V = voltage(x)
        S = V * (Y @ V).conj() + drawn
        given = torch.tensor([*POWERS, *[0.0] * 6], dtype=torch.float64)
        return torch.cat([S.real[1:] - given, S.imag[3:]])

    V = voltage(solve_root(balance, torch.cat([torch.zeros(8), torch.ones(6)]).double()).x)
    S = V * (Y @ V).conj() + drawn
    current = (S[:3] / V[:3]).conj()
    E = V[:3] + 1j * REACTANCE * current
    return Start(V, E.abs(), E.angle(), (E * current.conj()).real, drawn.conj() / V.abs() ** 2)


def network(lines: list[tuple[int, int, float, float, float]], start: Start, fault: bool) -> Tensor:
    """With loads as constant admittances and, while it lasts, the short circuit at bus 7."""
    Y = admittance(lines) + torch.diag(start.loads)
    if fault:
        Y[6, 6] += 1 / FAULT
    return Y


def swing(start: Start):
    """``F(t, y, y', faulted, p)``: with the line, the fault and the relay's meter while ``faulted`` is one."""
    a, b, r, x, half = LINES[TRIPPED]
    series = 1 / complex(r, x)
    before = network(LINES, start, True)
    behind = network([x for i, x in enumerate(LINES) if i != TRIPPED], start, False)

    def residual(t: Tensor, y: Tensor, yp: Tensor, faulted: Tensor, p: Tensor) -> Tensor:
        V = torch.complex(y[REAL], y[IMAGINARY])
        emf = torch.polar(start.E, y[ANGLE])
        injected = (emf - V[:3]) / (1j * REACTANCE)
        power = (emf * injected.conj()).real
        Y = torch.where(faulted == 1, before, behind)
        current = Y @ V - torch.cat([injected, torch.zeros(6, dtype=injected.dtype)])
        flow = series * (V[b - 1] - V[a - 1]) + 1j * half * V[b - 1]
        return torch.cat(
            [
                yp[ANGLE] - OMEGA * y[SPEED],
                2 * p[:3] * yp[SPEED] - (start.power - power),
                (yp[HEAT] - faulted * flow.abs() ** 2).reshape(1),
                current.real,
                current.imag,
            ]
        )

    return residual


#: the relay has had enough: the line and the fault go, and new consistent voltages are found
TRIP = Event(
    lambda t, y, faulted, p: y[HEAT] - p[3], direction=1, reset=lambda t, y, faulted, p: (y, torch.zeros_like(faulted)), name="trip"
)


def peak_of(ends: bool) -> Event:
    """The first peak of the angle between machines 2 and 1, behind the fault."""
    rate = lambda t, y, faulted, p: y[SPEED][1] - y[SPEED][0]  # noqa: E731
    return Event(rate, direction=-1, terminal=ends, name="peak")


def course(p: Tensor, start: Start, rtol: float = 1e-8, after: float = 0.0, gradient: Gradient | None = None) -> Solution:
    """The fault, the trip, the first peak; ``after``: until when, beyond it."""
    y0 = torch.cat([start.angle, torch.zeros(4, dtype=torch.float64), start.V.real, start.V.imag])
    options = {"rtol": rtol, "atol": 1e-2 * rtol, "consistent": "solve", "gradient": gradient, "dense_output": bool(after)}
    events = [TRIP, peak_of(not after)]
    sol = solve_dae(swing(start), (0.0, after or 3.0), y0, args=(p,), events=events, mode=torch.ones(()).double(), **options)
    assert len(sol.events["trip"].t), "the relay did not trip"
    assert len(sol.events["peak"].t), "the machines fell out of step"
    return sol


def angle(y: Tensor) -> Tensor:
    """Between machines 2 and 1."""
    return y[..., 1] - y[..., 0]


# %%
def main(quick: bool = False, out: Path | None = None) -> float:
    """Solve, differentiate, compare with differences, draw. Returns the largest relative error of a derivative."""
    out = Path(__file__).parent / "figures" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    start = power_flow()
    print("rotor angles before the fault (degrees):", ", ".join(f"{float(x):.2f}" for x in torch.rad2deg(start.angle)))
    # those of the book: 2.27, 19.73 and 13.17
    assert torch.allclose(torch.rad2deg(start.angle), torch.tensor([2.27, 19.73, 13.17], dtype=torch.float64), atol=0.02)
    rtol = 1e-6 if quick else 1e-8
    begin = time.perf_counter()
    p = P0.clone().requires_grad_(True)
    found = course(p, start, rtol)
    top = angle(found.events["peak"].y[0])
    (slope,) = torch.autograd.grad(top, p)
    seconds = time.perf_counter() - begin
    trip, peak, when = (float(x.detach()) for x in (found.events["trip"].t[0], top, found.events["peak"].t[0]))
    print(f"the line trips at {trip:.4f} s; peak {math.degrees(peak):.2f} degrees at {when:.4f} s; with derivatives {seconds:.1f} s")
    worst = 0.0
    for i in [3] if quick else range(4):
        step = 1e-3 * float(P0[i])
        near = []
        for sign in (1, -1):
            moved = P0.clone()
            moved[i] += sign * step
            with torch.no_grad():
                near.append(float(angle(course(moved, start, 1e-3 * rtol if quick else 1e-2 * rtol).events["peak"].y[0])))
        difference = (near[0] - near[1]) / (2 * step)
        error = abs(float(slope[i]) / difference - 1)
        worst = max(worst, error)
        print(f"  d peak / d {NAMES[i]:10s} {math.degrees(float(slope[i])):9.4f} degrees; by differences {math.degrees(difference):9.4f}")
    with torch.no_grad():
        curves = {}
        for factor in (0.8, 1.0, 1.2) if not quick else (1.0,):
            moved = P0.clone()
            moved[3] *= factor
            curves[factor] = course(moved, start, 1e-6, after=2.0)
    draw(out, curves, start, slope.detach())
    assert worst < (1e-3 if quick else 1e-4)
    return worst


def draw(out: Path, curves: dict[float, Solution], start: Start, slope: Tensor) -> None:
    """Angles, voltages, and what the peak depends on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for factor, found in curves.items():
        t, y = found.curve(200)
        axes[0].plot(t, torch.rad2deg(angle(y)), label=f"relay x {factor:g}")
        for name, mark in (("trip", "k|"), ("peak", "k.")):
            record = found.events[name]
            axes[0].plot(record.t[:1], torch.rad2deg(angle(record.y[:1])), mark, ms=10 if name == "trip" else 5)
    axes[0].set(title="angle between machines 2 and 1", xlabel="time (s)", ylabel="degrees")
    axes[0].legend(frameon=False)
    t, y = curves[1.0].curve(200)
    for bus, colour in ((5, "#1b6ca8"), (7, "#c8102e"), (8, "#2e8b57")):
        axes[1].plot(t, torch.complex(y[:, REAL], y[:, IMAGINARY])[:, bus - 1].abs(), color=colour, label=f"bus {bus}")
    axes[1].set(title="voltages", xlabel="time (s)", ylabel="per unit", ylim=(0, 1.1))
    axes[1].legend(frameon=False)
    axes[2].barh(NAMES, torch.rad2deg(slope * P0) / 100, color="#e8743b")
    axes[2].axvline(0, color="0.6", lw=0.8)
    axes[2].set(title="peak: degrees for 1 % more of", xlabel="degrees")
    figure.savefig(out / "power_swing.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(given.quick, given.out)
