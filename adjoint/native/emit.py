"""The text of an engine: a method's numbers as constants, before the sources that know its family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from ..methods.runge_kutta import ExplicitRungeKutta
from .calls import declarations

__all__ = ["engine_text", "prologue", "source"]

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
    lines = ["#include <pthread.h>", f"#define W {lanes}"]
    if real == torch.float32:
        lines.append("#define SINGLE")
    return "\n".join([*lines, source("vector.hpp" if lanes > 1 else "scalar.hpp")])


def explicit_text(method: ExplicitRungeKutta) -> str:
    """The constants of an explicit Runge-Kutta method, and its step."""
    tab = method.tableau
    everything = len(method.nodes)
    error = tab.error or (0.0,)
    flags = {
        "STAGES": tab.n_stages,
        "ALL": everything,
        "ERRORS": len(error),
        "DEGREE": len(tab.dense[0]),
        "FSAL": int(tab.fsal),
        "NEXT_FIRST": int(tab.extra_is_next_first),
        "ERROR_USES_END": int(method.error_uses_end),
        "ERROR_ORDER": method.error_order,
    }
    return "\n".join(
        [
            "enum { " + ", ".join(f"{name} = {value}" for name, value in flags.items()) + " };",
            _matrix("A", (*tab.a, *tab.extra_a), everything),
            _array("B", tab.b),
            _array("C", method.nodes),
            _array("E", error),
            _matrix("DENSE", tab.dense, len(tab.dense[0])),
            source("explicit.hpp"),
        ]
    )


def engine_text(method: ExplicitRungeKutta, width: int, timed: bool, own: Sequence[int], numbers: Sequence[int]) -> str:
    """All but the functions of the user and `prologue`, for states of ``width`` numbers.

    ``timed``: whether these functions look at the time. ``own``: how many numbers of each input belong to one trajectory, 0 where all
    share it; ``numbers``: how many cotangents shared ones have.
    """

    def integers(name: str, values: Sequence[int]) -> str:
        return f"static constexpr long {name}[] = {{{', '.join(map(str, [*values, 0]))}}};"

    return "\n".join(
        [
            f"enum {{ N = {width}, INPUTS = {len(own)}, TIMED = {int(timed)} }};",
            f"static constexpr double ROOT = {number(width**-0.5)};",
            integers("OWN", own),
            integers("NUMBERS", numbers),
            declarations(),
            source("common.hpp"),
            explicit_text(method),
            source("loop.hpp"),
            source("back.hpp"),
        ]
    )
