"""Every tableau holds the order conditions that it claims, and no more: the solution, the embedded one and the dense output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adjoint.methods.tableau import Tableau
from adjoint.methods.tableaux import BOSH3, DOPRI5, RK4, TABLEAUX

from ..helpers.rooted_trees import density, elementary_weights, inverse_densities, order, symmetry, trees

Array = NDArray[np.float64]

METHODS = list(TABLEAUX.values())
ADAPTIVE = [tableau for tableau in METHODS if tableau.error is not None]
#: order, embedded order, order of the dense output; stages, extra stages; first same as last, first extra stage f(t + h, y1)
EXPECTED: dict[str, tuple[int, int | None, int, int, int, bool, bool]] = {
    "euler": (1, None, 1, 1, 0, False, False),
    "midpoint": (2, None, 2, 2, 0, False, False),
    "heun2": (2, None, 2, 2, 0, False, False),
    "heun3": (3, None, 3, 3, 1, False, True),
    "rk4": (4, None, 3, 4, 1, False, True),
    "adaptive_heun": (2, 1, 2, 2, 0, False, False),
    "fehlberg2": (2, 1, 2, 3, 0, False, False),
    "bosh3": (3, 2, 3, 4, 0, True, False),
    "tsit5": (5, 4, 4, 7, 0, True, False),
    "dopri5": (5, 4, 4, 7, 0, True, False),
    "dopri8": (8, 7, 7, 13, 4, False, True),
    "verner7": (7, 6, 7, 10, 6, False, True),
    "verner9": (9, 8, 9, 16, 10, False, True),
}
THETAS = (0.13, 0.37, 0.62, 0.91)

named = pytest.mark.parametrize("tableau", METHODS, ids=lambda tableau: tableau.name)
adaptive = pytest.mark.parametrize("tableau", ADAPTIVE, ids=lambda tableau: tableau.name)


def square(tableau: Tableau) -> Array:
    """The matrix of all stages, extra stages included."""
    rows = (*tableau.a, *tableau.extra_a)
    a = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    return a


def padded(weights: tuple[float, ...], n: int) -> Array:
    """These weights, zeros for the other of the ``n`` stages."""
    return np.concatenate([weights, np.zeros(n - len(weights))])


def defects(a: Array, weights: Array, n: int, theta: float = 1.0, scale: float = 1.0) -> Array:
    """For each order up to ``n`` the largest violation of its conditions; ``scale`` is the size of the numbers behind ``weights``."""
    found = []
    for k, phi in enumerate(elementary_weights(a, n), 1):
        size = np.maximum(1.0, np.abs(phi) @ np.abs(weights)) * scale
        found.append(np.max(np.abs(phi @ weights - theta**k * inverse_densities(k)) / size))
    return np.array(found)


def check(found: Array, attained: int) -> None:
    """All conditions up to the order attained hold, one of the next order does not."""
    assert len(found) == attained + 1
    assert found[:-1].max() < 1e-12
    assert found[-1] > 1e-9


def test_trees() -> None:
    assert [len(set(trees(n))) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert {order(tree) for tree in trees(7)} == {7}
    for n in range(1, 8):
        # each tree counts n! / (symmetry * density) ways to grow it, one vertex after another: (n - 1)! in all
        ways = sum(np.prod(range(1, n + 1), dtype=int) / (symmetry(tree) * density(tree)) for tree in trees(n))
        assert ways == pytest.approx(np.prod(range(1, n), dtype=int))
    a = np.array([[0.0, 0.0], [0.5, 0.0]])
    assert [phi.tolist() for phi in elementary_weights(a, 3)] == [[[1, 1]], [[0, 0.5]], [[0, 0], [0, 0.25]]]


def test_names() -> None:
    found: dict[str, Any] = {
        name: (t.order, t.error_order, t.dense_order, t.n_stages, len(t.extra_c), t.fsal, t.extra_is_next_first)
        for name, t in TABLEAUX.items()
    }
    assert found == EXPECTED
    assert all(tableau.name == name and tableau.source for name, tableau in TABLEAUX.items())


@named
def test_solution(tableau: Tableau) -> None:
    a = square(tableau)
    check(defects(a, padded(tableau.b, len(a)), tableau.order + 1), tableau.order)


@adaptive
def test_embedded_solution(tableau: Tableau) -> None:
    assert tableau.error is not None
    assert tableau.error_order is not None
    a = square(tableau)
    embedded = padded(tableau.b, len(a)) - padded(tableau.error, len(a))
    check(defects(a, embedded, tableau.error_order + 1), tableau.error_order)
    assert abs(sum(tableau.error)) < 1e-15
    assert np.abs(tableau.error).max() > 1e-3


@named
def test_dense_output(tableau: Tableau) -> None:
    a, dense = square(tableau), np.array(tableau.dense)
    attained = tableau.dense_order
    found = []
    for theta in THETAS:
        powers = theta ** np.arange(1, dense.shape[1] + 1)
        scale = max(1.0, np.max(np.abs(dense) @ powers))
        found.append(defects(a, dense @ powers, attained + 1, theta, scale))
    for line in found:
        assert line[:-1].max() < 1e-14
    check(np.max(found, axis=0), attained)


@named
def test_dense_output_joins_smoothly(tableau: Tableau) -> None:
    """It ends at y1 and starts with the slope f(t, y); where ``f(t + h, y1)`` is a stage, this is the slope at the end."""
    a, dense = square(tableau), np.array(tableau.dense)
    size = max(1.0, np.abs(dense).max())
    np.testing.assert_allclose(dense.sum(1), padded(tableau.b, len(a)), rtol=0, atol=1e-15 * size)
    np.testing.assert_array_equal(dense[:, 0], np.eye(len(a))[0])
    if tableau.fsal or tableau.extra_is_next_first:
        end = tableau.n_stages - 1 if tableau.fsal else tableau.n_stages
        np.testing.assert_allclose(dense @ np.arange(1, dense.shape[1] + 1), np.eye(len(a))[end], rtol=0, atol=1e-14 * size)


@named
def test_weights_are_moderate(tableau: Tableau) -> None:
    """Rounding errors of the stages are not blown up: by less than 20 in the step, by less than 4 in the dense output."""
    dense = np.array(tableau.dense)
    powers = np.linspace(0, 1, 51)[:, None] ** np.arange(1, dense.shape[1] + 1)
    assert np.abs(tableau.b).sum() < 20
    assert np.abs(powers @ dense.T).sum(1).max() < max(4.0, 1.01 * np.abs(tableau.b).sum())


@named
def test_nodes(tableau: Tableau) -> None:
    nodes = np.array((*tableau.c, *tableau.extra_c))
    assert nodes[0] == 0
    assert nodes.min() >= 0
    assert nodes.max() <= 1
    a = square(tableau)
    np.testing.assert_allclose(a.sum(1), nodes, rtol=0, atol=1e-14 * max(1.0, np.abs(a).sum(1).max()))


@pytest.mark.parametrize(
    ("tableau", "changes", "message"),
    [
        (BOSH3, {"c": (0.0, 0.5, 0.75)}, "one entry a stage"),
        (RK4, {"extra_a": ()}, "one entry a stage"),
        (BOSH3, {"a": ((), (0.5, 0.0), *BOSH3.a[2:])}, "has 2 entries"),
        (BOSH3, {"a": ((), (0.5 + 1e-9,), *BOSH3.a[2:])}, "its node is"),
        (RK4, {"extra_c": (0.9,)}, "its node is"),
        (BOSH3, {"b": (2 / 9, 1 / 3, 4 / 9, 1e-9)}, "not to 1"),
        (BOSH3, {"error": None}, "come together"),
        (RK4, {"error_order": 3}, "come together"),
        (BOSH3, {"error": (0.1, -0.1)}, "error has 2 entries"),
        (DOPRI5, {"error": (*(DOPRI5.error or ()), 0.0)}, "needs f"),
        (BOSH3, {"dense": BOSH3.dense[:-1]}, "rows of one length"),
        (BOSH3, {"dense": (*BOSH3.dense[:-1], (0.0,))}, "rows of one length"),
        (BOSH3, {"dense": (*BOSH3.dense[:-1], (0.0, -1.0, 1.0 + 1e-6))}, "does not end at y1"),
    ],
)
def test_bad_tableaux_are_refused(tableau: Tableau, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tableau, **changes)
