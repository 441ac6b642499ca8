# %% [markdown]
# Six parameters of a reaction, advection and diffusion from scattered measurements
#
# A substance enters the unit square near (0.35, 0.6), is carried by a wind, spreads, and is consumed by a saturating reaction:
#     D lap u - v . grad u + a exp(-|x - (0.35, 0.6)|^2 / 0.02) - k u^2 / (K + u) = 0,   u = 0 on the border.
# The steady concentration is measured at scattered points, with noise. The measurements are synthetic: they are computed here, with known
# parameters, on a finer grid than that of the model. Newton's method with exact Hessians finds the parameters; the Hessian at the
# end gives their uncertainty, and that of the whole predicted field. On 256 x 256 points all derivatives at one set of parameters come
# from one sparse factorisation; nothing about the sparsity is told to the solver, it finds it.

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adjoint import SteadyStateObjective, solve_root

NAMES = ["log D", "v x", "v y", "log k", "log K", "log a"]
PRIOR_MEAN = torch.tensor([math.log(0.05), 0.5, -0.3, math.log(2.0), math.log(0.3), math.log(20.0)], dtype=torch.float64)
# a steady field does not change if all rates grow by one factor: the inflow is metered, to 3 %
PRIOR_STD = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.03], dtype=torch.float64)
TRUTH = PRIOR_MEAN + torch.tensor([-0.4, 0.45, 0.5, 0.35, -0.4, 0.04], dtype=torch.float64)
NOISE = 0.02


# %%
def axis(n: int) -> Tensor:
    """Coordinates of the ``n`` interior points of one direction."""
    return torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)


class Model:
    """Central differences on ``n x n`` interior points; fields are ``(n, n)``, y first."""

    def __init__(self, n: int) -> None:
        self.h = 1 / (n + 1)
        y, x = torch.meshgrid(axis(n), axis(n), indexing="ij")
        self.inflow = torch.exp(-((x - 0.35).square() + (y - 0.6).square()) / 0.02)

    def __call__(self, u: Tensor, p: Tensor) -> Tensor:
        """What is zero in the steady state: the rate of change of ``u``."""
        D, wind_x, wind_y, k, K, a = p[0].exp(), p[1], p[2], p[3].exp(), p[4].exp(), p[5].exp()
        w = pad(u, (1, 1, 1, 1))
        west, east, south, north = w[1:-1, :-2], w[1:-1, 2:], w[:-2, 1:-1], w[2:, 1:-1]
        spread = D * (west + east + south + north - 4 * u) / self.h**2
        drift = (wind_x * (east - west) + wind_y * (north - south)) / (2 * self.h)
        # u^2 / (K + u), continued to negative u, through which an iteration may pass, as an increasing function without a pole
        consumed = k * u * u.abs() / (K + u.abs())
        return spread - drift + a * self.inflow - consumed


def interpolate(u: Tensor, points: Tensor) -> Tensor:
    """The bilinear interpolant of a field at ``points`` (M, 2), given as (x, y)."""
    n = u.shape[0]
    place = points * (n + 1)
    low = place.floor().long().clamp(0, n)
    part = place - low
    w = pad(u, (1, 1, 1, 1)).reshape(-1)
    corners = [(low[:, 1] + j) * (n + 2) + low[:, 0] + i for j in (0, 1) for i in (0, 1)]
    weights = [(part[:, 1] if j else 1 - part[:, 1]) * (part[:, 0] if i else 1 - part[:, 0]) for j in (0, 1) for i in (0, 1)]
    return sum((weight * w[corner] for weight, corner in zip(weights, corners, strict=True)), points.new_zeros(len(points)))


class Data(NamedTuple):
    """Where and what was measured, and the field that nobody sees."""

    points: Tensor
    values: Tensor
    field: Tensor


def measure(n: int, count: int) -> Data:
    """Synthetic measurements with noise, from a finer grid."""
    fine = n + n // 2
    with torch.no_grad():
        field = solve_root(Model(fine), torch.zeros(fine, fine, dtype=torch.float64), (TRUTH,)).x
    generator = torch.Generator().manual_seed(1)
    points = 0.02 + 0.96 * torch.rand(count, 2, dtype=torch.float64, generator=generator)
    values = interpolate(field, points) + NOISE * torch.randn(count, dtype=torch.float64, generator=generator)
    return Data(points, values, field)


# %%
class Fit(NamedTuple):
    """The most probable parameters, their covariance, the field and its standard deviation, and the objective after every iteration."""

    p: Tensor
    covariance: Tensor
    field: Tensor
    std: Tensor
    history: list[float]


def posterior(n: int, data: Data) -> SteadyStateObjective:
    """The negative logarithm of the posterior density: Gaussian noise, and a wide Gaussian prior."""

    def f(u: Tensor, p: Tensor) -> Tensor:
        misfit = (interpolate(u, data.points) - data.values) / NOISE
        return (misfit.square().sum() + ((p - PRIOR_MEAN) / PRIOR_STD).square().sum()) / 2

    return SteadyStateObjective(f, Model(n), torch.zeros(n, n, dtype=torch.float64))


