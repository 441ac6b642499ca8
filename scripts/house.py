"""Measures of how the package is built: what is written more than once, what is asked by name, what a reader has to open.

    python scripts/house.py            prints all of them, with the places that are counted
    python scripts/house.py --table    the table of docs/architecture.md

All but the last ones are read off the source text; those of readers are the files whose functions run in two solves with their derivatives.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import rooms

#: attributes that users set on functions of theirs, or PyTorch and others on objects of theirs: nothing of ours can declare them
FOREIGN = {
    "terminal", "direction", "reset", "name",  # of an event function, as SciPy has it
    "adjoint_options",  # of a node, as torchdiffeq has it
    "variable", "saved_tensors", "_storage_Use_Count", "_get_data_attr",  # of nodes and modules of PyTorch
    "dtype", "getuid",
}  # fmt: skip
LONG = 100
TOP = {"__init__.py", "_version.py", "errors.py", "torch_internals.py", "torchdiffeq.py"}


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax trees of all files, by their path within the package."""
    return {str(path.relative_to(rooms.PACKAGE)): ast.parse(path.read_text()) for path in rooms.modules().values()}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function and method with its file."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield name, node


def _calls(node: ast.AST, attribute: str) -> bool:
    return any(isinstance(x, ast.Call) and isinstance(x.func, ast.Attribute) and x.func.attr == attribute for x in ast.walk(node))


def _named(node: ast.AST, name: str) -> bool:
    return any(isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id == name for x in ast.walk(node))


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What stands in a function and in no function within it."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def _where(found: Callable[[str, ast.FunctionDef], bool]) -> list[str]:
    return sorted({f"{name}: {function.name}" for name, function in functions() if found(name, function)})


def loops() -> list[str]:
    """Functions with a loop in which steps of an error-controlled solve are attempted."""
    return _where(lambda _, f: any(isinstance(x, (ast.While, ast.For)) and _calls(x, "attempt") for x in _own(f)))


def newtons() -> list[str]:
    """Functions that iterate for stages, with an estimate of the error by the rate of convergence, ``rate / (1 - rate)``."""

    def rates(x: ast.AST) -> bool:
        return isinstance(x, ast.BinOp) and isinstance(x.op, ast.Sub) and ast.unparse(x) in ("1 - rate", "1.0 - rate")

    def found(name: str, f: ast.FunctionDef) -> bool:
        own = list(_own(f))
        return any(map(rates, own)) and any(isinstance(x, (ast.For, ast.While)) for x in own)

    return _where(lambda name, f: not name.startswith("nonlinear") and found(name, f))


def ways_back() -> list[str]:
    """Functions that take recorded steps back by the adjoint of their method: one at a time, many at once."""
    return _where(lambda _, f: any(isinstance(x, ast.Call) and ast.unparse(x.func).endswith(".adjoint_step") for x in _own(f)))


def sweeps() -> list[str]:
    """Functions with a loop in which recorded steps are taken back for first derivatives, by a `Way`."""
    return _where(lambda _, f: any(isinstance(x, (ast.While, ast.For)) and _calls(x, "back") for x in _own(f)))


def protocols() -> list[str]:
    """Protocols of what steps ask of equations, and their adjoints of linearisations."""
    found = []
    for name, tree in trees().items():
        if name.split("/")[0] in ("methods", "integrate", "sensitivity"):
            classes = (x for x in ast.walk(tree) if isinstance(x, ast.ClassDef))
            found += [f"{name}: {x.name}" for x in classes if any(ast.unparse(b) == "Protocol" for b in x.bases)]
    return sorted(found)


def preparations() -> list[str]:
    """Functions that ask what a user's function captured, and make a flat system of it."""
    return _where(lambda name, f: not name.startswith("system") and any(map(lambda x: _named(x, "find_captured"), _own(f))))


def flags() -> list[str]:
    """Places that look whether an object has an attribute of a name that is written out."""
    found = []
    for name, tree in trees().items():
        for x in ast.walk(tree):
            if isinstance(x, ast.Call) and isinstance(x.func, ast.Name) and x.func.id in ("getattr", "hasattr") and len(x.args) > 1:
                what = x.args[1]
                if isinstance(what, ast.Constant) and not str(what.value).startswith("__") and what.value not in FOREIGN:
                    found.append(f"{name}:{x.lineno}: {ast.unparse(x)}")
    return sorted(found)


def look_ups() -> list[str]:
    """Reads of a dict of tensors by a name that is written out, where a record would have a field."""
    found = []
    for name, tree in trees().items():
        for x in ast.walk(tree):
            named = isinstance(x, ast.Subscript) and isinstance(x.slice, ast.Constant) and isinstance(x.slice.value, str)
            if named and isinstance(x.value, (ast.Name, ast.Attribute)) and ast.unparse(x.value).split(".")[-1] in ("grid", "_grid"):
                found.append(f"{name}:{x.lineno}: {ast.unparse(x)}")
    return sorted(found)


