"""Intervals of a mean over seeds and prompts that know how few seeds there are; ``coverage.py`` measures them."""

from __future__ import annotations

import math

from scipy import stats
from torch import Tensor

Interval = tuple[float, float]


def squares(table: Tensor) -> tuple[float, float, float]:
    """Mean squares of the seeds, of the prompts and of the rest, of differences (S, P)."""
    count, prompts = table.shape
    mean = table.mean()
    seed, prompt = table.mean(1) - mean, table.mean(0) - mean
    rest = table - mean - seed[:, None] - prompt
    of_rest = float(rest.square().sum()) / ((count - 1) * (prompts - 1))
    return prompts * float(seed.var()), count * float(prompt.var()), of_rest


def student(table: Tensor) -> Interval:
    """Student's t over the seeds' means."""
    return _around(table, float(table.mean(1).var()) / len(table), len(table) - 1)


def anova(table: Tensor) -> Interval:
    """Student's t with the variance (MSA + MSB - MSE) / (S P) of a mean over both, at least MSA / (S P).

    With Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946), at least S - 1.
    """
    (of_seeds, of_prompts, rest), (count, prompts) = squares(table), table.shape
    variance = max(of_seeds + of_prompts - rest, of_seeds)
    parts = of_seeds**2 / (count - 1) + of_prompts**2 / (prompts - 1) + rest**2 / ((count - 1) * (prompts - 1))
    return _around(table, variance / table.numel(), max(variance**2 / parts, count - 1) if parts else count - 1)


def _around(table: Tensor, variance: float, freedom: float) -> Interval:
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return float(table.mean()) - reach, float(table.mean()) + reach
