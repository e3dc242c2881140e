"""The guard between a run's evaluations: a held-out judge that falls beyond doubt while the reward rises beyond doubt.

Both are paired, picture by picture, with the evaluation at which that judge was highest. Nothing is kept for it: what
is said follows from the evaluations on record, so a run that goes on says the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vipo.evaluation.estimate import paired, paired_prompts, pairs
from vipo.guards import GuardOptions, begun, stopped
from vipo.report.outcome import verdict_of

NAME = "over_optimization"


@dataclass(frozen=True)
class Scored:
    """One evaluation: its judges, and the weighted sum of the rewards, each (N,) with NaN for no score."""

    iteration: int
    judges: Mapping[str, Tensor]
    reward: Tensor
    samples_per_prompt: int


@dataclass(frozen=True)
class Fall:
    """By how many standard deviations of its scores a judge has fallen beyond doubt, and since which iteration."""

    size: float
    judge: str
    since: int

    def __str__(self) -> str:
        return f" (judge {self.judge!r}, since its best evaluation, after iteration {self.since})"


def read(lines: Iterable[Mapping[str, Any]], judges: Iterable[str], weights: Mapping[str, float]) -> list[Scored]:
    """The evaluations of a run's log that can be compared with its last; judges that came later are none of it."""
    whole = list(lines)
    since = int(whole[-1].get("comparable_since") or 0) if whole else 0
    return [_scored(line, list(judges), weights) for line in whole if line["iteration"] >= since]


def _scored(line: Mapping[str, Any], judges: Sequence[str], weights: Mapping[str, float]) -> Scored:
    values = {
        name: torch.tensor([math.nan if value is None else float(value) for value in listed], dtype=torch.float64)
        for name, listed in line["values"].items()
    }
    parts = [weight * values[name] for name, weight in weights.items() if name in values]
    known = {name: values[name] for name in judges if name in values}
    count = int(line["samples_per_prompt"])
    return Scored(line["iteration"], known, torch.stack(parts).sum(0) if parts else torch.empty(0), count)


def fall(past: Sequence[Scored], now: Scored) -> Fall | None:
    """The deepest fall of a judge while the reward rose; None if there is none beyond doubt."""
    found = [one for judge in now.judges if (one := _fall_of(judge, past, now)) is not None]
    return max(found, key=lambda one: one.size, default=None)


def _fall_of(judge: str, past: Sequence[Scored], now: Scored) -> Fall | None:
    known = [one for one in past if judge in one.judges and pairs(now.judges[judge], one.judges[judge])]
    if not known:
        return None
    best = max(known, key=lambda one: float(one.judges[judge].nanmean()))
    before, after = best.judges[judge], now.judges[judge]
    if (
        _verdict(after, before, now) != "fell in this run"
        or _verdict(now.reward, best.reward, now) != "rose in this run"
    ):
        return None
    spread = float(before[before.isfinite()].std())
    least = -paired(after, before, now.samples_per_prompt).high  # what the interval leaves no doubt of
    return Fall(least / spread if spread > 0 else math.inf, judge, best.iteration)


def _verdict(after: Tensor, before: Tensor, now: Scored) -> str | None:
    if len(after) != len(before) or not pairs(after, before):
        return None
    prompts = paired_prompts(after, before, now.samples_per_prompt)
    return verdict_of(paired(after, before, now.samples_per_prompt), prompts)


def _streak(evaluations: Sequence[Scored], options: GuardOptions) -> tuple[int, Fall | None]:
    """For how many evaluations up to the last the guard has been beyond its threshold, and the last one's fall."""
    falls = [fall(evaluations[:number], one) for number, one in enumerate(evaluations)]
    beyond = [one is not None and options.is_beyond(one.size) for one in falls]
    return next((k for k, is_so in enumerate(reversed(beyond)) if not is_so), len(beyond)), falls[-1]


def events(evaluations: Sequence[Scored], options: GuardOptions) -> list[str]:
    """What to tell of the last evaluation: the guard's event, if it begins with it."""
    if options.action == "off" or not evaluations:
        return []
    count, last = _streak(evaluations, options)
    if last is None or count != options.in_a_row:
        return []
    return [begun(NAME, options, last.size, where=str(last))]


def failure(evaluations: Sequence[Scored], options: GuardOptions) -> str | None:
    """Why the run must end with the last evaluation, or None."""
    if options.action != "stop" or not evaluations or _streak(evaluations, options)[0] < options.in_a_row:
        return None
    return stopped(NAME)
