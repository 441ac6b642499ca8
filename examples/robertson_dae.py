# %% [markdown]
# Robertson's kinetics as a differential-algebraic system: sensitivities over more than fifteen decades of time
#
# Three species, two differential equations and the conservation of mass as the third; rates that differ by nine powers of ten. The relative
# sensitivities d log y_i / d log k_j are taken through the whole solve by forward derivatives (`torch.func.jacfwd`) at 161 times.
#
# What to see: one after the other the rate constants matter. At first only k1 does (y2 and y3 grow from nothing); then y2 sits in its
# quasi-steady state; in the end y2 = k1 y1 / k2 and y1' = - k3 y2^2, so that y1 = k2^2 / (k1^2 k3 t): exponents -2, 2 and -1, which the
# curves on the right reach. That limit, and the derivative of a functional known to fourteen digits, are what the numbers are held against.
#
# The problem is that of the IVP test set (Robertson 1966; Hairer & Wanner 1996), there to t = 1e11.

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from adjoint import solve_dae

K = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64)
Y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
END = 4e10
#: y at t = 40 and the derivatives of its first two entries in the rate constants, by two independent codes
AT_40 = torch.tensor([0.7158270687194055, 9.185534764557783e-06], dtype=torch.float64)
SLOPES_40 = torch.tensor(
    [
        [-4.2475587717057239, 1.3730807973446243e-05, -2.2883550889056715e-09],
        [4.591196249253923e-05, -2.3571921138463359e-10, -1.1380595093501321e-13],
    ],
    dtype=torch.float64,
)


def robertson(t: Tensor, y: Tensor, yp: Tensor, k: Tensor) -> Tensor:
    """``F(t, y, y', k) = 0``: the third equation is algebraic."""
    slow, back, fast = k[0] * y[0], k[1] * y[1] * y[2], k[2] * y[1] ** 2
    return torch.stack([yp[0] + slow - back, yp[1] - slow + back + fast, y.sum() - 1])


def trajectory(k: Tensor, times: Tensor, rtol: float) -> Tensor:
    """``(T, 3)``."""
    return solve_dae(robertson, (0.0, float(times[-1])), Y0, args=(k,), t_eval=times, rtol=rtol, atol=1e-12 * rtol, first_step=1e-10).y


# %%
def main(quick: bool = False, out: Path | None = None) -> dict[str, float]:
    """Solve, differentiate, compare, draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out = Path(__file__).parent / "figures" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    times = torch.cat([torch.logspace(-6, 10.6, 41 if quick else 161, dtype=torch.float64), torch.tensor([40.0], dtype=torch.float64)])
    times = times[times <= END].sort().values
    start = time.perf_counter()
    rtol = 1e-5 if quick else 1e-8
    y = trajectory(K, times, rtol)
    forward = time.perf_counter() - start
    start = time.perf_counter()
    slopes = torch.func.jacfwd(lambda k: trajectory(k, times, rtol))(K)
    derivatives = time.perf_counter() - start
    relative = slopes * K / y.unsqueeze(-1)

    at = int((times == 40.0).nonzero()[0, 0])
    errors = {
        "state at t = 40": float((y[at, :2] / AT_40 - 1).abs().max()),
        "derivatives at t = 40": float((slopes[at, :2] / SLOPES_40 - 1).abs().max()),
        "mass": float((y.sum(-1) - 1).abs().max()),
        "exponents at the end": float((relative[-1, 0] - torch.tensor([-2.0, 2.0, -1.0])).abs().max()),
    }
    print(f"{len(times)} times up to {float(times[-1]):.1e}: solve {forward:.1f} s, with 3 forward derivatives {derivatives:.1f} s")
    for name, value in errors.items():
        print(f"  {name}: {value:.1e}")
    print("  d log y1 / d log k at the end:", ", ".join(f"{x:+.4f}" for x in relative[-1, 0].tolist()))
    assert errors["state at t = 40"] < max(1e-6, 0.3 * rtol) and errors["derivatives at t = 40"] < 1e-5
    assert errors["mass"] < 1e-12 and errors["exponents at the end"] < 2e-2

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for i, colour in enumerate(("#1b6ca8", "#c8102e", "#444444")):
        axes[0].loglog(times, y[:, i], color=colour, label=f"$y_{i + 1}$")
    axes[0].set(title="concentrations", xlabel="time", ylim=(1e-17, 5))
    axes[0].legend(frameon=False)
    for i in range(3):
        panel = axes[i + 1]
        for j, colour in enumerate(("#e8743b", "#2e8b57", "#8c6bb1")):
            panel.semilogx(times, relative[:, i, j], color=colour, label=f"$k_{j + 1}$")
        panel.axhline(0.0, color="0.8", lw=0.8, zorder=0)
        panel.set(title=rf"$\partial \log y_{i + 1} / \partial \log k$", xlabel="time")
        if i == 0:
            for exponent in (-2, 2, -1):
                panel.axhline(exponent, color="0.6", lw=0.8, ls=":", zorder=0)
        panel.legend(frameon=False)
    figure.savefig(out / "robertson_dae.png", dpi=110)
    plt.close(figure)
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    main(given.quick, given.out)
