# %% [markdown]
# Which rate constants govern glycolysis in the parasite of sleeping sickness
#
# Trypanosoma brucei lives on glucose in its host's blood, and its glycolysis is a drug target. The model (Kerkhoven et al. 2013, model A,
# from Achcar et al. 2012) has 24 concentrations in two compartments, 21 reactions and 90 constants; its rates lie between 1 and 10^6 per
# minute, so that explicit methods are of no use. It is read from SBML by the few lines below, run from the published start to its
# steady state, and differentiated: all of d log(concentration) / d log(constant), 24 x 90 numbers, by one
# sweep backwards through a batch of 24 copies, one for each concentration.
#
# Three checks: concentrations and derivatives against libRoadRunner's (CVODE on its own reading of the file, and differences;
# data/kerkhoven2013_reference.json), concentrations against SciPy's LSODA, and a theorem: multiplying the speed of every reaction by one
# factor is the same as running the clock faster, so the derivatives in all speeds add up to t d log(y)/dt, row by row, which is zero at
# the steady state (the summation theorem of metabolic control analysis, Kacser & Burns 1973).
#
# Data: BioModels BIOMD0000000513, CC0 1.0; see data/README.md.

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

import adjoint

DATA = Path(__file__).parent / "data" if "__file__" in globals() else Path("data")
SBML, REFERENCE = DATA / "kerkhoven2013_glycolysis.xml", DATA / "kerkhoven2013_reference.json"
TIMES = [0.01, 0.1, 1.0, 10.0, 100.0]  # minutes
SLOPES = [1, 4]  # of these times the derivatives are taken
NS = {"s": "http://www.sbml.org/sbml/level2/version4", "m": "http://www.w3.org/1998/Math/MathML"}
SPEED = re.compile(r"(Vmax|_k\d?)$")  # constants that a reaction's speed is proportional to


# %%
@dataclass(frozen=True)
class Network:
    """A reaction network: ``y' = stoichiometry @ rates(y, p)``."""

    species: list[str]
    constants: list[str]
    reactions: list[str]
    start: Tensor  # (n,), concentrations
    values: Tensor  # (m,), of the constants
    stoichiometry: Tensor  # (n, r), over the volume of the compartment
    code: Any

    def rates(self, y: Tensor, p: Tensor) -> Tensor:
        """Speeds of the reactions (..., r) at concentrations (..., n) and constants (..., m)."""
        return torch.stack(torch.broadcast_tensors(*eval(self.code, {}, {"y": y.unbind(-1), "p": p.unbind(-1)})), -1)

    def __call__(self, t: Any, y: Tensor, p: Tensor) -> Tensor:
        """The right-hand side."""
        return self.rates(y, p) @ self.stoichiometry.T


def formula(node: ElementTree.Element, names: dict[str, str]) -> str:
    """MathML as Python; ``names`` says what stands for an identifier, among them ``lambda``s for functions."""
    tag, children = node.tag.split("}")[1], list(node)
    if tag == "math":
        return formula(children[0], names)
    if tag == "ci":
        return names[(node.text or "").strip()]
    if tag == "cn":
        if node.get("type", "real") not in ("real", "integer"):
            raise ValueError(f"numbers of type {node.get('type')!r} are not read")
        return repr(float(node.text or ""))
    if tag != "apply":
        raise ValueError(f"MathML element {tag!r} is not read")
    head, parts = children[0].tag.split("}")[1], [formula(child, names) for child in children[1:]]
    if head == "ci":
        return f"{formula(children[0], names)}({', '.join(parts)})"
    if head == "minus" and len(parts) == 1:
        return f"(-{parts[0]})"
    sign = {"plus": "+", "minus": "-", "times": "*", "divide": "/", "power": "**"}.get(head)
    if sign is None:
        raise ValueError(f"MathML operator {head!r} is not read")
    return "(" + f" {sign} ".join(parts) + ")"


