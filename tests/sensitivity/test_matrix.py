"""Every gradient strategy with every method of `solve_ivp`, for one trajectory, batches, a map, and natively.

Strategies that differentiate the computed steps are held against plain autograd through them, which is itself held against differences;
continuous adjoints against the true derivative, at two tolerances. What the library refuses is in one table: refusals that come or go
fail here.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adjoint import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    QuadratureAdjoint,
    SplitFunction,
    solve_ivp,
)
from adjoint.errors import UnsupportedCombination
from adjoint.methods import IMEX_METHODS, METHODS, SWITCHING_METHODS, FullyImplicitRungeKutta

KNOWN: dict[str, Any] = METHODS | IMEX_METHODS | SWITCHING_METHODS
pytestmark = pytest.mark.users_defaults

#: one trajectory, two in a batch, two mapped by ``torch.vmap``, the batch compiled, one trajectory compiled, and a batch so large
#: that vectors of trajectories are compiled
FORMS = ["eager", "batched", "vmapped", "compiled", "compiled one", "compiled many"]
BATCHES = ("batched", "compiled", "compiled many")
COPIES = 66

#: of these it is plain autograd through the same steps that they must equal
DISCRETE: dict[str, Any] = {
    "discrete": DiscreteAdjoint(),
    # small solves of one trajectory are recorded unless one says so
    "sweep": DiscreteAdjoint(keep_bytes=0),
    "checkpoints": DiscreteAdjoint(checkpoints=2),
    "backprop": Backprop(),
    "forward": ForwardSensitivity(),
}
#: by the method of the solve, and by one of the way back alone
CONTINUOUS: dict[str, Callable[..., Any]] = {
    "interpolating": InterpolatingAdjoint,
    "quadrature": QuadratureAdjoint,
    "gauss": GaussAdjoint,
    "backsolve": BacksolveAdjoint,
    "backsolve by tsit5": functools.partial(BacksolveAdjoint, method="tsit5"),
}

END = 0.35
TIMES = (0.13, END)
Y0 = torch.tensor([[0.5, -1.0], [1.2, 0.3]], dtype=torch.float64)
P = torch.tensor([[0.9, 1.3], [1.1, 0.7]], dtype=torch.float64)
C = torch.tensor([0.4, -0.2], dtype=torch.float64)
#: compiling takes seconds: other methods, and strategies, are compiled in the slow run
COMPILED_ALWAYS = {"bosh3", "rodas3p"}
#: of each family, and with error control or not: batches and maps of the others, which share its code, in the slow run
FAMILIES = {"tsit5", "rk4", "kvaerno5", "rodas5p", "radau5", "gl4", "bdf", "abm", "kencarp4", "ars443", *SWITCHING_METHODS}


class Case(NamedTuple):
    method: str
    strategy: str
    form: str

    @property
    def compiles(self) -> bool:
        return self.form.startswith("compiled")

    def has(self, *names: str) -> bool:
        """Whether the method is of such a kind."""
        return any(getattr(KNOWN[self.method], name, False) for name in names)


#: what is refused, in the order in which it is found out, and the words that say so
REFUSED: list[tuple[str, Callable[[Case], bool]]] = [
    ("takes steps again one by one", lambda c: c.strategy == "checkpoints" and c.has("multistep")),
    ("batched=True with BacksolveAdjoint", lambda c: c.strategy.startswith("backsolve") and c.form in BATCHES),
    ("method='auto' with", lambda c: c.strategy in CONTINUOUS and c.has("switching")),
    ("compile=True with", lambda c: c.compiles and c.strategy in ("forward", "backsolve", "backsolve by tsit5")),
    ("on the way back of BacksolveAdjoint", lambda c: c.strategy == "backsolve" and (c.has("implicit") or not c.has("adaptive"))),
    ("mode cannot see through BacksolveAdjoint", lambda c: c.strategy.startswith("backsolve") and c.form == "vmapped"),
]


def refusal(case: Case) -> str | None:
    return next((words for words, applies in REFUSED if applies(case)), None)


def cases(strategies: Iterable[str]) -> list[Any]:
    """The product, with the marks that each case asks for."""
    out = []
    for case in itertools.starmap(Case, itertools.product(KNOWN, strategies, FORMS)):
        if case.strategy == "sweep" and case.form != "eager":
            continue
        compiles = case.compiles and refusal(case) is None
        slow = compiles and (case.method not in COMPILED_ALWAYS or case.strategy != "discrete" or case.form != "compiled")
        slow |= case.form in ("batched", "vmapped") and case.method not in FAMILIES
        marks = [pytest.mark.compile] * compiles + [pytest.mark.slow] * slow
        out.append(pytest.param(case, marks=marks, id="-".join(case)))
    return out


def system(method: str, c: Tensor) -> Any:
    """Nonlinear, coupled and non-autonomous; ``c`` is captured, not passed. Stiff in one component for methods that look out for that."""
    rate = torch.tensor([400.0, 1.0]) if method in SWITCHING_METHODS else torch.ones(2)

    def first(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return torch.sin(p[..., :1] * y.flip(-1)) + c * y**2

    def second(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        t = t.unsqueeze(-1) if t.dim() else t
        return -rate * (p[..., 1:] * y * torch.cos(t) - c)

    return SplitFunction(first, second) if method in IMEX_METHODS else lambda t, y, p: first(t, y, p) + second(t, y, p)


def loss(y: Tensor) -> Tensor:
    """Of states ``(T, *, 2)``."""
    return (torch.tensor([[1.0, -2.0], [0.5, 1.5]]).reshape(2, *[1] * (y.dim() - 2), 2) * y.sin()).sum()


def constant(method: str) -> dict[str, Any]:
    """Three steps, of sizes that do not depend on the state: the same ones in every form. Of switching methods: steps of both kinds."""
    if method in SWITCHING_METHODS:
        return {"method": method, "rtol": 1e-5, "atol": 1e-7}
    if not KNOWN[method].adaptive:
        return {"method": method, "first_step": 0.15}
    # the iterations of coupled stages are as tight as the tolerance asks
    tolerance = 1e-3 if isinstance(KNOWN[method], FullyImplicitRungeKutta) else 1e30
    return {"method": method, "first_step": 0.15, "max_step": 0.15, "rtol": tolerance, "atol": tolerance}


def gradients(form: str, strategy: Any, options: dict[str, Any], rows: Sequence[int] = (0, 1)) -> tuple[Tensor, ...]:
    """The loss of some trajectories, and its gradients in initial states, arguments, and the captured tensor; one by one if "eager"."""
    one, copies = form in ("eager", "compiled one"), COPIES if form == "compiled many" else 1
    y0, p, c = (x.clone().requires_grad_() for x in (Y0[list(rows)].repeat(copies, 1), P[list(rows)].repeat(copies, 1), C))
    fun = system(options["method"], c)

    def value(y: Tensor, q: Tensor, **more: Any) -> Tensor:
        with warnings.catch_warnings():
            if options["method"] not in IMEX_METHODS:
                warnings.filterwarnings("error", "compile=True.*has no native form", RuntimeWarning)
            return loss(solve_ivp(fun, (0.0, END), y, (q,), t_eval=TIMES, gradient=strategy, **options, **more).y)

    if one:
        more = {"compile": True} if form == "compiled one" else {}
        total = torch.stack([value(y, q, **more) for y, q in zip(y0, p, strict=True)]).sum()
    elif form == "vmapped":
        total = torch.vmap(value)(y0, p).sum()
    else:
        total = value(y0, p, batched=True, compile=form != "batched")
    y_bar, p_bar, c_bar = torch.autograd.grad(total, (y0, p, c))
    if copies > 1:
        # all copies have the gradient of the first ones
        y_bar, p_bar = (x.unflatten(0, (copies, len(rows))) for x in (y_bar, p_bar))
        assert distance([y_bar, p_bar], [x[:1].expand_as(x) for x in (y_bar, p_bar)]) < 1e-9
        y_bar, p_bar = y_bar[0], p_bar[0]
    return total.detach() / copies, y_bar, p_bar, c_bar / copies


def inner_gradients(strategy: Any, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """In initial states and arguments, taken inside of the map."""

    def value(y: Tensor, q: Tensor) -> Tensor:
        return loss(solve_ivp(system(options["method"], C), (0.0, END), y, (q,), t_eval=TIMES, gradient=strategy, **options).y)

    return torch.vmap(torch.func.grad(value, argnums=(0, 1)))(Y0, P)


def rows_of(form: str) -> tuple[int, ...]:
    return (1,) if form in ("eager", "compiled one") else (0, 1)


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


@functools.cache
def unrolled(method: str, rows: Sequence[int] = (0, 1)) -> tuple[Tensor, ...]:
    """Plain autograd through the steps of one trajectory after the other."""
    return gradients("eager", Backprop(), constant(method), rows)


@functools.cache
def exact(rows: Sequence[int]) -> tuple[Tensor, ...]:
    return gradients("eager", Backprop(), {"method": "dopri8", "rtol": 1e-12, "atol": 1e-13}, rows)


def refused(case: Case, strategy: Any, options: dict[str, Any]) -> bool:
    """Whether the table says so; then the library has to say it too."""
    words = refusal(case)
    if words is not None:
        with pytest.raises(UnsupportedCombination, match=words):
            gradients(case.form, strategy, options, rows_of(case.form))
    return words is not None


@pytest.mark.parametrize("method", KNOWN)
def test_unrolled_steps_against_differences(method):
    """What the discrete strategies are held against: along one direction in everything, of the computed solution."""
    y0, p, c = torch.tensor([[0.3, -0.5], [1.0, 0.4]]), torch.tensor([[0.7, 0.2], [-0.6, 1.0]]), torch.tensor([0.5, -0.8])
    step, options, close, got = 1e-5, constant(method), 1e-5, unrolled(method)[1:]
    if method in SWITCHING_METHODS:
        # their steps move with the state, which derivatives of the computed solution leave out: little, where steps are small
        options, close = options | {"rtol": 1e-8, "atol": 1e-10}, 1e-3
        got = gradients("eager", Backprop(), options)[1:]
        sol = solve_ivp(system(method, C), (0.0, END), Y0[1], (P[1],), **constant(method))
        assert 0 < sol.stats.n_jac < sol.stats.n_accepted

    def total(s: float) -> float:
        fun = system(method, C + s * c)
        rows = zip(Y0 + s * y0, P + s * p, strict=True)
        return sum(float(loss(solve_ivp(fun, (0.0, END), y, (q,), t_eval=TIMES, **options).y)) for y, q in rows)

    want = (total(step) - total(-step)) / (2 * step)
    along = sum(float((g * d).sum()) for g, d in zip(got, (y0, p, c), strict=True))
    assert along == pytest.approx(want, rel=close)


@pytest.mark.parametrize("case", cases(DISCRETE))
def test_derivatives_of_the_computed_solution(case):
    strategy, options = DISCRETE[case.strategy], constant(case.method)
    if refused(case, strategy, options):
        return
    tolerance = 1e-11
    if case.has("switching") and case.form not in ("eager", "compiled one"):
        # sizes of the steps differ by the rounding of the controller; copies under vmap go over once
        tolerance = 1e-4
    elif case.strategy == "checkpoints" and case.has("implicit", "switching"):
        # stages are solved for again
        tolerance = 1e-5 if isinstance(KNOWN[case.method], FullyImplicitRungeKutta) else 1e-7
    elif case.compiles:
        tolerance = 1e-9
    rows = rows_of(case.form)
    want = unrolled(case.method, rows)
    assert distance(gradients(case.form, strategy, options, rows), want) < tolerance
    # there the other strategies go one of these two ways
    if case.form == "vmapped" and case.strategy in ("discrete", "backprop"):
        assert distance(inner_gradients(strategy, options), want[1:3]) < tolerance


def refinements(method: str) -> list[tuple[dict[str, Any], float]]:
    """Options from coarse to fine, and what the gradient may be off by."""
    kind, out = KNOWN[method], []
    for rtol, step in ((1e-2, 0.2), (1e-3, 0.1)) if method not in SWITCHING_METHODS and kind.order <= 2 else ((1e-3, 0.2), (1e-4, 0.1)):
        options = {"method": method, "rtol": rtol, "atol": rtol}
        if method in SWITCHING_METHODS or kind.adaptive:
            out.append((options, 30 * rtol))
        else:
            out.append((options | {"first_step": step}, step**kind.order + 5 * rtol))
    return out


@pytest.mark.parametrize("case", cases(CONTINUOUS))
def test_continuous_adjoints(case):
    """Of a batch or map at the finer tolerance only."""
    own = case.has("adaptive") or case.strategy.startswith("backsolve")
    strategy = CONTINUOUS[case.strategy]() if own else CONTINUOUS[case.strategy](method="tsit5")
    levels = refinements(case.method)
    if refused(case, strategy, levels[0][0]):
        return
    for options, tolerance in levels if case.form in ("eager", "compiled one") else levels[1:]:
        rows = rows_of(case.form)
        assert distance(gradients(case.form, strategy, options, rows), exact(rows)) < tolerance
