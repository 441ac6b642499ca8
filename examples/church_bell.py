# %% [markdown]
# A church bell heard: how hard its clapper bounces, from the times of the strikes
#
# A bell swings out from where it was let go. Its clapper hangs from it, strikes one side, bounces, strikes again, rests there for a while,
# pressed to it, and comes off for the other side. The mechanism is stated by mass, force and two gaps (`adjoint.Contact`): impacts, rest
# and release follow. From the strikes that are loud enough to be heard, with a jitter of two milliseconds, come the restitution, the
# angle up to the bell, the clapper's radius of gyration and the friction of the bearings: times of strikes are differentiated
# through all impacts, rests and releases before. Gauss-Newton steps, then standard errors from the Jacobian.
#
# Data: synthetic, made here.

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import adjoint

GRAVITY = 9.81
INERTIA, MOMENT, PIVOT = 60.0, 80.0, 0.2  # of the bell about its axis (kg m^2), mass times distance (kg m); where the clapper hangs (m)
CLAPPER, LENGTH = 6.0, 0.5  # kg; from its pivot to its centre (m)
START, LOUD, JITTER = 1.6, 0.4, 2e-3  # rad, rad/s, s
TRUTH = torch.tensor([0.3, 0.3, 0.7, 3.0], dtype=torch.float64)
NAMES = ("restitution", "angle to the bell (rad)", "radius of gyration (m)", "friction (N m s)")


# %%
def mass(q: Tensor, e: Tensor, side: Tensor, radius: Tensor, friction: Tensor) -> Tensor:
    """For the angles of bell and clapper against the vertical."""
    both = CLAPPER * PIVOT * LENGTH * torch.cos(q[..., 0] - q[..., 1])
    bell, clapper = (INERTIA + CLAPPER * PIVOT**2) * torch.ones_like(both), CLAPPER * radius**2 * torch.ones_like(both)
    return torch.stack([torch.stack([bell, both], -1), torch.stack([both, clapper], -1)], -2)


def force(t: Tensor, q: Tensor, v: Tensor, e: Tensor, side: Tensor, radius: Tensor, friction: Tensor) -> Tensor:
    whirl = CLAPPER * PIVOT * LENGTH * torch.sin(q[..., 0] - q[..., 1])
    on_bell = -whirl * v[..., 1] ** 2 - (MOMENT + CLAPPER * PIVOT) * GRAVITY * torch.sin(q[..., 0]) - friction * v[..., 0]
    return torch.stack([on_bell, whirl * v[..., 0] ** 2 - CLAPPER * LENGTH * GRAVITY * torch.sin(q[..., 1])], -1)


def hangs(t: Tensor, q: Tensor, e: Tensor, side: Tensor, *rest: Tensor) -> Tensor:
    """The angle by which the clapper has turned in the bell."""
    return q[..., 1] - q[..., 0]


RIGHT = adjoint.Contact(lambda t, q, *p: p[1] - hangs(t, q, *p), restitution=lambda *p: p[0], rest_speed=0.03, name="right")
LEFT = adjoint.Contact(lambda t, q, *p: p[1] + hangs(t, q, *p), restitution=lambda *p: p[0], rest_speed=0.03, name="left")
BELL = adjoint.mechanics(mass, force, contacts=[RIGHT, LEFT])


def ring(p: Tensor, seconds: float, dense: bool = False) -> adjoint.Solution:
    """For parameters ``(4,)``, or of many bells ``(B, 4)``."""
    start = torch.full((*p.shape[:-1], 2), START, dtype=torch.float64)
    keys = {"batched": p.dim() == 2, "dense_output": dense, "compile": True, "rtol": 1e-7, "atol": 1e-9}
    return BELL.solve((0.0, seconds), start, torch.zeros_like(start), tuple(p.unbind(-1)), **keys)


def strikes(sol: adjoint.Solution, name: str, least: float) -> Tensor:
    """The times at which the clapper strikes a side, infinity for those at which it comes at ``least`` or slower."""
    record = sol.events[name]
    speed = (record.y.v[..., 1] - record.y.v[..., 0]).abs()
    return torch.where(speed > least, record.t, float("inf"))


