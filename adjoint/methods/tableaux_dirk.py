"""All diagonally implicit Runge-Kutta methods by name."""

from __future__ import annotations

from math import sqrt

from .dirk import DirkTableau, continuous_extension

__all__ = ["DIRK_TABLEAUX", "IMPLICIT_EULER", "KVAERNO3", "KVAERNO5", "SDIRK2", "TRAPEZOID", "TRBDF2"]

IMPLICIT_EULER = DirkTableau(
    name="implicit_euler",
    order=1,
    # the explicit first stage serves the error estimate: half the difference to the trapezoidal rule
    a=((0.0,), (0.0, 1.0)),
    b=(0.0, 1.0),
    c=(0.0, 1.0),
    error=(-0.5, 0.5),
    error_order=1,
    dense=((0.0,), (1.0,)),
    dense_order=1,
    stability="L-stable, B-stable",
    source="L. Euler; error estimate: half the difference to the trapezoidal rule",
)

TRAPEZOID = DirkTableau(
    name="trapezoid",
    order=2,
    a=((0.0,), (0.5, 0.5)),
    b=(0.5, 0.5),
    c=(0.0, 1.0),
    error=(0.5, -0.5),
    error_order=1,
    dense=((1.0, -0.5), (0.0, 0.5)),
    dense_order=2,
    stability="A-stable",
    source="Crank & Nicolson (1947); error estimate: the difference to the implicit Euler method",
)


def _sdirk2() -> DirkTableau:
    gamma = 1 - sqrt(2) / 2
    a, b = ((gamma,), (1 - gamma, gamma)), (1 - gamma, gamma)
    return DirkTableau(
        name="sdirk2",
        order=2,
        a=a,
        b=b,
        c=(gamma, 1.0),
        error=(0.5 - gamma, gamma - 0.5),
        error_order=1,
        dense=continuous_extension(a, b, 2, 2, smooth=False),
        dense_order=2,
        stability="L-stable",
        source="Alexander (1977), Diagonally implicit Runge-Kutta methods for stiff ODEs; embedded weights 1/2, 1/2",
    )


def _trbdf2() -> DirkTableau:
    gamma, w = 2 - sqrt(2), sqrt(2) / 4
    d = gamma / 2
    a, b = ((0.0,), (d, d), (w, w, d)), (w, w, d)
    embedded = ((1 - w) / 3, (3 * w + 1) / 3, d / 3)
    return DirkTableau(
        name="trbdf2",
        order=2,
        a=a,
        b=b,
        c=(0.0, gamma, 1.0),
        error=tuple(x - y for x, y in zip(b, embedded, strict=True)),
        # the embedded solution has order 3: the estimate is that of the method itself
        error_order=2,
        dense=continuous_extension(a, b, 2, 3, smooth=True),
        dense_order=2,
        stability="L-stable",
        source="Bank et al. (1985); as an ESDIRK pair: Hosea & Shampine (1996), Analysis and implementation of TR-BDF2",
    )


def _kvaerno3() -> DirkTableau:
    g = 0.4358665215084589994160194511935568425  # root of g^3 - 3 g^2 + 3/2 g - 1/6
    a31, a32 = (-4 * g**2 + 6 * g - 1) / (4 * g), (-2 * g + 1) / (4 * g)
    a41, a42, a43 = (6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g**2 + 6 * g - 1) / (6 * g - 3)
    a = ((0.0,), (g, g), (a31, a32, g), (a41, a42, a43, g))
    return _kvaerno("kvaerno3", 3, a, (0.0, 2 * g, 1.0, 1.0), 3, 3)


def _kvaerno5() -> DirkTableau:
    g = 0.26
    a = (
        (0.0,),
        (g, g),
        (0.13, 0.84033320996790809, g),
        (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, g),
        (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, g),
        (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, g),
        (0.13659751177640291, 0.0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728, g),
    )
    return _kvaerno("kvaerno5", 5, a, (0.0, 0.52, 1.23033320996790809, 0.8957659843500759, 0.43639360985864756, 1.0, 1.0), 4, 4)


def _kvaerno(name: str, order: int, a: tuple, c: tuple[float, ...], dense_order: int, degree: int) -> DirkTableau:
    b = a[-1]
    embedded = (*a[-2], 0.0)
    return DirkTableau(
        name=name,
        order=order,
        a=a,
        b=b,
        c=c,
        error=tuple(x - y for x, y in zip(b, embedded, strict=True)),
        error_order=order - 1,
        dense=continuous_extension(a, b, dense_order, degree, smooth=True),
        dense_order=dense_order,
        stability="A-stable, stiffly accurate (L-stable); the embedded solution too",
        source="Kvaerno (2004), Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT 44; dense output: here",
    )


SDIRK2, TRBDF2, KVAERNO3, KVAERNO5 = _sdirk2(), _trbdf2(), _kvaerno3(), _kvaerno5()

DIRK_TABLEAUX = {t.name: t for t in (IMPLICIT_EULER, TRAPEZOID, SDIRK2, TRBDF2, KVAERNO3, KVAERNO5)}
