"""cuDSS: the order and the arguments of its calls by a stand-in that solves densely, and the true one where there is a GPU."""

from __future__ import annotations

import inspect
import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from adjoint import InvalidInput, UnsupportedCombination
from adjoint.linalg import CuDSS, Log, SparseMatrix, linear_solve

from .test_linalg_solvers import advection, operator, sparse

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


class DirectSolver:
    """nvmath's, as far as it is used: buffers are read when they are used, not when they are given."""

    made: list[DirectSolver]

    def __init__(self, a, b, *, options=None, execution=None, stream=None):
        assert a.layout == torch.sparse_csr and a.crow_indices().dtype == a.col_indices().dtype == torch.int32
        assert a.dtype == b.dtype and b.shape == (a.shape[0],) and b.stride(-1) == 1 and not b.is_conj()
        self.a, self.b, self.planned, self.calls, self.factors = a, b, False, [], None
        self.made.append(self)

    def plan(self, *, stream=None):
        self.calls.append("plan")
        self.planned = True

    def factorize(self, *, stream=None):
        assert self.planned
        self.calls.append("factorize")
        dense = torch.zeros(self.a.shape, dtype=self.a.dtype)
        rows = torch.repeat_interleave(torch.arange(len(dense)), self.a.crow_indices().diff())
        dense[rows, self.a.col_indices().long()] = self.a.values()
        lu, pivots, _ = torch.linalg.lu_factor_ex(dense)
        small = lu.diagonal().abs() < 1e-13
        self.factors = lu + torch.diag_embed(torch.where(small, 1e-13, 0.0).to(lu)), pivots  # perturbed in silence
        return SimpleNamespace(lu_nnz=int((lu != 0).sum()))

    def solve(self, *, stream=None):
        assert self.factors is not None
        self.calls.append("solve")
        return torch.linalg.lu_solve(*self.factors, self.b.unsqueeze(-1)).squeeze(-1)

    def free(self):
        self.calls.append("free")


@pytest.fixture
def made(monkeypatch):
    """The solvers that have been made."""
    module = ModuleType("nvmath.sparse.advanced")
    module.DirectSolver = DirectSolver
    for name in ("nvmath", "nvmath.sparse"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "nvmath.sparse.advanced", module)
    monkeypatch.setattr("adjoint.linalg.cudss._DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(DirectSolver, "made", [], raising=False)
    return DirectSolver.made


def test_the_stand_in_has_the_signatures_of_the_true_one():
    true = pytest.importorskip("nvmath.sparse.advanced").DirectSolver
    for name in ("__init__", "plan", "factorize", "solve", "free"):
        ours, theirs = (inspect.signature(getattr(c, name)).parameters.values() for c in (DirectSolver, true))
        assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]


def check(device, dtype):
    A = torch.stack([advection(5), 2 * advection(5)]).to(device, dtype)
    if dtype.is_complex:
        A = A * (1 + 0.5j * torch.rand(25, 25).to(device, dtype))
    b = torch.randn(2, 25, 3, dtype=dtype).to(device)
    log = Log()
    old = CuDSS().factor(sparse(A), log)
    new = CuDSS().refactor(old, sparse(3 * A))
    assert (log.n_factorizations, log.n_refactorizations) == (4, 2) and log.fill > 0 and not bool(new.singular().any())
    close = {"rtol": 1e-3, "atol": 1e-4} if torch.finfo(dtype).bits == 32 else {"rtol": 1e-8, "atol": 1e-9}
    for factors, M in ((old, A), (new, 3 * A), (old, A)):  # old factors stay valid
        for transposed, conjugated in itertools.product([False, True], repeat=2):
            turned = M.mT if transposed else M
            turned = turned.conj() if conjugated else turned
            x = factors.solve(b, transposed=transposed, conjugated=conjugated)
            assert x.dtype == dtype and x.device == b.device
            assert torch.allclose(x, torch.linalg.solve(turned, b), **close)
            assert torch.allclose(factors.solve(b[..., 0], transposed=transposed, conjugated=conjugated), x[..., 0], **close)
    assert log.n_solves == 3 * 4 * 2 * 4
    shared = sparse(A[:1])
    factors = CuDSS().factor(SparseMatrix(shared.indices, shared.values[0], shared.shape))
    assert torch.allclose(factors.solve(b), torch.linalg.solve(A[:1], b), **close)
    return old


