"""How often a 95 % interval of the claims holds the truth, on data whose truth is known.

    python experiments/claims/coverage.py            some minutes on one core

A difference of seed s on prompt p is made as truth + a_s + b_p + e_sp, normal and independent, with the variances that
the results themselves show: of every arm minus its scalar GRPO, what analysis of variance finds in the seeds' and the
prompts' own effects and in the rest. How much of it the seeds make up differs between arms, so the lower quartile, the
median, the upper quartile and a tenth above are tried. Intervals:

``now``         what ``results.spread`` gives: percentiles of a bootstrap over seeds and prompts
``stretched``   the same, with each seed's effect times sqrt(S / (S - 1)) first (Davison and Hinkley, Bootstrap Methods
                and their Application, 1997, section 3.8)
``bca``         bias-corrected and accelerated, over the seeds' means (``scipy.stats.bootstrap``)
``t``         Student's t over the seeds' means
``anova``     Student's t with a variance over both (``intervals.anova``), which verdicts ask as well
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

import results
from intervals import Interval, anova, student
from matrix import ARMS
from tables import SCALAR_GROUPS
from vipo import randomness
from vipo.evaluation.over_seeds import mean_squares

HERE = Path(__file__).resolve().parent
SCORE, PROMPTS, SEEDS = "emoji_match", 64, (3, 4, 5)
QUANTILES = (0.25, 0.5, 0.75, 0.9)


def variances(table: Tensor) -> Tensor:
    """Of the seeds' effects, the prompts' and the rest (3,)."""
    (of_seeds, of_prompts, rest), (count, prompts) = mean_squares(table), table.shape
    return torch.tensor([max(0.0, of_seeds - rest) / prompts, max(0.0, of_prompts - rest) / count, rest])


def differences(found: results.Results) -> list[Tensor]:
    """Of each arm minus its scalar GRPO, (S, P), where three seeds or more have both."""
    tables = []
    for arm in found.arms:
        other = SCALAR_GROUPS if arm.startswith("groups-") else "sample"
        shared = [k for k in found.iterations(arm) if k in found.iterations(other)]
        if arm == other or ARMS[arm].recipe != ARMS[other].recipe or not shared:
            continue
        mine, theirs = (results.scores(found, name, SCORE, shared[-1]) for name in (arm, other))
        rows = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        if len(rows) >= min(SEEDS):
            tables.append(torch.stack(rows))
    return tables


def made(variance: Tensor, seeds: int, number: int) -> Tensor:
    """Differences whose truth is 0."""
    shapes = ((seeds, 1), (1, PROMPTS), (seeds, PROMPTS))
    source = randomness.generator(number, f"coverage {seeds}")
    return sum(
        (
            torch.randn(s, generator=source, dtype=torch.double) * v.sqrt()
            for s, v in zip(shapes, variance, strict=True)
        ),
        torch.zeros(seeds, PROMPTS, dtype=torch.double),
    )


def now(table: Tensor) -> Interval:
    found = results.spread(dict(enumerate(table)))
    assert found is not None
    return found.low, found.high


def stretched(table: Tensor) -> Interval:
    means = table.mean(1, keepdim=True)
    return now(table + (math.sqrt(len(table) / (len(table) - 1)) - 1) * (means - means.mean()))


def bca(table: Tensor) -> Interval:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few seeds it says that it is degenerate
        found = stats.bootstrap((table.mean(1).numpy(),), lambda x, axis: x.mean(axis), n_resamples=999, rng=0)
    return tuple(found.confidence_interval)


INTERVALS: dict[str, Callable[[Tensor], Interval]] = {
    "now": now,
    "stretched": stretched,
    "bca": bca,
    "t": student,
    "anova": anova,
}


def covered(variance: Tensor, seeds: int, tries: int) -> dict[str, tuple[float, float]]:
    """Interval -> the share that holds the truth, and its mean width over that of the one with known variances."""
    shape = torch.tensor([seeds, PROMPTS, seeds * PROMPTS])
    known = 2 * 1.96 * float((variance / shape).sum().sqrt())
    tables = [made(variance, seeds, number) for number in range(tries)]
    found = {name: torch.tensor([interval(table) for table in tables]) for name, interval in INTERVALS.items()}
    return {
        name: (float(((x[:, 0] <= 0) & (x[:, 1] >= 0)).double().mean()), float((x[:, 1] - x[:, 0]).nanmean()) / known)
        for name, x in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--tries", type=int, default=2000, help="data sets for each line")
    args = parser.parse_args()
    shown = torch.stack([variances(table) for table in differences(results.read(args.results))])
    middle = shown.median(0).values
    print(f"{len(shown)} differences of {SCORE}; median variance of seeds, prompts, rest: {middle.tolist()}")
    print("share of intervals that hold the truth (their width over that with known variances)")
    for share in QUANTILES:
        variance = torch.stack([middle[2] * (shown[:, 0] / shown[:, 2]).quantile(share), *middle[1:]])
        for seeds in SEEDS:
            found = covered(variance, seeds, args.tries)
            told = ", ".join(f"{name} {held:.1%} ({width:.2f})" for name, (held, width) in found.items())
            print(f"quantile {share}, seeds' SD {float(variance[0].sqrt()):.4f}, {seeds} seeds: {told}", flush=True)


if __name__ == "__main__":
    main()
