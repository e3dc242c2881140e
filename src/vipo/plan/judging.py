"""Rewards, judges and the backbone: how large they are, and what a pass of theirs takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vipo.options import needs_sources
from vipo.plan import passes
from vipo.plan.blueprint import empty_network, shapes_only
from vipo.plan.passes import Cost
from vipo.plan.published import table
from vipo.pretrained import DTYPES
from vipo.schema import Recipe
from vipo.user_file import is_user_file

PICTURES_AT_ONCE = 16  # what the rewards and backbones of vipo take by default
CLIP_SIDE = 224  # pixels
DINO_SIDE = 518  # pixels of the long side, the default of vipo.backbones.dinov2
EVERY_FRAME = ("dinov2", "hpsv2.1", "pickscore", "clipscore", "aesthetic")  # what looks at each frame of a clip
LIGHT = (  # under 25 MB, or in another process
    *("redness", "brightness", "jpeg_compressibility", "remote", "openai_judge", "efficientnet_lite"),
    *("emoji_match", "emoji_judge", "emoji_layout", "emoji_motion", "emoji_motion_judge"),
    *("emoji_clean", "emoji_count", "emoji_quality", "emoji_flaws"),
)


@dataclass(frozen=True)
class Judge:
    """A network that looks at pictures.

    Args:
        bytes: of its weights.
        working: bytes alive while it works, weights that wait elsewhere included.
        flops: for one sample.
        offload: its weights wait in the main memory.
        trains: it is asked in every iteration, not only in evaluations.
    """

    name: str
    bytes: int
    working: int
    flops: float
    offload: bool = False
    is_backbone: bool = False
    trains: bool = True


def judges_of(recipe: Recipe) -> tuple[list[Judge], list[str]]:
    """What a recipe loads to judge and to map, and the names of what is not known."""
    found: dict[tuple[str, str, bool], Judge] = {}
    unknown: list[str] = []
    for trains, sections in ((True, recipe.rewards), (False, recipe.judges)):
        for name, section in sections.items():
            kind = section.reward or name
            if kind in LIGHT:
                continue
            if kind not in table("judges"):
                unknown.append(f"reward {name}")
                continue
            judge = _judge(kind, section.options, recipe, trains)
            found.setdefault(
                (kind, str(section.options.get("dtype")), judge.offload), judge
            )  # one model, many questions
    unknown += _own_parts(recipe)
    if needs_sources(recipe.credit) and "perceptual" in recipe.structuring.sources:
        kind, options = recipe.structuring.backbone, recipe.structuring.backbone_options
        if kind in table("judges"):
            found["backbone", kind, False] = _judge(kind, options, recipe, True)
        elif kind not in LIGHT:
            unknown.append(f"backbone {kind}")
    return list(found.values()), unknown


def _own_parts(recipe: Recipe) -> list[str]:
    """The user's own sources, credit and loss, whose code a plan does not run."""
    sources = recipe.structuring.sources if needs_sources(recipe.credit) else ()
    named = [*(("map source", name) for name in sources), ("credit", recipe.credit), ("loss", recipe.objective.loss)]
    return [f"{what} {name}" for what, name in named if is_user_file(name)]


def _judge(kind: str, options: Mapping[str, Any], recipe: Recipe, trains: bool) -> Judge:
    entry = table("judges")[kind]
    part = _part(entry["part"], options)
    section = recipe.generator
    frames = section.frames if kind in EVERY_FRAME and options.get("frames") != "first" else 1
    at_once = min(int(options.get("batch_size", PICTURES_AT_ONCE)), section.frames * recipe.prompts.group_size)
    side = _dino_input(section.height, section.width, options) if kind == "dinov2" else (CLIP_SIDE, CLIP_SIDE)
    weights, cost = _measured(part, str(options.get("dtype", entry["dtype"])), at_once, side)
    offload = bool(options.get("offload", False))
    return Judge(
        name=kind,
        bytes=weights,
        working=cost.bytes + (weights if offload else 0),
        flops=cost.flops / at_once * frames,
        offload=offload,
        is_backbone=kind == "dinov2",
        trains=trains,
    )


def _part(default: str, options: Mapping[str, Any]) -> str:
    """The network that ``pretrained`` names, if it is a published one."""
    short = str(options.get("pretrained", "")).rpartition("/")[2]
    return short if short in table("parts") else default


def _dino_input(height: int, width: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of DINOv2's input: the long side at its resolution, both in whole patches of 14 px."""
    scale = int(options.get("resolution") or max(height, width)) / max(height, width)
    return max(14, round(height * scale / 14) * 14), max(14, round(width * scale / 14) * 14)


@cache
def _measured(part: str, dtype: str, batch: int, size: tuple[int, int]) -> tuple[int, Cost]:
    """Bytes of a network's weights, and what a pass over ``batch`` pictures takes."""
    with torch.device("meta"):
        network = empty_network(table("parts")[part], DTYPES[dtype])
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    with FakeTensorMode():
        shapes_only(network)
        images = torch.zeros(batch, 3, *size, dtype=DTYPES[dtype])
        forward = _forward(network, images)
        return weights, passes.run(network, forward) if forward else Cost(0, 0)


def _forward(network: Any, images: torch.Tensor) -> Callable[[], Any] | None:
    """How a network looks at pictures; None for language models, of which only the weights are counted."""
    if hasattr(network, "get_image_features") and isinstance(getattr(network, "vision_model", None), nn.Module):
        return lambda: network.vision_model(pixel_values=images)
    return (lambda: network(pixel_values=images)) if type(network).__name__.startswith("Dino") else None
