"""diffrax: whole solves compiled by XLA ahead of the timing; ensembles by ``vmap``, so with own step sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..workloads import Case, loss
from . import Stats

PACKAGES = ("jax", "diffrax")


def _ops() -> Any:
    import jax
    import jax.numpy as jnp

    class JaxOps:
        columns = staticmethod(lambda x: [x[..., i] for i in range(x.shape[-1])])
        stack = staticmethod(lambda xs: jnp.stack(xs, -1))
        linear = staticmethod(lambda x, weight, bias: x @ weight.T + bias)
        tanh = staticmethod(jnp.tanh)
        softplus = staticmethod(jax.nn.softplus)

    return JaxOps


class DiffraxRunner:
    """``diffeqsolve`` with one adjoint; compiled on the first call, which the harness reports apart."""

    peer = "diffrax"

    def __init__(self, variant: str, case: Case, adjoint: Any) -> None:
        import diffrax
        import jax
        import jax.numpy as jnp

        self.name, self.case = f"diffrax {variant}", case
        ops, rhs = _ops(), case.rhs
        times = jnp.asarray(case.t_eval)
        controller = diffrax.PIDController(rtol=case.rtol, atol=case.atol)

        def single(y0: Any, params: Any) -> Any:
            term = diffrax.ODETerm(lambda t, y, p: rhs(ops, t, y, *p))
            sol = diffrax.diffeqsolve(
                term, diffrax.Dopri5(), times[0], times[-1], None, y0, params,
                saveat=diffrax.SaveAt(ts=times), stepsize_controller=controller, adjoint=adjoint,
            )  # fmt: skip
            return sol.ys, {k: sol.stats[k] for k in ("num_steps", "num_accepted_steps", "num_rejected_steps")}

        solve = jax.vmap(single, out_axes=(1, 0)) if case.ensemble and case.size > 1 else single
        target = None if case.target is None else jnp.asarray(case.target)
        self.data = (jnp.asarray(case.y0), tuple(jnp.asarray(p) for p in case.params))
        self.programs = {
            "forward": lambda y0, p: solve(y0, p)[0],
            "gradient": jax.grad(lambda y0, p: loss(solve(y0, p)[0], target), argnums=1),
            "stats": lambda y0, p: solve(y0, p)[1],
        }
        self.compiled: dict[str, Any] = {}

    def _run(self, what: str) -> Any:
        import jax

        if what not in self.compiled:
            self.compiled[what] = jax.jit(self.programs[what]).lower(*self.data).compile()
        return jax.block_until_ready(self.compiled[what](*self.data))

    def forward(self) -> Any:
        return self._run("forward")

    def gradient(self) -> Any:
        return self._run("gradient")

    def values(self) -> np.ndarray:
        return np.asarray(self.forward())

    def gradients(self) -> list[np.ndarray]:
        return [np.asarray(g) for g in self.gradient()]

    def stats(self) -> Stats:
        counts = {k: np.atleast_1d(np.asarray(v)) for k, v in self._run("stats").items()}
        steps = counts["num_steps"]
        n_fun = 6 * steps + 1  # diffrax has no count; this formula agrees with a counting callback in the right-hand side
        return Stats(steps, counts["num_accepted_steps"], counts["num_rejected_steps"], n_fun)

    def memory(self, what: str) -> tuple[float, str] | None:
        """What XLA plans to allocate; it is fixed when the program is compiled."""
        self._run(what)
        plan = self.compiled[what].memory_analysis()
        return None if plan is None else (float(plan.temp_size_in_bytes + plan.output_size_in_bytes), "XLA plan")


def runners(case: Case, device: str) -> list[DiffraxRunner]:
    """The checkpointed discrete adjoint (the default), and the continuous adjoint."""
    import diffrax
    import jax

    backend = jax.default_backend()
    if (backend == "cpu") != (device == "cpu"):
        raise RuntimeError(f"jax runs on {backend} here, the others on {device}")
    return [
        DiffraxRunner("checkpointed", case, diffrax.RecursiveCheckpointAdjoint()),
        DiffraxRunner("backsolve", case, diffrax.BacksolveAdjoint()),
    ]
