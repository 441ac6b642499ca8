"""What `tests.fuzz.hybrid` draws beside: doses, resets and knots exactly where something else is, samples of their own times and at events,
shorter schedules, solves of the same functions with other numbers before."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from .hybrid_case import ENDED, IMPLICIT, SHARES, Case

__all__ = ["parted", "tied", "wider"]

#: of doses, of events at known times, of tables, of switches
DOSED = ("start", "end", "sample", "twin", "near")
INFUSED = ("until end", "until sample", "until near", "chained")
CLOCKED = ("clock sample", "clock dose", "clock start", "clock end", "clock near")
TABLED = ("knot sample", "knot start", "knot end")
#: by how much times that are near each other differ
NEAR = (1e-6, -1e-6, 1e-9, -1e-9, 1e-11, -1e-11)


def wider(case: Case, cheap: bool = False, share: float | None = None) -> Case:
    """The case with more to it, from the same seed. ``share``: of those that can be compiled these are."""
    r = random.Random(f"more {case.seed}")

    def chance(share: float) -> bool:
        return r.random() < share

    plain = case.door in ("layer", "odeint", "odeint_event")
    if not plain and not case.dose and not case.backwards and chance(0.4):
        case = replace(case, dose=r.choice(["bolus", "infusion", "lag", "both"]), dose_rows=case.rows > 0 and chance(0.5))
    if case.event == "reset" and not case.single and chance(0.4):
        case = replace(case, event="clock")
    ties = []
    if case.dose:
        ties += DOSED + (INFUSED if case.dose in ("infusion", "both") else ()) + (("beside",) if case.dose == "both" else ())
    if case.event == "clock" and not case.single:
        ties += [tie for tie in CLOCKED if case.dose or tie != "clock dose"]
    ties += TABLED if case.table else ()
    ties += ("switch sample",) if case.switch else ()
    # times that differ by less than their rounding are one
    ties = [tie for tie in ties if not (case.single and "near" in tie)]
    drawn = set(r.sample(ties, min(len(ties), r.choice([0, 1, 1, 2])))) if ties else set()
    samples = not (case.dead or case.event in ENDED or plain)
    output, wanted = case.output, any("sample" in tie or "near" in tie for tie in drawn)
    if samples and (chance(0.7) if wanted else chance(0.15)):
        output = r.choice(["samples", "samples", "list", "dense"])
        output = "samples" if (case.mapped and output != "samples") or (output == "dense" and case.gradient == "checkpoints") else output
    if samples and case.event in ("reset", "recorded", "two", "same", "mode", "held") and not case.single and chance(0.25):
        output = "mark"
    alone = case.event not in ("most", *ENDED) and not (case.event == "clock" and case.door in IMPLICIT) and not case.dead
    if case.dose in ("bolus", "lag") and alone and chance(0.15):
        output = "given"
    compiled = case.compiled or (cheap and not plain and chance(0.1))
    if share is not None:
        able = not plain and case.gradient in ("", "swept")
        compiled = able and random.Random(f"compiled {case.seed}").random() < share
    new = {
        "acts": case.rows > 0 and case.door != "odeint_event" and chance(0.3),
        "begins": case.ragged and not any("start" in tie for tie in drawn) and chance(0.4),
        "inside": case.mapped and case.derivative != "hessian" and chance(0.4),
        "spread": not {*INFUSED, "beside", "clock dose"} & drawn and chance(0.4),
    }
    given_rows = (case.table_rows and bool(case.table)) or (case.dose_rows and bool(case.dose))
    differ = case.rate_rows or case.ragged or given_rows or new["acts"]
    return replace(
        case,
        **new,
        shared=case.mapped and differ and chance(0.3),
        ties=" ".join(sorted(tie.replace(" ", "-") for tie in drawn)),
        output=output,
        marks=output in ("samples", "list") and samples and chance(0.5),
        pad=case.own and case.dose_rows and bool(case.dose) and not {"end", "until end", "twin", "chained"} & drawn and chance(0.3),
        again=not plain and chance(0.4 if compiled else 0.1),
        compiled=compiled,
        small=r.choice(NEAR),
        scalars=r.randrange(1000),
    )


def tied(case: Case, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with times that are others; each is still one by itself."""
    row = 0 if case.dead or not case.rows else case.seed % case.rows
    begin, end = (x[row] if x.dim() else x for x in (p["begin"], p["end"]))
    p = {name: x.clone() for name, x in p.items()}

    def moment(share: float) -> Tensor:
        return begin + share * (end - begin)

    def put(name: str, i: int, value: Tensor) -> None:
        if p[name].dim() == 2:
            p[name][i, row] = value
        else:
            p[name][i] = value

    def of(name: str, i: int) -> Tensor:
        return (p[name][i, row] if p[name].dim() == 2 else p[name][i]).clone()

    first = 0.4 if case.output == "dense" else 0.21
    ties = {tie.replace("-", " ") for tie in case.ties.split()}
    lag = p["lag"] if case.dose == "lag" else 0.0
    if case.dose == "lag" and ties & set(DOSED):
        p["lag"].zero_()
        lag = 0.0
    if "beside" in ties:
        # as the time at which boluses come behind the start of infusions
        p["duration"].fill_(0.01)
    if "sample" in ties:
        put("times", 0, moment(first))
        put("times", 1, moment(0.77))
    if "near" in ties:
        put("times", 0, moment(first) + case.small)
    if "start" in ties:
        put("times", 0, begin)
    if "end" in ties:
        put("times", 1, end)
    if "until sample" in ties:
        put("times", 0, moment(0.5) - p["duration"])
    if "until near" in ties:
        put("times", 0, moment(0.5) - p["duration"] + case.small)
    if "until end" in ties:
        put("times", 1, end - p["duration"])
    if "twin" in ties:
        p["times"][1] = p["times"][0]
    if "chained" in ties:
        p["times"][1] = p["times"][0] + p["duration"]
    for tie, value in (("clock sample", moment(0.5)), ("clock near", moment(0.5) + case.small), ("clock start", begin), ("clock end", end)):
        if tie in ties:
            p["clock"] = value.clone()
    if "clock dose" in ties:
        p["clock"] = of("times", 0) + lag
    if "knot sample" in ties:
        put("knots", 1, moment(0.5))
    if "knot start" in ties:
        put("knots", 0, begin)
    if "knot end" in ties:
        put("knots", 3 if float(end) > float(of("knots", 2)) + 0.05 else 2, end)
    if "switch sample" in ties:
        p["s"] = moment(0.5)
    if case.marks:
        shares = torch.tensor(SHARES)
        length = p["end"] - p["begin"]
        p["marks"] = p["begin"] + (shares.unsqueeze(-1) * length if length.dim() else shares * length)
    if case.output == "mark":
        p["mark"] = torch.tensor(0.5)
    return p


def parted(case: Case, p: dict[str, Tensor]) -> Tensor:
    """Which of the doses ``(K, B)`` are given, where some trajectories have fewer."""
    given = torch.ones(p["times"].shape[0], case.rows, dtype=torch.bool)
    given[1, case.rows - 1] = not case.pad
    return given
