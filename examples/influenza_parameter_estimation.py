# %% [markdown]
# An influenza outbreak: parameters with their uncertainty
#
# In January 1978 influenza went through an English boarding school with 763 boys. The number of boys confined to bed was counted for
# fourteen days. A susceptible-infected-recovered model is fitted by least squares on square roots (which makes counts equally
# uncertain); the exact Hessian of the objective, through the solve, gives the covariance of the parameters and a band for the prediction.
#
# Data: Anonymous (1978), Influenza in a boarding school, British Medical Journal 1, 587. The counts were read off
# a published figure; readings differ by a few boys.

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import adjoint

BOYS = 763.0
IN_BED = torch.tensor([3, 8, 28, 75, 221, 291, 255, 235, 190, 125, 70, 28, 12, 5], dtype=torch.float64)
DAYS = torch.arange(14, dtype=torch.float64)


# %%
def outbreak(t: torch.Tensor, y: torch.Tensor, beta: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Susceptible and infected boys; rates per day."""
    susceptible, infected = y
    new = beta * susceptible * infected / BOYS
    return torch.stack([-new, new - gamma * infected])


def infected(log_parameters: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
    """Infected boys at ``days`` (from day 0 on) for logarithms of (beta, gamma, infected boys on day 0)."""
    beta, gamma, first = log_parameters.exp()
    start = torch.stack([BOYS - first, first])
    return adjoint.solve_ivp(outbreak, (0.0, 13.0), start, args=(beta, gamma), t_eval=days, rtol=1e-8, atol=1e-8).y[:, 1]


def objective(log_parameters: torch.Tensor) -> torch.Tensor:
    """Half the sum of squares of ``2 (sqrt(count) - sqrt(model))``, each of variance one for Poisson counts."""
    return 2 * (IN_BED.sqrt() - infected(log_parameters, DAYS).sqrt()).square().sum()


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> dict[str, float]:
    """Fit, quantify, draw. Returns estimates and standard errors."""
    guess = torch.tensor([1.5, 0.4, 2.0], dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([guess], max_iter=30 if quick else 200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(guess)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = guess.detach()
    gradient, hessian = torch.func.grad(objective)(best), torch.func.hessian(objective)(best)
    # the counts scatter more than Poisson's would, and the model misses some of their course: the residual variance says by how much;
    # standard errors scaled by it are approximate
    dispersion = 2 * objective(best) / (len(DAYS) - len(best))
    covariance = dispersion * torch.linalg.inv(hessian)
    beta, gamma, first = best.exp()

    def basic(q: torch.Tensor) -> torch.Tensor:
        return (q[0] - q[1]).exp()

    slope = torch.func.grad(basic)(best)
    errors = covariance.diagonal().sqrt()
    r0, r0_error = basic(best), (slope @ covariance @ slope).sqrt()
    print(f"objective {float(objective(best)):.4f}, gradient norm {float(gradient.norm()):.1e}, dispersion {float(dispersion):.2f}")
    print(f"contact rate   beta  = {float(beta):.3f} per day   (standard error {float(beta * errors[0]):.3f})")
    print(f"recovery rate  gamma = {float(gamma):.3f} per day   (standard error {float(gamma * errors[1]):.3f})")
    print(f"infected on day 0    = {float(first):.2f} boys     (standard error {float(first * errors[2]):.2f})")
    low, high = float(r0 - 1.96 * r0_error), float(r0 + 1.96 * r0_error)
    print(f"reproduction number  = {float(r0):.2f}            (95 % interval {low:.2f} to {high:.2f})")
    path = draw(best, covariance, dispersion, Path(out))
    print(f"\nfigure: {path}")
    assert bool((torch.linalg.eigvalsh(hessian) > 0).all())
    assert float((step := torch.linalg.solve(hessian, gradient)).abs().max()) < 1e-5, step  # a Newton step from here moves nothing
    assert 3.0 < float(r0) < 4.5
    return {"beta": float(beta), "gamma": float(gamma), "r0": float(r0), "r0_error": float(r0_error)}


# %%
def draw(best: torch.Tensor, covariance: torch.Tensor, dispersion: torch.Tensor, out: Path) -> Path:
    """Counts with the fitted curve and its bands; the joint uncertainty of the two rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fine = torch.linspace(0.0, 13.0, 131, dtype=torch.float64)
    curve = infected(best, fine)
    jacobian = torch.func.jacfwd(lambda q: infected(q, fine).sqrt())(best)
    spread = torch.einsum("ti,ij,tj->t", jacobian, covariance, jacobian)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), gridspec_kw={"width_ratios": [1.6, 1]}, layout="constrained")
    for variance, color, label in ((spread + dispersion / 4, "0.88", "95 % of new counts"), (spread, "tab:orange", "95 % of the curve")):
        half = 1.96 * variance.sqrt()
        low, high = (curve.sqrt() - half).clamp(min=0).square(), (curve.sqrt() + half).square()
        left.fill_between(fine, low, high, color=color, alpha=0.8 if color == "0.88" else 0.45, lw=0, label=label)
    left.plot(fine, curve, color="tab:red", label="fitted model")
    left.plot(DAYS, IN_BED, "ko", ms=5, label="boys in bed")
    left.set(xlabel="day of the outbreak", ylabel="boys", title="boarding school, 1978", xlim=(-0.3, 13.3), ylim=(0, None))
    left.legend()
    values, vectors = torch.linalg.eigh(covariance[:2, :2])
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    for level, style in ((0.5, "-"), (0.95, "--")):
        radius = (-2 * torch.log(torch.tensor(1 - level))).sqrt()
        beta, gamma = (best[:2, None] + radius * vectors @ (values.sqrt()[:, None] * circle)).exp()
        right.plot(beta, gamma, style, color="tab:red", label=f"{level:.0%} region")
    right.plot(*best[:2].exp(), "k+", ms=10, label="estimate")
    right.set(xlabel="contact rate beta (per day)", ylabel="recovery rate gamma (per day)", title="joint uncertainty")
    right.margins(0.12, 0.3)
    right.legend(loc="lower right", fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "influenza_parameter_estimation.png"
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out)
