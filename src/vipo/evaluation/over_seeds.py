"""A mean over seeds and prompts, with an interval that knows how few seeds there are.

Two seeds of one method can differ by more than two methods do, and a bootstrap over three seeds is too narrow where
they differ much (``experiments/claims/coverage.py`` measures how much). So the interval here holds two of them:
percentiles of a bootstrap over seeds and prompts, and Student's t with the variance of both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vipo import randomness
from vipo.evaluation.estimate import Estimate

# Quantiles 0.975 of Student's t with 1 to 30 degrees of freedom; with more, it is taken to have no more than 30.
# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


class Squares(NamedTuple):
    """Mean squares of an analysis of variance: of the seeds, of the prompts and of the rest."""

    of_seeds: float
    of_prompts: float
    rest: float


def mean_squares(table: Float[Tensor, "S P"]) -> Squares:
    """Of two seeds or more on two prompts or more."""
    count, prompts = table.shape
    mean = table.mean()
    seed, prompt = table.mean(1) - mean, table.mean(0) - mean
    rest = table - mean - seed[:, None] - prompt
    of_rest = float(rest.square().sum()) / ((count - 1) * (prompts - 1))
    return Squares(prompts * float(seed.var()), count * float(prompt.var()), of_rest)


def variance_of_mean(table: Float[Tensor, "S P"]) -> tuple[float, float]:
    """(MSA + MSB - MSE) / (S P), at least MSA / (S P), of the mean over both; and its degrees of freedom.

    Satterthwaite's degrees (Biometrics Bulletin 2, 1946), at least S - 1.
    """
    (of_seeds, of_prompts, rest), (count, prompts) = mean_squares(table), table.shape
    variance = max(of_seeds + of_prompts - rest, of_seeds)
    parts = of_seeds**2 / (count - 1) + of_prompts**2 / (prompts - 1) + rest**2 / ((count - 1) * (prompts - 1))
    return variance / table.numel(), max(variance**2 / parts, count - 1) if parts else count - 1


def estimate_over_seeds(table: Float[Tensor, "S P"], *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean over seeds and prompts; its 95 % interval is from the lower of both lows to the higher of both highs.

    Args:
        table: a value of each of two seeds or more on each of two prompts or more, all finite.
    """
    count, prompts = table.shape
    generator = randomness.generator(seed, "bootstrap over seeds")
    of_seeds, of_prompts = (_shares(resamples, kinds, generator, table) for kinds in (count, prompts))
    drawn = (of_seeds @ table * of_prompts).sum(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=table.dtype)).tolist()
    mean, (variance, freedom) = float(table.mean()), variance_of_mean(table)
    error = math.sqrt(variance)
    reach = T_975[min(int(freedom), len(T_975)) - 1] * error
    return Estimate(mean, error, min(low, mean - reach), max(high, mean + reach))


def _shares(
    resamples: int, kinds: int, generator: torch.Generator, like: Float[Tensor, "S P"]
) -> Float[Tensor, "R kinds"]:
    """How much of each resample, drawn with replacement, is of each kind."""
    drawn = torch.randint(kinds, (resamples, kinds), generator=generator)
    ones = torch.ones_like(drawn, dtype=like.dtype)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones) / kinds
