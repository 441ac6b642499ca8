"""Differentiable tensors that a plain function captured: finding them, and running the function with others in their place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import torch_internals as internals
from ..errors import AdjointError, CapturedTensorLost, UnsupportedCombination
from ..torch_internals import below_jvp, leaves_of, mapped
from .normalizing import NORMALIZATIONS
from .origins import Home, alive, attribute, cut_apart, leads_to, listed, readable, saved_bytes, unknown_leaves
from .remarks import called_by_us
from .transforms import functorch_active, functorch_level, has_tangent, moves_within, vmap_active

__all__ = [
    "Captured", "Substitute", "alive", "ask", "asking", "asks_for_gradients", "below_jvp", "constants_of", "cut_apart",
    "depends_on_others", "find_captured", "is_differentiable", "leads_to", "listed", "moves",
    "needs_derivatives", "readable", "saved_bytes", "unknown_leaves", "unmapped",
]  # fmt: skip


def is_differentiable(x: Any) -> bool:
    """Whether some derivative may be asked of ``x``: reverse mode, forward mode or a ``torch.func`` transform."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return False
    return x.requires_grad or internals.is_functorch_wrapped_tensor(x) or has_tangent(x)


def _put_in(x: Any) -> bool:
    """Whether ``fun`` of a node, which runs below all transforms, needs another one for ``x``: also for masks and indices made within."""
    return is_differentiable(x) or (isinstance(x, Tensor) and internals.is_functorch_wrapped_tensor(x))


def moves(x: Tensor) -> bool:
    """As `is_differentiable`, but not for what is only mapped over by ``torch.vmap``, nor where no gradients are recorded."""
    if internals.is_functorch_wrapped_tensor(x):
        return moves_within(x, moves)
    return (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x)


def needs_derivatives(tensors: Iterable[Tensor]) -> bool:
    """Whether a solve that depends on these tensors must keep what derivatives need."""
    if functorch_active():
        return any(is_differentiable(x) for x in tensors)
    grad = torch.is_grad_enabled()
    return any((grad and x.requires_grad) or has_tangent(x) for x in tensors)


def _functorch_wrapped(x: Tensor, level: int) -> bool:
    """Whether ``x`` carries wrappers of a transform that began after ``level``, or of one that has ended."""
    return internals.is_functorch_wrapped_tensor(x) and not 0 < internals.maybe_get_level(x) <= level


def _layers(x: Tensor, level: int) -> Iterator[Tensor]:
    """``x`` and what lies in it below the wrappers of transforms that began after ``level``: those that ``fun`` uses itself.

    Every layer counts. A node runs its function below the transform that called for it, and the next one which ``fun`` begins gets the
    same number: a captured tensor of the one, wrapped by the other, looks like one that is wrapped twice.
    """
    yield x
    while internals.maybe_get_level(x) > level:
        x = internals.get_unwrapped(x)
        yield x


def _wrapped_like(x: Tensor, like: Sequence[Tensor]) -> Tensor:
    """``x`` in wrappers as those of ``like``, from the outermost one to the innermost one."""
    for wrapper in reversed(like):
        level = internals.maybe_get_level(wrapper)
        if internals.is_batchedtensor(wrapper):
            x = internals.add_batch_dim(x, internals.maybe_get_bdim(wrapper), level)
        elif internals.is_gradtrackingtensor(wrapper):
            x = internals.wrap_for_grad(x, level)
        else:
            raise UnsupportedCombination(
                "fun hands a tensor that it captured to a transform which is neither of torch.func.grad, vjp, jvp, jacrev, jacfwd, "
                "hessian nor torch.vmap: pass the tensor through args="
            )
    return x


_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


#: what a function may branch by: a node's tensors answer otherwise than those of the user
_QUESTIONS = frozenset((Tensor.requires_grad.__get__, Tensor.is_leaf.__get__))  # type: ignore[attr-defined]


def asks_for_gradients(func: Callable) -> bool:
    """Whether an operator makes a tensor one that requires grad."""
    return func is Tensor.requires_grad_ or func == _SET_REQUIRES_GRAD


_NOT_MAPPED = "torch.vmap cannot see through torch.autograd.grad, which fun calls: use torch.func.grad there, which every transform can"


