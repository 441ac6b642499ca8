# %% [markdown]
# A reaction that oscillates and diffuses, solved and differentiated by an explicit, an implicit and an implicit-explicit method
#
# The Brusselator on the periodic unit square (Hairer & Wanner, Solving ordinary differential equations II, section IV.10):
#     u' = A + u^2 v - (B + 1) u + D lap u + f,   v' = B u - u^2 v + D lap v,
# where f = 5 in a disc from t = 1.1 on. Central differences make 2 n^2 equations of it, whose stiffness is the diffusion's: 8 D n^2. An
# explicit method is bound by that; an implicit one factorises the Jacobian of everything; an implicit-explicit one takes the
# diffusion implicitly, which is linear and couples u and v no more, and the reaction explicitly. Nothing is told about the sparsity: it is
# found from the functions, and coloured.
#
# What is differentiated is how far u is from 1 at the end, J = mean (u(T) - 1)^2, in A, B, D and the whole initial field, by one sweep
# backwards. On a coarse grid the three numbers are compared with differences of SciPy's solutions.

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import adjoint
from adjoint.system.jacobians_sparse import SparseJacobian, choose_jacobian

RATES = torch.tensor([1.0, 3.4, 0.1], dtype=torch.float64)  # A, B, D
JUMP, END = 1.1, 11.5
METHODS = {"tsit5": "explicit", "kvaerno5": "implicit", "kencarp4": "implicit-explicit"}


# %%
class Brusselator:
    """The two parts of the right-hand side on an ``n x n`` grid; states are ``(2, n, n)``: u and v."""

    def __init__(self, n: int) -> None:
        self.n = n
        points = torch.arange(n, dtype=torch.float64) / n
        self.y, self.x = torch.meshgrid(points, points, indexing="ij")
        self.inflow = 5.0 * ((self.x - 0.3).square() + (self.y - 0.6).square() <= 0.1**2)

    def start(self) -> Tensor:
        """The initial state."""
        return torch.stack([22 * self.y * (1 - self.y) ** 1.5, 27 * self.x * (1 - self.x) ** 1.5])

    def reaction(self, t: Tensor, w: Tensor, p: Tensor) -> Tensor:
        """What happens at each point by itself."""
        u, v = w
        bound = u * u * v
        return torch.stack([p[0] + bound - (p[1] + 1) * u + self.inflow * (t >= JUMP), p[1] * u - bound])

    def diffusion(self, t: Tensor, w: Tensor, p: Tensor) -> Tensor:
        """What passes between neighbours."""
        around = w.roll(1, -1) + w.roll(-1, -1) + w.roll(1, -2) + w.roll(-1, -2)
        return p[2] * (around - 4 * w) * self.n**2

    def split(self) -> adjoint.SplitFunction:
        """For implicit-explicit methods; others integrate the sum."""
        return adjoint.SplitFunction(self.reaction, self.diffusion)


def distance(state: Tensor) -> Tensor:
    """The functional J of an end state."""
    return (state[0] - 1).square().mean()


class Run(NamedTuple):
    """The functional with its gradients in the rates and in the initial state, and the work."""

    J: float
    rates: Tensor
    start: Tensor
    steps: int
    factorizations: int
    seconds: tuple[float, float]


def run(model: Brusselator, method: str, tol: float, end: float = END) -> Run:
    """Solve and differentiate."""
    p, y0 = RATES.clone().requires_grad_(), model.start().requires_grad_()
    begin = time.perf_counter()
    # the reaction jumps: a step has to end there
    sol = adjoint.solve_ivp(
        model.split(), (0.0, end), y0, args=(p,), method=method, rtol=tol, atol=tol / 100, step_ts=[JUMP], max_steps=10**6
    )
    J = distance(sol.y[-1])
    solved = time.perf_counter()
    rates, start = torch.autograd.grad(J, (p, y0))
    seconds = solved - begin, time.perf_counter() - solved
    return Run(float(J.detach()), rates, start, int(sol.stats.n_steps), int(sol.stats.n_factorizations), seconds)


# %%
def differences(n: int, end: float, step: float = 1e-4) -> Tensor:
    """dJ in the rates by central differences of SciPy's solutions."""
    from scipy.integrate import solve_ivp

    model = Brusselator(n)

    def J(p: Tensor) -> float:
        def rate(t: float, w: np.ndarray) -> np.ndarray:
            state, now = torch.from_numpy(w).reshape(2, n, n), torch.tensor(t)
            return (model.reaction(now, state, p) + model.diffusion(now, state, p)).reshape(-1).numpy()

        # in two pieces, for the jump is not SciPy's business; on this coarse grid an explicit method will do
        options = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-12}
        # just below, so that the first piece sees no inflow at its end
        middle = solve_ivp(rate, (0.0, np.nextafter(JUMP, 0.0)), model.start().reshape(-1).numpy(), **options).y[:, -1]
        last = solve_ivp(rate, (JUMP, end), middle, **options).y[:, -1]
        return float(distance(torch.from_numpy(last).reshape(2, n, n)))

    def slope(i: int) -> float:
        unit = step * torch.eye(3, dtype=torch.float64)[i]
        return (J(RATES + unit) - J(RATES - unit)) / (2 * step)

    return torch.tensor([slope(i) for i in range(3)], dtype=torch.float64)


