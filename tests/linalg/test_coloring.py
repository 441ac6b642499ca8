"""Colourings: always valid, as small as is known to be possible for stencils, quick for large matrices."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adjoint.errors import InvalidInput
from adjoint.linalg.coloring import Coloring, color_columns, color_pattern, color_rows
from adjoint.linalg.sparsity import SparsityPattern

ORDERS = ["natural", "largest_first", "smallest_last", "best"]


def is_valid(coloring, pattern):
    """By a loop over rows: no colour twice in any of them."""
    matrix = pattern.to_scipy().tocsc() if coloring.by_rows else pattern.to_scipy()
    colors = coloring.colors.numpy()
    assert colors.shape == (pattern.shape[0 if coloring.by_rows else 1],)
    assert colors.size == 0 or (colors.min() >= 0 and colors.max() < coloring.n_colors)
    lines = [matrix.indices[a:b] for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)]
    return all(len(set(colors[line])) == len(line) for line in lines)


@st.composite
def patterns(draw):
    m, n = draw(st.integers(1, 25)), draw(st.integers(1, 25))
    density, seed = draw(st.floats(0, 0.6)), draw(st.integers(0, 2**31))
    return SparsityPattern.from_dense(np.random.default_rng(seed).random((m, n)) < density)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(patterns(), st.sampled_from(ORDERS))
def test_no_two_lines_of_one_colour_meet(pattern, order):
    matrix = pattern.to_scipy()
    for coloring, across in ((color_columns(pattern, order), matrix), (color_rows(pattern, order), matrix.T.tocsr())):
        assert is_valid(coloring, pattern)
        assert coloring.valid(pattern)
        assert coloring.n_colors >= np.diff(across.indptr).max()
    assert is_valid(color_pattern(pattern), pattern)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(patterns())
def test_merged_colours_are_seen_to_be_wrong(pattern):
    coloring = color_columns(pattern)
    if np.diff(pattern.to_scipy().indptr).max() > 1:
        merged = Coloring(torch.zeros_like(coloring.colors), 1)
        assert not merged.valid(pattern) and not is_valid(merged, pattern)


def banded(n, offsets):
    return SparsityPattern.from_scipy(sp.diags_array([np.ones(n - abs(k)) for k in offsets], offsets=offsets, shape=(n, n)))


def grid(*sizes, periodic=False, diagonal=False):
    """Stencil of nearest neighbours (with the diagonal ones if asked for)."""

    def one(n):
        a = sp.diags_array([np.ones(n - 1), np.ones(n), np.ones(n - 1)], offsets=[-1, 0, 1]).tolil()
        if periodic:
            a[0, n - 1] = a[n - 1, 0] = 1
        return sp.csr_array(a)

    total = None
    for axis in range(len(sizes)):
        term = sp.csr_array(np.ones((1, 1)))
        for k, n in enumerate(sizes):
            term = sp.csr_array(sp.kron(term, one(n) if k == axis or diagonal else sp.eye_array(n)))
        total = term if total is None else total + term
    return SparsityPattern.from_scipy(total)


@pytest.mark.parametrize(
    "pattern, colors",
    [
        (banded(50, [-1, 0, 1]), 3),
        (banded(50, [-2, -1, 0, 1, 2]), 5),
        (banded(50, [0, 3]), 2),
        (banded(50, [0]), 1),
        (grid(12, 13), 5),
        (grid(64, 64), 5),
        (grid(7, 8, 9), 7),
        (grid(11, 12, diagonal=True), 9),
        (grid(10, 15, periodic=True), 5),
        (SparsityPattern.from_dense(np.ones((4, 6))), 6),
        (SparsityPattern.from_dense(np.zeros((4, 6))), 1),
    ],
)
def test_the_fewest_possible_colours(pattern, colors):
    coloring = color_columns(pattern)
    assert coloring.n_colors == colors
    assert is_valid(coloring, pattern)


def test_two_species_on_a_grid():
    five = grid(10, 10).to_scipy().astype(float)
    coupled = SparsityPattern.from_scipy(sp.block_array([[five, sp.eye_array(100)], [sp.eye_array(100), five]]))
    coloring = color_columns(coupled)
    assert is_valid(coloring, coupled) and coloring.n_colors <= 9


def arrow(n):
    mask = np.eye(n, dtype=bool)
    mask[0] = True
    return SparsityPattern.from_dense(mask)


def test_rows_are_coloured_where_they_win():
    by_rows, by_columns = color_pattern(arrow(30)), color_pattern(arrow(30).transpose())
    assert by_rows.by_rows and by_rows.n_colors == 2
    assert not by_columns.by_rows and by_columns.n_colors == 2
    assert is_valid(by_rows, arrow(30)) and is_valid(by_columns, arrow(30).transpose())


def test_empty_and_wrong():
    empty = SparsityPattern(torch.zeros(2, 0, dtype=torch.int64), (3, 0))
    assert color_columns(empty).n_colors == 0
    with pytest.raises(InvalidInput, match="order='random'"):
        color_columns(arrow(4), "random")
    with pytest.raises(InvalidInput, match="cyclic"):
        color_columns(SparsityPattern.from_dense(np.random.default_rng(0).random((60, 60)) < 0.7), "cyclic")


@pytest.mark.parametrize("order", ["natural", "best"])
def test_large_grids_are_quick(order):
    pattern = grid(300, 333)
    start = time.perf_counter()
    coloring = color_columns(pattern, order)
    assert time.perf_counter() - start < 10
    assert coloring.valid(pattern) and coloring.n_colors <= 10


def test_large_random_matrix():
    random = SparsityPattern.from_scipy(sp.random_array((20_000, 20_000), density=2e-4, rng=np.random.default_rng(0)))
    coloring = color_columns(random)
    assert is_valid(coloring, random)
    assert coloring.n_colors <= 3 * np.diff(random.to_scipy().indptr).max()
