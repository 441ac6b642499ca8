"""Which transforms of ``torch.func`` run, and what of a tensor they wrap; named errors in the place of PyTorch's own, for what functions of
the user do that cannot be differentiated there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import torch_internals as internals
from ..errors import UnsupportedCombination

__all__ = [
    "anywhere",
    "below_vmap",
    "copies_of",
    "copy_at",
    "copy_where",
    "differentiated_again",
    "every_copy",
    "functorch_active",
    "functorch_level",
    "has_tangent",
    "jvp_active",
    "moves_within",
    "naming_faults",
    "naming_writes",
    "one_copy",
    "only_maps",
    "transforming",
    "unwrapped",
    "vmap_active",
]

def functorch_active() -> bool:
    """Whether a ``torch.func`` transform (or its vmap) is running."""
    return internals.peek_interpreter_stack() is not None


def transforming() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is running."""
    return functorch_active() or internals.dual_level() >= 0


def vmap_active() -> bool:
    """Whether a ``torch.vmap`` is running, directly or inside of a transform such as `torch.func.jacfwd`."""
    stack = internals.get_interpreter_stack()
    return any(level.key() == internals.TransformType.Vmap for level in stack or ())


def differentiated_again(tensors: Iterable[Tensor]) -> bool:
    """Whether derivatives in these ``tensors``, which are being taken, may be differentiated themselves."""
    stack = internals.get_interpreter_stack() or ()
    below = map(unwrapped, tensors)
    taking = sum(level.key() in (internals.TransformType.Grad, internals.TransformType.Jvp) for level in stack)
    if taking != 1:
        return taking > 1 or torch.is_grad_enabled() or any(map(has_tangent, below))
    # one transform records whatever it takes: is there anything below it?
    return any(has_tangent(x) or x.requires_grad for x in below)


def only_maps() -> bool:
    """Whether whatever transforms are running are maps, which take no derivatives."""
    return all(level.key() == internals.TransformType.Vmap for level in internals.get_interpreter_stack() or ())


def jvp_active() -> bool:
    """Whether a `torch.func.jvp` is running, and no ``torch.vmap``."""
    stack = internals.get_interpreter_stack() or ()
    return any(level.key() == internals.TransformType.Jvp for level in stack) and not vmap_active()


def unwrapped(x: Tensor) -> Tensor:
    """What holds the values of ``x``, those of all copies where ``torch.vmap`` maps over it, for use below all transforms."""
    while internals.is_functorch_wrapped_tensor(x):
        x = internals.get_unwrapped(x)
    return x


def anywhere(on: Tensor) -> bool:
    """Whether a flag is set in any trajectory, of any copy under ``torch.vmap``."""
    on = unwrapped(on)
    with internals.DisableFuncTorch():
        return bool(on.any())


def copies_of(x: Tensor) -> tuple[Tensor, list[int]]:
    """The values of ``x`` without levels of transforms and tangents, those of all copies, ``(*copies, *x.shape)``, and the levels of the
    maps that made them. For use below all transforms."""
    levels: list[int] = []
    while internals.is_functorch_wrapped_tensor(x):
        dim = internals.maybe_get_bdim(x) if internals.is_batchedtensor(x) else None
        if dim is not None:
            levels.insert(0, internals.maybe_get_level(x))
        x = internals.get_unwrapped(x)
        x = x if dim is None else x.movedim(dim, 0)
    return (forward_ad.unpack_dual(x).primal if internals.dual_level() >= 0 else x).detach(), levels


def every_copy(x: Tensor) -> Tensor:
    """The values of `copies_of`."""
    return copies_of(x)[0]


def copy_where(found: Tensor) -> dict[int, int]:
    """The first copy whose flag ``found`` () is set, the very first where none is: its place at the level of each map. For use below all
    transforms."""
    flags, levels = copies_of(found)
    return copy_at(int(flags.to(torch.int64).flatten().argmax()), flags.shape, levels)


def copy_at(number: int, copies: Sequence[int], levels: Sequence[int]) -> dict[int, int]:
    """The place at the level of each map of the copy that has this number among all of them."""
    if not levels:
        return {}
    places = torch.unravel_index(torch.tensor(number, device="cpu"), tuple(copies))
    return dict(zip(levels, map(int, places), strict=True))


def one_copy(x: Tensor, place: dict[int, int] | None = None) -> Tensor:
    """The values of a tensor without levels of transforms and tangents; of a mapped one those of the copy at ``place`` (see `copy_where`),
    of the first one without it. For use below all transforms."""
    while internals.is_functorch_wrapped_tensor(x):
        dim = internals.maybe_get_bdim(x) if internals.is_batchedtensor(x) else None
        level = internals.maybe_get_level(x)
        x = internals.get_unwrapped(x)
        x = x if dim is None else x.select(dim, (place or {}).get(level, 0))
    return every_copy(x)


