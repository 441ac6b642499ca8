"""``odeint_adjoint`` with a solver of its own for the way back: torchdiffeq's continuous adjoint, argument by argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import InvalidInput
from ..sensitivity.backsolve import Backsolve, backsolve
from ..system.capture import Substitute, cut_apart, leads_to, unknown_leaves
from ..system.origins import attribute
from ..system.witness import Witness
from .event_gradient import through_event
from .native import given_of, start_event
from .request import Request, family_of, mixed_norm, rms

__all__ = ["adjoint_parameters", "continuous_adjoint"]

_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def adjoint_parameters(request: Request) -> list[Tensor]:
    """All that ``func`` depends on: its parameters, in order, if it is a module, and tensors that it captured."""
    if not torch.is_grad_enabled():
        return []
    found = _found(request)
    if not isinstance(request.func, torch.nn.Module):
        return found
    # norms given by the user count on the order of the parameters
    place = {id(p): i for i, p in enumerate(request.func.parameters())}
    return sorted(found, key=lambda x: place.get(id(x), len(place)))


def _found(request: Request) -> list[Tensor]:
    found = given_of(request).probed()[0].tensors
    made = [x for x in found if x.grad_fn is not None]
    if not any(leads_to(x, [p for p in found if p is not x]) for x in made):
        return found
    # a tensor computed from another one of the list would be counted twice: its leaves stand for it
    leaves = {id(x): x for x in found if x.grad_fn is None}
    leaves.update((id(x), x) for m in made for x in unknown_leaves(m, []))
    return list(leaves.values())


def continuous_adjoint(
    request: Request,
    solve: Callable[[Any, Tensor, Callable[..., Any]], Any],
    integrate: Callable[..., Any],
    params: Sequence[Tensor],
    adjoint_rtol: Any,
    adjoint_atol: Any,
    adjoint_method: str,
    adjoint_options: dict[str, Any],
) -> Any:
    """The solution (with an event: its time and the solution), differentiated by `backsolve`.

    ``solve(y0, t, fun)`` is the forward solve; ``integrate(fun, y0, t, rtol=, atol=, method=, options=)`` solves the augmented system.
    """
    spec, witness = request.spec, Witness()
    is_tuple = isinstance(request.y0, tuple)
    shape = (spec.flatten(request.y0).shape[1],) if is_tuple else spec.shapes[0]

    def join(state: Any) -> Tensor:
        """A state as the one tensor of the adjoint system: flat for a tuple."""
        return spec.flatten(state).reshape(shape) if is_tuple else state

    def split(y: Tensor) -> Any:
        return spec.unflatten(y.reshape(1, -1)) if is_tuple else y

    def forward(y0: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor]:
        out = solve(split(y0), t, witness.watch(request.fun))
        witness.settle()
        when, states = (None, out) if request.event_fn is None else out
        if is_tuple:
            states = torch.cat([leaf.reshape(leaf.shape[0], -1).to(spec.dtype) for leaf in tree_leaves(states)], dim=1)
        return when, states

    options = dict(adjoint_options)
    options["norm"] = _adjoint_norm(options.get("norm"), request, is_tuple)

    def backward(dynamics: Any, state: tuple[Tensor, ...], t: Tensor) -> Sequence[Tensor]:
        for name in _CALLBACKS:
            callback = attribute(request.func, f"{name}_adjoint")
            if callback is not None:
                setattr(dynamics, name, callback)
        rtol, atol = (_augmented(x, request, state, shape) for x in (adjoint_rtol, adjoint_atol))
        out = integrate(dynamics, state, t, rtol=rtol, atol=atol, method=adjoint_method, options=options)
        return [leaf[1] for leaf in out]

    checked = family_of(adjoint_method) == "adaptive" and isinstance(adjoint_rtol, (int, float)) and isinstance(adjoint_atol, (int, float))
    tolerances = (float(adjoint_rtol), float(adjoint_atol)) if checked else None

    def fun(t: Tensor, y: Tensor) -> Tensor:
        return join(request.fun(t, split(y)))

    def apart() -> tuple[Any, Sequence[Tensor], None]:
        used = cut_apart(params, [True] * len(params))
        if all(x is p for x, p in zip(used, params, strict=True)):
            return fun, params, None

        def substituted(t: Tensor, y: Tensor) -> Tensor:
            with Substitute(params, used):
                return fun(t, y)

        return substituted, used, None

    config = Backsolve(fun, forward, backward, options, witness.check, tolerances=tolerances, apart=apart)
    when, states = backsolve(config, join(request.y0), request.t, params)
    if is_tuple:
        # one slice and one view a leaf
        sizes = [0, *torch.tensor(spec.sizes, device="cpu").cumsum(0).tolist()]
        leaves = [
            states[..., a:b].view(states.shape[0], *s).to(d) for a, b, s, d in zip(sizes, sizes[1:], spec.shapes, spec.dtypes, strict=False)
        ]
        states = torch.utils._pytree.tree_unflatten(leaves, spec.tree)
    if when is None:
        return states
    return _event_moved(request, when, states)


def _event_moved(request: Request, when: Tensor, states: Any) -> tuple[Tensor, Any]:
    """The event's time and state with their derivatives: `backsolve` holds the time fixed."""
    event, at_start = start_event(request)
    if at_start or not torch.is_grad_enabled():
        return when, states
    tree_map = torch.utils._pytree.tree_map
    last = tree_map(lambda x: x[-1], states)
    when, moved = through_event(request.fun, event, when, last, request.spec.real_dtype)
    return when, tree_map(lambda x, end: torch.cat([x[:-1], end.unsqueeze(0)]), states, moved)


