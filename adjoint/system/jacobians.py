"""Products with the Jacobian of a user's function, the dense Jacobian, and the Jacobian as an operator.

Everything has rows: ``f`` maps ``(B, n)`` to ``(B, m)`` with independent rows, so one direction serves all rows at once.
``jacobians_sparse`` has the sparse strategies and the choice between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.variable import Variable

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg.protocol import LinearOperator, Matrix
from ..torch_internals import (
    DisableFuncTorch,
    dual_level,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    legacy_add_batch_dim,
    legacy_remove_batch_dim,
    peek_interpreter_stack,
    unwatched,
    vmapmode_decrement_nesting,
    vmapmode_increment_nesting,
)
from .transforms import anywhere

__all__ = [
    "UNRECORDED",
    "DenseJacobian",
    "JacobianStrategy",
    "complex_differentiable",
    "dense_with_time",
    "forward_products",
    "is_vmap_failure",
    "jacobian_operator",
    "jvp",
    "must_differentiate",
    "plain_push",
    "reverse_products",
    "unrecorded",
    "vjp",
    "wave",
]

Function = Callable[[Tensor], Tensor]
#: how Jacobians are had: the ``B`` matrices ``df/dx`` at ``x`` (B, n) of a function; may be called as often as you like
JacobianStrategy = Callable[[Function, Tensor], Matrix]
#: how many times the effect of rounding a part must be to be missed
_CERTAIN = 100
#: where derivatives would be differentiated of which nothing is recorded: see `unrecorded`
UNRECORDED = (
    "the backward of an operator in fun (or in an event function, jac, quadrature) gives derivatives of which autograd records nothing: "
    "one of a custom torch.autograd.Function that computes by NumPy or under torch.no_grad(), or of a sparse tensor that fun makes of "
    "values. Here they are differentiated themselves (second derivatives, forward mode, ForwardSensitivity, adjoints of Rosenbrock "
    "methods), and a part would be missing: take first derivatives in reverse mode, with gradient=DiscreteAdjoint() and another method, or "
    "write that backward by operators of PyTorch, and sparse products by index_add or dense tensors"
)


def wave(x: Tensor, turn: float = 0.0) -> Tensor:
    """Numbers between -1 and 1 in the shape of ``x``, without a pattern, but the same every time; not zero, and numbers of every dtype."""
    k = torch.arange(x.numel(), device=x.device, dtype=torch.float64) + 1
    return (((8 * torch.cos(k * k + turn)).floor() + 0.5) / 8).to(x.dtype).reshape(x.shape)


def unrecorded(
    pull: Callable[..., Sequence[Tensor]],
    weights: Sequence[Tensor],
    found: Sequence[Tensor],
    pushed: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> bool:
    """Whether ``pushed``, of ``directions``, misses a part that ``found``, which is ``pull(*weights)``, has.

    The backward of some operators (custom functions that compute by NumPy or under ``torch.no_grad()``, sparse tensors made of values) is
    right, but says nothing of what its results depend on: whoever differentiates it takes them for constants, and their part is missing
    without a word. It shows in what holds for every linear map: what is recorded of ``w -> J* w``, transposed and applied to ``v``, has
    with ``w`` the product that ``v`` has with ``J* w``. What is not finite says nothing.
    """

    def off(weights: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        forward, back = (
            torch.cat([(x.conj() * y).real.reshape(-1).double() for x, y in zip(left, right, strict=True)])
            for left, right in ((weights, pushed), (found, directions))
        )
        return forward.sum() - back.sum(), forward.abs().sum() + back.abs().sum()

    first, size = off(weights, found)
    eps = max(torch.finfo(x.dtype).eps for x in (*weights, *found))
    if not anywhere(torch.isfinite(first) & (first.abs() > eps**0.5 * size)):
        return False
    # rounding (of single precision inside of a function of double, say) is no linear function of the weights; what is missing is
    others = [list(weights), *([wave(x.detach(), turn) for x in weights] for turn in (2.0, 3.0))]
    single = [first, *(off(some, pull(*some))[0] for some in others[1:])]
    defects = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = [x + y for x, y in zip(others[i], others[j], strict=True)]
        defects.append((off(both, pull(*both))[0] - single[i] - single[j]).abs())
    return anywhere(torch.stack([x.abs() for x in single]).amax(0) > _CERTAIN * torch.stack(defects).amax(0))


def in_transform() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode AD is around us."""
    return peek_interpreter_stack() is not None or dual_level() >= 0


