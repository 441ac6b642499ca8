"""``Doses``: amounts that enter the state at known times, at once or at a rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InvalidInput
from ..system.capture import readable
from ..system.system import StateSpec
from ..system.transforms import anywhere
from .arguments import as_times
from .round_rules import Boundary
from .rows import wide

__all__ = ["DoseRule", "Doses", "check_places", "with_mass_and_rate", "with_rate", "with_rate_of_slope", "without_rate"]


@dataclass(frozen=True)
class Doses:
    """Amounts that enter the state at known times: an entry of ``events=``.

    Times, amounts, durations, rates and lag times are differentiated. A round of the solve ends at each time (and where an infusion ends),
    so that no step goes over a jump. In implicit equations (`solve_dae`, ``mass_matrix=``) doses enter variables whose derivative appears,
    and algebraic ones follow: the slope of such a variable is what the equations say of it, and the rate.

    Of ``K`` doses; with ``batched=True`` each may be ``(K, B)``, for each trajectory its own, with NaN for times of those that have fewer
    (``torch.nn.utils.rnn.pad_sequence(times, padding_value=float("nan"))`` makes it of lists).

    Parameters
    ----------
    times : Tensor or sequence of numbers
        ``(K,)`` or ``(K, B)``, in any order. None may lie before the start of the solve; those behind its end are not given.
    amounts : number or Tensor
        ``()``, ``(K,)`` or ``(K, B)``: added to the state; of infusions in all.
    compartment : int or sequence of K ints
        Where: the place in the state of a trajectory, flattened (leaf by leaf in a pytree). Negative ones count from its end.
    duration, rate : number or Tensor
        Of infusions, one of the two: ``()``, ``(K,)`` or ``(K, B)``, positive; a rate of ``amount / duration`` is added to the slope.
    lag : number or Tensor
        Added to all times: ``()``, ``(B,)``, ``(K,)`` (of one trajectory) or ``(K, B)``.
    name : str
        ``sol.events[name]`` is the record of doses and of starts and ends of infusions: times, states before, and ``after``.
    """

    times: Any
    amounts: Any
    compartment: int | Sequence[int]
    duration: Any = None
    rate: Any = None
    lag: Any = 0.0
    name: str | None = "doses"

    def __post_init__(self) -> None:
        if self.duration is not None and self.rate is not None:
            raise InvalidInput("doses have a duration or a rate, the other one follows from the amount: leave one of the two out")

    def rule(self, spec: StateSpec, start: Tensor, title: str) -> DoseRule:
        """The doses as rounds see them; raises `InvalidInput`. ``start`` (R)."""
        times = as_times(self.times, f"times of {title}", spec.device).to(torch.float64)
        if times.dim() not in ((1, 2) if spec.batch is not None else (1,)) or (times.dim() == 2 and times.shape[1] != spec.batch):
            wanted = "(K,)" if spec.batch is None else f"(K,) or (K, {spec.batch})"
            raise InvalidInput(f"times of {title} must be {wanted}, got {tuple(times.shape)}")
        shape = torch.Size([len(times), *start.shape])

        def spread(value: Any, what: str, dtype: torch.dtype = torch.float64) -> Tensor:
            value = as_times(value, f"{what} of {title}", spec.device).to(dtype)
            fits = value.dim() == 0 or value.shape == shape or (value.dim() == 1 and value.shape[0] == shape[0])
            if what == "lag" and spec.batch is not None:
                fits = value.dim() == 0 or value.shape == shape or value.shape == shape[1:]
            if not fits:
                raise InvalidInput(f"{what} of {title} is {tuple(value.shape)} for times {tuple(shape)}")
            per_dose = value.dim() == 1 and not (what == "lag" and spec.batch is not None)
            return (wide(value, times.new_empty(shape)) if per_dose else value).expand(shape)

        when = spread(times, "times") + spread(self.lag, "lag")
        given = ~when.detach().isnan()
        when = torch.where(given, when, float("inf"))
        early = (when < start).detach()
        if readable(early) and bool(early.any()):
            first = float(when.detach()[early].min())
            raise InvalidInput(f"{title} has a time before the start of the solve, {first:.8g}: start earlier, or leave it out")
        amounts = torch.where(given, spread(self.amounts, "amounts", spec.dtype), 0.0)
        places = self._places(spec, len(times), title)
        if self.duration is None and self.rate is None:
            return DoseRule(self.name, title, spec, when, None, amounts, places)
        name = "duration" if self.rate is None else "rate"
        # both are real, also where amounts are complex
        other = spread(self.duration if self.rate is None else self.rate, name, spec.real_dtype)
        other = torch.where(given, other, 1.0)
        if readable(other) and not bool((other > 0).all()):
            raise InvalidInput(f"{name} of {title} must be positive")
        if self.rate is not None and amounts.is_complex():
            if readable(amounts) and bool((amounts.imag != 0).any()):
                raise InvalidInput(f"amounts of {title} of a complex state must be real where they enter at a rate: give a duration")
            amounts = amounts.real
        rate, duration = (amounts / other, other) if self.rate is None else (other.to(spec.dtype), amounts / other)
        if readable(duration) and bool((duration < 0).any()):
            raise InvalidInput(f"amounts of {title} must not be negative where they enter at a rate")
        return DoseRule(self.name, title, spec, when, when + duration.to(when.dtype), torch.where(given, rate, 0.0), places)

    def _places(self, spec: StateSpec, count: int, title: str) -> Tensor:
        """``(K, n)``: one where a dose enters."""
        n = sum(spec.sizes)
        listed = [self.compartment] * count if isinstance(self.compartment, int) else list(self.compartment)
        if len(listed) != count or not all(isinstance(c, int) and -n <= c < n for c in listed):
            raise InvalidInput(
                f"compartment of {title} must be one of the {n} places in the state, or {count} of them, got {self.compartment!r}"
            )
        return torch.nn.functional.one_hot(torch.tensor([c % n for c in listed], dtype=torch.int64, device=spec.device), n).to(spec.dtype)


@dataclass(frozen=True)
class DoseRule:
    """Doses as the rounds see them. ``when`` and, of infusions, ``until`` ``(K, R)``: infinity for none; ``sizes`` (K, R): amounts, of
    infusions rates; ``places`` (K, n)."""

    name: str | None
    title: str
    spec: StateSpec
    when: Tensor
    until: Tensor | None
    sizes: Tensor
    places: Tensor

    #: as `Rule`: it ends rounds, and never the solve
    ends = True
    terminal = 0

    @property
    def resets(self) -> bool:
        """Whether it changes the state."""
        return self.until is None

    @property
    def stops(self) -> Tensor:
        """All times at which rounds end, ``(S, R)``."""
        return self.when if self.until is None else torch.cat([self.when, self.until])

    def following(self, given: Tensor) -> Tensor:
        """The next of them that is not ``given`` (S, R) yet: ``(R)``, infinity for none."""
        if not len(given):
            return torch.full(given.shape[1:], float("inf"), dtype=torch.float64, device=given.device)
        left = torch.where(given, float("inf"), self.stops)
        return left.gather(0, left.detach().argmin(0, keepdim=True))[0]

    def applied(self, on: Tensor, at: Boundary) -> tuple[Boundary, Any]:
        """The boundary after the doses that are due, ``on`` (S, R), and the states there. Infusions change no state."""
        if self.until is not None or not anywhere(on):
            return at, at.y
        added = self._summed(torch.where(on, self.sizes, 0.0))
        y = tree_map(torch.add, at.y, added)
        return replace(at, y=y), y

    def rate(self, given: Tensor) -> Any:
        """What infusions add to the slope, as a state."""
        begun, over = given.tensor_split(2)
        return self._summed(torch.where(begun & ~over, self.sizes, 0.0))

    def _summed(self, sizes: Tensor) -> Any:
        flat = torch.einsum("kr,kn->rn", sizes.reshape(len(sizes), -1), self.places)
        return self.spec.unflatten(flat)


def with_rate(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``fun`` with a rate added, which is given behind its arguments."""

    def infused(t: Tensor, y: Any, *args: Any) -> Any:
        return tree_map(torch.add, fun(t, y, *args[:-1]), args[-1])

    infused.__wrapped__ = fun  # type: ignore[attr-defined]
    return infused


