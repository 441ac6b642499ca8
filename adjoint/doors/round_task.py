"""What a solve with resets is of, and where its trajectories are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InvalidInput, counted
from ..sensitivity.products import tangent
from ..system.origins import attribute
from ..system.split import SplitFunction
from ..system.system import StateSpec
from ..system.transforms import anywhere
from .algebraic_slopes import with_algebraic_slopes
from .arguments import RoundSpan, Times, check_times, usual_tolerances
from .doses import DoseRule, Doses, check_places, with_mass_and_rate, with_rate, with_rate_of_slope, without_rate
from .mass_matrix import with_mass
from .round_results import Piece
from .round_rules import NEAR, Boundary, Rule, Scale, listed, rule_of
from .rows import chosen, forward_fill, still, usable
from .solution import Solution

__all__ = ["Progress", "Task", "mode_of", "needs_rounds", "task_of"]


def needs_rounds(events: Any) -> bool:
    """Whether some event has a reset, or is no function at all."""
    return any(isinstance(e, Doses) or attribute(e, "reset") is not None for e in listed(events))


@dataclass(frozen=True)
class Task:
    """What stays the same from round to round."""

    door: Callable[..., Solution]
    fun: Any
    args: tuple[Any, ...]
    rules: list[Rule | DoseRule]
    spec: StateSpec
    times: Times
    options: dict[str, Any]
    max_events: int
    #: of implicit equations: how consistent values are found
    implicit: Callable[..., Solution] | None

    @property
    def batched(self) -> bool:
        return self.spec.batch is not None

    @property
    def end(self) -> Tensor:
        """``(R)``"""
        end = self.times.anchors[-1]
        return end if self.batched else end[0]

    @property
    def start(self) -> Tensor:
        start = self.times.anchors[0]
        return start if self.batched else start[0]

    @property
    def sign(self) -> Tensor:
        """The direction of time."""
        return torch.where(self.end >= self.start, 1.0, -1.0)

    @property
    def reach(self) -> Tensor:
        """The largest time."""
        return torch.maximum(self.start.detach().abs(), self.end.detach().abs())

    @property
    def resolution(self) -> Tensor:
        """Times that differ by less are one."""
        return NEAR * torch.finfo(self.spec.real_dtype).eps * self.reach

    @property
    def watched(self) -> list[Rule]:
        """The events that are looked for."""
        return [rule for rule in self.rules if isinstance(rule, Rule)]

    @property
    def doses(self) -> list[DoseRule]:
        """Those at known times."""
        return [rule for rule in self.rules if isinstance(rule, DoseRule)]

    def infused(self, given: Sequence[Tensor]) -> tuple[Any, ...]:
        """What infusions add to the slope, where there are any."""
        rates = [rule.rate(g) for rule, g in zip(self.doses, given, strict=True) if rule.until is not None]
        return (tree_map(lambda *xs: sum(xs[1:], xs[0]), *rates),) if rates else ()

    def no_number(self, y: Any) -> Tensor:
        """Where ``(R)`` states are not finite."""
        return ~torch.isfinite(self.spec.flatten(still(y))).all(-1).reshape(self.end.shape)

    @property
    def scale(self) -> Scale:
        """What rounding is measured by, and errors of the solution."""
        most = {k: usual if self.options[k] is None else self.options[k] for k, usual in usual_tolerances(self.spec).items()}
        most = {k: max(float(torch.as_tensor(x).max()) for x in tree_leaves(value)) for k, value in most.items()}
        return Scale(self.sign, self.reach, torch.finfo(self.spec.real_dtype).eps, **most)

    def slope(self, infused: tuple[Any, ...]) -> Callable[[Tensor, Any, tuple[Any, ...]], Any] | None:
        """The right-hand side, where the equations tell the slope, with what is `infused`."""
        if self.implicit is not None:
            return None
        parts = (self.fun.explicit, self.fun.implicit) if isinstance(self.fun, SplitFunction) else (self.fun,)

        def rate(t: Tensor, y: Any, mode: tuple[Any, ...]) -> Any:
            rates = [f(t.to(self.spec.real_dtype), y, *mode, *usable((*self.args, *infused))) for f in parts]
            return rates[0] if len(rates) == 1 else tree_map(torch.add, *rates)

        return rate

    def settled(self, at: Boundary, infused: tuple[Any, ...], changed: Tensor, lost: Tensor, otherwise: Any) -> Boundary:
        """Consistent values with slopes, where resets have ``changed`` the state, or what is ``infused``; differentiable. Those that are
        ``lost`` have none, and ``otherwise`` is taken for them meanwhile."""
        if self.implicit is None or not anywhere(changed):
            return at
        t, y = chosen(lost, self.start.detach(), at.t), chosen(lost, still(otherwise), at.y)
        known = {name: self.options[name] for name in ("rtol", "atol", "batched", "linear_solver", "throw")}
        known |= {name: self.options[name] for name in ("differential", "y0_bounds", "jac_sparsity", "suppress_algebraic") if self._dae}
        fun, args = self._residual(y, at.mode, infused)
        none = RoundSpan(t, t, torch.ones_like(changed))
        sol = self.implicit(fun, none, y, args=args, consistent="solve", **known)
        y, yp = (tree_map(lambda x: x[0], part) for part in (sol.y, sol.yp))
        return replace(at, y=chosen(lost, at.y, y), yp=yp)

    def _residual(self, y: Any, mode: tuple[Any, ...], infused: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Implicit equations, and what they are given beside time, state and slope."""
        args = (*mode, *self.args, *infused)
        if self._dae:
            return self.fun, args
        fun, extra = with_mass(self.fun, self.options["mass_matrix"], y, self.batched)
        return fun, (*args, *extra)

    def moving(self, at: Boundary, infused: tuple[Any, ...], wanted: Tensor) -> Boundary:
        """What is at a boundary, without derivatives, where it is ``wanted`` with slopes of algebraic variables too."""
        if self.implicit is None or at.yp is None or not anywhere(wanted):
            return at
        with torch.inference_mode(False), torch.no_grad():
            at = at.still()
            t, y, mode, yp = forward_fill(wanted, (at.t, at.y, at.mode, at.yp))
            fun, args = self._residual(y, mode, still(infused))
            return replace(at, yp=chosen(wanted, with_algebraic_slopes(fun, (t, y, yp), still(args), self.spec), at.yp))

    @property
    def _dae(self) -> bool:
        return "yp0" in self.options


@dataclass
class Progress:
    """Where the trajectories are; all of shape ``(R)``."""

    at: Boundary
    going: Tensor
    status: Tensor
    #: of all doses, which times are behind: (S, R)
    given: list[Tensor]
    #: of all events, what is added to them: see `rearmed`
    shifts: list[Tensor]
    #: events that happened at the time where the trajectory is
    fired: list[Tensor]
    #: by how much their functions were not zero there: see `off_zero`
    off: list[Tensor]
    #: how often each happened
    counts: list[Tensor]
    happened: Tensor
    stalled: Tensor
    #: where their last rounds began; those that are done wait there
    rest: Boundary | None = None
    pieces: list[Piece] = field(default_factory=list)


def task_of(door: Callable[..., Solution], implicit: Callable[..., Solution] | None, arguments: dict[str, Any]) -> tuple[Task, Progress]:
    """What is to be solved by a front door, and where it begins; ``implicit``: the one for implicit equations, None for this one."""
    options = dict(arguments)
    implicit = door if implicit is None else implicit if options["mass_matrix"] is not None else None
    fun, t_span, y0, args, events, mode = (options.pop(name) for name in ("fun", "t_span", "y0", "args", "events", "mode"))
    max_events, t_eval = counted(options.pop("max_events"), "max_events"), options.pop("t_eval")
    spec = StateSpec.of(y0, options["batched"])
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    times = check_times(t_span, t_eval, None, spec)
    start = times.anchors[0] if spec.batch is not None else times.anchors[0, 0]
    rules: list[Rule | DoseRule] = []
    for i, event in enumerate(listed(events)):
        title = f"{type(event).__name__.lower()} {event.name!r}" if attribute(event, "name") else f"events[{i}]"
        rules.append(event.rule(spec, start.detach(), title) if isinstance(event, Doses) else rule_of(event, i))
    doses = [rule for rule in rules if isinstance(rule, DoseRule)]
    if doses and implicit is not None:
        check_places(doses, spec, _of_slope(fun, start, y0, (*(() if mode is None else (mode_of(mode, spec),)), *args), options, spec))
    if any(rule.until is not None for rule in doses):
        fun = _infused(fun, options, spec)
    task = Task(door, fun, args, rules, spec, times, options, max_events, implicit)
    if task.doses and anywhere(task.sign < 0):
        raise InvalidInput("doses go forward in time, but t_span ends before it starts")
    none = torch.zeros_like(task.start, dtype=torch.bool)
    zero = torch.zeros_like(task.start)
    count = torch.zeros_like(task.start, dtype=torch.int64)
    modes = () if mode is None else (mode_of(mode, spec),)
    at, n = Boundary(task.start, y0, modes), len(task.watched)
    given = [torch.zeros_like(rule.stops, dtype=torch.bool) for rule in task.doses]
    return task, Progress(at, ~none, count, given, [zero] * n, [none] * n, [zero] * n, [count] * n, count, count)


