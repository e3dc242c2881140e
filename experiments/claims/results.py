"""Read what the arms left behind and compare it: seed with seed, prompt with prompt.

Arms of one seed share prompts, starting noise and step noise, so a difference is taken within a seed and a prompt first
and averaged afterwards. With d_sp the difference of seed s on prompt p, an interval is a bootstrap in two levels: draw
the seeds again with replacement, then the prompts, the same ones for every seed, and take the mean; the 2.5 % and
97.5 % points over ``RESAMPLES`` draws are the interval. Draws are fixed, so figures are reproducible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intervals import Interval, anova
from matrix import ARMS, SETTING, UNPINNED, Arm
from vipo import randomness
from vipo.errors import UserError
from vipo.evaluation.estimate import first_at

RESAMPLES = 2000
SIDES = torch.tensor([0.025, 0.975], dtype=torch.double)
SCALAR = "sample (scalar GRPO)"
"""What gradient.py calls the estimator that the maps are held against."""


@dataclass(frozen=True)
class Result:
    """One arm with one seed. ``evaluations``: iteration -> score -> per prompt (P,). ``training``: per iteration."""

    arm: str
    seed: int
    evaluations: Mapping[int, Mapping[str, Tensor]]
    training: Mapping[str, Tensor]
    seconds: float


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and prompts: each seed's own mean, their standard deviation, and a 95 % interval.

    ``t`` is another one, which knows how few seeds there are; of one seed, and where a seed lacks a prompt, it is None.
    """

    mean: float
    per_seed: Mapping[int, float]
    low: float
    high: float
    t: Interval | None = None

    @property
    def seeds(self) -> int:
        return len(self.per_seed)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.per_seed.values()), max(self.per_seed.values())

    @property
    def deviation(self) -> float:
        """Over seeds; NaN for a single one."""
        values = torch.tensor(list(self.per_seed.values()), dtype=torch.double)
        return float(values.std()) if len(values) > 1 else math.nan


def overlap(first: Spread, second: Spread) -> bool:
    """Whether the ranges over seeds have a point in common."""
    return first.range[0] <= second.range[1] and second.range[0] <= first.range[1]


@dataclass(frozen=True)
class Results:
    """All arms: name -> seed -> result; and the two measurements without training, None where not made yet."""

    arms: Mapping[str, Mapping[int, Result]]
    gradient: Mapping[str, Any] | None = None
    orientation: Mapping[str, Any] | None = None

    def iterations(self, arm: str) -> list[int]:
        """The evaluations after the start that every finished seed of the arm has."""
        each = [set(result.evaluations) for result in self.arms.get(arm, {}).values()]
        return sorted(set.intersection(*each) - {0}) if each else []

    def start(self, result: Result) -> Mapping[str, Tensor]:
        """The untrained model's scores on the pictures that the result was evaluated on."""
        if 0 in result.evaluations:
            return result.evaluations[0]
        untrained = self.arms.get(ARMS[result.arm].untrained, {})
        return next(iter(untrained.values())).evaluations[0] if untrained else {}


def planned_seeds(arm: str) -> int:
    return ARMS[arm].seeds or SETTING.seeds


def read(folder: Path) -> Results:
    """Every result in ``folder``, and gradient.json and orientation.json where they are.

    Raises:
        UserError: a file is damaged, names an unknown arm, was trained otherwise than matrix.py says of its arm now, or
            was evaluated on another number of prompts.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder; train the arms with `python experiments/claims/run.py`")
    aside = ("gradient", "orientation")
    arms: dict[str, dict[int, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem not in aside:
            result = _result(path)
            arms.setdefault(result.arm, {})[result.seed] = result
    _check_prompts(result for seeds in arms.values() for result in seeds.values())
    return Results(arms, *(_json(folder / f"{name}.json") for name in aside))


def _result(path: Path) -> Result:
    stored = _json(path)
    try:
        evaluations = {int(k): {n: _row(v) for n, v in e.items()} for k, e in stored["evaluations"].items()}
        training = {name: _row(values) for name, values in stored["training"].items()}
        result = Result(stored["arm"], stored["seed"], evaluations, training, float(stored["seconds"]))
        recipe, trained = stored["recipe"], _last(UNPINNED.get(stored["recipe"], ()), stored["overrides"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is not the result of an arm: {error!r}; delete it and run the arm") from error
    if result.arm not in ARMS:
        raise UserError(f"{str(path)!r} is of the arm {result.arm!r}, which matrix.py does not have; delete it")
    differs = _differs(recipe, trained, ARMS[result.arm])
    if differs:
        raise UserError(
            f"{str(path)!r} was trained otherwise than matrix.py says of {result.arm!r} now: {'; '.join(differs)};"
            f" delete it and train it again with `python experiments/claims/run.py --only {result.arm}`"
        )
    return result


def _last(*overrides: Iterable[str]) -> dict[str, str]:
    """Key -> value, of several of a key the last, as a recipe takes them."""
    return {key: value for given in overrides for key, _, value in (text.partition("=") for text in given)}


def _differs(recipe: str, trained: Mapping[str, str], arm: Arm) -> list[str]:
    """Key by key, what a result was trained with and what its arm says now."""
    then, now = {"recipe": recipe, **trained}, {"recipe": arm.recipe, **_last(arm.overrides)}
    keys = [key for key in dict.fromkeys((*then, *now)) if then.get(key) != now.get(key)]
    unsaid = "the recipe's"
    return [f"{key} was {then.get(key, unsaid)} and is {now.get(key, unsaid)}" for key in keys]


def _row(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON: {error}; delete it and make it again") from error


def _check_prompts(results: Iterable[Result]) -> None:
    """Arms of one recipe, which are compared, share their evaluation's prompts."""
    counts: dict[str, dict[int, str]] = {}
    for result in results:
        seen = counts.setdefault(ARMS[result.arm].recipe, {})
        for scores in result.evaluations.values():
            seen |= {len(values): f"{result.arm}-{result.seed}" for values in scores.values()}
    for seen in counts.values():
        if len(seen) > 1:
            found = ", ".join(f"{count} prompts ({name})" for count, name in sorted(seen.items()))
            raise UserError(f"the arms were evaluated on different prompts: {found}; run them with one --prompts")