def _augmented(value: Any, request: Request, state: tuple[Tensor, ...], shape: Sequence[int]) -> Any:
    """A tolerance per element of the state, for the augmented state: the smallest one for what is not shaped like the state."""
    leaves = tree_leaves(value)
    if len(leaves) == 1 and (not isinstance(leaves[0], Tensor) or leaves[0].dim() == 0):
        return value
    leaves = value.unbind() if isinstance(value, Tensor) and isinstance(request.y0, tuple) else leaves
    tensors = [torch.as_tensor(x, dtype=request.spec.real_dtype, device=request.spec.device) for x in leaves]
    if len(tensors) != len(request.spec.shapes):
        raise InvalidInput(f"a tupled tolerance must have the same length as the tuple y0: {len(tensors)} for {len(request.spec.shapes)}")
    full = torch.cat([x.expand(s).reshape(-1) for x, s in zip(tensors, request.spec.shapes, strict=True)]).reshape(tuple(shape))
    smallest = full.min()
    return (smallest, full, full, *(smallest for _ in state[3:]))


def _adjoint_norm(given: Any, request: Request, is_tuple: bool) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The norm of the augmented state ``(t, y, adj_y, *adj_params)``: given, "seminorm" (without the parameters), or the default."""
    spec = request.spec
    own = request.options.get("norm")

    def state_norm(y: Tensor) -> Tensor:
        state = spec.unflatten(y.reshape(1, -1)) if is_tuple else y
        if own is not None:
            return torch.as_tensor(own(state), device=y.device)
        return torch.as_tensor(mixed_norm(tree_leaves(state)) if is_tuple else rms(y))

    def norm(augmented: tuple[Tensor, ...], with_params: bool) -> Tensor:
        t, y, y_bar, *param_bars = augmented
        parts = [t.abs(), state_norm(y).to(t.dtype), state_norm(y_bar).to(t.dtype)]
        if with_params and param_bars:
            parts.append(torch.as_tensor(mixed_norm(param_bars)).to(t.dtype))
        return torch.stack(parts).amax()

    if given is None:
        return lambda augmented: norm(augmented, True)
    if isinstance(given, str):
        if given != "seminorm":
            raise InvalidInput(f'the adjoint norm must be "seminorm" or a function of the augmented state, got {given!r}')
        return lambda augmented: norm(augmented, False)
    custom: Callable[[tuple[Tensor, ...]], Tensor] = given
    if not callable(given):
        raise InvalidInput(f'the adjoint norm must be "seminorm" or a function of the augmented state, got {given!r}')
    if not is_tuple:
        return custom

    def unpacked(augmented: tuple[Tensor, ...]) -> Tensor:
        t, y, y_bar, *param_bars = augmented
        pieces = [piece for x in (y, y_bar) for piece in spec.unflatten(x.reshape(1, -1))]
        return custom((t, *pieces, *param_bars))

    return unpacked