def _infused(fun: Any, options: dict[str, Any], spec: StateSpec) -> Any:
    """What is solved, given a rate behind its arguments; notes in ``options`` those functions that do not want it."""
    if callable(options.get("quadrature")):
        options["quadrature"] = without_rate(options["quadrature"])
    if "yp0" in options:
        return with_rate_of_slope(fun)
    mass = options["mass_matrix"]
    if mass is not None:
        if not isinstance(mass, Tensor):
            options["mass_matrix"] = without_rate(mass)
        return with_mass_and_rate(fun, mass, spec)
    return SplitFunction(with_rate(fun.explicit), without_rate(fun.implicit)) if isinstance(fun, SplitFunction) else with_rate(fun)


def _of_slope(
    fun: Any, start: Tensor, y0: Any, args: tuple[Any, ...], options: dict[str, Any], spec: StateSpec
) -> Callable[[Any], Any]:
    """What a change of the slopes at the start adds to implicit equations."""
    t, y, given = start.detach().to(spec.real_dtype), still(y0), still(args)
    if "yp0" not in options:
        mass = options["mass_matrix"]
        return lambda change: ((mass if isinstance(mass, Tensor) else mass(t, y, *given)).detach() @ spec.flatten(change).unsqueeze(-1))
    yp = tree_map(lambda x: torch.zeros_like(x.detach()), y0) if options["yp0"] is None else still(options["yp0"])

    def added(change: Any) -> Any:
        def moved(share: Tensor) -> Tensor:
            found = fun(t, y, tree_map(lambda a, b: a + share.to(a.dtype) * b, yp, change), *given)
            return torch.cat([x.reshape(-1) for x in tree_leaves(found)])

        with torch.inference_mode(False), torch.enable_grad():
            none = torch.zeros((), dtype=torch.float64, device=t.device)
            return tangent(moved, (none,), (torch.ones_like(none),)).detach()

    return added


def mode_of(mode: Any, spec: StateSpec) -> Any:
    """The initial mode in tensors, one for each trajectory."""

    def one(x: Any) -> Tensor:
        if not isinstance(x, (Tensor, bool, int, float)):
            raise InvalidInput(f"mode must be a number, a tensor or a pytree of them, got a {type(x).__name__}")
        x = torch.as_tensor(x, device=spec.device)
        if spec.batch is None or (x.dim() and x.shape[0] == spec.batch):
            return x
        return x.expand(spec.batch, *x.shape)

    return tree_map(one, mode)
