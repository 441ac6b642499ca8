# %% [markdown]
# The phosphorus cycle of the ocean in twelve boxes, fitted to the World Ocean Atlas
#
# Phosphate is taken up by plankton at the surface. A part leaves as dissolved organic phosphorus, which decays in the water; the rest
# sinks as particles and is remineralised below. The circulation carries both dissolved forms. The steady state is found with the total
# amount of phosphorus kept, and seventeen parameters (circulation, mixing, uptake, fate of organic matter) are fitted to the
# mean phosphate of the twelve boxes and to the carbon that the five surface boxes export, by Newton's method with exact Hessians.
# The Hessian at the optimum gives the uncertainty of parameters and concentrations. At last every box is predicted from the others.
#
# Model: box volumes, circulation, mixing, sinking and organic matter are those of the box model of C. Voelker and Y. Ye, "Feedbacks between
# ocean productivity and organic iron complexation in reaction to changes in ocean iron supply" (github.com/a270091/ocean-iron-boxmodel),
# without its iron cycle: uptake here is U P / (P + K), with one rate U for every surface box, which stands for light, iron and
# whatever else limits growth. The 21 flows between its boxes are taken apart into closed loops here, so that they can change in strength
# and still conserve water. Year of 360 days, as there.
#
# Data: mean phosphate of the boxes as averaged there from the World Ocean Atlas 2009 (Garcia et al. 2010, NOAA Atlas NESDIS 70; public
# domain), in micromol per litre. Exported carbon after the satellite estimate of Laws et al. 2000 (doi 10.1029/1999GB001229): the code
# has two sets of numbers, of which the one in use is the result of a fit to phosphate; the one that it keeps beside is taken here.
#
# Chosen by judgement: the standard deviation of a box mean, 0.2 micromol/l, which is far more than the error of the atlas and stands for
# what a model of twelve boxes cannot know (with 0.1, tried first, the boxes that are left out fall outside of two standard deviations too
# often); that of a logarithm of an export, 0.4; the priors (median and width of each are in the table that is printed), wide for uptake
# and mixing and 30 % for overturning. The part of the Southern Ocean's particles that ends in its own deep box has two published values,
# 0.06 and 0.2; with the first one held fixed the phosphate of the deep Southern Ocean cannot be had, so it is fitted too.
#
# Limits: with 17 observations and 17 parameters the priors matter, and the table says where they alone speak. The total of phosphorus comes
# from the same twelve means (dissolved organic phosphorus included), so a box that is left out is still counted in the total.

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from adjoint import Laplace, Parameter, ParameterSpace, SteadyStateObjective

# North Pacific, equatorial Pacific, Southern Ocean, equatorial Atlantic, North Atlantic surface; Pacific, Atlantic intermediate; Pacific
# deep, Southern Ocean deep, North Atlantic deep; Pacific bottom, Atlantic bottom. "Pacific" includes the Indian Ocean.
NAMES = ["NPS", "EqPS", "SOS", "EqAS", "NAS", "PIW", "AIW", "PDW", "SOD", "NADW", "PBW", "ABW"]
NPS, EQPS, SOS, EQAS, NAS, PIW, AIW, PDW, SOD, NADW, PBW, ABW = range(12)
VOLUME = torch.tensor(  # m^3
    [3.817e15, 1.562e16, 1.155e16, 4.276e15, 2.578e15, 1.789e17, 4.486e16, 5.486e17, 7.830e16, 1.925e17, 2.661e17, 9.946e16],
    dtype=torch.float64,
)
PHOSPHATE = torch.tensor([0.73, 0.43, 1.16, 0.34, 0.32, 1.93, 1.43, 2.64, 2.28, 1.58, 2.36, 1.88], dtype=torch.float64)
EXPORT = torch.tensor([1.87, 2.83, 2.66, 1.20, 1.53], dtype=torch.float64)  # Pg carbon per year, from the surface boxes
PHOSPHATE_STD, EXPORT_STD = 0.2, 0.4
SURFACE = 5