@contextmanager
def unmapped() -> Iterator[None]:
    """Names what PyTorch fails on where ``fun`` calls `torch.autograd.grad` under vmap."""
    try:
        yield
    except RuntimeError as error:
        if vmap_active() and not isinstance(error, AdjointError):
            raise UnsupportedCombination(_NOT_MAPPED) from error
        raise


def ask(x: Any) -> Any:
    """``x`` as a tensor that derivatives can be taken in, another one where it is not."""
    if not isinstance(x, Tensor) or x.requires_grad or not (x.is_floating_point() or x.is_complex()):
        return x
    if internals.is_batchedtensor(x):
        raise UnsupportedCombination(_NOT_MAPPED)
    with asking():
        return x.view_as(x).requires_grad_(True)


@contextmanager
def asking() -> Iterator[None]:
    """Transforms refuse to let a tensor require grad that did not; here they do not."""
    allowed = internals.get_inplace_requires_grad_allowed()
    internals.set_inplace_requires_grad_allowed(True)
    try:
        yield
    finally:
        internals.set_inplace_requires_grad_allowed(allowed)


def _whole(x: Tensor) -> Tensor:
    """What ``x`` is a view of, or itself."""
    return x if x._base is None else x._base


class _Watch(TorchFunctionMode):
    """Records the (differentiable) tensors that enter operators without having come out of one, and whether ``fun`` differentiates."""

    def __init__(self, known: Iterable[Any], wanted: Callable[[Any], bool] = _put_in) -> None:
        super().__init__()
        self.wanted, self.level, self.below = wanted, functorch_level(), internals.times_below()
        self.known = {id(x): x for x in known if isinstance(x, Tensor)}
        self.captured: dict[int, Tensor] = {}
        #: tensors with derivatives that came out of operators, for `left`
        self.made: list[weakref.ref[Tensor]] = []
        #: tensors that got their derivatives by being written into; see `find_captured`
        self.written: list[weakref.ref[Tensor]] = []
        self.transforms = self.inner_grad = self.asked = self.normalizes = self.unseen = self.alters = False
        self.begun, self.traced = internals.get_sequence_nr(), internals.is_written_down()
        #: numbers of the nodes of custom functions that said what they were given
        self.customs: set[int] = set()
        #: of solves around this one: operators are given what they put in
        self.outer = _substitutes()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if internals.times_below() > self.below:
            # a solve inside of the function looks at plain values: those of no level here, and nobody's results
            return func(*args, **kwargs)
        if not self.traced and internals.is_written_down():
            raise UnsupportedCombination(
                "fun calls torch.func.linearize (or make_fx), whose result has no derivatives: what it depends on is written down as "
                "constants. Use torch.func.jvp there"
            )
        if func in _QUESTIONS:
            self.asked = self.asked or not called_by_us()
        self.normalizes |= func in NORMALIZATIONS
        if func in _HOOKABLE:
            self.alters = self.alters or not called_by_us()
        if functorch_level() > self.level:
            self.transforms = True
        elif func is Tensor.backward:
            raise UnsupportedCombination(
                "fun calls backward(), whose result has no derivatives: take torch.autograd.grad or torch.func.grad, or solve under "
                "torch.no_grad()"
            )
        elif func is torch.autograd.grad:
            # pullbacks of torch.func.vjp call it too, on what their transform has left
            wrapped = any(isinstance(x, Tensor) and _functorch_wrapped(x, self.level) for x in leaves_of(args[:1]))
            self.inner_grad |= not wrapped and not called_by_us()
        elif asks_for_gradients(func):
            self.inner_grad |= not called_by_us()
        plain = [] if asks_for_gradients(func) else [x for x in leaves_of(args[:1]) if isinstance(x, Tensor) and not x.requires_grad]
        out = func(*args, **kwargs)
        into = [x for x in plain if x.requires_grad]
        self.known.update((id(x), x) for x in into)
        self.written.extend(weakref.ref(_whole(x)) for x in into)
        produced = [x for x in leaves_of(out) if isinstance(x, Tensor)]
        if produced:
            given = {id(x): x for x in leaves_of((args, kwargs)) if isinstance(x, Tensor)}
            for i, leaf in given.items():
                if i not in self.known:
                    self._meet(list(_layers(leaf, self.level)))
                elif internals.custom_functions_may_hide:
                    self.unseen |= self._hides(leaf)
            # kept alive here, so that no identity is given twice; with what lies in them, which is left when a transform ends
            for x in produced:
                self.known.update((id(layer), layer) for layer in _layers(x, self.level))
                # what an operator gives back as it is (`to`, `contiguous`) it has not made
                if id(x) not in given and is_differentiable(x):
                    self.made.append(weakref.ref(x))
        return out

    def given(self, args: Sequence[Any]) -> None:
        """What a custom function gets, see `_given_to_custom`."""
        if internals.times_below() > self.below:
            return
        self.customs.add(internals.get_sequence_nr())
        # behind those who handed it on to here
        self.alters = self.alters or not called_by_us(5)
        for x in args:
            if isinstance(x, Tensor) and id(x) not in self.known:
                self._meet(list(_layers(x, self.level)))

    def left(self) -> dict[int, Tensor]:
        """The tensors with derivatives that were made while this watched and that somebody keeps; it forgets all others itself."""
        self.known.clear()
        return {id(x): x for x in internals.alive(self.made)}

    def returned(self, results: Any) -> None:
        """What a function gives back may be a captured tensor itself, that enters no operator."""
        for x in leaves_of(results):
            if isinstance(x, Tensor) and not (self.transforms and internals.is_functorch_wrapped_tensor(x)):
                self._meet(list(_layers(x, self.level)))
                self.unseen |= internals.custom_functions_may_hide and self._hides(x)

    def _meet(self, layers: list[Tensor]) -> None:
        for x in layers if self.outer else ():
            put_in = next((mode.table[id(x)][1] for mode in self.outer if id(x) in mode.table), None)
            if put_in is not None and self.wanted(put_in) and not any(id(layer) in self.known for layer in layers):
                self.captured[id(x)] = self.known[id(x)] = x
                return
        x = layers[-1]
        if any(id(layer) in self.known for layer in layers) or not self.wanted(x):
            return
        made = self._made_here(x)
        if made and self.transforms:
            return
        # of what TorchScript made, whose own operators are not seen, it is what that was computed from
        self.unseen |= made and not self._announced(x)
        for origin in unknown_leaves(x, list(self.known.values())) if made else (x,):
            self.captured[id(origin)] = self.known[id(origin)] = origin
        self.known[id(x)] = x

    def _announced(self, x: Tensor) -> bool:
        """Whether this is a result of a `torch.autograd.Function`, or a view of one, that said what it was given."""
        node = _whole(x).grad_fn
        return isinstance(node, torch.autograd.function.BackwardCFunction) and node._sequence_nr() in self.customs

    def _hides(self, x: Tensor) -> bool:
        """Whether what an operator within made is the result of a custom function that did not say what it was given."""
        custom = isinstance(x.grad_fn, torch.autograd.function.BackwardCFunction)
        return custom and self._made_here(x) and not (self._announced(x) or self.transforms or internals.are_transforms_active())

    def _made_here(self, x: Tensor) -> bool:
        """Whether ``x`` was computed since the watch began: results of transforms and of TorchScript come from no operator that is seen."""
        return x.grad_fn is not None and x.grad_fn._sequence_nr() >= self.begun


