"""Linear solvers against NumPy: every kind of matrix, transposed and conjugated, many sides, batches, counts, singular matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from adjoint import InvalidInput, UnsupportedCombination
from adjoint.linalg import GMRES, IDR, ILU, UMFPACK, BiCGStab, DenseLU, LinearOperator, Log, Pardiso, SparseLU, SparseMatrix, default_solver

SOLVERS = {
    "dense": DenseLU(),
    "sparse": SparseLU(),
    "colamd": SparseLU("COLAMD"),
    "umfpack": UMFPACK(),
    "gmres": GMRES(rtol=1e-13),
    "gmres restarted": GMRES(rtol=1e-12, restart=8, preconditioner="ilu"),
    "gmres jacobi": GMRES(rtol=1e-13, preconditioner="jacobi"),
    "bicgstab": BiCGStab(rtol=1e-13, preconditioner=ILU(1e-6)),
    "idr": IDR(rtol=1e-13),
    "idr(1) ilu": IDR(rtol=1e-13, s=1, preconditioner="ilu"),
    "gmres left": GMRES(rtol=1e-13, preconditioner=ILU(1e-2), side="left"),
    "bicgstab left": BiCGStab(rtol=1e-12, preconditioner="jacobi", side="left"),
    "idr left": IDR(rtol=1e-13, preconditioner="ilu", side="left"),
}


def advection(n, dtype=torch.float64):
    """A nonsymmetric five-point stencil, ``(n^2, n^2)``."""
    T = 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    D = torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    eye = torch.eye(n)
    A = torch.kron(T, eye) + torch.kron(eye, T) + 0.3 * torch.kron(eye, D) - 0.2 * torch.kron(D, eye) + 0.1 * torch.eye(n * n)
    return A.to(dtype)


def sparse(A):
    """``(B, n, n)`` as a SparseMatrix."""
    indices = (A != 0).any(0).nonzero().T.contiguous()
    return SparseMatrix(indices, A[:, indices[0], indices[1]], tuple(A.shape[1:]))


def operator(A):
    return LinearOperator(
        A.shape[1],
        A.shape[0],
        A.dtype,
        A.device,
        lambda v: (A @ v.unsqueeze(-1)).squeeze(-1),
        lambda v: (A.mT @ v.unsqueeze(-1)).squeeze(-1),
    )


@pytest.mark.parametrize("kind", ["tensor", "sparse", "operator"])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_all_solve_the_same_systems(name, kind, dtype):
    base = advection(5, dtype)
    scale = torch.linspace(1, 2, 3).reshape(-1, 1, 1) * (1 + 0.3j if dtype.is_complex else 1)
    A = base * scale
    solver = SOLVERS[name]
    if name == "umfpack":
        pytest.importorskip("scikits.umfpack")
    if (
        kind == "operator"
        and not isinstance(solver, DenseLU)
        and (isinstance(solver, SparseLU | UMFPACK) or solver.preconditioner is not None)
    ):
        with pytest.raises(UnsupportedCombination, match="operator"):
            solver.factor(operator(A))
        return
    matrix = {"tensor": A, "sparse": sparse(A), "operator": operator(A)}[kind]
    log = Log()
    factors = solver.factor(matrix, log)
    assert (factors.rows, factors.n, factors.dtype) == (3, 25, dtype) and not bool(factors.singular().any())
    b, many = torch.randn(3, 25, dtype=dtype), torch.randn(3, 25, 4, dtype=dtype)
    for transposed, conjugated in itertools.product([False, True], repeat=2):
        M = A.mT if transposed else A
        M = M.conj() if conjugated else M
        for side in (b, many):
            x = factors.solve(side, transposed=transposed, conjugated=conjugated)
            want = torch.linalg.solve(M, side if side.dim() == 3 else side.unsqueeze(-1)).reshape(side.shape)
            assert torch.allclose(x, want, rtol=1e-8, atol=1e-9)
    assert log.n_solves == 4 * 3 * 5 and log.n_factorizations == 3
    again = solver.refactor(factors, matrix)
    assert again.log is log and log.n_factorizations == 6
    assert torch.allclose(again.solve(b), factors.solve(b), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [DenseLU(), SparseLU()], ids=["dense", "sparse"])
def test_singular_matrices_give_nan_in_their_rows_only(solver):
    A = torch.stack([torch.eye(3), torch.ones(3, 3), 2 * torch.eye(3)])
    factors = solver.factor(A)
    assert factors.singular().tolist() == [False, True, False]
    x = factors.solve(torch.ones(3, 3))
    assert bool(x[1].isnan().all()) and torch.equal(x[[0, 2]], torch.tensor([[1.0] * 3, [0.5] * 3]))
    A[0, 0, 0] = float("nan")
    assert bool(solver.factor(A).solve(torch.ones(3, 3))[0].isnan().all())


def test_rows_without_convergence_are_nan():
    A = torch.stack([torch.eye(40), torch.diag(torch.logspace(-8, 8, 40)) + torch.triu(torch.ones(40, 40), 1)])
    factors = GMRES(rtol=1e-12, max_iterations=5).factor(A)
    x = factors.solve(torch.ones(2, 40))
    assert factors.converged.tolist() == [True, False]
    assert torch.allclose(x[0], torch.ones(40)) and bool(x[1].isnan().all())


def test_an_old_factorisation_preconditions_a_new_matrix():
    A = advection(8).unsqueeze(0)
    old = DenseLU().factor(A)
    log, plain = Log(), Log()
    new = A + 0.01 * torch.diag(torch.rand(64))
    b = torch.randn(1, 64)
    for transposed in (False, True):
        x = GMRES(rtol=1e-12, preconditioner=old).factor(new, log).solve(b, transposed=transposed)
        GMRES(rtol=1e-12).factor(new, plain).solve(b, transposed=transposed)
        assert torch.allclose((new.mT if transposed else new) @ x.unsqueeze(-1), b.unsqueeze(-1), atol=1e-10)
    assert log.n_iterations < plain.n_iterations / 3


def test_the_ordering_halves_the_fill():
    A = sparse(advection(64).unsqueeze(0))
    fill = {}
    for ordering in ("auto", "COLAMD"):
        log = Log()
        SparseLU(ordering).factor(A, log)
        fill[ordering] = log.fill
    assert fill["auto"] < 0.65 * fill["COLAMD"]


def test_factors_without_pivoting_are_checked():
    """A symmetric pattern with tiny diagonal entries: minimum degree with diagonal pivots would lose all digits."""
    torch.manual_seed(0)
    n = 60
    S = torch.randn(n, n) * (torch.rand(n, n) < 0.1)
    A = (S + S.T).fill_diagonal_(1e-14).unsqueeze(0)
    b = torch.randn(1, n)
    x = SparseLU().factor(sparse(A)).solve(b)
    assert float(((A @ x.unsqueeze(-1)).squeeze(-1) - b).norm() / b.norm()) < 1e-8


def test_empty_and_shared():
    assert DenseLU().factor(torch.zeros(2, 0, 0)).solve(torch.zeros(2, 0)).shape == (2, 0)
    assert DenseLU().factor(torch.zeros(0, 3, 3)).solve(torch.zeros(0, 3)).shape == (0, 3)
    one = sparse(advection(5).unsqueeze(0))
    shared = SparseMatrix(one.indices, one.values[0], one.shape)
    b = torch.randn(3, 25)
    assert torch.allclose(SparseLU().factor(shared).solve(b), torch.linalg.solve(advection(5), b.T).T)


def test_single_precision():
    A = advection(5, torch.float32).unsqueeze(0)
    b = torch.randn(1, 25, dtype=torch.float32)
    want = torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
    for solver in (DenseLU(), SparseLU(), GMRES(rtol=1e-6)):
        x = solver.factor(A).solve(b)
        assert x.dtype == torch.float32 and torch.allclose(x, want, rtol=1e-3, atol=1e-4)


def test_choice_and_bad_settings():
    assert isinstance(default_solver(torch.zeros(1, 3, 3)), DenseLU)
    assert isinstance(default_solver(sparse(advection(5).unsqueeze(0))), DenseLU)
    assert isinstance(default_solver(sparse(advection(12).unsqueeze(0))), SparseLU)
    assert isinstance(default_solver(operator(torch.eye(3).unsqueeze(0))), GMRES)
    for bad in (
        lambda: SparseLU("fast"),
        lambda: GMRES(rtol=2.0),
        lambda: GMRES(restart=0),
        lambda: BiCGStab(max_iterations=0),
        lambda: IDR(s=0),
        lambda: GMRES(side="both"),
    ):
        with pytest.raises(InvalidInput):
            bad()
    with pytest.raises(InvalidInput, match="preconditioner"):
        GMRES(preconditioner=3).factor(torch.eye(3).unsqueeze(0))
    with pytest.raises(UnsupportedCombination, match="transposed"):
        GMRES().factor(LinearOperator(3, 1, torch.float64, torch.device("cpu"), lambda v: v)).solve(torch.ones(1, 3), transposed=True)


def test_pardiso():
    pytest.importorskip("pypardiso")
    A = torch.stack([advection(8), 2 * advection(8)])
    b = torch.randn(2, 64, 3)
    log = Log()
    old = Pardiso().factor(sparse(A), log)
    new = Pardiso().refactor(old, sparse(3 * A))
    assert log.n_refactorizations == 2
    for factors, M in ((old, A), (new, 3 * A), (old, A)):  # old factors stay valid
        assert torch.allclose(factors.solve(b), torch.linalg.solve(M, b))
        assert torch.allclose(factors.solve(b, transposed=True), torch.linalg.solve(M.mT, b))
        assert torch.allclose(factors.solve(b[..., 0]), torch.linalg.solve(M, b[..., 0]))
    singular = torch.eye(3).unsqueeze(0).clone()
    singular[0, 2] = singular[0, 1]
    assert bool(Pardiso().factor(singular).solve(torch.tensor([[1.0, 2.0, 3.0]])).isnan().all())
    with pytest.raises(UnsupportedCombination, match="float64"):
        Pardiso().factor(A.to(torch.complex128))


def test_pardiso_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypardiso", None)
    with pytest.raises(InvalidInput, match="pip install pypardiso"):
        Pardiso().factor(torch.eye(3).unsqueeze(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64])
def test_umfpack(dtype):
    pytest.importorskip("scikits.umfpack")
    A = torch.stack([advection(8), 2 * advection(8)]).to(dtype)
    if dtype.is_complex:
        A = A * (1 + 0.5j * torch.rand(64, 64).to(dtype))
    b = torch.randn(2, 64, 3, dtype=dtype)
    log = Log()
    old = UMFPACK().factor(sparse(A), log)
    new = UMFPACK().refactor(old, sparse(3 * A))
    assert (log.n_factorizations, log.n_refactorizations) == (4, 2) and log.fill > sparse(A).values.numel()
    assert old.factors[0].symbolic is old.factors[1].symbolic is new.factors[1].symbolic
    close = {"rtol": 1e-3, "atol": 1e-4} if torch.finfo(dtype).bits == 32 else {}
    for factors, M in ((old, A), (new, 3 * A), (old, A)):  # old factors stay valid
        for transposed, conjugated in itertools.product([False, True], repeat=2):
            M_ = M.mT if transposed else M
            M_ = M_.conj() if conjugated else M_
            x = factors.solve(b, transposed=transposed, conjugated=conjugated)
            assert x.dtype == dtype and torch.allclose(x, torch.linalg.solve(M_, b), **close)
            one = factors.solve(b[..., 0].conj().resolve_conj().conj(), transposed=transposed, conjugated=conjugated)
            assert torch.allclose(one, x[..., 0])
    other = UMFPACK().refactor(old, sparse(torch.eye(64, dtype=dtype).unsqueeze(0)))  # another pattern, another number of rows
    assert torch.equal(other.solve(b), b)
    shared = sparse(A[:1])
    assert torch.allclose(UMFPACK().factor(SparseMatrix(shared.indices, shared.values[0], shared.shape)).solve(b)[0], old.solve(b)[0])
    assert UMFPACK().factor(torch.zeros(2, 0, 0, dtype=dtype)).solve(torch.zeros(2, 0, dtype=dtype)).shape == (2, 0)
    with pytest.raises(UnsupportedCombination, match="operator"):
        UMFPACK().factor(operator(A))


def test_umfpack_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scikits.umfpack", None)
    with pytest.raises(InvalidInput, match="pip install scikit-umfpack"):
        UMFPACK().factor(torch.eye(3).unsqueeze(0))