def fit(objective: SteadyStateObjective) -> Fit:
    """Minimise, and spread the uncertainty of the parameters over the field."""
    history = [float(objective.value(PRIOR_MEAN))]

    def note(intermediate_result: Any) -> None:
        history.append(float(intermediate_result.fun))

    result = objective.minimize(PRIOR_MEAN, "trust-exact", callback=note, options={"gtol": 1e-4})
    assert result.success, result.message
    covariance = objective.laplace(result.p).covariance
    # S = du/dp is known from the Hessian. Row by row: the field has far too many points for its whole covariance S C S*
    S = objective.state_jacobian(result.p)
    std = ((S @ covariance) * S).sum(-1).sqrt()
    return Fit(result.p, covariance, objective.state(result.p), std, history)


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures", n: int | None = None) -> float:
    """Measure, fit, draw. Returns the largest error of a parameter in standard errors."""
    n = n or (32 if quick else 256)
    begin = time.perf_counter()
    data = measure(n, 300)
    measured = time.perf_counter()
    objective = posterior(n, data)
    found = fit(objective)
    seconds = time.perf_counter() - measured
    errors = found.covariance.diagonal().sqrt()
    print(f"{n} x {n} = {n * n} unknowns, {len(data.values)} synthetic measurements (made in {measured - begin:.1f} s)\n")
    print("parameter   truth   start   found   standard error")
    for row in zip(NAMES, TRUTH, PRIOR_MEAN, found.p, errors, strict=True):
        print(f"{row[0]:9s} {row[1]:7.3f} {row[2]:7.3f} {row[3]:7.3f} {row[4]:10.3f}")
    stats = objective.stats
    worst = float(((found.p - TRUTH) / errors).abs().max())
    chi2 = float((((interpolate(found.field, data.points) - data.values) / NOISE).square()).mean())
    print(f"\nlargest error: {worst:.1f} standard errors; mean square of the scaled residuals: {chi2:.2f}")
    print(
        f"{len(found.history) - 1} iterations, {stats.n_states} steady states, {stats.n_newton} Newton steps,\n"
        f"{stats.n_factorizations} sparse factorisations ({stats.log.factor_seconds:.1f} s), "
        f"{stats.n_solves} right-hand sides ({stats.log.solve_seconds:.1f} s); {seconds:.1f} s in all"
    )
    path = draw(data, found, Path(out))
    print(f"figure: {path}")
    assert worst < 4 and 0.7 < chi2 < 1.3
    return worst


# %%
def draw(data: Data, found: Fit, out: Path) -> Path:
    """The field and where it was measured, what is left over, how sure the field is and how wrong, the parameters, the iteration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = len(found.field)
    truth = interpolate(data.field, torch.cartesian_prod(axis(n), axis(n)).flip(1)).reshape(n, n)
    scaled = (data.values - interpolate(found.field, data.points)) / NOISE
    error = (found.field - truth).abs()
    square = (0.0, 1.0, 0.0, 1.0)
    fig, ((a, b, c), (d, e, g)) = plt.subplots(2, 3, figsize=(14, 8.4), layout="constrained")

    image = a.imshow(found.field, origin="lower", extent=square, cmap="viridis", vmin=0)
    a.scatter(*data.points.T, c=data.values, cmap="viridis", vmin=0, vmax=image.get_clim()[1], s=16, edgecolors="white", linewidths=0.5)
    a.set_title("fitted field; dots: synthetic measurements")
    fig.colorbar(image, ax=a, shrink=0.85)
    dots = b.scatter(*data.points.T, c=scaled, cmap="RdBu_r", vmin=-3, vmax=3, s=22, edgecolors="0.4", linewidths=0.3)
    b.set(title="(measured - fitted) / noise", aspect="equal", xlim=(0, 1), ylim=(0, 1))
    fig.colorbar(dots, ax=b, shrink=0.85)
    top = float(torch.maximum(found.std, error).max())
    for panel, field, title in (
        (c, found.std, "standard deviation of the fitted field"),
        (d, error, "distance of the fitted from the true field"),
    ):
        image = panel.imshow(field, origin="lower", extent=square, cmap="magma", vmin=0, vmax=top)
        panel.set_title(title)
        fig.colorbar(image, ax=panel, shrink=0.85)
    for panel in (a, b, c, d):
        panel.set(xlabel="x", ylabel="y")

    place, errors = torch.arange(6), found.covariance.diagonal().sqrt()
    shown = lambda p: p - TRUTH  # noqa: E731
    e.axhline(0, color="black", lw=1, label="truth")
    e.errorbar(place - 0.12, shown(PRIOR_MEAN), 2 * PRIOR_STD, fmt="s", color="0.6", capsize=4, label="before: prior")
    e.errorbar(place + 0.12, shown(found.p), 2 * errors, fmt="o", color="tab:red", capsize=4, label="after: posterior")
    e.set_xticks(place.tolist(), NAMES)
    e.set(title="parameters minus truth (bars: 2 standard deviations)", ylabel="difference")
    e.legend(loc="upper center", fontsize=8)

    above = [value - found.history[-1] for value in found.history]
    g.semilogy([max(value, 1e-13) for value in above[:-1]], "o-", color="tab:blue")
    g.set(title="Newton with exact Hessians", xlabel="iteration", ylabel="objective above its minimum")
    g.grid(alpha=0.3)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "inverse_reaction_diffusion.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a coarse grid")
    parser.add_argument("--n", type=int, default=None, help="points of the grid in one direction")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out, options.n)
