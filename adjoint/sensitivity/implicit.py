"""Derivatives of roots by the implicit function theorem, to any order, from one factorisation (docs/theory.md, section 3).

Two nodes call each other: the root ``x`` of ``r(x, inputs) = 0``, and the solution of linear systems with ``A = r_x(x, inputs)`` or its
adjoint. The derivative of each is another linear system with the same matrix, so every order uses the factors that `FactorStore` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..linalg import Factorization, LinearSolver, Log, Matrix
from ..nonlinear import RootRecord
from ..system.capture import alive, below_jvp
from ..system.jacobians import JacobianStrategy
from ..system.ownership import continuing, owned
from ..system.system import Flat, StateSpec, System, VmappedSystem
from ..system.transforms import anywhere, differentiated_again, functorch_active, naming_writes
from ..torch_internals import Node, copy_by_copy, get_unwrapped, is_functorch_wrapped_tensor
from .fingerprint import RootWitness
from .products import exchanged, look_again, smooth_places, tangent, vjp
from .replacements import replacements

__all__ = [
    "Conditions",
    "Examiner",
    "FactorStore",
    "FixedRule",
    "JacobianRule",
    "RootNode",
    "RootOutputs",
    "RootTask",
    "SystemConditions",
    "known_root",
    "linear",
    "timeless",
]


class Conditions(Protocol):
    """What is zero at the solution: a `System` (whose time is not used) or one derived from it."""

    @property
    def rows(self) -> int:
        """Number of independent systems."""
        ...

    @property
    def spec(self) -> StateSpec:
        """The layout of the state."""
        ...

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function for given inputs."""
        ...


@dataclass(frozen=True)
class SystemConditions:
    """The part of `Conditions` that those made from a system share: its rows, and the layout of its state."""

    system: System | VmappedSystem

    @property
    def rows(self) -> int:
        return self.system.rows

    @property
    def spec(self) -> StateSpec:
        return self.system.spec


class JacobianRule:
    """How the matrix of the conditions is had."""

    @property
    def entries_guessed(self) -> bool:
        """Whether a pattern that may lack entries, or the user, stands behind the matrix: to be held against a product."""
        return False

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        """The Jacobian of ``r`` at ``x`` (B, n)."""
        raise NotImplementedError

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """The rule for ``size`` copies, with inputs mapped along ``in_dims``: the same where rows are independent."""
        return self


@dataclass(frozen=True)
class FixedRule(JacobianRule):
    """One strategy for every function and point, whose rows are independent."""

    strategy: JacobianStrategy

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        return self.strategy(r, x)


