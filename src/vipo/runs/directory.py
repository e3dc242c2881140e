"""The run directory: what a run leaves on disk, written so that a killed run leaves nothing broken.

``recipe.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (one object per iteration, reproducible bit for
bit), ``timing.jsonl`` (wall seconds by phase), ``evaluations.jsonl``, ``samples/``, ``maps/``, ``rollouts/`` (what
``vipo.media.recordings`` keeps), ``checkpoints/``, ``tensorboard/``, ``tracking.json`` (the run's id with other
trackers), ``export/``, ``report.html``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vipo.errors import UserError
from vipo.evaluation.records import POLICY, Evaluation, EvaluationRecord, recorded
from vipo.files import SEAL, aside_of, complete_lines, is_intact, read_yaml, sealed, write_text, writing
from vipo.runs import lock
from vipo.training.saved import Saved, choose, iteration_of, list_checkpoints, list_folders
from vipo.types import TrainStep

METRICS, TIMING, EVALUATIONS = LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl")
RECIPE = "recipe.yaml"
Layout = Literal["diffusers", "comfyui"]  # of the names in an exported LoRA
_EXPORT = re.compile(r"export(?:-best|-step-(\d{6,}))?(?:-comfyui)?")  # what RunDirectory.export_folder calls them
STOPPED = "stopped"  # in the metrics of the last iteration: why the run ended there, see training.stop_when
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Past:
    """What a folder holds of a run."""

    root: Path
    recipe: Mapping[str, Any] | None  # the one on record; None: the folder is no run's
    others: tuple[str, ...]  # names of what is in it
    logged: int  # iterations on record
    evaluated: frozenset[int]  # iterations after which an evaluation is on record
    comparable_since: int  # the first of them that later ones are compared with: 0 unless a resume changed them
    saved: Saved | None  # what to go on from; None: there is no checkpoint yet
    torn: tuple[str, ...] = ()  # logs whose last line was cut short
    rewritten: tuple[str, ...] = ()  # logs that are not what they were when that was saved

    @property
    def owns_saved(self) -> bool:
        """Whether that checkpoint is one of this run's own."""
        return self.saved is not None and self.saved.path.resolve().parent.parent == self.root.resolve()


