# %% [markdown]
# Power flow of a real grid, and what every load does to its losses and to its weakest voltage
#
# In the steady state of an alternating-current grid the power that flows into every bus equals what is generated minus what is consumed
# there. The unknowns are the voltage angles at all buses but the reference, and the voltage magnitudes where no generator holds them. The
# equations are written here in torch, solved from a flat start, and compared with pandapower's own solution. Then two numbers are
# differentiated in the active and reactive power of all loads: the active losses of the whole grid, and the lowest voltage among the
# buses where no generator holds it. Each costs one solve with the transposed Jacobian, however many loads there are. For some loads the
# derivative is checked by running pandapower again with the load changed; two are followed over a wide range, with second derivatives.
#
# Data: the IEEE 118-bus case (part of the American Midwest as of 1962) by default; `--case case1354pegase` and `--case case9241pegase`
# are parts and whole of the European grid (Fliscounakis et al. 2013, doi 10.1109/TPWRS.2013.2251015; Josz et al. 2016,
# arXiv:1603.01533). They come with pandapower (BSD 3-clause; Thurner et al. 2018, doi 10.1109/TPWRS.2018.2829021), which also makes the
# admittance matrix. The positions of the buses on the figure are pandapower's layout, not geography.
#
# Limits: loads draw constant power, generators hold their voltage however much reactive power that takes, and everything that a changed
# load asks for comes from the reference bus. Derivatives are those of this model at one operating point.

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandapower
import pandapower.networks
import torch
from torch import Tensor

from adjoint import solve_root

CASES = ("case118", "case1354pegase", "case9241pegase")


# %%
class Grid(NamedTuple):
    """Per unit; ``rows``, ``cols``, ``g``, ``b`` are the entries of the admittance matrix ``g + jb``, in pandapower's internal order."""

    rows: Tensor
    cols: Tensor
    g: Tensor
    b: Tensor
    held: Tensor  # voltage magnitudes, (n,), of meaning where a generator holds them
    reference_angle: float
    free_angle: Tensor  # buses
    free_voltage: Tensor  # buses
    injected: Tensor  # power of generators, (n, 2): active, reactive
    demand: Tensor  # power of loads, (n, 2)
    load_bus: Tensor  # of every load, internal
    base: float  # MVA


def run_pandapower(net: Any) -> None:
    """pandapower's own Newton iteration, to a tight tolerance."""
    pandapower.runpp(net, tolerance_mva=1e-9, init="dc", numba=False)


def read(net: Any) -> Grid:
    """What the equations need, from a grid that pandapower has solved once."""
    inside, base = net._ppc["internal"], float(net._ppc["baseMVA"])
    Y = inside["Ybus"].tocoo()
    n = Y.shape[0]
    assert len(net._ppc["bus"]) == n, "buses out of service are not handled here"
    real = lambda x: torch.as_tensor(np.asarray(x).real.copy(), dtype=torch.float64)  # noqa: E731
    index = lambda x: torch.as_tensor(np.asarray(x).astype(np.int64))  # noqa: E731
    load_bus = index(net._pd2ppc_lookups["bus"][net.load.bus.to_numpy()])
    each = torch.stack([real(net.load.p_mw * net.load.scaling), real(net.load.q_mvar * net.load.scaling)], -1) / base
    demand = torch.zeros(n, 2, dtype=torch.float64).index_add(0, load_bus, each)
    total = torch.stack([real(inside["Sbus"]), real(inside["Sbus"].imag)], -1)
    V = inside["V"]
    (reference,) = inside["ref"]
    return Grid(
        rows=index(Y.row),
        cols=index(Y.col),
        g=real(Y.data),
        b=real(Y.data.imag),
        held=real(abs(V)),
        reference_angle=float(np.angle(V[reference])),
        free_angle=index(np.concatenate([inside["pv"], inside["pq"]])),
        free_voltage=index(inside["pq"]),
        injected=total + demand,
        demand=demand,
        load_bus=load_bus,
        base=base,
    )


