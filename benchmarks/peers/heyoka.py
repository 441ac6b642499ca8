"""heyoka: Taylor series compiled by LLVM, as many trajectories at a time as a register holds; gradients by variational equations."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..workloads import Case
from . import Stats

PACKAGES = ("heyoka",)


class _Ops:
    columns = staticmethod(lambda x: x)
    stack = staticmethod(lambda xs: xs)


class HeyokaRunner:
    """``taylor_adaptive_batch``, whose one tolerance is that of the case.

    The gradient is the cotangent of the solution times its derivatives in the parameters, which are integrated with it to first order.
    """

    peer, name = "heyoka", "heyoka variational"

    def __init__(self, case: Case) -> None:
        import heyoka as hy

        self.case, self.width = case, 1 if case.size == 1 else hy.recommended_simd_size()
        (pars,) = case.params
        self.n_pars = pars.shape[1]
        state = hy.make_vars(*(f"y{i}" for i in range(case.y0.shape[1])))
        rates = case.rhs(_Ops, hy.time, state, [hy.par[i] for i in range(self.n_pars)])
        system = list(zip(state, rates, strict=True))
        self._made: dict[str, Any] = {}
        self._systems = {"forward": system, "gradient": hy.var_ode_sys(system, hy.var_args.params)}
        # a last group that is not full is filled up with the last trajectory
        order = np.arange(-(-case.size // self.width) * self.width).clip(max=case.size - 1).reshape(-1, self.width)
        self._groups = [(np.ascontiguousarray(case.y0[k].T), np.ascontiguousarray(pars[k].T)) for k in order]

    def _integrator(self, what: str) -> Any:
        if what not in self._made:
            import heyoka as hy

            y0, pars = self._groups[0]
            made = hy.taylor_adaptive_batch(self._systems[what], y0, tol=self.case.rtol, pars=pars)
            self._made[what] = made, made.state.copy()
        return self._made[what]

    def _run(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(T, size, columns) of states, and with them their derivatives, and steps of each trajectory."""
        integrator, start = self._integrator(what)
        times = self.case.t_eval
        grid = np.tile(times[:, None], (1, self.width))
        out, steps = [], []
        for y0, pars in self._groups:
            integrator.set_time(float(times[0]))
            integrator.state[:] = start
            integrator.state[: len(y0)] = y0
            integrator.pars[:] = pars
            if len(times) == 2:
                integrator.propagate_until(float(times[1]))
                first = start.copy()
                first[: len(y0)] = y0
                out.append(np.stack([first, integrator.state]))
            else:
                out.append(integrator.propagate_grid(grid)[1].reshape(len(times), -1, self.width).copy())
            steps.append([found[3] for found in integrator.propagate_res])
        found = np.concatenate(out, -1).transpose(0, 2, 1)
        return found[:, : self.case.size], np.concatenate(steps)[: self.case.size]

    def forward(self) -> Any:
        return self._run("forward")[0]

    def gradient(self) -> Any:
        found, _ = self._run("gradient")
        n = self.case.y0.shape[1]
        y, slopes = found[..., :n], found[..., n:].reshape(*found.shape[:2], n, self.n_pars)
        return np.einsum("tbn,tbnp->bp", y[1:] - 1.0, slopes[1:])

    def values(self) -> np.ndarray:
        return self.forward()

    def gradients(self) -> list[np.ndarray]:
        return [self.gradient()]

    def stats(self) -> Stats:
        steps = self._run("forward")[1]
        return Stats(steps=steps, accepted=steps)

    def memory(self, what: str) -> tuple[float, str] | None:
        return None


def runners(case: Case, device: str) -> list[HeyokaRunner]:
    """Of ensembles."""
    if device != "cpu":
        raise RuntimeError("heyoka has no GPU")
    if not case.ensemble:
        raise NotImplementedError("networks are not written out number by number")
    return [HeyokaRunner(case)]