def read_sbml(path: Path) -> Network:
    """Read species, local constants, function definitions and reactions; a file with anything else that acts is refused."""
    model = ElementTree.parse(path).getroot().find("s:model", NS)
    assert model is not None
    for other in ("Rules", "InitialAssignments", "Events", "Parameters", "Constraints"):
        if model.find(f"s:listOf{other}", NS) is not None:
            raise ValueError(f"listOf{other} is not read")
    volume = {c.get("id", ""): float(c.get("size", "1")) for c in model.iterfind("s:listOfCompartments/s:compartment", NS)}
    names: dict[str, str] = {name: repr(size) for name, size in volume.items()}
    species, start, home = [], [], []
    for s in model.iterfind("s:listOfSpecies/s:species", NS):
        if s.get("hasOnlySubstanceUnits") == "true" or s.get("constant", "false") != s.get("boundaryCondition", "false"):
            raise ValueError(f"species {s.get('id')!r}: amounts, and boundary species that change, are not read")
        concentration, name = float(s.attrib["initialConcentration"]), s.attrib["id"]
        if s.get("boundaryCondition") == "true":
            names[name] = repr(concentration)
        else:
            names[name] = f"y[{len(species)}]"
            species.append(name)
            start.append(concentration)
            home.append(volume[s.attrib["compartment"]])
    for f in model.iterfind("s:listOfFunctionDefinitions/s:functionDefinition", NS):
        body = f.find("m:math/m:lambda", NS)
        assert body is not None
        arguments = [(a[0].text or "").strip() for a in body.findall("m:bvar", NS)]
        inside = formula(list(body)[-1], {a: a for a in arguments})
        names[f.attrib["id"]] = f"(lambda {', '.join(arguments)}: {inside})"
    constants, values, reactions, sources = [], [], [], []
    columns = []
    for reaction in model.iterfind("s:listOfReactions/s:reaction", NS):
        local = dict(names)
        for p in reaction.iterfind("s:kineticLaw/s:listOfParameters/s:parameter", NS):
            local[p.attrib["id"]] = f"p[{len(constants)}]"
            constants.append(p.attrib["id"])
            values.append(float(p.attrib["value"]))
        column = [0.0] * len(species)
        for side, sign in (("Reactants", -1.0), ("Products", 1.0)):
            for r in reaction.iterfind(f"s:listOf{side}/s:speciesReference", NS):
                if r.attrib["species"] in species:
                    i = species.index(r.attrib["species"])
                    column[i] += sign * float(r.get("stoichiometry", "1")) / home[i]
        law = reaction.find("s:kineticLaw/m:math", NS)
        assert law is not None
        reactions.append(reaction.attrib["id"])
        sources.append(formula(law, local))
        columns.append(column)
    tensor = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    code = compile(f"({', '.join(sources)},)", str(path), "eval")
    return Network(species, constants, reactions, tensor(start), tensor(values), tensor(columns).T.contiguous(), code)


# %%
def sensitivities(network: Network, times: list[float], method: str, tol: float = 1e-8) -> tuple[Tensor, Tensor, dict[str, float]]:
    """``y`` (T, n) and d log(y) / d log(p) (2, n, m), by one solve and one sweep backwards for each of the times in ``SLOPES``."""
    n = len(network.species)
    p = network.values.expand(n, -1).clone().requires_grad_()  # a copy of the constants for each concentration to be differentiated
    begin = time.perf_counter()
    sol = adjoint.solve_ivp(
        network,
        (0.0, times[-1]),
        network.start.expand(n, -1),
        args=(p,),
        t_eval=times,
        method=method,
        rtol=tol,
        atol=tol / 100,
        batched=True,
    )
    work = {"steps": float(sol.stats.n_steps.max()), "solve": time.perf_counter() - begin}
    rows = []
    for y in sol.y[SLOPES]:
        (slope,) = torch.autograd.grad(y.diagonal().log().sum(), p, retain_graph=True)
        rows.append(slope * network.values)
    work["sweeps"] = time.perf_counter() - begin - work["solve"]
    return sol.y[:, 0].detach(), torch.stack(rows), work


def lsoda(network: Network, times: list[float]) -> Tensor:
    """Concentrations (T, n) by SciPy; LSODA makes its own Jacobian by differences."""
    from scipy.integrate import solve_ivp

    p = network.values
    rate = lambda t, y: network(t, torch.from_numpy(y), p).numpy()  # noqa: E731
    sol = solve_ivp(rate, (0.0, times[-1]), network.start.numpy(), method="LSODA", t_eval=times, rtol=1e-9, atol=1e-12)
    return torch.from_numpy(sol.y.T.copy())


def theorem(network: Network, y: Tensor, slopes: Tensor, t: float) -> float:
    """How far the derivatives in all speeds are from adding up to ``t d log(y)/dt``."""
    speeds = torch.tensor([bool(SPEED.search(name)) for name in network.constants])
    clock = t * network(t, y, network.values) / y
    return float((slopes[:, speeds].sum(1) - clock).abs().max())


