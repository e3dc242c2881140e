"""Fixed prompts and fixed noise to scores, so that two policies are compared picture by picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vipo import randomness
from vipo.rollout import Solver, sample_groups
from vipo.types import Generator, Prompt, Scorer, UserError

EVALUATION_SEED = 20_251_118  # the same for every run, so that runs compare


@dataclass(frozen=True)
class Evaluation:
    """Pictures and their scores: row i belongs to prompt ``i // samples_per_prompt``."""

    prompts: tuple[Prompt, ...]  # one per picture
    media: Float[Tensor, "N 3 F Y X"]
    scores: Mapping[str, Float[Tensor, " N"]]
    samples_per_prompt: int
    failures: Mapping[str, str] = field(default_factory=dict)  # reward name -> why its NaNs are there


@dataclass(frozen=True)
class Judgement:
    """Scores of one or two models on the same prompts and noise; row i belongs to prompt ``i // samples_per_prompt``.

    The models are called ``base`` and, if something was trained, ``policy``.
    """

    prompts: tuple[Prompt, ...]  # one per group
    samples_per_prompt: int
    scores: Mapping[str, Mapping[str, Float[Tensor, " N"]]]  # model -> reward
    failures: tuple[str, ...] = ()  # why samples have no score, one sentence each


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its uncertainty: the standard error and a 95 % bootstrap interval over prompts."""

    mean: float
    standard_error: float
    low: float
    high: float


def evaluate(
    generator: Generator,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    solver: Solver,
    *,
    samples_per_prompt: int,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = EVALUATION_SEED,
    first_prompt: int = 0,
) -> Evaluation:
    """Sample without noise between steps and score. Equal arguments give equal starting noise, whatever the weights.

    The noise of a sample depends on the seed and on its number among all samples of the list of prompts. So a list can
    be judged in parts: ``first_prompt`` is the place of the first of ``prompts`` in the whole list.
    """
    rollout = sample_groups(
        generator,
        prompts,
        solver.deterministic(steps),
        group_size=samples_per_prompt,
        seed=seed,
        first_group=first_prompt,
        batch_size=batch_size,
    )
    scores = scorer(rollout.media, rollout.prompts)
    return Evaluation(rollout.prompts, rollout.media, scores.by_name, samples_per_prompt, scores.failures)


def _per_prompt(values: Tensor, samples_per_prompt: int) -> Tensor:
    return values.double().unflatten(0, (-1, samples_per_prompt)).nanmean(1)


def estimate(values: Float[Tensor, " N"], samples_per_prompt: int, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over prompts with a bootstrap over prompts. Give a difference of two evaluations for the paired estimate.

    Raises:
        UserError: no prompt has a score.
    """
    means = _per_prompt(values, samples_per_prompt)
    means = means[means.isfinite()]
    if not len(means):
        raise UserError("no prompt got a score, so there is nothing to average")
    draws = torch.randint(len(means), (resamples, len(means)), generator=randomness.generator(seed, "bootstrap"))
    low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return Estimate(float(means.mean()), error, low, high)


ESTIMATES = tuple(entry.name for entry in fields(Estimate))


def summary(judgement: Judgement) -> list[dict[str, Any]]:
    """One row per reward and model, sorted by reward: how many samples have a score, and the mean over prompts.

    ``gain`` is what the policy has over the base, paired sample by sample. What cannot be estimated is None.
    """
    rows = []
    for model, scores in judgement.scores.items():
        for reward, values in scores.items():
            gain = None if model == "base" else values - judgement.scores["base"][reward]
            counts = {"scored": int(values.isfinite().sum()), "samples": len(values)}
            mean = _estimated(values, judgement.samples_per_prompt) or dict.fromkeys(ESTIMATES)
            estimated = None if gain is None else _estimated(gain, judgement.samples_per_prompt)
            rows.append({"reward": reward, "model": model, **counts, **mean, "gain": estimated})
    return sorted(rows, key=lambda row: str(row["reward"]))


def _estimated(values: Tensor, samples_per_prompt: int) -> dict[str, float | None] | None:
    """The estimate for JSON, which has no NaN; None if there is nothing to average."""
    if not bool(values.isfinite().any()):
        return None
    found = asdict(estimate(values, samples_per_prompt))
    return {key: number if math.isfinite(number) else None for key, number in found.items()}
