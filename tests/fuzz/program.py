"""A case as the text of a program that stands by itself: what is run is what is printed when it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import Case, Piece

__all__ = ["DEATH", "indented", "leaves", "literal", "program", "row_dims"]

#: how far from the start a trajectory fails that fails later
DEATH = 0.05
LAYOUTS = {
    "vector": ("return y", "return x"),
    "matrix": ("return y.flatten(-2)", "return x.unflatten(-1, (-1, 2))"),
    "scalar": ("return y[..., None]", "return x[..., 0]"),
    "complex": ("return torch.view_as_real(y).flatten(-2)", "return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())"),
    "dict": ("return torch.cat([y['a'][..., None], y['b']], -1)", "return {'a': x[..., 0], 'b': x[..., 1:]}"),
    "tuple": ("return torch.cat([y[1], y[0]], -1)", "return (x[..., 1:], x[..., :1])"),
}

STYLES = {
    "plain": ["return rate"],
    "in place": ["out = torch.zeros_like(rate)", "for i in range(rate.shape[-1]):", "    out[..., i] = rate[..., i]", "return out"],
    "view": ["return torch.stack([torch.zeros_like(rate), rate], -1)[..., 1]"],
    "reused buffer": [
        "BUFFER = buffers.setdefault(rate.shape, torch.empty(rate.shape, dtype=rate.dtype))",
        "BUFFER[:] = rate",
        "return BUFFER",
    ],
}


#: of the kinds of starts that are made of a tensor that the function captures too; what they are of it stands with the case
START_TEXTS = {"same": "{q}", "detached": "{q}", "computed": "{q} + 0.2 * torch.sin({q})", "view": "{q}.view_as({q})"}


def start_name(case: Case) -> str:
    return "start" if case.shared else "y0"


def literal(x: Tensor) -> str:
    return f"torch.tensor({x.tolist()}, dtype={x.dtype})"


def leaves(case: Case) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The tensors that the loss takes, in its order: value, and direction or None for constants. Without rows where there is one."""
    real, out = case.torch_dtype, {}

    def row(x: Tensor, by_row: bool, dim: int = 0) -> Tensor:
        return x if by_row and case.form != "one" else x.select(dim, 0)

    def add(name: str, value: Tensor, direction: Tensor | None, dtype: torch.dtype) -> None:
        moved = direction is not None and bool((direction != 0).any())
        out[name] = (value.to(dtype).contiguous(), direction.to(dtype).contiguous() if moved and direction is not None else None)

    values, directions = case.values, case.directions
    y0 = values["y0"]
    if case.algebraic:
        # a guess, that is off by something; its direction is that of nothing
        y0 = torch.cat([y0, exact_algebraic(case) + (0.0 if case.detail == "trusted" else 0.05)], -1)
    moves = directions["y0"]
    moves = torch.cat([moves, torch.zeros_like(moves[..., :1])], -1) if case.algebraic else moves
    add("y0", row(y0, True), row(moves, True), real)
    for piece in own_pieces(case):
        part = slice(piece.start, piece.stop)
        add(piece.name, row(values["p"][:, part], piece.by_row), row(directions["p"][:, part], piece.by_row), real)
    if uses_level(case):
        add("level", values["level"][0], directions["level"][0] if "level" in directions else None, real)
    if case.span_active:
        add("t0", values["t0"][0], directions["t0"][0], torch.float64)
        add("t1", row(values["t1"], case.ragged), row(directions["t1"], case.ragged), torch.float64)
    elif case.form == "vmapped" and case.ragged:
        add("t1", values["t1"], None, torch.float64)
    if case.times in ("tensor", "list of tensors", "by row", "dense"):
        by_row = case.times == "by row" or (case.ragged and case.form != "one")
        add("ts", row(values["ts"], by_row, 1), row(directions["ts"], by_row, 1) if "ts" in directions else None, torch.float64)
    return out


def own_pieces(case: Case) -> list[Piece]:
    """Those that are leaves of their own: one that the start is made of is that leaf."""
    return [x for x in case.pieces if x.name != "q"]


