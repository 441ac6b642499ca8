"""The structure of implicit equations ``F(t, y, y') = 0`` at a point: which variables are differential, and the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import LinearSolver, Log, Matrix, SparseMatrix, condition_estimate
from ..linalg.pencil import Pencil, scaled_factors, split
from .jacobians import DenseJacobian
from .system import System, VmappedSystem

__all__ = ["Structure", "analyse", "analyse_large", "dense_pencil"]

#: what counts as zero among numbers whose largest is one
_ZERO = 1e-11
#: the same for derivatives beside the largest of other equations: rounding of sums that cancel
_ROUNDING = 1e-13
#: rows among which one is looked for whose equations determine every variable, where those of the first do not
_LOOKED_AT = 100
#: the highest index that is told apart from "singular"
_HIGHEST = 6


@dataclass(frozen=True, eq=False)
class Structure:
    """What the matrices ``E = F_y'`` and ``G = F_y`` say (of trajectories that share it; see `analyse`).

    Attributes
    ----------
    rank : int
        Of ``E``: the number of degrees of freedom that are differentiated.
    basis : (B, n, n)
        Orthonormal. The first ``rank`` columns span what is differentiated, the others the null space of ``E``: algebraic directions.
        Where ``E`` has that many columns that are not zero, the basis is one of single variables.
    differential : (n,) bool
        Variables whose derivative appears.
    index : int
        Of the pencil ``E + c G``: 0 an ODE, 1 all algebraic variables follow from the constraints, 2 and more after as many
        differentiations less one. -1: the pencil is singular, the equations do not determine every variable.
    hidden : (B, n, k)
        Orthonormal columns: the combinations ``hidden^T F`` (of equations scaled by ``row_scale``) that hold no derivative and no algebraic
        variable.
    rest : (B, n, n - k)
        The orthonormal complement of ``hidden``.
    row_scale : (B, n)
        Makes the largest entry of every row of ``E`` one, or of ``G`` where an equation holds no derivative.
    undetermined : (n,) bool
        Algebraic variables that the constraints leave open, for an index above one.
    suspects : (n,) bool
        Equations that say nothing about algebraic variables.
    """

    rank: int
    basis: Tensor
    differential: Tensor
    index: int
    hidden: Tensor
    rest: Tensor
    row_scale: Tensor
    undetermined: Tensor
    suspects: Tensor
    #: whether the basis is one of single variables
    single: bool
    #: the row that speaks for all
    lead: int = 0

    @property
    def plain(self) -> bool:
        """Whether variables are differential or algebraic one by one, and constraints determine all of the latter."""
        return self.single and not self.hidden.shape[-1]

    @property
    def order(self) -> Tensor:
        """``(n,)`` int64: differential variables, then algebraic ones; where the basis is one of single variables."""
        return torch.cat([self.differential.nonzero()[:, 0], (~self.differential).nonzero()[:, 0]])

    def chosen(self, E: Matrix, G: Matrix) -> Matrix:
        """``[F_yd', F_ya]``, of which index 1 means that it is regular; columns in the `order`."""
        order, rank = self.order, self.rank
        if isinstance(E, Tensor) and isinstance(G, Tensor):
            return torch.cat([E[..., order[:rank]], G[..., order[rank:]]], -1)
        assert isinstance(E, SparseMatrix) and isinstance(G, SparseMatrix)
        place = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
        rows, columns = E.indices
        values = torch.where(place[columns] < rank, E.values, G.values)
        indices = torch.stack([rows, place[columns]])
        sorted_ = (indices[0] * len(order) + indices[1]).argsort()
        return SparseMatrix(indices[:, sorted_], values[..., sorted_], E.shape)

    @property
    def variable_index(self) -> Tensor:
        """``(n,)`` int64: 0 for differential variables, 1 for algebraic ones, 2 for those that no constraint determines."""
        algebraic = torch.where(self.undetermined, max(self.index, 1), 1)
        return torch.where(self.differential, 0, algebraic)


def analyse(E: Tensor, G: Tensor, differential: Tensor | None = None, lead: int | None = None) -> Structure:
    """From dense ``(B, n, n)`` matrices. Ranks, index and names of variables are those of one row of the batch, bases each row's own. It is
    the row ``lead``; by default the first one, or one that differentiates, or whose constraints determine, more: what is singular in one
    row does not speak for others.

    ``differential``: ``(n,)`` bool, where the user names the variables.
    """
    n = E.shape[-1]
    largest = torch.cat([G, E], -1).abs().amax(-1)
    size = E.abs().amax(-1)
    scale = _units(size, largest)
    own, given = E * scale.unsqueeze(-1), G
    G = given * scale.unsqueeze(-1)
    left, sizes, right = torch.linalg.svd(own)
    ranks = (sizes > _ZERO * sizes[:, :1]).sum(-1) * (own.abs().amax((-2, -1)) > _ZERO) if n else torch.zeros(len(E), dtype=torch.int64)
    free_choice, lead = lead is None, lead or 0
    lead = int(ranks.argmax()) if free_choice and bool((ranks > ranks[lead]).any()) else lead
    first, rank = own[lead], int(ranks[lead])
    named = first.abs().amax(0) > _ZERO if differential is None else differential
    if int(named.sum()) == rank:
        order = torch.cat([named.nonzero()[:, 0], (~named).nonzero()[:, 0]])
        basis = torch.eye(n, dtype=E.dtype, device=E.device)[:, order].expand(E.shape[0], n, n)
        single = True
    else:
        single = False
        basis = right.mH
    left = left if rank else torch.eye(n, dtype=E.dtype, device=E.device).expand_as(E)
    free, constraints = basis[:, :, rank:], left[:, :, rank:]
    # which constraints determine algebraic variables, and which of these are determined
    core = constraints.mH @ G @ free
    u, s, vh = torch.linalg.svd(core)
    found = int((s[lead] > 1e-9 * s[lead].max().clamp(min=_ZERO)).sum()) if s.numel() else 0
    index = _index(first, G[lead])
    if free_choice and len(E) > 1 and s.numel():
        counts = torch.where(ranks == rank, (s > 1e-9 * s[:, :1].clamp(min=_ZERO)).sum(-1), 0)
        if bool((counts > found).any()):
            return analyse(E, given, differential, int(counts.argmax()))
        some = range(min(len(E), _LOOKED_AT)) if index < 0 else ()
        if (regular := next((i for i in some if int(ranks[i]) == rank and _index(own[i], G[i]) >= 0), None)) is not None:
            return analyse(E, given, differential, regular)
    hidden = constraints @ u[:, :, found:]
    rest = torch.cat([left[:, :, :rank], constraints @ u[:, :, :found]], -1)
    open_directions = (free @ vh.mH[:, :, found:])[lead].abs()
    undetermined = open_directions.amax(-1) > 0.1 if open_directions.shape[-1] else torch.zeros_like(named)
    suspects = hidden[lead].abs().amax(-1) > 0.1 if hidden.shape[-1] else torch.zeros_like(named)
    return Structure(rank, basis, named, index, hidden, rest, scale, undetermined, suspects, single, lead)


def dense_pencil(
    system: System | VmappedSystem, inputs: Sequence[Tensor], t: Tensor, y: Tensor, yp: Tensor
) -> tuple[Tensor, Tensor]:
    """``E`` and ``G``, dense ``(B, n, n)``, without derivatives; also of ``M y' - f(t, y)``."""
    jacobian = DenseJacobian(differentiable=False)
    with torch.no_grad():
        f = system.bind(inputs)
        if (mass := system.mass_matrix(inputs)) is not None:
            slopes = jacobian(lambda at: f(t, at), y)
            return mass.expand_as(slopes), -slopes
        found = split(jacobian(lambda pair: f(t, pair), torch.cat([y, yp], -1)))
    assert isinstance(found, Pencil) and isinstance(found.E, Tensor) and isinstance(found.G, Tensor)
    return found.E, found.G


def analyse_large(pencil: Pencil, linear_solver: LinearSolver, differential: Tensor | None = None) -> Structure | None:
    """The structure of many equations of index 0 or 1 in single variables, by one factorisation; None where that is not what they are."""
    E, G = pencil.E, pencil.G
    if isinstance(E, SparseMatrix) and isinstance(G, SparseMatrix):
        n = E.shape[0]
        rows = E.indices[0]
        weights = E.values.abs() if E.values.dim() == 2 else E.values.abs().unsqueeze(0)
        largest = _most(torch.maximum(weights, G.values.abs()), rows, n)
        size = _most(weights, rows, n)
    else:
        assert isinstance(E, Tensor) and isinstance(G, Tensor)
        n = E.shape[-1]
        largest, size = torch.cat([G, E], -1).abs().amax(-1), E.abs().amax(-1)
    scale = _units(size, largest)
    named = differential
    if named is None:
        if isinstance(E, SparseMatrix):
            own = E.values.abs() * scale.index_select(1, E.indices[0])
            named = _most(own, E.indices[1], n)[0] > _ZERO
        else:
            named = (E.abs() * scale.unsqueeze(-1))[0].amax(0) > _ZERO  # type: ignore[union-attr]
    rank, kind = int(named.sum()), {"dtype": E.dtype, "device": E.device}
    order = torch.cat([named.nonzero()[:, 0], (~named).nonzero()[:, 0]])
    none = torch.zeros(n, dtype=torch.bool, device=E.device)
    basis = torch.eye(n, **kind)[:, order].expand(scale.shape[0], n, n)
    empty = torch.empty(scale.shape[0], n, 0, **kind)
    found = Structure(rank, basis, named, 0 if rank == n else 1, empty, basis, scale, none, none, True)
    matrix = found.chosen(E, G)
    factors = scaled_factors(linear_solver, matrix, Log())
    condition = condition_estimate(factors.scaled, factors.factors)
    return found if bool((condition < 1e11).all()) else None


def _units(size: Tensor, largest: Tensor) -> Tensor:
    """``(B, n)``: what makes of every equation one in units of its own derivatives, where it has some: capacities may be tiny beside
    conductances, and rates beyond bounds beside derivatives. ``size``: its largest entry of ``E``, ``largest``: of ``E`` and ``G``."""
    some = size > torch.minimum(_ZERO * largest, _ROUNDING * size.amax(-1, keepdim=True)) if size.numel() else size > 0
    size = torch.where(some, size, largest)
    return torch.where(size > 0, 1 / size, 1.0)


def _most(values: Tensor, places: Tensor, n: int) -> Tensor:
    """``(B, n)``: the largest of the ``values`` (B, nnz) at each place."""
    return values.new_zeros(values.shape[0], n).scatter_reduce(1, places.expand_as(values), values, "amax")


def _index(E: Tensor, G: Tensor) -> int:
    """The number of rounds in which constraints are differentiated until no algebraic equation is left (Luenberger 1978); -1 if there is
    no end to that."""
    n = E.shape[-1]
    for index in range(min(n, _HIGHEST) + 1):
        u, s, _ = torch.linalg.svd(E)
        rank = int((s > 1e-9 * s.max().clamp(min=1e-300)).sum()) if n else 0
        if rank == n:
            return index
        # what a combination of equations could be where nothing cancels: others, of fast rates, may be much larger
        full = u.mH.abs() @ torch.linalg.vector_norm(G, dim=-1, keepdim=True)
        E, G = u.mH @ E, u.mH @ G
        rows = G[rank:]
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        if bool((length <= 1e-9 * full[rank:].clamp(min=1e-300)).any()):
            return -1
        E = torch.cat([E[:rank], rows / length])
        G = torch.cat([G[:rank], torch.zeros_like(rows)])
    return -1
