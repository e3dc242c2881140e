"""Why a map helps or not: how clearly one iteration's gradient points where the reward is known to rise.

    cd runs/claims; python ../../experiments/claims/gradient.py --out gradient.json \\
        --directions sample-rate-1e-3-0.safetensors vipo-rate-1e-3-0.safetensors

Training moved the weights by some vectors along which the reward rose; r is the unit vector of their mean. For one
iteration's samples i, positions p and advantages A_i, an estimator with the weights w_i(p) sees the slope

    s = mean over i, p of  w_i(p) d log pi_i(p) / dr,        w = A for scalar GRPO, M(p) A for ViPO,

and its signal-to-noise ratio is mean(s) / std(s) over independent iterations: a twice as high one is worth four times
as many pictures. log pi is linear in so small a step, so d / dr is a central difference of two replays in float32, and
one pair of replays serves any number of maps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from arm import recipe_of
from matrix import ARMS
from vipo import objective
from vipo.assemble import Session, build
from vipo.backbones.efficientnet_lite import EfficientNetLite
from vipo.files import write_text
from vipo.rollout import replay, sample_groups
from vipo.structuring import PerceptualStructuring, allocation_map, normalise, sources
from vipo.training.credit import combined
from vipo.types import Rollout

FIRST_ITERATION = 1000  # no arm ever trained on the prompts and noises from here on
STEP = 0.3  # length of the finite difference; 0.03 to 1 give the same slope to 1 %
FLAT = 0.15  # distance from the ground's colour, in RGB, from which a pixel belongs to an object
OPTIONS: dict[str, dict[str, Any]] = {
    "ViPO (K = 3, variance, sigma 1)": {},
    "K = 1": {"components": 1},
    "K = 2": {"components": 2},
    "K = 5": {"components": 5},
    "K = 8": {"components": 8},
    "average": {"aggregation": "average"},
    "first": {"aggregation": "first"},
    "sigma 0": {"smoothing_sigma": 0.0},
    "sigma 0.5": {"smoothing_sigma": 0.5},
    "sigma 2": {"smoothing_sigma": 2.0},
    "minmax": {"normalization": "minmax"},
    "border": {"orientation": "border"},
    "border_distance": {"orientation": "border_distance"},
    "skewness": {"orientation": "skewness"},
    "energy": {"orientation": "energy"},
    "release": {"orientation": "release"},
}
STRIDES = {"stride 16": (16, 128), "stride 32": (32, 224)}


def objects(rollout: Rollout) -> Tensor:
    """Share of each latent position that shows an object, (N, T, H, W): what is not of the border's median colour."""
    images = rollout.media[:, :, 0]
    rim = torch.cat([images[:, :, :2].flatten(2), images[:, :, -2:].flatten(2)], 2)
    rim = torch.cat([rim, images[..., :2].flatten(2), images[..., -2:].flatten(2)], 2)
    away = (images - rim.median(2).values[:, :, None, None]).norm(dim=1)
    return F.adaptive_avg_pool2d((away > FLAT).float()[:, None], rollout.latent_grid[1:])


def group_mean(maps: Tensor, group_size: int) -> Tensor:
    mean = maps.unflatten(0, (-1, group_size)).mean(1).repeat_interleave(group_size, 0)
    return normalise(mean, "unit_mean")


def shuffled(maps: Tensor) -> Tensor:
    order = torch.randperm(maps[0].numel(), generator=torch.Generator().manual_seed(0))
    return maps.flatten(1)[:, order].reshape(maps.shape)


def perceptual(rollout: Rollout) -> dict[str, Tensor]:
    """The paper's map with each option changed alone, and from other depths of the backbone."""
    pictures, grid = rollout.media[:, :, 0], rollout.latent_grid[1:]
    features = EfficientNetLite(stride=8, resolution=96)(pictures).features
    found = {name: allocation_map(features, grid, **options)[:, None] for name, options in OPTIONS.items()}
    for name, (stride, resolution) in STRIDES.items():
        source = PerceptualStructuring(EfficientNetLite(stride=stride, resolution=resolution))
        found[name] = source(rollout.media, rollout.latent_grid)
    return found


def all_maps(session: Session, rollout: Rollout) -> dict[str, Tensor]:
    group, scorer, recipe = rollout.group_size, session.evaluation_scorer, session.recipe
    trained = {name: scorer.rewards[name] for name in recipe.rewards}
    scores = session.trainer.scorer(rollout.media, rollout.prompts)
    advantage = combined(recipe.objective, scores, group)
    masks = objects(rollout)
    floor = 1e-3  # a picture without any object has a uniform mask
    found = {
        "sample (scalar GRPO)": torch.ones_like(masks),
        "oracle: the objects": normalise(masks + floor, "unit_mean"),
        "oracle: the group's objects": group_mean(masks + floor, group),
        "all but the objects": normalise(1 - masks + floor, "unit_mean"),
        **perceptual(rollout),
    }
    paper = found["ViPO (K = 3, variance, sigma 1)"]
    found["ViPO, positions shuffled"] = shuffled(paper)
    found["ViPO, mean over the group"] = group_mean(paper, group)
    gradient = sources.RewardGradient(trained, dict.fromkeys(trained, 1.0))(rollout, advantage)
    deviation = sources.Deviation()(rollout, advantage)
    found["reward gradient"] = gradient
    found["text relevance"] = sources.TextRelevance(session.generator)(rollout, advantage)
    found["disagreement"] = sources.Disagreement()(rollout, advantage)
    found["deviation"] = deviation
    found["consensus"] = sources.Consensus()(rollout, advantage)
    found["deviation, sigma 0"] = sources.Deviation(smoothing_sigma=0)(rollout, advantage)
    found["deviation, square root"] = normalise(deviation.sqrt(), "unit_mean")
    found["deviation x ViPO"] = normalise(deviation * paper, "unit_mean")
    found["reward gradient x ViPO"] = normalise(gradient * paper, "unit_mean")
    found["deviation x reward gradient"] = normalise(deviation * gradient, "unit_mean")
    return found


