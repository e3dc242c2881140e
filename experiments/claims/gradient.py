"""Why a map helps or not: how clearly one iteration's gradient points where the reward is known to rise.

    cd runs/claims; python ../../experiments/claims/gradient.py --out gradient.json \\
        --directions sample-rate-1e-3-0.safetensors vipo-rate-1e-3-0.safetensors

Training moved the weights by some vectors along which the reward rose; r is the unit vector of their mean. For one
iteration's samples i, positions p and advantages A_i, an estimator with the weights w_i(p) sees the slope

    s = mean over i, p of  w_i(p) d log pi_i(p) / dr,        w = A for scalar GRPO, M(p) A for ViPO,

and its signal-to-noise ratio is mean(s) / std(s) over independent iterations: a twice as high one is worth four times
as many pictures. log pi is linear in so small a step, so d / dr is a central difference of two replays in float32, and
one pair of replays serves any number of maps. "Own noises" are groups of the same prompts whose samples start from a
noise each; maps "of each step" compare the clean latents that are predicted after it, not those of the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from arm import recipe_of
from matrix import ARMS
from vipo import objective, sde
from vipo.assemble import Session, build
from vipo.backbones.efficientnet_lite import EfficientNetLite
from vipo.files import write_text
from vipo.rollout import replay, sample_groups
from vipo.structuring import (
    PerceptualStructuring,
    allocation_map,
    consensus_map,
    deviation_map,
    normalise,
    signed_consensus_map,
    sources,
)
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
PATCH = 2  # cells to a side, for a consensus over patches
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


def in_patches(latents: Tensor) -> Tensor:
    """(N, C, T, H, W) with the cells of a patch as channels."""
    frames = F.pixel_unshuffle(latents.transpose(1, 2), PATCH)  # (N, T, C PATCH^2, H / PATCH, W / PATCH)
    return frames.transpose(1, 2)


def consensuses(rollout: Rollout, advantage: Tensor) -> dict[str, Tensor]:
    """The map as it ships, and with one thing changed at a time."""
    agreed = partial(consensus_map, advantage=advantage, group_size=rollout.group_size)
    patches = agreed(in_patches(rollout.latents), smoothing_sigma=0)
    return {
        "consensus": agreed(rollout.latents),
        "consensus, sigma 0": agreed(rollout.latents, smoothing_sigma=0),
        "consensus, sigma 2": agreed(rollout.latents, smoothing_sigma=2.0),
        "consensus, floor 0.3": agreed(rollout.latents, floor=0.3),
        f"consensus, patches of {PATCH} x {PATCH}": F.interpolate(patches, scale_factor=PATCH, mode="nearest"),
    }


def of_each_step(session: Session, rollout: Rollout, advantage: Tensor) -> dict[str, Tensor]:
    """Maps of every recorded row, (R, T, H, W), from the clean latents that are predicted where its step arrives.

    Raises:
        ValueError: a step was recorded of some samples alone, which cannot be compared.
    """
    rows, group = rollout.transitions, rollout.group_size
    found = {f"{name}, of each step": torch.zeros_like(rows.log_prob) for name in ("deviation", "consensus")}
    for step in rows.step.unique().tolist():
        at = (rows.step == step).nonzero().squeeze(1)
        at = at[rows.sample[at].argsort()]
        if not torch.equal(rows.sample[at], torch.arange(len(advantage))):
            raise ValueError(f"step {step} was recorded of {len(at)} of {len(advantage)} samples")
        velocity = session.generator.velocity(rows.next_latents[at], rows.sigma_next[at], rollout.conditioning)
        clean = sde.clean_prediction(velocity, rows.next_latents[at], rows.sigma_next[at])
        found["deviation, of each step"][at] = deviation_map(clean, group)
        found["consensus, of each step"][at] = consensus_map(clean, advantage, group)
    return found


def all_maps(session: Session, rollout: Rollout, advantage: Tensor) -> dict[str, Tensor]:
    group, scorer, recipe = rollout.group_size, session.evaluation_scorer, session.recipe
    trained = {name: scorer.rewards[name] for name in recipe.rewards}
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
    found |= consensuses(rollout, advantage)
    found["consensus x ViPO"] = normalise(found["consensus"] * paper, "unit_mean")
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


def rolled_out(session: Session, iteration: int, *, same_noise: bool) -> tuple[Rollout, Tensor, Tensor]:
    """Samples, their reward and their advantage."""
    trainer, recipe = session.trainer, session.recipe
    group, solver = recipe.prompts.group_size, replace(trainer.solver, same_noise=same_noise)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = sample_groups(
            session.generator,
            trainer.prompts.groups(iteration),
            solver,
            group_size=group,
            seed=recipe.seed,
            iteration=iteration,
        )
    rewards = trainer.scorer(rollout.media, rollout.prompts).total
    return rollout, rewards, objective.group_advantage(rewards, group)


def one_iteration(session: Session, direction: Direction, iteration: int) -> dict[str, dict[str, float]]:
    """Each map's slope, agreement with the objects, and share of its mass in the heaviest quarter."""
    group, clip = session.recipe.prompts.group_size, session.recipe.objective.advantage_clip
    rollout, rewards, advantage = rolled_out(session, iteration, same_noise=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = all_maps(session, rollout, advantage)
        with torch.no_grad():
            of_steps = of_each_step(session, rollout, advantage)
    change, sample = slopes(session, rollout, direction), rollout.transitions.sample
    weights = {name: objective.spatial_advantage(advantage, m)[sample] for name, m in maps.items()}
    weights |= {name: objective.spatial_advantage(advantage[sample], m) for name, m in of_steps.items()}
    signed = signed_consensus_map(rollout.latents, advantage, group)
    weights["consensus, signed"] = objective.weighted(advantage, signed)[sample]
    paper = maps["ViPO (K = 3, variance, sigma 1)"]
    weights["reward map"] = objective.group_advantage(paper * rewards[:, None, None, None], group)[sample]
    found = {name: {"slope": slope(change, weight, clip)} for name, weight in weights.items()}
    found |= from_own_noises(session, direction, iteration)
    masks = objects(rollout)
    for name, m in maps.items():
        flat = m.flatten(1)
        top = flat.topk(flat.shape[1] // 4, 1).values.sum(1) / flat.sum(1)
        found[name] |= {"auc": area_under_curve(m, masks), "top_quarter": float(top.mean())}
    return found


def slope(change: Tensor, weight: Tensor, clip: float) -> float:
    return float((change * weight.clamp(-clip, clip)).mean())


def from_own_noises(session: Session, direction: Direction, iteration: int) -> dict[str, dict[str, float]]:
    """The slopes of scalar GRPO and of the maps that compare samples, where samples do not share their noise."""
    clip = session.recipe.objective.advantage_clip
    rollout, _, advantage = rolled_out(session, iteration, same_noise=False)
    change, sample = slopes(session, rollout, direction), rollout.transitions.sample
    maps = {
        "sample": torch.ones(len(advantage), *rollout.latent_grid),
        "deviation": deviation_map(rollout.latents, rollout.group_size),
        "consensus": consensus_map(rollout.latents, advantage, rollout.group_size),
    }
    weights = {name: objective.spatial_advantage(advantage, m)[sample] for name, m in maps.items()}
    return {f"own noises: {name}": {"slope": slope(change, weight, clip)} for name, weight in weights.items()}


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
