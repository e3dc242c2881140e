"""What a run is watched for: every guard once, with what it measures, from where on, what that means and what to do.

A recipe's ``guards`` are checked against this table; events, the console, the report and docs/curves.md quote it. No
torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Action = Literal["off", "warn", "skip", "stop"]
Measure = Literal["value", "rise", "share", "floor"]
Moment = Literal["update", "samples", "iteration", "evaluation"]

ACTION_MEANINGS: Mapping[Action, str] = {
    "off": "nothing",
    "warn": "an event when it begins",
    "skip": "the same, and updates are not applied while it lasts",
    "stop": "the same, and the run ends: state saved, nothing exported, exit code 3",
}
PAGE = "docs/curves.md"
FIRST = 3  # iterations that later ones are compared with
SMALLEST_FLOOR, LARGEST_FLOOR = 1e-3, 0.1  # of the clip range: what is below does no harm, what is beyond is no noise


@dataclass(frozen=True)
class GuardOptions:
    """A guard as a recipe has it: beyond its threshold for so many iterations in a row it begins."""

    action: Action
    above: float | None = None
    below: float | None = None
    in_a_row: int = 1

    def __str__(self) -> str:
        parts = [f"action: {self.action}"]
        parts += [f"{side}: {value:g}" for side in SIDES if (value := getattr(self, side)) is not None]
        return f"{{{', '.join([*parts, f'in_a_row: {self.in_a_row}'])}}}"

    def is_beyond(self, value: float) -> bool:
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)

    @property
    def limit(self) -> str:
        """Its threshold in words."""
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"


SIDES = ("above", "below")


@dataclass(frozen=True)
class Guard:
    """One thing that goes wrong.

    Args:
        quantity: what is measured, to be followed by ``is 0.3``.
        key: of ``metrics.jsonl``; with a slash at its end, all that begin so, of which the worst counts.
        measure: the number itself, its ``rise`` over the mean of the first iterations, its ``share`` of that mean, or
            how often it has the noise ``floor``, their largest.
        moment: when it is known: before an ``update`` is applied, when the ``samples`` are there, after an
            ``iteration``, or after an ``evaluation``.
        usual: what holds unless a recipe says otherwise.
        means, advice: what the event says.
        threshold_key: another key of the recipe that has its threshold; such a guard looks at each update alone.
        also_says: other events that are this guard's.
    """

    quantity: str
    key: str
    measure: Measure
    moment: Moment
    usual: GuardOptions
    means: str
    advice: str
    threshold_key: str | None = None
    also_says: str | None = None

    @property
    def actions(self) -> tuple[Action, ...]:
        """What it can do; once an iteration is over there is nothing to skip."""
        skips = self.moment in ("update", "samples")
        return tuple(action for action in get_args(Action) if skips or action != "skip")


GUARDS: Mapping[str, Guard] = {
    "gradient_norm": Guard(
        quantity="the gradient's norm, in medians of the last 20",
        key="grad_norm",
        measure="value",
        moment="update",
        usual=GuardOptions("skip"),
        means="one update would weigh more than many others, and may undo them",
        advice="a single spike needs nothing; where they come often, lower optimizer.learning_rate",
        threshold_key="optimizer.guard_factor",
        also_says="gradient norm ",
    ),
    "first_ratio": Guard(
        quantity=f"the first update's largest log-ratio, in noise floors of the first {FIRST} iterations,",
        key="ratio_deviation",
        measure="floor",
        moment="update",
        usual=GuardOptions("warn", above=10.0),
        means="replaying a step no longer gives what was sampled, so ratios are wrong by more than rounding",
        advice="see that nothing in the network draws at random or depends on the batch (dropout, another attention"
        " backend, another batch size); training.precision=no tells rounding from a fault",
    ),
    "clipped_fraction": Guard(
        quantity="the share of likelihood ratios outside the clip range",
        key="clipped_fraction",
        measure="value",
        moment="update",
        usual=GuardOptions("warn", above=0.5, in_a_row=3),
        means="most samples have no gradient left, and the others pull the weights on",
        advice="lower optimizer.learning_rate or optimizer.per_iteration, or raise objective.clip_range",
    ),
    "kl": Guard(
        quantity="the approximate KL of the policy from the one that sampled",
        key="approx_kl",
        measure="value",
        moment="update",
        usual=GuardOptions("warn", above=0.05, in_a_row=2),
        means="the optimiser steps of one iteration go further than its samples can tell the way",
        advice="lower optimizer.learning_rate or optimizer.per_iteration",
    ),
    "kl_reference": Guard(
        quantity="the divergence from the untrained model",
        key="kl_reference",
        measure="value",
        moment="update",
        usual=GuardOptions("warn", above=1.0, in_a_row=3),
        means="the model has left what it was, further than objective.kl_weight holds it",
        advice="raise objective.kl_weight, lower optimizer.learning_rate, or take an earlier checkpoint",
    ),
    "reward_spread": Guard(
        quantity=f"a reward's spread within its groups, as a share of that in the first {FIRST} iterations,",
        key="spread/",
        measure="share",
        moment="samples",
        usual=GuardOptions("warn", below=0.2, in_a_row=3),
        means="the samples of a group score nearly alike, and their advantages are what is left of it, blown up",
        advice="look at the samples: they are good enough for this reward, or they have all become one; stop here, or"
        " in a new run raise solver.eta or prompts.group_size",
    ),
    "flat_groups": Guard(
        quantity="the share of groups whose samples all score alike",
        key="flat_groups",
        measure="value",
        moment="samples",
        usual=GuardOptions("warn", above=0.5, in_a_row=3),
        means="these prompts teach nothing, and cost as much as the others",
        advice="take prompts that are neither too easy nor too hard, a reward with finer steps, or a higher solver.eta"
        " or prompts.group_size",
        also_says=" gave no sample an advantage in ",
    ),
    "weights_still": Guard(
        quantity="the change of the trained weights in an iteration, as a share of their size,",
        key="weight_change",
        measure="value",
        moment="iteration",
        usual=GuardOptions("warn", below=1e-8, in_a_row=3),
        means="updates are applied or skipped without moving the weights: nothing is learned any more",
        advice="see whether updates are skipped, groups are flat, or optimizer.learning_rate has come down to nothing",
    ),
    "saturation": Guard(
        quantity=f"the share of colour values at black or full, over that in the first {FIRST} iterations,",
        key="pictures/saturated",
        measure="rise",
        moment="samples",
        usual=GuardOptions("warn", above=0.1, in_a_row=3),
        means="the reward is being fed with glaring colours, and what is at the end of the scale has no detail left",
        advice="look at the samples; take an earlier checkpoint, give objective.kl_weight a value, or add a reward or a"
        " judge that sees quality",
    ),
    "grid": Guard(
        quantity="the pictures' power at the period of the network's patches, in that of the neighbouring periods,",
        key="pictures/grid",
        measure="value",
        moment="samples",
        usual=GuardOptions("warn", above=4.0, in_a_row=3),
        means="patches show as a grid: the network paints each token for itself",
        advice="look at the samples at full size; take an earlier checkpoint, lower optimizer.learning_rate, give"
        " objective.kl_weight a value, or smooth the maps (structuring.smoothing_sigma)",
    ),
    "diversity": Guard(
        quantity=f"how much the samples of a group differ, as a share of that in the first {FIRST} iterations,",
        key="pictures/diversity",
        measure="share",
        moment="samples",
        usual=GuardOptions("warn", below=0.5, in_a_row=3),
        means="the model answers every noise with the same picture",
        advice="take an earlier checkpoint, give objective.kl_weight a value, lower optimizer.learning_rate, or stop"
        " sooner",
    ),
    "over_optimization": Guard(
        quantity="the fall of a held-out judge that is beyond doubt while the reward rises, in standard deviations of"
        " its scores,",
        key="judges",
        measure="value",
        moment="evaluation",
        usual=GuardOptions("warn", above=0.0),
        means="the reward rises by what only the reward likes",
        advice="take the checkpoint of the judge's best evaluation, and in a new run stop there, give"
        " objective.kl_weight a value, or train on the judge's kind of reward too",
    ),
}
"""By name, as under ``guards`` in a recipe."""


def meaning(name: str) -> str:
    """For ``vipo list keys``."""
    guard = GUARDS[name]
    choice = ", ".join(guard.actions)
    return f"{guard.quantity.rstrip(',')}, {_limit_words(guard)}: {choice}, or a mapping; see {PAGE}"


def _limit_words(guard: Guard) -> str:
    if guard.threshold_key:
        return f"above {guard.threshold_key}"
    return "too large" if guard.usual.above is not None else "too small"


def options_of(name: str, given: Any) -> GuardOptions:
    """What a recipe says of one guard: an action alone, or a mapping; what is left out is usual.

    Raises:
        ValueError: it says something else.
    """
    guard = GUARDS[name]
    if isinstance(given, GuardOptions):
        given = vars(given)
    if isinstance(given, str | bool):
        given = {"action": given}
    if not isinstance(given, Mapping) or (odd := sorted(set(map(str, given)) - {"action", *SIDES, "in_a_row"})):
        what = f"; it has no {odd[0][:40]!r}" if isinstance(given, Mapping) else ""
        raise ValueError(f"a guard is {_or(guard.actions)}, or {guard.usual} with other values{what}")
    action = _action(guard, given.get("action", guard.usual.action))
    sides = {side: _threshold(guard, side, given.get(side)) for side in SIDES}
    return GuardOptions(action, **sides, in_a_row=_in_a_row(guard, given.get("in_a_row")))


def _action(guard: Guard, value: Any) -> Action:
    action = "off" if value is False else value  # YAML 1.1 reads the bare word off as false
    for one in guard.actions:
        if one == action:
            return one
    why = "; when it is known there is nothing left to skip" if action == "skip" else ""
    raise ValueError(f"its action is {_or(guard.actions)}{why}")


def _threshold(guard: Guard, side: str, value: Any) -> float | None:
    usual: float | None = getattr(guard.usual, side)
    if value is None:
        return usual
    if guard.threshold_key:
        raise ValueError(f"its threshold is {guard.threshold_key}; give {side} there")
    if usual is None:
        other = next(one for one in SIDES if one != side)
        raise ValueError(f"it has a threshold {other}, not {side}, e.g. {guard.usual}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise ValueError(f"{side} is a number, 0 or more, e.g. {usual:g}")
    return float(value)


def _in_a_row(guard: Guard, value: Any) -> int:
    if value is None:
        return guard.usual.in_a_row
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"in_a_row is a number of iterations, 1 or more, e.g. {guard.usual.in_a_row}")
    if guard.threshold_key and value != 1:
        raise ValueError("it looks at each update alone, so in_a_row is 1")
    return value


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def begun(name: str, options: GuardOptions, value: float, *, where: str = "") -> str:
    """The event of a guard that begins.

    Args:
        where: what else is to tell of the value.
    """
    guard = GUARDS[name]
    times = f", for {options.in_a_row} {_unit(guard)} in a row" if options.in_a_row > 1 else ""
    done = f" (updates are skipped while it is: guards.{name}=skip)" if options.action == "skip" else ""
    found = f"{guard.quantity} is {value:.3g}{where}, {options.limit}{times}"
    return f"guard {name}: {found}: {guard.means}{done}; {guard.advice}"


def _unit(guard: Guard) -> str:
    return "evaluations" if guard.moment == "evaluation" else "iterations"


def stopped(name: str) -> str:
    """Why a run ends that a guard stops."""
    guard = GUARDS[name]
    return (
        f"guard {name} stopped the run, as guards.{name}=stop says: {guard.means}; {guard.advice}; to go on from here"
        f" in any case, add guards.{name}=warn"
    )


def told_by(event: str) -> str | None:
    """The guard whose event it is, if it is one's."""
    for name, guard in GUARDS.items():
        own = f"guard {name}"
        if event.startswith((f"{own}:", f"{own} ")) or (guard.also_says is not None and guard.also_says in event):
            return name
    return None


@dataclass(frozen=True)
class Fired:
    """A guard that has begun in a run: after which iterations, and its words."""

    name: str
    iterations: tuple[int, ...]

    @property
    def guard(self) -> Guard:
        return GUARDS[self.name]

    @property
    def when(self) -> str:
        """In words."""
        first, count = self.iterations[0], len(self.iterations)
        return f"at iteration {first}" + (f", {count} times in all" if count > 1 else "")

    @property
    def anchor(self) -> str:
        """Where to read more."""
        return f"{PAGE}#{self.name}"


def fired(events: Sequence[tuple[int, str]]) -> list[Fired]:
    """The guards that a run's events, each with its iteration, tell of; in the order of the table."""
    found: dict[str, list[int]] = {}
    for iteration, event in events:
        if (name := told_by(event)) is not None:
            found.setdefault(name, []).append(iteration)
    return [Fired(name, tuple(dict.fromkeys(found[name]))) for name in GUARDS if name in found]
