"""Which evaluation of a run is the best by one score, and whether that score has fallen since: from what is on record.

A resume that changes how a run is evaluated begins a new series, and only evaluations of one series are compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vipo.evaluation.estimate import FEWEST_PROMPTS, Estimate, paired, paired_prompts, prompt_mean
from vipo.evaluation.records import EvaluationRecord

UNTRAINED = 0  # the iteration whose weights need no checkpoint: what the run began with


@dataclass(frozen=True)
class Best:
    """The evaluation with the highest mean over prompts of a score; the earliest of equals."""

    iteration: int
    mean: float

    @property
    def is_untrained(self) -> bool:
        return self.iteration == UNTRAINED

    def __str__(self) -> str:
        return f"{place(self.iteration)} ({self.mean:.4g})"


@dataclass(frozen=True)
class Fall:
    """A score that is lower than at its best by more than chance over prompts: the interval of ``loss`` is above 0."""

    name: str
    iteration: int
    best: Best
    loss: Estimate

    def __str__(self) -> str:
        loss = self.loss
        return (
            f"{self.name} fell by {loss.mean:.4g} [{loss.low:.4g}, {loss.high:.4g}] (95 % interval over prompts) from"
            f" its best, {self.best}"
        )


def place(iteration: int) -> str:
    """Which weights, in words."""
    return "the untrained model" if iteration == UNTRAINED else f"iteration {iteration}"


def series_of(records: Sequence[EvaluationRecord]) -> list[list[EvaluationRecord]]:
    """The evaluations that can be compared with each other, the latest series last."""
    begins = list(dict.fromkeys(record.comparable_since for record in records))
    return [[record for record in records if record.comparable_since == begin] for begin in begins]


def latest_series(records: Sequence[EvaluationRecord]) -> list[EvaluationRecord]:
    """The evaluations that can be compared with the last one."""
    found = series_of(records)
    return found[-1] if found else []


def best_of(series: Sequence[EvaluationRecord], name: str, kept: Collection[int] | None = None) -> Best | None:
    """The best by the score called ``name``; None if no evaluation has it.

    Args:
        kept: iterations whose weights there are, beside the untrained model's; None means all.
    """
    there = [record for record in series if kept is None or record.iteration == UNTRAINED or record.iteration in kept]
    means = [Best(one.iteration, prompt_mean(one.values[name], one.samples_per_prompt)) for one in _having(there, name)]
    return max((one for one in means if math.isfinite(one.mean)), key=lambda one: one.mean, default=None)


def fall_of(series: Sequence[EvaluationRecord], name: str) -> Fall | None:
    """How far the last evaluation is below the best one; None where that may be chance, or cannot be said."""
    best, having = best_of(series, name), _having(series, name)
    if best is None or best.iteration == having[-1].iteration or having[-1] is not series[-1]:
        return None
    last = having[-1]
    peak = next(record for record in having if record.iteration == best.iteration)
    loss = beyond_chance(peak.values[name], last.values[name], last.samples_per_prompt)
    return None if loss is None else Fall(name, last.iteration, best, loss)


def beyond_chance(higher: Float[Tensor, " N"], lower: Float[Tensor, " N"], samples_per_prompt: int) -> Estimate | None:
    """What one has over the other, paired; None where its interval is not above 0, or rests on too few prompts."""
    if paired_prompts(higher, lower, samples_per_prompt) < FEWEST_PROMPTS:
        return None
    found = paired(higher, lower, samples_per_prompt)
    return found if found.low > 0 else None


def _having(records: Sequence[EvaluationRecord], name: str) -> list[EvaluationRecord]:
    """Those with the score: a judge may have come later."""
    return [record for record in records if name in record.values]