@dataclass(frozen=True)
class RunDirectory:
    """Reads and writes one run's folder."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / CHECKPOINTS

    @property
    def recipe(self) -> Path:
        return self.root / RECIPE

    def export_folder(self, checkpoint: str | None = None, layout: Layout = "diffusers") -> Path:
        """Where a checkpoint is exported to, None being the latest: no other and no other layout takes its place."""
        name = "" if checkpoint is None else f"-{Path(checkpoint).name}"
        return self.root / f"export{name}{'' if layout == 'diffusers' else f'-{layout}'}"

    def exports_of_latest(self) -> list[Path]:
        """Where the latest checkpoint is exported to, in each layout."""
        return [self.export_folder(layout=layout) for layout in get_args(Layout)]

    def exports_after(self, iteration: int) -> list[Path]:
        """Exports that may be of a later checkpoint: all that vipo named, but those of an earlier one's number."""
        named = {folder: _EXPORT.fullmatch(folder.name) for folder in self.root.glob("export*")}
        return [folder for folder, match in named.items() if match and int(match[1] or iteration + 1) > iteration]

    def exists(self) -> bool:
        return self.recipe.is_file()

    def past(self, checkpoint: str | None = None) -> Past:
        """What there is; nothing is changed.

        Args:
            checkpoint: a folder's name under ``checkpoints/`` or a path; None takes the latest.

        Raises:
            UserError: there is no such checkpoint, or one of the files cannot be read.
        """
        steps, evaluations = _read_log(self.root / METRICS), _read_log(self.root / EVALUATIONS)
        saved, passing = choose(self.checkpoints, checkpoint), (lock.NAME, aside_of(self.recipe).name)
        return Past(
            root=self.root,
            recipe=self._recorded() if self.exists() else None,
            others=tuple(sorted(path.name for path in self.root.iterdir() if path.name not in passing)),
            logged=1 + max((step["iteration"] for step in steps), default=-1),
            evaluated=frozenset(record["iteration"] for record in evaluations),
            comparable_since=_comparable_since(evaluations),
            saved=saved,
            torn=tuple(name for name in (METRICS, EVALUATIONS) if _is_torn(self.root / name)),
            rewritten=() if saved is None else self._rewritten(saved),
        )

    def checksums(self, iteration: int) -> dict[str, str]:
        """SHA-256 of what each log that is no clock's has on record of the iterations before ``iteration``."""
        return {
            name: hashlib.sha256(json.dumps(_before(self.root / name, iteration)).encode()).hexdigest()
            for name in (METRICS, EVALUATIONS)
        }

    def _rewritten(self, saved: Saved) -> tuple[str, ...]:
        now = self.checksums(saved.head.iteration)
        return tuple(name for name, then in saved.head.logs.items() if then != now.get(name))

    def _recorded(self) -> Mapping[str, Any]:
        """The recipe on record, as a mapping."""
        try:
            recipe = read_yaml(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{str(self.recipe)!r} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(recipe, Mapping):
            raise UserError(f"{str(self.recipe)!r} holds no recipe; put back the one the run began with")
        return recipe

    def latest_checkpoint(self) -> Path | None:
        """The newest, damaged or not."""
        found = list_folders(self.checkpoints)
        return found[-1] if found else None

    def kept(self) -> frozenset[int]:
        """The iterations that there are complete checkpoints of."""
        return frozenset(map(iteration_of, list_checkpoints(self.checkpoints)))

    def evaluations(self) -> list[EvaluationRecord]:
        """Those on record, in their order."""
        return [recorded(line) for line in _read_log(self.root / EVALUATIONS)]

    def first_scores(self) -> dict[str, list[float | None]]:
        """The scores that later ones are compared with, picture by picture; empty if they are not on record.

        They are the untrained model's, unless a resume changed how it is evaluated.
        """
        evaluations = _read_log(self.root / EVALUATIONS)
        since = _comparable_since(evaluations)
        return next((record["values"] for record in evaluations if record["iteration"] == since), {})

    def log_step(self, step: TrainStep) -> None:
        head = {"iteration": step.iteration}
        tail = {"failure": step.failure} if step.failure else {}
        self._append(METRICS, {**head, **step.metrics, "events": list(step.events), **tail})
        self._append(TIMING, {**head, **step.seconds})

    def evaluation_events(self, iteration: int) -> list[str]:
        """What was told of one of them."""
        return [
            event
            for line in _read_log(self.root / EVALUATIONS)
            if line["iteration"] == iteration
            for event in line.get("events", [])
        ]

    def log_evaluation(
        self,
        iteration: int,
        evaluation: Evaluation,
        *,
        comparable_since: int = 0,
        watch: Callable[[list[EvaluationRecord]], list[str]] = lambda _records: [],
    ) -> None:
        """Write one down; ``watch`` is what its record says of it, beside those before and itself."""
        record = {
            "iteration": iteration,
            **({"comparable_since": comparable_since} if comparable_since else {}),
            "samples_per_prompt": evaluation.samples_per_prompt,
            "prompts": evaluation.texts,
            "values": {name: values.tolist() for name, values in evaluation.scores[POLICY].items()},
        }
        record = _plain(record)
        told = watch([*self.evaluations(), recorded(record)])
        self._append(EVALUATIONS, sealed({**record, **({"events": told} if told else {})}))

    def log_stop(self, iteration: int, why: str) -> None:
        """Tell in the log of the last iteration, as an event, why the run ended after so many; once only."""
        lines = complete_lines(self.root / METRICS)
        last = json.loads(lines[-1]) if lines else {}
        if last.get("iteration") == iteration - 1 and STOPPED not in last:
            told = {**last, "events": [*last["events"], why], STOPPED: why}
            write_text(self.root / METRICS, "".join(f"{line}\n" for line in [*lines[:-1], json.dumps(told)]))

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.root / name
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record)) + "\n")


def _is_torn(path: Path) -> bool:
    whole = path.read_bytes() if path.exists() else b""
    return bool(whole) and not whole.endswith(b"\n")


def _before(path: Path, iteration: int) -> list[dict[str, Any]]:
    """The records of the iterations before one, as they were when it was saved: a stop is told later."""
    return [_without_stop(record) for record in _read_log(path) if record["iteration"] < iteration]


def _without_stop(record: dict[str, Any]) -> dict[str, Any]:
    if STOPPED not in record:
        return record
    events = [event for event in record["events"] if event != record[STOPPED]]
    return {key: value for key, value in {**record, "events": events}.items() if key != STOPPED}


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log that were written whole, each with its ``iteration``; none if there is no such file.

    Raises:
        UserError: a line is damaged.
    """
    records: list[dict[str, Any]] = []
    try:
        whole = complete_lines(path) if path.exists() else []
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is damaged: {error}; mend it, or remove that line with all that follow"
        ) from error
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            int(record["iteration"])
            if not is_intact(record) or (records and SEAL in records[-1] and SEAL not in record):
                raise ValueError("its SHA-256 is not the one on record")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{str(path)!r} is damaged: line {number} is no record of an iteration ({error}); mend it, or remove"
                " it with all that follow"
            ) from error
        records.append(record)
    return records


def _comparable_since(evaluations: Sequence[Mapping[str, Any]]) -> int:
    return int(evaluations[-1].get("comparable_since", 0)) if evaluations else 0


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
