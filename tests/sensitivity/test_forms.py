"""Equations, methods, forms, outputs, derivatives and strategies: every pair of choices meets in some case.

The truth is a solution in closed form, differentiated by autograd as often as it takes. The quick run has every pair of choices, the slow
one some hundreds more. What the library refuses is in one table, of which some cases are tried.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from adjoint import (
    Backprop,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    QuadratureAdjoint,
    SplitFunction,
    solve_dae,
    solve_ivp,
)
from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.torch_internals import is_functorch_wrapped_tensor

pytestmark = pytest.mark.users_defaults

#: how the system is written, and the method; with the tolerance, and the constant step of methods without an error estimate
METHODS: dict[str, tuple[str, str, float, float | None]] = {
    "dopri8": ("ode", "dopri8", 1e-8, None),
    "tsit5": ("ode", "tsit5", 1e-6, None),
    "gl6": ("ode", "gl6", 1e-6, 0.1),
    "rk4": ("ode", "rk4", 1e-6, 0.04),
    "abm": ("ode", "abm", 1e-6, None),
    "kvaerno5": ("ode", "kvaerno5", 1e-6, None),
    "rodas5p": ("ode", "rodas5p", 1e-6, None),
    "radau5": ("ode", "radau5", 1e-6, None),
    "bdf": ("ode", "bdf", 1e-6, None),
    "auto": ("ode", "auto", 1e-6, None),
    "kencarp5": ("split", "kencarp5", 1e-6, None),
    "mass rodas5p": ("mass", "rodas5p", 1e-6, None),
    "mass radau5": ("mass", "radau5", 1e-6, None),
    "mass bdf": ("mass", "bdf", 1e-6, None),
    "dae radau": ("dae", "radau", 1e-6, None),
    "dae bdf": ("dae", "bdf", 1e-6, None),
}
STRATEGIES: dict[str, Any] = {
    "default": None,
    "sweep": DiscreteAdjoint(keep_bytes=0),
    "checkpoints": DiscreteAdjoint(checkpoints=3),
    "backprop": Backprop(),
    "forward": ForwardSensitivity(),
    "interpolating": InterpolatingAdjoint(),
    "quadrature": QuadratureAdjoint(),
    "gauss": GaussAdjoint(),
}
CONTINUOUS = {"interpolating", "quadrature", "gauss"}
#: one after the other; two with ends of their own; beside one that fails at the start, or later; mapped by ``torch.vmap``
FORMS = ["one", "ragged", "dead", "dying", "mapped"]
OUTPUTS = ["end", "samples", "dense", "terminal", "passed", "integral"]
DERIVATIVES = ["backward", "second", "dual", "grad", "hvp"]

#: of value, first and second derivative
TOLERANCES = (3e-5, 3e-4, 3e-2)
START = 0.1
Y0 = torch.tensor([[1.0, -0.4], [0.8, 0.5]], dtype=torch.float64)
P = torch.tensor([[1.3, 0.7], [0.9, -0.6]], dtype=torch.float64)
ENDS = torch.tensor([0.6, 0.5], dtype=torch.float64)
LEVEL = torch.tensor(0.68, dtype=torch.float64)
GAIN = torch.tensor(0.8, dtype=torch.float64)
FRACTIONS = torch.tensor([0.0, 0.37, 0.81, 1.0], dtype=torch.float64)
LEAVES = (Y0, P, ENDS, LEVEL, GAIN)


class Case(NamedTuple):
    method: str
    form: str
    output: str
    derivative: str
    strategy: str

    @property
    def kind(self) -> str:
        return METHODS[self.method][0]

    @property
    def transform(self) -> bool:
        return self.derivative in ("dual", "grad", "hvp")

    @property
    def second_order(self) -> bool:
        return self.derivative in ("second", "hvp")

    @property
    def constrained(self) -> bool:
        """Whether it is solved as a DAE: also the mass matrices of methods that iterate."""
        return self.kind == "dae" or self.method in ("mass radau5", "mass bdf")

    @property
    def event(self) -> bool:
        return self.output in ("terminal", "passed")


AXES: tuple[Sequence[str], ...] = (list(METHODS), FORMS, OUTPUTS, DERIVATIVES, list(STRATEGIES))

#: what is refused, and the words that say so
REFUSED: list[tuple[str, Callable[[Case], bool]]] = [
    (
        "does not keep the states",
        lambda c: c.strategy == "checkpoints" and (c.constrained or c.event or c.output == "dense"),
    ),
    ("takes steps again one by one", lambda c: c.strategy == "checkpoints" and c.method.endswith(("abm", "bdf"))),
    ("method='auto' with", lambda c: c.strategy in CONTINUOUS and c.method == "auto"),
    ("mass_matrix= with 'rodas5p'", lambda c: c.strategy in CONTINUOUS and c.method == "mass rodas5p"),
    ("events= with", lambda c: c.strategy in CONTINUOUS and c.event),
    ("has no error control", lambda c: c.strategy in CONTINUOUS and c.method in ("rk4", "gl6")),
]


def refusal(case: Case) -> str | None:
    return next((words for words, applies in REFUSED if applies(case)), None)


def cases() -> list[Any]:
    """Cases in which every pair of choices meets that is not refused, greedily from random ones; some of those for the slow run."""
    rng = random.Random(0)
    every = list(itertools.starmap(Case, itertools.product(*AXES)))
    candidates = [case for case in rng.sample(every, 4000) if refusal(case) is None]
    pairs = {case: {(a, b, case[a], case[b]) for a, b in itertools.combinations(range(len(AXES)), 2)} for case in candidates}
    missing, quick = set().union(*pairs.values()), []
    while missing:
        sample = rng.sample(candidates, 100)
        best = max(sample, key=lambda case: len(pairs[case] & missing))
        if not pairs[best] & missing:
            best = next(case for case in candidates if pairs[case] & missing)
        quick.append(best)
        missing -= pairs[best]
    slow = [case for case in candidates[:500] if case not in quick]
    # second derivatives of stages that are solved for take seconds
    slow += [
        case for case in quick if case.second_order and case.strategy != "default" and case.method not in ("dopri8", "tsit5", "rk4", "abm")
    ]
    # and where a trajectory is followed to where it fails, of all steps that lead there
    slow += [case for case in quick if case.second_order and case.form == "dying" and case.method != "tsit5"]
    return [pytest.param(case, id="-".join(case), marks=[pytest.mark.slow] * (case in slow)) for case in dict.fromkeys(quick + slow)]


def solved(case: Case, y0: Tensor, p: Tensor, end: Tensor, level: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """What the case looks at, of one trajectory or of a batch."""
    kind, method, rtol, step = METHODS[case.method]
    rows = y0.shape[0] if y0.dim() == 2 else None
    options: dict[str, Any] = {"method": method, "rtol": rtol, "atol": rtol, "batched": rows is not None}
    if STRATEGIES[case.strategy] is not None:
        options["gradient"] = STRATEGIES[case.strategy]
    if step is not None:
        options["first_step"] = step
    if kind in ("mass", "dae"):
        y0 = torch.cat([y0, torch.asinh(y0[..., :1] * y0[..., 1:2] + gain)], -1)
    if case.form in ("dead", "dying"):
        wrong = y0[:1].detach() * (float("nan") if case.form == "dead" else 1.0)
        y0, p, end = torch.cat([y0, wrong]), torch.cat([p, p[:1].detach()]), torch.cat([end, end[:1].detach()])
        rows, options["throw"] = 3, False
    times = START + (end - START) * (FRACTIONS if rows is None else FRACTIONS[:, None])

    def first(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        slope = torch.stack([-p[..., 0] * y[..., 0], gain * p[..., 1] * y[..., 0]], -1)
        if case.form != "dying":
            return slope
        # of the last one only
        late = (t > 0.3) & (torch.arange(3) == 2)
        return slope * torch.where(late, float("nan"), 1.0)[:, None]

    def second(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(y[..., 1]), torch.cos(t) - 0.5 * y[..., 1]], -1)

    def gap(y: Tensor) -> Tensor:
        return y[..., 0] * y[..., 1] + gain - torch.sinh(y[..., 2])

    def whole(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        rate = first(t, y, p) + second(t, y, p)
        return rate if kind == "ode" else torch.cat([rate, gap(y)[..., None]], -1)

    def residual(t: Tensor, y: Tensor, yp: Tensor, p: Tensor) -> Tensor:
        rate = first(t, y, p) + second(t, y, p)
        gaps = yp[..., :2] - rate
        return torch.stack([gaps[..., 0], gaps[..., 1] + 0.5 * gaps[..., 0], gap(y)], -1)

    def event(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return y[..., 0] - level

    def integrand(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return y[..., 0] * gain

    event.terminal = case.output == "terminal"
    if case.output == "samples":
        options["t_eval"] = times
    elif case.output == "dense":
        options["dense_output"] = True
    elif case.event:
        options["events"] = event
    elif case.output == "integral":
        options["quadrature"] = integrand
    span = (START, end)
    if kind == "mass":
        options["mass_matrix"] = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    if kind == "dae":
        sol = solve_dae(residual, span, y0, args=(p,), **options)
    else:
        sol = solve_ivp(SplitFunction(first, second) if kind == "split" else whole, span, y0, (p,), **options)
    # within transforms numbers of tensors cannot be asked for before PyTorch 2.7
    if case.form in ("dead", "dying") and not is_functorch_wrapped_tensor(p):
        assert (sol.status >= 0).tolist() == [True, True, False]
    if case.output == "samples":
        shown: tuple[Tensor, ...] = (sol.y,)
    elif case.output == "dense":
        shown = (sol(times),)
    elif case.event:
        found = sol.events[0]
        shown = (found.t[0], found.y[0], sol.y[-1])
    else:
        shown = (sol.y[-1], sol.quadrature) if case.output == "integral" else (sol.y[-1],)
    if case.form in ("dead", "dying"):
        shown = tuple(x[:, :2] if x.dim() == 3 else x[:2] for x in shown)
    return shown


def exact(case: Case, y0: Tensor, p: Tensor, end: Tensor, level: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """The same of one trajectory, in closed form."""

    def state(t: Tensor) -> Tensor:
        s, (a, b) = t - START, p
        u = y0[0] * torch.exp(-a * s)
        forced = gain * b * y0[0] / (0.5 - a) * (torch.exp(-a * s) - torch.exp(-s / 2))
        # of cos(t) - v / 2
        wave = 0.4 * torch.cos(t) + 0.8 * torch.sin(t) - (0.4 * torch.cos(START_T) + 0.8 * torch.sin(START_T)) * torch.exp(-s / 2)
        v = y0[1] * torch.exp(-s / 2) + forced + wave
        parts = [u, v] if case.kind in ("ode", "split") else [u, v, torch.asinh(u * v + gain)]
        return torch.stack(parts, -1)

    if case.output in ("samples", "dense"):
        return (state(START + (end - START) * FRACTIONS),)
    if case.event:
        when = START + torch.log(y0[0] / level) / p[0]
        return when, state(when), state(when if case.output == "terminal" else end)
    if case.output == "integral":
        return state(end), gain * y0[0] * (1 - torch.exp(-p[0] * (end - START))) / p[0]
    return (state(end),)


START_T = torch.tensor(START, dtype=torch.float64)


def loss(outputs: Sequence[Tensor]) -> Tensor:
    """Of one trajectory: times, states ``(n,)``, samples ``(T, n)``."""
    total = torch.zeros(())
    for x in outputs:
        weight = torch.cos(1.0 + torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape)
        total = total + (weight * (x + 0.25 * x * x)).sum()
    return total


def value(case: Case, solve: Callable[..., tuple[Tensor, ...]], *leaves: Tensor) -> Tensor:
    y0, p, end, level, gain = leaves
    one = functools.partial(solve, case)
    if case.form == "one" or solve is exact:
        return sum(((i + 1) * loss(one(y0[i], p[i], end[i], level, gain)) for i in range(2)), start=torch.zeros(()))
    if case.form == "mapped":
        outputs = torch.vmap(lambda *x: loss(one(*x)), in_dims=(0, 0, 0, None, None))(y0, p, end, level, gain)
        return outputs @ torch.tensor([1.0, 2.0])
    outputs = one(y0, p, end, level, gain)
    rows = [loss([x[:, i] if x.dim() == 3 else x[i] for x in outputs]) for i in range(2)]
    return rows[0] + 2 * rows[1]


def derivatives(case: Case, solve: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Value, derivative along a direction, and that along a second one where the case has it."""
    gen = torch.Generator().manual_seed(3)
    v, w = (tuple(0.3 * torch.randn(x.shape, generator=gen, dtype=x.dtype) for x in LEAVES) for _ in range(2))
    f = functools.partial(value, case, solve)

    def dot(grads: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
        return sum(((g * a).sum() for g, a in zip(grads, along, strict=True)), start=torch.zeros(()))

    if case.derivative in ("backward", "second"):
        x = tuple(leaf.clone().requires_grad_() for leaf in LEAVES)
        out = f(*x)
        unused = {"allow_unused": True, "materialize_grads": True}
        first = dot(torch.autograd.grad(out, x, create_graph=case.second_order, **unused), v)
        more = (dot(torch.autograd.grad(first, x, **unused), w),) if case.second_order else ()
        return out.detach(), first.detach(), *more
    if case.derivative == "dual":
        with forward_ad.dual_level():
            out = f(*map(forward_ad.make_dual, LEAVES, v))
            return tuple(forward_ad.unpack_dual(out))
    gradient = torch.func.grad_and_value(f, argnums=tuple(range(len(LEAVES))))
    if case.derivative == "grad":
        grads, out = gradient(*LEAVES)
        return out, dot(grads, v)
    (grads, out), (second, _) = torch.func.jvp(gradient, LEAVES, w)
    return out, dot(grads, v), dot(second, v)


@functools.cache
def truth(case: Case) -> tuple[Tensor, ...]:
    return derivatives(case, exact)


@pytest.mark.parametrize("case", cases())
@pytest.mark.slow_cases(
    "tsit5-dying-dense-hvp-interpolating", "tsit5-dying-terminal-hvp-sweep", "mass rodas5p-dying-passed-grad-default",
    "kencarp5-dying-terminal-dual-backprop",
)  # fmt: skip
def test_against_the_closed_form(case):
    if case.method == "bdf" and case.output == "samples" and case.second_order:
        # the first one lies in a step of first order
        with pytest.raises(InvalidInput, match="straight line"):
            derivatives(case, solved)
        return
    got, want = derivatives(case, solved), truth(case._replace(method=next(m for m in METHODS if METHODS[m][0] == case.kind)))
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert float(a) == pytest.approx(float(b), rel=TOLERANCES[i], abs=TOLERANCES[i]), ("value", "first", "second")[i]


@pytest.mark.parametrize(("words", "applies"), REFUSED)
def test_refused(words, applies):
    of_it = [c for c in itertools.starmap(Case, itertools.product(*AXES)) if refusal(c) == words]
    for case in random.Random(0).sample(of_it, min(6, len(of_it))):
        with pytest.raises((InvalidInput, UnsupportedCombination), match=words):
            derivatives(case, solved)
