"""A mechanism: mass, force and constraint, and what is made of them by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InconsistentInitialCondition, InvalidInput, RootError, SingularJacobian
from ..system.capture import readable
from ..system.transforms import anywhere
from .holonomic import Rows, bend, independent_rows, jacobian, linear, products, rate, saddle, solved
from .steady import solve_root

__all__ = ["Mechanism", "check_options", "start_time"]

#: ``start(t, q0, v0, args, throw)``: what a motion begins with, coordinates and velocities first
Start = Callable[[Tensor, Tensor, Tensor, tuple[Any, ...], bool], tuple[Tensor, ...]]


class Mechanism:
    """``M(q) q'' = f(t, q, q') - G^T lam`` on ``g(t, q) = 0``; see `mechanics`."""

    def __init__(self, mass: Any, force: Callable[..., Tensor], constraint: Callable[..., Tensor] | None) -> None:
        for name, value in (("force", force), ("constraint", constraint)):
            if not callable(value) and not (name == "constraint" and value is None):
                raise InvalidInput(f"{name} must be callable, got a {type(value).__name__}")
        if not callable(mass) and not isinstance(mass, Tensor):
            raise InvalidInput(f"mass must be a tensor (n, n) or (n,), or a function of (q, *args), got a {type(mass).__name__}")
        self.mass: Any = mass
        self.force, self.constraint = force, constraint

    def forced(self, t: Tensor, q: Tensor, v: Tensor, args: tuple[Any, ...]) -> Tensor:
        """``f`` (..., n)."""
        return _returned(self.force(t, q, v, *args), "force", q, q.shape[-1])

    def times_mass(self, q: Tensor, x: Tensor, args: tuple[Any, ...]) -> Tensor:
        M = self._mass(q, args)
        return M * x if self._diagonal(M, q) else (M @ x.unsqueeze(-1)).squeeze(-1)

    def _mass(self, q: Tensor, args: tuple[Any, ...]) -> Tensor:
        M: Any = self.mass(q, *args) if callable(self.mass) else self.mass
        n = q.shape[-1]
        if not isinstance(M, Tensor) or not M.dim():
            got = "a number" if isinstance(M, Tensor) else type(M).__name__
            raise InvalidInput(f"mass must be a tensor ({n}, {n}) or ({n},), got {got}")
        if M.shape[-1] != n or (M.dim() >= 2 and M.shape[-2] != n):
            raise InvalidInput(
                f"mass has shape {tuple(M.shape)}, but there are {n} coordinates: (..., {n}, {n}) or ({n},) is expected. Of diagonals of "
                "each trajectory torch.diag_embed makes matrices"
            )
        if callable(self.mass) and M.dim() == q.dim() == 2 and M.shape == q.shape:
            raise InvalidInput(
                f"mass returned {tuple(M.shape)} for {n} trajectories with {n} coordinates: one matrix, or diagonals of each? Return "
                "(B, n, n): matrix.expand(B, n, n), or torch.diag_embed(diagonals)"
            )
        if M.dtype != q.dtype:
            raise InvalidInput(f"mass is {M.dtype}, but coordinates are {q.dtype}: give one dtype")
        return M

    @staticmethod
    def _diagonal(M: Tensor, q: Tensor) -> bool:
        """Whether the mass is given by its diagonal: one dimension, or the shape of ``q``, less than that of a matrix."""
        return M.dim() == 1 or (M.dim() == q.dim() and M.dim() < 2)

    def mass_matrix(self, q: Tensor, args: tuple[Any, ...]) -> Tensor:
        """``(..., n, n)``."""
        M = self._mass(q, args)
        full = torch.diag_embed(M) if self._diagonal(M, q) else M
        return full.expand(*q.shape, q.shape[-1])

    def _rows(self, args: tuple[Any, ...]) -> Rows:
        """The constraints at fixed arguments."""
        constraint = self.constraint
        assert constraint is not None
        return lambda t, q: _returned(constraint(t, q, *args), "constraint", q)

    def sloped(self, t: Tensor, q: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """``G`` (..., m, n) and ``g_t`` (..., m)."""
        if self.constraint is None:
            return q.new_zeros(*q.shape[:-1], 0, q.shape[-1]), q[..., :0]
        rows = self._rows(args)
        return jacobian(rows, t, q), rate(rows, t, q, torch.zeros_like(q))[1]

    def curved(self, t: Tensor, q: Tensor, v: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """``G``, and the second derivative of ``g`` (..., m) along the motion without acceleration."""
        if self.constraint is None:
            return self.sloped(t, q, args)
        rows = self._rows(args)
        return jacobian(rows, t, q), bend(rows, t, q, v)

    def stabilised(self, t: Tensor, y: tuple[Tensor, ...], rates: tuple[Tensor, Tensor], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The equations of Gear, Gupta & Leimkuhler (1985) for ``y = (q, v, lam, mu)`` and ``rates = (q', v')``, index 2:

        ``q' = v - G^T mu``, ``M v' = f - G^T lam``, ``g = 0``, ``G v + g_t = 0``. Both constraints are there, so that neither drifts.
        """
        q, v, lam, mu = y
        balance = self.times_mass(q, rates[1], args) - self.forced(t, q, v, args)
        if self.constraint is None:
            return rates[0] - v, balance, lam, mu
        g, pull, push = linear(self._rows(args), t, q)
        down, side, drift = pull(mu)[1], pull(lam)[1], push((torch.ones_like(t), v))[0]
        return rates[0] - v + down, balance + side, g, drift

    def placed(self, t: Tensor, q0: Tensor, v0: Tensor, args: tuple[Any, ...], throw: bool = True) -> tuple[Tensor, Tensor]:
        """Coordinates moved to the nearest ones on the constraint, velocities to the nearest ones in the metric of ``M`` that stay on it.

        Raises `SingularJacobian` for redundant constraints (under ``torch.vmap``, which lets nobody look at values, one is found out by the
        solve only); without ``throw`` trajectories that have none are NaN.
        """
        if self.constraint is None:
            return q0, v0
        rows = self._rows(args)
        G = jacobian(rows, t, q0)
        m, n = G.shape[-2:]
        independent, rank = independent_rows(G)
        if m > n or (throw and readable(independent) and not bool(independent.all())):
            row = 0 if m > n else int((~independent).reshape(-1).to(torch.int64).argmax())
            many = f" of trajectory {row}" if q0.dim() == 2 and m <= n else ""
            if not bool(torch.isfinite(G.detach().reshape(-1, m, n)[row]).all()):
                raise InconsistentInitialCondition(f"the Jacobian of the constraint{many} is not finite at q0: check q0 and the parameters")
            raise SingularJacobian(
                f"the {m} constraints{many} are redundant at q0: their Jacobian has rank {int(rank.reshape(-1)[row])}. "
                "Leave out those that follow from the others (and start away from singular positions)"
            )

        def onto(z: dict[str, Tensor], time: Tensor, start: Tensor, *rest: Any) -> dict[str, Tensor]:
            (along,) = products(self._rows(tuple(rest)), time, z["q"], z["s"])
            return {"q": z["q"] - start - along, "s": self._rows(tuple(rest))(time, z["q"])}

        near = q0 if throw else torch.where(independent.unsqueeze(-1), q0, float("nan"))
        guess = {"q": torch.nan_to_num(q0.detach()), "s": q0.detach().new_zeros(*q0.shape[:-1], m)}
        try:
            q = solve_root(onto, guess, (t, near, *args), batched=q0.dim() == 2, throw=throw).x["q"]
        except RootError as error:
            raise InconsistentInitialCondition(
                "no coordinates that satisfy the constraint were found from q0: check that there are any, and start nearer to them. Of the "
                f"search, in which x['q'] are coordinates and x['s'] multiples of the constraints' slopes: {error}"
            ) from error
        G, drift = self.sloped(t, q, args)
        return q, solved(saddle(self.mass_matrix(q, args), G), self.times_mass(q, v0, args), -drift)[..., :n]

    def started(self, start: Start, t0: Any, q0: Tensor, v0: Tensor, args: tuple[Any, ...], throw: bool) -> tuple[Tensor, ...]:
        """What ``start`` gives of every trajectory that has it; others raise, or without ``throw`` are NaN, and are in
        the way of nobody's derivatives."""
        t, batched = start_time(t0, q0, v0), q0.dim() == 2
        found = start(t, q0, v0, args, throw)
        lost = ~torch.stack([torch.isfinite(x.detach()).all(-1) for x in found]).all(0)
        lost = lost | (torch.linalg.inv_ex(self.mass_matrix(found[0], args).detach())[1] != 0)
        if not anywhere(lost):
            return found
        if throw and readable(lost):
            self._refuse(t, found[0].detach(), v0, args, lost)

        def off(z: tuple[Tensor, ...], t: Tensor, q0: Tensor, v0: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            return tuple(x - y for x, y in zip(z, start(t, q0, v0, rest, False), strict=True))

        # explicit as it is, a root: whose node keeps what trajectories fail with from others
        guess = tuple(torch.nan_to_num(x.detach()) for x in found)
        found = solve_root(off, guess, (t, q0, v0, *args), method="newton", batched=batched, throw=False).x
        # what the way back says of them reaches their own values alone
        own = (q0, v0, *(x.detach() for x in found[2:]))
        return tuple(torch.where(lost.unsqueeze(-1), y + float("nan"), x) for x, y in zip(found, own, strict=True))

    def _refuse(self, t: Tensor, q: Tensor, v: Tensor, args: tuple[Any, ...], lost: Tensor) -> None:
        """Raise for the first of the trajectories that are ``lost`` at the coordinates ``q`` with velocities ``v``."""
        many = f" of trajectory {int(lost.to(torch.int64).argmax())}" if lost.dim() else ""
        matrix = self.mass_matrix(q, args).detach()
        if bool((torch.linalg.inv_ex(matrix)[1] != 0)[lost].all()):
            raise SingularJacobian(
                f"the mass matrix{many} is singular at the start: every coordinate needs a mass, also one that constraints carry along "
                "(express it by the others)"
            )
        moves = torch.cat([q, v.detach(), self.forced(t, q, v, args).detach()], -1)
        if bool(torch.isfinite(moves).all(-1)[lost].all()) and bool(torch.isfinite(matrix).all(-1).all(-1)[lost].all()):
            raise SingularJacobian(
                f"the constraints{many} are redundant at the start: accelerations and forces are not determined. Leave out those that "
                "follow from the others (and start away from singular positions)"
            )
        raise InconsistentInitialCondition(f"mass, force or constraint{many} are not finite at the start: check q0, v0 and the parameters")


def start_time(t0: Any, q0: Tensor, v0: Tensor) -> Tensor:
    """The time at the start, ``()`` or ``(B,)``; raises for coordinates and velocities that are none."""
    if q0.shape != v0.shape or q0.dim() not in (1, 2) or q0.dtype != v0.dtype:
        got = " and ".join(f"{tuple(x.shape)}, {x.dtype}" for x in (q0, v0))
        raise InvalidInput(f"q0 and v0 must have one shape, (n,) or (B, n), and dtype; got {got}")
    t = torch.as_tensor(t0, dtype=q0.dtype, device=q0.device)
    return t.expand(q0.shape[0]).contiguous() if q0.dim() == 2 else t.reshape(())


def _returned(value: Any, what: str, q: Tensor, length: int | None = None) -> Tensor:
    """What a function gives for coordinates ``q``, of one last dimension more than a trajectory has; raises `InvalidInput`."""
    fits = isinstance(value, Tensor) and value.dim() == q.dim() and value.shape[:-1] == q.shape[:-1] and value.dtype == q.dtype
    if not fits or (length is not None and value.shape[-1] != length):
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        many = "m" if length is None else str(length)
        wanted = f"({q.shape[0]}, {many})" if q.dim() == 2 else f"({many},)"
        of_many = " (m constraints)" if length is None else ""
        raise InvalidInput(f"{what} must return a tensor of shape {wanted}{of_many}, {q.dtype}, for q of shape {tuple(q.shape)}; got {got}")
    return value


def check_options(q0: Tensor, options: dict[str, Any]) -> None:
    """Raise for options that a mechanism decides itself."""
    if bool(options.get("batched", False)) != (q0.dim() == 2):
        raise InvalidInput(f"q0 has shape {tuple(q0.shape)}: (n,), or (B, n) with batched=True")
    for name in ("yp0", "consistent", "differential"):
        if name in options:
            raise InvalidInput(f"{name}= is decided here: use solve_dae with residual and initial for a choice of your own")