def rung(p: Tensor, heard: dict[str, Tensor], seconds: float) -> tuple[Tensor, Tensor]:
    """For every strike that was heard the nearest one on that side, half as loud at least, and its derivatives in the parameters.

    As many bells as strikes, all alike: one backward pass, in which each bell has its own strike, gives all derivatives.
    """
    times = torch.cat(list(heard.values()))
    copies = p.expand(len(times), -1).clone().requires_grad_()
    sol = ring(copies, seconds)
    found, row = [], 0
    for name, own in heard.items():
        every = strikes(sol, name, LOUD / 2)[:, row : row + len(own)]
        nearest = (every.detach() - own).abs().nan_to_num(float("inf")).argmin(0, keepdim=True)
        found.append(every.gather(0, nearest)[0])
        row += len(own)
    model = torch.cat(found)
    (slope,) = torch.autograd.grad(model.sum(), copies)
    return model.detach(), slope


# %%
def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> Tensor:
    """Listen, fit, draw. Returns the estimates."""
    seconds = 4.0 if quick else 8.0
    noise = torch.Generator().manual_seed(2)
    heard = {}
    bell = ring(TRUTH, seconds)
    for name in ("right", "left"):
        loud = strikes(bell, name, LOUD)
        loud = loud[torch.isfinite(loud)]
        heard[name] = loud + JITTER * torch.randn(len(loud), dtype=torch.float64, generator=noise)
    p = torch.tensor([0.4, 0.32, 0.69, 3.5], dtype=torch.float64)
    for _ in range(20):
        model, slope = rung(p, heard, seconds)
        off = torch.cat(list(heard.values())) - model
        print(f"{1e3 * float(off.square().mean().sqrt()):8.3f} ms off on average, restitution {float(p[0]):.4f}")
        step = torch.linalg.lstsq(slope, off.unsqueeze(-1)).solution[:, 0]
        p = p + step * (0.1 / (step / p).abs().max()).clamp(max=1.0)
        if bool((step.abs() < 1e-3 * p).all()):
            break
    errors = JITTER * torch.linalg.inv(slope.T @ slope).diagonal().sqrt()
    for name, value, error, true in zip(NAMES, p, errors, TRUTH, strict=True):
        print(f"{name:24s} {float(value):.5f} +- {float(error):.5f} (true {float(true):g})")
    assert bool(((p - TRUTH).abs() < 4 * errors).all())
    draw(out, p, heard, seconds)
    return p


def draw(out: Path, p: Tensor, heard: dict[str, Tensor], seconds: float) -> None:
    """The clapper in the bell, and how hard it is pressed to it while it rests."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    t, y = ring(p, seconds, dense=True).curve(30)
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.4), sharex=True, layout="constrained", height_ratios=(2, 1))
    axes[0].plot(t, y.q[:, 0], color="#9aa5b1", label="bell")
    axes[0].plot(t, y.q[:, 1] - y.q[:, 0], color="#1b6ca8", label="clapper in the bell")
    for name, level in (("right", float(p[1])), ("left", -float(p[1]))):
        axes[0].axhline(level, color="k", lw=0.6, ls=":")
        axes[0].plot(heard[name], level + 0 * heard[name], "v" if name == "right" else "^", color="#c8102e", ms=6)
    axes[0].plot([], [], "v", color="#c8102e", label="heard")
    axes[0].set(ylabel="angle (rad)")
    axes[0].legend(frameon=False, ncols=3, loc="upper right")
    axes[1].plot(t, y.push[:, 0], color="#1b6ca8", label="right")
    axes[1].plot(t, y.push[:, 1], color="#e08e0b", label="left")
    axes[1].set(ylabel="pressed with (N m)", xlabel="s")
    axes[1].legend(frameon=False, ncols=2)
    figure.savefig(out / "church_bell.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    given = parser.parse_args()
    main(given.quick, given.out)
