"""The tables of docs/methods.md about what methods and strategies support, made of what the code and the tests declare.

    python scripts/tables.py          writes them into docs/methods.md
    python scripts/tables.py --show   prints them

What a method supports is asked of its traits (`adjoint.methods.Method`) and of the functions that go by them; what is refused is asked of
the tables of `test_matrix.py` and `test_forms.py` in `tests/sensitivity/`, whose cases see to it that the library refuses exactly that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from adjoint.doors.mass_matrix import RESIDUAL_METHODS  # noqa: E402
from adjoint.methods import DAE_METHODS, IMEX_METHODS, METHODS, SWITCHING_METHODS, TableauMethod  # noqa: E402
from adjoint.native.emit import takes  # noqa: E402
from adjoint.sensitivity.continuous import method_back  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- {}: python scripts/tables.py -->\n", "<!-- end of {} -->\n"


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def _dense(method: Any) -> str:
    return str(method.tableau.dense_order) if isinstance(method, TableauMethod) else "that of the step"


def _order(method: Any) -> str:
    if method.switching:
        return "that of its two methods"
    return f"up to {method.order}" if method.multistep else str(method.order)


def _mass(name: str, method: Any) -> str:
    if method.takes_mass:
        return "constant, index 0 and 1"
    return f"any, index 0 to {1 if method.multistep else 2}" if name in RESIDUAL_METHODS else "no"


def _back(method: Any) -> str:
    if method.switching:
        return "no"
    back = method_back(method, method.residual)
    names = {id(m): name for name, m in (METHODS | DAE_METHODS).items()}
    return ("yes" if back is method else f"by `{names[id(back)]}`") if back.adaptive else "by another `method=`"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _row(name: str, method: Any, equations: str) -> list[str]:
    recorded = method.multistep or method.residual
    return [
        f"`{name}`",
        equations,
        _order(method),
        "chosen from step to step" if method.switching else _dense(method),
        "by their error" if method.adaptive else "given",
        _mass(name, method) if not method.residual else "-",
        ("`jac_sparsity=`, `linear_solver=`" if method.residual else "yes") if method.implicit else "no",
        _yes(all(max(m.nodes) <= 1 for m in method.members)),
        _yes(not recorded),
        _back(method),
        _yes(all(map(takes, method.members))),
    ]


def methods() -> str:
    """What each method supports."""
    head = (
        "method", "equations", "order", "dense output", "steps", "`mass_matrix=`", "`jac=`, `jac_sparsity=`, `linear_solver=`",
        "derivatives in `step_ts`", "`checkpoints=`", "continuous adjoints", "native code",
    )  # fmt: skip
    rows = [_row(name, method, "`solve_ivp`") for name, method in (METHODS | SWITCHING_METHODS).items()]
    rows += [_row(name, method, "`SplitFunction`") for name, method in IMEX_METHODS.items()]
    rows += [_row(name, method, "`solve_dae`") for name, method in DAE_METHODS.items()]
    return _lines(head, rows)


def _kinds(known: dict[str, Any]) -> dict[str, set[str]]:
    """Names of groups of methods, the largest ones first."""
    of: dict[str, Callable[[Any], bool]] = {
        "all": lambda m: True,
        "implicit methods": lambda m: m.implicit,
        "methods of given steps": lambda m: not m.adaptive,
        "methods of many steps": lambda m: m.multistep,
    }
    return {name: {n for n, m in known.items() if is_one(m)} for name, is_one in of.items()}


def _grouped(refused: set[str], known: dict[str, Any]) -> str:
    """A set of methods in few words."""
    words, left = [], set(refused)
    for name, members in _kinds(known).items():
        if members <= refused and members & left:
            words.append(name)
            left -= members
    return ", ".join([*words, *(f"`{name}`" for name in sorted(left))]) or "-"


_STRATEGIES = {
    "discrete": "`DiscreteAdjoint()`",
    "checkpoints": "`DiscreteAdjoint(checkpoints=)`",
    "backprop": "`Backprop()`",
    "forward": "`ForwardSensitivity()`",
    "interpolating": "`InterpolatingAdjoint()`",
    "quadrature": "`QuadratureAdjoint()`",
    "gauss": "`GaussAdjoint()`",
    "backsolve": "`BacksolveAdjoint()`",
    "backsolve by tsit5": "`BacksolveAdjoint(method='tsit5')`",
}


def refusals() -> str:
    """Which methods a strategy refuses, in which form of a solve."""
    from tests.sensitivity import test_matrix as matrix

    forms = {"eager": "one trajectory", "batched": "`batched=True`", "vmapped": "`torch.vmap`", "compiled one": "`compile=True`"}
    rows = []
    for name, shown in _STRATEGIES.items():
        cells = []
        for form in forms:
            found = {method for method in matrix.KNOWN if matrix.refusal(matrix.Case(method, name, form)) is not None}
            cells.append(_grouped(found, matrix.KNOWN))
        rows.append([shown, *cells])
    return _lines(["strategy", *forms.values()], rows)


def refused_outputs() -> str:
    """Which equations and methods a strategy refuses, by what is asked of the solution."""
    from tests.sensitivity import test_forms as forms

    outputs = {"samples": "states at times", "dense": "`dense_output=True`", "passed": "`events=`", "integral": "`quadrature=`"}
    rows = []
    for name, shown in _STRATEGIES.items():
        if name not in forms.STRATEGIES and name != "discrete":
            continue
        cells = []
        for output in outputs:
            asked = ("one", output, "backward", "default" if name == "discrete" else name)
            found = [m for m in forms.METHODS if forms.refusal(forms.Case(m, *asked)) is not None]
            cells.append("all" if len(found) == len(forms.METHODS) else ", ".join(f"`{m}`" for m in found) or "-")
        rows.append([shown, *cells])
    return _lines(["strategy", *outputs.values()], rows)


TABLES = {"what methods support": methods, "what is refused by form": refusals, "what is refused by output": refused_outputs}


def written(page: str) -> str:
    """The page with its tables as they are to be."""
    for name, table in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no place for {name!r}")
        page = before + begin + table() + end + after
    return page


if __name__ == "__main__":
    if "--show" in sys.argv:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}")
    else:
        PAGE.write_text(written(PAGE.read_text()))