def exact_algebraic(case: Case) -> Tensor:
    from .reference import pure_form

    return pure_form(case).shown(case.values["t0"], case.start, case.values["p"])[..., -1:]


def uses_level(case: Case) -> bool:
    return bool(case.event)


def indented(lines: list[str], by: int = 4) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in lines)


def access(piece: Piece, arguments: list[Piece]) -> str:
    if piece.way == "argument":
        return f"args[{[x.name for x in arguments].index(piece.name)}]"
    own = {"tree": f"args[-1][{piece.name!r}][0]", "helper": f"helper_{piece.name}()"}
    return own.get(piece.way, f"self.{piece.name}" if piece.way in ("module", "attribute", "buffer") else piece.name)


def program(case: Case, transform: bool) -> str:
    """Text that defines ``loss(*leaves)``; ``transform``: modules get their parameters by ``functional_call``."""
    names = list(leaves(case))
    head = [
        "import torch",
        "import adjoint",
        "import adjoint.torchdiffeq",
        "torch.set_default_dtype(torch.float64)",
        "torch.manual_seed(0)",
        "",
    ]
    text = "\n".join(head) + "\n" + case.equations.text + "\n"
    flat, shaped = LAYOUTS[case.layout]
    text += f"def flat(y):\n    {flat}\n\ndef shaped(x):\n    {shaped}\n\n"
    text += "def wide(x, y):\n    return x.expand(*y.shape[:-1], x.shape[-1])\n\n"
    if case.event:
        # of a table without events, which rows of a batch may all be, as of a row without one
        text += "def first_of(x):\n    return x[0] if len(x) else x.new_full(x.shape[1:], float('nan'))\n\n"
    for piece in case.pieces:
        if piece.way in ("module", "buffer"):
            text += module_text(case, piece)
    made, solved = functions_lines(case, transform), solved_lines(case)
    if case.kept:
        # functions that are made once and see what they capture as globals
        text += "\n".join(made) + "\n"
        text += f"def solve({', '.join(f'{x}_' for x in names)}):\n" + indented([*globals_lines(case, names), *solved])
    else:
        text += f"def solve({', '.join(names)}):\n" + indented([*captured_lines(case), *made, *solved])
    text += outputs_text(case, names)
    return text + loss_text(case, names)


def holder(case: Case) -> Piece | None:
    """The piece whose owner is the right-hand side itself."""
    return next((x for x in case.pieces if x.way in ("module", "attribute", "buffer")), None)


def module_text(case: Case, piece: Piece) -> str:
    kind = "self.{0} = torch.nn.Parameter({0})" if piece.way == "module" else "self.register_buffer('{0}', {0})"
    value = leaves(case)[piece.name][0]
    own = f"Field_{piece.name}"
    return (
        f"class {own}(torch.nn.Module):\n"
        f"    def __init__(self, {piece.name}):\n        super().__init__()\n        {kind.format(piece.name)}\n\n"
        f"    def forward(self, call, t, y, *args):\n        return call(self, t, y, *args)\n\n"
        f"MODULE_{piece.name} = {own}({literal(value)})\n\n"
    )


def captured_lines(case: Case) -> list[str]:
    """The start, and the tensor that it is made of as the function captures it."""
    if not case.shared:
        return []
    n = case.equations.n
    q = f"y0[..., :{n}]" if case.algebraic else "y0"
    start = START_TEXTS[case.shared].format(q=q)
    if case.algebraic:
        start = f"torch.cat([{start}, y0[..., {n}:]], -1)"
    return [f"q = {q}" + ".detach()" * (case.shared == "detached"), f"start = {start}"]


def globals_lines(case: Case, names: list[str]) -> list[str]:
    """What the functions capture is put where they look for it."""
    lines = ["global " + ", ".join([*names, *(["q", "start"] if case.shared else [])])]
    lines.append(f"{', '.join(names)}, = {', '.join(f'{x}_' for x in names)},")
    lines += captured_lines(case)
    return lines + [f"FIELD_{x.name}.{x.name} = {x.name}" for x in case.pieces if x.way == "attribute"]


