"""The run directory: what a run leaves on disk, written so that a killed run leaves nothing broken.

``recipe.yaml`` (resolved), ``environment.json``, ``metrics.jsonl`` (one object per iteration, reproducible bit for
bit), ``timing.jsonl`` (wall seconds by phase), ``evaluations.jsonl``, ``samples/``, ``maps/``, ``checkpoints/``,
``tensorboard/``, ``export/``, ``report.html``.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vipo.checkpoint import list_checkpoints, trained_iterations
from vipo.evaluate import Evaluation
from vipo.files import complete_lines, remove, write_text
from vipo.types import TrainStep, UserError

LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl")
PACKAGES = ("vipo", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


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

    def check_free(self) -> None:
        """Raises:
        UserError: the folder holds a run that would be lost.
        """
        if self.has_progress():
            raise UserError(
                f"{str(self.root)!r} already holds a run; add --resume to go on, or choose another --output"
            )

    def iterations_logged(self) -> int:
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

    def later_checkpoints(self, iteration: int) -> list[Path]:
        """Those of more than ``iteration`` iterations, newest first."""
        return [path for path in reversed(list_checkpoints(self.checkpoints)) if trained_iterations(path) > iteration]

    def rewind(self, iteration: int, *, evaluates_anew: bool = False) -> None:
        """Drop what was saved and logged from ``iteration`` on: those iterations will be run again.

        Checkpoints go first, the newest before the others: killed at any moment, the latest that is left has its log.
        With ``evaluates_anew`` the evaluation at ``iteration`` goes too.
        """
        later = self.later_checkpoints(iteration)
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
                "prompts": [prompt.text for prompt in evaluation.prompts],
                "values": {name: values.tolist() for name, values in evaluation.scores.items()},
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


def environment(processes: int = 1) -> dict[str, Any]:
    """Versions and hardware, for whoever wants to run it again."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # with the local part, such as +cu130, which the package's metadata may lack
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "accelerators": devices,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }
