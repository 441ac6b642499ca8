"""The text of an engine: a method's numbers as constants, before the sources that know its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch

from ..integrate import adams, bdf, clock, companion, coupled, residual, stages, stiffness
from ..methods.abm import Adams, projection, stretching, uniform_errors
from ..methods.auto import stages_at_end
from ..methods.bdf import MAX_ORDER, SIZE, Bdf, coefficients, rescaling_slopes
from ..methods.collocation import FullyImplicitRungeKutta
from ..methods.dirk import DiagonallyImplicitRungeKutta
from ..methods.rosenbrock import Rosenbrock
from ..methods.runge_kutta import ExplicitRungeKutta
from .calls import CONTEXT, declarations
from .matrices import Matrices
from .sparse import tables
from .text import header

__all__ = [
    "DEVICE_METHODS",
    "Compiled",
    "device_functions",
    "device_prologue",
    "engine_text",
    "goes_along",
    "is_residual",
    "needs_stages",
    "prologue",
    "takes",
]

#: methods that have a text
Compiled = ExplicitRungeKutta | Rosenbrock | DiagonallyImplicitRungeKutta | FullyImplicitRungeKutta | Bdf | Adams

#: those that have kernels
DEVICE_METHODS = (ExplicitRungeKutta, Rosenbrock, DiagonallyImplicitRungeKutta)

_FOLDER = Path(__file__).parent / "engine"


@cache
def source(name: str) -> str:
    """A file of the folder ``engine``."""
    return (_FOLDER / name).read_text()


def number(x: float) -> str:
    """As C++ reads back to the last bit."""
    return repr(float(x))


def _array(name: str, values: Sequence[float]) -> str:
    return f"static constexpr double {name}[] = {{{', '.join(map(number, values)) or '0'}}};"


def _matrix(name: str, rows: Sequence[Sequence[float]], width: int) -> str:
    lines = ["{" + ", ".join(number(x) for x in [*row, *([0.0] * (width - len(row)))]) + "}" for row in rows]
    return f"static constexpr double {name}[{len(rows)}][{width}] = {{{', '.join(lines)}}};"


def prologue(real: torch.dtype, lanes: int) -> str:
    """The types and elementary functions: numbers ``R``, and ``S``, of which there is one for every lane."""
    head = header(real == torch.float32, lanes if lanes > 1 else 0)
    return "\n".join(["#include <pthread.h>", head, *(["#define W 1"] if lanes == 1 else [])])


def device_prologue(real: torch.dtype) -> str:
    """As `prologue`, for a device: of one trajectory, by one thread."""
    return "\n".join(["#define DEVICE 1", header(real == torch.float32), "#define W 1"])


def takes(method: object) -> TypeGuard[Compiled]:
    """Whether a method has a text."""
    return type(method) in (ExplicitRungeKutta, Rosenbrock, DiagonallyImplicitRungeKutta, FullyImplicitRungeKutta, Bdf, Adams)


def records_beside(method: Compiled) -> int:
    """How many numbers are recorded of a step, beside its time, state and stages: see `Record.extra`."""
    return len(_idle(method))


def recorded_stages(method: Compiled) -> int:
    """How many stages are recorded of a step, with those of the dense output."""
    return method.n_stages if isinstance(method, Adams) else len(method.dense)


def _idle(method: Compiled) -> list[float]:
    """What is recorded beside of no step."""
    if isinstance(method, Adams):
        return [1.0, *(-float(j) for j in range(method.max_order + 1))]
    return [1.0] * 3 * method.multistep


def is_residual(method: object) -> bool:
    """Whether it is for implicit equations ``F(t, y, y') = 0``."""
    return isinstance(method, FullyImplicitRungeKutta | Bdf) and method.residual


def goes_along(method: Compiled) -> bool:
    """Whether there are tangents along recorded steps by compiled code."""
    if isinstance(method, FullyImplicitRungeKutta):
        # an explicit stage has no equation of its own
        return bool(np.linalg.matrix_rank(np.asarray(method.tableau.a)) == method.n_stages)
    return isinstance(method, ExplicitRungeKutta | Rosenbrock | DiagonallyImplicitRungeKutta | Bdf)


def needs_stages(method: Compiled) -> bool:
    """Whether tangents along recorded steps need their stages: Rosenbrock methods have them again, formulas of ODEs go by states."""
    return method.implicit and not isinstance(method, Rosenbrock) and (not method.multistep or is_residual(method))


#: functions that engines name, and what they take between the time and what they write
_SIGNATURES = {
    "fun": "const S*, S*",
    "vjp": "const S*, const S*, S*, S*",
    "jac": "const S*, S*, S*",
    "bend": "const S*, const S*, const S*, S*, S*, S*",
    "mass": "const S*, S*",
    "mass_vjp": "const S*, const S*, S*, S*",
}


def device_functions(texts: Mapping[str, str]) -> str:
    """The user's functions, before the engine in one text, with a trap in the place of those that it names but has no use for."""
    absent = (f"EMITTED {name}(const Ctx*, const S*, {given}) {{ TRAP; }}" for name, given in _SIGNATURES.items() if name not in texts)
    return "\n".join([CONTEXT, *texts.values(), *absent])


def _flags(**values: int | bool) -> str:
    return "enum { " + ", ".join(f"{name} = {int(value)}" for name, value in values.items()) + " };"


def _integers(name: str, values: Sequence[int]) -> str:
    return f"static constexpr long {name}[] = {{{', '.join(map(str, [*values, 0]))}}};"


def _table(name: str, values: Sequence[int]) -> str:
    return _integers(name, values).replace("long", "int")


def _explicit(method: ExplicitRungeKutta) -> list[str]:
    """The constants of an explicit Runge-Kutta method, and its step."""
    tab = method.tableau
    error = tab.error or (0.0,)
    return [
        _flags(FSAL=tab.fsal, NEXT_FIRST=tab.extra_is_next_first, ERROR_USES_END=method.error_uses_end, ERRORS=len(error)),
        _matrix("A", (*tab.a, *tab.extra_a), len(method.nodes)),
        _array("B", tab.b),
        _array("EMBEDDED", error),
    ]


def _rosenbrock(method: Rosenbrock, matrices: Matrices) -> list[str]:
    """The constants of a Rosenbrock method, and which entries of the Jacobian are not always zero, unless only these are kept."""
    width, full = matrices.width, matrices.sparse is None
    tab, s = method.tableau, method.n_stages
    return [
        _flags(FSAL=False, NEXT_FIRST=False, ERROR_USES_END=False),
        _matrix("A", tab.a, s),
        _matrix("COUPLING", tab.coupling, s),
        *(_array(name, values) for name, values in (("B", tab.b), ("D", tab.d), ("EMBEDDED", tab.error))),
        f"static constexpr double GAMMA = {number(tab.gamma)};",
        _integers("SAME", tab.same_as),
        _integers("NONZERO", [int((i, j) in matrices.nonzero) for i in range(width) for j in range(width)] if full else []),
    ]


def _iteration() -> str:
    """The constants of iterations for stages; see `StageSolver` and `solve_coupled`."""
    rounds = _flags(MOST=stages.MOST, MOST_COUPLED=coupled.MOST, MOST_CONSTANT=coupled.MOST_CONSTANT)
    return f"{rounds}\nstatic constexpr double TOLERANCE = {number(stages.TOLERANCE)};"


def _constraints(method: Compiled) -> list[str]:
    """The constants of the defect of constraints, see `residual.inner_error`, and of how a solve begins."""
    points = residual.points_of(method)
    return [
        _flags(POINTS=len(points)),
        f"static constexpr double NARROW = {number(residual.NARROW)}, NOISE = {number(residual.NOISE)};",
        *(_array(name, [getattr(p, name.lower()) for p in points]) for name in ("THETA", "RATE")),
        *(_matrix(name, [getattr(p, name.lower()) for p in points], method.n_stages) for name in ("VALUES", "SLOPES")),
        source("constraints.hpp"),
    ]


def _dirk(method: DiagonallyImplicitRungeKutta) -> list[str]:
    """The constants of a diagonally implicit method."""
    tab, s = method.tableau, method.n_stages
    flags = {"FSAL": method.hands_on, "HANDS_ON": method.hands_on, "STIFFLY_ACCURATE": tab.stiffly_accurate}
    return [
        _flags(NEXT_FIRST=False, ERROR_USES_END=False, **flags),
        _matrix("A", tab.a, s),
        _matrix("GUESSES", method.guesses, s),
        _array("B", tab.b),
        _array("EMBEDDED", tab.error or [0.0] * s),
    ]


def _collocation(method: FullyImplicitRungeKutta) -> list[str]:
    """The constants of a fully implicit method."""
    tab, s = method.tableau, method.n_stages
    modes = tab.distinct(False)
    shared = [m for m in modes if m.value.imag == 0]
    gamma = shared[0].value.real if shared else tab.gamma or 0.0

    def pairs(values: Sequence[complex]) -> list[float]:
        return [part for x in values for part in (x.real, x.imag)]

    return [
        _flags(FSAL=method.residual, NEXT_FIRST=False, ERROR_USES_END=False, MODES=len(modes)),
        _flags(FILTERED=tab.error is not None, SHARED_FILTER=bool(shared)),
        _matrix("A", tab.a, s),
        _matrix("INVERSE", np.linalg.inv(tab.a).tolist() if goes_along(method) else [[]], s),
        _array("B", tab.b),
        _array("EMBEDDED", tab.error or [0.0] * s),
        f"static constexpr double GAMMA = {number(gamma)};",
        _matrix("LAGRANGE", np.linalg.inv(np.vander(tab.c, increasing=True)).tolist(), s),
        _matrix("VALUE", [pairs([m.value]) for m in modes], 2),
        _matrix("OUT_OF", [pairs(m.out_of) for m in modes], 2 * s),
        _matrix("INTO", [pairs(m.into) for m in modes], 2 * s),
    ]


def _bdf() -> list[str]:
    """The constants of backward differentiation formulas, by order."""
    gamma, alpha, errors = (x.tolist() for x in coefficients(torch.float64, torch.device("cpu")))
    unlike, size = [g - a for g, a in zip(gamma, alpha, strict=True)], MAX_ORDER + 1
    bounds = {"BOUND": bdf.BOUND, "SMALLEST_FACTOR": bdf.SMALLEST, "LARGEST_FACTOR": bdf.LARGEST, "SAFE": bdf.SAFETY}
    return [
        _flags(FSAL=False, NEXT_FIRST=False, ERROR_USES_END=False, ROUNDS=bdf.NEWTON),
        *(f"static constexpr double {name} = {number(x)};" for name, x in bounds.items()),
        *(_array(name, x) for name, x in (("GAMMA", gamma), ("ALPHA", alpha), ("CONSTANTS", errors), ("UNLIKE", unlike))),
        _matrix("SLOPES", rescaling_slopes(size).reshape(size, size * size).tolist(), size * size),
    ]


def _adams(method: Adams) -> list[str]:
    """The constants of Adams-Bashforth-Moulton formulas."""
    size = method.max_order + 1
    rules = [projection(k + 1) for k in range(size)]
    into = [line for _, matrix in rules for line in [*matrix.tolist(), *[[]] * (size - len(matrix))]]
    return [
        _flags(FSAL=False, NEXT_FIRST=False, ERROR_USES_END=False, FAILURES=adams.PATIENCE),
        _matrix("POINTS", [points.tolist() for points, _ in rules], size),
        _array("CONSTANTS", uniform_errors(method.max_order)),
        _matrix("INTO", into, size),
        _matrix("STRETCHING", stretching(size).tolist(), size),
    ]


def _switching(method: Compiled, real: torch.dtype) -> list[str]:
    """The constants of handing over to another method, see `SwitchWatch`; none of methods that cannot."""
    ends = stages_at_end(method)
    if method.multistep or (ends is None and not method.implicit):
        return ["#define SWITCHES 0"]
    said = stiffness.STIFF if ends else stiffness.NONSTIFF
    numbers = {"LEVEL": said.level, "LEAST": stiffness.least_weight(real), "NEAR": companion.NEAR, "WIDEST": companion.WIDEST}
    early, late = ends or (0, 0)
    return [
        "#define SWITCHES 1",
        _flags(PATIENCE=said.patience, FORGET=said.forget, EARLY=early, LATE=late, PRODUCTS=companion.PRODUCTS),
        *(f"static constexpr double {name} = {number(x)};" for name, x in numbers.items()),
        source("switching.hpp"),
    ]


def _matrices(matrices: Matrices, real: torch.dtype) -> list[str]:
    """Where the entries of shifted Jacobians are, and how these are taken apart."""
    found, sparse = matrices.bands, matrices.sparse
    linear = [f"#define SPARSE {int(sparse is not None)}", source("linear.hpp")]
    if sparse is None:
        flags = _flags(BELOW=found.below, ABOVE=found.above, REORDERED=found.order is not None)
        return [*linear, flags, _table("ORDER", found.order or []), source("full.hpp"), source("shifted.hpp")]
    info = torch.finfo(real)
    return [
        *linear,
        _flags(ENTRIES=len(sparse.entries), FACTORS=sparse.factors),
        f"static constexpr double GOOD = {number(info.eps ** (2 / 3))}, SHARP = {number(64 * info.eps)}, LARGEST = {number(info.max)};",
        *(_table(name, values) for name, values in tables(sparse).items()),
        source("sparse.hpp"),
        source("shifted.hpp"),
    ]


def _family(method: Compiled, real: torch.dtype, matrices: Matrices | None) -> list[str]:
    """A method's constants, and the step of its family."""
    if isinstance(method, ExplicitRungeKutta):
        return [*_explicit(method), source("explicit.hpp")]
    if isinstance(method, Adams):
        return [source("orders.hpp"), *_adams(method), source("adams.hpp")]
    assert matrices is not None
    shared = [_iteration(), *_matrices(matrices, real)]
    if isinstance(method, Rosenbrock):
        return [*shared, *_rosenbrock(method, matrices), source("rosenbrock.hpp")]
    shared.append(source("newton.hpp"))
    if isinstance(method, Bdf):
        return [*shared, source("pencil.hpp"), source("orders.hpp"), *_bdf(), source("bdf.hpp")]
    if isinstance(method, FullyImplicitRungeKutta):
        return [*shared, source("pencil.hpp"), *_collocation(method), source("collocation.hpp")]
    return [*shared, *_dirk(method), source("dirk.hpp")]


def engine_text(
    method: Compiled,
    real: torch.dtype,
    width: int,
    timed: bool,
    own: Sequence[int],
    numbers: Sequence[int],
    matrices: Matrices | None = None,
    n_events: int = 0,
    mass: bool = False,
    displaced: bool = False,
    device: bool = False,
    again: bool = False,
    along: bool = False,
) -> str:
    """All but the functions of the user and `prologue`, for states of ``width`` numbers.

    ``timed``: whether these functions look at the time. ``own``: how many numbers of each input belong to one trajectory, 0 where all
    share it; ``numbers``: how many cotangents shared ones have. ``matrices``: how those of
    implicit steps are kept. ``mass``: whether there is a matrix in front of the slopes. ``displaced``: whether the second half of
    the state is a displacement of the first one, and there is no way back. ``device``: with the kernels of a device in place of whole
    solves. ``again``: with recorded steps that are taken again in place of solves and their ways back.
    ``along``: with those beside the ways back, and no solves.
    """
    implicit, multistep, legendre = is_residual(method), method.multistep, isinstance(method, Adams)
    dense = [[0.0]] if legendre else method.dense
    # the equation of a multistep formula is that of the end of its step
    parts = {"forward": not device, "back": not displaced, "device": device, "consistent": implicit}
    if again or along:
        parts = {"again": True, "back": along}
    nodes, idle, carried = (1.0,) if multistep else method.nodes, _idle(method), method.n_stages if legendre else SIZE
    return "\n".join(
        [
            _flags(N=width, INPUTS=len(own), TIMED=timed, STAGES=method.n_stages, ALL=recorded_stages(method)),
            # those of multistep methods are counted where they are made
            _flags(DEGREE=len(dense[0]), TIMES=len(nodes), ERROR_ORDER=method.error_order),
            _flags(EVALUATIONS=0 if multistep else method.evaluations),
            f"static constexpr double ROOT = {number(width**-0.5)};",
            _integers("OWN", own),
            _integers("NUMBERS", numbers),
            _flags(EXTRA=len(idle), CARRIED=carried - 1 if multistep else 0),
            _array("IDLE", idle),
            _array("C", nodes),
            _matrix("DENSE", dense, len(dense[0])),
            declarations(not device),
            f"#define MASS {int(mass)}\n#define IMPLICIT {int(implicit)}\n#define CONSTRAINED {int(mass or implicit)}",
            f"#define MULTISTEP {int(multistep)}\n#define LEGENDRE {int(legendre)}",
            f"#define DISPLACED {int(displaced)}\n#define ALONG {int(along)}",
            f"#define BY_STAGES {int(implicit or not method.spares_stages)}",
            f"static constexpr double FARTHEST = {number(max(1.0, *nodes))}, REAL_EPSILON = {number(torch.finfo(real).eps)};",
            f"static constexpr double RESOLVED = {number(clock.RESOLVED)};",
            source("lanes.hpp"),
            source("common.hpp"),
            *_family(method, real, matrices),
            # only explicit steps have to be looked after
            f"static constexpr double INTERVAL = {number(method.interval)};",
            f"static constexpr double SHIFT = {number(torch.finfo(real).eps ** 0.4)};",
            f"static constexpr double SMALLEST = {number(max(1e-300, torch.finfo(real).tiny))};",
            f"static constexpr double LOOSEST_RTOL = {number(stages.LOOSEST[0])}, LOOSEST_ATOL = {number(stages.LOOSEST[1])};",
            f"#define EVENTS {n_events}",
            *([source("events.hpp")] if n_events else []),
            _flags(SEARCHES=stages.SEARCHES, FINDINGS=residual.NEWTON),
            *([source("slopes.hpp")] if implicit else []),
            *(_constraints(method) if (mass or implicit) and not multistep else []),
            *(["#define SWITCHES 0"] if mass or implicit else _switching(method, real)),
            *(source(f"{name}.hpp") for name in ("tape", "starts", "loop")),
            *(source(f"{name}.hpp") for name, wanted in parts.items() if wanted),
        ]
    )