def args_line(case: Case) -> str:
    arguments, trees = ([x for x in case.pieces if x.way == way] for way in ("argument", "tree"))
    args = [x.name for x in arguments] + (["{" + ", ".join(f"{x.name!r}: [{x.name}]" for x in trees) + "}"] if trees else [])
    return f"args = ({', '.join(args)}{',' if len(args) == 1 else ''})"


def functions_lines(case: Case, transform: bool) -> list[str]:
    """The functions that the solve is given."""
    arguments = [x for x in case.pieces if x.way == "argument"]
    lines = []
    for piece in case.pieces:
        if piece.way == "helper":
            lines += [f"def helper_{piece.name}():", f"    return {piece.name}"]
    defaults = "".join(f", {x.name}={x.name}" for x in case.pieces if x.way == "default")
    stars = f", *args{defaults}"
    if case.style == "reused buffer":
        lines.append("buffers = {}")
    owners = [x for x in case.pieces if x.way in ("module", "attribute", "buffer")]
    collect = ", ".join(f"wide({access(x, arguments).replace('self.', f'owner_{x.name}.')}, y)" for x in case.pieces)
    lines += [f"def parameters(y, {''.join(f'owner_{x.name}, ' for x in owners)}args{defaults}):", f"    return torch.cat([{collect}], -1)"]
    inner = "".join(f"owner_{x.name}, " for x in owners)
    passed = "".join(f", {x.name}={x.name}" for x in case.pieces if x.way == "default")
    # the right-hand side, with its owners first
    slope = "yp, " if case.door == "solve_dae" else ""
    lines += [f"def rate_of({inner}t, y, {slope}args{defaults}):"]
    lines += ["    " + x for x in rate_lines(case, inner, passed)]
    lines += owners_lines(case, owners, stars, slope, passed, transform)
    return lines + fun_lines(case, inner_call(case, owners, stars, passed, transform))


def rate_lines(case: Case, inner: str, passed: str) -> list[str]:
    """From the state of the user's form to its slope, or residual."""
    lines = []
    if case.style == "in place on y":
        lines += ["y = flat(y).clone()", "y *= 2", "y /= 2"]
    else:
        lines.append("y = flat(y)")
    lines.append(f"p = parameters(y, {inner}args{passed})")
    g = "0.6 * x[..., :1] + 0.4 * torch.sin(2 * t[..., None]) * p[..., :1] + 0.2 * p[..., -1:]"
    n = case.equations.n
    if case.algebraic:
        kick = [0.3] + [0.0] * (n - 1)
        lines += [
            "x, z = y[..., :-1], y[..., -1:]",
            f"drive = core(t, x, p) + z * torch.tensor({kick}, dtype=y.dtype)",
            f"gap = {g} - torch.sinh(z)",
        ]
    else:
        lines.append(rate_text(case))
    if case.door == "solve_dae":
        lines += ["rate = torch.cat([flat(yp)[..., :-1] - drive, gap], -1)"]
        if case.detail == "mixed":
            lines.append(f"rate = rate @ torch.tensor({mixing(n + 1)}, dtype=y.dtype).mT")
    elif case.algebraic:
        lines.append("rate = torch.cat([drive, gap], -1)")
    if case.door == "mass matrix" and case.detail != "singular":
        lines.append(f"rate = rate @ torch.tensor({mixing(n + case.algebraic)}, dtype=y.dtype).mT")
    if case.dead == "later":
        death = [1e9 if ok else DEATH for ok in case.alive]
        lines.append(f"over = (t - {float(case.values['t0'][0])}).abs() > torch.tensor({death}, dtype=t.dtype)")
        lines.append("rate = rate * torch.where(over, float('nan'), 1.0).to(y.dtype)[:, None]")
    style = STYLES.get(case.style, STYLES["plain"])
    return [*lines, *style[:-1], f"return shaped({style[-1].removeprefix('return ')})"]


def rate_text(case: Case) -> str:
    if case.style == "torch.func.grad":
        force = f"torch.func.grad(lambda y: {case.equations.energy}.sum())(y)"
    elif case.style == "autograd.grad":
        force = f"energy_gradient(lambda y: {case.equations.energy}.sum(), y)"
    else:
        return "rate = core(t, y, p)"
    damping = "p[..., 2] * y[..., 1] * p[..., 0]"
    return f"slope = {force}; rate = torch.stack([slope[..., 1], -slope[..., 0] - {damping}], -1)"


