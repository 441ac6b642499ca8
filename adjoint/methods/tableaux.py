"""All explicit Runge-Kutta methods by name: those of low order are written here, the rest comes from ``tableaux_high``."""

from __future__ import annotations

from itertools import zip_longest

from .tableau import Tableau
from .tableaux_high import DOPRI8, VERNER7, VERNER9, fractions, lower, numbers, polynomials

__all__ = [
    "ADAPTIVE_HEUN",
    "BOSH3",
    "DOPRI5",
    "DOPRI8",
    "EULER",
    "FEHLBERG2",
    "HEUN2",
    "HEUN3",
    "MIDPOINT",
    "RK4",
    "TABLEAUX",
    "TSIT5",
    "VERNER7",
    "VERNER9",
]


def _quadratic(b: str) -> tuple[tuple[float, ...], ...]:
    """``theta k_0 + theta^2 (sum_i b_i k_i - k_0)``: the parabola through y and y1 with slope ``k_0`` at the start, of order 2."""
    return tuple((1.0, float(weight - 1)) if i == 0 else (0.0, float(weight)) for i, weight in enumerate(fractions(b)[0]))


def _hermite(b: str, bubble: str = "") -> tuple[tuple[float, ...], ...]:
    """The cubic through y and y1 with slopes ``k_0`` and the last stage, ``f(t + h, y1)``, plus ``theta^2 (1 - theta)^2 bubble``."""
    stages = [*zip_longest(fractions(b)[0], fractions(bubble)[0], fillvalue=0)]
    rows = []
    for i, (weight, extra) in enumerate(stages):
        first, last = i == 0, i == len(stages) - 1
        row = (first, 3 * weight - 2 * first - last + extra, -2 * weight + first + last - 2 * extra, extra)
        rows.append(tuple(map(float, row if bubble else row[:3])))
    return tuple(rows)


EULER = Tableau(
    name="euler",
    order=1,
    a=((),),
    b=(1.0,),
    c=(0.0,),
    dense=((1.0,),),
    dense_order=1,
    source="L. Euler, Institutiones calculi integralis (1768)",
)

MIDPOINT = Tableau(
    name="midpoint",
    order=2,
    a=lower("; 1/2"),
    b=numbers("0 1"),
    c=numbers("0 1/2"),
    dense=_quadratic("0 1"),
    dense_order=2,
    source="C. Runge, Ueber die numerische Aufloesung von Differentialgleichungen, Math. Ann. 46 (1895) 167-178",
)

HEUN2 = Tableau(
    name="heun2",
    order=2,
    a=lower("; 1"),
    b=numbers("1/2 1/2"),
    c=numbers("0 1"),
    dense=_quadratic("1/2 1/2"),
    dense_order=2,
    source="K. Heun, Neue Methoden zur approximativen Integration der Differentialgleichungen, Z. Math. Phys. 45 (1900) 23-38",
)

HEUN3 = Tableau(
    name="heun3",
    order=3,
    a=lower("; 1/3; 0 2/3"),
    b=numbers("1/4 0 3/4"),
    c=numbers("0 1/3 2/3"),
    extra_a=lower("1/4 0 3/4"),
    extra_c=(1.0,),
    dense=_hermite("1/4 0 3/4 0"),
    dense_order=3,
    source="K. Heun, Neue Methoden zur approximativen Integration der Differentialgleichungen, Z. Math. Phys. 45 (1900) 23-38",
)

RK4 = Tableau(
    name="rk4",
    order=4,
    a=lower("; 1/3; -1/3 1; 1 -1 1"),
    b=numbers("1/8 3/8 3/8 1/8"),
    c=numbers("0 1/3 2/3 1"),
    extra_a=lower("1/8 3/8 3/8 1/8"),
    extra_c=(1.0,),
    dense=_hermite("1/8 3/8 3/8 1/8 0"),
    dense_order=3,
    source="W. Kutta, Beitrag zur naeherungsweisen Integration, Z. Math. Phys. 46 (1901) 435-453: the 3/8 rule",
)

ADAPTIVE_HEUN = Tableau(
    name="adaptive_heun",
    order=2,
    a=lower("; 1"),
    b=numbers("1/2 1/2"),
    c=numbers("0 1"),
    error=numbers("1/2 1/2", minus="1 0"),
    error_order=1,
    dense=_quadratic("1/2 1/2"),
    dense_order=2,
    source="Heun's method of order 2 with Euler's as the embedded one",
)

