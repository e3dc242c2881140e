"""Whether an update may be applied, and whether a run learns at all: streaks of skipped updates, of rewards without
spread, and weights that stay put.

Rewards whose spread is far below what a group's deviation is divided by teach as little as those without any.

A streak that reaches the limit is an event, once. Where no update has moved a weight so far, it is the end of the run:
nothing in it can become better by going on. All of it is decided from numbers that every process has alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from vipo.objective import EPS
from vipo.training.watch import Memory, Watch

LIMIT_KEY = "training.max_skipped_in_a_row"
MEND_FLAT = (
    "check the reward on a picture whose score you know (docs/rewards.md says how); in a new run, samples differ more"
    f" with a higher solver.eta or prompts.group_size, and a reward that is seldom given needs a higher {LIMIT_KEY}"
)
MEND_OUTLIERS = "if gradients of this size are right, a new run needs a higher optimizer.guard_factor"
LOWER_RATE = "a lower optimizer.learning_rate"

MEND_FAINT = (
    "their unit is far too large: let the reward return numbers whose differences are about 1 (its weight comes after"
    " the division and does not help)"
)
MEND_CANCELLED = "in a new run give other rewards.*.weight, or a higher prompts.group_size"
FAINT = 1e-3  # an advantage_size below this is none: it is about 0.8 where scores differ by far more than their eps
NO_SPREAD = FAINT * EPS  # a spread within groups below this is none
STILL_GUARDS = ("weights_still",)  # what these tell of is told as a streak of its own: of skipped updates,
FLAT_GUARDS = ("flat_groups", "reward_spread", *STILL_GUARDS)  # and of iterations without spread
GUARD_MEMORY = 20  # how many gradient norms the guard remembers


@dataclass
class GradientGuard:
    """Remembers recent gradient norms and says when one is out of line."""

    factor: float
    norms: list[float] = field(default_factory=list)

    def reason_to_skip(self, norm: float) -> str | None:
        """Why this update must not be applied, or None. A norm that passes is remembered."""
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if len(self.norms) >= GUARD_MEMORY // 2 and norm > self.factor * statistics.median(self.norms):
            return f"gradient norm {norm:.3g} is over {self.factor:g} times the recent median"
        if norm > 0:  # rewards without spread give none at all: a median of 0 would refuse every later update
            self.norms = [*self.norms, norm][-GUARD_MEMORY:]
        return None


@dataclass
class Record:
    """What a checkpoint keeps of it."""

    learned: bool = False  # an update that had a gradient was applied and moved a weight
    skipped: int = 0  # updates, in all
    skipped_in_a_row: int = 0
    flat: int = 0  # iterations in which no sample had an advantage, in all
    flat_in_a_row: int = 0
    why_skipped: str = ""  # the last of them
    flat_rewards: list[str] = field(default_factory=list)  # what the last such iteration was scored with
    constant: dict[str, int] = field(default_factory=dict)  # iterations in a row that a reward alone had no spread in
    guards: Memory = field(default_factory=Memory)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Self:
        """From what a file has of it; files of before know no guards."""
        return cls(**{**kept, "guards": Memory(**kept.get("guards", {}))})


class Health:
    """Counts what keeps a run from learning, and says so in words.

    Args:
        limit: updates skipped, or iterations without spread, in a row that are too many.
        remedies: what to set in a new run whose gradient is not finite, each as ``key=value``.
        watch: the guards, which remember what they have seen in the record.
    """

    def __init__(self, limit: int = 3, remedies: Sequence[str] = (), watch: Watch | None = None) -> None:
        self.limit, self.remedies, self.watch = limit, tuple(remedies), watch or Watch()
        self.record = Record()

    def restore(self, record: Record) -> None:
        """Go on from a checkpoint's."""
        self.record, self.watch.memory = record, record.guards

    def skipped(self, reason: str, *, finite: bool) -> list[str]:
        """An update was not applied; what to report of it. The first of a streak says what to try against NaN."""
        record = self.record
        record.skipped += 1
        record.skipped_in_a_row += 1
        record.why_skipped = reason
        advice = "" if finite or record.skipped_in_a_row > 1 else f"; in a new run, try {self._remedies()}"
        events = [f"{reason}: update skipped{advice}"]
        if record.skipped_in_a_row == self.limit:
            events.append(f"{self._skipping()}; {MEND_OUTLIERS}" if finite else self._skipping())
        return events

    def outlier(self, reason: str) -> tuple[bool, list[str]]:
        """A finite gradient is out of line, for this reason: whether its update is not applied, and what to report."""
        action = self.watch.action("gradient_norm")
        if action == "off":
            return False, []
        self.watch.outlier()
        if action == "warn":
            return False, [f"{reason}: update applied, as guards.gradient_norm=warn says"]
        return True, self.skipped(reason, finite=True)

    def refused(self, reason: str) -> list[str]:
        """A guard, which has an event of its own, kept an update from being applied; what to report beside that."""
        record = self.record
        record.skipped += 1
        record.skipped_in_a_row += 1
        record.why_skipped = reason
        return [self._skipping()] if record.skipped_in_a_row == self.limit else []

    def applied(self, *, moved: bool) -> None:
        """An update was applied, and it had a gradient and ``moved`` a weight or not."""
        self.record.learned |= moved
        self.record.skipped_in_a_row = 0

    def iteration(self, metrics: Mapping[str, float]) -> list[str]:
        """An iteration is over; ``metrics`` are those of all processes together. What to report of it."""
        record, flat = self.record, metrics["advantage_size"] < FAINT
        record.flat += flat
        record.flat_in_a_row = record.flat_in_a_row + 1 if flat else 0
        if flat:
            record.flat_rewards = [key.removeprefix("spread/") for key in metrics if key.startswith("spread/")]
        faint = _faint(metrics) if flat and record.flat_in_a_row == 1 else []
        streak = [f"{self._flat()}; {MEND_FLAT}"] if record.flat_in_a_row == self.limit else []
        streak += [] if flat else self._constant(metrics)
        told = FLAT_GUARDS if record.flat_in_a_row else STILL_GUARDS if record.skipped_in_a_row else ()
        watched = self.watch.iteration(metrics, silent=told)
        record.guards = self.watch.memory
        return faint + streak + watched

    @property
    def in_streak(self) -> bool:
        """Whether a streak is at its limit or beyond, which has been an event."""
        streak = max(self.record.skipped_in_a_row, self.record.flat_in_a_row) >= self.limit
        return streak and self.watch.stopping() is None

    def failure(self, iterations: int, *, last: bool) -> str | None:
        """Why the run is over after so many ``iterations``, the ``last`` or not; None where it may go on."""
        record, stopping = self.record, self.watch.stopping()
        if stopping is not None or record.learned:
            return stopping
        if record.skipped_in_a_row >= self.limit:
            cause = f"{self._skipping()}, at last because the {record.why_skipped}"
            mend = f"begin a new run with {self._remedies()}"
        elif record.flat_in_a_row >= self.limit:
            cause, mend = self._flat(), MEND_FLAT
        elif last:
            cause, mend = self._unmoved()
        else:
            return None
        return f"nothing was learned in {iterations} iterations: {cause}; {mend}"

    def _skipping(self) -> str:
        return f"{self.record.skipped_in_a_row} updates in a row were skipped ({LIMIT_KEY}={self.limit})"

    def _flat(self) -> str:
        rewards = " and ".join(map(repr, self.record.flat_rewards))
        return (
            f"{rewards} gave no sample an advantage in {self.record.flat_in_a_row} iterations in a row"
            f" ({LIMIT_KEY}={self.limit})"
        )

    def _constant(self, metrics: Mapping[str, float]) -> list[str]:
        """What to report of rewards that tell no two samples of a group apart, while others do and hide it.

        Of one that once did, the guard ``reward_spread`` tells: it compares with the first iterations.
        """
        spreads, first = {k: v for k, v in metrics.items() if k.startswith("spread/")}, self.watch.memory.first
        never = [key for key, value in spreads.items() if max(value, *first.get(key, [0.0])) < NO_SPREAD]
        names = [key.removeprefix("spread/") for key in never if len(spreads) > 1]
        self.record.constant = {name: self.record.constant.get(name, 0) + 1 for name in names}
        return [
            f"{name!r} told no two samples of a group apart in {times} iterations in a row ({LIMIT_KEY}={self.limit}),"
            f" so it teaches nothing while other rewards do; {MEND_FLAT}"
            for name, times in self.record.constant.items()
            if times == self.limit
        ]

    def _unmoved(self) -> tuple[str, str]:
        """The cause and the remedy at the end of a run that no streak has stopped."""
        record = self.record
        cause = (
            f"no trained weight has moved; {record.skipped} updates were skipped, and in {record.flat} iterations no"
            " sample had an advantage"
        )
        if record.flat >= max(1, record.skipped):
            return cause, MEND_FLAT
        remedies = self._remedies() if record.skipped else "a higher optimizer.learning_rate"
        return cause, f"begin a new run with {remedies}"

    def _remedies(self) -> str:
        rate = [LOWER_RATE] if self.record.learned or not self.remedies else []
        return " or ".join([*self.remedies, *rate])