def mixing(size: int) -> list[list[float]]:
    return [[1.0 if i == j else (0.5 if j == i - 1 else (-0.25 if j == i + 1 else 0.0)) for j in range(size)] for i in range(size)]


def owners_lines(case: Case, owners: list[Piece], stars: str, slope: str, passed: str, transform: bool) -> list[str]:
    """Objects that hold a piece: modules at the top of the program, plain objects here. The first one is the right-hand side itself."""
    lines = []
    for piece in owners:
        if piece.way == "attribute":
            lines += [
                "class Field:",
                f"    def __init__(self, {piece.name}):",
                f"        self.{piece.name} = {piece.name}",
                "    def __call__(self, call, t, y, *args):",
                "        return call(self, t, y, *args)",
                f"FIELD_{piece.name} = Field({None if case.kept else piece.name})",
            ]
    if case.style == "autograd.grad":
        lines += [
            "def energy_gradient(energy, y):",
            "    with torch.enable_grad():",
            "        y = y if y.requires_grad else y.detach().requires_grad_()",
            "        return torch.autograd.grad(energy(y), y, create_graph=True)[0]",
        ]
    return lines


def inner_call(case: Case, owners: list[Piece], stars: str, passed: str, transform: bool) -> dict[str, str]:
    """How ``fun`` is written: a function that asks its owners one after the other."""
    slope = "yp, " if case.door == "solve_dae" else ""
    call = f"rate_of({''.join(f'o_{x.name}, ' for x in owners)}t, y, {slope}args{passed})"
    params = f"parameters(y, {''.join(f'o_{x.name}, ' for x in owners)}args{passed})"
    for piece in reversed(owners):
        call = wrapped(piece, call, transform)
        params = wrapped(piece, params, transform)
    return {"rate": call, "parameters": params, "stars": stars, "slope": slope}


def wrapped(piece: Piece, call: str, transform: bool) -> str:
    inner = f"(lambda o_{piece.name}, t, y: {call})"
    if piece.way == "attribute":
        return f"FIELD_{piece.name}({inner}, t, y)"
    if piece.way == "module" and transform:
        return f"torch.func.functional_call(MODULE_{piece.name}, {{{piece.name!r}: {piece.name}}}, ({inner}, t, y))"
    return f"MODULE_{piece.name}({inner}, t, y)"


def fun_lines(case: Case, call: dict[str, str]) -> list[str]:
    fun = [f"def fun(t, y, {call['slope']}{call['stars'].removeprefix(', ')}):", f"    return {call['rate']}"]
    if case.door == "solve_ivp split":
        fun = [
            f"def explicit(t, y{call['stars']}):",
            "    return shaped(0.1 * torch.sin(t)[..., None] - 0.3 * flat(y))",
            f"def implicit(t, y{call['stars']}):",
            f"    return shaped(flat({call['rate']}) + 0.3 * flat(y) - 0.1 * torch.sin(t)[..., None])",
            "fun = adjoint.SplitFunction(explicit, implicit)",
        ]
    if case.quadrature:
        n = case.equations.n
        fun += [
            f"def integrand(t, y{call['stars']}):",
            "    y = flat(y)",
            f"    return (y[..., :{n}] ** 2).sum(-1) * (1 + 0.1 * {call['parameters']}[..., 0])",
        ]
    if case.event:
        fun += [f"def event(t, y{call['stars']}):", f"    return flat(y)[..., {case.component}] - level"]
        if case.door != "odeint_event":
            fun.append(f"event.terminal = {case.event == 'terminal'}")
    return fun


def solved_lines(case: Case) -> list[str]:
    """Arguments, the solve and what is returned of it."""
    if case.door == "solve_root":
        return [args_line(case), *root_lines(case)]
    dropin = case.door in ("odeint", "odeint_adjoint", "twin", "odeint_event")
    return [args_line(case), *(dropin_lines(case) if dropin else native_lines(case))]


