"""What an iteration's samples, scores, maps and weights come to in numbers; reproducible bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vipo import objective, structuring
from vipo.training.credit import flat_groups
from vipo.types import Scores

MOVED, SIZE = "moved", "size"


def reward_numbers(scores: Scores, advantage: Tensor, group_size: int) -> dict[str, Tensor]:
    """Per reward its mean, its spread within the groups and what went unscored; of all, what they come to."""
    numbers: dict[str, Tensor] = {}
    for name, values in scores.by_name.items():
        numbers[f"reward/{name}"] = _mean(values)
        numbers[f"spread/{name}"] = objective.spread(values, group_size)
        numbers[f"unscored/{name}"] = values.isnan().float().mean()
        if len(scores.by_name) > 1:  # normalised in its groups: how far this reward pulls where the sum goes
            own = objective.group_advantage(values, group_size)
            numbers[f"agreement/{name}"] = torch.cosine_similarity(own.float(), advantage.float(), dim=0)
    numbers["reward"] = _mean(scores.total)
    numbers["flat_groups"] = flat_groups(advantage, group_size)
    numbers["advantage_size"] = advantage.abs().mean()
    return numbers


def _mean(values: Tensor) -> Tensor:
    """Over the samples with a score; scores near the largest float32 have a sum that is none."""
    mean = values.nanmean()
    return mean.where(~mean.isinf(), values.double().nanmean().to(values.dtype))


def map_metrics(maps: Tensor | None, *, signed: bool = False) -> dict[str, float]:
    """Mean of M (it scales the learning rate), the share of its mass in the heaviest quarter, and a clip's flicker.

    Of a ``signed`` map these are of its size, and there is the share of positions where it is below 0; NaN counts as 0.
    """
    if maps is None:
        return {}
    if signed:
        known = maps.nan_to_num(0.0)
        return {**map_metrics(known.abs()), "map/negative": float((known < 0).float().mean())}
    flat = maps.flatten(1)
    top = flat.topk(max(1, flat.shape[1] // 4), 1).values.sum(1) / flat.sum(1).clamp_min(1e-12)
    numbers = {"map/mean": flat.mean(), "map/top_quarter_mass": top.mean()}
    if maps.shape[1] > 1:
        numbers["map/flicker"] = structuring.flicker(maps).mean()
    return as_floats(numbers)


def change_of(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Two copies of some weights to the squares of their change and of their size, which processes can add up."""
    return {MOVED: (after - before).square().sum(), SIZE: before.square().sum()}


def evidence_metrics(scores: Scores) -> dict[str, float]:
    """Of each reward that was asked for evidence: its mean size, how much of it is blame, and the share without any."""
    numbers: dict[str, Tensor] = {}
    for name, found in scores.evidence.items():
        missing, known = found.isnan().flatten(1).any(1), found.nan_to_num(0.0)
        numbers[f"evidence/{name}"] = known.abs().mean()
        numbers[f"blame/{name}"] = known.clamp_max(0).abs().sum() / known.abs().sum().clamp_min(1e-12)
        numbers[f"unlocated/{name}"] = missing.float().mean()
    return as_floats(numbers) if numbers else {}


def as_floats(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """One wait for the accelerator, not one per number."""
    return dict(zip(numbers, torch.stack([value.float() for value in numbers.values()]).tolist(), strict=True))
