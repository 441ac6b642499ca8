# %% [markdown]
# A neural ODE that learns a stiff reaction
#
# Robertson's reaction (1966) is the classic of stiffness: three concentrations, the middle one never above 4e-5 and settling ten thousand
# times a second, watched from 10^-5 to 10^5 seconds. Kim, Ji, Deng, Ma & Rackauckas (2021), Stiff neural ordinary differential equations,
# Chaos 31, 093122, learn it from fifty samples, equally spaced in the logarithm of time, and find that it takes scaled equations, a
# scaled output and derivatives that survive stiffness.
#
# So here. With u = y / (largest y) each concentration follows
#     u_i' = (exp a_i(u) - u_i exp b_i(u)) / tau_i,
# where a and b are a small network of log(u + 10^-3), and tau_i is the time at which the data pass half of their range. Gain and loss are
# told apart, which keeps u positive; nothing else of the reaction is told. The solves, by Radau IIA, give exact derivatives of all
# samples in all 86 weights at once (by forward sensitivities), which is what Levenberg and Marquardt's method asks for. To begin with, each
# sample is predicted from the one before only, a batch of fifty short stiff solves; then in pieces of five; then the whole at once. (The
# whole at once from random weights got stuck in a trial, at a root mean square of 0.1.)
#
# At the end: the derivatives against differences of SciPy's solutions, the learned stiffness against the true one, and what an explicit
# method makes of the same right-hand side.
#
# Data: synthetic, by SciPy's Radau method.

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import adjoint
from adjoint.errors import AdjointError

END = 1e5


def robertson(t: float, y: np.ndarray) -> list[float]:
    """The truth, which the network does not see."""
    slow, fast, back = 0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]
    return [back - slow, slow - back - fast, fast]


def truth(times: Tensor) -> Tensor:
    """Concentrations (T, 3) at ``times``."""
    from scipy.integrate import solve_ivp

    sol = solve_ivp(robertson, (0.0, END), [1.0, 0.0, 0.0], method="Radau", t_eval=times.numpy(), rtol=1e-10, atol=1e-14)
    return torch.from_numpy(sol.y.T.copy())