def _is_private(x: ast.AST) -> bool:
    """Whether a node names something of PyTorch's that begins with an underscore."""
    if isinstance(x, ast.Attribute):
        parts = ast.unparse(x).split(".") if isinstance(x.value, (ast.Attribute, ast.Name)) else [""]
        return parts[0] in ("torch", "forward_ad") and _hidden(parts[-1])
    if isinstance(x, ast.ImportFrom):
        parts = (x.module or "").split(".")
        return x.level == 0 and parts[0] == "torch" and any(map(_hidden, [*parts, *(a.name for a in x.names)]))
    return False


def _hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_pytree"


def private_api() -> list[str]:
    """Files that name what PyTorch keeps private (`torch.utils._pytree` apart, which is the only name of pytrees)."""
    return sorted(name for name, tree in trees().items() if any(map(_is_private, ast.walk(tree))))


def private_names() -> list[str]:
    """Private names that another file imports."""
    return sorted(f"{i.source}: {i.name}" for i in rooms.imports() if i.name.startswith("_") and not i.name.startswith("__"))


def top() -> list[str]:
    """Modules that lie in no room."""
    return sorted(path.name for path in rooms.PACKAGE.glob("*.py"))


def length(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of code of a function: none of its docstring, comments and empty lines count."""
    document = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    quoted = range(document.lineno, (document.end_lineno or 0) + 1) if document is not None else range(0)
    own = (n for n in range(function.lineno, (function.end_lineno or 0) + 1) if n not in quoted)
    return sum(bool(text := lines[n - 1].strip()) and not text.startswith("#") for n in own)


def long_functions() -> list[str]:
    """Functions of more than a hundred lines of code."""
    lines = {name: (rooms.PACKAGE / name).read_text().splitlines() for name in trees()}
    found = [(length(f, lines[name]), name, f.name) for name, f in functions()]
    return [f"{name}: {function}, {n} lines" for n, name, function in sorted(found, reverse=True) if n > LONG]


def size() -> tuple[int, int]:
    """Lines and files of Python in the package."""
    return sum(len((rooms.PACKAGE / name).read_text().splitlines()) for name in trees()), len(trees())


def opened(run: Callable[[], Any]) -> list[str]:
    """The files of the package whose functions run."""
    found: set[str] = set()
    inside = str(rooms.PACKAGE) + "/"

    def seen(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside) and frame.f_code.co_name != "<module>":
            found.add(frame.f_code.co_filename[len(inside) :])

    # what is done once in a process is done before
    run()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return sorted(found)


def explicit_reader() -> list[str]:
    """`tsit5` of one trajectory with its discrete adjoint."""
    import torch

    import adjoint

    def run() -> None:
        p = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
        gradient = adjoint.DiscreteAdjoint(keep_bytes=0)
        adjoint.solve_ivp(lambda t, y, p: -p * y, (0.0, 1.0), y0, (p,), gradient=gradient).y[-1].sum().backward()

    return opened(run)


def implicit_reader() -> list[str]:
    """`solve_dae` by `radau`, with its derivatives."""
    import torch

    import adjoint

    def residual(t: Any, y: Any, yp: Any, p: Any) -> Any:
        return torch.stack([yp[0] + p * y[0], y[1] - y[0] ** 2])

    def run() -> None:
        p = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
        adjoint.solve_dae(residual, (0.0, 1.0), y0, args=(p,)).y[-1].sum().backward()

    return opened(run)


#: what is measured, of which the fewer the better, and what is wanted of it
MEASURES: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "loops over steps with error control": (loops, "1"),
    "iterations for stages with an estimate by their rate": (newtons, "1"),
    "sweeps back through recorded steps": (sweeps, "1"),
    "functions that take recorded steps back": (ways_back, "2"),
    "protocols between steps, equations and adjoints": (protocols, ""),
    "preparations of a user's function": (preparations, "1"),
    "circles of modules": (rooms.circles, "0"),
    "flags asked by `getattr`, `hasattr`": (flags, "0"),
    "look-ups by name in a dict of tensors": (look_ups, "0"),
    "files that use PyTorch's private API": (private_api, "1"),
    "private names across files": (private_names, "0"),
    "modules outside of rooms": (top, "at most 8"),
    f"functions of more than {LONG} lines of code": (long_functions, "0"),
    "files that run: `tsit5`, one trajectory, discrete adjoint": (explicit_reader, "at most 15"),
    "files that run: `solve_dae` by `radau`, with derivatives": (implicit_reader, "at most 26"),
}


def table() -> str:
    """All measures as a table of Markdown."""
    lines, files = size()
    rows = [f"| {name} | {len(measure())} | {wanted} |" for name, (measure, wanted) in MEASURES.items()]
    return "\n".join(["| measure | now | wanted |", "|---|---|---|", f"| lines, files | {lines:,}, {files} | |", *rows])


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        for name, (measure, wanted) in MEASURES.items():
            found = measure()
            print(f"\n{name}: {len(found)}" + (f" (wanted: {wanted})" if wanted else ""))
            print("\n".join(f"    {x}" for x in found))
        print("\nlines, files:", *size())
