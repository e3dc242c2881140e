"""What an iteration costs, and what the allocation map adds to it: ViPO and scalar GRPO in turn, in one process.

    python benchmarks/iteration.py --iterations 6 --threads 2

Prints the median seconds of each phase for both credits, the ratio of whole iterations, and the share of an iteration
that is not the model's own passes (rollout and update).
"""

from __future__ import annotations

import argparse
import statistics

import torch

from vipo.assemble import Session, build
from vipo.recipe import load_recipe

PHASES = ("rollout", "reward", "map", "update")


def session(recipe: str, credit: str, overrides: list[str]) -> Session:
    return build(load_recipe(recipe, [f"credit={credit}", *overrides]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--iterations", type=int, default=6, help="counted iterations of each, after one warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="key=value, for both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sessions = {credit: session(args.recipe, credit, args.overrides) for credit in ("sample", "advantage_map")}
    seconds: dict[str, list[dict[str, float]]] = {credit: [] for credit in sessions}
    for iteration in range(args.iterations + 1):
        for credit, built in sessions.items():
            step = built.trainer.step()
            if iteration:
                seconds[credit].append(dict(step.seconds))
    totals = {}
    print(f"{'credit':15}" + "".join(f"{phase:>10}" for phase in PHASES) + f"{'total':>10}  not the model's own")
    for credit, rows in seconds.items():
        medians = {phase: statistics.median(row[phase] for row in rows) for phase in PHASES}
        totals[credit] = statistics.median(sum(row.values()) for row in rows)
        extra = (medians["reward"] + medians["map"]) / totals[credit]
        print(f"{credit:15}" + "".join(f"{medians[p]:10.3f}" for p in PHASES) + f"{totals[credit]:10.3f}  {extra:.1%}")
    ratios = [
        sum(ours.values()) / sum(theirs.values())
        for ours, theirs in zip(seconds["advantage_map"], seconds["sample"], strict=True)
    ]
    print(
        f"advantage_map / sample, pair by pair: median {statistics.median(ratios):.3f},"
        f" {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
