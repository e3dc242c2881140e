"""Fixed prompts and fixed noise to scores, so that two policies are compared picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
) -> Evaluation:
    """Sample without noise between steps and score. Equal arguments give equal starting noise, whatever the weights."""
    rollout = sample_groups(
        generator,
        prompts,
        solver.deterministic(steps),
        group_size=samples_per_prompt,
        seed=seed,
        batch_size=batch_size,
    )
    scores = scorer(rollout.media, rollout.prompts)
    return Evaluation(rollout.prompts, rollout.media, scores.by_name, samples_per_prompt)


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
