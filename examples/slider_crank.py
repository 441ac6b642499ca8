# %% [markdown]
# A slider-crank mechanism: masses, friction and a length recovered from noisy motion
#
# A crank drives a slider through a rod. Each body keeps its own coordinates (angle of the crank; place and angle of the rod; place of the
# slider), joints are four constraints: index 3. `adjoint.mechanics` makes the stabilised system of index 2 from mass, force and constraint,
# so no equation of motion is written down, and no joint comes apart (the figure's second panel).
#
# The slider's place, with noise of 2 mm, is all that is seen. Slider mass, friction and rod length are fitted by Gauss-Newton steps
# (SciPy's trust region) with forward derivatives through the solve, and the covariance at the optimum says how well each is known. The
# data are made here, with the parameters that are to be found; the optimiser begins 20 to 50 % away from them.

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from adjoint import Mechanics, mechanics

CRANK = 0.1  # m
INERTIA_CRANK, MASS_ROD = 2e-3, 0.4  # kg m^2, kg
TORQUE, GRAVITY = 0.6, 9.81  # N m, m/s^2
NAMES, UNITS = ("slider mass", "friction", "rod length"), ("kg", "N s/m", "m")
TRUTH = torch.tensor([0.8, 6.0, 0.3], dtype=torch.float64)
NOISE = 2e-3
#: angle of the crank; place and angle of the rod; place of the slider
COORDINATES = ("theta", "x rod", "y rod", "phi", "x slider")


def mass(q: Tensor, p: Tensor) -> Tensor:
    """The diagonal of the mass matrix as a matrix; the rod is a thin one."""
    fixed = torch.tensor([INERTIA_CRANK, MASS_ROD, MASS_ROD], dtype=p.dtype)
    return torch.diag_embed(torch.cat([fixed, (MASS_ROD * p[2] ** 2 / 12).reshape(1), p[:1]]))


def force(t: Tensor, q: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """A torque that sets in smoothly, weight of the rod, friction of the slider."""
    zero = torch.zeros_like(t)
    return torch.stack([TORQUE * torch.tanh(5 * t), zero, zero - MASS_ROD * GRAVITY, zero, -p[1] * v[4]])


def joints(t: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """Crank to rod (two), rod to slider (two)."""
    theta, x, y, phi, slider = q
    half = p[2] / 2
    return torch.stack(
        [
            x - CRANK * theta.cos() - half * phi.cos(),
            y - CRANK * theta.sin() - half * phi.sin(),
            slider - x - half * phi.cos(),
            y + half * phi.sin(),
        ]
    )


def start(p: Tensor) -> Tensor:
    """Coordinates with the crank a little beyond its upper position."""
    theta = torch.tensor(math.pi / 3, dtype=p.dtype)
    phi = -torch.asin(CRANK * theta.sin() / p[2])
    x = CRANK * theta.cos() + p[2] / 2 * phi.cos()
    return torch.stack([theta, x, -p[2] / 2 * phi.sin(), phi, x + p[2] / 2 * phi.cos()])


def motion(model: Mechanics, p: Tensor, times: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Coordinates ``(T, 5)`` and forces in the joints ``(T, 4)``."""
    sol = model.solve((0.0, float(times[-1])), start(p), torch.zeros(5, dtype=p.dtype), (p,), t_eval=times, rtol=rtol, atol=rtol)
    return sol.y.q, sol.y.lam


# %%
def main(quick: bool = False, out: Path | None = None) -> float:
    """Make the data, fit, draw. Returns the largest error of a parameter in its own standard deviations."""
    out = Path(__file__).parent / "figures" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    model = mechanics(mass, force, joints)
    times = torch.linspace(0.0, 0.4 if quick else 0.7, 17 if quick else 36, dtype=torch.float64)
    rtol = 1e-4 if quick else 1e-5
    noise = torch.randn(len(times), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    seen = motion(model, TRUTH, times, rtol)[0][:, 4] + NOISE * noise
    guess = TRUTH * torch.tensor([1.5, 0.6, 1.2], dtype=torch.float64)

    begin = time.perf_counter()
    residual = lambda z: (motion(model, guess * z.exp(), times, rtol)[0][:, 4] - seen) / NOISE  # noqa: E731
    fit = least_squares(
        lambda z: residual(torch.from_numpy(z)).numpy(),
        np.zeros(3),
        jac=lambda z: torch.func.jacfwd(residual)(torch.from_numpy(z)).numpy(),
        xtol=1e-6,
        max_nfev=20,
    )
    found = guess * torch.from_numpy(fit.x).exp()
    deviations = torch.from_numpy(np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac)))) * found
    seconds = time.perf_counter() - begin
    print(f"{fit.nfev} solves and {fit.njev} with derivatives, {seconds:.0f} s; residual rms {fit.fun.std():.2f} of the noise")
    scores = ((found - TRUTH) / deviations).abs()
    for i, name in enumerate(NAMES):
        print(f"  {name:12s} {found[i]:8.4f} +- {deviations[i]:.4f} {UNITS[i]:6s} (true {TRUTH[i]:.4f}, begun at {guess[i]:.4f})")
    assert fit.success and float(scores.max()) < 4 and 0.6 < fit.fun.std() < 1.4

    fine = torch.linspace(0.0, float(times[-1]), 201, dtype=torch.float64)
    q, forces = motion(model, found, fine, rtol)
    first = motion(model, guess, fine, rtol)[0]
    gaps = torch.stack([joints(t, x, found) for t, x in zip(fine, q, strict=True)]).abs().amax(1)
    draw(out, times, seen, fine, q, first, forces, gaps)
    assert float(gaps.max()) < 10 * rtol
    return float(scores.max())


def draw(out: Path, times: Tensor, seen: Tensor, fine: Tensor, q: Tensor, first: Tensor, forces: Tensor, gaps: Tensor) -> None:
    """Motion, joints, and the mechanism at some moments."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    axes[0].plot(times, seen, "o", ms=3, color="#444444", label="measured")
    axes[0].plot(fine, first[:, 4], color="#e8743b", lw=1, ls="--", label="first guess")
    axes[0].plot(fine, q[:, 4], color="#1b6ca8", label="fitted")
    axes[0].set(title="place of the slider", xlabel="time (s)", ylabel="m")
    axes[0].legend(frameon=False)
    axes[1].semilogy(fine, gaps.clamp(min=1e-17), color="#c8102e")
    axes[1].set(title="largest gap in a joint", xlabel="time (s)", ylabel="m")
    # the multipliers of the slider's joint are the forces in it
    axes[2].plot(fine, forces[:, 2], label="along")
    axes[2].plot(fine, forces[:, 3], label="across")
    axes[2].set(title="force between rod and slider", xlabel="time (s)", ylabel="N")
    axes[2].legend(frameon=False)
    for k in range(0, len(fine), 25):
        pin = (CRANK * float(q[k, 0].cos()), CRANK * float(q[k, 0].sin()))
        axes[3].plot([0, pin[0], float(q[k, 4])], [0, pin[1], 0], "o-", ms=3, lw=1, color=plt.cm.viridis(k / len(fine)))
    axes[3].set(title="the mechanism", xlabel="m", aspect="equal")
    figure.savefig(out / "slider_crank.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(given.quick, given.out)