#: what hooks are put on tensors by, and on the nodes that made them
_HOOKABLE = (Tensor.register_hook, Tensor.grad_fn.__get__)  # type: ignore[attr-defined]


class Captured(NamedTuple):
    """What functions use beside their arguments, and whether they take derivatives themselves: by `torch.func` or vmap
    (``transforms``), by `torch.autograd.grad` (``inner_grad``); whether they use any of the `NORMALIZATIONS`; whether they call what
    hides its operators (``unseen``): TorchScript, extensions in C++; whether they ask which tensors require grad (``asks``), as what
    registers hooks does: under ``torch.vmap`` none seems to; whether hooks or custom functions see what comes back (``alters``)."""

    tensors: list[Tensor]
    transforms: bool = False
    inner_grad: bool = False
    normalizes: bool = False
    unseen: bool = False
    asks: bool = False
    alters: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """As fields of a `System`."""
        return {name: getattr(self, name) for name in ("transforms", "inner_grad", "normalizes", "unseen", "asks", "alters")}


def find_captured(calls: Sequence[Callable[..., Any]], point: tuple[Any, ...], owners: Iterable[Any] = (), end: Any = None) -> Captured:
    """Differentiable tensors that ``call(*point)`` uses beside that, leaf or not, in order of first use.

    ``point`` holds pytrees. ``owners`` are the functions themselves: where one is (bound to) an ``nn.Module``, its parameters count even if
    this call does not reach them, because another time may. What a function computes in this first call and keeps for later ones counts
    too (weights that are made when first asked for); ``end`` is another point, at which that is seen.

    Raises `CapturedTensorLost` where a function keeps what it has computed for each point by itself: most of that is made within the
    solve, where no derivatives are recorded.
    """
    watch = _watched(calls, point)
    found = dict(watch.captured)
    branch = _branches(calls, point, list(found.values())) if watch.asked and not watch.inner_grad else watch
    flags = watch.transforms, branch.inner_grad, watch.normalizes, watch.unseen, watch.asked, watch.alters or branch.alters
    kept = watch.left()
    written = {id(x): (x, x._version) for x in internals.alive(watch.written)}
    if (kept or written) and end is not None:
        used = _used_again(calls, {**{i: x for i, (x, _) in written.items()}, **kept}, end)
        for i, (x, version) in written.items():
            if x._version > version and not (i in found or (i in kept and i in used)):
                # every call writes into it: what this look has left there would be the history of whatever the solve writes
                x.detach_()
                used.pop(i, None)
        found.update(used)
    inputs = {id(x) for x in leaves_of(point) if isinstance(x, Tensor)}
    for owner in owners:
        module = owner if isinstance(owner, torch.nn.Module) else attribute(owner, "__self__")
        if isinstance(module, torch.nn.Module):
            found.update((id(p), p) for p in module.parameters() if id(p) not in inputs and is_differentiable(p))
    return Captured(list(found.values()), *flags)