# loops of water: strength in Sv (10^6 m^3/s) and the boxes that it goes through, back to the first
LOOPS: dict[str, list[tuple[float, list[int]]]] = {
    "NADW": [
        (6.0, [NAS, NADW, SOD, PBW, PDW, SOS, PIW, AIW, EQAS]),
        (2.0, [NAS, NADW, SOD, PBW, PDW, SOS, AIW, EQAS]),
        (5.0, [NAS, NADW, PDW, PIW, AIW, EQAS]),
        (5.0, [NAS, NADW, AIW, EQAS]),
        (1.0, [NAS, NADW, SOD, PBW, PDW, PIW, EQPS, NPS]),
    ],
    "Pacific": [(16.0, [SOS, SOD, PBW, PDW])],
    "Atlantic bottom": [(4.0, [SOD, ABW, NADW]), (3.0, [NADW, ABW])],
    "": [(3.0, [PIW, EQPS, NPS])],  # not fitted
}
# two-way exchange in Sv between a surface box and one below
MIXING = [(PIW, NPS, 31.59), (PIW, EQPS, 38.13), (AIW, EQAS, 27.04), (NADW, NAS, 12.03), (PDW, SOS, 4.12), (NADW, SOS, 23.85)]
SV_YEAR = 1e6 * 360 * 86400
CARBON = 106 * 12 * 1e-18  # Pg of carbon per mmol of phosphorus
HALF_SATURATION = 0.5  # micromol/l, customary in models of this kind
DECAY = 0.5  # of dissolved organic phosphorus, per year

SPACE = ParameterSpace(
    {
        "overturning": Parameter(torch.ones(3), lower=0.0, prior=Normal(0.0, 0.3), prior_on="real"),
        "mixing": Parameter(
            torch.tensor([m[2] for m in MIXING]),
            lower=0.0,
            prior=Normal(torch.tensor([m[2] for m in MIXING]).log(), 0.7),
            prior_on="real",
        ),
        "uptake": Parameter(torch.ones(SURFACE), lower=0.0, prior=Normal(0.0, 1.0), prior_on="real"),
        "deep": Parameter(0.15, lower=0.0, upper=1.0, prior=Normal(torch.tensor(0.15).logit(), 0.5), prior_on="real"),
        "southern": Parameter(0.12, lower=0.0, upper=1.0, prior=Normal(torch.tensor(0.12).logit(), 1.0), prior_on="real"),
        "dissolved": Parameter(0.67, lower=0.0, upper=1.0, prior=Normal(torch.tensor(0.67).logit(), 0.5), prior_on="real"),
    }
)
LABELS = [
    *(f"overturning, {name}" for name in LOOPS if name),
    *(f"mixing {NAMES[j]}-{NAMES[i]} (Sv)" for i, j, _ in MIXING),
    *(f"uptake {name} (umol/l/yr)" for name in NAMES[:SURFACE]),
    "sinking below intermediate",
    "Southern particles to SOD",
    "dissolved part of production",
]


# %%
def loop_matrix(strength: float, path: list[int]) -> Tensor:
    """``(12, 12)``: water gained by the row's box from the column's, in Sv; what leaves a box is negative on the diagonal."""
    T = torch.zeros(12, 12, dtype=torch.float64)
    for source, goal in zip(path, [*path[1:], path[0]], strict=True):
        T[goal, source] += strength
        T[source, source] -= strength
    return T


CELLS = torch.stack([sum((loop_matrix(*loop) for loop in loops), torch.zeros(12, 12, dtype=torch.float64)) for loops in LOOPS.values()])
EXCHANGES = torch.stack([loop_matrix(1.0, [i, j]) for i, j, _ in MIXING])


def sinking(deep: Tensor, southern: Tensor) -> Tensor:
    """``(12, 5)``: which part of the particles from every surface box is remineralised where; columns sum to one.

    ``deep`` is the part that sinks below the intermediate waters of Pacific and Atlantic; of it, 2/15 reaches the bottom. ``southern`` is
    the part of the Southern Ocean's particles that ends in the deep Southern Ocean.
    """
    one, rest = torch.ones_like(deep), 1 - southern
    parts = {
        NPS: {PIW: 1 - deep, PDW: deep * 13 / 15, PBW: deep * 2 / 15},
        EQPS: {PIW: 1 - deep, PDW: deep * 13 / 15, PBW: deep * 2 / 15},
        SOS: {PDW: rest * 27 / 47, SOD: southern, NADW: rest * 18 / 47, PBW: rest / 47, ABW: rest / 47},
        EQAS: {AIW: 1 - deep, NADW: deep * 13 / 15, ABW: deep * 2 / 15},
        NAS: {NADW: 0.97 * one, ABW: 0.03 * one},
    }
    return torch.stack([torch.stack([parts[j].get(i, 0 * one) for j in range(SURFACE)]) for i in range(12)])


