"""Judging a list of prompts part by part: base and policy on the same noise, no more pictures kept than a part's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.evaluate import Evaluation, Judgement
from vipo.rewards.scoring import ask
from vipo.types import Prompt, Reward, Scores, UserError

Models = Mapping[str, Callable[[], AbstractContextManager[None]]]  # "base", "policy" -> inside, the generator is that
Judge = Callable[[Sequence[Prompt], int], Evaluation]  # prompts and the place of their first in the whole list


class Judges:
    """Rewards as a scorer for evaluation: a sample without a score is NaN, even if a whole part has none.

    A reward that cannot be reached stops the evaluation instead of leaving holes in it: it can be resumed.

    Raises:
        UserError: a reward has a fault or cannot be reached.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = rewards

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Scores:
        by_name, failures = {}, {}
        for name, reward in self.rewards.items():
            answer = ask(name, reward, media, prompts)
            if answer.unreached:
                cause = answer.causes.get(answer.unreached[0], "it does not say why")
                raise UserError(f"reward {name!r} cannot be reached ({cause}); bring it back and evaluate again")
            missing = ~answer.scores.isfinite()
            by_name[name] = answer.scores.masked_fill(missing, torch.nan)
            if missing.any():
                failures[name] = "; ".join(dict.fromkeys(answer.causes.values())) or "the score was not finite"
        return Scores(by_name, dict.fromkeys(by_name, 1.0), failures)


@dataclass(frozen=True)
class Part:
    """Scores of consecutive prompts, as they stand on disk; None where there is no score."""

    scores: dict[str, dict[str, list[float | None]]]  # model -> reward -> one per sample
    failures: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, results: Mapping[str, Evaluation], first: int) -> Part:
        scores, failures = {}, []
        for model, result in results.items():
            scores[model] = {name: plain(values) for name, values in result.scores.items()}
            for name, why in result.failures.items():
                holes, total = scores[model][name].count(None), len(scores[model][name])
                where = f"{holes} of {total} samples from prompt {first} on"
                failures.append(f"{model}: {name} has no score for {where}: {why}")
        return cls(scores, failures)


def plain(values: Float[Tensor, " N"]) -> list[float | None]:
    """Numbers for JSON, which has no NaN."""
    return [value if value == value else None for value in values.tolist()]


@runtime_checkable
class Keeper(Protocol):
    """Where parts are kept, so that a killed evaluation loses at most one."""

    def read(self, first: int) -> Part | None:
        """The part that begins with the prompt ``first``, if it is there."""

    def keep(self, first: int, part: Part, results: Mapping[str, Evaluation]) -> None:
        """Write it."""


def judge_parts(
    models: Models,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    batch_size: int,
    keeper: Keeper | None = None,
    progress: Callable[[int], None] | None = None,
) -> Judgement:
    """Judge every model on every prompt, about ``batch_size`` samples at a time, keeping no more pictures than that.

    What ``keeper`` has already is not judged again. ``progress`` is told how many prompts are done.
    """
    parts, step = [], max(1, batch_size // samples_per_prompt)
    for first in range(0, len(prompts), step):
        part = keeper.read(first) if keeper else None
        if part is None:
            results = {}
            for model, present in models.items():
                with present():
                    results[model] = judge(prompts[first : first + step], first)
            part = Part.of(results, first)
            if keeper:
                keeper.keep(first, part, results)
        parts.append(part)
        if progress:
            progress(min(first + step, len(prompts)))
    return _joined(parts, prompts, samples_per_prompt)


def _joined(parts: Sequence[Part], prompts: Sequence[Prompt], samples_per_prompt: int) -> Judgement:
    scores = {
        model: {name: _tensor([value for part in parts for value in part.scores[model][name]]) for name in by_reward}
        for model, by_reward in parts[0].scores.items()
    }
    return Judgement(tuple(prompts), samples_per_prompt, scores, tuple(why for part in parts for why in part.failures))


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values])
