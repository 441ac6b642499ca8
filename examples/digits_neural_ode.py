# %% [markdown]
# A convolutional neural ODE that reads digits
#
# Scikit-learn ships 1797 handwritten digits of 8 x 8 pixels (the test set of the Optical Recognition of Handwritten Digits data of the
# UCI repository, Alpaydin & Kaynak 1998, CC BY 4.0). A small convolution lifts each image to 16 channels, a neural ODE moves the features
# for one unit of time, a linear layer reads the digit off. The gradient keeps one state per step instead of all activations.

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from adjoint.nn import NeuralODE

CHANNELS = 16


# %%
class Rate(nn.Module):
    """Rates of change of the features: two convolutions, which also see the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS + 1, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y``: (batch, channels, 8, 8)."""
        clock = t.expand(y.shape[0], 1, *y.shape[2:])
        return self.second(torch.tanh(self.first(torch.cat([y, clock], 1))))


def classifier() -> nn.Sequential:
    """Images (batch, 1, 8, 8) to scores (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1),
        nn.Tanh(),
        NeuralODE(Rate(), time_dependent=True, method="bosh3", rtol=1e-2, atol=1e-2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(CHANNELS * 16, 10),
    )


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test images with their digits; every fifth image is a test image."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(raw.target)
    test = torch.arange(len(digits)) % 5 == 0
    return images[~test], digits[~test], images[test], digits[test]


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> float:
    """Train, test, draw. Returns the accuracy on the test images."""
    torch.manual_seed(0)
    images, digits, test_images, test_digits = load()
    model = classifier()
    epochs, size = (1, 128) if quick else (12, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * -(-len(images) // size))
    history, begin = [], time.perf_counter()
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(size):
            loss = nn.functional.cross_entropy(model(images[batch]), digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            history.append(float(loss.detach()))
        with torch.no_grad():
            accuracy = float((model(test_images).argmax(1) == test_digits).float().mean())
        work = model[2].solution.stats
        seconds = time.perf_counter() - begin
        print(f"epoch {epoch + 1:2d}   test accuracy {accuracy:.3f}   {work.n_fun} evaluations a solve   {seconds:.0f} s", flush=True)
    path = draw(model, history, test_images, test_digits, Path(out))
    print(f"\naccuracy on {len(test_digits)} test images: {accuracy:.3f}\nfigure: {path}")
    assert accuracy > (0.3 if quick else 0.95)
    return accuracy


# %%
def draw(model: nn.Sequential, history: list[float], images: torch.Tensor, digits: torch.Tensor, out: Path) -> Path:
    """The loss; how the features of the test images part as time goes by; some images with what was read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = [0.0, 0.5, 1.0]
    with torch.no_grad():
        guess = model(images).argmax(1)
        features = model[2](model[1](model[0](images)), t_eval=times).flatten(2)
    # one plane for all times, in which the classes lie farthest apart at the end
    means = torch.stack([features[-1][digits == d].mean(0) for d in range(10)])
    plane = torch.linalg.svd(means - means.mean(0)).Vh[:2].T
    flat = (features - means.mean(0)) @ plane
    fig = plt.figure(figsize=(12, 6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1.7, 1])
    panels = top.subplots(1, 4)
    panels[0].plot(history, lw=0.8)
    panels[0].set(xlabel="training step", ylabel="cross entropy", yscale="log", title="loss")
    for panel, t, points in zip(panels[1:], times, flat, strict=True):
        dots = panel.scatter(points[:, 0], points[:, 1], c=digits, cmap="tab10", s=9, vmin=-0.5, vmax=9.5)
        panel.set(title=f"features at t = {t:g}", xlabel="first direction", xlim=_range(flat[..., 0]), ylim=_range(flat[..., 1]))
    panels[1].set_ylabel("second direction")
    top.colorbar(dots, ax=list(panels), ticks=range(10), label="digit", shrink=0.9)
    wrong = (guess != digits).nonzero()[:, 0].tolist()
    shown = (wrong + [i for i in range(len(digits)) if i not in wrong])[:14]
    for axis, i in zip(bottom.subplots(1, 14), shown, strict=True):
        axis.imshow(images[i, 0], cmap="gray_r")
        axis.set_title(f"{int(digits[i])} read {int(guess[i])}", fontsize=9, color="tab:red" if i in wrong else "black")
        axis.set_axis_off()
    bottom.suptitle("wrong readings first (red)", fontsize=10)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "digits_neural_ode.png"
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def _range(x: torch.Tensor) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out)
