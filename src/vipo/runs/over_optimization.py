"""The guard between a run's evaluations: a held-out judge that falls beyond doubt while the reward rises beyond doubt.

Both are paired, picture by picture, with the evaluation at which that judge was highest. Nothing is kept for it: what
is said follows from the evaluations on record, so a run that goes on says the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vipo.evaluation.best import beyond_chance, fall_of, latest_series
from vipo.evaluation.records import EvaluationRecord
from vipo.guards import GuardOptions, begun, stopped

NAME = "over_optimization"


@dataclass(frozen=True)
class Depth:
    """By how many standard deviations of its scores a judge has fallen beyond doubt, and since which iteration."""

    size: float
    judge: str
    since: int

    def __str__(self) -> str:
        return f" (judge {self.judge!r}, since its best evaluation, after iteration {self.since})"


@dataclass(frozen=True)
class JudgeWatch:
    """The guard of one run.

    Args:
        judges: of which none may fall.
        weights: of the rewards, whose weighted sum rises meanwhile.
    """

    options: GuardOptions
    judges: Sequence[str]
    weights: Mapping[str, float]

    def fall(self, series: Sequence[EvaluationRecord]) -> Depth | None:
        """The deepest fall of a judge up to the last evaluation of a series; None if there is none beyond doubt."""
        found = [depth for judge in self.judges if (depth := self._fall_of(judge, series)) is not None]
        return max(found, key=lambda one: one.size, default=None)

    def _fall_of(self, judge: str, series: Sequence[EvaluationRecord]) -> Depth | None:
        fall = fall_of(series, judge)
        if fall is None:
            return None
        peak, last = next(one for one in series if one.iteration == fall.best.iteration), series[-1]
        risen, before = self._reward(last), self._reward(peak)
        if risen is None or before is None or beyond_chance(risen, before, last.samples_per_prompt) is None:
            return None
        scores = peak.values[judge]
        spread = float(scores[scores.isfinite()].std())
        return Depth(fall.loss.low / spread if spread > 0 else math.inf, judge, peak.iteration)

    def _reward(self, record: EvaluationRecord) -> Tensor | None:
        """What is trained on, of each picture; None if it was not evaluated."""
        parts = [weight * record.values[name] for name, weight in self.weights.items() if name in record.values]
        return torch.stack(parts).sum(0) if parts else None

    def _streak(self, records: Sequence[EvaluationRecord]) -> tuple[int, Depth | None]:
        """For how many evaluations up to the last it has been beyond its threshold, and the last one's fall."""
        series = latest_series(records)
        falls = [self.fall(series[: number + 1]) for number in range(len(series))]
        beyond = [one is not None and self.options.is_beyond(one.size) for one in falls]
        return next((k for k, is_so in enumerate(reversed(beyond)) if not is_so), len(beyond)), falls[-1]

    def events(self, records: Sequence[EvaluationRecord]) -> list[str]:
        """What to tell of the last evaluation: the guard's event, if it begins with it."""
        if self.options.action == "off" or not records:
            return []
        count, last = self._streak(records)
        if last is None or count != self.options.in_a_row:
            return []
        return [begun(NAME, self.options, last.size, where=str(last))]

    def failure(self, records: Sequence[EvaluationRecord]) -> str | None:
        """Why the run must end with the last evaluation, or None."""
        if self.options.action != "stop" or not records or self._streak(records)[0] < self.options.in_a_row:
            return None
        return stopped(NAME)
