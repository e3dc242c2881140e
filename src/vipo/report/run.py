"""A run directory as frozen records. A run that is still going, or was killed in the middle of a line, reads fine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vipo.errors import UserError
from vipo.evaluation.best import Best, best_of
from vipo.evaluation.records import EvaluationRecord, recorded
from vipo.files import complete_lines, is_intact, read_yaml

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class StepRecord:
    """One iteration: its numbers (NaN for null), wall seconds by phase, and every guard that fired, in words.

    ``failure`` is why the run ended there, if it failed, and ``stopped`` if ``training.stop_when`` ended it.
    """

    iteration: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    events: tuple[str, ...]
    failure: str | None
    stopped: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """All a report needs. ``unreadable`` counts damaged lines per log file."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    sheets: Mapping[int, Path]  # iteration -> contact sheet of the evaluation pictures
    map_sheets: Mapping[int, Path]
    unreadable: Mapping[str, int]
    told: tuple[tuple[int, str], ...] = ()  # of evaluations: after which iteration, and what
    kept: frozenset[int] = frozenset()  # iterations that there are checkpoints of
    inputs: Mapping[str, str] = field(default_factory=dict)  # by key, fingerprints of the files that the recipe names

    @property
    def events(self) -> list[tuple[int, str]]:
        """Everything that was told, each with its iteration."""
        of_steps = [(step.iteration, event) for step in self.steps for event in step.events]
        return sorted([*of_steps, *self.told], key=lambda event: event[0])

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def left_out(self) -> list[str]:
        """What of its logs is damaged and counts for nothing, in words."""
        return [f"{count} damaged line{'s' * (count > 1)} of {name}.jsonl" for name, count in self.unreadable.items()]

    @property
    def rewards(self) -> dict[str, float]:
        """What was trained on, with weights."""
        listed = self.recipe.get("rewards") or {}
        return {name: float(v.get("weight", 1.0) if isinstance(v, Mapping) else v) for name, v in listed.items()}

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed") or 0)

    @property
    def pictures_per_iteration(self) -> int | None:
        """Samples that an iteration draws; None if the recipe does not say."""
        prompts = self.recipe.get("prompts") or {}
        each = prompts.get("per_iteration"), prompts.get("group_size")
        return int(each[0]) * int(each[1]) if each[0] and each[1] else None

    @property
    def makes_clips(self) -> bool:
        """Whether a sample has more than one frame."""
        return int((self.recipe.get("generator") or {}).get("frames") or 1) > 1

    @property
    def fps(self) -> float:
        """Frames per second of its clips."""
        return float(self.recorded("generator", "fps"))

    @property
    def iterations_planned(self) -> int | None:
        planned = (self.recipe.get("training") or {}).get("iterations")
        return int(planned) if planned is not None else None

    @property
    def iterations_done(self) -> int:
        return self.steps[-1].iteration + 1 if self.steps else 0

    @property
    def failure(self) -> str | None:
        """Why the run ended with its last iteration, if it failed."""
        return self.steps[-1].failure if self.steps else None

    @property
    def stopped(self) -> str | None:
        """Why ``training.stop_when`` ended the run with its last iteration, if it did."""
        return self.steps[-1].stopped if self.steps else None

    @property
    def best_by(self) -> str | None:
        """The score by which the best checkpoint is kept, if one is."""
        named = (self.recipe.get("training") or {}).get("keep_best")
        return None if named is None else str(named)

    @property
    def best(self) -> Best | None:
        """The best evaluation whose weights are kept."""
        return None if self.best_by is None else best_of(self.evaluations, self.best_by, self.kept)

    def recorded(self, section: str, key: str) -> Any:
        """A key of the recipe that every run writes down.

        Raises:
            UserError: it is not there.
        """
        try:
            return self.recipe[section][key]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the recipe.yaml of {str(self.folder)!r} has no {section}.{key}; put back what `vipo train` wrote"
            ) from error

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Iterations and values of one metric, where it is a finite number."""
        found = [(step.iteration, step.metrics.get(key, math.nan)) for step in self.steps]
        kept = [(float(at), value) for at, value in found if math.isfinite(value)]
        return [at for at, _ in kept], [value for _, value in kept]


R = TypeVar("R", StepRecord, EvaluationRecord)


def read_run(folder: Path) -> RunRecord:
    """Read a run directory as it is now.

    Raises:
        UserError: ``folder`` is not a run directory, or its recipe is damaged.
    """
    recipe_text = _recipe_text(folder)
    logs = {name: _read_lines(folder / f"{name}.jsonl") for name in ("metrics", "timing", "evaluations")}
    seconds = {line["iteration"]: _numbers(line) for line in logs["timing"][0]}
    steps = [_step(line, seconds.get(line["iteration"], {})) for line in logs["metrics"][0]]
    evaluations = [recorded(line) for line in _comparable(logs["evaluations"][0])]
    record = RunRecord(
        folder,
        _parse_recipe(folder, recipe_text),
        recipe_text,
        _read_mapping(folder / "environment.json"),
        _latest_of_each(steps),
        _latest_of_each(evaluations),
        _numbered(folder / "samples"),
        _numbered(folder / "maps"),
        {name: bad for name, (_, bad) in logs.items() if bad},
        tuple((line["iteration"], str(event)) for line in logs["evaluations"][0] for event in line.get("events") or ()),
        frozenset(_checkpoints(folder / "checkpoints")),
        _inputs(folder / "checkpoints"),
    )
    _check_recipe(record)
    return record


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings, each under its dotted name."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _recipe_text(folder: Path) -> str:
    try:
        return (folder / "recipe.yaml").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the recipe.yaml of {str(folder)!r} cannot be read: {error}") from error
    except OSError as error:
        why = "it has no recipe.yaml" if folder.is_dir() else "there is no such folder"
        raise UserError(
            f"{str(folder)!r} is not a run directory: {why}; give the folder that `vipo train` wrote"
        ) from error


def _parse_recipe(folder: Path, text: str) -> Mapping[str, Any]:
    try:
        recipe = read_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"the recipe.yaml of {str(folder)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe.yaml of {str(folder)!r} must be a mapping of keys to values")
    return recipe


def _check_recipe(run: RunRecord) -> None:
    """What is read of it without asking must be of the kind that every run writes down."""
    try:
        _ = run.rewards, run.makes_clips and run.fps, run.iterations_planned, run.seed, run.pictures_per_iteration
        odd = [key for key in ("generator", "structuring") if not isinstance(run.recipe.get(key) or {}, Mapping)]
        odd += [] if isinstance(run.recipe.get("judges") or [], list | Mapping) else ["judges"]
        if odd:
            raise ValueError(f"{odd[0]} is of another kind")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"the recipe.yaml of {str(run.folder)!r} is damaged: {error}; put back what `vipo train` wrote"
        ) from error


def _read_mapping(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # shown as "not recorded"
    return found if isinstance(found, dict) else {}


def _read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a JSON-lines file, and how many finished lines are damaged.

    A last line without its newline is one still being written: it is left out and not counted.
    """
    if not file.exists():
        return [], 0
    lines = complete_lines(file, errors="replace")
    parsed = list(_parsed(lines))
    return parsed, len(lines) - len(parsed)


