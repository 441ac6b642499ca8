"""The front door of mechanical systems with constraints: stabilised equations of index 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..system.system import StateSpec
from ..system.transforms import naming_faults
from .contact_mechanics import ContactMechanics
from .contacts import Contact
from .dae import solve_dae
from .holonomic import saddle, solved
from .mechanism import Mechanism, check_options
from .round_task import mode_of
from .solution import Solution

__all__ = ["MechanicalState", "Mechanics", "mechanics"]


class MechanicalState(NamedTuple):
    """Coordinates ``q`` and velocities ``v`` (..., n), forces ``lam`` in the constraints and the stabilising ``mu`` (..., m), zero in
    exact arithmetic."""

    q: Tensor
    v: Tensor
    lam: Tensor
    mu: Tensor


class Mechanics(Mechanism):
    """See `mechanics`."""

    def residual(self, t: Tensor, y: MechanicalState, yp: MechanicalState, *args: Any) -> MechanicalState:
        """See `Mechanism.stabilised`."""
        return MechanicalState(*self.stabilised(t, y, (yp.q, yp.v), args))

    @naming_faults
    def initial(self, q0: Tensor, v0: Tensor, *args: Any, t0: Any = 0.0, throw: bool = True) -> tuple[MechanicalState, MechanicalState]:
        """Consistent state and slope at ``t0`` near the given coordinates and velocities, differentiable in everything.

        Coordinates are moved to the nearest ones on the constraint, velocities to the nearest ones in the metric of ``M`` that stay on it;
        accelerations and constraint forces are those of the equations of motion. Raises `SingularJacobian` for redundant constraints (under
        ``torch.vmap``, which lets nobody look at values, one is found out by the solve only) and where masses determine no accelerations,
        `InconsistentInitialCondition` for values that are not finite; without ``throw`` such trajectories are NaN.
        """
        q, v, a, lam = self.started(self._start, t0, q0, v0, args, throw)
        zero = torch.zeros_like(lam)
        return MechanicalState(q, v, lam, zero), MechanicalState(v, a, zero, zero)

    def _start(self, t: Tensor, q0: Tensor, v0: Tensor, args: tuple[Any, ...], throw: bool) -> tuple[Tensor, ...]:
        """Coordinates, velocities, accelerations and constraint forces."""
        q, v = self.placed(t, q0, v0, args, throw)
        G, curve = self.curved(t, q, v, args)
        both = solved(saddle(self.mass_matrix(q, args), G), self.forced(t, q, v, args), -curve)
        return q, v, both[..., : q.shape[-1]], both[..., q.shape[-1] :]

    @naming_faults
    def solve(self, t_span: Any, q0: Tensor, v0: Tensor, args: Any = (), *, mode: Any = None, **options: Any) -> Solution:
        """`solve_dae` from consistent values near ``q0``, ``v0``; ``sol.y`` is a `MechanicalState` of tensors with time first.

        Two dimensions of ``q0`` are a batch: give ``batched=True`` too. ``options`` are those of `solve_dae`; with ``mode=`` mass, force
        and constraint get it before ``args``.
        """
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        check_options(q0, options)
        modes = () if mode is None else (mode_of(mode, StateSpec.of(q0, q0.dim() == 2)),)
        y0, yp0 = self.initial(q0, v0, *modes, *args, t0=t_span[0], throw=options.get("throw", True))
        return solve_dae(self.residual, t_span, y0, yp0, args=args, mode=mode, consistent="trust", **options)


@overload
def mechanics(mass: Any, force: Callable[..., Tensor], constraint: Callable[..., Tensor], contacts: None = None) -> Mechanics: ...


@overload
def mechanics(
    mass: Any, force: Callable[..., Tensor], constraint: Callable[..., Tensor] | None = None, *, contacts: Contact | Sequence[Contact]
) -> ContactMechanics: ...


def mechanics(mass: Any, force: Callable[..., Tensor], constraint: Any = None, contacts: Any = None) -> Mechanics | ContactMechanics:
    """Motion ``M(q) q'' = f(t, q, q') - G^T lam`` on ``g(t, q) = 0``, with ``G = dg/dq``, of index 3, as a system of index 2 that does not
    drift (Gear, Gupta & Leimkuhler 1985, J. Comp. Appl. Math. 12:77), and with gaps that stay open. With ``batched=True`` ``q`` is
    ``(B, n)`` and ``t`` ``(B,)``, as everywhere.

    Parameters
    ----------
    mass : Tensor or callable
        ``(n, n)``, its diagonal ``(n,)``, or ``mass(q, *args)`` that returns ``(..., n, n)`` (or a constant diagonal ``(n,)``).
    force : callable
        ``force(t, q, v, *args)``, ``(..., n)``: applied, gyroscopic and all other forces but those of the constraint.
    constraint : callable
        ``constraint(t, q, *args)``, ``(..., m)``; independent rows. With ``contacts=`` it may be left out.
    contacts : Contact or sequence of them
        Gaps that stay open, with impacts and contacts that last (docs/hybrid.md); see `Contact`.

    Returns
    -------
    Mechanics, ContactMechanics
        ``model.solve(t_span, q0, v0, args=...)``, or ``model.residual`` and ``model.initial`` for `solve_dae`. Everything is
        differentiated: ``args``, ``q0``, ``v0``, captured tensors. Multiplying ``lam`` by ``G^T`` gives the constraint forces.

    Raises
    ------
    InvalidInput, SingularJacobian (redundant constraints)
    """
    if contacts is not None:
        return ContactMechanics(mass, force, constraint, contacts)
    if constraint is None:
        raise InvalidInput("a mechanism without constraint= and contacts= is free: solve_ivp integrates q' = v, v' = M^-1 f")
    return Mechanics(mass, force, constraint)