def constants_of(call: Callable[[], Any], rows: int, known: Iterable[Tensor]) -> list[Tensor]:
    """Tensors with an entry for each of the rows that ``call()`` uses, beside those that are ``known`` and those that it makes."""
    wanted = lambda x: not _put_in(x) and x.dim() > 0 and x.shape[0] == rows  # noqa: E731
    watch = _Watch(known, wanted)
    with torch.no_grad(), watch:
        call()
    return list(watch.captured.values())


def _watched(calls: Sequence[Callable[..., Any]], point: tuple[Any, ...]) -> _Watch:
    known = [x for x in leaves_of(point) if isinstance(x, Tensor)]
    watch = _Watch(known)
    try:
        with torch.enable_grad(), watch:
            for call in calls:
                watch.returned(call(*point))
    except RuntimeError:
        if not watch.inner_grad:
            raise
        # the state does not require grad here, or a transform refuses to let it: again with one that does
        with unmapped():
            asked = [ask(x) for x in known]
            watch = _Watch([*known, *asked])
            with torch.enable_grad(), asking(), watch, Substitute(known, asked, answers=False):
                for call in calls:
                    watch.returned(call(*point))
    return watch


def _branches(calls: Sequence[Callable[..., Any]], point: tuple[Any, ...], captured: Sequence[Tensor]) -> _Watch:
    """What functions that look at ``requires_grad`` do where all that they see requires grad, as on the way back."""
    known = [*(x for x in leaves_of(point) if isinstance(x, Tensor)), *captured]
    asked = [x if internals.is_batchedtensor(x) else ask(x) for x in known]
    watch = _Watch([*known, *asked])
    with torch.enable_grad(), asking(), watch, Substitute(known, asked, answers=False):
        for call in calls:
            call(*point)
    return watch


def _used_again(calls: Sequence[Callable[..., Any]], kept: dict[int, Tensor], end: tuple[Any, ...]) -> dict[int, Tensor]:
    """Those of the tensors kept from a first call that another one uses, at another point."""
    watch = _watched(calls, end)
    used = {i: x for i, x in watch.captured.items() if i in kept}
    more = watch.left()
    if more:
        # at this point once more, by tensors of other identities
        again = _watched(calls, mapped(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, end))
        if any(i in more for i in again.captured):
            raise CapturedTensorLost(
                "fun keeps tensors that it has computed from differentiable ones, and uses them when it is called with the same arguments "
                "again (a cache by time or state). Those that it makes within the solve have no derivatives, and a gradient would be "
                "missing: compute them in every call, or all of them before the solve."
            )
    return used