def area_under_curve(maps: Tensor, masks: Tensor) -> float:
    """Mean over pictures of the share of (object, ground) pairs of positions that a map ranks rightly."""
    areas = []
    for score, inside in zip(maps.flatten(1), masks.flatten(1) > 0.5, strict=True):
        if inside.any() and not inside.all():
            above, below = score[inside][:, None], score[~inside]
            areas.append(float((above > below).double().mean() + 0.5 * (above == below).double().mean()))
    return sum(areas) / len(areas)


class Direction:
    """The unit vector r in the space of the policy's weights."""

    def __init__(self, session: Session, files: list[Path]) -> None:
        self.weights = session.policy.parameters
        start = {name: value.detach().clone() for name, value in self.weights.items()}
        moved = [{name: load_file(file)[name] - start[name] for name in start} for file in files]
        unit = [_unit(move) for move in moved]
        self.unit = _unit({name: sum((u[name] for u in unit), torch.zeros_like(start[name])) for name in start})
        self.lengths = [_length(move) for move in moved]

    @contextmanager
    def at(self, distance: float) -> Iterator[None]:
        """Inside, the weights are moved along r."""
        kept = {name: value.detach().clone() for name, value in self.weights.items()}
        with torch.no_grad():
            for name, value in self.weights.items():
                value.add_(self.unit[name], alpha=distance)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self.weights.items():
                    value.copy_(kept[name])


def _length(move: dict[str, Tensor]) -> float:
    return float(sum(value.square().sum() for value in move.values()) ** 0.5)


def _unit(move: dict[str, Tensor]) -> dict[str, Tensor]:
    length = _length(move)
    return {name: value / length for name, value in move.items()}


@torch.no_grad()
def slopes(session: Session, rollout: Rollout, direction: Direction) -> Tensor:
    """d log pi / dr of every recorded step and position, (M, T, H, W)."""
    recorded, solver = rollout.transitions, session.model.solver
    found = torch.zeros_like(recorded.log_prob)
    for step in recorded.step.unique().tolist():
        at = (recorded.step == step).nonzero().squeeze(1)
        sides = []
        for sign in (1, -1):
            with direction.at(sign * STEP):
                sides.append(
                    replay(session.generator, rollout.conditioning, recorded.take(at), solver, reduce="mean")[0]
                )
        found[at] = (sides[0] - sides[1]) / (2 * STEP)
    return found


def one_iteration(session: Session, direction: Direction, iteration: int) -> dict[str, dict[str, float]]:
    """Each map's slope, agreement with the objects, and share of its mass in the heaviest quarter."""
    trainer, recipe = session.trainer, session.recipe
    group, clip = recipe.prompts.group_size, recipe.objective.advantage_clip
    with torch.autocast("cpu", torch.bfloat16):
        prompts = trainer.prompts.groups(iteration)
        rollout = sample_groups(
            session.generator, prompts, trainer.solver, group_size=group, seed=recipe.seed, iteration=iteration
        )
    rewards = trainer.scorer(rollout.media, rollout.prompts).total
    advantage = objective.group_advantage(rewards, group)
    with torch.autocast("cpu", torch.bfloat16):
        maps = all_maps(session, rollout)
    change, sample = slopes(session, rollout, direction), rollout.transitions.sample
    masks = objects(rollout)
    weights = {name: objective.spatial_advantage(advantage, m) for name, m in maps.items()}
    paper = maps["ViPO (K = 3, variance, sigma 1)"]
    weights["reward map"] = objective.group_advantage(paper * rewards[:, None, None, None], group)
    found = {
        name: {"slope": float((change * weight.clamp(-clip, clip)[sample]).mean())} for name, weight in weights.items()
    }
    for name, m in maps.items():
        flat = m.flatten(1)
        top = flat.topk(flat.shape[1] // 4, 1).values.sum(1) / flat.sum(1)
        found[name] |= {"auc": area_under_curve(m, masks), "top_quarter": float(top.mean())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directions", type=Path, nargs="+", required=True, help="weights that arms of seed 0 ended with"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = recipe_of(ARMS["vipo"], 0, 1, 1, ["prompts.group_size=16", "training.precision=no"])
    session = build(recipe)
    direction = Direction(session, args.directions)
    found: list[dict[str, dict[str, float]]] = []
    for number in range(args.iterations):
        found.append(one_iteration(session, direction, FIRST_ITERATION + number))
        if (number + 1) % 10 == 0 or number + 1 == args.iterations:
            write_text(args.out, json.dumps(collected(found, direction)) + "\n")
            print(f"{number + 1} of {args.iterations} iterations", flush=True)


def collected(found: list[dict[str, dict[str, float]]], direction: Direction) -> dict[str, Any]:
    def column(name: str, key: str, digits: Callable[[float], float]) -> list[float]:
        return [digits(row[name][key]) for row in found if key in row[name]]

    maps = {
        name: {
            "slope": column(name, "slope", lambda v: float(f"{v:.4g}")),
            "auc": mean_of(column(name, "auc", float)),
            "top_quarter": mean_of(column(name, "top_quarter", float)),
        }
        for name in found[0]
    }
    return {"lengths": direction.lengths, "iterations": len(found), "maps": maps}


def mean_of(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


if __name__ == "__main__":
    main()
