"""Means over prompts with a bootstrap interval, and the paired gain of one model over another, sample by sample."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vipo import randomness
from vipo.errors import UserError
from vipo.evaluation.records import BASE, Evaluation


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its uncertainty: the standard error and a 95 % bootstrap interval over prompts."""

    mean: float
    standard_error: float
    low: float
    high: float


ESTIMATES = tuple(entry.name for entry in fields(Estimate))

FEWEST_PROMPTS = 6
"""All of n prompts move one way by chance with probability 2^(1-n); below 6 that exceeds 5 %: no verdict."""


def estimate(values: Float[Tensor, " N"], samples_per_prompt: int, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean over prompts with a bootstrap over prompts; samples of one prompt are not independent.

    Raises:
        UserError: no prompt has a score.
    """
    means = _prompt_means(values, samples_per_prompt)
    if not len(means):
        raise UserError("no prompt got a score, so there is nothing to average")
    draws = torch.randint(len(means), (resamples, len(means)), generator=randomness.generator(seed, "bootstrap"))
    low, high = means[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else float("nan")
    return Estimate(float(means.mean()), error, low, high)


def prompt_mean(values: Float[Tensor, " N"], samples_per_prompt: int) -> float:
    """The mean over prompts, as :func:`estimate` has it; NaN if no prompt has a score."""
    return float(_prompt_means(values, samples_per_prompt).mean())


def _prompt_means(values: Float[Tensor, " N"], samples_per_prompt: int) -> Float[Tensor, " P"]:
    """The mean of each prompt that has a score."""
    means = values.double().unflatten(0, (-1, samples_per_prompt)).nanmean(1)
    return means[means.isfinite()]


def paired(after: Float[Tensor, " N"], before: Float[Tensor, " N"], samples_per_prompt: int) -> Estimate:
    """What ``after`` has over ``before``, sample by sample; those without both scores are left out.

    Raises:
        UserError: no sample has both, see :func:`pairs`.
    """
    return estimate(after - before, samples_per_prompt)


def pairs(after: Float[Tensor, " N"], before: Float[Tensor, " N"]) -> int:
    """How many samples have both scores."""
    return int((after.isfinite() & before.isfinite()).sum())


def paired_prompts(after: Float[Tensor, " N"], before: Float[Tensor, " N"], samples_per_prompt: int) -> int:
    """How many prompts have a sample with both scores."""
    both = after.isfinite() & before.isfinite()
    return int(both.unflatten(0, (-1, samples_per_prompt)).any(1).sum())


def first_at(levels: Float[Tensor, " R"], at: Float[Tensor, " K"], curves: Float[Tensor, "R K"]) -> Float[Tensor, " R"]:
    """Where each curve is first at its level, on straight lines between the points ``at``; infinite if it never is."""
    above = curves >= levels[:, None]
    first = above.int().argmax(1, keepdim=True)
    before = (first - 1).clamp_min(0)
    low, high = (curves.gather(1, place).squeeze(1) for place in (before, first))
    share = ((levels - low) / (high - low)).nan_to_num(1.0).clamp(0, 1)  # of a level that it begins with
    begin, end = at[before.squeeze(1)], at[first.squeeze(1)]
    return torch.where(above.any(1), begin + share * (end - begin), torch.inf)


def summary(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row per reward and model, sorted by reward: how many samples have a score, and the mean over prompts.

    ``gain`` is what the policy has over the base, paired sample by sample. What cannot be estimated is None.
    """
    rows = []
    for model, by_reward in evaluation.scores.items():
        for reward, values in by_reward.items():
            counts = {"scored": int(values.isfinite().sum()), "samples": len(values)}
            mean = _mean(values, evaluation.samples_per_prompt) or dict.fromkeys(ESTIMATES)
            rows.append({"reward": reward, "model": model, **counts, **mean, "gain": _gain(evaluation, model, reward)})
    return sorted(rows, key=lambda row: str(row["reward"]))


def _mean(values: Tensor, samples_per_prompt: int) -> dict[str, float | None] | None:
    return _plain(estimate(values, samples_per_prompt)) if bool(values.isfinite().any()) else None


def _gain(evaluation: Evaluation, model: str, reward: str) -> dict[str, float | None] | None:
    after, before = evaluation.scores[model][reward], evaluation.scores[BASE][reward]
    if model == BASE or not pairs(after, before):
        return None
    return _plain(paired(after, before, evaluation.samples_per_prompt))


def _plain(found: Estimate) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {key: number if math.isfinite(number) else None for key, number in asdict(found).items()}
