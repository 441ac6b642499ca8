"""Random cases of `tests.fuzz`, cheap ones, against their reference: many more by ``make fuzz``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ..fuzz.case import Case
from ..fuzz.draw import draw
from ..fuzz.hybrid import judge as judge_hybrid
from ..fuzz.judge import Verdict, errors, judge, run, script
from ..fuzz.reference import truth

pytestmark = pytest.mark.users_defaults
CASES, CHUNK = 100, 20

#: what is not right yet, by a word of its kind and a property of the case; nothing else may fail
AWAITED: list[tuple[str, Callable[[Case], bool]]] = []


def unexpected(v: Verdict) -> bool:
    case = draw(v.seed, cheap=True)
    return v.outcome == "failed" and not any(words in v.kind and applies(case) for words, applies in AWAITED)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
@pytest.mark.slow_cases("40", "60")
def test_random_cases(first):
    found = [judge(seed, cheap=True) for seed in range(first, first + CHUNK)]
    wrong = [v for v in found if unexpected(v)]
    said = [f"python -m tests.fuzz --cheap --show {v.seed}: {v.kind}; {v.summary}; {v.detail}" for v in wrong]
    assert not wrong, "\n".join(said)
    assert sum(v.outcome == "right" for v in found) > CHUNK // 3


def test_random_cases_with_resets():
    found = [judge_hybrid(seed, cheap=True) for seed in range(5)]
    wrong = [f"{v.seed}: {v.kind} {v.detail}; {v.summary}" for v in found if v.outcome == "failed"]
    assert not wrong, "\n".join(wrong)
    assert sum(v.outcome == "right" for v in found) > 3


def test_cases_follow_from_their_seeds():
    torch.manual_seed(5)
    first = script(11, cheap=True)
    torch.manual_seed(6)
    assert script(11, cheap=True) == first != script(12, cheap=True)


def test_a_wrong_derivative_is_seen():
    """The reference moves everything that the case differentiates: one direction more, and it disagrees."""
    explicit = {"tsit5", "dopri5", "dopri8", "verner7"}
    cases = (draw(seed, cheap=True) for seed in range(500))
    plain = (c for c in cases if c.door == "solve_ivp" and c.form == "one" and c.style == "plain" and c.times != "list of tensors")
    case = replace(next(c for c in plain if c.method in explicit and c.dtype == "float64"), strategy="", derivative="backward")
    got, want = run(case), truth(case)
    assert max(errors(got, want)) < 1e-3 * (1 + want.first_size)
    for name in case.directions:
        if bool((case.directions[name] != 0).any()):
            still = {n: torch.zeros_like(d) if n == name else d for n, d in case.directions.items()}
            assert errors(got, truth(replace(case, directions=still)))[1] > 1e-3 * want.first_size