@lru_cache
def draws(count: int, purpose: str) -> Tensor:
    """How often each of ``count`` things is in each resample, (RESAMPLES, count)."""
    chosen = torch.randint(count, (RESAMPLES, count), generator=randomness.generator(0, purpose))
    counted = torch.zeros(RESAMPLES, count, dtype=torch.double)
    return counted.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.double))


def spread(values: Mapping[int, Tensor]) -> Spread | None:
    """Seed -> per prompt (P,) to its mean and interval; None if nothing has a value. NaN is left out."""
    known = {seed: row for seed, row in values.items() if bool(row.isfinite().any())}
    if not known:
        return None
    table = torch.stack(list(known.values()))
    present = table.isfinite().double()
    seeds, prompts = draws(len(table), "seeds"), draws(table.shape[1], "prompts")
    total = ((seeds @ table.nan_to_num(0.0)) * prompts).sum(1)
    low, high = (total / ((seeds @ present) * prompts).sum(1)).nanquantile(SIDES).tolist()
    means = {seed: float(row.nanmean()) for seed, row in known.items()}
    t = anova(table) if len(table) > 1 and table.shape[1] > 1 and bool(present.all()) else None
    return Spread(float(table.nanmean()), means, low, high, t)


def scores(results: Results, arm: str, score: str, iteration: int) -> dict[int, Tensor]:
    """Seed -> the score of each prompt, of the seeds that have that evaluation."""
    found = {
        seed: result.evaluations.get(iteration, {}).get(score) for seed, result in results.arms.get(arm, {}).items()
    }
    return {seed: values for seed, values in found.items() if values is not None}


def gain(results: Results, arm: str, score: str, iteration: int) -> Spread | None:
    """Over the untrained model, on the same prompts and starting noise; None if one of the two is missing."""
    found = scores(results, arm, score, iteration)
    starts = {seed: results.start(results.arms[arm][seed]).get(score) for seed in found}
    return spread({seed: values - start for seed, values in found.items() if (start := starts[seed]) is not None})


def paired(results: Results, arm: str, other: str, score: str, iteration: int) -> Spread | None:
    """``arm`` minus ``other`` at the same iteration of the same seeds; None if they share none."""
    mine, theirs = (scores(results, name, score, iteration) for name in (arm, other))
    return spread({seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs})


@dataclass(frozen=True)
class Reach:
    """How many times fewer iterations an arm needs to a gain of another one, with its 95 % interval.

    Below 1 it takes more; 0 is not at all. Every iteration has as many pictures as any other.
    """

    times: float
    low: float
    high: float
    seeds: int


def reach(results: Results, arm: str, other: str, score: str, after: int | None = None) -> Reach | None:
    """To what ``other`` had gained ``after`` so many iterations, at its end if that is None.

    From mean gains over seeds and prompts, linear between evaluations; None if the two share no seed, or ``other`` was
    not evaluated then. The bootstrap draws seeds and prompts; each drawn ``arm`` is held against its draw's ``other``.
    """
    at, theirs = results.iterations(arm), results.iterations(other)
    shared = sorted(set(results.arms.get(arm, {})) & set(results.arms.get(other, {})))
    if not at or not shared or (after or theirs[-1]) not in theirs:
        return None
    after = after or theirs[-1]
    mine = [[_gained(results, arm, seed, score, k) for k in at] for seed in shared]
    goal = [_gained(results, other, seed, score, after) for seed in shared]
    curves, level = torch.stack([torch.stack(rows) for rows in mine]), torch.stack(goal)  # (S, K, P), (S, P)
    seeds, prompts = draws(len(shared), "seeds"), draws(level.shape[1], "prompts")
    total = seeds.sum(1) * prompts.sum(1)
    drawn = torch.einsum("rs,skp,rp->rk", seeds, curves, prompts) / total[:, None]
    levels = torch.einsum("rs,sp,rp->r", seeds, level, prompts) / total
    all_of = _times(curves.mean((0, 2))[None], level.mean()[None], at, after)
    low, high = _times(drawn, levels, at, after).quantile(SIDES).tolist()
    return Reach(float(all_of), low, high, len(shared))


