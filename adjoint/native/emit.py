"""The text of an engine: a method's numbers as constants, before the sources that know its family."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

import torch

from ..methods.dirk import DiagonallyImplicitRungeKutta
from ..methods.rosenbrock import Rosenbrock
from ..methods.runge_kutta import ExplicitRungeKutta
from .calls import declarations
from .text import header

__all__ = ["Compiled", "engine_text", "prologue", "takes"]

#: methods that have a text
Compiled = ExplicitRungeKutta | Rosenbrock | DiagonallyImplicitRungeKutta

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


def takes(method: object) -> bool:
    """Whether a method has a text."""
    return type(method) in (ExplicitRungeKutta, Rosenbrock, DiagonallyImplicitRungeKutta)


def _flags(**values: int | bool) -> str:
    return "enum { " + ", ".join(f"{name} = {int(value)}" for name, value in values.items()) + " };"


def _integers(name: str, values: Sequence[int]) -> str:
    return f"static constexpr long {name}[] = {{{', '.join(map(str, [*values, 0]))}}};"


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


def _rosenbrock(method: Rosenbrock, width: int, nonzero: Collection[tuple[int, int]]) -> list[str]:
    """The constants of a Rosenbrock method; ``nonzero``: the entries of the Jacobian that are not always zero."""
    tab, s = method.tableau, method.n_stages
    return [
        _flags(FSAL=False, NEXT_FIRST=False, ERROR_USES_END=False),
        _matrix("A", tab.a, s),
        _matrix("COUPLING", tab.coupling, s),
        *(_array(name, values) for name, values in (("B", tab.b), ("D", tab.d), ("EMBEDDED", tab.error))),
        f"static constexpr double GAMMA = {number(tab.gamma)};",
        _integers("SAME", tab.same_as),
        _integers("NONZERO", [int((i, j) in nonzero) for i in range(width) for j in range(width)]),
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


def _family(method: Compiled, width: int, nonzero: Collection[tuple[int, int]]) -> list[str]:
    """A method's constants, and the step of its family."""
    if isinstance(method, ExplicitRungeKutta):
        return [*_explicit(method), source("explicit.hpp")]
    if isinstance(method, Rosenbrock):
        return [source("linear.hpp"), *_rosenbrock(method, width, nonzero), source("rosenbrock.hpp")]
    return [source("linear.hpp"), source("newton.hpp"), *_dirk(method), source("dirk.hpp")]


def engine_text(
    method: Compiled, width: int, timed: bool, own: Sequence[int], numbers: Sequence[int], nonzero: Collection[tuple[int, int]] = ()
) -> str:
    """All but the functions of the user and `prologue`, for states of ``width`` numbers.

    ``timed``: whether these functions look at the time. ``own``: how many numbers of each input belong to one trajectory, 0 where all
    share it; ``numbers``: how many cotangents shared ones have. ``nonzero``: see `_rosenbrock`.
    """
    everything, dense = len(method.nodes), method.tableau.dense
    return "\n".join(
        [
            _flags(N=width, INPUTS=len(own), TIMED=timed, STAGES=method.n_stages, ALL=everything, DEGREE=len(dense[0])),
            _flags(ERROR_ORDER=method.error_order, EVALUATIONS=method.evaluations),
            f"static constexpr double ROOT = {number(width**-0.5)};",
            _integers("OWN", own),
            _integers("NUMBERS", numbers),
            _array("C", method.nodes),
            _matrix("DENSE", dense, len(dense[0])),
            declarations(),
            source("common.hpp"),
            *_family(method, width, nonzero),
            source("loop.hpp"),
            source("back.hpp"),
        ]
    )
