"""Intervals of a mean over seeds and prompts that know how few seeds there are; ``coverage.py`` measures them."""

from __future__ import annotations

import math

from scipy import stats
from torch import Tensor

from vipo.evaluation.over_seeds import variance_of_mean

Interval = tuple[float, float]


def student(table: Tensor) -> Interval:
    """Student's t over the seeds' means."""
    return _around(table, float(table.mean(1).var()) / len(table), len(table) - 1)


def anova(table: Tensor) -> Interval:
    """Student's t with the variance of seeds and prompts together."""
    return _around(table, *variance_of_mean(table))


def _around(table: Tensor, variance: float, freedom: float) -> Interval:
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return float(table.mean()) - reach, float(table.mean()) + reach
