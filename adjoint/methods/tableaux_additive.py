"""All additive Runge-Kutta methods by name."""

from __future__ import annotations

from math import sqrt

from .additive import AdditiveTableau, Rows, continuous_weights

__all__ = ["ADDITIVE_TABLEAUX", "ARS232", "ARS443", "KENCARP3", "KENCARP4", "KENCARP5"]


def _kencarp(
    name: str,
    stages: str,
    order: int,
    explicit_a: Rows,
    implicit_a: Rows,
    c: tuple[float, ...],
    embedded: tuple[float, ...],
) -> AdditiveTableau:
    """Both parts share their weights, which are the last row of the implicit one; so do the embedded solutions."""
    b = implicit_a[-1]
    difference = tuple(x - y for x, y in zip(b, embedded, strict=True))
    weights = continuous_weights(explicit_a, implicit_a, b, 3, 3)
    return AdditiveTableau(
        name=name,
        order=order,
        explicit_a=explicit_a,
        implicit_a=implicit_a,
        explicit_b=b,
        implicit_b=b,
        c=c,
        error=(*difference, *difference),
        error_order=order - 1,
        dense=(*weights, *weights),
        dense_order=3,
        stability="L-stable, stiffly accurate",
        source=f"Kennedy & Carpenter (2003), Additive Runge-Kutta schemes for convection-diffusion-reaction equations, {stages}; "
        "dense output: here",
    )


def _kencarp3() -> AdditiveTableau:
    g = 1767732205903 / 4055673282236
    explicit_a = (
        (),
        (1767732205903 / 2027836641118,),
        (5535828885825 / 10492691773637, 788022342437 / 10882634858940),
        (6485989280629 / 16251701735622, -4246266847089 / 9704473918619, 10755448449292 / 10357097424841),
    )
    implicit_a = (
        (0.0,),
        (g, g),
        (2746238789719 / 10658868560708, -640167445237 / 6845629431997, g),
        (1471266399579 / 7840856788654, -4482444167858 / 7529755066697, 11266239266428 / 11593286722821, g),
    )
    embedded = (
        2756255671327 / 12835298489170,
        -10771552573575 / 22201958757719,
        9247589265047 / 10645013368117,
        2193209047091 / 5459859503100,
    )
    c = (0.0, 1767732205903 / 2027836641118, 0.6, 1.0)
    return _kencarp("kencarp3", "ARK3(2)4L[2]SA", 3, explicit_a, implicit_a, c, embedded)


def _kencarp4() -> AdditiveTableau:
    g = 0.25
    explicit_a = (
        (),
        (0.5,),
        (13861 / 62500, 6889 / 62500),
        (-116923316275 / 2393684061468, -2731218467317 / 15368042101831, 9408046702089 / 11113171139209),
        (
            -451086348788 / 2902428689909,
            -2682348792572 / 7519795681897,
            12662868775082 / 11960479115383,
            3355817975965 / 11060851509271,
        ),
        (
            647845179188 / 3216320057751,
            73281519250 / 8382639484533,
            552539513391 / 3454668386233,
            3354512671639 / 8306763924573,
            4040 / 17871,
        ),
    )
    implicit_a = (
        (0.0,),
        (g, g),
        (8611 / 62500, -1743 / 31250, g),
        (5012029 / 34652500, -654441 / 2922500, 174375 / 388108, g),
        (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912, g),
        (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211, g),
    )
    embedded = (
        4586570599 / 29645900160,
        0.0,
        178811875 / 945068544,
        814220225 / 1159782912,
        -3700637 / 11593932,
        61727 / 225920,
    )
    c = (0.0, 0.5, 0.332, 0.62, 0.85, 1.0)
    return _kencarp("kencarp4", "ARK4(3)6L[2]SA", 4, explicit_a, implicit_a, c, embedded)