def transforms_active() -> bool:
    """As `in_transform`, or inference mode, where nothing is recorded: then plain autograd is not enough, and ``torch.func`` is used."""
    return in_transform() or torch.is_inference_mode_enabled()


def must_differentiate(differentiable: bool | None) -> bool:
    """None means: as the surroundings want it."""
    return torch.is_grad_enabled() or transforms_active() if differentiable is None else differentiable


def jvp(f: Function, x: Tensor, v: Tensor, differentiable: bool | None = None) -> Tensor:
    """``J v`` for ``v`` (B, n): (B, m), the transpose of a vjp; in forward mode where that cannot be had."""
    if not must_differentiate(differentiable):
        found = plain_push(f, x, v.unsqueeze(0), None, sure=True)
        if found is not None:
            return found[0]
        if not transforms_active():
            return torch.func.jvp(f, (x,), (v,))[1]
    out, pull = _vjp(f, x)
    return _transposed(out, pull)(v) if out.is_complex() == x.is_complex() else torch.func.jvp(f, (x,), (v,))[1]


def complex_differentiable(f: Function, x: Tensor) -> bool:
    """Whether ``f`` of complex ``x`` (B, n) is linear over the complex numbers to first order: ``J (i d) = i J d`` for one direction ``d``
    at a point near ``x`` (where ``abs`` is not at its corner). Derivatives that are not finite are passed over.
    """
    # not random numbers, which `torch.vmap` refuses
    d = torch.complex(*wave(torch.empty(2, x.shape[1], dtype=x.dtype.to_real(), device=x.device))).expand_as(x)
    point = x.detach() + 1e-3 * (1 + x.detach().abs()) * d
    # PyTorch promises the conjugate of what others define for vjps: products forward are the same in every convention
    along, turned = jvp(f, point, d), jvp(f, point, 1j * d)
    off = (turned - 1j * along).abs() > torch.finfo(x.dtype).eps ** 0.5 * (turned.abs() + along.abs())
    while is_functorch_wrapped_tensor(off):
        off = get_unwrapped(off)
    with DisableFuncTorch():
        return not bool(off.any())


def vjp(f: Function, x: Tensor, w: Tensor) -> Tensor:
    """``J^T w`` (not conjugated) for ``w`` (B, m): (B, n), differentiable."""
    out, pull = _vjp(f, x)
    _same_field(out, x)
    return pull(w.conj())[0].conj() if out.is_complex() else pull(w)[0]