def dropin_lines(case: Case) -> list[str]:
    options = "" if case.step is None else f", options={{'step_size': {case.step}}}"
    common = f"rtol={case.rtol}, atol={case.atol}, method={case.method!r}{options}"
    doors = {"odeint": "adjoint.odeint", "odeint_adjoint": "adjoint.odeint_adjoint", "twin": "adjoint.torchdiffeq.odeint_adjoint"}
    if case.door == "odeint_event":
        interface = doors[case.detail]
        start = float(case.values["t0"][0])
        return [
            f"when, states = adjoint.odeint_event(fun, shaped({start_name(case)}), torch.tensor({start}), event_fn=event, "
            f"odeint_interface={interface}, {common})",
            "return {'samples': flat(states), 'event_t': when, 'event_y': flat(states)[-1]}",
        ]
    extra = ", adjoint_params=()" if case.door == "twin" and case.detail == "none" else ""
    return [f"states = {doors[case.door]}(fun, shaped({start_name(case)}), ts, {common}{extra})", "return {'samples': flat(states)}"]


def root_lines(case: Case) -> list[str]:
    start, size = float(case.values["t0"][0]), float(case.values["t1"][0] - case.values["t0"][0])
    options = [f"method={case.method!r}"] + ["batched=True"] * (case.form == "batched")
    return [
        "def equation(x, base, *args):",
        f"    t = torch.full(flat(x).shape[:-1], {start}, dtype=base.dtype)",
        # as a tendency, which methods that follow a flow ask for
        f"    return shaped(base + {size} * flat(fun(t, x, *args)) - flat(x))",
        f"sol = adjoint.solve_root(equation, shaped(y0.detach() + 0.02), (y0, *args), {', '.join(options)})",
        "return {'samples': flat(sol.x)[None]}",
    ]


def native_lines(case: Case) -> list[str]:
    ends = [repr(float(case.values["t0"][0])), repr(float(case.values["t1"][0]))]
    if case.span_active:
        ends = ["t0", "t1"]
    elif case.ragged and case.form == "vmapped":
        ends[1] = "t1"
    elif case.ragged:
        ends[1] = literal(case.values["t1"])
    times = {
        "list": repr(case.values["ts"][:, 0].tolist()), "tensor": "ts", "list of tensors": "list(ts.unbind())", "by row": "ts",
        "steps": "'steps'",
    }.get(case.times)  # fmt: skip
    options = [f"rtol={case.rtol}", f"atol={case.atol}", f"method={case.method!r}", "max_steps=20_000"]
    options += [f"t_eval={times}"] * (times is not None) + [f"gradient={case.strategy}"] * bool(case.strategy)
    options += ["batched=True"] * (case.form == "batched") + ["dense_output=True"] * (case.times == "dense")
    options += ["quadrature=integrand"] * case.quadrature + ["events=event"] * bool(case.event) + ["compile=True"] * case.compiled
    options += ["throw=False"] * bool(case.dead) + [f"first_step={case.step}"] * (case.step is not None)
    n = case.equations.n
    state = f"shaped({start_name(case)})"
    if case.dead == "start":
        marks = [0.0 if ok else float("nan") for ok in case.alive]
        state = f"shaped({start_name(case)} + torch.tensor(" + repr(marks).replace("nan", "float('nan')") + ", dtype=y0.dtype)[:, None])"
    if case.door == "mass matrix":
        matrix = torch.tensor(mixing(n + case.algebraic))
        if case.algebraic:
            diagonal = torch.diag(torch.tensor([1.0] * n + [0.0]))
            matrix = matrix @ diagonal if case.detail == "singular mixed" else diagonal
        options.append(f"mass_matrix=torch.tensor({matrix.tolist()}, dtype=y0.dtype)")
    if case.door == "solve_dae":
        call = f"adjoint.solve_dae(fun, ({', '.join(ends)}), {state}, args=args, {', '.join(options)})"
    else:
        call = f"adjoint.solve_ivp(fun, ({', '.join(ends)}), {state}, args, {', '.join(options)})"
    lines = [f"sol = {call}"]
    if case.dead:
        lines.append(f"assert (sol.status >= 0).tolist() == {list(case.alive)}, f'status {{sol.status.tolist()}}'")
    samples = "flat(sol.y)"
    if case.times == "dense":
        samples = "flat(sol(ts))"
    elif case.times == "steps":
        rows = "torch.arange(len(sol.stats.n_accepted))"
        samples = "flat(sol.y)[-1:]" if case.form == "one" else f"flat(sol.y)[sol.stats.n_accepted, {rows}][None]"
    out = [f"'samples': {samples}"] + ["'integral': sol.quadrature"] * case.quadrature
    if case.event:
        out += ["'event_t': first_of(sol.events[0].t)", "'event_y': first_of(flat(sol.events[0].y))"]
    lines.append("return {" + ", ".join(out) + "}")
    return lines