@pytest.mark.parametrize("dtype", DTYPES)
def test_stand_in(made, dtype):
    old = check("cpu", dtype)
    first = made[0]
    assert first.calls.count("plan") == 1 and first.calls.count("factorize") == 5  # the two matrices in turn
    assert len(made) == 2 * 2 + 1  # two rows, each with a plan of the transpose, and the shared one
    del old
    assert all(solver.calls[-1] == "free" for solver in made)


def test_singular_matrices_and_sides(made):
    dependent = torch.tensor([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]])
    missing = torch.diag(torch.tensor([1.0, 1, 0]))
    for wrong in (dependent, missing, torch.eye(3) * float("nan")):
        factors = CuDSS().factor(torch.stack([wrong, torch.eye(3)]))
        x = factors.solve(torch.tensor([[1.0, 2, 3], [1, 2, 3]]))
        assert factors.singular().tolist() == [True, False]
        assert bool(x[0].isnan().all()) and torch.equal(x[1], torch.tensor([1.0, 2, 3]))
    zero = torch.zeros(1, 3, 3)
    assert bool(CuDSS().factor(zero).singular().all())
    factors = CuDSS().factor(torch.eye(3).unsqueeze(0))
    assert bool(factors.solve(torch.tensor([[1.0, float("inf"), 0]])).isnan().all())
    assert factors.solve(torch.zeros(1, 3, 0)).shape == (1, 3, 0)
    assert CuDSS().factor(torch.zeros(2, 0, 0)).solve(torch.zeros(2, 0)).shape == (2, 0)
    with pytest.raises(InvalidInput, match="dtype"):
        factors.solve(torch.ones(1, 3, dtype=torch.float32))
    with pytest.raises(InvalidInput, match="square"):
        CuDSS().factor(torch.ones(1, 3, 4))
    with pytest.raises(UnsupportedCombination, match="operator"):
        CuDSS().factor(operator(torch.eye(3).unsqueeze(0)))


def test_values_may_be_changed_in_place(made):
    A = sparse(advection(5).unsqueeze(0))
    factors = CuDSS().factor(A)
    b = torch.randn(1, 25)
    want = torch.linalg.solve(advection(5), b[0])
    A.values.zero_()
    assert torch.allclose(factors.solve(b, transposed=True)[0], torch.linalg.solve(advection(5).T, b[0]))
    assert torch.allclose(factors.solve(b)[0], want)


def test_derivatives(made):
    A, b = sparse(advection(4).unsqueeze(0)), torch.randn(1, 16, requires_grad=True)
    values = A.values.clone().requires_grad_()
    solve = lambda v, s: linear_solve(SparseMatrix(A.indices, v, A.shape), s, solver=CuDSS())  # noqa: E731
    assert torch.autograd.gradcheck(solve, (values, b))


def test_what_it_needs(monkeypatch):
    with pytest.raises(InvalidInput, match="CUDA devices"):
        CuDSS().factor(torch.eye(3).unsqueeze(0))
    monkeypatch.setattr("adjoint.linalg.cudss._DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "nvmath.sparse.advanced", None)
    with pytest.raises(InvalidInput, match="pip install 'nvmath-python"):
        CuDSS().factor(torch.eye(3).unsqueeze(0))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    pytest.importorskip("nvmath")
    check("cuda", dtype)
    dependent = torch.tensor([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]], dtype=dtype, device="cuda")
    factors = CuDSS().factor(torch.stack([dependent, torch.eye(3, dtype=dtype, device="cuda")]))
    assert factors.singular().tolist() == [True, False]
