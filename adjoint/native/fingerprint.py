"""What a function of Python depends on: its code, and all that this reads from outside, found without running or tracing it.

Two functions with one fingerprint are one graph to a tracer, but for the values of tensors. Only code is taken whose dependences can be
read off: of functions, tensors, plain numbers, texts and containers of them, objects of classes of Python, and modules of PyTorch. Whatever
else there is (something written to, a name looked up by its text, what other libraries do) has no fingerprint, and tracers are to be asked.
"""

from __future__ import annotations

import builtins
import cmath
import dis
import functools
import math
import sys
from abc import ABC, ABCMeta
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Generic, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Fingerprint", "fingerprint"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BUILTINS = _words(
    "abs all any bool complex dict divmod enumerate filter float frozenset int isinstance len list map max min next pow range "
    "reversed round slice sorted str sum super tuple zip True False None Ellipsis NotImplemented ValueError AssertionError"
)
#: names that look at what no fingerprint holds, or that change something; of functions, methods and attributes alike
_REFUSED = _words(
    "print input open exec eval compile globals locals vars setattr delattr getattr hasattr id hash iter __dict__ __class__ "
    "__getattribute__ __closure__ __globals__ __code__ __defaults__ __kwdefaults__ __wrapped__ __func__ __self__ format format_map "
    "requires_grad requires_grad_ is_leaf grad grad_fn retain_grad register_hook data data_ptr item tolist numpy storage "
    "untyped_storage _version stride is_contiguous storage_offset random rand randn randint rand_like randn_like randperm bernoulli "
    "multinomial normal poisson manual_seed get_rng_state set_rng_state is_grad_enabled get_default_dtype set_default_dtype "
    "is_inference_mode_enabled time perf_counter environ compiler cuda backends _C ops library autograd func vmap autocast amp"
)
#: methods that change a container
_CHANGING = _words("append extend insert pop popitem update setdefault remove clear sort reverse discard __setitem__")
_WRITING = _words(
    "STORE_ATTR DELETE_ATTR STORE_GLOBAL DELETE_GLOBAL STORE_NAME LOAD_NAME LOAD_CLASSDEREF LOAD_BUILD_CLASS IMPORT_NAME IMPORT_FROM "
    "MATCH_CLASS"
)
#: what classes have that is not called by an expression
_QUIET = _words(
    "__init__ __new__ __match_args__ __slots__ __abstractmethods__ "
    "__repr__ __str__ __module__ __doc__ __qualname__ __annotations__ __init_subclass__ __dict__ __weakref__ "
    "__firstlineno__ __static_attributes__ __parameters__ __orig_bases__ __constants__ __annotate__ __annotations_cache__"
)
_MODULES = (torch, torch.special, torch.linalg, torch.fft, nn, nn.functional, math, cmath)
_TENSORS = frozenset((Tensor, nn.Parameter))
_OWNERS = ("builtins", "math", "cmath", "torch", "torch._C._nn", "torch._C._special", "torch._C._linalg", "")
_LIBRARIES = frozenset(("torch", "numpy", "scipy", "jax", "pandas", *sys.stdlib_module_names)) - {"__main__"}
#: classes that bring nothing of their own
_BASES = (nn.Module, object, tuple, ABC, Generic, Protocol)
_DESCRIBED = type(Tensor.add)
_PLAIN = frozenset((bool, int, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size))
#: how much is looked at before a tracer is as fast, and how much code is remembered
_MOST, _MOST_KNOWN = 2000, 4096
#: bytes of an array that is compared
_SMALL = 4096
_OWN_OF_MODULES = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules"}


def _is_foreign(name: str) -> bool:
    """Whether a module of Python is of a library, or of Python itself, whose code is not looked at."""
    return name.split(".")[0] in _LIBRARIES


def _is_named_tuple(owner: Any) -> bool:
    """Whether names of an owner are those of a named tuple's parts, which count as such."""
    return isinstance(owner, type) and issubclass(owner, tuple) and "_fields" in owner.__dict__


def _is_own_of_torch(f: FunctionType) -> bool:
    """Whether a function of a module of PyTorch's is the one that this has under its name, and no wrapper that was made around one of the
    user's."""
    return getattr(sys.modules.get(f.__globals__["__name__"]), f.__name__, None) is f


def _is_written_for(kind: type, name: str) -> bool:
    """Whether Python has written a method of a dataclass or a named tuple."""
    x = kind.__dict__[name]
    code = getattr(getattr(x, "__func__", x), "__code__", None)
    generated = "__dataclass_params__" in kind.__dict__ or _is_named_tuple(kind)
    return generated and (code is None or code.co_filename.startswith("<") or _is_foreign(getattr(x, "__module__", None) or "torch"))


class _Unknown(Exception):
    """There is no fingerprint."""


@dataclass(frozen=True, eq=False)
class _Facts:
    """Of a code object with those inside of it: names of globals, of attributes, and whether it writes into containers."""

    code: CodeType
    globals: tuple[str, ...]
    attributes: frozenset[str]
    changing: bool


@dataclass(frozen=True)
class Fingerprint:
    """``key``: equal for functions that are one graph; ``tensors``: those that it reads, in the order of being found; ``traceable``: all
    that it does, it does by operators of PyTorch's."""

    key: Hashable
    tensors: tuple[Tensor, ...]
    traceable: bool