def _parsed(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # counted by the caller
        if isinstance(record, dict) and isinstance(record.get("iteration"), int) and is_intact(record):
            yield record


def _comparable(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations that can be compared with the last: a resumed run may have changed how it is evaluated."""
    whole = [record for record in records if isinstance(record.get("values"), dict)]
    since = int(whole[-1].get("comparable_since") or 0) if whole else 0
    return [record for record in whole if record["iteration"] >= since]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries; null is NaN."""
    kept = {k: v for k, v in record.items() if k != "iteration" and (v is None or isinstance(v, int | float))}
    return {key: math.nan if value is None else float(value) for key, value in kept.items()}


def _step(record: Mapping[str, Any], seconds: Mapping[str, float]) -> StepRecord:
    events = tuple(str(event) for event in record.get("events") or ())
    return StepRecord(
        record["iteration"], _numbers(record), seconds, events, record.get("failure"), record.get("stopped")
    )


def _latest_of_each(records: Sequence[R]) -> tuple[R, ...]:
    """By iteration; a resumed run may have written an iteration twice, and the second is the one that counts."""
    by_iteration = {record.iteration: record for record in records}
    return tuple(by_iteration[iteration] for iteration in sorted(by_iteration))


def _checkpoints(folder: Path) -> Iterator[int]:
    """The iterations of the complete ones."""
    for index in folder.glob("step-*/state.json"):
        if match := _STEP.fullmatch(index.parent.name):
            yield int(match[1])


def _inputs(folder: Path) -> Mapping[str, str]:
    """As the newest checkpoint has them; none where it cannot be read."""
    newest = max(_checkpoints(folder), default=None)
    if newest is None:
        return {}
    found = _read_mapping(folder / f"step-{newest:06d}" / "state.json").get("inputs")
    return found if isinstance(found, dict) else {}


def _numbered(folder: Path) -> dict[int, Path]:
    found = {_STEP.fullmatch(path.stem): path for path in sorted(folder.glob("step-*.png"))}
    return {int(match[1]): path for match, path in found.items() if match}
