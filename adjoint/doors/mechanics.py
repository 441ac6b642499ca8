"""Constrained mechanical systems: stabilised equations of index 2, made from mass, force and constraint by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidInput, SingularJacobian
from ..system.capture import readable
from .dae import solve_dae
from .solution import Solution
from .steady import solve_root

__all__ = ["MechanicalState", "Mechanics", "mechanics"]


class MechanicalState(NamedTuple):
    """Coordinates ``q`` and velocities ``v`` (..., n), forces ``lam`` in the constraints and the stabilising ``mu`` (..., m), zero in
    exact arithmetic."""

    q: Tensor
    v: Tensor
    lam: Tensor
    mu: Tensor


class Mechanics:
    """See `mechanics`."""

    def __init__(self, mass: Any, force: Callable[..., Tensor], constraint: Callable[..., Tensor]) -> None:
        for name, value in (("force", force), ("constraint", constraint)):
            if not callable(value):
                raise InvalidInput(f"{name} must be callable, got a {type(value).__name__}")
        if not callable(mass) and not isinstance(mass, Tensor):
            raise InvalidInput(f"mass must be a tensor (n, n) or (n,), or a function of (q, *args), got a {type(mass).__name__}")
        self.mass: Any = mass
        self.force, self.constraint = force, constraint

    def _times_mass(self, q: Tensor, x: Tensor, args: tuple[Any, ...]) -> Tensor:
        M = self._mass(q, args)
        return M * x if self._diagonal(M, q) else (M @ x.unsqueeze(-1)).squeeze(-1)

    def _mass(self, q: Tensor, args: tuple[Any, ...]) -> Tensor:
        M: Tensor = self.mass(q, *args) if callable(self.mass) else self.mass  # type: ignore[assignment]
        n = q.shape[-1]
        if M.shape[-1] != n or (M.dim() >= 2 and M.shape[-2] not in (n, *M.shape[:-1])):
            raise InvalidInput(f"mass has shape {tuple(M.shape)}, but there are {n} coordinates: (..., {n}, {n}) or ({n},) is expected")
        return M

    @staticmethod
    def _diagonal(M: Tensor, q: Tensor) -> bool:
        """Whether the mass is given by its diagonal: one dimension, or the shape of ``q``, less than that of a matrix."""
        return M.dim() == 1 or (M.dim() == q.dim() and M.dim() < 2)

    def _mass_matrix(self, q: Tensor, args: tuple[Any, ...]) -> Tensor:
        """``(..., n, n)``."""
        M = self._mass(q, args)
        full = torch.diag_embed(M) if self._diagonal(M, q) else M
        return full.expand(*q.shape, q.shape[-1])

    def _rate(self, t: Tensor, q: Tensor, v: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """``g`` and ``dg/dt = G v + g_t``."""
        g, _, push = self._linear(t, q, args)
        return g, push((torch.ones_like(t), v))[0]

    def _linear(self, t: Tensor, q: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Any, Any]:
        """``g``, the products ``w -> (g_t^T w, G^T w)``, and their transpose: by two reverse sweeps, as forward mode takes many times as
        long wherever a constant enters."""
        g, pull, *_ = torch.func.vjp(lambda s, x: self.constraint(s, x, *args), t, q)
        _, push, *_ = torch.func.vjp(pull, torch.zeros_like(g))
        return g, pull, push

    def _pull(self, t: Tensor, q: Tensor, *ws: Tensor, args: tuple[Any, ...]) -> list[Tensor]:
        """``G^T w`` of each."""
        _, pull, *_ = torch.func.vjp(lambda x: self.constraint(t, x, *args), q)
        return [pull(w)[0] for w in ws]

    def _jacobian(self, t: Tensor, q: Tensor, args: tuple[Any, ...]) -> Tensor:
        """``G`` (..., m, n); rows of a batch are independent."""
        g, pull, *_ = torch.func.vjp(lambda x: self.constraint(t, x, *args), q)
        eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
        return torch.stack([pull(row.expand_as(g).contiguous())[0] for row in eye], -2)

    def residual(self, t: Tensor, y: MechanicalState, yp: MechanicalState, *args: Any) -> MechanicalState:
        """The equations of Gear, Gupta & Leimkuhler (1985), index 2 in Hessenberg form:

        ``q' = v - G^T mu``, ``M v' = f - G^T lam``, ``g = 0``, ``G v + g_t = 0``. Both constraints are there, so that neither drifts.
        """
        q, v, lam, mu = y
        g, pull, push = self._linear(t, q, args)
        down, side, rate = pull(mu)[1], pull(lam)[1], push((torch.ones_like(t), v))[0]
        return MechanicalState(yp.q - v + down, self._times_mass(q, yp.v, args) - self.force(t, q, v, *args) + side, g, rate)

    def initial(self, q0: Tensor, v0: Tensor, *args: Any, t0: Any = 0.0) -> tuple[MechanicalState, MechanicalState]:
        """Consistent state and slope at ``t0`` near the given coordinates and velocities, differentiable in everything.

        Coordinates are moved to the nearest ones on the constraint, velocities to the nearest ones in the metric of ``M`` that stay on it;
        accelerations and constraint forces are those of the equations of motion. Raises `SingularJacobian` for redundant constraints (under
        ``torch.vmap``, which lets nobody look at values, one is found out by the solve only).
        """
        if q0.shape != v0.shape or q0.dim() not in (1, 2) or q0.dtype != v0.dtype:
            raise InvalidInput(f"q0 and v0 must have one shape, (n,) or (B, n), and dtype; got {tuple(q0.shape)} and {tuple(v0.shape)}")
        batched = q0.dim() == 2
        t = torch.as_tensor(t0, dtype=q0.dtype, device=q0.device).detach()
        t = t.expand(q0.shape[0]).contiguous() if batched else t.reshape(())
        G = self._jacobian(t, q0, args)
        m, n = G.shape[-2:]
        values = torch.linalg.svdvals(G.detach())
        if m > n or (readable(values) and bool((values[..., -1] <= 1e-10 * values[..., 0].clamp(min=1e-300)).any())):
            rank = n if not readable(values) else int((values > 1e-10 * values[..., :1]).sum(-1).min())
            raise SingularJacobian(
                f"the {m} constraints are redundant at q0: their Jacobian has rank {rank}. "
                "Leave out those that follow from the others (and start away from singular positions)"
            )

        def onto(z: dict[str, Tensor], start: Tensor, *rest: Any) -> dict[str, Tensor]:
            along = self._pull(t, z["q"], z["s"], args=tuple(rest))[0]
            return {"q": z["q"] - start - along, "s": self.constraint(t, z["q"], *rest)}

        guess = {"q": q0.detach(), "s": q0.detach().new_zeros(*q0.shape[:-1], m)}
        q = solve_root(onto, guess, (q0, *args), batched=batched).x["q"]
        G, M = self._jacobian(t, q, args), self._mass_matrix(q, args)
        corner = torch.zeros(*G.shape[:-1], m, dtype=G.dtype, device=G.device)
        saddle = torch.cat([torch.cat([M, G.mT], -1), torch.cat([G, corner], -1)], -2)
        _, drift = self._rate(t, q, torch.zeros_like(q), args)
        v = _solved(saddle, self._times_mass(q, v0, args), -drift)[..., :n]
        # the second derivative of g along the motion without acceleration
        _, curve, *_ = torch.func.jvp(lambda s, x: self._rate(s, x, v, args)[1], (t, q), (torch.ones_like(t), v))
        both = _solved(saddle, self.force(t, q, v, *args), -curve)
        zero = torch.zeros_like(both[..., n:])
        return MechanicalState(q, v, both[..., n:], zero), MechanicalState(v, both[..., :n], zero, zero)

    def solve(self, t_span: Any, q0: Tensor, v0: Tensor, args: Any = (), **options: Any) -> Solution:
        """`solve_dae` from consistent values near ``q0``, ``v0``; ``sol.y`` is a `MechanicalState` of tensors with time first.

        Two dimensions of ``q0`` are a batch: give ``batched=True`` too. ``options`` are those of `solve_dae`.
        """
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        if bool(options.get("batched", False)) != (q0.dim() == 2):
            raise InvalidInput(f"q0 has shape {tuple(q0.shape)}: (n,), or (B, n) with batched=True")
        for name in ("yp0", "consistent", "differential"):
            if name in options:
                raise InvalidInput(f"{name}= is decided here: use solve_dae with residual and initial for a choice of your own")
        y0, yp0 = self.initial(q0, v0, *args, t0=t_span[0])
        return solve_dae(self.residual, t_span, y0, yp0, args=args, consistent="trust", **options)


def _solved(matrix: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, torch.cat([top, bottom], -1).unsqueeze(-1)).squeeze(-1)


def mechanics(mass: Any, force: Callable[..., Tensor], constraint: Callable[..., Tensor]) -> Mechanics:
    """Motion ``M(q) q'' = f(t, q, q') - G^T lam`` on ``g(t, q) = 0``, with ``G = dg/dq``, of index 3, as a system of index 2 that does not
    drift (Gear, Gupta & Leimkuhler 1985, J. Comp. Appl. Math. 12:77). With ``batched=True`` ``q`` is ``(B, n)`` and ``t`` ``(B,)``, as
    everywhere.

    Parameters
    ----------
    mass : Tensor or callable
        ``(n, n)``, its diagonal ``(n,)``, or ``mass(q, *args)`` that returns ``(..., n, n)`` (or a constant diagonal ``(n,)``).
    force : callable
        ``force(t, q, v, *args)``, ``(..., n)``: applied, gyroscopic and all other forces but those of the constraint.
    constraint : callable
        ``constraint(t, q, *args)``, ``(..., m)``; independent rows.

    Returns
    -------
    Mechanics
        ``model.solve(t_span, q0, v0, args=...)``, or ``model.residual`` and ``model.initial`` for `solve_dae`. Everything is
        differentiated: ``args``, ``q0``, ``v0``, captured tensors. Multiplying ``lam`` by ``G^T`` gives the constraint forces.

    Raises
    ------
    InvalidInput, SingularJacobian (redundant constraints)
    """
    return Mechanics(mass, force, constraint)
