"""Train one arm with one seed and write what became of it: one JSON file, whole or not at all.

    python experiments/claims/arm.py vipo 0 vipo-0.json

Arms of one seed share prompts, starting noise, step noise and LoRA initialisation, so their differences are paired.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from matrix import ARMS, SETTING, Arm
from vipo.assemble import Session, build
from vipo.errors import RunFailed
from vipo.evaluation.evaluator import Sampler, scored
from vipo.evaluation.records import Scored
from vipo.files import write_text, written_whole
from vipo.media.sheets import save_sheet
from vipo.recipe import load_recipe
from vipo.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
KEPT = ("reward", "clipped_fraction", "approx_kl", "grad_norm", "skipped", "flat_groups")
KEPT += ("map/mean", "map/top_quarter_mass")
SHEET_PICTURES = 32


def recipe_of(arm: Arm, seed: int, iterations: int, prompts: int, more: Sequence[str] = ()) -> Recipe:
    fixed = [f"seed={seed}", f"training.iterations={iterations}", f"evaluation.limit={prompts}"]
    return load_recipe(ROOT / "recipes" / arm.recipe, [*arm.overrides, *fixed, *more])


def evaluated(session: Session) -> Scored:
    """Everything at once: the arms' own measures look at all pictures."""
    samples_per_prompt = session.recipe.evaluation.samples_per_prompt
    sampler = Sampler(session.generator, session.model.solver, samples_per_prompt, batch_size=64)
    return scored(sampler, session.evaluation_scorer, session.evaluation_prompts)


def per_prompt(values: Tensor, samples_per_prompt: int) -> list[float]:
    """Mean over the pictures of each prompt, short enough to keep in a repository."""
    return [round(v, 5) for v in values.double().unflatten(0, (-1, samples_per_prompt)).nanmean(1).tolist()]


def numbers(arm: Arm, now: Scored, untrained: Scored | None) -> dict[str, list[float]]:
    """Every score per prompt, and the arm's own measures."""
    found = {name: per_prompt(values, now.samples_per_prompt) for name, values in now.scores.items()}
    return found if arm.measures is None or untrained is None else {**found, **arm.measures(untrained, now)}


def train(name: str, seed: int, iterations: int, every: int, prompts: int, folder: Path | None) -> dict[str, Any]:
    """Evaluations by iteration, training numbers of each iteration, seconds of training."""
    arm = ARMS[name]
    session = build(recipe_of(arm, seed, max(iterations, 1), prompts))
    needs_start = arm.measures is not None or not arm.trained
    untrained = evaluated(session) if needs_start else None
    evaluations = {"0": numbers(arm, untrained, untrained)} if untrained is not None else {}
    steps: dict[str, list[float]] = {}
    seconds = 0.0
    for done in range(1, iterations + 1 if arm.trained else 1):
        begin = time.perf_counter()
        step = session.trainer.step(last=done == iterations)
        if step.failure:
            raise RunFailed(step.failure)
        seconds += time.perf_counter() - begin
        for key in KEPT:
            if key in step.metrics:
                steps.setdefault(key, []).append(float(f"{step.metrics[key]:.5g}"))
        if done % (arm.every or every) == 0 or done == iterations:
            now = evaluated(session)
            evaluations[str(done)] = numbers(arm, now, untrained)
            keep_pictures(folder, f"{name}-{seed}-{done:03d}.png", now)
            keep_weights(folder, f"{name}-{seed}-{done:03d}.safetensors", session)
            tell(name, seed, done, evaluations[str(done)], seconds)
    if untrained is not None:
        keep_pictures(folder, f"{name}-{seed}-000.png", untrained)
    keep_weights(folder, f"{name}-{seed}.safetensors", session)
    return {
        "arm": name,
        "seed": seed,
        "iterations": iterations if arm.trained else 0,
        "recipe": arm.recipe,
        "overrides": list(arm.overrides),
        "evaluations": evaluations,
        "training": steps,
        "seconds": round(seconds, 1),
    }


def tell(name: str, seed: int, done: int, evaluation: dict[str, list[float]], seconds: float) -> None:
    means = {key: round(float(torch.tensor(values).nanmean()), 4) for key, values in evaluation.items()}
    print(f"{name} seed {seed}: iteration {done}, {seconds:.0f} s, {means}", flush=True)


def keep_weights(folder: Path | None, file: str, session: Session) -> None:
    """What was learned so far, so that another judge can be asked later."""
    if folder is not None:
        with written_whole(folder / file) as aside:
            save_file(session.policy.state(), aside)


def keep_pictures(folder: Path | None, file: str, evaluation: Scored) -> None:
    """The first picture of each prompt."""
    if folder is None:
        return
    chosen = list(range(0, len(evaluation.prompts), evaluation.samples_per_prompt))[:SHEET_PICTURES]
    save_sheet(folder / file, evaluation.media[chosen], [evaluation.prompts[i].text for i in chosen], {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=list(ARMS))
    parser.add_argument("seed", type=int)
    parser.add_argument("result", type=Path)
    parser.add_argument("--iterations", type=int, default=SETTING.iterations)
    parser.add_argument("--every", type=int, default=SETTING.every, help="iterations between evaluations")
    parser.add_argument("--prompts", type=int, default=SETTING.prompts, help="evaluation prompts")
    parser.add_argument("--pictures", type=Path, help="folder for the weights and for a sheet at each evaluation")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = train(args.arm, args.seed, args.iterations, args.every, args.prompts, args.pictures)
    write_text(args.result, json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
