"""A user's function made flat: state pytrees become ``(B, n)`` tensors, arguments and captured tensors become a list of inputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce, wraps
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from ..errors import InvalidInput, UnsupportedCombination
from .capture import Substitute
from .inner_derivatives import beneath, differentiating
from .normalizing import composing
from .origins import Home
from .ownership import lending
from .split import SplitFunction

__all__ = ["Flat", "StateSpec", "System", "VmappedSystem"]

#: a flat function of time () or (B,) and state (B, n)
Flat = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StateSpec:
    """How a state pytree maps to a ``(B, n)`` tensor (``B = 1`` for an unbatched problem).

    Leaves of different dtypes are carried in their common dtype and handed to ``fun`` in their own. With ``split`` the flat state is real:
    of complex leaves it holds real and imaginary parts, side by side for every entry (see `in_parts`).
    """

    tree: TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    paths: tuple[str, ...]
    batch: int | None
    dtype: torch.dtype
    device: torch.device
    split: bool = False

    @classmethod
    def of(cls, state: Any, batched: bool, what: str = "y0") -> StateSpec:
        """Read the layout of a state; raises `InvalidInput` for what cannot be a state."""
        keyed, tree = tree_flatten_with_path(state)
        leaves, paths = [leaf for _, leaf in keyed], tuple(keystr(path) for path, _ in keyed)
        if not leaves:
            raise InvalidInput(f"{what} holds no tensor")
        for leaf, path in zip(leaves, paths, strict=True):
            if not isinstance(leaf, Tensor):
                raise InvalidInput(f"{what}{path} is a {type(leaf).__name__}; a state is a tensor or a pytree of tensors")
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise InvalidInput(f"{what}{path} has dtype {leaf.dtype}; a state is floating or complex (try .float() or .double())")
            if leaf.is_nested:
                raise InvalidInput(f"{what}{path} is a nested tensor; a state is dense: give a tuple of its parts, or pad them")
            if leaf.layout is not torch.strided:
                raise InvalidInput(f"{what}{path} is sparse ({leaf.layout}); a state is dense (try .to_dense())")
            if leaf.is_meta:
                raise InvalidInput(f"{what}{path} is on the meta device, and has no values")
            if batched and leaf.dim() == 0:
                raise InvalidInput(f"{what}{path} is 0-d, but batched=True needs a leading batch dimension on every leaf")
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            raise InvalidInput(f"the leaves of {what} lie on several devices: {sorted(map(str, devices))}")
        batches = {leaf.shape[0] for leaf in leaves} if batched else set()
        if len(batches) > 1:
            raise InvalidInput(f"with batched=True the leaves of {what} must share their leading dimension, found {sorted(batches)}")
        return cls(
            tree=tree,
            shapes=tuple(leaf.shape for leaf in leaves),
            dtypes=tuple(leaf.dtype for leaf in leaves),
            paths=paths,
            batch=batches.pop() if batched else None,
            dtype=reduce(torch.promote_types, (leaf.dtype for leaf in leaves)),
            device=leaves[0].device,
        )

    @property
    def holds_complex(self) -> bool:
        """Whether some leaf is complex, however the flat state carries it."""
        return any(d.is_complex for d in self.dtypes)

    def in_parts(self) -> StateSpec:
        """The same state carried in real and imaginary parts: a Jacobian then is one of real numbers, which every function has that
        autograd can follow. That of complex numbers exists only where the function is complex-differentiable (no ``conj``, no ``abs``).
        """
        return replace(self, split=True, dtype=reduce(torch.promote_types, (d.to_real() for d in self.dtypes)))

    def _width(self, dtype: torch.dtype) -> int:
        return 2 if self.split and dtype.is_complex else 1

    @property
    def rows(self) -> int:
        """Number of trajectories, 1 for an unbatched problem."""
        return 1 if self.batch is None else self.batch

    @property
    def real_dtype(self) -> torch.dtype:
        """Dtype of times as ``fun`` sees them, and of error norms."""
        return self.dtype.to_real()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of every leaf in a row of the flat state."""
        skip = 0 if self.batch is None else 1
        return tuple(prod(shape[skip:]) * self._width(dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def flatten(self, state: Any) -> Tensor:
        """State pytree to ``(B, n)``, of one tensor a view; the structure is taken to be right."""
        leaves = tree_flatten(state)[0]
        if self.split:
            # not `torch.view_as_real`: the way back of that wants strides which a batched one does not give
            leaves = [torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf for leaf in leaves]
        if len(leaves) == 1:
            return leaves[0].reshape(self.rows, self.sizes[0])
        return torch.cat([leaf.to(self.dtype).reshape(self.rows, size) for leaf, size in zip(leaves, self.sizes, strict=True)], dim=1)

    def taken(self, state: Any) -> Tensor:
        """As `flatten`, in memory of its own: what a solve starts from stays as it is, whatever ``fun`` does to its argument."""
        flat = self.flatten(state)
        return flat.clone() if len(self.shapes) == 1 else flat

    def spread(self, leaves: Sequence[Tensor]) -> Tensor:
        """One real number for every entry of the leaves (a tolerance, a flag) to ``(B, n)``; both parts of a complex entry get it."""
        flat = [
            leaf.reshape(self.rows, -1).repeat_interleave(self._width(dtype), 1) for leaf, dtype in zip(leaves, self.dtypes, strict=True)
        ]
        return torch.cat(flat, 1)

    def unflatten(self, flat: Tensor) -> Any:
        """``(*lead, B, n)`` to a pytree of ``(*lead, *leaf.shape)``."""
        lead = flat.shape[:-2]
        if self.split:
            parts = flat.split(self.sizes, dim=-1)
            return tree_unflatten([_joined(p, d, lead + s) for p, d, s in zip(parts, self.dtypes, self.shapes, strict=True)], self.tree)
        if len(self.shapes) == 1:
            return tree_unflatten([flat.reshape(lead + self.shapes[0])], self.tree)
        pieces = flat.split(self.sizes, dim=-1)
        leaves = [_cast(piece, dtype).reshape(lead + shape) for piece, dtype, shape in zip(pieces, self.dtypes, self.shapes, strict=True)]
        return tree_unflatten(leaves, self.tree)

    def component(self, index: int, name: str = "y") -> str:
        """Name of one entry of a row of the flat state, for messages."""
        skip = 0 if self.batch is None else 1
        for path, shape, size, dtype in zip(self.paths, self.shapes, self.sizes, self.dtypes, strict=True):
            if index < size:
                if self._width(dtype) == 2:
                    name, index = f"the {'imaginary' if index % 2 else 'real'} part of {name}", index // 2
                inner = shape[skip:]
                if not inner:
                    return f"{name}{path}"
                place = [int(i) for i in torch.unravel_index(torch.tensor(index, device="cpu"), inner)]
                return f"{name}{path}[{', '.join(map(str, place))}]"
            index -= size
        return name

    def matched(self, value: Any) -> Any:
        """``value`` with its dicts in the order that those of the state have; as it is where the keys are others."""
        return value if tree_flatten(value)[1] == self.tree else in_order(self._places(), value)

    def keyed(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """``fun`` with its results in the order of the state: itself where no part of the state is known by a key."""
        if not _holds_dict(self._places()):
            return fun
        if isinstance(fun, SplitFunction):
            return SplitFunction(self.keyed(fun.explicit), self.keyed(fun.implicit))
        return wraps(fun, updated=())(lambda *args: self.matched(fun(*args)))

    def _places(self) -> Any:
        """The numbers of the leaves in the structure of the state."""
        return tree_unflatten(list(range(len(self.shapes))), self.tree)

    def check(self, value: Any, what: str, like: str = "the state") -> Any:
        """``value`` in the order of the state (see `matched`); raises `InvalidInput` unless it has the structure, shapes, dtypes and
        device of the state."""
        leaves, tree = tree_flatten(value)
        if tree != self.tree:
            value = in_order(self._places(), value)
            leaves, tree = tree_flatten(value)
        if tree != self.tree:
            raise InvalidInput(f"{what} has the structure {tree}, but {like} has {self.tree}")
        for leaf, shape, dtype, path in zip(leaves, self.shapes, self.dtypes, self.paths, strict=True):
            if not isinstance(leaf, Tensor):
                raise InvalidInput(f"{what}{path} is a {type(leaf).__name__}, expected a tensor of shape {tuple(shape)}")
            if leaf.shape != shape:
                raise InvalidInput(f"{what}{path} has shape {tuple(leaf.shape)}, but {like} has {tuple(shape)}")
            if leaf.layout is not torch.strided:
                raise InvalidInput(f"{what}{path} is sparse ({leaf.layout}), but {like} is dense; return .to_dense()")
            if leaf.device != self.device:
                raise InvalidInput(f"{what}{path} is on {leaf.device}, but {like} is on {self.device}")
            if leaf.dtype != dtype:
                raise InvalidInput(
                    f"{what}{path} has dtype {leaf.dtype}, but {like} has {dtype}; convert one of them (a float64 parameter in a "
                    "float32 model is the usual cause)"
                )
        return value


def _holds_dict(places: Any) -> bool:
    if isinstance(places, dict):
        return len(places) > 1 or any(map(_holds_dict, places.values()))
    return isinstance(places, (list, tuple)) and any(map(_holds_dict, places))


def in_order(like: Any, value: Any) -> Any:
    """``value``, whose dicts have the keys in the order of those of ``like`` where they have the same ones."""
    if type(value) is not type(like):
        return value
    if isinstance(like, dict) and type(like) in (dict, OrderedDict) and like.keys() == value.keys():
        return type(like)((key, in_order(part, value[key])) for key, part in like.items())
    if isinstance(like, (list, tuple)) and len(like) == len(value):
        parts = [in_order(a, b) for a, b in zip(like, value, strict=True)]
        return type(like)(*parts) if isinstance(like, tuple) and type(like) is not tuple else type(like)(parts)
    return value


def _joined(x: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A leaf from its part of the flat state, which holds real and imaginary parts side by side."""
    if not dtype.is_complex:
        return x.to(dtype).reshape(tuple(shape))
    pairs = x.to(dtype.to_real()).reshape((*shape, 2))
    return torch.complex(pairs[..., 0], pairs[..., 1])


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_complex() and not dtype.is_complex:
        x = x.real
    return x.to(dtype)


@dataclass(frozen=True)
class System:
    """A user's right-hand side with its layout, and the places where the node's tensor inputs go.

    ``inputs`` of `bind` are the tensor leaves of ``args`` in order, then the captured tensors.
    """

    fun: Callable[..., Any]
    spec: StateSpec
    args_tree: TreeSpec
    args_leaves: tuple[Any, ...] = ()
    captured: tuple[Tensor, ...] = field(default=())
    #: names of the captured tensors, where ``fun`` is a module and they are its parameters
    parameter_names: tuple[str, ...] | None = None
    #: where captured parameters were found; see `parameter_homes`
    homes: tuple[Home | None, ...] = ()
    #: layout of what ``fun`` returns, where it is not that of the state
    returns: StateSpec | None = None
    #: for implicit equations ``fun(t, y, y', *args) = 0``: the layout of the residual. The flat function then takes ``y`` and ``y'`` side
    #: by side, ``(B, 2 n)``
    residual: StateSpec | None = None
    #: for ``M y' = fun(t, y, *args)`` by methods that know of ``M``: its place among the inputs
    mass: int | None = None
    #: whether ``fun`` uses transforms of its own, and `torch.autograd.grad`; see `Captured`
    transforms: bool = False
    inner_grad: bool = False
    #: whether it uses normalizations whose second derivatives are wrong; see `composing`
    normalizes: bool = False
    #: whether it calls what hides its operators
    unseen: bool = False
    #: whether it asks which tensors require grad, and gives other derivatives where it is mapped
    asks: bool = False
    #: whether hooks or custom functions see what comes back through it
    alters: bool = False

    @property
    def rows(self) -> int:
        return self.spec.rows

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors on which the right-hand side depends, beside time and state."""
        return (*(x for x in self.args_leaves if isinstance(x, Tensor)), *self.captured)

    @property
    def parts(self) -> tuple[System, System]:
        """The explicit and the implicit part of a `SplitFunction`, with the same inputs."""
        assert isinstance(self.fun, SplitFunction)
        return replace(self, fun=self.fun.explicit), replace(self, fun=self.fun.implicit)

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The user's ``args`` with other tensors in their places."""
        stream = iter(inputs)
        leaves = [next(stream) if isinstance(x, Tensor) else x for x in self.args_leaves]
        return tree_unflatten(leaves, self.args_tree)

    def mass_matrix(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """``M``, ``(1 or B, n, n)``, or None where the derivatives stand alone; states that it does not know of (integrals) do."""
        if self.mass is None:
            return None
        given, n = inputs[self.mass], sum(self.spec.sizes)
        given = given if given.dim() == 3 else given.unsqueeze(0)
        more = n - given.shape[-1]
        if not more:
            return given
        ones = torch.ones(n, dtype=given.dtype, device=given.device)
        ones[: n - more] = 0.0
        return torch.nn.functional.pad(given, (0, more, 0, more)) + torch.diag(ones)

    def substituted(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """A function of the user with the given tensors in the place of captured ones; itself where they are the same already."""
        given = self._given(inputs)
        call = composing(function) if self.normalizes else function
        call = differentiating(call, (*self.captured, *inputs)) if self.inner_grad else call
        if all(x is c for x, c in zip(given, self.captured, strict=True)) and self._at_home(given):
            return call
        self._refuse_unseen()
        mode = Substitute(self.captured, given, self.homes)

        def with_others(*a: Any) -> Any:
            return mode.run(call, *a)

        return beneath(with_others, self.captured) if self.transforms else with_others

    def _refuse_unseen(self) -> None:
        """Raise where other tensors cannot be put in: operators of TorchScript are not seen from outside."""
        if self.unseen:
            raise UnsupportedCombination(
                "fun is TorchScript or an extension that hides its operators, or calls some: nothing can be put in the place of tensors "
                "that it captured, which roots, derivatives of derivatives, ForwardSensitivity, torch.func transforms and hooks on these "
                "tensors ask for. Give the module itself, not torch.jit.script or trace of it (compile=True makes native code), an "
                "extension by a torch.autograd.Function (with PyTorch 2.14 its apply taken after adjoint was imported), or take first "
                "derivatives by DiscreteAdjoint()"
            )

    def _at_home(self, given: Sequence[Tensor]) -> bool:
        """Whether the modules hold these very parameters now."""
        return all(h is None or h[0]._parameters.get(h[1]) is x for h, x in zip(self.homes, given, strict=False))

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function ``f(t, y)`` for given inputs."""
        if self.parameter_names and not self.inner_grad:
            given = self._given(inputs)
            if any(x is not c for x, c in zip(given, self.captured, strict=True)) or not self._at_home(given):
                assert isinstance(self.fun, torch.nn.Module)
                self._refuse_unseen()
                module, parameters = self.fun, dict(zip(self.parameter_names, given, strict=True))
                call = lambda *a: torch.func.functional_call(module, parameters, a)  # noqa: E731
                return self._flat(composing(call) if self.normalizes else call, inputs)
        return self._flat(self.substituted(self.fun, inputs), inputs)

    def _given(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return inputs[len(inputs) - len(self.captured) :] if self.captured else ()

    def _flat(self, call: Callable[..., Any], inputs: Sequence[Tensor]) -> Flat:
        spec, args = self.spec, self.arguments(inputs)
        if self.residual is not None:
            return self._implicit(call, args, self.residual)
        if self.returns is not None:
            return self._reshaping(call, args, self.returns)

        single = len(spec.shapes) == 1 and spec.tree.is_leaf() and not spec.split
        one = spec.batch is None
        if single:
            shape, dtype = spec.shapes[0], spec.dtype

            def f(t: Tensor, y: Tensor) -> Tensor:
                natural = y.shape == shape
                out = call(t.reshape(()) if one and t.dim() else t, y if natural else y.reshape(shape), *args)
                if not isinstance(out, Tensor) or out.shape != shape or out.dtype != dtype or out.device != y.device:
                    spec.check(out, "what fun returned")
                return out if natural else out.reshape(y.shape)

        else:

            def f(t: Tensor, y: Tensor) -> Tensor:
                out = call(t.reshape(()) if one and t.dim() else t, spec.unflatten(y), *args)
                return spec.flatten(spec.check(out, "what fun returned"))

        return lending(f)

    def _reshaping(self, call: Callable[..., Any], args: tuple[Any, ...], returns: StateSpec) -> Flat:
        """The flat function where rows of the result have another length than rows of the state."""
        spec = self.spec

        def f(t: Tensor, y: Tensor) -> Tensor:
            out = call(t if spec.batch is not None or t.dim() == 0 else t.reshape(()), spec.unflatten(y), *args)
            return returns.flatten(returns.check(out, "what fun returned", "its first result"))

        return lending(f)

    def _implicit(self, call: Callable[..., Any], args: tuple[Any, ...], residual: StateSpec) -> Flat:
        """The flat residual on ``(B, 2 n)``."""
        spec, n = self.spec, sum(self.spec.sizes)

        def f(t: Tensor, pair: Tensor) -> Tensor:
            time = t if spec.batch is not None or t.dim() == 0 else t.reshape(())
            out = call(time, spec.unflatten(pair[..., :n]), spec.unflatten(pair[..., n:]), *args)
            return residual.flatten(residual.check(out, "what fun returned", "its first result"))

        return lending(f)

    @property
    def natural_shape(self) -> torch.Size | None:
        """Shape in which an unbatched one-tensor state may be carried, so that ``fun`` needs no reshaping; None for all others."""
        if self.residual is not None:
            return None
        plain = self.spec.batch is None and len(self.spec.shapes) == 1 and self.spec.tree.is_leaf() and not self.spec.split
        return self.spec.shapes[0] if plain else None


@dataclass(frozen=True)
class VmappedSystem:
    """A system under ``torch.vmap``: ``size`` copies of the base, whose rows become ``size * base.rows`` trajectories."""

    base: System | VmappedSystem
    size: int
    in_dims: tuple[int | None, ...]

    @property
    def rows(self) -> int:
        return self.size * self.base.rows

    @property
    def spec(self) -> StateSpec:
        return self.base.spec

    @property
    def residual(self) -> StateSpec | None:
        """See `System`."""
        return self.base.residual

    @property
    def mass(self) -> int | None:
        """See `System`."""
        return self.base.mass

    @property
    def asks(self) -> bool:
        """See `System`."""
        return self.base.asks

    @property
    def alters(self) -> bool:
        """See `System`."""
        return self.base.alters

    def mass_matrix(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """See `System`: that of every trajectory."""
        if self.mass is None:
            return None
        rows, call = self.base.rows, lambda _, *xs: cast(Tensor, self.base.mass_matrix(xs))
        every = torch.vmap(call, in_dims=(0, *self.in_dims))(torch.empty(self.size), *inputs)
        return every.expand(-1, rows, -1, -1).flatten(0, 1)

    @property
    def parts(self) -> tuple[VmappedSystem, VmappedSystem]:
        """See `System`."""
        explicit, implicit = self.base.parts
        return replace(self, base=explicit), replace(self, base=implicit)

    @property
    def natural_shape(self) -> None:
        """Copies are always carried flat."""
        return None

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function ``f(t, y)`` on ``(size * rows,)`` times and ``(size * rows, n)`` states."""
        return self.mapped(self.base.bind, inputs)

    def mapped(self, bind: Callable[[Sequence[Tensor]], Flat], inputs: Sequence[Tensor]) -> Flat:
        """As `bind`, of any function that the inputs of one copy give: ``bind(inputs)(t, y)`` with times and states of one copy."""
        rows, size, inputs = self.base.rows, self.size, tuple(inputs)

        def call(t: Tensor, y: Tensor, *xs: Tensor) -> Tensor:
            return bind(xs)(t, y)

        mapped = torch.vmap(call, in_dims=(0, 0, *self.in_dims), randomness="different")

        def f(t: Tensor, y: Tensor) -> Tensor:
            out = mapped(t.reshape(size, rows), y.reshape(size, rows, -1), *inputs)
            return out.flatten(0, 1)

        # within the map the tensors that hold the memory are out of sight
        return lending(f)