def uptake(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Of phosphate in the surface boxes, micromol/l per year, (5,)."""
    phosphate = x[0, :SURFACE]
    # the absolute value keeps an iteration that passes through negative phosphate away from the pole
    return p["uptake"] * phosphate / (phosphate.abs() + HALF_SATURATION)


def tendency(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Rates of change, per year, of phosphate (first row) and dissolved organic phosphorus (second) in the twelve boxes."""
    strength = torch.cat([p["overturning"], torch.ones_like(p["overturning"][:1])])
    transport = torch.einsum("c,cij->ij", strength, CELLS) + torch.einsum("m,mij->ij", p["mixing"], EXCHANGES)
    carried = SV_YEAR * (x @ transport.T) / VOLUME
    taken = uptake(x, p)
    particles = (1 - p["dissolved"]) * taken * VOLUME[:SURFACE]
    lost = torch.cat([taken, taken.new_zeros(12 - SURFACE)])
    decay = DECAY * x[1]
    gained = sinking(p["deep"], p["southern"]) @ particles / VOLUME
    return carried + torch.stack([gained + decay - lost, p["dissolved"] * lost - decay])


def export(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Carbon that leaves the surface boxes in organic matter, particles or dissolved, Pg per year, (5,)."""
    return (uptake(x, p) - DECAY * x[1, :SURFACE]) * VOLUME[:SURFACE] * CARBON


# %%
def posterior(kept: Tensor | None = None) -> SteadyStateObjective:
    """The negative logarithm of the posterior density, in real parameters; ``kept`` marks the boxes whose phosphate is used."""
    weights = torch.ones(12, dtype=torch.float64) if kept is None else kept.double()

    def f(x: Tensor, q: Tensor) -> Tensor:
        p = SPACE.quantities(q)
        phosphate = weights * ((x[0] - PHOSPHATE) / PHOSPHATE_STD).square()
        carbon = (export(x, p) / EXPORT).log() / EXPORT_STD
        return (phosphate.sum() + carbon.square().sum()) / 2 + SPACE.negative_log_prior(q)

    share = VOLUME / VOLUME.sum()
    total = (share * PHOSPHATE).sum().reshape(1)
    start = torch.stack([PHOSPHATE, torch.zeros_like(PHOSPHATE)])
    conserved = (torch.cat([share, share]).reshape(1, -1), total)
    # every steady state is looked for from the atlas: what is found then depends on the parameters alone, not on the way to them
    return SteadyStateObjective(f, SPACE.wrap(tendency), start, warm_start=False, conserved=conserved)


class Fit(NamedTuple):
    """The most probable parameters on the real line, their uncertainty, and the objective after every iteration."""

    q: Tensor
    laplace: Laplace
    history: list[float]


def fit(objective: SteadyStateObjective, start: Tensor) -> Fit:
    """Newton's method in a trust region."""
    history = [float(objective.value(start))]

    def note(intermediate_result: Any) -> None:
        history.append(float(intermediate_result.fun))

    result = objective.minimize(start, "trust-exact", callback=note, options={"gtol": 1e-6})
    # at the minimum rounding of the objective ends the iteration, whatever the optimiser calls it
    assert float(objective.gradient(result.p).norm()) < 1e-5, result.message
    return Fit(result.p, objective.laplace(result.p), history)


class Prediction(NamedTuple):
    """Phosphate of every box from the data of all others, and its standard deviation."""

    value: Tensor
    std: Tensor


def leave_one_out(start: Tensor, boxes: list[int]) -> Prediction:
    """Fit without one box at a time, and predict that one."""
    value, std = torch.full((12,), torch.nan, dtype=torch.float64), torch.full((12,), torch.nan, dtype=torch.float64)
    for box in boxes:
        found = fit(posterior(torch.arange(12) != box), start)
        v, s = found.laplace.predict_std(lambda x, q, box=box: x[0, box])
        value[box], std[box] = v[0], s[0]
    return Prediction(value, std)


def prior_only() -> Tensor:
    """Standard deviations of the real parameters under the prior, (17,)."""
    widths = [torch.as_tensor(p.prior.stddev, dtype=torch.float64).expand(SPACE.shapes[k]).reshape(-1) for k, p in SPACE.parameters.items()]
    return torch.cat(widths)


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> float:
    """Fit, predict, draw. Returns the root mean square misfit of phosphate."""
    begin = time.perf_counter()
    objective, start = posterior(), SPACE.initial(torch.float64)
    found = fit(objective, start)
    stats = objective.stats
    print(
        f"{len(found.history) - 1} iterations, {stats.n_states} steady states of 24 unknowns, {stats.n_newton} Newton steps,\n"
        f"{stats.n_factorizations} factorisations, {stats.n_solves} right-hand sides; {time.perf_counter() - begin:.1f} s\n"
    )
    flat = lambda q: torch.cat([v.reshape(-1) for v in SPACE.quantities(q).values()])  # noqa: E731
    errors, widths = found.laplace.standard_errors, prior_only()
    print("parameter                      prior   68 % range         fitted  68 % range       width to prior")
    rows = zip(
        LABELS,
        *(flat(v) for v in (start, start - widths, start + widths, found.q, found.q - errors, found.q + errors)),
        errors / widths,
        strict=True,
    )
    for label, *v in rows:
        print(f"{label:29s} {v[0]:6.2f} {v[1]:7.2f} - {v[2]:5.2f}  {v[3]:10.2f} {v[4]:7.2f} - {v[5]:5.2f}  {v[6]:10.2f}")

    state = objective.state(found.q)
    prior_state = objective.state(start)
    phosphate, std = found.laplace.predict_std(lambda x, q: x[0])
    exported, export_std = found.laplace.predict_std(lambda x, q: export(x, SPACE.quantities(q)).log())
    total, total_std = found.laplace.predict_std(lambda x, q: export(x, SPACE.quantities(q)).sum())
    boxes = [NPS, NADW] if quick else list(range(12))
    left_out = leave_one_out(found.q, boxes)
    print("\nbox    observed  before  fitted (std)    from the other boxes (std)")
    for k, name in enumerate(NAMES):
        other = f"{left_out.value[k]:8.2f} ({left_out.std[k]:.2f})" if k in boxes else ""
        print(f"{name:5s} {PHOSPHATE[k]:8.2f} {prior_state[0, k]:8.2f} {phosphate[k]:7.2f} ({std[k]:.2f}) {other}")
    rms = lambda v: float((v - PHOSPHATE)[~v.isnan()].square().mean().sqrt())  # noqa: E731
    scale = (left_out.std.square() + PHOSPHATE_STD**2).sqrt()
    hits = int((((left_out.value - PHOSPHATE) / scale).abs() < 2).sum())
    print(f"\nroot mean square misfit: {rms(prior_state[0]):.2f} before, {rms(phosphate):.2f} fitted, {rms(left_out.value):.2f} left out;")
    print(f"{hits} of {len(boxes)} left-out boxes within two standard deviations")
    print(f"export: {float(total[0]):.1f} +- {float(total_std[0]):.1f} Pg C per year (data: {float(EXPORT.sum()):.1f})")
    print(f"{time.perf_counter() - begin:.1f} s in all")
    path = draw(found, state, (phosphate, std), (exported, export_std), prior_state, left_out, Path(out))
    print(f"figure: {path}")
    gradient = objective.gradient(found.q)
    share = torch.cat([VOLUME, VOLUME]) / VOLUME.sum()
    kept = float((share * state.reshape(-1)).sum() - (share[:12] * PHOSPHATE).sum())
    assert float(gradient.norm()) < 1e-6 and abs(kept) < 1e-9 and rms(phosphate) < 1.5 * PHOSPHATE_STD
    return rms(phosphate)


# %%
def draw(
    found: Fit,
    state: Tensor,
    phosphate: tuple[Tensor, Tensor],
    exported: tuple[Tensor, Tensor],
    prior_state: Tensor,
    left_out: Prediction,
    out: Path,
) -> Path:
    """Boxes fitted and predicted, exports, what was learned of every parameter, how parameters hang together, the iteration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ((a, b, c), (d, e, g)) = plt.subplots(2, 3, figsize=(16, 9.6), layout="constrained")
    place = torch.arange(12)
    a.bar(place, PHOSPHATE, color="0.85", width=0.8, label="World Ocean Atlas")
    a.plot(place, prior_state[0], "x", color="0.45", label="before the fit")
    a.errorbar(place - 0.15, phosphate[0], 2 * phosphate[1], fmt="o", color="tab:blue", capsize=3, label="fitted (2 std)")
    a.errorbar(place + 0.15, left_out.value, 2 * left_out.std, fmt="s", color="tab:red", capsize=3, label="from the other boxes (2 std)")
    a.set_xticks(place.tolist(), NAMES, rotation=60)
    a.set(title="phosphate of the boxes", ylabel="micromol per litre", ylim=(None, 4.3))
    a.legend(fontsize=8)

    place = torch.arange(SURFACE)
    log_value, log_std = exported
    spread = math.exp(2 * EXPORT_STD)
    value, low, high = log_value.exp(), (log_value - 2 * log_std).exp(), (log_value + 2 * log_std).exp()
    b.errorbar(
        place - 0.1, EXPORT, [EXPORT * (1 - 1 / spread), EXPORT * (spread - 1)], fmt="s", color="0.5", capsize=4, label="data (2 std)"
    )
    b.errorbar(place + 0.1, value, [value - low, high - value], fmt="o", color="tab:blue", capsize=4, label="fitted (2 std)")
    b.set_xticks(place.tolist(), NAMES[:SURFACE])
    b.set(title="carbon exported from the surface", ylabel="Pg C per year", ylim=(0, None))
    b.legend(fontsize=8)

    ratio = found.laplace.standard_errors / prior_only()
    moved = (found.q - SPACE.initial(torch.float64)) / prior_only()
    rows = torch.arange(len(LABELS))
    names = [label.split(" (")[0] for label in LABELS]
    c.axvspan(-1, 1, color="0.93", label="prior, 1 std")
    c.axvline(0, color="0.6", lw=1)
    c.errorbar(moved, rows, xerr=ratio, fmt="o", color="tab:blue", capsize=3, label="posterior, 1 std")
    c.set_yticks(rows.tolist(), names, fontsize=8)
    c.invert_yaxis()
    c.set(title="what the data say of every parameter", xlabel="distance from the prior's median, in its std")
    c.legend(fontsize=8)

    scale = found.laplace.standard_errors
    image = d.imshow(found.laplace.covariance / (scale[:, None] * scale), cmap="RdBu_r", vmin=-1, vmax=1)
    d.set_xticks(rows.tolist(), names, rotation=90, fontsize=7)
    d.set_yticks(rows.tolist(), names, fontsize=7)
    d.set_title("posterior correlation")
    fig.colorbar(image, ax=d, shrink=0.85)

    order = state[0].argsort()
    e.barh(torch.arange(12), state[0][order], color="tab:blue", label="phosphate")
    e.barh(torch.arange(12), state[1][order], left=state[0][order], color="tab:orange", label="dissolved organic phosphorus")
    e.set_yticks(range(12), [f"{NAMES[i]} ({float(VOLUME[i]) / 1e15:.0f})" for i in order.tolist()], fontsize=8)
    e.set(title="where phosphorus is (volume in $10^{15}$ m$^3$)", xlabel="micromol per litre")
    e.legend(loc="lower right", fontsize=8)

    above = [value - found.history[-1] for value in found.history]
    g.semilogy([max(value, 1e-13) for value in above[:-1]], "o-", color="tab:blue")
    g.set(title="Newton in a trust region, exact Hessians", xlabel="iteration", ylabel="objective above its minimum")
    g.grid(alpha=0.3)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "ocean_phosphorus.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two boxes left out instead of all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out)
