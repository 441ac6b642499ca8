# %% [markdown]
# A deep-equilibrium network that reads digits
#
# Scikit-learn ships 1797 handwritten digits of 8 x 8 pixels (the test set of the Optical Recognition of Handwritten Digits data of the
# UCI repository, Alpaydin & Kaynak 1998, CC BY 4.0). The features of an image are the fixed point of one small block of convolutions, as if
# it were repeated without end; a linear layer reads the digit off. Every image has its own convergence, and the gradient comes from the
# implicit function theorem: nothing of the iteration is kept. Epochs are chosen on validation images; the test images are used once.

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adjoint.nn import DEQ

CHANNELS = 16
#: in one pass through the block the distance of two feature maps shrinks at least by this factor
CONTRACTION = 0.95
TOLERANCE = 1e-4


# %%
class Block(nn.Module):
    """What is repeated: a convolution, and the lifted image fed in every time.

    The absolute weights that lead to a channel are kept below ``CONTRACTION`` in sum, so the block contracts in the maximum norm and has
    one fixed point for every image (El Ghaoui, Gu, Travacca, Askari & Tsai 2021, Implicit deep learning).
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """``z`` and ``x``: (batch, channels, 8, 8)."""
        size = self.mix.weight.abs().sum((1, 2, 3), keepdim=True)
        weight = self.mix.weight * (CONTRACTION / size).clamp(max=1)
        return torch.tanh(x + nn.functional.conv2d(z, weight, self.mix.bias, padding=1))


class Reader(nn.Module):
    """Images (batch, 1, 8, 8) to scores (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.features = DEQ(Block(), solver="anderson", linear_solver="gmres", tol=TOLERANCE, backward_tol=TOLERANCE)
        self.read = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(CHANNELS * 16, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Image by image."""
        return self.read(self.features(self.lift(images)))


class Images(NamedTuple):
    """Pixels (N, 1, 8, 8) and digits (N,)."""

    pixels: Tensor
    digits: Tensor


def load() -> tuple[Images, Images, Images]:
    """Training (60 %), validation and test images (20 % each), shuffled with a fixed seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(raw.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    fifth = len(digits) // 5
    parts = order.split([len(digits) - 2 * fifth, fifth, fifth])
    train, validation, test = (Images(pixels[part], digits[part]) for part in parts)
    return train, validation, test


# %%
class History(NamedTuple):
    """Per training step: loss, iterations (mean of the images), products with the Jacobian on the way back. Per epoch: accuracy on the
    training batches and on the validation images."""

    loss: list[float]
    forward: list[float]
    backward: list[int]
    train: list[float]
    validation: list[float]


def evaluate(model: Reader, images: Images) -> tuple[float, Tensor]:
    """Accuracy and readings."""
    model.eval()
    with torch.no_grad():
        guess = model(images.pixels).argmax(1)
    return float((guess == images.digits).float().mean()), guess


def convergence(model: Reader, images: Images, solver: str, steps: int = 12) -> list[float]:
    """How far from a fixed point the features are (root mean square, median of 64 images) after 0, 1, 2, ... iterations of a solver."""
    with torch.no_grad():
        x = model.lift(images.pixels[:64])
        norms = [float(model.features.module(torch.zeros_like(x), x).square().mean((1, 2, 3)).sqrt().median())]
        for count in range(1, steps + 1):
            layer = DEQ(model.features.module, solver=solver, tol=1e-12, max_steps=count, throw=False)
            layer(x)
            assert layer.solution is not None
            norms.append(float(layer.solution.residual_norm.median()))
    return norms


def train(model: Reader, images: Images, validation: Images, epochs: int, size: int) -> History:
    """Adam with one cycle of the learning rate; the model is left as it was after the best epoch by validation accuracy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-2, total_steps=epochs * -(-len(images.digits) // size))
    history, best, begin = History([], [], [], [], []), (-1.0, {}), time.perf_counter()
    for epoch in range(epochs):
        model.train()
        right = 0
        for batch in torch.randperm(len(images.digits)).split(size):
            scores = model(images.pixels[batch])
            loss = nn.functional.cross_entropy(scores, images.digits[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            stats = model.features.stats
            right += int((scores.argmax(1) == images.digits[batch]).sum())
            history.loss.append(float(loss.detach()))
            history.forward.append(float(stats.n_steps.float().mean()))
            history.backward.append(stats.log.n_iterations)
        history.train.append(right / len(images.digits))
        accuracy = evaluate(model, validation)[0]
        history.validation.append(accuracy)
        if accuracy > best[0]:
            best = (accuracy, copy.deepcopy(model.state_dict()))
        print(
            f"epoch {epoch + 1:2d}   training {history.train[-1]:.3f}   validation {accuracy:.3f}   "
            f"iterations {history.forward[-1]:.1f} forward, {history.backward[-1]} backward   {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    model.load_state_dict(best[1])
    return history


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> float:
    """Train, test, draw. Returns the accuracy on the test images."""
    torch.manual_seed(0)
    images, validation, test = load()
    model = Reader()
    epochs, size = (2, 64) if quick else (16, 64)
    history = train(model, images, validation, epochs, size)
    accuracy, guess = evaluate(model, test)
    curves = {solver: convergence(model, test, solver) for solver in ("fixed_point", "anderson", "broyden")}
    path = draw(history, test, accuracy, guess, curves, Path(out))
    print(f"\naccuracy on {len(test.digits)} test images: {accuracy:.3f}\nfigure: {path}")
    assert accuracy > (0.5 if quick else 0.95)
    return accuracy


# %%
def draw(history: History, test: Images, accuracy: float, guess: Tensor, curves: dict[str, list[float]], out: Path) -> Path:
    """Loss, accuracy, work for every batch, how solvers converge on the test images, and some of these."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(14, 5.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[2.6, 1])
    a, b, c, d = top.subplots(1, 4)
    a.semilogy(history.loss, lw=0.8)
    a.set(title="loss", xlabel="training step", ylabel="cross entropy of a batch")
    epochs = range(1, len(history.train) + 1)
    b.plot(epochs, history.train, label="training")
    b.plot(epochs, history.validation, label="validation")
    chosen = max(epochs, key=lambda epoch: history.validation[epoch - 1])
    b.plot(chosen, accuracy, "*", color="black", ms=12, label=f"test: {accuracy:.3f}")
    b.set(title="accuracy", xlabel="epoch", ylim=(max(0.0, min(1.0, history.validation[min(2, len(epochs) - 1)]) - 0.1), 1.005))
    b.xaxis.get_major_locator().set_params(integer=True)
    b.legend(loc="lower right")
    c.plot(history.backward, lw=1, color="tab:green", label="backward: products with the Jacobian")
    c.plot(history.forward, lw=1, color="tab:blue", label="forward: mean of the images")
    c.set(title="iterations for every batch", xlabel="training step", ylim=(0, 1.3 * max(history.backward)))
    c.legend(loc="lower right", fontsize=8)
    for (solver, norms), marker in zip(curves.items(), "os^", strict=True):
        d.semilogy(norms, marker=marker, ms=4, lw=1, label=solver.replace("_", " "))
    d.axhline(TOLERANCE, color="0.6", lw=1, ls="--", label="tolerance in training")
    d.set(title="test images, trained block", xlabel="iteration", ylabel="residual of the median image")
    d.legend()
    wrong = (guess != test.digits).nonzero()[:, 0].tolist()
    others = [i for i in range(len(guess)) if i not in wrong]
    for axis, i in zip(bottom.subplots(1, 14), (wrong + others)[:14], strict=True):
        axis.imshow(test.pixels[i, 0], cmap="gray_r")
        axis.set_title(f"{int(test.digits[i])} read {int(guess[i])}", fontsize=9, color="tab:red" if i in wrong else "black")
        axis.set_axis_off()
    bottom.suptitle("test images: wrong readings first (red)", fontsize=10)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "deq_digits.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out)