def _vjp(f: Function, x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    found: Any = torch.func.vjp(f, x)
    return found[0], found[1]


def _transposed(out: Tensor, pull: Callable[[Tensor], tuple[Tensor]]) -> Function:
    """``v -> J v`` as the transpose of a vjp, which is linear.

    Not PyTorch's forward mode: its formulas are differentiable by name, but some (of ``linalg.solve``, ``det``, norms of layers) take what
    the operator keeps for constants, and the derivatives of their results are wrong without a word.
    """
    _, transpose = _vjp(lambda w: pull(w)[0], torch.zeros_like(out))
    return lambda v: transpose(v)[0]


def _same_field(out: Tensor, x: Tensor) -> None:
    if out.is_complex() != x.is_complex():
        raise InvalidInput(
            f"f maps {x.dtype} to {out.dtype}: reverse mode needs both real or both complex (and f holomorphic); "
            "use forward mode for real x, or write f on real tensors"
        )


def forward_products(f: Function, x: Tensor, seeds: Tensor, chunk_size: int | None = None, differentiable: bool | None = None) -> Tensor:
    """``J s`` for the ``k`` directions ``seeds`` (k, n), the same for all rows: (k, B, m).

    As the transpose of a vjp, recorded by plain autograd if it need not be differentiable: 2 to 5 times as quick as a vmapped
    ``torch.func.jvp`` for up to some ten thousand unknowns (whose very first use in a process costs a second more).
    """
    seeds = seeds.to(x.dtype)
    if not must_differentiate(differentiable):
        found = plain_push(f, x, seeds.unsqueeze(1).expand(-1, *x.shape), chunk_size)
        if found is not None:
            return found
    out, pull = _vjp(f, x)
    same = out.is_complex() == x.is_complex()
    push = _transposed(out, pull) if same else lambda v: torch.func.jvp(f, (x,), (v,))[1]
    return _mapped(lambda s: push(s.expand_as(x)), seeds, chunk_size)


def reverse_products(f: Function, x: Tensor, seeds: Tensor, chunk_size: int | None = None, differentiable: bool | None = None) -> Tensor:
    """``J^T s`` for the ``k`` directions ``seeds`` (k, m), the same for all rows: (k, B, n).

    If it need not be differentiable, plain autograd with a batched backward is taken: it costs a half of ``torch.func`` for small systems.
    """
    pull, out = _pullback(f, x, must_differentiate(differentiable))
    _same_field(out, x)
    if out.shape != (x.shape[0], seeds.shape[-1]):
        raise InvalidInput(f"f maps {tuple(x.shape)} to {tuple(out.shape)}, but ({x.shape[0]}, {seeds.shape[-1]}) is expected")
    return pull(seeds.to(out.dtype), chunk_size)


def _pullback(f: Function, x: Tensor, differentiable: bool) -> tuple[Callable[[Tensor, int | None], Tensor], Tensor]:
    """``(seeds, chunk_size) -> J^T seeds`` and ``f(x)``."""
    if differentiable or transforms_active():
        out, back = _vjp(f, x)
        if out.is_complex():
            return lambda seeds, chunk: _mapped(lambda s: back(s.expand_as(out).conj())[0].conj(), seeds, chunk), out
        return lambda seeds, chunk: _mapped(lambda s: back(s.expand_as(out))[0], seeds, chunk), out
    # for this moment only: not for those who count, or move elsewhere, what is saved for a way back
    with torch.enable_grad(), unwatched():
        leaf = x.detach().requires_grad_()
        out = f(leaf)

    def pull(seeds: Tensor, chunk: int | None) -> Tensor:
        weights = seeds.unsqueeze(1).expand(-1, *out.shape)
        if not out.is_complex():
            return _plain_grads(out, leaf, weights, chunk)
        return _plain_grads(out, leaf, weights.conj(), chunk).conj()

    return pull, out


def _record(f: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``f(x)``, its leaf, a probe ``u`` and ``J^H u`` with a graph; None where ``f`` does not depend on ``x``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = f(leaf)
        # any will do, since all is linear in it; see `unrecorded`
        probe = wave(out.detach()).requires_grad_()
        turned = torch.autograd.grad(out, leaf, probe, create_graph=True, allow_unused=True)[0] if out.requires_grad else None
    return out, leaf, probe, turned


def _misses(out: Tensor, leaf: Tensor, probe: Tensor, turned: Tensor, found: Tensor, direction: Tensor) -> bool:
    """`unrecorded` of what `_record` gives; ``found``: the product with the ``direction``."""
    pull = lambda w: torch.autograd.grad(out, leaf, w, retain_graph=True)  # noqa: E731
    return unrecorded(pull, [probe.detach()], [turned.detach()], [found], [direction])


def plain_push(f: Function, x: Tensor, seeds: Tensor, chunk: int | None = None, sure: bool = False) -> Tensor | None:
    """``J s`` for ``seeds`` (k, *x.shape) as the transpose of the recorded vjp, or None where that cannot be had (complex results of real
    arguments, a backward that cannot be differentiated, or that is found out, if one wants to be ``sure``, not to be recorded)."""
    if transforms_active():
        return None
    try:
        out, leaf, probe, turned = _record(f, x)
        if out.is_complex() != x.is_complex():
            return None
        if turned is None:
            return out.new_zeros(seeds.shape[0], *out.shape)
        found = _plain_grads(turned, probe, seeds, chunk)
        return None if sure and _misses(out, leaf, probe, turned, found[0], seeds[0]) else found
    except RuntimeError:  # a fault of f shows again in the way that is taken instead
        return None


#: elements of one direction beyond which a loop is quicker than a batched backward (the tangents of all leave the cache)
_BATCHED_UP_TO = 20_000


def _plain_grads(out: Tensor, leaf: Tensor, weights: Tensor, chunk: int | None) -> Tensor:
    """Vector-Jacobian products of plain autograd with ``weights`` (k, *out.shape): (k, *leaf.shape)."""
    if not out.requires_grad:
        return leaf.new_zeros(weights.shape[0], *leaf.shape)

    def grad(w: Tensor, batched: bool) -> Tensor:
        (found,) = _batched_grads(out, (leaf,), w) if batched else torch.autograd.grad(out, leaf, w, retain_graph=True, allow_unused=True)
        return leaf.new_zeros(*(w.shape[:1] if batched else ()), *leaf.shape) if found is None else found

    if out.numel() <= _BATCHED_UP_TO:
        try:
            parts = [grad(part, True) for part in weights.split(chunk or max(weights.shape[0], 1))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except RuntimeError as error:
            if not is_vmap_failure(error):
                raise
    return torch.stack([grad(w, False) for w in weights])


def _batched_grads(out: Tensor, leaves: tuple[Tensor, ...], weights: Tensor) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` with ``is_grads_batched`` and ``retain_graph``, without its checks: they take longer than small Jacobians."""
    level = vmapmode_increment_nesting()
    try:
        found = Variable._execution_engine.run_backward(
            (out,), (legacy_add_batch_dim(weights, 0, level),), True, False, leaves, allow_unreachable=True, accumulate_grad=False
        )
        return [None if g is None else legacy_remove_batch_dim(g, level, weights.shape[0], 0) for g in found]
    finally:
        vmapmode_decrement_nesting()


def is_vmap_failure(error: Exception) -> bool:
    """Whether an operator could not be mapped (sparse matrices among them: their backward expands what cannot be expanded)."""
    text = str(error).lower()
    return any(word in text for word in ("vmap", "batching", "sparse"))


def _mapped(one: Function, seeds: Tensor, chunk_size: int | None) -> Tensor:
    """``vmap``, or a loop for functions that it cannot map (in-place writes into fresh tensors, operators without a rule)."""
    try:
        return torch.vmap(one, chunk_size=chunk_size)(seeds)
    except RuntimeError as error:
        missing = isinstance(error, NotImplementedError) and not isinstance(error, UnsupportedCombination)
        if missing or not is_vmap_failure(error):
            raise
        return torch.stack([one(s) for s in seeds])


@dataclass(frozen=True)
class DenseJacobian:
    """All entries, one product for each column or row of the matrix: ``(f, x) -> (B, m, n)``.

    ``mode``: ``"forward"`` (columns), ``"reverse"`` (rows), ``"auto"`` (reverse unless ``m > 2 n``; quicker for small systems and not in
    need of forward-mode rules), or ``"rows"``: ``f`` is run once on ``m`` copies of every row, which is the quickest for small systems but
    allowed only if ``f`` takes any number of rows (and holds no tensor that belongs to certain rows).
    ``chunk_size``: how many products at once (None: all). ``differentiable``: whether derivatives through the entries are wanted; None: if
    grad mode is on or a transform is active. Complex functions must be holomorphic.
    """

    mode: str = "auto"
    chunk_size: int | None = None
    differentiable: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "forward", "reverse", "rows"):
            raise InvalidInput(f"mode={self.mode!r}: use 'auto', 'forward', 'reverse' or 'rows'")

        if self.mode == "rows" and self.chunk_size is not None:
            raise UnsupportedCombination(f"mode='rows' takes one call of f, so chunk_size={self.chunk_size} cannot be; use mode='reverse'")

    def __call__(self, f: Function, x: Tensor) -> Tensor:
        differentiable = must_differentiate(self.differentiable)
        if self.mode == "forward":
            return self._forward(f, x, differentiable)
        if self.mode == "rows":
            return _dense_by_rows(f, x, differentiable)
        pull, out = _pullback(f, x, differentiable)
        check_rows(out, x)
        m = out.shape[-1]
        if self.mode == "auto" and (m > 2 * x.shape[-1] or (out.is_complex() and not x.is_complex())):
            return self._forward(f, x, differentiable)
        _same_field(out, x)
        return pull(torch.eye(m, dtype=out.dtype, device=x.device), self.chunk_size).movedim(0, 1)

    def _forward(self, f: Function, x: Tensor, differentiable: bool) -> Tensor:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            products = forward_products(f, x, eye, self.chunk_size, differentiable)
        check_rows(products[0], x)
        return products.movedim(0, -1)


def dense_with_time(f: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """``f_x`` (B, m, n) and ``f_t`` (B, m) of ``f(t, x)`` at times (B,) from one run, not differentiable; None where plain autograd with a
    batched backward cannot give them."""
    if transforms_active() or x.is_complex():
        return None
    with torch.enable_grad(), unwatched():
        time, leaf = t.detach().requires_grad_(), x.detach().requires_grad_()
        out = check_rows(f(time, leaf), x)
    m = out.shape[1]
    rows = slopes = None
    if out.requires_grad:
        seeds = torch.eye(m, dtype=out.dtype, device=out.device).unsqueeze(1).expand(-1, *out.shape)
        try:
            rows, slopes = _batched_grads(out, (leaf, time), seeds)
        except RuntimeError as error:
            if not is_vmap_failure(error):
                raise
            return None
    matrix = x.new_zeros(x.shape[0], m, x.shape[1]) if rows is None else rows.movedim(0, 1)
    return matrix, torch.zeros_like(out, requires_grad=False) if slopes is None else slopes.movedim(0, 1)


def check_rows(out: Tensor, x: Tensor) -> Tensor:
    if out.dim() != 2 or out.shape[0] != x.shape[0]:
        raise InvalidInput(f"f must map (B, n) to (B, m), but it maps {tuple(x.shape)} to {tuple(out.shape)}")
    return out


def _dense_by_rows(f: Function, x: Tensor, differentiable: bool) -> Tensor:
    b, n = x.shape
    copies = x.repeat_interleave(n, 0)
    if differentiable or transforms_active():
        out, back = _vjp(f, copies)
    else:
        with torch.enable_grad(), unwatched():
            copies = copies.detach().requires_grad_()
            out, back = f(copies), None
    if out.shape != copies.shape:
        raise InvalidInput(f"mode='rows' is for square Jacobians, but f maps {tuple(copies.shape)} to {tuple(out.shape)}; use mode='auto'")
    _same_field(out, x)
    seeds = torch.eye(n, dtype=out.dtype, device=x.device).repeat(b, 1)
    if back is not None:
        found = back(seeds)[0]
    else:
        found = torch.autograd.grad(out, copies, seeds, allow_unused=True)[0] if out.requires_grad else None
        found = torch.zeros_like(x).repeat_interleave(n, 0) if found is None else found
    return (found.conj() if out.is_complex() else found).reshape(b, n, n)


def jacobian_operator(f: Function, x: Tensor) -> LinearOperator:
    """The square Jacobian of ``f`` at ``x`` (B, n) as an operator: ``matvec`` is ``J v`` and ``rmatvec`` is ``J^T w``, both (B, n) to (B,
    n).

    ``f`` runs once: products are taken from the recorded graph (``J v`` as the transpose of the vjp). Where the graph cannot be
    differentiated twice, each ``matvec`` runs ``f`` anew in forward mode. Under ``torch.func`` transforms the products are those of
    ``torch.func`` and differentiable; otherwise they are not.
    """
    if transforms_active():
        out, pull = _vjp(f, x)
        _check_square(out, x)
        _same_field(out, x)
        return _operator(x, _transposed(out, pull), lambda w: pull(w.conj())[0].conj() if out.is_complex() else pull(w)[0])
    out, leaf, probe, turned = _record(f, x)
    _check_square(out, x)
    if turned is None:
        return _operator(x, torch.zeros_like, torch.zeros_like)

    def rmatvec(w: Tensor) -> Tensor:
        w = w.detach()
        found = torch.autograd.grad(out, leaf, w.conj() if out.is_complex() else w, retain_graph=True)[0]
        return found.conj() if out.is_complex() else found

    forward: bool | None = None

    def matvec(v: Tensor) -> Tensor:
        nonlocal forward
        v = v.detach()
        if not forward:
            try:
                found = torch.autograd.grad(turned, probe, v, retain_graph=True)[0]
            except RuntimeError as error:
                if turned.requires_grad and "once_differentiable" not in str(error):
                    raise
                forward = True
            else:
                if forward is None:
                    forward = _misses(out, leaf, probe, turned, found, v)
                if not forward:
                    return found
        with torch.no_grad():  # a backward that cannot be differentiated
            return torch.func.jvp(f, (x.detach(),), (v,))[1]

    return _operator(x, matvec, rmatvec)


def _check_square(out: Tensor, x: Tensor) -> None:
    if out.shape != x.shape:
        raise InvalidInput(f"an operator needs a square Jacobian, but f maps {tuple(x.shape)} to {tuple(out.shape)}")
    _same_field(out, x)


def _operator(x: Tensor, matvec: Function, rmatvec: Function) -> LinearOperator:
    return LinearOperator(x.shape[1], x.shape[0], x.dtype, x.device, matvec, rmatvec)
