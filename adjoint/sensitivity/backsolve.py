"""The continuous adjoint that solves the state backwards in time again ("backsolve"; Pontryagin 1962, Chen et al. 2018).

It keeps no state but the outputs, and its gradient carries the error of a second solve: of the reversed dynamics, which are unstable
wherever the forward ones are stable. On stiff or strongly contracting problems it leaves the solution, which is an error where it is
seen, so it is never a default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import BacksolveDiverged, UnsupportedCombination
from ..system.ownership import owned
from ..system.transforms import functorch_active, naming_writes
from ..torch_internals import Node, copy_by_copy, dual_level, is_functorch_wrapped_tensor

__all__ = ["Backsolve", "Refuse", "backsolve"]

_TWICE = (
    "the continuous (backsolve) adjoint has no second derivatives. Use gradient=DiscreteAdjoint(), of adjoint.odeint_adjoint no "
    "adjoint_rtol, adjoint_atol, adjoint_method and adjoint_options: that gradient is exact and can be differentiated again"
)


Fun = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Backsolve:
    """One solve with its continuous adjoint.

    Attributes
    ----------
    fun : ``fun(t, y) -> dy/dt`` on the one tensor that is the state
    forward : ``forward(y0, t) -> (event time or None, states (T, *y0.shape))``, without derivatives
    backward : ``backward(dynamics, state, t) -> state`` solves the augmented system from ``t[0]`` to ``t[1]``; ``state`` is the tuple
        ``(time cotangent, y, adj_y, *parameter cotangents)``
    adjoint_options : the options that ``backward`` will use; visible on the autograd node
    check : called before the way back; raises if ``fun`` is not what it was
    tolerances : rtol and atol of the way back, if the state that comes back is to be held against the one that went out
    apart : for the way back ``fun`` and what it uses in the place of the parameters, see `cut_apart`, and ``see(slope, t, y)``, which
        raises if an evaluation of it depends on what is not among these
    """

    fun: Fun
    forward: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]
    backward: Callable[[Callable[..., Any], tuple[Tensor, ...], Tensor], Sequence[Tensor]]
    adjoint_options: dict[str, Any] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    tolerances: tuple[float, float] | None = None
    apart: Callable[[], tuple[Fun, Sequence[Tensor], Callable[[Tensor, Tensor, Tensor], None] | None]] | None = None


def backsolve(config: Backsolve, y0: Tensor, t: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
    """Event time (or None) and states at ``t``, differentiable in ``y0``, ``t`` and ``params``; an event's time is held fixed.

    ``t`` is ``(T,)`` and monotonic; with an event only ``t[0]`` counts. Raises `UnsupportedCombination` for tensors of a ``torch.func``
    transform or of forward mode.
    """
    if any(_transformed(x) for x in (y0, t, *params)):
        raise UnsupportedCombination("torch.func transforms and forward mode cannot see through the continuous adjoint: " + _TWICE)
    out = _Node.apply(config, y0, t, *params)
    return (None, out) if isinstance(out, Tensor) else out


def _transformed(x: Tensor) -> bool:
    if is_functorch_wrapped_tensor(x):
        return True
    return dual_level() >= 0 and forward_ad.unpack_dual(x).tangent is not None


class _Node(Node):
    @staticmethod
    def forward(config: Backsolve, y0: Tensor, t: Tensor, *params: Tensor) -> Any:
        when, states = config.forward(y0, t)
        return states if when is None else (when, states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        config, _, t, *params = inputs
        ctx.config, ctx.adjoint_options = owned(config), config.adjoint_options
        ctx.event = not isinstance(output, Tensor)
        ctx.n_times = t.shape[0]
        times, states = t, output
        if ctx.event:
            when, states = output
            ctx.mark_non_differentiable(when)
            times = torch.cat([t[:1], when.reshape(1).to(t)])
        ctx.save_for_backward(times, states, *params)

    @staticmethod
    @copy_by_copy
    @naming_writes
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if functorch_active():
            raise UnsupportedCombination("torch.func transforms cannot see through the continuous adjoint: " + _TWICE)
        bar = cotangents[-1]
        _, wants_y0, wants_t, *_ = ctx.needs_input_grad
        t, states, *params = ctx.saved_tensors
        # pieces of these are given to fun, which may take derivatives in them itself: they belong to no graph
        times, path = t.detach(), states.detach()
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            config = ctx.config()
            config.check()
            y0_bar, t_bars, param_bars = _sweep(config, times, path, params, bar, wants_t)
        if t_bars is not None and ctx.event:
            t_bars = torch.cat([t_bars[:1], t_bars.new_zeros(ctx.n_times - 1)])
        found = [y0_bar, *param_bars] if t_bars is None else [y0_bar, t_bars, *param_bars]
        if torch.is_grad_enabled():
            found = list(Refuse.apply(_TWICE, len(found), *found, bar, states, t, *params))
        y0_bar = found.pop(0)
        t_bars = None if t_bars is None else found.pop(0)
        return (None, y0_bar if wants_y0 else None, t_bars, *found)


def _sweep(
    config: Backsolve, t: Tensor, states: Tensor, params: Sequence[Tensor], bar: Tensor, wants_t: bool
) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
    """Integrate the augmented system from the last time to the first, adding the cotangents of the states on the way."""
    real = states.dtype.to_real()
    fun, used, see = (config.fun, params, None) if config.apart is None else config.apart()
    dynamics = _Dynamics(fun, used, see, wants_t)
    t_bar = torch.zeros((), dtype=real, device=states.device)
    y_bar = bar[-1]
    param_bars: list[Tensor] = [torch.zeros_like(p) for p in params]
    t_bars = torch.zeros_like(t) if wants_t else None
    for i in range(t.shape[0] - 1, 0, -1):
        if t_bars is not None:
            slope = fun(t[i].to(real), states[i])
            moved = _dot(slope, bar[i])
            t_bar = t_bar - moved
            t_bars[i] = moved
        state = (t_bar, states[i], y_bar, *param_bars)
        t_bar, y, y_bar, *param_bars = config.backward(dynamics, state, torch.stack([t[i], t[i - 1]]))
        if config.tolerances is not None:
            _check_return(y, states[i - 1], float(t[i]), float(t[i - 1]), *config.tolerances)
        # the stored state replaces the backsolved one, whose error would grow from interval to interval
        y_bar = y_bar + bar[i - 1]
    if t_bars is not None:
        t_bars[0] = t_bar
    return y_bar, t_bars, param_bars


def _check_return(y: Tensor, stored: Tensor, t: float, back: float, rtol: float, atol: float) -> None:
    """Raise `BacksolveDiverged` where the state solved back from ``t`` is not the one stored for ``back``, by far more than tolerances.

    By up to a thousand of them it may be off, as errors grow on the way; by a tenth of its size no gradient survives.
    """
    if not y.numel():
        return
    size = torch.maximum(y.abs(), stored.abs()).amax()
    unit = max(rtol, 10 * torch.finfo(size.dtype).eps) * size + atol
    off = (y - stored).abs().amax()
    if bool(off <= torch.minimum(1000 * unit, 0.1 * size + 10 * unit)):
        return
    raise BacksolveDiverged(
        f"solved backwards from t = {t:.6g}, the state at t = {back:.6g} comes out off by {float(off):.3g} (its size: "
        f"{float(stored.abs().amax()):.3g}; {float(off / unit):.3g} times the tolerance), so the gradient along it would be wrong: the "
        "solution contracts, or is chaotic. Use gradient=DiscreteAdjoint() (odeint_adjoint: leave adjoint_rtol, adjoint_atol, "
        "adjoint_method and adjoint_options out), or InterpolatingAdjoint()",
        t=back,
    )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.conj() * y).real.sum() if x.is_complex() else (x * y).sum()


class _Dynamics:
    """Right-hand side of the augmented system: ``(-f_t* a, f, -f_y* a, -f_p* a)``. Callbacks may be hung on it."""

    def __init__(self, fun: Fun, params: Sequence[Tensor], see: Callable[[Tensor, Tensor, Tensor], None] | None, time: bool) -> None:
        self.fun, self.see, self.params, self.time = fun, see, tuple(params), time

    def __call__(self, t: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _, y, y_bar, *_ = state
        if functorch_active():
            return self._transformed(t, y, y_bar)
        # methods with implicit stages differentiate this once more: without a graph they would iterate with a Jacobian of zeros
        recorded = torch.is_grad_enabled() and (y.requires_grad or y_bar.requires_grad)
        with torch.enable_grad():
            t = t.detach().requires_grad_(self.time)
            y = y if recorded and y.requires_grad else y.detach().requires_grad_(True)
            slope = self.fun(t, y)
            if self.see is not None:
                self.see(slope, t, y)
            wanted = (y, *((t,) if self.time else ()), *self.params)
            if slope.requires_grad:
                # what fun captured may have a graph of its own, which the next evaluation needs again
                found = torch.autograd.grad(slope, wanted, -y_bar, allow_unused=True, retain_graph=True, create_graph=recorded)
            else:
                found = (None,) * len(wanted)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
        y_rate = filled.pop(0)
        t_rate = filled.pop(0) if self.time else torch.zeros_like(t)
        rates = (t_rate, slope, y_rate, *filled)
        return rates if recorded else tuple(x.detach() for x in rates)

    def _transformed(self, t: Tensor, y: Tensor, y_bar: Tensor) -> tuple[Tensor, ...]:
        """As a function of ``y`` and ``y_bar`` under a transform, which tests Jacobians: parameters cannot be reached from there."""
        slope, pull, *_ = torch.func.vjp(lambda x: self.fun(t, x), y)
        return (torch.zeros_like(t), slope, pull(-y_bar)[0], *(torch.zeros_like(p) for p in self.params))


class Refuse(Node):
    """``apply(message, n, *tensors)`` passes the first ``n`` tensors on; whoever differentiates them gets the message as an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise UnsupportedCombination(ctx.message)