def row_dims(case: Case) -> list[Any]:
    """Of every leaf: the dimension of its rows, or none."""
    dims: list[Any] = []
    by_row = {x.name for x in case.pieces if x.by_row}
    for name in leaves(case):
        if name == "ts":
            dims.append(1 if case.times == "by row" or case.ragged else None)
        elif name == "t1":
            dims.append(0 if case.ragged else None)
        else:
            dims.append(0 if name == "y0" or name in by_row else None)
    return dims


def outputs_text(case: Case, names: list[str]) -> str:
    if case.form != "vmapped" or case.derivative == "inner grad":
        return "\noutputs = solve\n\n"
    made = {"samples": 1} | ({"integral": 0} if case.quadrature else {})
    if case.event:
        made |= {"event_t": 0, "event_y": 0}
    return (
        f"\ndef outputs({', '.join(names)}):\n"
        f"    return torch.vmap(solve, in_dims={tuple(row_dims(case))}, out_dims={made})({', '.join(names)})\n\n"
    )


def loss_text(case: Case, names: list[str]) -> str:
    """Sums of ``w (x + x^2 / 4)`` over what comes out, of rows that live (and, for events, cross)."""
    inner = case.derivative == "inner grad"
    lines = [f"out = outputs({', '.join(names)})"]
    alive = [i for i, ok in enumerate(case.alive) if ok]
    crossed = [i for i, ok in enumerate(case.crosses) if ok and case.alive[i]]
    made = ["samples"] + ["integral"] * case.quadrature + ["event_t", "event_y"] * bool(case.event)
    lines.append("total = 0.0")
    for name in made:
        weight, keep = case.weights[name], crossed if name.startswith("event") else alive
        dim = 1 if name == "samples" else 0
        if case.form != "one" and not inner and not keep:
            # nothing comes out that depends on where the event is
            lines.append("total = total + 0.0 * level.sum()")
            continue
        if case.form == "one":
            text, value = literal(weight.select(dim, 0)), f"out[{name!r}]"
        elif inner:
            # what a row does not get to is NaN, and has no weight
            text, value = f"weights[{name!r}]", f"torch.where(weights[{name!r}] != 0, out[{name!r}], 0.0)"
        else:
            text, value = (
                literal(weight.index_select(dim, torch.tensor(keep, dtype=torch.long))),
                (f"out[{name!r}].index_select({dim}, torch.tensor({keep}, dtype=torch.long))"),
            )
        lines.append(f"x = {value}; total = total + ({text} * (x + 0.25 * x * x)).sum()")
    lines.append("return total")
    if not inner:
        return f"def loss({', '.join(names)}):\n" + indented(lines)
    given = "{" + ", ".join(f"{name!r}: {literal(masked(case, name))}" for name in made) + "}"
    dims = "{" + ", ".join(f"{name!r}: {1 if name == 'samples' else 0}" for name in made) + "}"
    return f"WEIGHTS = {given}\nWEIGHT_DIMS = {dims}\n\ndef loss_of_row(weights, {', '.join(names)}):\n" + indented(lines)


def masked(case: Case, name: str) -> Tensor:
    """Weights with zeros for rows that do not count."""
    keep = torch.tensor(case.crosses if name.startswith("event") else case.alive)
    weight = case.weights[name]
    return torch.where(keep.reshape(*[1] * (name == "samples"), -1, *[1] * (weight.dim() - 1 - (name == "samples"))), weight, 0.0)