def flux_control(network: Network, y: Tensor, slopes: Tensor, reaction: str) -> Tensor:
    """d log(rate of ``reaction``) / d log(p) (m,), the constants acting on it directly and through the concentrations."""
    inputs = (y.clone().requires_grad_(), network.values.clone().requires_grad_())
    in_y, in_p = torch.autograd.grad(network.rates(*inputs)[network.reactions.index(reaction)].log(), inputs)
    return (in_y * y) @ slopes + in_p * network.values


def expected(network: Network) -> tuple[Tensor, Tensor]:
    """libRoadRunner's concentrations (T, n) and derivatives (2, n, m), in our order."""
    table = json.loads(REFERENCE.read_text())
    assert table["times"] == TIMES and table["slope_times"] == [TIMES[i] for i in SLOPES]
    rows = [table["species"].index(name) for name in network.species]
    columns = [table["constants"].index(name) for name in network.constants]
    y, slopes = (torch.tensor(table[key], dtype=torch.float64) for key in ("y", "slopes"))
    return y[:, rows], slopes[:, rows][:, :, columns]


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> float:
    """Solve, check, draw. Returns the largest distance of a derivative at the end to libRoadRunner's."""
    network, tol = read_sbml(SBML), 1e-5 if quick else 1e-7
    jacobian = torch.func.jacrev(lambda y: network(0.0, y, network.values))
    y, slopes, work = sensitivities(network, TIMES, "bdf", tol)
    fastest = float(torch.linalg.eigvals(jacobian(y[-1])).abs().max())
    print(f"{len(network.species)} concentrations, {len(network.reactions)} reactions, {len(network.constants)} constants")
    print(f"fastest rate {fastest:.1e} per minute: 100 minutes would cost an explicit method some {fastest * TIMES[-1] / 3:.0e} steps")
    print(f"bdf, tolerance {tol:g}: {work['steps']:.0f} steps, solve {work['solve']:.1f} s, two sweeps backwards {work['sweeps']:.1f} s")

    want_y, want_slopes = expected(network)
    off = [float((y / want_y - 1).abs().max()), *((slopes - want_slopes).abs().amax((1, 2)).tolist())]
    scipy = float((y / lsoda(network, TIMES) - 1).abs().max())
    sums = [theorem(network, want_y[i], slopes[k], TIMES[i]) for k, i in enumerate(SLOPES)]
    print(f"largest relative distance of a concentration to libRoadRunner's {off[0]:.1e}, to SciPy's {scipy:.1e}")
    for k, i in enumerate(SLOPES):
        size = float(slopes[k].abs().max())
        print(
            f"derivatives at {TIMES[i]:g} min (up to {size:.1f}): distance to libRoadRunner's {off[1 + k]:.1e}, to the sums {sums[k]:.1e}"
        )

    control = flux_control(network, y[-1], slopes[-1], "GlcT_c")
    best = control.abs().argsort(descending=True)[:8].tolist()
    total = float(control[[i for i, name in enumerate(network.constants) if SPEED.search(name)]].sum())
    print(
        f"control of the uptake of glucose, by all speeds {total:.8f}:",
        ", ".join(f"{network.constants[i]} {float(control[i]):.3f}" for i in best),
    )
    path = draw(network, slopes, control, Path(out))
    print(f"figure: {path}")
    assert abs(total - 1) < 1e-4
    loose = 30 if quick else 1
    assert off[0] < 1e-4 * loose and scipy < 1e-4 * loose and off[2] < 1e-5 * loose and off[1] < 1e-3 * loose and max(sums) < 1e-4 * loose
    return off[2]


# %%
def draw(network: Network, slopes: Tensor, control: Tensor, out: Path) -> Path:
    """Concentrations over time, the constants that the uptake depends on, and the heat map at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    with torch.no_grad():
        times = torch.logspace(-6, 2, 200, dtype=torch.float64)
        sol = adjoint.solve_ivp(
            network, (0.0, 100.0), network.start, args=(network.values,), t_eval=times, method="bdf", rtol=1e-5, atol=1e-8
        )
    fig = plt.figure(figsize=(17, 11), layout="constrained")
    top, bottom = np.asarray(fig.subfigures(2, 1, height_ratios=(0.75, 1))).tolist()
    a, b = top.subplots(1, 2, width_ratios=(1.5, 1))
    want, _ = expected(network)
    for k, name in enumerate(("ATP_g", "ADP_g", "AMP_g", "Glc6P_g", "Fru16BP_g", "_13BPGA_g", "NADH_g", "_3PGA_c", "PEP_c", "Pyr_c")):
        row = network.species.index(name)
        a.loglog(times, sol.y[:, row], label=name.strip("_"))
        a.plot(TIMES, want[:, row], "o", ms=4, color=f"C{k}")
    a.plot([], [], "ko", ms=4, label="libRoadRunner")
    a.set(title="glycolysis of T. brucei from the published start", xlabel="minutes", ylabel="mM")
    a.legend(fontsize=8, ncols=2)
    best = control.abs().argsort(descending=True)[:12].tolist()
    labels = [network.constants[i].strip("_") for i in best]
    bars = b.barh(labels, control[best], color=["tab:blue" if SPEED.search(name) else "0.6" for name in labels])
    b.bar_label(bars, fmt="%.3f", fontsize=8, padding=3)
    b.invert_yaxis()
    b.margins(x=0.15)
    b.axvline(0, color="k", lw=0.8)
    b.set(title="d log(uptake of glucose) / d log(constant) at the steady state\nblue: speeds (they add up to 1)")
    c = bottom.subplots()
    table = slopes[-1]
    image = c.imshow(table, aspect="auto", cmap="RdBu_r", norm=SymLogNorm(1e-2, vmin=-10, vmax=10), interpolation="nearest")
    c.set_xticks(range(len(network.constants)), [name.strip("_") for name in network.constants], rotation=90, fontsize=7)
    c.set_yticks(range(len(network.species)), [name.strip("_") for name in network.species], fontsize=8)
    c.set_title("d log(concentration) / d log(constant) at the steady state")
    bottom.colorbar(image, ax=c, shrink=0.9, extend="both", pad=0.01)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "glycolysis.png"
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


def reference() -> None:
    """Write the reference: libRoadRunner's concentrations, and fourth-order differences of them for the derivatives."""
    import roadrunner  # pyright: ignore[reportMissingImports]

    # the constants are local to their reactions in the file: made global, for they cannot be changed otherwise
    tree = ElementTree.parse(SBML).getroot()
    model = tree.find("s:model", NS)
    assert model is not None
    everyone = ElementTree.Element(f"{{{NS['s']}}}listOfParameters")
    for law in model.iterfind("s:listOfReactions/s:reaction/s:kineticLaw", NS):
        local = law.find("s:listOfParameters", NS)
        assert local is not None
        everyone.extend(local)
        law.remove(local)
    model.insert(list(model).index(model.find("s:listOfReactions", NS)), everyone)  # pyright: ignore[reportArgumentType]
    runner = roadrunner.RoadRunner(ElementTree.tostring(tree, encoding="unicode"))
    runner.integrator.relative_tolerance, runner.integrator.absolute_tolerance = 1e-12, 1e-15
    runner.integrator.setValue("maximum_num_steps", 1_000_000)
    species, constants = list(runner.model.getFloatingSpeciesIds()), list(runner.model.getGlobalParameterIds())
    runner.timeCourseSelections = ["time", *(f"[{name}]" for name in species)]

    def run() -> np.ndarray:
        runner.reset()
        return np.array(runner.simulate(times=[0.0, *TIMES]))[1:, 1:]

    plain, slopes, width = run(), [], 2e-3
    for name in constants:
        value, logs = runner.model[name], {}
        for factor in (-2, -1, 1, 2):
            runner.model[name] = value * np.exp(width * factor)
            logs[factor] = np.log(run()[SLOPES])
        runner.model[name] = value
        slopes.append((8 * (logs[1] - logs[-1]) - (logs[2] - logs[-2])) / (12 * width))
    table = {"times": TIMES, "slope_times": [TIMES[i] for i in SLOPES], "species": species, "constants": constants}
    table |= {"y": plain.tolist(), "slopes": np.round(np.stack(slopes, -1), 8).tolist()}
    REFERENCE.write_text(json.dumps(table, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="looser tolerances")
    parser.add_argument("--reference", action="store_true", help="make the reference again (needs libroadrunner)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    if options.reference:
        reference()
    else:
        main(options.quick, options.out)
