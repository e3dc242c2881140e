"""Runs that differ only in their seed as one: means and ranges over seeds, and the pictures that a level takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vipo.evaluation.estimate import Estimate, estimate, first_at
from vipo.evaluation.over_seeds import estimate_over_seeds
from vipo.evaluation.records import EvaluationRecord
from vipo.report.outcome import Role, Verdict, role_of, verdict_of
from vipo.report.run import RunRecord, flat

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

    ``difference`` is from the first group, picture by picture over the seeds that both have and the prompts that all
    of them scored; its interval is over seeds and prompts (:mod:`vipo.evaluation.over_seeds`), of a single seed a
    bootstrap over prompts. ``by_seed`` are the seeds' own.
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
    """Runs that differ only in their seed. ``settings`` are the keys in which the groups differ, with its values."""

    label: str
    settings: Mapping[str, Any]
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    scores: Mapping[str, GroupScore]


def differing(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Of each run the keys in which the recipes differ, but for the seed; None where it has no such key."""
    found = [_settings(run) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for one in found for key in one)
        if len({str(one.get(key)) for one in found}) > 1
    ]
    return [{key: one.get(key) for key in keys} for one in found]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last word of each dotted key, where it tells them apart."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Each run by the keys in which the recipes differ, but for the seed; by its folder where there are none."""
    return [_label(run, settings, len(runs) == 1) for run, settings in zip(runs, differing(runs), strict=True)]


def _label(run: RunRecord, settings: Mapping[str, Any], alone: bool) -> str:
    names = short_names(settings)
    told = ", ".join(f"{names[key]}={'null' if value is None else value}" for key, value in settings.items())
    return told or (run.folder.name if alone else run.name)


def in_words(settings: Mapping[str, Any]) -> str:
    """``credit sample, learning rate 0.001``: keys and their values for people."""
    names = short_names(settings)
    return ", ".join(f"{names[key].replace('_', ' ')} {_worded(value)}" for key, value in settings.items())


def _worded(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " and ".join(map(_worded, value)) or "none"
    words = str(value)
    return words if ".py:" in words else words.replace("_", " ")  # a part by its file keeps its name


def gathered(runs: Sequence[RunRecord]) -> dict[str, dict[int, RunRecord]]:
    """Runs by label and seed, in the order of their first ones. A seed that is there twice is the run named last."""
    named: dict[str, dict[int, RunRecord]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        named.setdefault(label, {})[run.seed] = run
    return named


def groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs gathered over their seeds, in the order of their first ones; the first group is the yardstick.

    All must have been evaluated on the same pictures.
    """
    named, settings = gathered(runs), dict(zip(labels(runs), differing(runs), strict=True))
    first = next(iter(named.values()))
    return [_group(label, settings[label], found, first) for label, found in named.items()]


def plain(value: Any) -> Any:
    """Records that were made dicts, for JSON: keys are text, and what is not a number is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _settings(run: RunRecord) -> dict[str, Any]:
    """The recipe flat, without what names the run and its seed."""
    return dict(flat({key: value for key, value in run.recipe.items() if key not in (*NAMELESS, SEED)}))


def _group(
    label: str, settings: Mapping[str, Any], found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]
) -> Group:
    last = {seed: run.evaluations[-1] for seed, run in found.items()}
    names = [name for name in next(iter(last.values())).values if all(is_scored(one, name) for one in last.values())]
    scores = {name: _score(name, found, first) for name in names}
    return Group(label, settings, tuple(str(run.folder) for run in found.values()), tuple(found), scores)


def is_scored(record: EvaluationRecord, name: str) -> bool:
    """Whether any picture of an evaluation has the score."""
    return name in record.values and bool(record.values[name].isfinite().any())


def _score(name: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]) -> GroupScore:
    finals = [mean_of(run.evaluations[-1], name) for run in found.values()]
    role = role_of(next(iter(found.values())), name)
    difference, by_seed, verdict = _difference(name, found, first)
    reach = _reach(name, found, first) if role == "trained on" else None
    mean = sum(finals) / len(finals)
    return GroupScore(role, mean, min(finals), max(finals), difference, by_seed, verdict, reach)


def _difference(
    name: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]
) -> tuple[Estimate | None, dict[int, float], Verdict | None]:
    """Paired over the shared seeds and all pictures; nothing of the yardstick itself, or without a shared seed."""
    shared = [seed for seed in found if seed in first and is_scored(first[seed].evaluations[-1], name)]
    if found is first or not shared:
        return None, {}, None
    ends = {seed: (found[seed].evaluations[-1], first[seed].evaluations[-1]) for seed in shared}
    rows = {seed: now.values[name] - then.values[name] for seed, (now, then) in ends.items()}
    by_seed = {seed: float(row.nanmean()) for seed, row in rows.items()}
    each = ends[shared[0]][0].samples_per_prompt
    table = torch.stack([row.double().unflatten(0, (-1, each)).nanmean(1) for row in rows.values()])
    table = table[:, table.isfinite().all(0)]
    prompts = table.shape[1]
    if not prompts:
        return None, {}, None
    gain = estimate_over_seeds(table) if min(table.shape) > 1 else estimate(table.mean(0), 1)
    return gain, by_seed, verdict_of(gain, prompts)


def _reach(name: str, found: Mapping[int, RunRecord], first: Mapping[int, RunRecord]) -> Reach | None:
    """None where the yardstick did not rise, so that every run would be there before it began."""
    there = [run for run in first.values() if is_scored(run.evaluations[-1], name)]
    level = sum(mean_of(run.evaluations[-1], name) for run in there) / len(there) if there else math.nan
    begun = [mean_of(run.evaluations[0], name) for run in there if is_scored(run.evaluations[0], name)]
    if not begun or not level > sum(begun) / len(begun):
        return None
    by_seed = {seed: _pictures_to(level, run, name) for seed, run in found.items()}
    reached = [count for count in by_seed.values() if count is not None]
    over = estimate(torch.tensor(reached, dtype=torch.float64), 1) if len(reached) == len(found) else None
    return Reach(level, by_seed, over)


def _pictures_to(level: float, run: RunRecord, name: str) -> float | None:
    """Pictures until the mean was first at ``level``, on straight lines between the evaluations."""
    each = run.pictures_per_iteration
    points = [(record.iteration, mean_of(record, name)) for record in run.evaluations if is_scored(record, name)]
    if each is None or not points:
        return None
    at, means = torch.tensor(points, dtype=torch.float64).unbind(1)
    found = float(first_at(at.new_tensor([level]), at, means[None])[0])
    return each * found if math.isfinite(found) else None


def mean_of(record: EvaluationRecord, name: str) -> float:
    """Over the pictures that have the score."""
    return float(record.values[name].nanmean())