def with_rate_of_slope(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A residual whose slopes are what its equations say of them and a rate: an infusion is many small boluses."""

    def infused(t: Tensor, y: Any, yp: Any, *args: Any) -> Any:
        return fun(t, y, tree_map(torch.sub, yp, args[-1]), *args[:-1])

    infused.__wrapped__ = fun  # type: ignore[attr-defined]
    return infused


def with_mass_and_rate(fun: Callable[..., Any], mass: Any, spec: StateSpec) -> Callable[..., Any]:
    """``fun`` of ``M y' = fun``, for which `with_rate_of_slope` is ``M`` times the rate."""

    def infused(t: Tensor, y: Any, *args: Any) -> Any:
        matrix = mass if isinstance(mass, Tensor) else mass(t, y, *args[:-1])
        added = (matrix @ spec.flatten(args[-1]).unsqueeze(-1)).squeeze(-1)
        return tree_map(torch.add, fun(t, y, *args[:-1]), spec.unflatten(added))

    infused.__wrapped__ = fun  # type: ignore[attr-defined]
    return infused


def check_places(rules: Sequence[DoseRule], spec: StateSpec, of_slope: Callable[[Any], Any]) -> None:
    """Raise `InvalidInput` for doses into variables of implicit equations that have no slope there: they would change nothing.

    ``of_slope``: what a change of the slopes adds to the equations.
    """
    n = sum(spec.sizes)
    for rule in rules:
        for place in range(n):
            if not bool((rule.places[:, place] != 0).any()):
                continue
            unit = torch.zeros(spec.rows, n, dtype=spec.dtype, device=spec.device)
            unit[:, place] = 1.0
            leaves = [x for x in tree_leaves(of_slope(spec.unflatten(unit))) if isinstance(x, Tensor)]
            if all(readable(x) and not bool((x != 0).any()) for x in leaves):
                raise InvalidInput(
                    f"{rule.title} enters {spec.component(place)}, which is an algebraic variable: it follows from the others, and what is "
                    "added to it is lost. Name the place of a variable whose derivative is in the equations"
                )


def without_rate(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is given such a rate and does not want it."""

    def call(t: Tensor, y: Any, *args: Any) -> Any:
        return function(t, y, *args[:-1])

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call
