"""The end of a case's program: what it is solved with before, and the derivatives that are judged."""

from __future__ import annotations

from .case import Case
from .program import DEATH, indented, leaves, literal, program, row_dims

__all__ = ["with_driver"]

#: of a function of the leaves ``X`` and of directions ``V``, with ``ACTIVE``, those that are differentiated
DRIVER = {
    "none": ["with torch.no_grad():", "    value = loss(*X)"],
    "backward": ["value = loss(*X)", "grads = torch.autograd.grad(value, ACTIVE)", "first = dot(grads, V)"],
    "second": [
        "value = loss(*X)",
        "first = dot(torch.autograd.grad(value, ACTIVE, create_graph=True), V)",
        "second = dot(torch.autograd.grad(first, ACTIVE, materialize_grads=True), V)",
    ],
    "grad": ["grads, value = torch.func.grad_and_value(of_active)(tuple(ACTIVE))", "first = dot(grads, V)"],
    "jvp": ["value, first = torch.func.jvp(of_active, (tuple(ACTIVE),), (tuple(V),))"],
    "dual": [
        "with torch.autograd.forward_ad.dual_level():",
        "    pair = of_active(tuple(torch.autograd.forward_ad.make_dual(a, v) for a, v in zip(ACTIVE, V)))",
        "    value, first = torch.autograd.forward_ad.unpack_dual(pair)",
    ],
    "hvp": [
        "value = of_active(tuple(ACTIVE))",
        "grads, products = torch.func.jvp(torch.func.grad(of_active), (tuple(ACTIVE),), (tuple(V),))",
        "first, second = dot(grads, V), dot(products, V)",
    ],
}


def is_transform(case: Case) -> bool:
    return case.derivative in ("grad", "jvp", "dual", "hvp", "inner grad")


def with_driver(case: Case) -> str:
    """The whole program; it leaves ``value``, ``first`` and ``second`` (None where the case takes no such derivative)."""
    transform, given = is_transform(case), leaves(case)
    modules, buffers = ({x.name for x in case.pieces if x.way == way} for way in ("module", "buffer"))
    text = program(case, transform) + "\nX, V = [], []\n"
    positions = []
    for i, (name, (value, direction)) in enumerate(given.items()):
        parameter = name in modules and not transform
        text += f"x = MODULE_{name}.{name}\n" if parameter or name in buffers else f"x = {literal(value)}\n"
        if direction is not None:
            positions.append(i)
            requires = "" if parameter or transform else ".requires_grad_()"
            text += f"X.append(x{requires}); V.append({literal(direction)})\n"
        else:
            text += "X.append(x)\n" + "x.requires_grad_(False)\n" * parameter
    text += f"POSITIONS = {positions}\n"
    # with steps that do not shrink a trajectory may fail in its first one
    at_once = case.dead == "start" or (case.dead == "later" and case.step is not None and case.step > DEATH)
    if at_once and case.directions.get("y0") is not None:
        # with respect to the state that a trajectory failed at the derivative is NaN: it moves nothing that is looked at
        alive, place = [i for i, ok in enumerate(case.alive) if ok], positions.index(list(given).index("y0"))
        text += "\ndef alive(x, i):\n" + f"    return x[{alive}] if i == {place} else x\n"
        text += "\ndef dot(grads, V):\n    return sum((alive(g, i) * alive(v, i)).sum() for i, (g, v) in enumerate(zip(grads, V)))\n"
    else:
        text += "\ndef dot(grads, V):\n    return sum((g * v).sum() for g, v in zip(grads, V))\n"
    lines = ["ACTIVE, value, first, second = [X[i] for i in POSITIONS], None, None, None"]
    lines += ["def of_active(active):", "    x = list(X)", "    for i, a in zip(POSITIONS, active):", "        x[i] = a"]
    lines += ["    return loss(*x)"]
    lines += inner_lines(case) if case.derivative == "inner grad" else DRIVER[case.derivative]
    text += "\ndef judged(X, V):\n" + indented([*lines, "return value, first, second"]) + "\n"
    return text + earlier_text(case) + "value, first, second = judged(X, V)\n"


def inner_lines(case: Case) -> list[str]:
    """Derivatives of each row, taken inside of the map."""
    dims = row_dims(case)
    return [
        "def row(weights, *x):",
        "    grads, value = torch.func.grad_and_value(loss_of_row, argnums=tuple(i + 1 for i in POSITIONS))(weights, *x)",
        "    return value, grads",
        f"values, grads = torch.vmap(row, in_dims=(WEIGHT_DIMS, *{dims}))(WEIGHTS, *X)",
        "value = values.sum()",
        f"first = sum((g.movedim(0, {dims}[i]) * v).sum() for g, v, i in zip(grads, V, POSITIONS))",
    ]


def earlier_text(case: Case) -> str:
    """Solves whose results nobody looks at."""
    # times stay where they are
    own = [i for i, name in enumerate(leaves(case)) if name == "y0" or name.startswith("p")]
    text = {
        "same": "judged(X, V)\n",
        "changed": (
            f"BEFORE = [X[i].detach().clone() for i in {own}]\n"
            f"with torch.no_grad():\n    for i in {own}:\n        X[i].mul_(1.03)\n"
            "judged(X, V)\n"
            f"with torch.no_grad():\n    for i, x in zip({own}, BEFORE):\n        X[i].copy_(x)\n"
        ),
        "other": f"judged([(1.03 * x).detach().requires_grad_(x.requires_grad) if i in {own} else x for i, x in enumerate(X)], V)\n",
        "wider": (
            f"DIMS = {row_dims(case)}\n"
            "def wider(x, i):\n"
            "    return x if DIMS[i] is None else torch.cat([x, x], DIMS[i]).detach().requires_grad_(x.requires_grad)\n"
            "judged([wider(x, i) for i, x in enumerate(X)], [wider(v, i) for v, i in zip(V, POSITIONS)])\n"
        ),
    }
    return "".join(text[kind] for kind in case.earlier)