def _inside(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _inside(x)


#: by the id of the code, which is kept here so that the id is no other's
_known: dict[int, tuple[CodeType, _Facts | None]] = {}


def _facts_of(code: CodeType) -> _Facts:
    """Raises `_Unknown`."""
    found = _known.get(id(code))
    if found is None:
        if len(_known) > _MOST_KNOWN:
            _known.clear()
        found = _known[id(code)] = code, _read(code)
    if found[1] is None:
        raise _Unknown
    return found[1]


def _read(code: CodeType) -> _Facts | None:
    names: dict[str, None] = {}
    attributes: set[str] = set()
    changing, free = False, set(code.co_freevars)
    for part in _inside(code):
        for step in dis.get_instructions(part):
            name = step.opname
            if name in _WRITING or (name in ("STORE_DEREF", "DELETE_DEREF") and step.argval in free):
                return None
            if name == "LOAD_GLOBAL":
                names[step.argval] = None
            elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attributes.add(step.argval)
            elif name in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
                changing = True
    if _REFUSED & (attributes | set(names)):
        return None
    return _Facts(code, tuple(names), frozenset(attributes), changing or bool(_CHANGING & attributes))


#: by class, and whether it is called: its bases with how many names they had, those of the user, and names that count anyway
_classes: WeakKeyDictionary[type, dict[bool, tuple[Hashable, list[Any], frozenset[str]]]] = WeakKeyDictionary()


def _class_of(kind: type, called: bool) -> tuple[list[Any], frozenset[str]]:
    """The classes of the user that a class is made of, and names that count whether they are named or not. Raises `_Unknown`."""
    bases = kind.__mro__, sum([len(c.__dict__) for c in kind.__mro__])
    known = _classes.get(kind, {}).get(called)
    if known is None or known[0] != bases:
        mine = [c for c in kind.__mro__ if c not in _BASES]
        if type(kind) not in (type, ABCMeta) or not mine or any(_is_foreign(c.__module__) for c in mine):
            raise _Unknown
        looked_up = {"__getattr__", "__getattribute__"} | ({"__slots__"} if not issubclass(kind, tuple) else set())
        if any(not looked_up.isdisjoint(c.__dict__) for c in mine):
            raise _Unknown
        quiet = _QUIET - {"__init__", "__new__"} if called else _QUIET
        special = {name for c in mine for name in c.__dict__ if name.startswith("__") and not _is_written_for(c, name)} - quiet
        known = _classes.setdefault(kind, {})[called] = bases, mine, frozenset(special)
    return known[1:]


class _Walk:
    """One look at a function."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.seen: dict[int, int] = {}
        self.attributes: set[str] = set()
        self.kept: list[Any] = []
        #: objects, classes and modules of Python, whose parts count by name, with names that count anyway
        self.owners: list[tuple[list[Any], frozenset[str]]] = []
        self.changing = self.containers = False
        self.traceable = True
        self.left = _MOST

    def value(self, x: Any) -> Hashable:
        kind = type(x)
        if kind is Tensor:
            return self.tensor(x)
        if kind in _PLAIN:
            return kind, x
        if kind is float or kind is complex:
            return kind, repr(x)
        if kind is slice:
            return kind, *map(self.value, (x.start, x.stop, x.step))
        if isinstance(x, Tensor):
            return self.tensor(x)
        self.left -= 1
        if self.left < 0:
            raise _Unknown
        # a circle, or met before; kept, so that its id is no other's
        if id(x) in self.seen:
            return "again", self.seen[id(x)]
        self.seen[id(x)] = len(self.seen)
        self.kept.append(x)
        if kind is FunctionType:
            return self.function(x)
        if kind is tuple or kind is list:
            self.containers |= kind is list
            return kind, *map(self.value, x)
        if kind is dict:
            self.containers = True
            return kind, *((self.value(k), self.value(v)) for k, v in x.items())
        if kind is MethodType:
            return "method", self.value(x.__self__), self.value(x.__func__)
        if kind is functools.partial:
            self.named(x)
            return "partial", self.value(x.func), self.value(x.args), self.value(x.keywords)
        if isinstance(x, nn.Module):
            return self.module(x)
        return self.thing(x, kind)

    def named(self, x: Any) -> None:
        """What an object holds counts as far as code names it."""
        if x.__dict__:
            self.owners.append(([x], frozenset()))

    def thing(self, x: Any, kind: type) -> Hashable:
        """What is neither a container nor a function of Python."""
        if isinstance(x, ModuleType):
            if x in _MODULES or x.__name__ == "numpy":
                self.traceable &= x in _MODULES
            elif _is_foreign(x.__name__) or "__getattr__" in x.__dict__:
                raise _Unknown
            else:
                self.owners.append(([x], frozenset()))
            return "module", x
        if isinstance(x, (BuiltinFunctionType, _DESCRIBED)):
            if (getattr(x, "__module__", None) or "") in _OWNERS and self.known(x):
                return "builtin", x
            raise _Unknown
        if isinstance(x, np.generic):
            return kind, repr(x.item())
        if kind is np.ndarray and x.nbytes <= _SMALL and not x.dtype.hasobject:
            return kind, x.dtype.str, x.shape, x.tobytes()
        if isinstance(x, Enum):
            self.owners.append(([x, *(c for c in kind.__mro__ if not _is_foreign(c.__module__))], frozenset()))
            return kind, x.name, self.value(x._value_)
        if isinstance(x, type):
            if x in (Tensor, int, float, tuple, list, dict, nn.Module):
                return "class", x
            return "class", x, self.class_of(x, True)
        mine = kind if kind is SimpleNamespace else self.class_of(kind, False)
        if isinstance(x, tuple):
            return mine, *map(self.value, tuple(x))
        if type(getattr(x, "__dict__", None)) is not dict or isinstance(x, (list, dict, set, frozenset, str, bytes, int, float, complex)):
            raise _Unknown
        self.named(x)
        return mine

    def class_of(self, kind: type, called: bool) -> Hashable:
        """A class of the user, which may be ``called``: its methods count as far as they are named."""
        self.owners.append(_class_of(kind, called))
        return kind, kind.__mro__

    @staticmethod
    def known(x: Any) -> bool:
        """Whether a function written in C is one of PyTorch's or Python's own, which keeps nothing."""
        name = getattr(x, "__name__", "")
        return name not in _REFUSED and any(getattr(m, name, None) is x for m in (torch, nn.functional, math, cmath, builtins))

    def tensor(self, x: Tensor) -> Hashable:
        if type(x) not in _TENSORS or not x.is_cpu or x.is_inference() or x.layout is not torch.strided:
            raise _Unknown
        if id(x) in self.seen:
            return "again", self.seen[id(x)]
        self.seen[id(x)] = len(self.seen)
        self.tensors.append(x)
        self.named(x)
        return "tensor", x.shape, x.dtype, x.requires_grad

    def function(self, f: FunctionType) -> Hashable:
        if f.__globals__.get("__name__", "").split(".")[0] == "torch":
            if _is_own_of_torch(f):
                return "torch", f
            raise _Unknown
        facts = _facts_of(f.__code__)
        self.named(f)
        self.attributes |= facts.attributes
        self.changing |= facts.changing
        space, read = f.__globals__, []
        for name in facts.globals:
            if name in space:
                read.append(self.value(space[name]))
            elif name in _BUILTINS:
                read.append(None)
            else:
                raise _Unknown
        try:
            held = tuple([self.held(*x) for x in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)])
        except ValueError:  # a cell that is empty yet
            raise _Unknown from None
        defaults = (self.value(f.__defaults__), self.value(f.__kwdefaults__)) if f.__defaults__ or f.__kwdefaults__ else None
        return facts, tuple(read), held, defaults

    def held(self, name: str, cell: CellType) -> Hashable:
        x = cell.cell_contents
        if name == "__class__" and isinstance(x, type) and issubclass(x, nn.Module):
            # for super(), which goes to a class that is looked at with its object
            return "class", x
        return self.value(x)

    def module(self, m: nn.Module) -> Hashable:
        kind, own = type(m), m.__dict__
        if any(own[name] for name in _OWN_OF_MODULES if name in own and isinstance(own[name], dict)) or "forward" in own:
            raise _Unknown  # hooks
        parts: list[Hashable] = [kind, own["training"]]
        for table in ("_parameters", "_buffers", "_modules"):
            parts += [(name, self.value(x)) for name, x in own[table].items()]
        home = kind.__module__
        theirs = home.startswith("torch.nn.modules.") and getattr(sys.modules.get(home), kind.__name__, None) is kind
        for name, x in own.items():
            if name not in _OWN_OF_MODULES and name not in ("training", "_parameters", "_buffers", "_modules"):
                parts.append((name, self.value(x)))
        if not theirs:
            parts.append(self.class_of(kind, False))
            self.owners.append(([c for c in kind.__mro__ if c not in _BASES], frozenset(("forward",))))
        return "nn", *parts

    def methods(self) -> Hashable:
        """What objects, classes, and modules of Python have, as far as code names it: what that names counts too."""
        found: list[Hashable] = []
        done: dict[int, set[str]] = {}
        old, count = frozenset[str](), 0
        # names and owners grow while this goes on
        while len(old) < len(self.attributes) or count < len(self.owners):
            names = frozenset(self.attributes)
            fresh, known, count = names - old, count, len(self.owners)
            old = names
            for k, (mine, extra) in enumerate(self.owners[:count]):
                wanted = fresh if k < known else names | extra
                if not wanted:
                    continue
                for j, owner in enumerate(mine):
                    space = owner.__dict__
                    todo = wanted & space.keys()
                    if not todo:
                        continue
                    before = done.setdefault(id(owner), set())
                    todo -= before
                    before |= todo
                    for name in sorted(todo - set(owner._fields) if _is_named_tuple(owner) else todo):
                        x = space[name]
                        x = x.fget if isinstance(x, property) else x.__func__ if isinstance(x, (staticmethod, classmethod)) else x
                        found.append((k, j, name, self.value(x)))
        return tuple(found)


def fingerprint(fun: Any, values: Any = ()) -> Fingerprint | None:
    """That of a function, or of several, and of ``values`` that they are called with; None where there is none."""
    # a debugger, which traces, wants to see what runs
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks or sys.gettrace() is not None:
        return None
    walk = _Walk()
    try:
        key = walk.value(fun), walk.value(values)
        key = (*key, walk.methods()) if walk.owners else key
    except _Unknown:
        return None
    if walk.changing and walk.containers:
        return None
    return Fingerprint((key, torch.get_default_dtype()), tuple(walk.tensors), walk.traceable)