def voltages(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Angles and magnitudes at all buses from the unknowns."""
    angle, magnitude = x.split([len(grid.free_angle), len(grid.free_voltage)])
    angles = torch.full_like(grid.held, grid.reference_angle).index_copy(0, grid.free_angle, angle)
    return angles, grid.held.index_copy(0, grid.free_voltage, magnitude)


def power(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Active and reactive power that every bus gives to the lines, (n,) each."""
    angle, V = voltages(x, grid)
    difference = angle[grid.rows] - angle[grid.cols]
    product = V[grid.rows] * V[grid.cols]
    active = product * (grid.g * difference.cos() + grid.b * difference.sin())
    reactive = product * (grid.g * difference.sin() - grid.b * difference.cos())
    zero = torch.zeros_like(V)
    return zero.index_add(0, grid.rows, active), zero.index_add(0, grid.rows, reactive)


def mismatch(x: Tensor, demand: Tensor, grid: Grid) -> Tensor:
    """What is zero: power given to the lines minus generated plus consumed, where it is not free to be anything."""
    active, reactive = power(x, grid)
    wanted = grid.injected - demand
    return torch.cat([(active - wanted[:, 0])[grid.free_angle], (reactive - wanted[:, 1])[grid.free_voltage]])


def flat_start(grid: Grid) -> Tensor:
    """All angles those of the reference, all free voltages nominal."""
    angle = torch.full((len(grid.free_angle),), grid.reference_angle, dtype=torch.float64)
    return torch.cat([angle, torch.ones(len(grid.free_voltage), dtype=torch.float64)])


def losses(x: Tensor, grid: Grid) -> Tensor:
    """Active power that goes into the grid and does not come out, per unit."""
    return power(x, grid)[0].sum()


# %%
class Result(NamedTuple):
    """The solution, derivatives in the demand of every bus, (n, 2), and second derivatives of the losses in the active demand of some."""

    x: Tensor
    losses: float
    weakest: int
    losses_by_demand: Tensor
    weakest_by_demand: Tensor
    curvature: dict[int, float]


def solve(grid: Grid) -> Result:
    """Power flow, both gradients, and the curvature of the losses at the buses of the costliest and of the largest load."""
    demand = grid.demand.clone().requires_grad_()
    begin = time.perf_counter()
    sol = solve_root(mismatch, flat_start(grid), (demand, grid))
    solved = time.perf_counter()
    work = sol.stats.log
    print(f"{len(sol.x)} unknowns; {sol.stats.n_newton} Newton steps, {sol.stats.n_factorizations} factorisations, {solved - begin:.2f} s")
    print(f"solver: {sol.note}")
    before = (sol.stats.n_factorizations, sol.stats.n_solves)
    V = voltages(sol.x, grid)[1]
    weakest = int(grid.free_voltage[V[grid.free_voltage].argmin()])
    lost = losses(sol.x, grid)
    (by_losses,) = torch.autograd.grad(lost, demand, create_graph=True)
    (by_weakest,) = torch.autograd.grad(V[weakest], demand, retain_graph=True)
    print(
        f"both gradients in {2 * len(grid.load_bus)} powers: {sol.stats.n_factorizations - before[0]} factorisation, "
        f"{work.n_solves - before[1]} right-hand sides, {time.perf_counter() - solved:.3f} s"
    )
    curvature = {}
    for bus in (int(grid.load_bus[by_losses[grid.load_bus, 0].argmax()]), int(grid.demand[:, 0].argmax())):
        curvature[bus] = float(torch.autograd.grad(by_losses[bus, 0], demand, retain_graph=True)[0][bus, 0])
    return Result(sol.x.detach(), float(lost.detach()), weakest, by_losses.detach(), by_weakest, curvature)


def losses_of(net: Any) -> float:
    """pandapower's losses in MW: what comes in minus what is consumed by loads (shunts count as losses)."""
    given = net.res_ext_grid.p_mw.sum() + net.res_gen.p_mw.sum() + net.res_sgen.p_mw.sum()
    return float(given - net.res_load.p_mw.sum())


def rerun(net: Any, load: int, scale: float, weakest: int) -> tuple[float, float]:
    """Losses in MW and the weakest voltage by pandapower with the active power of one load changed to ``scale`` times its own."""
    kept = net.load.p_mw.iloc[load]
    column = net.load.columns.get_loc("p_mw")
    net.load.iloc[load, column] = kept * scale
    try:
        run_pandapower(net)
        return losses_of(net), float(abs(net._ppc["internal"]["V"][weakest]))
    finally:
        net.load.iloc[load, column] = kept


class Check(NamedTuple):
    """One load: its derivatives by one transposed solve and by central differences of pandapower, and its course over a range."""

    load: int
    ours: tuple[float, float]
    theirs: tuple[float, float]


def check(net: Any, grid: Grid, found: Result, load: int) -> Check:
    """Derivatives of losses (MW per MW) and of the weakest voltage (per unit per MW) in the active power of one load."""
    part = 1e-3
    (more, more_v), (less, less_v) = (rerun(net, load, 1 + s * part, found.weakest) for s in (1, -1))
    width = 2 * part * float(net.load.p_mw.iloc[load] * net.load.scaling.iloc[load])
    bus = grid.load_bus[load]
    ours = (float(found.losses_by_demand[bus, 0]), float(found.weakest_by_demand[bus, 0]) / grid.base)
    return Check(load, ours, ((more - less) / width, (more_v - less_v) / width))


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures", case: str = "case118") -> float:
    """Solve, differentiate, check against pandapower, draw. Returns the largest relative error of a checked derivative."""
    net = getattr(pandapower.networks, case)()
    begin = time.perf_counter()
    run_pandapower(net)
    print(
        f"{case}: {len(net.bus)} buses, {len(net.load)} loads; "
        f"pandapower: {net._ppc['iterations']} steps, {time.perf_counter() - begin:.2f} s"
    )
    grid = read(net)
    reference = torch.from_numpy(net._ppc["internal"]["V"].copy())
    reference_losses = losses_of(net)
    found = solve(grid)
    angle, V = voltages(found.x, grid)
    distance = float((torch.polar(V, angle) - reference).abs().max())
    print(f"largest difference of a complex voltage from pandapower's: {distance:.1e}; losses {found.losses * grid.base:.4f} MW,")
    print(f"pandapower's {reference_losses:.4f} MW; weakest free voltage {V[found.weakest]:.4f} at bus {found.weakest}\n")

    of_load = found.losses_by_demand[grid.load_bus, 0], found.weakest_by_demand[grid.load_bus, 0]
    # the loads of the largest and the smallest derivative of the losses, and the one that the weakest voltage feels most
    chosen = [int(of_load[0].argmax()), int(of_load[0].argmin()), int(of_load[1].argmin())]
    checks = [check(net, grid, found, load) for load in dict.fromkeys(chosen)]
    print("load at bus   d losses / d load (MW/MW)      d weakest voltage / d load (per unit per GW)")
    print("                ours      pandapower            ours      pandapower")
    worst = 0.0
    scale = float(of_load[1].abs().max()) / grid.base
    for c in checks:
        bus = int(grid.load_bus[c.load])
        print(f"{bus:8d}     {c.ours[0]:10.6f} {c.theirs[0]:12.6f}       {1e3 * c.ours[1]:10.6f} {1e3 * c.theirs[1]:12.6f}")
        worst = max(worst, abs(c.ours[0] / c.theirs[0] - 1), abs(c.ours[1] - c.theirs[1]) / scale)
    print(f"largest relative error: {worst:.1e}")

    course = [0.0, 0.5, 1.0, 1.5, 2.0] if quick else [s / 10 for s in range(0, 31, 2)]
    # where the losses grow fastest and where most is drawn: how far do two derivatives tell the truth?
    shown = [int((grid.load_bus == bus).nonzero()[0]) for bus in found.curvature]
    courses = {load: [(s, rerun(net, load, s, found.weakest)[0]) for s in course] for load in shown}
    path = draw(net, grid, found, courses, case, Path(out))
    print(f"figure: {path}")
    assert distance < 1e-8 and abs(found.losses * grid.base - reference_losses) < 1e-6 and worst < 1e-4
    return worst


# %%
def draw(net: Any, grid: Grid, found: Result, courses: dict[int, list[tuple[float, float]]], case: str, out: Path) -> Path:
    """Both derivatives on the grid, the loads that matter most, and the straight line next to pandapower run again."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    inner = net._pd2ppc_lookups["bus"]
    place = np.full((len(grid.held), 2), np.nan)
    for bus, geo in net.bus.geo.items():
        place[inner[bus]] = json.loads(geo)["coordinates"]
    branches = net._ppc["branch"][:, :2].real.astype(int)
    loads = grid.load_bus.unique().numpy()
    names = {int(inner[bus]): bus for bus in net.bus.index}
    V = voltages(found.x, grid)[1].numpy()
    marginal = found.losses_by_demand[:, 0].numpy()
    sagging = -found.weakest_by_demand[:, 0].numpy() / grid.base * 1e6  # per unit per MW to 0.001 per unit per GW
    # over the decades: near loads count hundreds of times more; those that count least, or lift the voltage, share one colour
    highest = sagging[loads].max()
    sagging = np.clip(sagging, highest / 1e3, None)
    size = np.clip(6000 / len(V), 14, 60)
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(13.5, 11), layout="constrained")

    limit = np.abs(marginal[loads]).max()
    for panel, values, title, label, colours in (
        (a, marginal, "what a load adds to the losses", "MW of losses per MW of load", dict(cmap="RdBu_r", vmin=-limit, vmax=limit)),
        (
            b,
            sagging,
            f"what a load takes from the weakest voltage (bus {names[found.weakest]}: {V[found.weakest]:.3f})",
            "0.001 per unit per GW of load (lowest colour: or less)",
            dict(cmap="viridis_r", norm=LogNorm(highest / 1e3, highest)),
        ),
    ):
        panel.add_collection(LineCollection(list(place[branches]), colors="0.75", linewidths=0.8, zorder=1))
        panel.scatter(*place.T, s=size / 4, color="0.6", zorder=2)
        dots = panel.scatter(*place[loads].T, c=values[loads], s=size, edgecolors="0.3", linewidths=0.3, zorder=3, **colours)
        panel.set(title=title, xticks=[], yticks=[], aspect="equal")
        panel.autoscale_view()
        fig.colorbar(dots, ax=panel, shrink=0.8, label=label)
    b.scatter(*place[found.weakest], s=260, marker="*", color="tab:red", zorder=2.5, label="weakest voltage not held by a generator")
    (reference,) = net._ppc["internal"]["ref"]
    a.scatter(*place[reference], s=150, marker="s", facecolors="none", edgecolors="black", linewidths=1.5, zorder=4, label="reference bus")
    a.legend(loc="best", fontsize=9)
    b.legend(loc="best", fontsize=9)

    order = loads[np.argsort(marginal[loads])]
    most = np.concatenate([order[:8], order[-8:]])
    at = np.arange(len(most))
    reactive = found.losses_by_demand[:, 1].numpy()
    c.barh(at + 0.2, marginal[most], 0.4, color="tab:blue", label="active (MW per MW)")
    c.barh(at - 0.2, reactive[most], 0.4, color="tab:orange", label="reactive (MW per Mvar)")
    c.set_yticks(at, [f"bus {names[int(bus)]}" for bus in most], fontsize=8)
    c.axvline(0, color="black", lw=0.8)
    c.axhline(7.5, color="0.6", ls=":", lw=1)
    c.set(title="losses per load: the eight lowest and the eight highest", xlabel="derivative of the losses")
    c.legend(loc="lower right", fontsize=9)

    for (load, course), colour in zip(courses.items(), ("tab:red", "tab:green"), strict=False):
        bus, drawn = int(grid.load_bus[load]), float(net.load.p_mw.iloc[load] * net.load.scaling.iloc[load])
        power_mw = np.array([s * drawn for s, _ in course])
        base = found.losses * grid.base
        change = power_mw - drawn
        line = base + marginal[bus] * change
        d.plot(change, [value for _, value in course], "o", ms=5, color=colour, label=f"bus {names[bus]}: pandapower, run again")
        d.plot(change, line, "--", lw=1, color=colour, label="first derivative")
        smooth = np.linspace(change[0], change[-1])
        parabola = base + marginal[bus] * smooth + found.curvature[bus] / grid.base * smooth**2 / 2
        d.plot(smooth, parabola, "-", lw=1.5, color=colour, label="first and second derivative")
    d.plot(0, found.losses * grid.base, "k+", ms=14, mew=2, label="the case as it is")
    d.set(title="losses when one load changes", xlabel="change of the load (MW)", ylabel="losses of the grid (MW)")
    d.grid(alpha=0.3)
    d.legend(fontsize=9)
    fig.suptitle(f"{case}: {len(V)} buses, {len(grid.load_bus)} loads, losses {found.losses * grid.base:.1f} MW")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "power_flow.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs of pandapower")
    parser.add_argument("--case", choices=CASES, default="case118", help="which grid")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out, options.case)
