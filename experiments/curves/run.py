"""Small runs that are ill, one or more guards firing in each, and the pictures of docs/curves.md. Minutes on a CPU.

    python experiments/curves/run.py --runs runs/curves --out docs/images/curves

A run that is there already is drawn again and not made again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from draw import FIGURES, draw

from vipo.guards import fired
from vipo.recipe import load_recipe
from vipo.report.run import RunRecord, read_run
from vipo.runs.run import Run

REWARDS = Path(__file__).with_name("rewards.py")
SMALL = [
    "credit=sample",
    "training.precision=no",
    "prompts.per_iteration=2",
    "prompts.group_size=6",
    "solver.steps=4",
    "solver.window={size: 2, starts: 1}",
    "training.checkpoint_every=100",
    "evaluation.limit=8",
    "evaluation.samples_per_prompt=1",
    "judges=[]",
]
RUNS: dict[str, list[str]] = {
    "hacked": [
        "rewards={redness: 1.0}",
        "judges=[emoji_judge]",
        "optimizer.learning_rate=2e-2",
        "training.iterations=16",
        "evaluation.every=4",
    ],
    "hasty": [
        "rewards={redness: 1.0}",
        "optimizer.learning_rate=1e-2",
        "optimizer.per_iteration=4",
        "optimizer.guard_factor=2",
        "objective.clip_range=0.001",
        "training.iterations=8",
    ],
    "noisy": [
        "rewards={redness: 1.0}",
        "training.precision=bf16",
        "training.replay_batch_size=5",
        "objective.clip_range=1e-5",
        "training.iterations=6",
    ],
    "coarse": [f"rewards={{{REWARDS}:coarse: 1.0}}", "prompts.per_iteration=4", "training.iterations=8"],
    "glaring": [
        f"rewards={{{REWARDS}:glaring: 1.0}}",
        "optimizer.learning_rate=2e-2",
        "training.iterations=16",
    ],
    "leaping": [
        "rewards={redness: 1.0}",
        "objective.reduce=sum",
        "objective.kl_weight=1e-6",
        "objective.clip_range=1.0",
        "optimizer.learning_rate=5e-2",
        "optimizer.per_iteration=4",
        "training.iterations=8",
    ],
    "still": ["rewards={redness: 1.0}", "optimizer.learning_rate=1e-12", "training.iterations=6"],
}


def made(name: str, folder: Path) -> RunRecord:
    """The run of that name, made if it is not there or not complete."""
    recipe = load_recipe("quickstart", [*SMALL, *RUNS[name], f"name={name}"])
    known = read_run(folder) if (folder / "recipe.yaml").is_file() else None
    if known is None or known.iterations_done < recipe.training.iterations:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in Run(recipe, folder):
            pass
    return read_run(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/curves"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/curves"))
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        run = made(name, given.runs / name)
        said = {one.name: one.when for one in fired(run.events)}
        sys.stdout.write(f"{name}: {said}\n")
        for guard, figure in FIGURES.items():
            if figure.run == name:
                draw(run, guard, figure, given.out / f"{guard}.png")


if __name__ == "__main__":
    main()