def _faint(metrics: Mapping[str, float]) -> list[str]:
    """A sentence where scores do differ, but by next to nothing, or cancel each other."""
    spreads = {key.removeprefix("spread/"): value for key, value in metrics.items() if key.startswith("spread/")}
    if counting := " and ".join(repr(name) for name, value in spreads.items() if value > EPS):
        return [
            f"the scores of {counting} differ within their groups, but their weighted advantages add up to next to"
            f" nothing, because they cancel each other or their weights are small; {MEND_CANCELLED}"
        ]
    if metrics["advantage_size"] == 0:
        return []
    named = " and ".join(f"{name!r} differ by {value:.1e}" for name, value in spreads.items() if value > 0)
    return [f"the scores of {named} within their groups, next to the eps {EPS:g} that is added; {MEND_FAINT}"]


def where_not_finite(gradient_peaks: Mapping[str, Tensor]) -> str:
    """The first parameter whose gradient is not finite, to end a sentence; nothing if only their norm overflows."""
    finite = torch.stack(list(gradient_peaks.values())).isfinite().tolist() if gradient_peaks else []
    odd = [name for name, is_finite in zip(gradient_peaks, finite, strict=True) if not is_finite]
    return f", first in {odd[0]!r} ({len(odd)} of {len(gradient_peaks)} trained tensors)" if odd else ""