class Substitute(TorchFunctionMode):
    """Runs operators with other tensors in the place of captured ones (needed where a transform wraps the node's inputs).

    A captured tensor that ``fun`` hands to a transform of its own comes to the operators in that transform's wrappers: it is known by what
    lies in them, and its replacement is wrapped in the same way.

    ``homes``: see `parameter_homes`; what lies there now is replaced too. ``answers``: whether captured tensors themselves say if they
    require grad, so that a function which branches by that takes the same way in every call, whatever stands in their place.
    """

    def __init__(
        self, captured: Sequence[Tensor], replacements: Sequence[Tensor], homes: Sequence[Home | None] = (), answers: bool = True
    ) -> None:
        super().__init__()
        self.answers = answers
        # with the tensors themselves: what a transform wraps is alive no longer than they are
        self.table = {id(x): (x, r) for x, r in zip(captured, replacements, strict=True)}
        for x, r in list(self.table.values()):
            # a transform puts into its wrappers what is left of those of transforms that have ended
            inner = internals.unwrap_if_dead(x)
            self.table.setdefault(id(inner), (inner, r))
        for home, r in zip(homes, replacements, strict=False):
            if home is not None:
                present = home[0]._parameters.get(home[1])
                if present is not None:
                    self.table[id(present)] = (present, r)
        self.level = 0
        #: wrappers that a transform of ``fun`` differentiates by, with the ones that do so in their place
        self.variables: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Substitute:
        self.level = functorch_level()
        return super().__enter__()

    def __exit__(self, *what: Any) -> None:
        self.variables.clear()
        super().__exit__(*what)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if asks_for_gradients(func):
            return self._ask(func, args, kwargs or {})
        if self.answers and func in _QUESTIONS and id(args[0]) in self.table and id(args[0]) not in self.variables:
            return func(*args, **(kwargs or {}))
        swap = self.swap
        return func(*mapped(swap, args), **mapped(swap, kwargs or {}))

    @property
    def swap(self) -> Callable[[Any], Any]:
        """What stands in the place of ``x``, or ``x``."""
        return self._swap if functorch_level() == self.level and not self.variables else self._swap_wrapped

    def run(self, call: Callable[..., Any], *a: Any) -> Any:
        """``call(*a)`` with the replacements, also where it returns a captured tensor as it is."""
        with self:
            return mapped(self._swap_wrapped, call(*a))

    def _ask(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        x = args[0]
        other = self._swap_wrapped(x)
        if not other.requires_grad:
            # else there is nothing to do, and a transform would refuse it
            func(other, *args[1:], **kwargs)
        if other is not x:
            self.variables[id(x)] = (x, other)
        return x

    def _swap(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        pair = self.table.get(id(x))
        return x if pair is None else pair[1]

    def _swap_wrapped(self, x: Any) -> Any:
        """As `_swap`, while a transform of ``fun`` runs, or after one has left its pullback."""
        if not isinstance(x, Tensor):
            return x
        wrappers: list[Tensor] = []
        for layer in _layers(x, self.level):
            pair = self.variables.get(id(layer)) or self.table.get(id(layer))
            if pair is not None:
                return _wrapped_like(pair[1], wrappers)
            wrappers.append(layer)
        return x


def stood_in_for() -> set[int]:
    """Identities of the tensors that operators are given others for, by solves around this place."""
    return {key for mode in _substitutes() for key in mode.table}


def _substitutes() -> list[Substitute]:
    """Those that are at work, from the innermost on."""
    return [mode for mode in reversed(internals.current_function_modes()) if isinstance(mode, Substitute)]


def _given_to_custom(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a custom function (`torch.autograd.Function`) is to be given: outside of transforms PyTorch shows it to no mode."""
    for mode in reversed(internals.current_function_modes()):
        if isinstance(mode, Substitute):
            args = tuple(map(mode.swap, args))
        elif isinstance(mode, _Watch):
            mode.given(args)
    return args


internals.ask_before_custom_functions(_given_to_custom)


def stand_ins(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, or what stands in their places where ``fun`` of another solve runs, which a node within it is to be given: it sees what
    it captured itself, and a node is no operator that would be given the others."""
    if not _substitutes():
        return tuple(tensors)
    return tuple(x.view_as(x) for x in tensors)


def depends_on_others(x: Tensor, only: Sequence[Tensor] | None = None) -> bool:
    """Whether ``x``, computed from constants, has a graph nevertheless, at the level of any transform; ``only``: one that leads there."""
    return any(layer.requires_grad and (only is None or leads_to(layer, only)) for layer in _layers(x, 0))