def below_vmap(x: Tensor, size: int) -> Tensor:
    """``(size, *x.shape)``: what ``x`` is for each copy, as the vmap rule of a node sees it, which runs below the vmap itself."""
    level, mapped = functorch_level(), False
    while internals.maybe_get_level(x) > level:
        dim = internals.maybe_get_bdim(x)
        x = internals.get_unwrapped(x)
        if dim >= 0:
            x, mapped = x.movedim(dim, 0), True
    return x if mapped else x.expand(size, *x.shape)


def moves_within(x: Tensor, moves: Callable[[Tensor], bool]) -> bool:
    """Whether ``x``, wrapped by a transform, depends on what one of those that are running differentiates in, or ``moves`` beneath them: a
    transform wraps all that is computed within it."""
    if not functorch_active():
        # of one that has ended
        return internals.is_gradtrackingtensor(x) or moves(internals.get_unwrapped(x))
    top = internals.retrieve_current_functorch_interpreter()
    if internals.maybe_get_level(x) == top.level():
        forward = top.key() == internals.TransformType.Jvp
        if internals.is_gradtrackingtensor(x) and (x.requires_grad or (forward and forward_ad.unpack_dual(x).tangent is not None)):
            return True
        x = internals.get_unwrapped(x)
    # tangents are seen from their own level only
    with top.lower():
        return moves(x)


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is a dual tensor of forward mode."""
    # unpack_dual raises outside of a dual level, and sees none inside of a transform
    if internals.dual_level() < 0:
        return False
    with internals.DisableFuncTorch():
        return forward_ad.unpack_dual(x).tangent is not None


def functorch_level() -> int:
    stack = internals.peek_interpreter_stack()
    return 0 if stack is None else stack.level()


P = ParamSpec("P")
R = TypeVar("R")

_WRITES = (
    "fun (or an event function, jac, quadrature) keeps a tensor from call to call that it writes into, or computed in another call, and "
    "its derivative is asked for, which goes through each call on its own: return a new tensor, and make the one it writes into anew in "
    "every call"
)
_NOT_RECORDED = (
    "fun takes derivatives itself where nothing is recorded, under torch.no_grad() or of tensors that do not require grad: use "
    "torch.func.grad there, or enter torch.enable_grad() in fun and let what it differentiates by require grad"
)
_NESTED = (
    "fun uses forward mode itself (torch.func.jvp, jacfwd, hessian), and the solve is within forward_ad.dual_level(), which PyTorch does "
    "not nest: take torch.func.jvp around the solve, which nests, or torch.func.grad or vjp in fun"
)
_HOOKED = (
    "torch.func is used by the solve (ForwardSensitivity, mechanics) or by fun where hooks on saved tensors are active "
    "(torch.utils.checkpoint with use_reentrant=False, save_on_cpu), which PyTorch refuses: use gradient=DiscreteAdjoint(), whose "
    "checkpoints= saves memory itself, or use_reentrant=True"
)
_INFERENCE = (
    "fun uses tensors that were made in torch.inference_mode(), which autograd refuses, and Jacobians are taken by it: make them under "
    "torch.no_grad() instead, or .clone() them outside of inference mode"
)
_OUT = (
    "an operator in fun (or in an event function, jac, quadrature) writes its result into out=, which autograd refuses, and derivatives "
    "are taken by it (those that are asked for, or the Jacobian that implicit methods and roots need): return a new tensor, without out="
)
_WIDENED = (
    "an operator in fun was given two precisions, though its arguments agree: in forward mode (torch.func.jvp, jacfwd, hessian, "
    "ForwardSensitivity) PyTorch gives a number times a 0-d tensor, such as 0.5 * y[0], a tangent in double precision. Keep a dimension "
    "(y[:1] and torch.cat in the place of y[0] and torch.stack), take reverse mode (torch.func.vjp, grad), or a float64 state"
)
_COMPILED = (
    "fun is, or holds, what torch.compile has made of a function, whose backward runs once, on plain tensors, and has no derivative of its "
    "own; here more is needed of it (a Jacobian, derivatives of it, second derivatives): hand over the function as it was (compile=True "
    "compiles whole solves), or take an explicit method where first derivatives are all"
)
_NO_DERIVATIVE = (
    "PyTorch has no derivative, of the order that is needed, of an operator in fun (or in an event function, jac, quadrature); it is named "
    "above. Rosenbrock methods, and second derivatives, need one order more: take an explicit method, or 'kvaerno5', 'radau5' or 'bdf' for "
    "a first derivative of a stiff problem; of scaled_dot_product_attention enter torch.nn.attention.sdpa_kernel(SDPBackend.MATH) in fun, "
    "which has derivatives of every order; of torch.cdist write (x[:, None] - y).square().sum(-1).sqrt()"
)
_CHECKPOINTED = (
    "fun calls torch.utils.checkpoint, which makes operators again for one way back alone, and here more is asked of it (a Jacobian, or "
    "derivatives of derivatives); or it keeps a tensor that was made inside of a vmap. Leave the checkpoint out of fun: "
    "DiscreteAdjoint(checkpoints=n) bounds the memory of whole solves; or take an explicit method"
)
_SPARSE = (
    "fun (or an event function, jac, quadrature) uses sparse tensors where PyTorch takes none: transforms of torch.func and forward mode "
    "(ForwardSensitivity, second derivatives of some products) take no CSR or CSC tensors, torch.vmap none at all, and few operators have "
    "derivatives that are sparse. Take first derivatives in reverse mode, with gradient=DiscreteAdjoint(), and COO tensors; or a dense "
    "tensor, or index_add"
)
_BACKWARD_ONLY = (
    "an operator in fun (or in an event function, jac, quadrature), it is named above, has no forward mode, which is asked for here: take "
    "reverse mode (torch.func.grad, vjp, jacrev, backward), or give the custom torch.autograd.Function a jvp"
)
_NOT_FOR_TRANSFORMS = (
    "a custom torch.autograd.Function in fun (or in an event function, jac, quadrature) is called under a transform of torch.func: one "
    "around the solve, or one that the solve needs (ForwardSensitivity, second derivatives, Jacobians). Give it a forward without ctx with "
    "setup_context, and generate_vmap_rule = True or a vmap; or take first derivatives by backward(), with gradient=DiscreteAdjoint()"
)
_BY_VALUES = (
    "fun (or an event function, jac, quadrature) does what torch.vmap, which is around the solve, cannot map: it branches by the value of "
    "a tensor, asks for it (float, item), or writes something mapped into a tensor that is not. Use torch.where and new tensors; or "
    "batched=True in the place of torch.vmap, with which fun is called once for all rows"
)
#: how PyTorch says so: its transforms, and autograd
_WRITTEN = {
    "would mutate a captured Tensor": _WRITES,
    "requires grad is being used in an in-place operation": _WRITES,
    "modified by an inplace operation": _WRITES,
    "backward through the graph a second time": _WRITES,
    "functions with out=... arguments don't support": _OUT,
    "because it is an out= function": _OUT,
    "derivative for aten::": _NO_DERIVATIVE,
    "the derivative for '": _NO_DERIVATIVE,
    "compiled with non-empty donated buffers": _COMPILED,
    "does not currently support double backward": _COMPILED,
    "data pointer of Tensor that doesn't have storage": _COMPILED,
    "may have escaped from inside a function being vmapped": _CHECKPOINTED,
    "torch.utils.checkpoint is incompatible with .grad()": _CHECKPOINTED,
    "Sparse": _SPARSE,
    "sparse tensors": _SPARSE,
    "implement the jvp function for custom autograd.Function": _BACKWARD_ONLY,
    "Trying to use forward AD with": _BACKWARD_ONLY,
    "use an autograd.Function with functorch transforms": _NOT_FOR_TRANSFORMS,
    "does not have vmap support": _NOT_FOR_TRANSFORMS,
}
_SAID = _WRITTEN | {
    "does not require grad and does not have a grad_fn": _NOT_RECORDED,
    "One of the differentiated Tensors does not require grad": _NOT_RECORDED,
    "Inference tensors cannot be saved for backward": _INFERENCE,
    "Nested forward mode AD is not supported": _NESTED,
    "don't yet support saved tensor hooks": _HOOKED,
    "data-dependent control flow": _BY_VALUES,
    "support vmap over calling .item()": _BY_VALUES,
    "vmap: inplace arithmetic": _BY_VALUES,
}
#: how it says so in forward mode, where alone ours is the likely cause
_SAID_FORWARD = {"have the same dtype": _WIDENED, "expected scalar type": _WIDENED}


def naming_writes(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, with a named error in the place of PyTorch's own for writes into kept tensors."""
    return _naming(function, _WRITTEN)


def naming_faults(function: Callable[P, R]) -> Callable[P, R]:
    """As `naming_writes`; a front door, in which functions of the user may also ask for derivatives of nothing."""
    return _naming(function, _SAID, _SAID_FORWARD)


def _naming(function: Callable[P, R], said: dict[str, str], forward: dict[str, str] | None = None) -> Callable[P, R]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            known = said | forward if forward and transforming() else said
            named = next((ours for words, ours in known.items() if words in str(error)), None)
            if type(error) in (RuntimeError, NotImplementedError) and named is not None and not (args and _of_context(args[0], error)):
                raise UnsupportedCombination(named) from error
            raise

    return call


def _of_context(context: object, raised: RuntimeError) -> bool:
    """Whether this is the context of a node that was gone back through before, or one of whose inputs, a leaf such as a parameter, was
    written to since, and that is what was ``raised``: then the error is about that, and not about ``fun``. (What ``fun`` writes results
    into is no leaf.)"""
    written = "modified by an inplace operation"
    try:
        getattr(context, "saved_tensors", None)
    except RuntimeError as error:
        ours = written in str(error) and written in str(raised) and "which is output" not in str(raised)
        return "second time" in str(error) or ours
    return False
