# %% [markdown]
# Theophylline in twelve subjects: a population fit
#
# Twelve people swallowed one dose of theophylline, and its concentration in their blood was measured eleven times over a day. One
# compartment with first-order absorption has three parameters a subject: elimination and absorption rates and clearance, whose logarithms
# scatter normally about those of the population. The dose is an `adjoint.Doses`, each subject has times of its own, and all twelve are one
# batched solve in native code; its derivatives in the parameters of every subject come with it.
#
# The fit maximises the likelihood by Laplace's approximation and expectation maximisation: the most likely parameters of every subject
# given the population by Gauss-Newton steps, then the population given those and their covariances.
#
# Data: R. Upton's study as published by Boeckmann, Sheiner & Beal (1994), NONMEM Users Guide V, University of California, San Francisco
# (dose in mg/kg, times in hours, concentrations in mg/l).

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import adjoint

DOSES = torch.tensor([4.02, 4.4, 4.53, 4.4, 5.86, 4.0, 4.95, 4.53, 3.1, 5.5, 4.92, 5.3], dtype=torch.float64)
# fmt: off
TIMES = torch.tensor([
    [0, 0.25, 0.57, 1.12, 2.02, 3.82, 5.1, 7.03, 9.05, 12.12, 24.37], [0, 0.27, 0.52, 1, 1.92, 3.5, 5.02, 7.03, 9, 12, 24.3],
    [0, 0.27, 0.58, 1.02, 2.02, 3.62, 5.08, 7.07, 9, 12.15, 24.17], [0, 0.35, 0.6, 1.07, 2.13, 3.5, 5.02, 7.02, 9.02, 11.98, 24.65],
    [0, 0.3, 0.52, 1, 2.02, 3.5, 5.02, 7.02, 9.1, 12, 24.35], [0, 0.27, 0.58, 1.15, 2.03, 3.57, 5, 7, 9.22, 12.1, 23.85],
    [0, 0.25, 0.5, 1.02, 2.02, 3.48, 5, 6.98, 9, 12.05, 24.22], [0, 0.25, 0.52, 0.98, 2.02, 3.53, 5.05, 7.15, 9.07, 12.1, 24.12],
    [0, 0.3, 0.63, 1.05, 2.02, 3.53, 5.02, 7.17, 8.8, 11.6, 24.43], [0, 0.37, 0.77, 1.02, 2.05, 3.55, 5.05, 7.08, 9.38, 12.1, 23.7],
    [0, 0.25, 0.5, 0.98, 1.98, 3.6, 5.02, 7.03, 9.03, 12.12, 24.08], [0, 0.25, 0.5, 1, 2, 3.52, 5.07, 7.07, 9.03, 12.05, 24.15],
], dtype=torch.float64).T
MEASURED = torch.tensor([
    [0.74, 2.84, 6.57, 10.5, 9.66, 8.58, 8.36, 7.47, 6.89, 5.94, 3.28], [0, 1.72, 7.91, 8.31, 8.33, 6.85, 6.08, 5.4, 4.55, 3.01, 0.9],
    [0, 4.4, 6.9, 8.2, 7.8, 7.5, 6.2, 5.3, 4.9, 3.7, 1.05], [0, 1.89, 4.6, 8.6, 8.38, 7.54, 6.88, 5.78, 5.33, 4.19, 1.15],
    [0, 2.02, 5.63, 11.4, 9.33, 8.74, 7.56, 7.09, 5.9, 4.37, 1.57], [0, 1.29, 3.08, 6.44, 6.32, 5.53, 4.94, 4.02, 3.46, 2.78, 0.92],
    [0.15, 0.85, 2.35, 5.02, 6.58, 7.09, 6.66, 5.25, 4.39, 3.53, 1.15], [0, 3.05, 3.05, 7.31, 7.56, 6.59, 5.88, 4.73, 4.57, 3, 1.25],
    [0, 7.37, 9.03, 7.14, 6.33, 5.66, 5.67, 4.24, 4.11, 3.16, 1.12], [0.24, 2.89, 5.22, 6.41, 7.83, 10.21, 9.18, 8.02, 7.14, 5.68, 2.42],
    [0, 4.86, 7.24, 8, 6.81, 5.87, 5.22, 4.45, 3.62, 2.69, 0.86], [0, 1.25, 3.96, 7.82, 9.72, 9.75, 8.57, 6.59, 6.11, 4.57, 1.17],
], dtype=torch.float64).T
# fmt: on
NAMES = ("elimination", "absorption", "clearance")


# %%
def body(t: Tensor, y: Tensor, ke: Tensor, ka: Tensor, cl: Tensor) -> Tensor:
    """Amount in the gut (mg/kg) and concentration in the blood (mg/l)."""
    absorbed = ka * y[..., 0]
    return torch.stack([-absorbed, absorbed * ke / cl - ke * y[..., 1]], -1)


