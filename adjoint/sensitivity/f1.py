"""The F-1 algorithm: derivatives of ``f(s(p), p)`` with ``F(s(p), p) = 0`` to third order, from one factorisation
(Pasquier & Primeau, doi 10.5281/zenodo.2667835; docs/theory.md, section 3).

All functions are flat: ``x`` is ``(n,)``, ``p`` is ``(m,)``. ``L = f - lam* F`` is the Lagrangian, ``z = (S v, v)`` the direction in
which state and parameters move together. Derivatives of the user's functions are recorded once and pulled through plain autograd, whose
calls cost less than those of functional transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..system.jacobians import is_vmap_failure
from .products import look_again

__all__ = ["Expansion", "Functions", "Solves"]

#: columns up to which single calls beat a batched one, which sets up a transform first
_FEW = 2
#: entries of state-sized columns that are worked on at once
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Functions:
    """The objective ``f(x, p)``, 0-d, and the residual ``F(x, p)``, ``(n,)``. ``seen``: holds something once both were looked at, see
    `look_again`."""

    f: Callable[[Tensor, Tensor], Tensor]
    F: Callable[[Tensor, Tensor], Tensor]
    seen: list[bool] = field(default_factory=list)

    def look(self, x: Tensor, p: Tensor) -> None:
        """Raise where derivatives of their derivatives would miss a part."""
        if not self.seen:
            look_again(self.F, x, p)
            look_again(self.f, x, p)
            self.seen.append(True)


@dataclass(frozen=True)
class Solves:
    """``A^-1 b`` and ``A^-T b`` for ``b`` of shape ``(n,)`` or ``(n, k)``, with the factors of the solution."""

    forward: Callable[[Tensor], Tensor]
    transposed: Callable[[Tensor], Tensor]


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], bars: Sequence[Tensor], again: bool = False) -> list[Tensor]:
    """Vector-Jacobian products of recorded outputs, zeros where nothing depends; ``again`` records this pass too."""
    pairs = [(o, b) for o, b in zip(outputs, bars, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    outs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, inputs, cotangents, retain_graph=True, create_graph=again, materialize_grads=True))


def _pull_columns(outputs: Sequence[Tensor], inputs: Sequence[Tensor], bars: Sequence[Tensor]) -> list[Tensor]:
    """`_pull` of every last-dimension column of ``bars``; the results carry their columns last too."""
    count, size = bars[0].shape[-1], sum(b.shape[0] for b in bars)
    if count == 0:
        return [x.new_zeros(*x.shape, 0) for x in inputs]
    pairs = [(o, b) for o, b in zip(outputs, bars, strict=True) if o.requires_grad]
    if count > _FEW and pairs:
        try:
            return _batched(pairs, inputs, max(1, _CHUNK // max(size, 1)))
        except RuntimeError as error:
            if not is_vmap_failure(error):
                raise
    # one by one: an operator of the user's cannot be batched, or it does not pay
    each = [_pull(outputs, inputs, [b[:, j] for b in bars]) for j in range(count)]
    return [torch.stack(column, -1) for column in zip(*each, strict=True)]


def _batched(pairs: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], width: int) -> list[Tensor]:
    outputs, count = [o for o, _ in pairs], pairs[0][1].shape[-1]
    pieces = []
    for at in range(0, count, width):
        cotangents = [b[:, at : at + width].T for _, b in pairs]
        pieces.append(torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True))
    columns = []
    for x, parts in zip(inputs, zip(*pieces, strict=True), strict=True):
        used = parts[0] is not None
        columns.append(torch.cat([p.movedim(0, -1) for p in parts], -1) if used else x.new_zeros(*x.shape, count))
    return columns


class Expansion:
    """Derivatives at one point ``(s(p), p)``; each quantity is computed when first asked for, and kept.

    ``solves`` is called for the factors only when a solve is needed.
    """

    def __init__(self, functions: Functions, x: Tensor, p: Tensor, solves: Callable[[], Solves]) -> None:
        self.functions, self.x, self.p, self._solves = functions, x.detach(), p.detach(), solves
        self._kept: dict[str, object] = {}

    def _keep(self, name: str, make: Callable[[], object]) -> object:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    # -- the recorded functions ------------------------------------------------------------------------------------------------------

    def _points(self) -> tuple[Tensor, Tensor]:
        return self.x.clone().requires_grad_(True), self.p.clone().requires_grad_(True)

    def _recorded_f(self) -> tuple[Tensor, Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                x, p = self._points()
                return x, p, self.functions.f(x, p)

        return self._keep("f", make)  # type: ignore[return-value]

    def _recorded_residual(self) -> tuple[Tensor, Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                x, p = self._points()
                return x, p, self.functions.F(x, p)

        return self._keep("F", make)  # type: ignore[return-value]

    def _recorded_lagrangian(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``x``, ``p`` and the gradient of ``L`` in both, recorded."""

        def make() -> tuple[Tensor, Tensor, list[Tensor]]:
            with torch.enable_grad():
                x, p = self._points()
                value = self.functions.f(x, p) - torch.dot(self.adjoint(), self.functions.F(x, p))
                self.functions.look(self.x, self.p)
                return x, p, _pull([value], [x, p], [torch.ones_like(value)], again=True)

        return self._keep("L", make)  # type: ignore[return-value]

    def _recorded_products(self) -> tuple[Tensor, list[Tensor]]:
        """``w`` and the recorded ``(F_x* w, F_p* w)``, whose own pullback is the tangent of ``F``."""

        def make() -> tuple[Tensor, list[Tensor]]:
            with torch.enable_grad():
                x, p, residual = self._recorded_residual()
                self.functions.look(self.x, self.p)
                w = torch.zeros_like(residual, requires_grad=True)
                return w, _pull([residual], [x, p], [w], again=True)

        return self._keep("products", make)  # type: ignore[return-value]

    # -- zeroth and first order ------------------------------------------------------------------------------------------------------

    def value(self) -> Tensor:
        """``f(s(p), p)``."""
        return self._recorded_f()[2].detach()

    def objective_slopes(self) -> tuple[Tensor, Tensor]:
        """``f_x`` and ``f_p``."""

        def make() -> tuple[Tensor, ...]:
            x, p, value = self._recorded_f()
            return tuple(_pull([value], [x, p], [torch.ones_like(value)]))

        return self._keep("slopes", make)  # type: ignore[return-value]

    def adjoint(self) -> Tensor:
        """``lam = A^-T f_x``: one transposed solve."""
        return self._keep("lam", lambda: self._solves().transposed(self.objective_slopes()[0]))  # type: ignore[return-value]

    def pull_residual(self, w: Tensor) -> Tensor:
        """``F_p* w``."""
        _, p, residual = self._recorded_residual()
        return _pull([residual], [p], [w])[0]

    def push_residual(self, v: Tensor) -> Tensor:
        """``F_p v`` for ``v`` of shape ``(m,)`` or ``(m, k)``."""
        w, products = self._recorded_products()
        if v.dim() == 1:
            return _pull([products[1]], [w], [v])[0]
        return _pull_columns([products[1]], [w], [v])[0]

    def gradient(self) -> Tensor:
        """``f_p - F_p* lam``."""
        return self._keep("gradient", lambda: self.objective_slopes()[1] - self.pull_residual(self.adjoint()))  # type: ignore[return-value]

    def state_jacobian(self) -> Tensor:
        """``S = -A^-1 F_p``, ``(n, m)``: m solves at once."""

        def make() -> Tensor:
            eye = torch.eye(self.p.numel(), dtype=self.p.dtype, device=self.p.device)
            return -self._solves().forward(self.push_residual(eye))

        return self._keep("S", make)  # type: ignore[return-value]

    @property
    def knows_state_jacobian(self) -> bool:
        """Whether `state_jacobian` costs nothing."""
        return "S" in self._kept

    def observation_jacobian(self, g: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``g(s(p), p)``, ``(k,)``, and ``g_x S + g_p``, ``(k, m)``: no solve beyond those of ``S``, or k transposed ones where k < m."""
        with torch.enable_grad():
            x, p = self._points()
            value = g(x, p)
        count, m = value.numel(), self.p.numel()
        if count < m and not self.knows_state_jacobian:
            g_x, g_p = _pull_columns([value], [x, p], [torch.eye(count, dtype=value.dtype, device=value.device)])
            _, q, residual = self._recorded_residual()
            return value.detach(), (g_p - _pull_columns([residual], [q], [self._solves().transposed(g_x)])[0]).T
        # along the m directions, however many observations there are
        with torch.enable_grad():
            look_again(g, self.x, self.p)
            w = torch.zeros_like(value, requires_grad=True)
            products = _pull([value], [x, p], [w], again=True)
        eye = torch.eye(m, dtype=self.p.dtype, device=self.p.device)
        return value.detach(), _pull_columns(products, [w], [self.state_jacobian(), eye])[0]

    def state_tangent(self, v: Tensor) -> Tensor:
        """``S v``: one solve, none where ``S`` is known."""
        if "S" in self._kept:
            return self.state_jacobian() @ v.to(self.x)
        return -self._solves().forward(self.push_residual(v))

    # -- second order ----------------------------------------------------------------------------------------------------------------

    def lagrangian_products(self, z_x: Tensor, z_p: Tensor) -> list[Tensor]:
        """``Hess L z``, its state and parameter parts, for directions with or without columns."""
        x, p, slopes = self._recorded_lagrangian()
        # the Hessian is symmetric: pulling z back through the gradient is its product with z
        return (_pull if z_x.dim() == 1 else _pull_columns)(slopes, [x, p], [z_x, z_p])

    def hessian(self) -> Tensor:
        """``[S; I]* (Hess L) [S; I]``, symmetric to the last bit: m + 1 solves in all."""

        def make() -> Tensor:
            S = self.state_jacobian()
            eye = torch.eye(self.p.numel(), dtype=self.p.dtype, device=self.p.device)
            top, bottom = self.lagrangian_products(S, eye)
            H = S.T @ top + bottom
            return (H + H.T) / 2

        return self._keep("H", make)  # type: ignore[return-value]

    def hessian_product(self, v: Tensor) -> Tensor:
        """``H v``: one forward and one transposed solve, none where ``H`` is known."""
        if "H" in self._kept:
            H = self.hessian()
            return H @ v.to(H)
        top, bottom = self.lagrangian_products(self.state_tangent(v), v)
        if "S" in self._kept:
            return self.state_jacobian().T @ top + bottom
        return bottom - self.pull_residual(self._solves().transposed(top))

    # -- third order -----------------------------------------------------------------------------------------------------------------

    def _bent(self, s_v: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``x``, ``p`` and the recorded ``Hess L z`` along ``z = (S v, v)``."""
        with torch.enable_grad():
            x, p, slopes = self._recorded_lagrangian()
            return x, p, _pull(slopes, [x, p], [s_v, v], again=True)

    def _residual_curvature(self, s_v: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``w`` and the recorded gradient of ``w* D F z`` in ``(x, p)``: linear in ``w``, so its pullback gives ``D2F[z, .]``."""
        with torch.enable_grad():
            x, p = self._points()
            residual = self.functions.F(x, p)
            w = torch.zeros_like(residual, requires_grad=True)
            products = _pull([residual], [x, p], [w], again=True)
            along = torch.dot(products[0], s_v) + torch.dot(products[1], v)
            return w, _pull([along], [x, p], [torch.ones_like(along)], again=True)

    def third_scalar(self, v: Tensor) -> Tensor:
        """``D3 fh [v, v, v]``: one transposed solve beyond that of the tangent, by the rule of 2n + 1."""
        s_v = self.state_tangent(v)
        x, p, bent = self._bent(s_v, v)
        lam_v = self._solves().transposed(bent[0].detach())
        cubic = _pull(bent, [x, p], [s_v, v])
        w, second = self._residual_curvature(s_v, v)
        squares = _pull(second, [w], [s_v, v])[0]
        return torch.dot(cubic[0], s_v) + torch.dot(cubic[1], v) - 3 * torch.dot(lam_v, squares)

    def third(self, v: Tensor) -> Tensor:
        """The derivative of the Hessian along ``v``, ``(m, m)``: one transposed and m forward solves beyond those of the Hessian."""
        S = self.state_jacobian()
        eye = torch.eye(self.p.numel(), dtype=self.p.dtype, device=self.p.device)
        s_v = self.state_tangent(v)
        x, p, bent = self._bent(s_v, v)
        lam_v = self._solves().transposed(bent[0].detach())
        w, second = self._residual_curvature(s_v, v)
        # S' = dS along v, from A S' = -D2F[z_v, z_j]
        S_dot = -self._solves().forward(_pull_columns(second, [w], [S, eye])[0])
        cubic_x, cubic_p = _pull_columns(bent, [x, p], [S, eye])
        fixed = [x_.requires_grad_(True) for x_ in self._points()]
        with torch.enable_grad():
            moved = torch.dot(lam_v, self.functions.F(*fixed))
            slopes = _pull([moved], fixed, [torch.ones_like(moved)], again=True)
        bent_x, bent_p = _pull_columns(slopes, fixed, [S, eye])
        top, _ = self.lagrangian_products(S, eye)
        cross = S_dot.T @ top
        T = S.T @ (cubic_x - bent_x) + (cubic_p - bent_p) + cross + cross.T
        return (T + T.T) / 2
