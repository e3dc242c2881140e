"""Runs that differ only in their seed as one: means and ranges over seeds, and the pictures that a level takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vipo.evaluation.estimate import Estimate, estimate, first_at, paired_prompts
from vipo.evaluation.records import EvaluationRecord
from vipo.report.outcome import Role, Verdict, role_of, verdict_of
from vipo.report.run import RunRecord, flat
from vipo.report.table import pictures_of

NAMELESS = ("name", "tracking")  # keys that change nothing of what is trained
SEED = "seed"


@dataclass(frozen=True)
class Reach:
    """How many pictures each seed drew until it was at the yardstick's final mean; None for one that never was.

    ``pictures`` is over the seeds, with a bootstrap over them; None unless every one of them got there.
    """

    level: float
    by_seed: Mapping[int, float | None]
    pictures: Estimate | None


@dataclass(frozen=True)
class GroupScore:
    """One score of one group. ``low`` and ``high`` are the least and the largest of the seeds' final means.

    ``difference`` is from the first group, picture by picture over the seeds that both have, its interval a bootstrap
    over prompts; ``by_seed`` are the seeds' own.
    """

    role: Role
    mean: float
    low: float
    high: float
    difference: Estimate | None
    by_seed: Mapping[int, float]
    verdict: Verdict | None
    reach: Reach | None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: Mapping[str, GroupScore]


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Each run by the keys in which the recipes differ, but for the seed; by its folder where there are none."""
    flat = [_settings(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({one.get(key) for one in flat}) > 1]
    short = {key: key.rpartition(".")[2] for key in keys}
    once = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    named = [", ".join(f"{once[key]}={one.get(key, 'null')}" for key in keys) for one in flat]
    return [label or (run.folder.name if len(runs) == 1 else run.name) for label, run in zip(named, runs, strict=True)]


def groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs gathered over their seeds, in the order of their first ones; the first group is the yardstick.

    A seed that is there twice counts once, by the run named last. All must have been evaluated on the same pictures.
    """
    named: dict[str, dict[int, RunRecord]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        named.setdefault(label, {})[int(run.recipe.get(SEED) or 0)] = run
    first = next(iter(named.values()))
    return [_group(label, found, first) for label, found in named.items()]


def plain(value: Any) -> Any:
    """Records that were made dicts, for JSON: keys are text, and what is not a number is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(run: RunRecord) -> dict[str, str]:
    """The recipe flat, without what names the run and its seed."""
    kept = {key: value for key, value in run.recipe.items() if key not in (*NAMELESS, SEED)}
    return {key: str(value) for key, value in flat(kept)}


def _group(label: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]) -> Group:
    last = {seed: run.evaluations[-1] for seed, run in found.items()}
    names = [name for name in next(iter(last.values())).values if all(_scored(one, name) for one in last.values())]
    scores = {name: _score(name, found, first) for name in names}
    return Group(label, tuple(str(run.folder) for run in found.values()), tuple(found), scores)


def _scored(record: EvaluationRecord, name: str) -> bool:
    return name in record.values and bool(record.values[name].isfinite().any())


def _score(name: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]) -> GroupScore:
    finals = [_mean(run.evaluations[-1], name) for run in found.values()]
    role = role_of(next(iter(found.values())), name)
    difference, by_seed, verdict = _difference(name, found, first)
    reach = _reach(name, found, first) if role == "trained on" else None
    mean = sum(finals) / len(finals)
    return GroupScore(role, mean, min(finals), max(finals), difference, by_seed, verdict, reach)


def _difference(
    name: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]
) -> tuple[Estimate | None, dict[int, float], Verdict | None]:
    """Paired over the shared seeds and all pictures; nothing of the yardstick itself, or without a shared seed."""
    shared = [seed for seed in found if seed in first and _scored(first[seed].evaluations[-1], name)]
    if found is first or not shared:
        return None, {}, None
    ends = {seed: (found[seed].evaluations[-1], first[seed].evaluations[-1]) for seed in shared}
    rows = {seed: now.values[name] - then.values[name] for seed, (now, then) in ends.items()}
    by_seed = {seed: float(row.nanmean()) for seed, row in rows.items()}
    each, mean = ends[shared[0]][0].samples_per_prompt, torch.stack(list(rows.values())).nanmean(0)
    prompts = paired_prompts(mean, mean, each)
    if not prompts:
        return None, {}, None
    gain = estimate(mean, each)
    return gain, by_seed, verdict_of(gain, prompts)


def _reach(name: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]) -> Reach | None:
    """None where the yardstick did not rise, so that every run would be there before it began."""
    there = [run for run in first.values() if _scored(run.evaluations[-1], name)]
    level = sum(_mean(run.evaluations[-1], name) for run in there) / len(there) if there else math.nan
    begun = [_mean(run.evaluations[0], name) for run in there if _scored(run.evaluations[0], name)]
    if not begun or not level > sum(begun) / len(begun):
        return None
    by_seed = {seed: _pictures_to(level, run, name) for seed, run in found.items()}
    reached = [count for count in by_seed.values() if count is not None]
    over = estimate(torch.tensor(reached, dtype=torch.float64), 1) if len(reached) == len(found) else None
    return Reach(level, by_seed, over)


def _pictures_to(level: float, run: RunRecord, name: str) -> float | None:
    """Pictures until the mean was first at ``level``, on straight lines between the evaluations."""
    each = pictures_of(run)
    points = [(record.iteration, _mean(record, name)) for record in run.evaluations if _scored(record, name)]
    if each is None or not points:
        return None
    at, means = torch.tensor(points, dtype=torch.float64).unbind(1)
    found = float(first_at(at.new_tensor([level]), at, means[None])[0])
    return each * found if math.isfinite(found) else None


def _mean(record: EvaluationRecord, name: str) -> float:
    return float(record.values[name].nanmean())