def concentrations(logs: Tensor, times: Tensor) -> Tensor:
    """``(T, 12)`` for logarithms (12, 3) of elimination, absorption and clearance."""
    dose = adjoint.Doses([0.0], DOSES.unsqueeze(0), 0)
    y0 = torch.zeros(12, 2, dtype=torch.float64)
    keys = {"events": dose, "batched": True, "compile": True, "rtol": 1e-7, "atol": 1e-9}
    return adjoint.solve_ivp(body, (0.0, 25.0), y0, args=logs.exp().unbind(-1), t_eval=times, **keys).y[..., 1]


def closed_form(logs: Tensor, t: Tensor) -> Tensor:
    """The same, known for this simple model."""
    ke, ka, cl = logs.exp().unbind(-1)
    return DOSES * ke * ka / cl * ((-ke * t).exp() - (-ka * t).exp()) / (ka - ke)


def linearized(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Concentrations (T, 12) and their derivatives (T, 12, 3) in the logarithms, subjects being independent."""
    logs = logs.detach().requires_grad_()
    model = concentrations(logs, TIMES)
    slopes = [torch.autograd.grad(at.sum(), logs, retain_graph=True)[0] for at in model]
    return model.detach(), torch.stack(slopes)


def fit(rounds: int) -> tuple[Tensor, Tensor, float, Tensor, list[float]]:
    """Population means (3,) and standard deviations (3,), the error of a measurement, the subjects' logarithms, and the course of the
    approximate log likelihood."""
    mean = torch.tensor([-2.5, 0.5, -3.0], dtype=torch.float64)
    spread, noise = torch.full((3,), 0.5, dtype=torch.float64), 1.0
    logs, course = mean.repeat(12, 1), []
    for _ in range(rounds):
        for _ in range(2):
            model, slope = linearized(logs)
            precision = torch.einsum("tbi,tbj->bij", slope, slope) / noise**2 + torch.diag(spread**-2)
            gradient = torch.einsum("tbi,tb->bi", slope, MEASURED - model) / noise**2 + (mean - logs) / spread**2
            logs = logs + torch.linalg.solve(precision, gradient).clamp(-0.5, 0.5)
        model, slope = linearized(logs)
        precision = torch.einsum("tbi,tbj->bij", slope, slope) / noise**2 + torch.diag(spread**-2)
        covariance = torch.linalg.inv(precision)
        misfit = (MEASURED - model).square().sum() / noise**2 + ((logs - mean) / spread).square().sum()
        size = 2 * MEASURED.numel() * torch.tensor(noise).log() + 24 * spread.log().sum() + torch.logdet(precision).sum()
        course.append(float(-0.5 * (misfit + size)))
        mean = logs.mean(0)
        spread = ((logs - mean).square() + covariance.diagonal(dim1=-2, dim2=-1)).mean(0).sqrt()
        explained = torch.einsum("tbi,bij,tbj->", slope, covariance, slope)
        noise = float((((MEASURED - model).square().sum() + explained) / MEASURED.numel()).sqrt())
    return mean, spread, noise, logs, course


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> Tensor:
    """Fit, check, draw. Returns the means of the population."""
    mean, spread, noise, logs, course = fit(10 if quick else 60)
    assert float((concentrations(logs, TIMES) - closed_form(logs, TIMES)).abs().max()) < 1e-5
    for name, m, s in zip(NAMES, mean, spread, strict=True):
        print(f"log {name:12s} {float(m):7.3f}, between subjects {float(s):.3f}")
    print(f"error of a measurement {noise:.3f} mg/l; log likelihood {course[0]:.1f} at first, {course[-1]:.1f} at last")
    assert course[-1] > course[0] and 0.5 < noise < 0.8
    draw(out, mean, logs)
    return mean


def draw(out: Path, mean: Tensor, logs: Tensor) -> None:
    """Every subject's measurements, own curve, and that of the population."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    t = torch.linspace(0.0, 25.0, 151, dtype=torch.float64)
    own, population = concentrations(logs, t), concentrations(mean.repeat(12, 1), t)
    figure, axes = plt.subplots(2, 6, figsize=(13, 4.6), sharex=True, sharey=True, layout="constrained")
    for i, ax in enumerate(axes.flat):
        ax.plot(t, population[:, i], color="0.7", label="population")
        ax.plot(t, own[:, i], color="#1b6ca8", label="subject")
        ax.plot(TIMES[:, i], MEASURED[:, i], ".", color="#c8102e", label="measured")
        ax.set_title(f"subject {i + 1}", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("hours after the dose")
    figure.supylabel("theophylline (mg/l)")
    figure.savefig(out / "theophylline.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    given = parser.parse_args()
    main(given.quick, given.out)
