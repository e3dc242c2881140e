"""What an evaluation is made of: scored media of a part, a part's scores as they stand on disk, and the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.types import Prompt

BASE, POLICY = "base", "policy"  # a model as it was before training, and what was trained
Models = Mapping[str, Callable[[], AbstractContextManager[None]]]  # by name; inside, the generator is that model


@dataclass(frozen=True)
class Scored:
    """Media of one model and their scores: row i belongs to prompt ``i // samples_per_prompt``."""

    prompts: tuple[Prompt, ...]  # one per sample
    media: Float[Tensor, "N 3 F Y X"]
    scores: Mapping[str, Float[Tensor, " N"]]
    samples_per_prompt: int
    failures: Mapping[str, str] = field(default_factory=dict)  # reward name -> why its NaNs are there


@dataclass(frozen=True)
class Part:
    """Scores of consecutive prompts, ready for JSON: None where there is no score.

    Args:
        first: place of the first of the prompts in the whole list.
        scores: model -> reward -> one per sample.
        failures: why samples have no score, one sentence each.
    """

    first: int
    scores: dict[str, dict[str, list[float | None]]]
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, results: Mapping[str, Scored], first: int) -> Self:
        scores, failures = {}, []
        for model, result in results.items():
            scores[model] = {name: plain(values) for name, values in result.scores.items()}
            for name, why in result.failures.items():
                holes, total = scores[model][name].count(None), len(scores[model][name])
                where = f"{holes} of {total} samples from prompt {first} on"
                failures.append(f"{model}: {name} has no score for {where}: {why}")
        return cls(first, scores, failures)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one or two models on the same prompts and noise; row i belongs to prompt ``i // samples_per_prompt``.

    The models are called ``base`` and, if something was trained, ``policy``. Scores are float32 on the CPU.
    """

    prompts: tuple[Prompt, ...]  # one per group
    samples_per_prompt: int
    scores: Mapping[str, Mapping[str, Float[Tensor, " N"]]]  # model -> reward
    failures: tuple[str, ...] = ()  # why samples have no score, one sentence each

    @classmethod
    def join(cls, parts: Sequence[Part], prompts: Sequence[Prompt], samples_per_prompt: int) -> Self:
        """Parts, each there once, in the order of their prompts."""
        scores = {
            model: {name: _tensor([v for part in parts for v in part.scores[model][name]]) for name in by_reward}
            for model, by_reward in parts[0].scores.items()
        }
        return cls(tuple(prompts), samples_per_prompt, scores, tuple(why for part in parts for why in part.failures))

    @property
    def texts(self) -> list[str]:
        """The prompt of each sample."""
        return [prompt.text for prompt in self.prompts for _ in range(self.samples_per_prompt)]


@dataclass(frozen=True)
class EvaluationRecord:
    """A run's evaluation as ``evaluations.jsonl`` has it: scores of the fixed pictures after ``iteration`` iterations.

    Args:
        iteration: 0 is the untrained model.
        prompts: one per picture.
        values: name -> (N,), NaN where a picture got no score.
        comparable_since: the first evaluation that was made the same way.
    """

    iteration: int
    samples_per_prompt: int
    prompts: tuple[str, ...]
    values: Mapping[str, Float[Tensor, " N"]]
    comparable_since: int = 0


def recorded(line: Mapping[str, Any]) -> EvaluationRecord:
    """One line of ``evaluations.jsonl``, parsed."""
    values = {
        name: torch.tensor([math.nan if value is None else float(value) for value in listed], dtype=torch.float64)
        for name, listed in line["values"].items()
    }
    prompts = tuple(str(prompt) for prompt in line.get("prompts") or ())
    since = int(line.get("comparable_since") or 0)
    return EvaluationRecord(line["iteration"], int(line.get("samples_per_prompt") or 1), prompts, values, since)


@runtime_checkable
class Keeper(Protocol):
    """Where a process keeps its parts and their media, of which the evaluator forgets all but the scores."""

    def read(self, first: int) -> Part | None:
        """The part that begins with the prompt ``first``, if it is there from an earlier evaluation."""

    def keep(self, part: Part, results: Mapping[str, Scored]) -> None:
        """Take one part and, by model, what it is made of."""


def plain(values: Float[Tensor, " N"]) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [value if value == value else None for value in values.tolist()]


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values])