class FactorStore:
    """The factors of the Jacobian at one point: made once, for whoever asks first."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.factors: Factorization | None = None

    @staticmethod
    def key_of(x: Tensor) -> tuple[Any, ...]:
        """What tells this tensor's present values from any other's while it lives."""
        while is_functorch_wrapped_tensor(x):
            x = get_unwrapped(x)
        # tensors of inference mode have no versions
        return (x.data_ptr(), tuple(x.shape), 0 if x.is_inference() else x._version)

    def put(self, x: Tensor, factors: Factorization | None, examined: bool = False) -> None:
        """Keep factors of the Jacobian at ``x``; ``examined``: see `Examiner`."""
        # the tensor is kept alive with its key: its memory cannot be given to another
        self.x, self.key, self.factors, self.examined = x, self.key_of(x), factors, examined

    def clear(self) -> None:
        """Forget the factors."""
        self.key = self.factors = None

    def get(self, x: Tensor, examine: Callable[[Factorization | None], Factorization]) -> Factorization:
        """The factors at ``x`` as ``examine`` gives them, from those that are kept or from None: once at every point."""
        known = self.factors if self.key == self.key_of(x) else None
        if known is None or not self.examined:
            known = examine(known)
            self.put(x, known, examined=True)
        return known


class Examiner:
    """Sees to the factors behind derivatives, and to what is solved with them: these are as they are; see `RootTask.factors`."""

    def factors(
        self, task: RootTask, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor], known: Factorization | None
    ) -> Factorization:
        """Those of the Jacobian of ``r`` at ``x``; ``known``: those that the iteration left, of what it took for the Jacobian."""
        return task.linear_solver.factor(task.jacobian(r, x, inputs), task.log) if known is None else known

    def solved(self, factors: Factorization, b: Tensor, u: Tensor) -> None:
        """Look at ``u`` (B, n, k), the solutions for the sides ``b``."""


def known_root(r: Any, x: Tensor, inputs: Any, jacobian: Any) -> RootRecord:
    """A search, see `RootTask`, for a root that is known: there is nothing to iterate."""
    count = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return RootRecord(x, torch.zeros_like(x), x.new_zeros(x.shape[0], dtype=x.dtype.to_real()), count, count, count, count)


class RootOutputs(NamedTuple):
    """What the node gives; the first two are differentiable."""

    raw: Tensor
    x: Tensor
    residual_norm: Tensor
    status: Tensor
    n_steps: Tensor
    n_fun: Tensor
    n_jac: Tensor


@dataclass(frozen=True)
class RootTask:
    """A root problem without its differentiable tensors.

    ``system`` is what ``find(r, x0, inputs, jacobian)`` iterates on; ``conditions`` (the same, except for least squares) are zero at the
    solution and define its derivatives; ``jacobian`` gives the matrix that ``linear_solver`` factorises. ``witness``: where derivatives may
    be asked for, sees to it that they are those of the function that the root was found of.
    """

    system: Conditions
    conditions: Conditions
    find: Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[Tensor], JacobianRule], RootRecord]
    jacobian: JacobianRule
    linear_solver: LinearSolver
    log: Log
    report: Callable[[RootRecord], None]
    store: FactorStore = field(default_factory=FactorStore)
    mapped: dict[Any, RootTask] = field(default_factory=dict)
    examiner: Examiner = field(default_factory=Examiner)
    witness: RootWitness | None = None

    def residual(self, inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """``r(x)`` on ``(B, n)`` for given inputs."""
        return timeless(self.conditions, inputs)

    def factors(self, x: Tensor, inputs: Sequence[Tensor]) -> Factorization:
        """The factors at ``x``, from the store or made now."""
        return self.store.get(x, lambda known: self.examiner.factors(self, self.residual(inputs), x, inputs, known))

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> RootTask:
        """The task for ``size`` copies; the same object every time, so that its factors are shared too."""
        key = (size, in_dims)
        if key not in self.mapped:
            system = VmappedSystem(self.system, size, in_dims)  # type: ignore[arg-type]
            conditions = system if self.conditions is self.system else VmappedSystem(self.conditions, size, in_dims)  # type: ignore[arg-type]
            jacobian = self.jacobian.vmapped(size, in_dims)
            own = {"store": FactorStore(), "mapped": {}, "witness": None if self.witness is None else RootWitness()}
            self.mapped[key] = replace(self, system=system, conditions=conditions, jacobian=jacobian, **own)
        return self.mapped[key]


def timeless(system: Conditions, inputs: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """A system's function of the state only."""
    f = system.bind(inputs)

    def r(x: Tensor) -> Tensor:
        return f(torch.zeros(x.shape[:1], dtype=x.dtype.to_real(), device=x.device), x)

    return r


def linear(task: RootTask, b: Tensor, x: Tensor, inputs: Sequence[Tensor], adjoint: bool) -> Tensor:
    """``A(x, inputs)^-1 b``, or with the adjoint of ``A``, for ``b`` of shape ``(B, n)``; differentiable in ``b``, ``x`` and inputs."""
    return _LinearNode.apply(task, adjoint, b.unsqueeze(0), x, *inputs)[0]