def _gained(results: Results, arm: str, seed: int, score: str, iteration: int) -> Tensor:
    result = results.arms[arm][seed]
    return result.evaluations[iteration][score] - results.start(result)[score]


def _times(curves: Tensor, levels: Tensor, at: Sequence[int], last: int) -> Tensor:
    """``last`` over the first iteration at which each curve (R, K), which starts at 0, is at its level (R,)."""
    x = torch.tensor([0.0, *at], dtype=torch.double)
    return last / first_at(levels, x, torch.cat([torch.zeros(len(curves), 1, dtype=torch.double), curves], 1))


@dataclass(frozen=True)
class Signal:
    """How clearly one iteration's gradient points uphill, and the paired ratio to scalar GRPO, with 95 % intervals."""

    ratio_to_noise: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float


def signals(gradient: Mapping[str, Any]) -> dict[str, Signal]:
    """Mean over standard deviation of each map's slopes; every map in a resample sees the same iterations."""
    slopes = {name: _row(found["slope"]) for name, found in gradient["maps"].items()}
    clearness = {name: resampled_ratio(values) for name, values in slopes.items()}
    base = clearness[SCALAR]
    return {name: _signal(found, base) for name, found in clearness.items()}


def resampled_ratio(values: Tensor) -> Tensor:
    """Mean over standard deviation of the values themselves, then of each resample, (1 + RESAMPLES,)."""
    counts = torch.cat([torch.ones(1, len(values), dtype=torch.double), draws(len(values), "iterations")])
    mean = counts @ values / len(values)
    square = counts @ values.square() / len(values)
    return mean / ((square - mean.square()).clamp_min(0) * len(values) / (len(values) - 1)).sqrt()


def _signal(found: Tensor, base: Tensor) -> Signal:
    relative = found / base
    sides = [float(side) for values in (found, relative) for side in values[1:].nanquantile(SIDES)]
    return Signal(float(found[0]), sides[0], sides[1], float(relative[0]), sides[2], sides[3])


@dataclass(frozen=True)
class Level:
    """A share of the redness that every run reached, that gain, and arm -> measure -> seed -> per prompt (P,)."""

    share: float
    gain: float
    measures: Mapping[str, Mapping[str, Mapping[int, Tensor]]]


def levels(results: Results, arms: Iterable[str], shares: Iterable[float]) -> list[Level]:
    """Every measure where a run's mean redness first reached a gain; the largest is the smallest final gain."""
    runs = {arm: results.arms.get(arm, {}) for arm in arms}
    finals = [path(result)[-1][1] for seeds in runs.values() for result in seeds.values()]
    if not runs or not all(runs.values()) or min(finals) <= 0:
        return []
    found = []
    for share in shares:
        wanted = share * min(finals)
        crossed = {arm: {seed: at_gain(r, wanted) for seed, r in seeds.items()} for arm, seeds in runs.items()}
        found.append(Level(share, wanted, {arm: _by_measure(seeds) for arm, seeds in crossed.items()}))
    return found


def path(result: Result) -> list[tuple[int, float]]:
    """(iteration, mean redness gained since the start), in order."""
    start = result.evaluations[0]["redness"]
    return [(k, float((result.evaluations[k]["redness"] - start).nanmean())) for k in sorted(result.evaluations)]


def at_gain(result: Result, wanted: float) -> dict[str, Tensor]:
    """Each measure per prompt, linear between the two evaluations where redness first passes ``wanted``."""
    if wanted <= 0:
        return dict(result.evaluations[0])
    steps = path(result)
    (before, low), (after, high) = next(pair for pair in pairwise(steps) if pair[1][1] >= wanted - 1e-12)
    weight = min(1.0, max(0.0, (wanted - low) / (high - low))) if high > low else 1.0
    first, second = result.evaluations[before], result.evaluations[after]
    return {name: first[name].lerp(second[name], weight) for name in first if name in second}


def _by_measure(seeds: Mapping[int, Mapping[str, Tensor]]) -> dict[str, dict[int, Tensor]]:
    names = dict.fromkeys(name for found in seeds.values() for name in found)
    return {name: {seed: found[name] for seed, found in seeds.items() if name in found} for name in names}
