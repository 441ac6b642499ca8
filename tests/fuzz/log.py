"""Verdicts in a file, a line of JSON each: a run that was interrupted goes on from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from .judge import Verdict

__all__ = ["logged", "note"]


def logged(log: Path | None) -> dict[int, Verdict]:
    """What earlier runs have written, by seed."""
    if log is None or not log.exists():
        return {}
    return {v.seed: v for v in (Verdict(**json.loads(line)) for line in log.read_text().splitlines())}


def note(log: Path | None, verdict: Verdict) -> None:
    """Add a line, where there is a file to add it to."""
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
