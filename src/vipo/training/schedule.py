"""The learning rate of an iteration: a function of its number, so that a run that goes on needs no state of it.

With W = ``warmup``, T iterations, and s = (i - W) / (T - W), the share of those after the warm-up that were before i:

    warm-up      (i + 1) / (W + 1)                             i < W
    constant     1
    linear       final + (1 - final) (1 - s)
    cosine       final + (1 - final) (1 + cos(pi s)) / 2       arXiv 1608.03983, without restarts

all times ``learning_rate``. After the warm-up these are the values of transformers' ``get_linear_schedule_with_warmup``
and ``get_cosine_with_min_lr_schedule_with_warmup``. Its warm-up begins with a rate of 0, which would throw away an
iteration's samples; here the first iteration has the rate that its second would have with one step more.
"""

from __future__ import annotations

import math

from vipo.options import OptimizerOptions


def varies(options: OptimizerOptions) -> bool:
    """Whether the learning rate is another in some iterations."""
    return options.schedule != "constant" or options.warmup > 0


def learning_rate(options: OptimizerOptions, iteration: int, iterations: int) -> float:
    """That of all optimiser steps of an iteration.

    Args:
        iteration: from 0.
        iterations: of the whole run: where the rate has come down.
    """
    if iteration < options.warmup:
        return options.learning_rate * (iteration + 1) / (options.warmup + 1)
    share = min(1.0, (iteration - options.warmup) / max(1, iterations - options.warmup))
    return options.learning_rate * _factor(options, share)


def _factor(options: OptimizerOptions, share: float) -> float:
    if options.schedule == "constant":
        return 1.0
    left = 1 - share if options.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return options.final + (1 - options.final) * left
