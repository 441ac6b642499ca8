"""Significant digits, steps and seconds on problems of the test set for initial value problem solvers.

End values are facts printed in the test set (Mazzia & Magherini, Test Set for Initial Value Problem Solvers, release 2.4, Bari 2008); the
problems are written anew. ``digits``: of the worst component, relative to its own size (scd there); ``mixed``: relative to that and
``atol / rtol`` (mescd there). SciPy's Radau and BDF solve the ordinary equations, at the same tolerances. ``native.``: by compiled code,
the first solve (reading ``fun``, and the C++ compiler or its code on disk) apart from a further one, and one with the gradient in the
initial state, whose digits along that state are by differences of tight solves.

    python -m benchmarks.ivp_testset                                  # the rows of DEFAULT; some minutes
    python -m benchmarks.ivp_testset ring:native.radau5:1e-7 beam:kvaerno5:1e-7 orego:scipy.Radau:1e-4

Results go to ``benchmarks/results/<date>-ivp-testset.md``, rewritten after every row.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adjoint

from .frameworks import torch_function
from .stiff_problems import PRINTED, STIFF

__all__ = ["DEFAULT", "PROBLEMS", "TestProblem", "digits"]

DEFAULT = [
    *(f"{name}:{method}:1e-4" for name in ("hires", "orego", "pollu", "vdpol") for method in ("radau5", "kvaerno5", "rodas5p", "bdf")),
    *(f"{name}:scipy.{method}:1e-4" for name in ("hires", "orego", "pollu", "vdpol") for method in ("Radau", "BDF")),
    *(f"{name}:{method}:1e-7" for name in ("hires", "orego", "pollu", "vdpol") for method in ("radau5", "rodas5p", "scipy.Radau")),
    *(
        f"{name}:native.{method}:{rtol}"
        for name in ("hires", "orego", "pollu", "vdpol", "ring")
        for method in ("radau5", "kvaerno5", "rodas5p", "bdf")
        for rtol in ("1e-4", "1e-7")
    ),
    "tube:native.radau:1e-4",
    "tube:native.radau:1e-6",
    "nand:native.radau:1e-4",
    "nand:native.radau:1e-6",
    "tube:radau:1e-4",
    "tube:radau:1e-6",
    "nand:bdf:1e-4",
    "nand:radau:1e-4",
]  # fmt: skip
F64 = torch.float64


@dataclass(frozen=True)
class TestProblem:
    """``y' = fun(t, y)``, or ``fun(t, y, y') = 0`` where it is ``implicit``, from ``y0`` at 0 to ``end``, where it is ``truth``.

    ``small``: absolute tolerances are ``small * rtol``. ``jumps``: named times at which ``fun`` is not smooth.
    ``apart``: parts of the initial state between which differences are taken.
    """

    text: str
    fun: Callable[..., Tensor]
    y0: Any
    end: float
    truth: Any
    small: float = 1.0
    implicit: bool = False
    jumps: list[float] = field(default_factory=list)
    apart: float = 1e-3


def ring(t: Tensor, y: Tensor) -> Tensor:
    """The ring modulator, 15 states, with the parasitic capacitance of 2e-12, which makes it oscillate fast."""
    u1, u2 = 0.5 * torch.sin(2e3 * math.pi * t), 2 * torch.sin(2e4 * math.pi * t)
    U, J = y[:7], y[7:]
    w = U[6] + u2
    over = torch.stack([U[2] - U[4] - w, -U[3] + U[5] - w, U[3] + U[4] + w, -U[2] - U[5] + w])
    q = 40.67286402e-9 * torch.expm1(17.7493332 * over)
    rates = [
        (J[0] - 0.5 * J[2] + 0.5 * J[3] + J[6] - U[0] / 25e3) / 1.6e-8,
        (J[1] - 0.5 * J[4] + 0.5 * J[5] + J[7] - U[1] / 25e3) / 1.6e-8,
        (J[2] - q[0] + q[3]) / 2e-12,
        (-J[3] + q[1] - q[2]) / 2e-12,
        (J[4] + q[0] - q[2]) / 2e-12,
        (-J[5] - q[1] + q[3]) / 2e-12,
        (-U[6] / 50 + q[0] + q[1] - q[2] - q[3]) / 1e-8,
        -U[0] / 4.45,
        -U[1] / 4.45,
        (0.5 * U[0] - U[2] - 17.3 * J[2]) / 5e-4,
        (-0.5 * U[0] + U[3] - 17.3 * J[3]) / 5e-4,
        (0.5 * U[1] - U[4] - 17.3 * J[4]) / 5e-4,
        (-0.5 * U[1] + U[5] - 17.3 * J[5]) / 5e-4,
        (-U[0] + u1 - 86.3 * J[6]) / 2e-3,
        (-U[1] - 636.3 * J[7]) / 2e-3,
    ]
    return torch.stack(rates)


def beam(t: Tensor, y: Tensor) -> Tensor:
    """An elastic beam of 40 pieces, clamped at one end; the force at the other ends at pi."""
    n = 40
    angle, speed = y[:n], y[n:]
    s, c = torch.sin(angle.diff()), torch.cos(angle.diff())
    ends = (-3 * angle[:1] + angle[1:2], angle[-2:-1] - angle[-1:])
    bend = torch.cat([ends[0], angle[:-2] - 2 * angle[1:-1] + angle[2:], ends[1]]) * n**4
    force = torch.where(t <= math.pi, 1.5 * torch.sin(t) ** 2, 0.0)
    v = bend + n**2 * force * (torch.cos(angle) + torch.sin(angle))
    none = y.new_zeros(1)

    def turned(x: Tensor) -> Tensor:
        return torch.cat([s * x[1:], none]) - torch.cat([none, s * x[:-1]])

    matrix = torch.diag(torch.tensor([1.0, *[2.0] * (n - 2), 3.0], dtype=y.dtype)) - torch.diag(c, 1) - torch.diag(c, -1)
    return torch.cat([speed, matrix @ v + turned(torch.linalg.solve(matrix, turned(v) + speed**2))])


def _pulse(t: Tensor, delay: float, high: float, period: float) -> tuple[Tensor, Tensor]:
    """A pulse of 5 V with flanks of five units, and its slope."""
    x = torch.remainder(t, period)
    rise, stay, fall = delay + 5, delay + 5 + high, delay + 10 + high
    inside = [x > fall, x > stay, x > rise, x > delay]
    none = torch.zeros_like(x)
    value, slope = none, none
    for where, v, d in zip(reversed(inside), (x - delay, none + 5, fall - x, none), (none + 1, none, none - 1, none), strict=True):
        value, slope = torch.where(where, v, value), torch.where(where, d, slope)
    return value, slope


def _channel(depletion: bool, vds: Tensor, vgs: Tensor, vbs: Tensor, vgd: Tensor, vbd: Tensor) -> Tensor:
    """The current of a transistor (Shichman & Hodges)."""
    threshold, gamma, phi, beta = (-2.43, 0.2, 1.28, 5.35e-4) if depletion else (0.2, 0.035, 1.01, 1.748e-3)

    def half(vds: Tensor, vg: Tensor, vb: Tensor) -> Tensor:
        x = vg - threshold - gamma * (torch.sqrt((phi - vb).clamp(min=1e-12)) - math.sqrt(phi))
        flow = torch.where(x <= vds, x**2, vds * (2 * x - vds)) * (-beta) * (1 + 0.02 * vds)
        return torch.where(x <= 0, 0.0, flow)

    return torch.where(vds > 0, half(vds, vgs, vbs), torch.where(vds < 0, -half(-vds, vgd, vbd), 0.0))


def nand(t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """A NAND gate of MOS transistors, 14 voltages: implicit equations of index 0 with a matrix that depends on the state."""
    (v1, d1), (v2, d2) = _pulse(t, 5.0, 5.0, 20.0), _pulse(t, 15.0, 15.0, 40.0)
    a, b = [y[0], *y.unbind()], [slope[0], *slope.unbind()]

    def capacity(v: Tensor) -> Tensor:
        return 2.4e-5 * torch.where(v <= 0, (1 - v.clamp(max=0) / 0.87) ** -0.5, 1 + v / 1.74)

    def leak(v: Tensor) -> Tensor:
        return torch.where(v <= 0, -1e-14 * torch.expm1(v.clamp(max=0) / 25.85), 0.0)

    first = _channel(True, a[2] - a[1], a[5] - a[1], a[3] - a[5], a[5] - a[2], a[4] - 5)
    second = _channel(False, a[7] - a[6], v1 - a[6], a[8] - a[10], v1 - a[7], a[9] - a[5])
    third = _channel(False, a[12] - a[11], v2 - a[11], a[13], v2 - a[12], a[14] - a[10])
    source = leak(a[3] - a[5]) + leak(a[9] - a[5])
    gate, drop = 0.6e-4, [capacity(a[i] - a[j]) * (b[i] - b[j]) for i, j in ((3, 5), (9, 5), (8, 10), (14, 10))]
    rows = [
        gate * (b[1] - b[5]) + (a[1] - a[5]) / 4 + first,
        gate * (b[2] - b[5]) + (a[2] - 5) / 4 - first,
        drop[0] + (a[3] + 2.5) / 10 - leak(a[3] - a[5]),
        capacity(a[4] - 5) * b[4] + (a[4] + 2.5) / 10 - leak(a[4] - 5),
        gate * (2 * b[5] - b[1] - b[2]) - drop[0] - drop[1] + 0.5e-4 * b[5] + (2 * a[5] - a[1] - a[7]) / 4 + source,
        gate * (b[6] - d1) + (a[6] - a[10]) / 4 + second,
        gate * (b[7] - d1) + (a[7] - a[5]) / 4 - second,
        drop[2] + (a[8] + 2.5) / 10 - leak(a[8] - a[10]),
        drop[1] + (a[9] + 2.5) / 10 - leak(a[9] - a[5]),
        -drop[2] - drop[3] + 0.5e-4 * b[10] + (2 * a[10] - a[6] - a[12]) / 4 + leak(a[8] - a[10]) + leak(a[14] - a[10]),
        gate * (b[11] - d2) + a[11] / 4 + third,
        gate * (b[12] - d2) + (a[12] - a[10]) / 4 - third,
        capacity(a[13]) * b[13] + (a[13] + 2.5) / 10 - leak(a[13]),
        drop[3] + (a[14] + 2.5) / 10 - leak(a[14] - a[10]),
    ]
    return torch.stack(rows)


_PIPES = [
    (1, 2), (2, 3), (2, 6), (3, 4), (3, 5), (4, 5), (5, 10), (6, 5), (7, 4), (7, 8), (8, 5), (8, 10), (9, 8), (11, 9), (11, 12), (12, 7),
    (12, 8), (13, 11),
]  # fmt: skip
_NODES = [5, 8, 1, 2, 3, 4, 6, 7, 9, 10, 11, 12, 13]


def tube(t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    """A net of 18 water tubes over 17 hours, 49 unknowns, index 2: flows, resistances, and pressures at 13 nodes."""
    area, viscosity, length, density = math.pi / 4, 1.31e-6, 1e3, 1e3
    flow, friction, pressure = y[:18], y[18:36], y[36:]
    hours = t / 3600
    wave = 1 - torch.cos(torch.exp(-hours) - 1)
    at = dict(zip(_NODES, pressure.unbind(), strict=True))
    reynolds = (flow / (viscosity * area)).abs()
    turbulent, root = reynolds > 2.3e3, friction.sqrt()
    law = 1 / root - 1.74 + 2 * torch.log10(4e-4 + 18.7 / (torch.where(turbulent, reynolds, 2.3e3) * root))
    loss = torch.where(turbulent, friction * density * length * flow**2 / area**2, 32 * viscosity * density * length * flow / area)
    drop = torch.stack([at[i] - at[j] for i, j in _PIPES])
    net: dict[int, Any] = dict.fromkeys(_NODES, torch.zeros_like(t))
    net |= {1: wave / 200, 13: wave / 80, 10: -(hours**2) * (3 * hours**2 - 92 * hours + 720) / 1e6}
    for q, (i, j) in zip(flow.unbind(), _PIPES, strict=True):
        net[i], net[j] = net[i] - q, net[j] + q
    balance = torch.stack([net[node] for node in _NODES])
    stored = 200 / (density * 9.8) * slope[36:38]
    return torch.cat([density * length / area * slope[:18] - (drop - loss), -law, stored - balance[:2], -balance[2:]])


_RING = [
    -0.02339057358486745, -0.007367485485540825, 0.2582956709291169, -0.406446572128345, -0.4039455665149794, 0.2607966765422943,
    0.1106761861269975, 0.2939904342435596e-6, -0.2840029933642329e-7, 0.7267198267264553e-3, 0.7929487196960840e-3,
    -0.7255283495698965e-3, -0.7941401968526521e-3, 0.7088495416976114e-4, 0.2390059075236570e-4,
]  # fmt: skip
_NAND = [
    4.971088699385777, 4.999752103929311, -2.499998781491227, -2.499999999999975, 4.970837023296724, -0.2091214032073855, 4.970593243278363,
    -2.500077409198803, -2.499998781491227, -0.2090289583878100, -0.2399999999966269e-3, -0.2091214032073855, -2.499999999999991,
    -2.500077409198803,
]  # fmt: skip
_TUBE = [
    0.00229848829647743, 0.001188984650746585, 0.001109503645730845, 0.0001589620100314825, 0.001030022640715102, 0.0008710606306836165,
    0.003243571480903489, 0.001109503645730845, 0.0007120986206521341, 0.0006414613963833099, 0.0009416978549524347, 0.003403428519096511,
    0.002397639310739395, 0.002397639310739395, 0.00334858143045418, 0.001353560017035444, 0.001995021413418736, 0.005746220741193575,
    0.04751940452918529, 0.04751940452918529, 0.04751940452918529, 0.04751940452918529, 0.04751940452918529, 0.04751940452918529,
    0.04311196778792902, 0.04751940452918529, 0.04751940452918529, 0.04751940452918529, 0.04751940452918529, 0.0424921743360116,
    0.04732336439609648, 0.04732336439609648, 0.04270002118868241, 0.04751940452918529, 0.04751940452918529, 0.03651427026675656,
    111126.8591478108, 111127.0045592387, 111127.1078730254, 111126.9851929858, 111126.9255355337, 111126.9322658045, 111126.9221703983,
    111127.0121140691, 111127.4419515807, 111125.5158881087, 111127.8793439227, 111127.0995171642, 111129.8338971779,
]  # fmt: skip
_BEAM = [
    -0.005792366591285007, -0.01695298550721735, -0.02769103312973094, -0.03800815655879158, -0.04790616859743763, -0.05738710435274594,
    -0.06645327313454617, -0.07510730581979037, -0.08335219765414992, -0.09119134654647947, -0.0986285870013209, -0.1056682200378002,
    -0.1123150395409595, -0.1185743552727245, -0.1244520128755561, -0.1299544113264161, -0.1350885180610398, -0.1398618819194422,
    -0.1442826441015242, -0.1483595472463012, -0.1521019429001447, -0.1555197978061129, -0.1586236993420229, -0.1614248603702127,
    -0.1639351238193223, -0.1661669673440852, -0.1681335081778558, -0.1698485080602243, -0.1713263782440888, -0.1725821847462537,
    -0.1736316537975654, -0.1744911773840049, -0.1751778187863392, -0.1757093178712902, -0.1761040960228576, -0.1763812607175549,
    -0.1765606097564671, -0.1766626352260565, -0.176708527080746, -0.1767201761075488, 0.03747362681329794, 0.1099117880217593,
    0.1798360474312799, 0.2472427305442391, 0.3121293820596567, 0.37449473770195, 0.4343386073492798, 0.4916620354601748,
    0.5464677854586807, 0.598760970262427, 0.648549361111074, 0.6958435169132503, 0.7406572668520808, 0.7830081747813241,
    0.8229176659201515, 0.860411030519056, 0.8955175502377805, 0.9282708263127953, 0.9587089334522034, 0.9868747821728363,
    1.012816579961883, 1.036587736679858, 1.058246826481355, 1.077857811433353, 1.095490222005369, 1.111219164294898, 1.125125269286501,
    1.137294526609229, 1.147818025153607, 1.156792132004482, 1.164318845130183, 1.170505992596124, 1.17546742429955, 1.179323003228859,
    1.182198586299667, 1.184226111223146, 1.185543909805575, 1.186297084203716, 1.186637618908127, 1.186724615113034,
]  # fmt: skip


def _ordinary(name: str) -> TestProblem:
    """One of the problems of `benchmarks.stiff`."""
    given = STIFF[name]
    function, p = torch_function(given.rate, given.vector), torch.from_numpy(given.p)
    return TestProblem(given.text, lambda t, y: function(t, y, p), given.y0, given.end, PRINTED[name], given.small)


PROBLEMS = {
    **{name: _ordinary(name) for name in ("hires", "orego", "pollu", "vdpol")},
    "ring": TestProblem("Ring modulator, 15 states, T = 1e-3", ring, [0.0] * 15, 1e-3, _RING, apart=1e-6),
    "beam": TestProblem("Beam, 80 states, T = 5", beam, [0.0] * 80, 5.0, _BEAM, jumps=[math.pi]),
    "nand": TestProblem(
        "NAND gate, 14 voltages, implicit, index 0, T = 80",
        nand,
        [5.0, 5.0, -2.5, -2.5, 5.0, 3.62385, 5.0, -2.5, -2.5, 3.62385, 0.0, 3.62385, -2.5, -2.5],
        80.0,
        _NAND,
        implicit=True,
        jumps=[5.0 * k for k in range(1, 16)],
    ),
    "tube": TestProblem(
        "Water tubes, 49 unknowns, index 2, T = 61200",
        tube,
        [*[0.0] * 18, *[0.47519404529185289807e-1] * 18, *[109800.0] * 13],
        61200.0,
        _TUBE,
        implicit=True,
    ),
}


def digits(problem: TestProblem, y: np.ndarray) -> tuple[float, float]:
    """Of the worst component: relative to its size, and to its size and ``small``."""
    truth = np.array(problem.truth)
    error = np.abs(y - truth)
    return tuple(float(-np.log10(np.max(error / scale))) for scale in (np.abs(truth), problem.small + np.abs(truth)))  # type: ignore[return-value]


def _digits_of_slope(problem: TestProblem, options: dict[str, Any], y0: Tensor, gradient: Tensor | None) -> float:
    """Of the derivative of the sum of the end state along the initial one, against differences of tight solves."""
    assert gradient is not None
    along, tight = torch.where(y0 != 0, y0.abs(), problem.small), {"rtol": 1e-11, "atol": 1e-11 * problem.small}

    def end(by: float) -> Tensor:
        return adjoint.solve_ivp(problem.fun, (0.0, problem.end), y0 + by * along, **{**options, **tight}).y[-1].sum()

    # the fourth-order formula
    eps = problem.apart
    truth = float((8 * (end(eps) - end(-eps)) - (end(2 * eps) - end(-2 * eps))) / (12 * eps))
    return -math.log10(max(abs(float(gradient @ along) / truth - 1), 1e-16)) if truth else math.nan


def _row(name: str, method: str, rtol: float) -> dict[str, Any]:
    problem = PROBLEMS[name]
    y0 = torch.tensor(np.array(problem.y0), dtype=F64)
    options: dict[str, Any] = {"rtol": rtol, "atol": rtol * problem.small}
    times: dict[str, float] = {}
    begun, start = time.perf_counter(), time.process_time()
    if method.startswith("scipy."):
        from scipy.integrate import solve_ivp

        def fun(t: float, y: np.ndarray) -> np.ndarray:
            return problem.fun(torch.tensor(t, dtype=F64), torch.from_numpy(np.ascontiguousarray(y))).numpy()

        found = solve_ivp(fun, (0.0, problem.end), y0.numpy(), method=method.removeprefix("scipy."), **options)
        # its differences for the Jacobian are not among the evaluations
        end, counts = found.y[:, -1], (len(found.t) - 1, None, found.nfev, found.njev)
    else:
        solve = adjoint.solve_dae if problem.implicit else adjoint.solve_ivp
        native, method_ = method.startswith("native."), method.removeprefix("native.")
        options |= {"method": method_, "compile": native, "max_steps": 2_000_000}
        options["step_ts"] = torch.tensor(problem.jumps, dtype=F64) if problem.jumps else None
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("error", message="compile=True")
            sol = solve(problem.fun, (0.0, problem.end), y0, **options)
            if native:
                times["first"] = time.perf_counter() - begun
                start = time.process_time()
                sol = solve(problem.fun, (0.0, problem.end), y0, **options)
        stats = sol.stats
        end, counts = sol.y[-1].numpy(), tuple(int(x) for x in (stats.n_accepted, stats.n_rejected, stats.n_fun, stats.n_jac))
    seconds = time.process_time() - start
    if method.startswith("native."):
        for _ in range(2):
            start, y0_ = time.process_time(), y0.clone().requires_grad_()
            solve(problem.fun, (0.0, problem.end), y0_, **options).y[-1].sum().backward()
            times["gradient"] = time.process_time() - start
        if not problem.implicit:
            times["slope"] = _digits_of_slope(problem, options, y0, y0_.grad)
    names = ("accepted", "rejected", "evaluations", "jacobians")
    scd, mixed = digits(problem, end)
    row = {"problem": name, "method": method, "rtol": rtol, "digits": scd, "mixed": mixed, "s": seconds, **times}
    return {**row, **dict(zip(names, counts, strict=True))}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Test set for initial value problem solvers",
        "",
        "One trajectory, without derivatives, one thread; seconds of processor time, which other processes on the machine make "
        "longer. SciPy's evaluations are without those of its difference quotients. A displacement of vdpol grows by a factor of a "
        "million in each jump and shrinks again: digits of its derivative are so many less than those of the tolerance. Columns: see "
        "`benchmarks/ivp_testset.py`.",
        "",
        *(f"- {name}: {PROBLEMS[name].text}" for name in dict.fromkeys(row["problem"] for row in rows)),
        "",
        f"adjoint {adjoint.__version__}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "",
        "| problem | method | rtol | digits | mixed | accepted | rejected | evaluations | Jacobians "
        "| s | first, s | with gradient, s | digits of it |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        numbers = [row["accepted"], "-" if row["rejected"] is None else row["rejected"], row["evaluations"], row["jacobians"]]
        which = [row["problem"], row["method"], f"{row['rtol']:.0e}", f"{row['digits']:.2f}", f"{row['mixed']:.2f}"]
        cells = [*which, *numbers, f"{row['s']:.3g}", *(f"{row[x]:.3g}" if x in row else "-" for x in ("first", "gradient", "slope"))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rows that were asked for, ``problem:method:rtol``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=DEFAULT, metavar="problem:method:rtol")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / f"{datetime.date.today()}-ivp-testset.md"
    rows: list[dict[str, Any]] = []
    for word in options.rows:
        name, method, rtol = word.split(":")
        rows.append(_row(name, method, float(rtol)))
        print(rows[-1], flush=True)
        path.write_text(_table(rows))


if __name__ == "__main__":
    main()