# %%
class Reaction:
    """The right-hand side in scaled concentrations; weights are one flat tensor, so that one can have derivatives in all of them."""

    def __init__(self, width: int, tau: Tensor) -> None:
        self.width, self.tau = width, tau
        self.shapes = [(3, width), (width,), (width, 6), (6,)]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]

    def initial(self) -> Tensor:
        """Random inner weights; the outer ones nearly zero, so that each concentration relaxes in its own time at first."""
        torch.manual_seed(0)
        parts = [torch.randn(shape, dtype=torch.float64) for shape in self.shapes]
        return torch.cat([(scale * part).reshape(-1) for scale, part in zip((0.3, 0.5, 0.01, 0.0), parts, strict=True)])

    def __call__(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """``u``: (..., 3)."""
        inner, shift, outer, level = (part.reshape(shape) for part, shape in zip(p.split(self.sizes), self.shapes, strict=True))
        hidden = torch.tanh(((u.clamp(min=-5e-4) + 1e-3).log() / 3.5 + 1) @ inner + shift)
        a, b = (hidden @ outer + level).chunk(2, -1)
        return (a.exp() - u * b.exp()) / self.tau


def simulate(
    f: Reaction, p: Tensor, nodes: Tensor, data: Tensor, length: int, method: str = "radau5", tol: float = 1e-5
) -> adjoint.Solution:
    """Start from every ``length``-th sample and predict the ``length`` samples after it, all at once; ``sol.y``: (length, pieces, 3).

    ``nodes``: (T + 1,), 0 and the times of the samples; ``data``: (T + 1, 3).
    """
    starts, first = data[:-1:length], nodes[:-1:length]
    times = nodes[1:].reshape(-1, length).T
    return adjoint.solve_ivp(
        f, (first, times[-1]), starts, args=(p,), t_eval=times, method=method, rtol=tol, atol=tol / 10, batched=True,
        gradient=adjoint.ForwardSensitivity(),
    )  # fmt: skip


# %%
class Fit(NamedTuple):
    """The weights, and (seconds, root mean square, samples ahead) after each attempt."""

    p: Tensor
    history: list[tuple[float, float, int]]


def train(f: Reaction, nodes: Tensor, data: Tensor, stages: dict[int, int]) -> Fit:
    """Levenberg-Marquardt; ``stages``: so many attempts with pieces of such a length."""
    p, history, begin = f.initial(), [], time.perf_counter()
    target = data[1:].reshape(-1)
    unit, one = torch.eye(len(target), dtype=torch.float64), torch.eye(len(p), dtype=torch.float64)

    def residual(p: Tensor, length: int) -> tuple[Tensor, Tensor]:
        p = p.clone().requires_grad_()
        flat = simulate(f, p, nodes, data, length).y.transpose(0, 1).reshape(-1)
        (jacobian,) = torch.autograd.grad(flat, p, unit, is_grads_batched=True)
        return flat.detach() - target, jacobian

    for length, attempts in stages.items():
        (r, jacobian), damping = residual(p, length), 1e-3
        for k in range(attempts):
            step = torch.linalg.solve(jacobian.T @ jacobian + damping * one, -jacobian.T @ r)
            try:
                new, new_jacobian = residual(p + step, length)
                better = bool(new.square().sum() < r.square().sum())
            except AdjointError:  # these weights make a right-hand side that grows without bound
                better = False
            if better:
                p, r, jacobian, damping = p + step, new, new_jacobian, max(damping / 3, 1e-9)
            else:
                damping *= 4
            history.append((time.perf_counter() - begin, float(r.square().mean().sqrt()), length))
            if k == attempts - 1:
                seconds, rms, _ = history[-1]
                print(f"{length:2d} samples ahead, {attempts} attempts: root mean square {rms:.1e}, {seconds:.0f} s", flush=True)
    return Fit(p, history)


def slope_check(f: Reaction, p: Tensor, nodes: Tensor) -> tuple[float, float, float]:
    """The slope of sum u(t)^2 in a random direction of the weights: ours backwards, ours forwards, SciPy's differences."""
    from scipy.integrate import solve_ivp

    times, start = nodes[5:42:9], torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    direction = torch.randn(len(p), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()

    def ours(gradient: adjoint.DiscreteAdjoint | adjoint.ForwardSensitivity) -> float:
        q = p.clone().requires_grad_()
        options = {"method": "radau5", "rtol": 1e-7, "atol": 1e-9, "gradient": gradient}
        sol = adjoint.solve_ivp(f, (0.0, float(times[-1])), start, args=(q,), t_eval=times, **options)
        return float(torch.autograd.grad(sol.y.square().sum(), q)[0] @ direction)

    def theirs(q: Tensor) -> float:
        rate = lambda t, u: f(t, torch.from_numpy(u), q).numpy()  # noqa: E731
        sol = solve_ivp(rate, (0.0, float(times[-1])), start.numpy(), "Radau", times.numpy(), rtol=1e-9, atol=1e-11)
        return float(np.square(sol.y).sum())

    step = 1e-4
    difference = (theirs(p + step * direction) - theirs(p - step * direction)) / (2 * step)
    return ours(adjoint.DiscreteAdjoint()), ours(adjoint.ForwardSensitivity()), difference


def steps_to(f: Reaction, p: Tensor, end: float, method: str, limit: int) -> tuple[int, bool]:
    """Steps that were taken, and whether they reached ``end``."""
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        sol = adjoint.solve_ivp(f, (0.0, end), start, args=(p,), method=method, rtol=1e-5, atol=1e-6, max_steps=limit, throw=False)
    return int(sol.stats.n_steps), bool(sol.success)


def stiffness(f: Reaction, p: Tensor, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Largest modulus of the eigenvalues of the Jacobian, learned and true, at the states ``u`` (T, 3)."""
    learned = torch.func.vmap(torch.func.jacrev(lambda v: f(torch.zeros(()), v, p)))(u)
    y = u * scale
    zero, one = torch.zeros_like(y[:, 0]), torch.ones_like(y[:, 0])
    first = torch.stack([-0.04 * one, 1e4 * y[:, 2], 1e4 * y[:, 1]], -1)
    last = torch.stack([zero, 6e7 * y[:, 1], zero], -1)
    true = torch.stack([first, -first - last, last], 1)
    return torch.linalg.eigvals(learned).abs().amax(-1), torch.linalg.eigvals(true).abs().amax(-1)


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures") -> float:
    """Train, check, count, draw. Returns the largest error between the samples, in scaled concentrations."""
    times, dense = torch.logspace(-5, 5, 50, dtype=torch.float64), torch.logspace(-5, 5, 400, dtype=torch.float64).clamp(1e-5, END)
    times[-1] = END
    y = truth(times)
    scale = y.amax(0)
    zero, start = torch.zeros(1, dtype=torch.float64), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    nodes, data = torch.cat([zero, times]), torch.cat([start, y / scale])
    middle = (data[1:].amax(0) + data[1:].amin(0)) / 2
    tau = torch.stack([times[int((data[1:, i] > middle[i]).int().diff().nonzero()[0])] for i in range(3)])

    f = Reaction(8, tau)
    p, history = fit = train(f, nodes, data, {1: 21} if quick else {1: 30, 5: 25, 50: 25})
    with torch.no_grad():
        learned = adjoint.solve_ivp(f, (0.0, END), start[0], args=(p,), t_eval=dense, method="radau5", rtol=1e-7, atol=1e-9)
    want = truth(dense) / scale
    error = float((learned.y - want).abs().max())
    print(f"largest error at {len(dense)} times between the samples: {error:.1e} of the largest concentration")
    backwards, forwards, difference = slope_check(f, p, nodes)
    print(f"slope in the weights: {backwards:.9f} (adjoint), {forwards:.9f} (forward), {difference:.9f} (differences of SciPy's solutions)")

    ends = [1e-3, 1e-2, 1e-1, 1.0] if quick else [1e-3, 1e-2, 1e-1, 1.0, 3.0]
    limit, stiff = 10_000, [*ends, 1e1, 1e2, 1e3, 1e4, END]
    counts = {"radau5": [(end, steps_to(f, p, end, "radau5", limit)[0]) for end in stiff]}
    counts["tsit5"] = [(end, steps_to(f, p, end, "tsit5", limit)[0]) for end in ends]
    taken, reached = steps_to(f, p, END, "tsit5", 1000 if quick else 5000)
    rate, true_rate = stiffness(f, p, learned.y, scale)
    print(f"fastest rate along the way: learned {float(rate.max()):.0f}, true {float(true_rate.max()):.0f} per second; ", end="")
    print(f"from t = 1e-4 on within a factor of {float((rate / true_rate).log().abs()[dense > 1e-4].max().exp()):.2f} of each other")
    print(f"steps to t = {ends[-1]:g}: radau5 {counts['radau5'][len(ends) - 1][1]}, tsit5 {counts['tsit5'][-1][1]}")
    print(f"steps to t = {END:g}: radau5 {counts['radau5'][-1][1]}; tsit5 {'got there' if reached else 'had not got there'} after {taken}")
    path = draw(fit, dense, learned.y, want, (times, data[1:]), (rate, true_rate), counts, Path(out))
    print(f"figure: {path}")
    assert history[-1][1] < (0.02 if quick else 1e-3) and error < (0.1 if quick else 5e-3)
    assert abs(backwards / difference - 1) < 1e-4 and abs(forwards / backwards - 1) < 1e-8
    assert not reached and counts["radau5"][-1][1] < 300 < counts["tsit5"][-1][1]
    return error


# %%
def draw(
    fit: Fit,
    dense: Tensor,
    learned: Tensor,
    want: Tensor,
    samples: tuple[Tensor, Tensor],
    rates: tuple[Tensor, Tensor],
    counts: dict[str, list[tuple[float, int]]],
    out: Path,
) -> Path:
    """Samples and solutions, the fit, the stiffness, and the steps that methods take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    for i in range(3):
        a.semilogx(dense, want[:, i], color="0.75", lw=5, label="truth" if i == 0 else None)
        a.semilogx(dense, learned[:, i], color=f"C{i}", label=f"learned y{i + 1}" + (" / 3.6e-5" if i == 1 else ""))
        a.plot(samples[0], samples[1][:, i], "o", ms=3.5, color=f"C{i}")
    a.set(title="Robertson's reaction: samples and the learned solution", xlabel="t", ylabel="scaled concentrations")
    a.legend(loc="center", bbox_to_anchor=(0.4, 0.45))
    for length in sorted({row[2] for row in fit.history}):
        part = [row for row in fit.history if row[2] == length]
        b.semilogy([row[0] for row in part], [row[1] for row in part], ".-", label=f"{length} sample{'s' * (length > 1)} ahead")
    b.set(title="the fit by Levenberg and Marquardt", xlabel="seconds", ylabel="root mean square of the residuals")
    b.legend()
    c.loglog(dense, rates[1], color="0.75", lw=5, label="Robertson's")
    c.loglog(dense, rates[0], "C3", label="learned")
    c.loglog(dense, 1 / dense, "k:", lw=1, label="1 / t")
    c.set(title="fastest rate along the solution (largest eigenvalue)", xlabel="t", ylabel="1 / time")
    c.legend()
    for k, (name, rows) in enumerate(counts.items()):
        d.loglog(*zip(*rows, strict=True), "o-", color=f"C{k}", label=f"{name} ({'implicit' if name == 'radau5' else 'explicit'})")
    end, steps = counts["tsit5"][-1]
    d.loglog([end, END], [steps, steps * END / end], "C1:", label="tsit5, extrapolated")
    d.set(title="steps on the learned equations", xlabel="until t", ylabel="steps")
    d.legend()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "stiff_neural_ode.png"
    fig.savefig(path, dpi=100)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first stage of the training only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out)
