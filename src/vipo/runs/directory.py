"""The run directory: what a run leaves on disk, written so that a killed run leaves nothing broken.

``recipe.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (one object per iteration, reproducible bit for
bit), ``timing.jsonl`` (wall seconds by phase), ``evaluations.jsonl``, ``samples/``, ``maps/``, ``checkpoints/``,
``tensorboard/``, ``export/``, ``report.html``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vipo.environment import environment
from vipo.errors import UserError
from vipo.evaluation.records import POLICY, Evaluation
from vipo.files import complete_lines, remove, write_text
from vipo.training.checkpoint import Head, list_checkpoints, read_head
from vipo.types import TrainStep

LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl")


@dataclass(frozen=True)
class Past:
    """What a folder holds of a run that is to go on."""

    root: Path
    recipe: Path
    logged: int  # iterations on record
    chosen: tuple[Path, Head] | None = None  # the checkpoint to go on from; None: there is none yet
    later: tuple[Path, ...] = ()  # checkpoints of more iterations than that one, newest first

    @property
    def owns_chosen(self) -> bool:
        """Whether that checkpoint is one of this run's own."""
        return self.chosen is not None and self.chosen[0].resolve().parent.parent == self.root.resolve()


@dataclass(frozen=True)
class RunDirectory:
    """Reads and writes one run's folder."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    def exists(self) -> bool:
        return self.recipe.is_file()

    def has_progress(self) -> bool:
        """Whether anything would be lost by starting over: at least one iteration is on record."""
        metrics = self.root / "metrics.jsonl"
        return self.exists() and metrics.is_file() and bool(complete_lines(metrics))

    def check_place(self) -> None:
        """Raises:
        UserError: something that is not a folder is in the way.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{str(self.root)!r} is a file, not a folder; choose another --output")

    def check_there(self) -> None:
        """Raises:
        UserError: there is no run to go on with.
        """
        self.check_place()
        if not self.exists():
            what = "it holds no run" if self.root.is_dir() else "there is no such folder"
            raise UserError(
                f"cannot resume {str(self.root)!r}: {what}; leave out --resume to start there, or give the run's"
                " folder as --output"
            )

    def check_free(self) -> None:
        """Raises:
        UserError: the folder holds a run that would be lost.
        """
        if self.has_progress():
            raise UserError(
                f"{str(self.root)!r} already holds a run; add --resume to go on, or choose another --output"
            )

    def past(self, checkpoint: str | None = None) -> Past:
        """What there is to go on from; nothing is changed.

        Args:
            checkpoint: a folder's name under ``checkpoints/`` or a path; None takes the latest.

        Raises:
            UserError: there is no such checkpoint, or one cannot be read.
        """
        path = self.latest_checkpoint() if checkpoint is None else self._checkpoint(checkpoint)
        if path is None:
            return Past(self.root, self.recipe, self._logged())
        head = read_head(path)
        return Past(self.root, self.recipe, self._logged(), (path, head), tuple(self._later(head.iteration)))

    def _checkpoint(self, name: str) -> Path:
        """A checkpoint by its folder's name, or by a path to it."""
        for path in (self.checkpoints / name, Path(name).expanduser()):
            if (path / "state.json").is_file():
                return path
        known = ", ".join(path.name for path in list_checkpoints(self.checkpoints))
        there = f"there are {known}" if known else "there is none yet"
        raise UserError(f"there is no checkpoint {name!r}; in {str(self.checkpoints)!r} {there}")

    def _logged(self) -> int:
        """How many iterations are on record."""
        metrics = self.root / "metrics.jsonl"
        lines = complete_lines(metrics) if metrics.is_file() else []
        return 1 + max((json.loads(line)["iteration"] for line in lines), default=-1)

    def start(self, recipe_yaml: str, *, processes: int = 1) -> None:
        """Begin a new run; one that failed before its first iteration was done is begun again.

        Raises:
            UserError: the folder already holds a run, or something that is not a folder is in the way.
        """
        self.check_place()
        self.check_free()
        self.root.mkdir(parents=True, exist_ok=True)
        for name in LOGS:
            (self.root / name).unlink(missing_ok=True)
        write_text(self.root / "environment.json", json.dumps(environment(processes), indent=2) + "\n")
        write_text(self.recipe, recipe_yaml)

    def latest_checkpoint(self) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def _later(self, iteration: int) -> list[Path]:
        """Those of more than ``iteration`` iterations, newest first."""
        return [path for path in reversed(list_checkpoints(self.checkpoints)) if read_head(path).iteration > iteration]

    def rewind(self, iteration: int, *, evaluates_anew: bool = False) -> None:
        """Drop what was saved and logged from ``iteration`` on: those iterations will be run again.

        Checkpoints go first, the newest before the others: killed at any moment, the latest that is left has its log.
        With ``evaluates_anew`` the evaluation at ``iteration`` goes too.
        """
        later = self._later(iteration)
        for path in [*later, *((self.root / "export", self.root / "report.html") if later else ())]:
            remove(path)
        evaluations_end = iteration if evaluates_anew else iteration + 1
        for name in LOGS:
            file = self.root / name
            if file.exists():
                # An evaluation stands for the state *before* the iteration of its number, a metric for the iteration.
                last = evaluations_end if name == "evaluations.jsonl" else iteration
                kept = [line for line in complete_lines(file) if json.loads(line)["iteration"] < last]
                write_text(file, "".join(f"{line}\n" for line in kept))
        for path in [*self.root.glob("samples/step-*"), *self.root.glob("maps/step-*")]:
            last = evaluations_end if path.parent.name == "samples" else iteration
            if int(path.stem.removeprefix("step-")) >= last:
                remove(path)

    def evaluated(self) -> set[int]:
        """At which iterations an evaluation is on record."""
        return {record["iteration"] for record in self._evaluations()}

    def comparable_since(self) -> int:
        """The iteration of the first evaluation that later ones are compared with: 0 unless a resume changed them."""
        records = self._evaluations()
        return int(records[-1].get("comparable_since", 0)) if records else 0

    def first_scores(self) -> dict[str, list[float | None]]:
        """The scores that later ones are compared with, picture by picture; empty if they are not on record.

        They are the untrained model's, unless a resume changed how it is evaluated.
        """
        since = self.comparable_since()
        return next((record["values"] for record in self._evaluations() if record["iteration"] == since), {})

    def _evaluations(self) -> list[dict[str, Any]]:
        file = self.root / "evaluations.jsonl"
        return [json.loads(line) for line in complete_lines(file)] if file.exists() else []

    def log_step(self, step: TrainStep) -> None:
        head = {"iteration": step.iteration}
        tail = {"failure": step.failure} if step.failure else {}
        self._append("metrics.jsonl", {**head, **step.metrics, "events": list(step.events), **tail})
        self._append("timing.jsonl", {**head, **step.seconds})

    def log_evaluation(self, iteration: int, evaluation: Evaluation, *, comparable_since: int = 0) -> None:
        self._append(
            "evaluations.jsonl",
            {
                "iteration": iteration,
                **({"comparable_since": comparable_since} if comparable_since else {}),
                "samples_per_prompt": evaluation.samples_per_prompt,
                "prompts": evaluation.texts,
                "values": {name: values.tolist() for name, values in evaluation.scores[POLICY].items()},
            },
        )

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.root / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record)) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