FEHLBERG2 = Tableau(
    name="fehlberg2",
    order=2,
    a=lower("; 1/2; 1/256 255/256"),
    b=numbers("1/512 255/256 1/512"),
    c=numbers("0 1/2 1"),
    error=numbers("1/512 255/256 1/512", minus="1/256 255/256 0"),
    error_order=1,
    dense=_quadratic("1/512 255/256 1/512"),
    dense_order=2,
    source="E. Fehlberg, Low-order classical Runge-Kutta formulas with stepsize control, NASA TR R-315 (1969): RK1(2), extrapolated",
)

BOSH3 = Tableau(
    name="bosh3",
    order=3,
    a=lower("; 1/2; 0 3/4; 2/9 1/3 4/9"),
    b=numbers("2/9 1/3 4/9 0"),
    c=numbers("0 1/2 3/4 1"),
    error=numbers("2/9 1/3 4/9 0", minus="7/24 1/4 1/3 1/8"),
    error_order=2,
    dense=_hermite("2/9 1/3 4/9 0"),
    dense_order=3,
    source="P. Bogacki, L. F. Shampine, A 3(2) pair of Runge-Kutta formulas, Appl. Math. Lett. 2 (1989) 321-325; cubic Hermite dense",
)

_DOPRI5_B = "35/384 0 500/1113 125/192 -2187/6784 11/84 0"

DOPRI5 = Tableau(
    name="dopri5",
    order=5,
    a=lower(
        """;
        1/5;
        3/40 9/40;
        44/45 -56/15 32/9;
        19372/6561 -25360/2187 64448/6561 -212/729;
        9017/3168 -355/33 46732/5247 49/176 -5103/18656;
        35/384 0 500/1113 125/192 -2187/6784 11/84
        """
    ),
    b=numbers(_DOPRI5_B),
    c=numbers("0 1/5 3/10 4/5 8/9 1 1"),
    error=numbers(_DOPRI5_B, minus="5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40"),
    error_order=4,
    dense=_hermite(
        _DOPRI5_B,
        bubble="""-12715105075/11282082432 0 87487479700/32700410799 -10690763975/1880347072 701980252875/199316789632
        -1453857185/822651844 69997945/29380423""",
    ),
    dense_order=4,
    source=(
        "J. R. Dormand, P. J. Prince, A family of embedded Runge-Kutta formulae, J. Comput. Appl. Math. 6 (1980) 19-26; dense output by "
        "L. F. Shampine as in E. Hairer, S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I (1993), section II.6"
    ),
)

_TSIT5_B = """.09646076681806522951816731 .01 .4798896504144995747752495 1.379008574103741893192275 -3.290069515436080679901048
  2.324710524099773982415356 0"""

TSIT5 = Tableau(
    name="tsit5",
    order=5,
    a=lower(
        """;
        .161;
        -.008480655492356988544426874 .3354806554923569885444269;
        2.897153057105493432130433 -6.359448489975074843148160 4.362295432869581411017727;
        5.325864828439256604428878 -11.74888356406282787774717 7.495539342889836208304605 -.09249506636175524925650208;
        5.861455442946420028659251 -12.92096931784710929170612 8.159367898576158643180401 -.07158497328140099722453054
          -.02826905039406838290900306;
        .09646076681806522951816731 .01 .4798896504144995747752495 1.379008574103741893192275 -3.290069515436080679901048
          2.324710524099773982415356
        """
    ),
    b=numbers(_TSIT5_B),
    c=numbers("0 .161 .327 .9 .9800255409045096857298103 1 1"),
    error=numbers(
        _TSIT5_B,
        minus=""".09468075576583945807478876 .009183565540343253096776364 .4877705284247615707855643 1.234297566930478985655110
        -2.707712349983525454881110 1.866628418170587035753719 1/66""",
    ),
    error_order=4,
    dense=polynomials(
        """
        1 -2.7637061972748258687 2.9132554618219126554 -1.0530884977290215572;
        0 .1317 -.2234 .1017;
        0 3.9302962368947515175 -5.9410338721315047358 2.4906272856512527931;
        0 -12.41107716693367704 30.338188630282321652 -16.548102889244902719;
        0 37.509313416511039183 -88.178904894766401086 47.379521962819281223;
        0 -27.896526289197287792 65.091894674793671514 -34.87065786149660974;
        0 1.5 -4 2.5
        """
    ),
    dense_order=4,
    source=(
        "C. Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption, "
        "Comput. Math. Appl. 62 (2011) 770-775; his free dense output, expanded in powers"
    ),
)

TABLEAUX: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER, MIDPOINT, HEUN2, HEUN3, RK4,
        ADAPTIVE_HEUN, FEHLBERG2, BOSH3, TSIT5, DOPRI5, DOPRI8, VERNER7, VERNER9,
    )
}  # fmt: skip