def colours(model: Brusselator) -> dict[str, str]:
    """What is found out about the Jacobians of the sum and of the diffusion."""
    n, out = model.n, {}
    split = model.split()
    for name, part in (("all", split), ("diffusion", split.implicit)):
        flat = lambda w, part=part: part(torch.tensor(2.0), w.reshape(2, n, n), RATES).reshape(1, -1)  # noqa: E731
        found, _ = choose_jacobian(flat, model.start().reshape(1, -1))
        if isinstance(found, SparseJacobian):
            out[name] = f"{found.pattern.nnz} entries in {found.coloring.n_colors} colours"
        else:
            out[name] = "dense"
    return out


def main(quick: bool = False, out: Path = Path(__file__).parent / "figures", n: int | None = None) -> float:
    """Check, compare, draw. Returns the largest relative distance of a derivative to SciPy's."""
    n, end = n or (12 if quick else 48), 3.0 if quick else END
    small = 8 if quick else 12
    want = differences(small, end)
    print(f"dJ / d(A, B, D) on {small} x {small} points, by differences of SciPy's solutions: {_numbers(want)}")
    worst = 0.0
    for method in METHODS:
        got = run(Brusselator(small), method, 1e-7 if quick else 1e-8, end).rates
        worst = max(worst, float(((got - want) / want).abs().max()))
        print(f"{method:9s} {_numbers(got)}")
    print(f"largest relative distance: {worst:.1e}\n")

    model = Brusselator(n)
    print(f"{n} x {n} points, {2 * n * n} equations; stiffness 8 D n^2 = {8 * float(RATES[2]) * n * n:.0f}; tolerance 1e-5")
    for name, text in colours(model).items():
        print(f"Jacobian of {name}: {text}")
    runs = {}
    print("\nmethod     steps  factorisations   solve  gradient      J   dJ / d(A, B, D)")
    for method in METHODS:
        r = runs[method] = run(model, method, 1e-5, end)
        print(
            f"{method:9s} {r.steps:6d} {r.factorizations:15d} {r.seconds[0]:6.1f} s {r.seconds[1]:7.1f} s {r.J:7.4f}   {_numbers(r.rates)}"
        )
    path = draw(model, runs, end, Path(out))
    print(f"figure: {path}")
    assert worst < 1e-4
    first, second = runs["kvaerno5"], runs["kencarp4"]
    assert torch.allclose(first.rates, second.rates, rtol=5e-3) and runs["kencarp4"].steps < runs["tsit5"].steps
    assert float((first.start - second.start).norm() / first.start.norm()) < 0.02
    return worst


def _numbers(x: Tensor) -> str:
    return "  ".join(f"{float(v):9.6f}" for v in x)


# %%
def draw(model: Brusselator, runs: dict[str, Run], end: float, out: Path) -> Path:
    """The field at some times, the mean over time, what the initial field does to the functional, and the work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [0.5, 1.4, 2.5] if end < 5 else [1.4, 6.0, 8.0]
    times = torch.cat([torch.linspace(0, end, 120, dtype=torch.float64), torch.tensor(shown, dtype=torch.float64)])
    with torch.no_grad():
        sol = adjoint.solve_ivp(
            model.split(), (0.0, end), model.start(), args=(RATES,), method="kencarp4", t_eval=times.sort().values, rtol=1e-5, atol=1e-7,
            step_ts=[JUMP],
        )  # fmt: skip
    fig, ((a, b, c), (d, e, g)) = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    square = (0.0, 1.0, 0.0, 1.0)
    for panel, t in zip((a, b, c), shown, strict=True):
        index = int((sol.t - t).abs().argmin())
        image = panel.imshow(sol.y[index, 0], origin="lower", extent=square, cmap="viridis")
        panel.set(title=f"u at t = {t}", xlabel="x", ylabel="y")
        fig.colorbar(image, ax=panel, shrink=0.85)
    for i, name, colour in ((0, "u", "tab:blue"), (1, "v", "tab:orange")):
        mean, low, high = sol.y[:, i].mean((-1, -2)), sol.y[:, i].amin((-1, -2)), sol.y[:, i].amax((-1, -2))
        d.fill_between(sol.t, low, high, color=colour, alpha=0.2, lw=0)
        d.plot(sol.t, mean, color=colour, label=name)
    d.axvline(JUMP, color="0.5", ls="--", lw=1, label="inflow begins")
    d.set(title="mean and range over the square", xlabel="t")
    d.legend()
    field = runs["kencarp4"].start[0] * model.n**2
    top = float(field.abs().max())
    image = e.imshow(field, origin="lower", extent=square, cmap="RdBu_r", vmin=-top, vmax=top)
    e.set(title="dJ / du(0): what the initial field does to the end", xlabel="x", ylabel="y")
    fig.colorbar(image, ax=e, shrink=0.85)
    place = np.arange(len(runs))
    for shift, index, label in ((-0.2, 0, "solve"), (0.2, 1, "gradient")):
        bars = g.bar(place + shift, [r.seconds[index] for r in runs.values()], 0.4, label=label)
        g.bar_label(bars, fmt="%.1f", fontsize=8)
    g.set_xticks(place, [f"{name}\n{METHODS[name]}\n{r.steps} steps" for name, r in runs.items()])
    g.set(title="the work", ylabel="seconds")
    g.legend()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "brusselator.png"
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a coarse grid and a short time")
    parser.add_argument("--n", type=int, default=None, help="points of the grid in one direction")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures", help="folder of the figure")
    options = parser.parse_args()
    main(options.quick, options.out, options.n)