def _sheltered(
    task: RootTask, raw: Tensor, status: Tensor, bar: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, Sequence[Tensor], list[Tensor | None], Tensor | None]:
    """Roots and inputs with those of another row in the places of what rows failed with of which nothing is asked; which entries of inputs
    are others' now; and those rows, ``(B,)``, or None."""
    dead = (status < 0) & (bar == 0).all(-1)
    if not anywhere(dead) or not anywhere(status >= 0):
        return raw, inputs, [None] * len(inputs), None
    donor = (status >= 0).to(torch.int64).argmax()
    moved = torch.where(dead.unsqueeze(-1), raw.detach().index_select(0, donor.reshape(1)), raw)

    def values(some: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [task.residual(some)(moved)]

    return moved, *replacements(task.conditions, values, dead, donor, inputs), dead


def _look_again(task: RootTask, raw: Tensor, inputs: Sequence[Tensor], smooth: Sequence[int]) -> None:
    """Raise where derivatives of the derivatives of the conditions would miss a part. Roots within the steps of a solve have no witness:
    the way back of that looks once for all of them."""
    if task.witness is not None:
        look_again(lambda x, *some: task.residual(exchanged(inputs, smooth, some))(x), raw, *(inputs[i] for i in smooth))


class RootNode(Node):
    """``apply(task, x0, *inputs)`` gives the tensors of `RootOutputs`.

    ``raw`` is the last iterate of every row; ``x`` is NaN where a row failed, and so is the gradient of whatever uses that row.
    """

    @staticmethod
    def forward(task: RootTask, x0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            record = task.find(timeless(task.system, inputs), x0, inputs, task.jacobian)
        task.report(record)
        raw = torch.where(torch.isfinite(record.x), record.x, 0.0)
        task.store.put(raw, record.factors)
        if task.witness is not None:
            with torch.autocast(x0.device.type, enabled=False):
                task.witness.note(task.residual(inputs), raw)
        x = torch.where((record.status >= 0).unsqueeze(-1), raw, float("nan"))
        return raw, x, record.residual_norm, record.status, record.n_steps, record.n_fun, record.n_jac

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        task, _, *rest = inputs
        ctx.task = owned(task)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(output[0], output[3], *rest)
        ctx.save_for_forward(output[0], output[3], *rest)

    @staticmethod
    @copy_by_copy
    @naming_writes
    @continuing("task")
    def backward(ctx: Any, raw_bar: Tensor | None, x_bar: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        raw, status, *inputs = alive(ctx.saved_tensors)
        wanted = [i for i, want in enumerate(ctx.needs_input_grad[2:]) if want]
        nothing: list[Tensor | None] = [None] * len(inputs)
        if not wanted or (raw_bar is None and x_bar is None):
            return (None, None, *nothing)
        bar = torch.zeros_like(raw) if raw_bar is None else raw_bar
        if x_bar is not None:
            bar = bar + torch.where((status >= 0).unsqueeze(-1) | (x_bar == 0), x_bar, float("nan"))
        task = ctx.task()
        with torch.autocast(raw.device.type, enabled=False):
            raw, inputs, replaced, lost = _sheltered(task, raw, status, bar, inputs)
            if differentiated_again([raw, *inputs]):
                _look_again(task, raw, inputs, wanted)
            adjoint = linear(task, bar, raw, inputs, adjoint=True)
            if lost is not None:
                # zero, whatever the matrix of such a row, and so are its derivatives
                adjoint = torch.where(lost.unsqueeze(-1), 0.0, adjoint)
            pulled = _pull(lambda *some: task.residual(exchanged(inputs, wanted, some))(raw), [inputs[i] for i in wanted], -adjoint)
        masks = [replaced[i] for i in wanted]
        pulled = tuple(x if mask is None else torch.where(mask, float("nan"), x) for x, mask in zip(pulled, masks, strict=True))
        return (None, None, *ctx.task.let_out(exchanged(nothing, wanted, pulled)))  # type: ignore[arg-type]

    @staticmethod
    def jvp(ctx: Any, _: None, x0_dot: Tensor | None, *inputs_dot: Any) -> tuple[Any, ...]:
        task = ctx.task()
        raw, status, *inputs = alive(ctx.saved_tensors)
        with torch.autocast(raw.device.type, enabled=False), below_jvp() as (lower, raise_):
            raw, status, inputs = lower(raw), lower(status), [lower(x) for x in inputs]
            ok = status >= 0
            # what a row failed with would be summed with the rest by whatever differentiates this
            raw, inputs = _sheltered(task, raw, status, torch.zeros_like(raw), inputs)[:2]
            live = ok.unsqueeze(-1)
            where = [i for i in smooth_places(inputs) if inputs_dot[i] is not None]
            if where:
                _look_again(task, raw, inputs, where)
                primals, dots = [inputs[i] for i in where], [lower(inputs_dot[i]) for i in where]
                moved = tangent(lambda *some: task.residual(exchanged(inputs, where, some))(raw), primals, dots)
                dot = linear(task, torch.where(live, -moved, 0.0), raw, inputs, adjoint=False)
            else:
                dot = torch.zeros_like(raw)
            # where a row failed, its last iterate is no function of anything
            dot, shown = (torch.where(live, dot, other) for other in (0.0, float("nan")))
        return (raise_(dot), raise_(shown), *([None] * (len(RootOutputs._fields) - 2)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], task: RootTask, x0: Tensor, *inputs: Tensor) -> tuple[Any, Any]:
        size, rows = info.batch_size, task.conditions.rows
        _, x0_dim, *dims = in_dims
        x0 = x0.expand(size, -1, -1) if x0_dim is None else x0.movedim(x0_dim, 0)
        inputs = tuple(x if d is None else x.movedim(d, 0) for x, d in zip(inputs, dims, strict=True))
        mapped = task.vmapped(size, tuple(None if d is None else 0 for d in dims))
        out = RootNode.apply(mapped, x0.reshape(size * rows, -1), *inputs)
        return tuple(x.unflatten(0, (size, rows)) for x in out), (0,) * len(out)


class _LinearNode(Node):
    """``apply(task, adjoint, b, x, *inputs)`` gives ``u`` with ``A(x, inputs) u = b``; ``b`` and ``u`` are ``(K, B, n)``."""

    @staticmethod
    def forward(task: RootTask, adjoint: bool, b: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if task.witness is not None:
                task.witness.check(task.residual(inputs), x)
            factors = task.factors(x, inputs)
            sides = b.permute(1, 2, 0)
            solved = factors.solve(sides, transposed=adjoint, conjugated=adjoint)
            task.examiner.solved(factors, sides, solved)
            out = solved.permute(2, 0, 1)
        # a row that nobody asked for takes no part, whatever its matrix
        return torch.where((b == 0).all(-1, keepdim=True), 0.0, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        task, adjoint, _, x, *rest = inputs
        ctx.task, ctx.adjoint = owned(task), adjoint
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, x, *rest)
        ctx.save_for_forward(output, x, *rest)

    @staticmethod
    @copy_by_copy
    @naming_writes
    @continuing("task")
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, ...]:
        u, x, *inputs = alive(ctx.saved_tensors)
        nothing: list[Tensor | None] = [None] * len(inputs)
        if bar is None:
            return (None, None, None, None, *nothing)
        task, adjoint = ctx.task(), ctx.adjoint
        other = _LinearNode.apply(task, not adjoint, bar, x, *inputs)
        wants = ctx.needs_input_grad
        wanted = [i for i, want in enumerate(wants[4:]) if want]
        x_bar = None
        if wants[3] or wanted:
            left, right = (u, other) if adjoint else (other, u)

            def products(x: Tensor, *some: Tensor) -> Tensor:
                return _products(task.residual(exchanged(inputs, wanted, some)), x, right)

            x_bar, *pulled = _pull(products, [x, *(inputs[i] for i in wanted)], -left)
            nothing = exchanged(nothing, wanted, pulled)  # type: ignore[arg-type,assignment]
        return (None, None, *ctx.task.let_out([other, x_bar, *nothing]))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, b_dot: Tensor | None, x_dot: Tensor | None, *inputs_dot: Any) -> Tensor:
        u, x, *inputs = alive(ctx.saved_tensors)
        task, adjoint = ctx.task(), ctx.adjoint
        with below_jvp() as (lower, raise_):
            u, x, inputs = lower(u), lower(x), [lower(i) for i in inputs]
            side = torch.zeros_like(u) if b_dot is None else lower(b_dot)
            where = [i for i in smooth_places(inputs) if inputs_dot[i] is not None]
            if x_dot is not None or where:
                move = torch.zeros_like(x) if x_dot is None else lower(x_dot)

                def products(x: Tensor, *some: Tensor) -> Tensor:
                    r = task.residual(exchanged(inputs, where, some))
                    return _adjoint_products(r, x, u) if adjoint else _products(r, x, u)

                side = side - tangent(products, [x, *(inputs[i] for i in where)], [move, *(lower(inputs_dot[i]) for i in where)])
            out = _LinearNode.apply(task, adjoint, side, x, *inputs)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], task: RootTask, adjoint: bool, b: Tensor, x: Tensor, *inputs: Tensor) -> tuple[Any, Any]:
        size = info.batch_size
        _, _, b_dim, x_dim, *dims = in_dims
        b = b.expand(size, *b.shape) if b_dim is None else b.movedim(b_dim, 0)
        copies, rows, n = b.shape[1:]
        if x_dim is None and all(d is None for d in dims):
            # one matrix, more right-hand sides
            out = _LinearNode.apply(task, adjoint, b.reshape(size * copies, rows, n), x, *inputs)
            return out.unflatten(0, (size, copies)), 0
        x = x.expand(size, -1, -1) if x_dim is None else x.movedim(x_dim, 0)
        inputs = tuple(i if d is None else i.movedim(d, 0) for i, d in zip(inputs, dims, strict=True))
        mapped = task.vmapped(size, tuple(None if d is None else 0 for d in dims))
        b = b.movedim(0, 1).reshape(copies, size * rows, n)
        out = _LinearNode.apply(mapped, adjoint, b, x.reshape(size * rows, n), *inputs)
        return out.unflatten(1, (size, rows)), 1


def _pull(function: Callable[..., Tensor], primals: Sequence[Tensor], bar: Tensor) -> Sequence[Tensor]:
    """The pullback of ``bar``: recorded where somebody may differentiate it, by plain autograd where nobody can."""
    if torch.is_grad_enabled() or functorch_active():
        return vjp(function, *primals)[1](bar)
    with torch.enable_grad():
        own = [p.detach().requires_grad_(True) for p in primals]
        out = function(*own)
    if not out.requires_grad:
        return [torch.zeros_like(p) for p in own]
    return torch.autograd.grad(out, own, bar, materialize_grads=True)


def _products(r: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """``A v`` for ``v`` of shape ``(K, B, n)``."""
    if v.shape[0] == 1:
        return tangent(r, [x], [v[0]]).unsqueeze(0)
    return torch.vmap(lambda one: tangent(r, [x], [one]))(v)


def _adjoint_products(r: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
    """``A^H w`` for ``w`` of shape ``(K, B, n)``."""
    pull = vjp(r, x)[1]
    if w.shape[0] == 1:
        return pull(w[0])[0].unsqueeze(0)
    return torch.vmap(lambda one: pull(one)[0])(w)
