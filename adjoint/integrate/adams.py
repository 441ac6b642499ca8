"""Adams-Bashforth-Moulton methods at work: predict, evaluate, correct, evaluate; the next order and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods.abm import Weights, step_weights, uniform_errors
from .clock import initial_step
from .multistep import MultistepSolver, Outcome, Predicted
from .plan import Plan
from .stepper import Attempt, StageWork

__all__ = ["PATIENCE", "AdamsSolver", "Prediction", "corrected", "predicted", "shifted_nodes", "updated"]

#: failures in a row after which a step is begun anew with order 1
PATIENCE = 3


class Prediction(NamedTuple):
    """``star`` (Q + 1, B, n): the differences ``beta_j Phi_j`` up to ``j = q``; ``low``: below ``q``; ``slope`` and state ``y`` (B, n) at
    the end of the step."""

    star: Tensor
    low: Tensor
    slope: Tensor
    y: Tensor


def predicted(D: Tensor, h: Tensor, weights: Weights) -> Prediction:
    """From the state and the differences ``D`` (Q + 2, B, n), over ``h`` (B, 1)."""
    real = D.dtype.to_real()
    star = D[1:] * weights.growth.to(real)
    low = star * weights.below.to(real)
    return Prediction(star, low, low.sum(0), D[0] + h * (low * weights.integrals.to(real)).sum(0))


def corrected(prediction: Prediction, delta: Tensor, h: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """State and stages of the correction; ``delta``: the evaluated slope without that of the prediction."""
    real = h.dtype
    at = weights.at.to(real)
    y = prediction.y + h * (weights.integrals.to(real) * at).sum(0) * delta
    slopes = torch.einsum("blj,jbn->lbn", weights.basis.to(delta.dtype), prediction.low + at * delta)
    return y, torch.cat([slopes, delta.unsqueeze(0)])


def updated(y: Tensor, slope: Tensor, star: Tensor, kept: Tensor) -> Tensor:
    """The table after the step: ``Phi_j = slope - sum_{i < j} star_i`` for the differences ``kept`` (Q + 1, B, 1)."""
    before = torch.cat([torch.zeros_like(star[:1]), star[:-1].cumsum(0)])
    return torch.cat([y.unsqueeze(0), (slope - before) * kept])


def shifted_nodes(past: Tensor, h: Tensor) -> Tensor:
    """Times (B, Q + 1) without the present one, after a step of ``h`` (B,)."""
    return torch.cat([torch.zeros_like(past[:, :1]), past[:, :-1] - h.unsqueeze(-1)], -1)


class AdamsSolver(MultistepSolver):
    """The method `Adams` of a plan. Orders and sizes by the rules of Shampine & Gordon's STEP: an order more and twice the size after each
    step at the beginning; later an order more after ``q + 1`` equal steps whose estimates fall with the order, sizes doubled, kept, or cut.
    """

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], plan: Plan, rows: int, device: torch.device) -> None:
        self.f, self.plan = f, plan
        self.most: int = plan.method.max_order  # type: ignore[attr-defined]
        self.work = StageWork.zero(rows, device)
        self.stuck = torch.zeros(rows, dtype=torch.bool, device=device)

    def start(self, anchors: Tensor, sign: Tensor, y0: Tensor) -> Tensor:
        """See `MultistepSolver.start`."""
        plan, t = self.plan, anchors[0]
        slope = self.f(t.to(plan.real), y0)
        if plan.first_step is not None:
            step = torch.full_like(t, plan.first_step)
            self.work.n_fun += 1
        else:
            step = initial_step(self.f, plan, anchors, y0, slope, sign)
            self.work.n_fun += 2
        self.D = torch.cat([torch.stack([y0, slope]), y0.new_zeros(self.most, *y0.shape)])
        self.sign = sign
        self.constants = torch.tensor(uniform_errors(self.most), dtype=torch.float64, device=t.device)
        self.place = torch.arange(self.most + 1, device=t.device)
        step = step.clamp(min=plan.min_step, max=plan.max_step)
        # behind the history there are no times: these stand in, and nothing is made of them
        self.past = -(step * sign).unsqueeze(-1) * self.place
        self.order = torch.ones(len(y0), dtype=torch.int64, device=t.device)
        self.equal, self.fails = torch.zeros_like(self.order), torch.zeros_like(self.order)
        self.rising = torch.ones_like(self.stuck)
        self.last = torch.zeros_like(t)
        return step

    @property
    def idle(self) -> Tensor:
        """See `MultistepSolver.idle`: order 1, and nodes at which no weight is infinite."""
        return torch.cat([self.place.new_ones(1), -self.place]).double()

    def resize(self, factor: Tensor, which: Tensor) -> None:
        """The differences are those of real times: a change of the next step's size is no concern of theirs."""

    def predict(self, when: Tensor, h: Tensor, running: Tensor) -> Predicted:
        """See `MultistepSolver.predict`."""
        nodes = self.past / torch.where(h == 0, self.sign, h).unsqueeze(-1)
        weights = step_weights(nodes, self.order)
        hr = h.to(self.plan.real).unsqueeze(-1)
        prediction = predicted(self.D, hr, weights)
        slope = self.f(when, prediction.y)
        self.work.n_fun += running
        delta = slope - prediction.slope
        y, stages = corrected(prediction, delta, hr, weights)
        g, one_less = weights.integrals, weights.at.roll(-1, 0)
        constant = (g * (weights.at - one_less)).sum(0).to(hr.dtype)
        extra = torch.cat([self.order.double().unsqueeze(0), nodes.t()])
        solved = torch.isfinite(y).all(-1) & torch.isfinite(delta).all(-1)
        return Predicted(y, hr * constant * delta, solved, stages.unbind, lambda: extra, (prediction, weights, h, delta))

    def accept(self, found: Predicted, passed: Tensor, restart: Tensor, step: Attempt) -> None:
        """See `MultistepSolver.accept`."""
        if not bool(passed.any()):
            return
        prediction, _, h, _ = found.kept
        y = torch.where(passed.unsqueeze(-1), found.y, self.D[0])
        slope = self.f(self.seen(step.end, 0.0, step.before), y)
        self.work.n_fun += passed
        highest = torch.where(restart, 0, self.order + 1)
        kept = (self.place <= highest.unsqueeze(-1)).to(self.plan.real).t().unsqueeze(-1)
        self.D = torch.where(passed.reshape(1, -1, 1), updated(y, slope, prediction.star, kept), self.D)
        self.past = torch.where(passed.unsqueeze(-1), shifted_nodes(self.past, h), self.past)
        self.equal = torch.where(passed, torch.where(h == self.last, self.equal + 1, 1), self.equal)
        self.last = torch.where(passed, h, self.last)
        self.fails = torch.where(passed, 0, self.fails)

    def propose(self, found: Predicted, outcome: Outcome) -> Tensor:
        """See `MultistepSolver.propose`."""
        _, passed, failed, rejected, restart, _, scale = outcome
        order, most = self.order, self.most
        here, one_less, two_less = self._estimates(found, scale)
        lower = torch.where(order > 2, torch.maximum(one_less, two_less) <= here, (order == 2) & (one_less <= 0.5 * here))
        self.rising = self.rising & torch.where(passed, ~lower & (order < most), ~(rejected | failed))
        ready = passed & ~self.rising & ~lower & (self.equal > order) & (order < most)
        more = torch.full_like(here, float("inf"))
        if bool(ready.any()):
            more = self._above(found.kept[2], scale)
            lower = lower | (ready & (order > 1) & (one_less <= torch.minimum(here, more)))
        higher = (passed & self.rising) | (ready & ~lower & (more < torch.where(order > 1, here, 0.5 * here)))
        level = torch.where(lower, one_less, torch.where(ready & higher, more, here)).clamp(min=1e-30)
        order = torch.where(passed | rejected, order + higher.long() - (lower & (order > 1)).long(), order)
        cut = ((0.5 / level) ** (1 / (order + 1))).clamp(0.5, 0.9)
        kept = torch.where(level <= 0.5, 1.0, cut)
        factor = torch.where(self.rising | (level * 2.0 ** (order + 1) <= 0.5), 2.0, kept)
        self.fails = self.fails + (rejected | failed)
        again = (rejected | failed) & (self.fails >= PATIENCE)
        order = torch.where(again, 1, order)
        # of an error that is no number the size would be none either, and no step of such a size is ever too small
        down = torch.where(again & rejected, (0.5 / here.clamp(min=1e-30)).sqrt().nan_to_num(0.0).clamp(0.01, 0.5), 0.5)
        factor = torch.where(passed, factor, torch.where(rejected | failed, down, 1.0))
        self.order = torch.where(restart, 1, order)
        self.rising, self.equal = self.rising | restart, torch.where(restart, 0, self.equal)
        return torch.where(restart, 0.1, factor)

    def _norm(self, estimate: Tensor, scale: Tensor) -> Tensor:
        return self.plan.norm(self.plan.scaled(estimate, scale).abs()).double()

    def _estimates(self, found: Predicted, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The errors (B,) at the order of the step and the two below it, as though the grid were even."""
        prediction, weights, h, delta = found.kept
        # Phi_j at the end of the step, by the slope of the prediction: sum of the differences from j to q
        table = (prediction.low + weights.at.to(h.dtype).to(self.plan.real) * delta).flip(0).cumsum(0).flip(0)
        sizes = h.unsqueeze(-1) * self.constants[:-1].reshape(-1, 1, 1) * weights.uniform
        scaled: Any = table * sizes.to(self.plan.real)
        rows = torch.arange(len(h), device=h.device)
        norms = [self._norm(scaled[(self.order - k).clamp(min=0), rows], scale) for k in range(3)]
        return norms[0], norms[1], norms[2]

    def _above(self, h: Tensor, scale: Tensor) -> Tensor:
        """The error (B,) of an order more, after steps of equal size."""
        rows = torch.arange(len(h), device=h.device)
        next_ = (self.order + 1).clamp(max=self.most)
        estimate = (h * self.constants[next_]).to(self.plan.real).unsqueeze(-1) * self.D[1 + next_, rows]
        return self._norm(estimate, scale)
