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

from vipo.checkpoint import list_checkpoints
from vipo.evaluate import Evaluation
from vipo.files import remove, write_text
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
        return self.exists() and metrics.is_file() and bool(_complete_lines(metrics))

    def start(self, recipe_yaml: str) -> None:
        """Begin a new run; one that failed before its first iteration was done is begun again.

        Raises:
            UserError: the folder already holds a run, or something that is not a folder is in the way.
        """
        if self.has_progress():
            raise UserError(
                f"{str(self.root)!r} already holds a run; add --resume to go on, or choose another --output"
            )
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{str(self.root)!r} is a file, not a folder; choose another --output")
        self.root.mkdir(parents=True, exist_ok=True)
        for name in LOGS:
            (self.root / name).unlink(missing_ok=True)
        write_text(self.root / "environment.json", json.dumps(environment(), indent=2) + "\n")
        write_text(self.recipe, recipe_yaml)

    def latest_checkpoint(self) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def rewind(self, iteration: int) -> None:
        """Drop what was logged from ``iteration`` on: those iterations will be run again."""
        for name in LOGS:
            file = self.root / name
            if file.exists():
                # An evaluation stands for the state *before* the iteration of its number, a metric for the iteration.
                last = iteration + 1 if name == "evaluations.jsonl" else iteration
                kept = [line for line in _complete_lines(file) if json.loads(line)["iteration"] < last]
                write_text(file, "".join(f"{line}\n" for line in kept))
        for path in [*self.root.glob("samples/step-*"), *self.root.glob("maps/step-*")]:
            last = iteration + 1 if path.parent.name == "samples" else iteration
            if int(path.stem.removeprefix("step-")) >= last:
                remove(path)

    def evaluated(self) -> set[int]:
        """At which iterations an evaluation is on record."""
        file = self.root / "evaluations.jsonl"
        return {json.loads(line)["iteration"] for line in _complete_lines(file)} if file.exists() else set()

    def first_scores(self) -> dict[str, list[float | None]]:
        """The untrained model's scores, picture by picture; empty if they are not on record."""
        file = self.root / "evaluations.jsonl"
        records = [json.loads(line) for line in _complete_lines(file)] if file.exists() else []
        return next((record["values"] for record in records if record["iteration"] == 0), {})

    def log_step(self, step: TrainStep) -> None:
        head = {"iteration": step.iteration}
        self._append("metrics.jsonl", {**head, **step.metrics, "events": list(step.events)})
        self._append("timing.jsonl", {**head, **step.seconds})

    def log_evaluation(self, iteration: int, evaluation: Evaluation) -> None:
        self._append(
            "evaluations.jsonl",
            {
                "iteration": iteration,
                "samples_per_prompt": evaluation.samples_per_prompt,
                "prompts": [prompt.text for prompt in evaluation.prompts],
                "values": {name: values.tolist() for name, values in evaluation.scores.items()},
            },
        )

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.root / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record)) + "\n")


def _complete_lines(file: Path) -> list[str]:
    """The lines that were written whole; a kill can cut the last one short."""
    text = file.read_text(encoding="utf-8")
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Versions and hardware, for whoever wants to run it again."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "accelerators": devices,
        "threads": torch.get_num_threads(),
    }
