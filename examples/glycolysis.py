# %% [markdown]
# Which rate constants govern glycolysis in the parasite of sleeping sickness
#
# Trypanosoma brucei lives on glucose in its host's blood, and its glycolysis is a drug target. The model (Kerkhoven et al. 2013, model A,
# from Achcar et al. 2012) has 24 concentrations in two compartments, 21 reactions and 90 constants; its rates lie between 1 and 10^6 per
# minute, so that explicit methods are of no use. It is read from SBML by the few lines below, run from the published start to its
# steady state, and differentiated: all of d log(concentration) / d log(constant), 24 x 90 numbers, by one
# sweep backwards through a batch of 24 copies, one for each concentration.
#
# Three checks that owe nothing to this library: concentrations and derivatives against libRoadRunner's (CVODE on its own reading of
# the file; data/kerkhoven2013_reference.json), concentrations against SciPy's LSODA, and a theorem: multiplying the speed of every reaction by one factor
# is the same as running the clock faster, so the derivatives in all speeds sum up to t d log(y)/dt, row by row, which is zero at
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
        network, (0.0, times[-1]), network.start.expand(n, -1), args=(p,), t_eval=times, method=method, rtol=tol, atol=tol / 100, batched=True
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


def clock(network: Network, y: Tensor, t: float) -> Tensor:
    """``t d log(y)/dt`` (n,)."""
    return t * network(t, y, network.values) / y


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
