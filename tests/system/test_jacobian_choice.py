"""Which Jacobian strategy is chosen for a function, and large ones."""

from __future__ import annotations

import warnings

import pytest
import torch

from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.linalg import SparseMatrix
from adjoint.linalg.sparsity import SparsityPattern, detect_pattern
from adjoint.system import jacobians_sparse
from adjoint.system.jacobians import DenseJacobian, jacobian_operator, jvp
from adjoint.system.jacobians_sparse import GivenJacobian, SparseJacobian, choose_jacobian

from ..helpers.jacobian_functions import PATTERN, RAD, points, rad, rad_jacobian, wave, wave_jacobian


def test_choice_small_is_dense():
    strategy, why = choose_jacobian(wave, points())
    assert isinstance(strategy, DenseJacobian) and "6 unknowns" in why


def test_choice_large_and_sparse():
    n = 16
    x = torch.rand(2, n * n)
    strategy, why = choose_jacobian(rad(n), x)
    assert isinstance(strategy, SparseJacobian) and "5 vjps" in why
    torch.testing.assert_close(strategy(rad(n), x).dense()[0], rad_jacobian(x[0], n), rtol=1e-12, atol=1e-10)


def test_choice_large_and_dense():
    for f in (lambda x: x + x.sum(1, keepdim=True), lambda x: x.cumsum(1)):
        strategy, why = choose_jacobian(f, torch.rand(1, 150))
        assert isinstance(strategy, DenseJacobian) and "%" in why


def test_choice_of_something_too_large(monkeypatch):
    monkeypatch.setattr(jacobians_sparse, "_TOO_LARGE", 1000)
    with pytest.raises(UnsupportedCombination, match="150 x 150"):
        choose_jacobian(lambda x: x + x.sum(1, keepdim=True), torch.rand(1, 150))


def test_choice_repairs_a_pattern_that_fails_its_check(monkeypatch):
    x = points(1, 120)
    right = detect_pattern(wave, x)
    thin = SparsityPattern(right.indices[:, ::2], right.shape)
    monkeypatch.setattr(jacobians_sparse, "detect_pattern", lambda f, x, method="auto", **_: right if method == "numeric" else thin)
    with pytest.warns(UserWarning, match="fails its check"):
        strategy, _ = choose_jacobian(wave, x)
    torch.testing.assert_close(strategy(wave, x).dense(), wave_jacobian(x))


def test_choice_of_what_is_given():
    n = 16
    f, x = rad(n), torch.rand(2, n * n)
    pattern = detect_pattern(f, x)
    for given in (pattern, pattern.to_scipy(), torch.from_numpy(pattern.to_scipy().toarray())):
        strategy, why = choose_jacobian(f, x, jac_sparsity=given)
        assert isinstance(strategy, SparseJacobian) and "given pattern" in why
    strategy, why = choose_jacobian(wave, points(), jac=wave_jacobian)
    assert isinstance(strategy, GivenJacobian) and "given" in why
    strategy, why = choose_jacobian(wave, points(), jac=wave_jacobian, jac_sparsity=PATTERN)
    assert isinstance(strategy(wave, points()), SparseMatrix) and "12 entries" in why
    with pytest.raises(InvalidInput, match="shape"):
        choose_jacobian(f, x, jac_sparsity=PATTERN)


def test_choice_with_branches_on_values():
    def f(x):
        return wave(x) if x.sum() > -1e9 else x

    with pytest.warns(UserWarning, match="cannot be traced"):
        strategy, _ = choose_jacobian(f, points(1, 120))
    assert isinstance(strategy, SparseJacobian)
    torch.testing.assert_close(strategy(f, points(1, 120)).dense(), wave_jacobian(points(1, 120)))


def test_choice_is_silent_under_no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy, _ = choose_jacobian(wave, points(2, 200))
    assert isinstance(strategy, SparseJacobian)


@pytest.mark.slow
def test_a_million_unknowns():
    n = 1000
    f, x = rad(n), torch.rand(1, n * n)
    strategy, why = choose_jacobian(f, x)
    assert isinstance(strategy, SparseJacobian) and "5 vjps" in why and strategy.pattern.nnz == 5 * n * n - 4 * n
    matrix, v = strategy(f, x), torch.randn(1, n * n)
    torch.testing.assert_close(matrix.matvec(v), jvp(f, x, v), rtol=1e-10, atol=1e-4)


@pytest.mark.cuda
def test_on_cuda():
    n = 12
    f, x = rad(n), torch.rand(2, n * n, device="cuda")
    on_device = lambda u: f(u, tuple(torch.tensor(p, device="cuda") for p in RAD))  # noqa: E731
    strategy, _ = choose_jacobian(on_device, x)
    found = strategy(on_device, x)
    assert isinstance(found, SparseMatrix) and found.values.is_cuda
    torch.testing.assert_close(found.dense()[0].cpu(), rad_jacobian(x[0].cpu(), n), rtol=1e-12, atol=1e-10)
    operator, v = jacobian_operator(on_device, x), torch.randn_like(x)
    torch.testing.assert_close(operator.matvec(v), found.matvec(v))
    torch.testing.assert_close(DenseJacobian("rows")(on_device, x), found.dense())
