"""The guards of :mod:`vipo.guards` at work: numbers of an iteration to events, refused updates and the end of a run.

All of it is decided from numbers that every process has alike, and what it remembers is in the checkpoint, so a run
that goes on says the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from vipo.guards import FIRST, GUARDS, LARGEST_FLOOR, SMALLEST_FLOOR, Guard, GuardOptions, Moment, begun, stopped

USUAL: Mapping[str, GuardOptions] = {name: guard.usual for name, guard in GUARDS.items()}


@dataclass
class Memory:
    """What a checkpoint keeps of the guards."""

    in_a_row: dict[str, int] = field(default_factory=dict)  # guard -> iterations beyond its threshold up to now
    first: dict[str, list[float]] = field(default_factory=dict)  # metric -> its first values, to compare with


class Watch:
    """Watches one run.

    Args:
        options: by guard, as the recipe has them.
        clip_range: of the likelihood ratio; a log-ratio of a tenth of it is no noise floor any more.
    """

    def __init__(self, options: Mapping[str, GuardOptions] = USUAL, clip_range: float = math.inf) -> None:
        self.options = {name: options[name] for name in GUARDS if options[name].action != "off"}
        self.clip_range = clip_range
        self.memory = Memory()
        self._found: set[str] = set()  # guards beyond their thresholds within this iteration

    def action(self, name: str) -> str:
        return self.options[name].action if name in self.options else "off"

    @property
    def skips_samples(self) -> bool:
        """Whether an iteration's samples must be known in numbers before an update."""
        return any(self.action(name) == "skip" and GUARDS[name].moment == "samples" for name in self.options)

    def samples(self, metrics: Mapping[str, float]) -> None:
        """The samples of an iteration are there; what is wrong with them refuses all of its updates."""
        self._look(metrics, "samples")

    def refusal(self, numbers: Mapping[str, float]) -> str | None:
        """Why an update with these numbers must not be applied, and none that follows in this iteration; or None."""
        self._look(numbers, "update")
        refused = [name for name in GUARDS if name in self._found and self.action(name) == "skip"]
        return f"guard {refused[0]} refuses it" if refused else None

    def _look(self, numbers: Mapping[str, float], moment: Moment) -> None:
        """Find what a guard would refuse now."""
        for name, options in self.options.items():
            due = self.memory.in_a_row.get(name, 0) + 1 >= options.in_a_row
            if options.action == "skip" and GUARDS[name].moment == moment and due:
                value = self._measured(GUARDS[name], numbers)
                self._found |= {name} if value is not None and options.is_beyond(value) else set()

    def outlier(self) -> None:
        """A gradient's norm was out of line."""
        self._found.add("gradient_norm")

    def iteration(self, metrics: Mapping[str, float], silent: Collection[str] = ()) -> list[str]:
        """An iteration is over: the events of the guards that begin, but those of ``silent`` ones."""
        events, rows = [], {}
        for name, options in self.options.items():
            value = self._measured(GUARDS[name], metrics)
            beyond = name in self._found or (value is not None and options.is_beyond(value))
            rows[name] = self.memory.in_a_row.get(name, 0) + 1 if beyond else 0
            tells = rows[name] == options.in_a_row and GUARDS[name].threshold_key is None and name not in silent
            events += [begun(name, options, math.nan if value is None else value)] if tells else []
        self._found = set()
        self.memory = Memory({name: row for name, row in rows.items() if row}, self._remembered(metrics))
        return events

    def stopping(self) -> str | None:
        """Why the run must end, or None."""
        for name, options in self.options.items():
            if options.action == "stop" and self.memory.in_a_row.get(name, 0) >= options.in_a_row:
                return stopped(name)
        return None

    def _measured(self, guard: Guard, metrics: Mapping[str, float]) -> float | None:
        """The guard's quantity, the worst of several; None where it is not known or has nothing to compare with yet."""
        keys = [key for key in _keys(guard, metrics) if math.isfinite(metrics[key])]
        found = [value for key in keys if (value := self._compared(guard, key, metrics[key])) is not None]
        if not found:
            return None
        return max(found) if guard.usual.above is not None else min(found)

    def _compared(self, guard: Guard, key: str, value: float) -> float | None:
        if guard.measure == "value":
            return value
        first = self.memory.first.get(key, [])
        if guard.measure == "floor":
            smallest, largest = SMALLEST_FLOOR * self.clip_range, LARGEST_FLOOR * self.clip_range
            return value / (min(max(*first, smallest), largest) if len(first) >= FIRST else largest)
        if len(first) < FIRST:
            return None
        mean = statistics.fmean(first)
        if guard.measure == "rise":
            return value - mean
        return value / mean if mean > 0 else None

    def _remembered(self, metrics: Mapping[str, float]) -> dict[str, list[float]]:
        """The first values of what is compared with them, whether or not its guard is off."""
        first = dict(self.memory.first)
        for guard in GUARDS.values():
            for key in _keys(guard, metrics) if guard.measure != "value" else ():
                if len(first.get(key, [])) < FIRST and math.isfinite(metrics[key]):
                    first[key] = [*first.get(key, []), metrics[key]]
        return first


def _keys(guard: Guard, metrics: Mapping[str, float]) -> list[str]:
    whole = not guard.key.endswith("/")
    return [key for key in metrics if key == guard.key or (not whole and key.startswith(guard.key))]
