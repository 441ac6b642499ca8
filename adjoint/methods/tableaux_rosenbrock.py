"""Rosenbrock methods by name, and what makes one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["RODAS3P", "RODAS4", "RODAS5P", "ROSENBROCK_TABLEAUX", "RosenbrockTableau"]

_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class RosenbrockTableau:
    """A Rosenbrock method in the form without products with the Jacobian (Hairer & Wanner, Solving ordinary differential equations II,
    section IV.7, equation 7.25).

    With ``J = f_y(t, y)`` at the start of the step, the stages are

        (I - h gamma J) K_i = gamma (f(t + c_i h, y + h sum_{j < i} a_ij K_j) + sum_{j < i} gamma_ij K_j + h d_i f_t(t, y))

    (the ``u_i`` of the book are ``h K_i``, so that ``h = 0`` is no special case), and ``y1 = y + h sum_i b_i K_i``.

    Parameters
    ----------
    name : str
        The name by which users choose the method.
    order : int
        Order of ``y1``.
    gamma : float
        The diagonal of all stages.
    a : tuple of tuples
        Row ``i`` has ``i`` entries.
    coupling : tuple of tuples
        ``gamma_ij``, shaped as ``a``: ``c_ij`` in the book.
    b : tuple of ``s`` floats
        ``m_i`` in the book.
    c, d : tuples of ``s`` floats
        ``alpha_i`` and ``gamma_i`` in the book: they must be what ``a``, ``coupling`` and ``gamma`` say (row sums), ``c[0]`` is zero.
    error : tuple of ``s`` floats
        ``b - b_hat``.
    error_order : int
        Order of the embedded solution.
    dense : tuple of tuples
        ``dense[i][m]``: the dense output is ``y + h sum_i b_i(theta) K_i`` with ``b_i(theta) = sum_m dense_im theta^(m+1)``.
    dense_order : int
    stability : str
        What is known of it, the order that is left on stiff problems included.
    source : str
    same_as
        Derived: the first stage whose value of ``f`` stage ``i`` shares. Stages with ``same_as[i] == i`` evaluate it.
    """

    name: str
    order: int
    gamma: float
    a: tuple[tuple[float, ...], ...]
    coupling: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    d: tuple[float, ...]
    error: tuple[float, ...]
    error_order: int
    dense: tuple[tuple[float, ...], ...]
    dense_order: int
    stability: str
    source: str
    same_as: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        s = len(self.b)
        for what in (self.a, self.coupling, self.c, self.d, self.error, self.dense):
            if len(what) != s:
                raise ValueError(f"{self.name}: a, coupling, c, d, error and dense must have one entry a stage")
        for rows in (self.a, self.coupling):
            if any(len(row) != i for i, row in enumerate(rows)):
                raise ValueError(f"{self.name}: row i of a and coupling has i entries")
        alpha, gamma = self.standard_form()
        scale = 1 + np.abs(gamma).max() + np.abs(alpha).max()
        if self.c[0] != 0 or np.abs(alpha.sum(1) - self.c).max() > _TOLERANCE * scale:
            raise ValueError(f"{self.name}: c must be the row sums of alpha, {alpha.sum(1)!r}")
        if np.abs(gamma.sum(1) - self.d).max() > _TOLERANCE * scale:
            raise ValueError(f"{self.name}: d must be the row sums of Gamma, {gamma.sum(1)!r}")
        if max(abs(sum(row) - w) for row, w in zip(self.dense, self.b, strict=True)) > _TOLERANCE * scale:
            raise ValueError(f"{self.name}: the dense output does not end at y1")
        points = [(c, tuple(np.trim_zeros(row, "b"))) for c, row in zip(self.c, self.a, strict=True)]
        object.__setattr__(self, "same_as", tuple(points.index(point) for point in points))

    def standard_form(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``alpha`` and ``Gamma`` of ``k_i = h f(y + sum_j alpha_ij k_j) + h J sum_j Gamma_ij k_j``, whose weights are ``b @ Gamma``."""
        a, coupling = _square(self.a), _square(self.coupling)
        gamma = np.asarray(np.linalg.inv(np.eye(len(a)) / self.gamma - coupling), dtype=np.float64)
        return a @ gamma, gamma


def _square(rows: tuple[tuple[float, ...], ...]) -> NDArray[np.float64]:
    matrix = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix


def _dense(b: tuple[float, ...], *rows: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Powers of ``theta`` in ``(1 - theta) y0 + theta (y1 + (1 - theta) sum_m theta^m sum_i rows_mi U_i)``."""
    # the first power has b + rows_0, power m + 1 has rows_m - rows_(m-1), the last one -rows_(last)
    powers = np.diff(np.array([[-w for w in b], *rows, [0.0] * len(b)]), axis=0)
    return tuple(tuple(map(float, column)) for column in powers.T)


_B3 = (2.90625, 3.375, 0.40625, 0.0, 1.0)
RODAS3P = RosenbrockTableau(
    name="rodas3p",
    order=3,
    gamma=1 / 3,
    a=((), (4 / 3,), (0.0, 0.0), _B3[:3], _B3[:4]),
    coupling=((), (-4.0,), (8.25, 6.75), (1.21875, -5.0625, -1.96875), (4.03125, -15.1875, -4.03125, 6.0)),
    b=_B3,
    c=(0.0, 4 / 9, 0.0, 1.0, 1.0),
    d=(1 / 3, -1 / 9, 1.0, 0.0, 0.0),
    error=(0.0, 0.0, 0.0, -1.0, 1.0),
    error_order=2,
    dense=_dense(_B3, (1.78125, 6.75, 0.15625, -6.0, -1.0), (4.21875, -15.1875, -3.09375, 9.0, 0.0)),
    dense_order=3,
    stability="L-stable, stiffly accurate; order 2 on the problem of Prothero & Robinson in the stiff limit",
    source="Steinebach (2024), Rosenbrock methods within OrdinaryDiffEq.jl: Overview, recent developments and applications",
)

_B4 = (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.687886036105895, 1.0, 1.0)
RODAS4 = RosenbrockTableau(
    name="rodas4",
    order=4,
    gamma=0.25,
    a=(
        (),
        (1.544,),
        (0.9466785280815826, 0.2557011698983284),
        (3.314825187068521, 2.896124015972201, 0.9986419139977817),
        _B4[:4],
        _B4[:5],
    ),
    coupling=(
        (),
        (-5.6688,),
        (-2.430093356833875, -0.2063599157091915),
        (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
        (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.7089089320616),
        (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
    ),
    b=_B4,
    c=(0.0, 0.386, 0.21, 0.63, 1.0, 1.0),
    d=(0.25, -0.1043, 0.1035, -0.0362, 0.0, 0.0),
    error=(0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    error_order=3,
    dense=_dense(
        _B4,
        (10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823, 1.025137723295662, 0.0),
        (-0.6762803392801253, 6.087714651680015, 16.43084320892478, 24.76722511418386, -6.594389125716872, 0.0),
    ),
    dense_order=3,
    stability="L-stable, stiffly accurate; order 1 on the problem of Prothero & Robinson in the stiff limit",
    source="Hairer & Wanner (1996), Solving ordinary differential equations II, section VI.4",
)

_B5 = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946, 1.0, 1.0, 1.0)
RODAS5P = RosenbrockTableau(
    name="rodas5p",
    order=5,
    gamma=0.21193756319429014,
    a=(
        (),
        (3.0,),
        (2.849394379747939, 0.45842242204463923),
        (-6.954028509809101, 2.489845061869568, -10.358996098473584),
        (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
        _B5[:5],
        _B5[:6],
        _B5[:7],
    ),
    coupling=(
        (),
        (-14.155112264123755,),
        (-17.97296035885952, -2.859693295451294),
        (147.12150275711716, -1.41221402718213, 71.68940251302358),
        (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
        (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
        (30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783, -19.097331116725623, -28.087943162872662),
        (
            37.80277123390563,
            -3.2571969029072276,
            112.26918849496327,
            66.9347231244047,
            -40.06618937091002,
            -54.66780262877968,
            -9.48861652309627,
        ),
    ),
    b=_B5,
    c=(0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0),
    d=(0.21193756319429014, -0.42387512638858027, -0.3384627126235924, 1.8046452872882734, 2.325825639765069, 0.0, 0.0, 0.0),
    error=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    error_order=4,
    dense=_dense(
        _B5,
        (
            25.948786856663858,
            -2.5579724845846235,
            10.433815404888879,
            -2.3679251022685204,
            0.524948541321073,
            1.1241088310450404,
            0.4272876194431874,
            -0.17202221070155493,
        ),
        (
            -9.91568850695171,
            -0.9689944594115154,
            3.0438037242978453,
            -24.495224566215796,
            20.176138334709044,
            15.98066361424651,
            -6.789040303419874,
            -6.710236069923372,
        ),
        (
            11.419903575922262,
            2.8879645146136994,
            72.92137995996029,
            80.12511834622643,
            -52.072871366152654,
            -59.78993625266729,
            -0.15582684282751913,
            4.883087185713722,
        ),
    ),
    dense_order=4,
    stability="L-stable, stiffly accurate; order 3 on the problem of Prothero & Robinson in the stiff limit",
    source="Steinebach (2023), Construction of Rosenbrock-Wanner method Rodas5P, BIT Numerical Mathematics 63:27",
)

#: every Rosenbrock method by its name
ROSENBROCK_TABLEAUX: dict[str, RosenbrockTableau] = {tableau.name: tableau for tableau in (RODAS3P, RODAS4, RODAS5P)}
