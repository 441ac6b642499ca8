"""What the engine is called with: the fields of its structures, which are written into its text and filled from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["BACKWARD_CALL", "CONSISTENT_CALL", "CONTEXT", "FORWARD_CALL", "Launch", "declarations", "filled"]

#: of a kernel by name, with so many threads and these arguments, behind whatever was launched before
Launch = Callable[[str, int, Sequence[Any]], None]

#: what functions of the user get: inputs that all share, those of each lane, tables, and where cotangents of inputs are added
CONTEXT = "struct Ctx { const R* const* u; const S* const* a; const R* const* k; S* const* b; };"

#: ``R`` is the real type of the state; B rows (trajectories), A anchors, T samples, n numbers in a state, K steps, S stages
FORWARD: tuple[tuple[str, str], ...] = (
    ("void*", "fun"),
    ("void*", "vjp"),
    ("void*", "jac"),
    ("void*", "bend"),
    ("void*", "mass"),
    ("void*", "mass_vjp"),
    ("void*", "events"),
    ("const double*", "directions"),  # (E,)
    ("const long*", "terminal"),
    ("const long*", "event_counts"),  # (E, B): how often they occurred before, or nothing
    ("const R* const*", "inputs"),
    ("const R* const*", "tables"),
    ("long", "rows"),
    ("long", "block"),  # rows that one thread takes at a time
    ("long", "threads"),
    ("void*", "team"),  # see `team_of_threads`
    ("const double*", "anchors"),  # (A, B)
    ("long", "n_anchors"),
    ("const double*", "t_eval"),  # (T, B)
    ("const long*", "order"),  # (T, B): samples by time, or nothing where they are
    ("long", "n_samples"),
    ("const R*", "y0"),  # (B, n)
    ("const R*", "rtol"),
    ("long", "rtol_row"),  # strides
    ("long", "rtol_column"),
    ("const R*", "atol"),
    ("long", "atol_row"),
    ("long", "atol_column"),
    ("const double*", "first_step"),  # (1 or B,), or nothing
    ("long", "first_step_row"),
    ("double", "max_step"),
    ("double", "min_step"),
    ("long", "max_steps"),
    ("long", "accept_smallest"),
    ("long", "adaptive"),
    ("double", "least_rtol"),  # of iterations for stages
    ("const R*", "power"),  # (n,): see `ResidualSolver`, or nothing
    ("const unsigned char*", "skipped"),  # (n,): variables that the error test leaves out, or nothing
    ("double", "safety"),
    ("double", "min_factor"),
    ("double", "max_factor"),
    ("double", "pcoeff"),
    ("double", "icoeff"),
    ("double", "dcoeff"),
    ("long", "shrink_accepted"),
    ("long", "predictive"),
    ("long", "remembers"),
    ("long", "shift"),  # 0: no jumps, 1: at inner anchors, 2: at all
    ("long", "watched"),  # whether steps are looked after for derivatives: see Loop::look
    ("double", "interval"),  # of stability, of the explicit one of two methods that hand over to each other; else zero
    ("const double*", "drawn"),  # (n,): where products with their Jacobians begin
    ("const unsigned char*", "idle"),  # (B,): of which nothing is to be done, or nothing
    ("long*", "unstable"),  # (B,)
    ("long*", "lost"),  # set where a matrix would need rows exchanged that a pattern forbids
    ("long", "guesses"),  # whether iterations may begin with the step before
    ("long", "keep_grid"),
    ("long", "keep_states"),
    ("long", "keep_stages"),
    ("long", "room"),  # steps for which there is memory
    ("R*", "states"),  # (room + 1, B, n)
    ("R*", "stages"),  # (room, S, B, n)
    ("double*", "t"),  # (room, B)
    ("double*", "h"),
    ("long*", "segment"),
    ("unsigned char*", "lands"),
    ("double*", "extra"),  # (room, E, B): what multistep methods record beside
    ("R*", "samples"),  # (T, B, n)
    ("long*", "sample_step"),  # (T, B)
    ("R*", "initial"),  # (B, n): where the initial state goes, or nothing
    ("R*", "final"),  # (B, n)
    ("R*", "last"),
    ("R*", "scaled"),
    ("long*", "n_steps"),  # (B,)
    ("long*", "n_accepted"),
    ("long*", "n_fun"),
    ("long*", "work"),  # (4, B): Jacobians, factorisations, solves, iterations
    ("long*", "status"),
    ("double*", "t_final"),
    ("double*", "next_step"),
    ("long*", "summary"),  # (5,), see `Summary`
    ("double*", "covered"),  # (B,): the times that trajectories have come to, while the solve goes on; or nothing
    ("const R*", "first_slope"),  # (B, n), of implicit equations, and where slopes go:
    ("R*", "slopes"),  # (T, B, n), those at samples, or nothing
    ("R*", "final_slope"),  # (B, n), or nothing
    ("long", "first"),  # of steps that are taken again, see `Again`
    ("long", "until"),
    ("const R*", "known"),  # (K, S, B, n / 2): stages of the record, or nothing
    ("const R*", "known_states"),  # (K + 1, B, n / 2), or nothing
    ("long", "noting"),  # whether of events more is noted than their times, and with 2 whether fun jumps there
)

BACKWARD: tuple[tuple[str, str], ...] = (
    ("void*", "fun"),
    ("void*", "vjp"),
    ("void*", "jac"),
    ("void*", "bend"),
    ("void*", "mass"),
    ("void*", "mass_vjp"),
    ("const R* const*", "inputs"),
    ("const R* const*", "tables"),
    ("long", "rows"),
    ("long", "block"),
    ("long", "threads"),
    ("void*", "team"),  # see `team_of_threads`
    ("const double*", "anchors"),
    ("long", "n_anchors"),
    ("long", "first"),  # the first of the steps that are gone back through, the last one being that before
    ("long", "n_steps"),
    ("const double*", "t"),  # (K, B)
    ("const double*", "h"),
    ("const long*", "segment"),
    ("const unsigned char*", "lands"),
    ("const R*", "states"),  # (K + 1, B, n)
    ("const R*", "stages"),  # (K, S, B, n), or nothing
    ("const double*", "extra"),  # (K, E, B), of multistep methods
    ("const long*", "status"),  # or nothing where none has failed
    ("const double*", "t_eval"),
    ("const long*", "order"),
    ("const long*", "sample_step"),
    ("long", "n_samples"),
    ("long", "jumps"),
    ("long", "timed"),  # cotangents of times are wanted
    ("long*", "lost"),
    ("const R*", "initial_bar"),  # (B, n), or nothing
    ("const R*", "final_bar"),  # (B, n), or nothing
    ("const R*", "samples_bar"),  # (T, B, n), or nothing
    ("const R*", "states_bar"),  # (K + 1, B, n), or nothing
    ("const R*", "stages_bar"),  # (K, S, B, n), or nothing
    ("R*", "y0_bar"),  # (B, n)
    ("R*", "handed_bar"),  # (B, n): of a slope handed on, from the steps behind these, and to those before; or nothing
    ("R* const*", "input_bars"),
    ("double*", "t_bar"),  # (K, B)
    ("double*", "h_bar"),
    ("double*", "t_eval_bar"),  # (T, B)
    ("long*", "infinite"),  # how many of the numbers in y0_bar and input_bars are not finite, where it is asked for
    ("void*", "events_vjp"),
    ("long", "n_events"),  # E, of which cotangents are given, by trajectory
    ("const long*", "event_id"),
    ("const long*", "event_row"),
    ("const long*", "event_step"),
    ("const double*", "event_t"),
    ("const double*", "event_value"),  # of their functions
    ("const R*", "event_y"),  # (E, n): states and slopes there
    ("const R*", "event_slope"),
    ("const double*", "event_t_bar"),  # (E,)
    ("const R*", "event_y_bar"),  # (E, n)
    ("R*", "event_bar"),  # (E, n): what is written for the sweep, as samples at fixed times
    ("long*", "flat"),  # how many of them have no derivative, as their functions have no slope there
)


#: of initial values of implicit equations; ``pencil``: asked for alone, with [G E] in it; ``y_bar``: of their way back, from consistent
#: values ``y`` and ``yp`` and their cotangents
CONSISTENT: tuple[tuple[str, str], ...] = (
    *((kind, name) for kind, name in FORWARD[:6]),
    ("const R* const*", "inputs"),
    ("const R* const*", "tables"),
    ("long", "rows"),
    ("long*", "lost"),
    ("const R*", "t"),  # (B,)
    ("const R*", "y"),  # (B, n)
    ("const R*", "yp"),
    ("const unsigned char*", "differential"),  # (n,)
    ("double", "rtol"),
    ("double", "least"),  # of pivots, beside the largest
    ("long", "most"),  # steps
    ("R*", "pencil"),  # (B, n, 2 n)
    ("R*", "y_found"),  # (B, n)
    ("R*", "yp_found"),
    ("unsigned char*", "found"),  # (B,)
    ("unsigned char*", "sound"),  # (B,): whether matrices say beyond doubt that variables are as in ``differential``, where it is asked for
    ("double", "condition"),  # the largest with which they do
    ("const R*", "y_bar"),  # (B, n)
    ("const R*", "yp_bar"),  # (B, n), or nothing
    ("R*", "y0_bar"),  # (B, n)
    ("R* const*", "input_bars"),  # to which something is added
    ("long*", "infinite"),  # how many of the numbers there are not finite
)


def declarations(context: bool = True) -> str:
    """The structures as C++, with that of what functions of the user get where it is not there already."""

    def one(name: str, fields: tuple[tuple[str, str], ...]) -> str:
        return f"struct {name} {{ " + " ".join(f"{kind} {field};" for kind, field in fields) + " };"

    return "\n".join([*([CONTEXT] if context else []), one("Forward", FORWARD), one("Backward", BACKWARD), one("Consistent", CONSISTENT)])


def _structure(fields: tuple[tuple[str, str], ...]) -> type[ctypes.Structure]:
    kinds = {"long": ctypes.c_long, "double": ctypes.c_double}
    return type("Call", (ctypes.Structure,), {"_fields_": [(name, kinds.get(kind, ctypes.c_void_p)) for kind, name in fields]})


FORWARD_CALL, BACKWARD_CALL, CONSISTENT_CALL = map(_structure, (FORWARD, BACKWARD, CONSISTENT))


def filled(kind: type[ctypes.Structure], **values: Any) -> Any:
    """A structure with these values; fields that are not given are zero or no pointer."""
    return kind(**{name: value for name, value in values.items() if value is not None})