def _kencarp5() -> AdditiveTableau:
    g = 0.205
    explicit_a = (
        (),
        (0.41,),
        (367902744464 / 2072280473677, 677623207551 / 8224143866563),
        (1268023523408 / 10340822734521, 0.0, 1029933939417 / 13636558850479),
        (14463281900351 / 6315353703477, 0.0, 66114435211212 / 5879490589093, -54053170152839 / 4284798021562),
        (
            14090043504691 / 34967701212078,
            0.0,
            15191511035443 / 11219624916014,
            -18461159152457 / 12425892160975,
            -281667163811 / 9011619295870,
        ),
        (
            19230459214898 / 13134317526959,
            0.0,
            21275331358303 / 2942455364971,
            -38145345988419 / 4862620318723,
            -0.125,
            -0.125,
        ),
        (
            -19977161125411 / 11928030595625,
            0.0,
            -40795976796054 / 6384907823539,
            177454434618887 / 12078138498510,
            782672205425 / 8267701900261,
            -69563011059811 / 9646580694205,
            7356628210526 / 4942186776405,
        ),
    )
    implicit_a = (
        (0.0,),
        (g, g),
        (41 / 400, -567603406766 / 11931857230679, g),
        (683785636431 / 9252920307686, 0.0, -110385047103 / 1367015193373, g),
        (3016520224154 / 10081342136671, 0.0, 30586259806659 / 12414158314087, -22760509404356 / 11113319521817, g),
        (
            218866479029 / 1489978393911,
            0.0,
            638256894668 / 5436446318841,
            -1179710474555 / 5321154724896,
            -60928119172 / 8023461067671,
            g,
        ),
        (
            1020004230633 / 5715676835656,
            0.0,
            25762820946817 / 25263940353407,
            -2161375909145 / 9755907335909,
            -211217309593 / 5846859502534,
            -4269925059573 / 7827059040749,
            g,
        ),
        (
            -872700587467 / 9133579230613,
            0.0,
            0.0,
            22348218063261 / 9555858737531,
            -1143369518992 / 8141816002931,
            -39379526789629 / 19018526304540,
            32727382324388 / 42900044865799,
            g,
        ),
    )
    embedded = (
        -975461918565 / 9796059967033,
        0.0,
        0.0,
        78070527104295 / 32432590147079,
        -548382580838 / 3424219808633,
        -33438840321285 / 15594753105479,
        3629800801594 / 4656183773603,
        4035322873751 / 18575991585200,
    )
    c = (0.0, 0.41, 2935347310677 / 11292855782101, 1426016391358 / 7196633302097, 0.92, 0.24, 0.6, 1.0)
    return _kencarp("kencarp5", "ARK5(4)8L[2]SA", 5, explicit_a, implicit_a, c, embedded)


_ARS = (
    "Ascher, Ruuth & Spiteri (1997), Implicit-explicit Runge-Kutta methods for time-dependent partial differential equations; "
    "dense output: here"
)


def _ars232() -> AdditiveTableau:
    g = 1 - sqrt(2) / 2
    d = -2 * sqrt(2) / 3
    explicit_a = ((), (g,), (d, 1 - d))
    implicit_a = ((0.0,), (0.0, g), (0.0, 1 - g, g))
    b = (0.0, 1 - g, g)
    weights = continuous_weights(explicit_a, implicit_a, b, 2, 2)
    return AdditiveTableau(
        name="ars232",
        order=2,
        explicit_a=explicit_a,
        implicit_a=implicit_a,
        explicit_b=b,
        implicit_b=b,
        c=(0.0, g, 1.0),
        dense=(*weights, *weights),
        dense_order=2,
        stability="L-stable, stiffly accurate",
        source=_ARS,
    )


def _ars443() -> AdditiveTableau:
    explicit_a = ((), (1 / 2,), (11 / 18, 1 / 18), (5 / 6, -5 / 6, 1 / 2), (1 / 4, 7 / 4, 3 / 4, -7 / 4))
    implicit_a = (
        (0.0,),
        (0.0, 1 / 2),
        (0.0, 1 / 6, 1 / 2),
        (0.0, -1 / 2, 1 / 2, 1 / 2),
        (0.0, 3 / 2, -3 / 2, 1 / 2, 1 / 2),
    )
    explicit_b = (1 / 4, 7 / 4, 3 / 4, -7 / 4, 0.0)
    implicit_b = implicit_a[-1]
    return AdditiveTableau(
        name="ars443",
        order=3,
        explicit_a=explicit_a,
        implicit_a=implicit_a,
        explicit_b=explicit_b,
        implicit_b=implicit_b,
        c=(0.0, 1 / 2, 2 / 3, 1 / 2, 1.0),
        dense=tuple(x for b in (explicit_b, implicit_b) for x in continuous_weights(explicit_a, implicit_a, b, 2, 2)),
        dense_order=2,
        stability="L-stable, stiffly accurate",
        source=_ARS,
    )


KENCARP3, KENCARP4, KENCARP5, ARS232, ARS443 = _kencarp3(), _kencarp4(), _kencarp5(), _ars232(), _ars443()

ADDITIVE_TABLEAUX = {t.name: t for t in (KENCARP3, KENCARP4, KENCARP5, ARS232, ARS443)}
