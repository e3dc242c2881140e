"""Shipped recipes at a size that a test can train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import tiny_sd3
import tiny_wan
from vipo.recipe import parse_recipe
from vipo.schema import Recipe


def toy_model(name: str, folder: Path, flux: Path) -> dict[str, Any]:
    """A pipeline of random weights with the classes that the generator ``name`` reads, and the size of its media."""
    if name == "wan":
        height, width = tiny_wan.SIZES["2.1"]
        return {
            "path": str(tiny_wan.save_pipeline(folder)),
            "height": height,
            "width": width,
            "frames": tiny_wan.FRAMES,
        }
    path = tiny_sd3.save_pipeline(folder, flux) if name == "sd3" else flux
    return {"path": str(path), "height": tiny.HEIGHT, "width": tiny.WIDTH}


GROUP = 4
CHEAP = ("redness", "brightness")  # instead of the recipe's rewards, under their names


def at_toy_size(recipe: Recipe, generator: Mapping[str, Any], prompts: Path) -> Recipe:
    """The recipe with a toy model, one small group, rewards and a backbone without downloads; the rest is its own."""
    prompts.write_text("\n".join(tiny.PROMPTS) + "\n")
    raw = recipe.model_dump(mode="json")
    raw["generator"] |= generator
    raw["prompts"] |= {"file": str(prompts), "per_iteration": 1, "group_size": GROUP}
    raw["evaluation"]["prompts"] = str(prompts)
    for section, name in zip(raw["rewards"].values(), CHEAP, strict=False):
        section |= {"reward": name, "options": {}}
    raw["judges"] = {}
    raw["structuring"] |= {"backbone": "efficientnet_lite", "backbone_options": {}}
    raw["training"] |= {"iterations": 2, "rollout_batch_size": GROUP, "replay_batch_size": GROUP}
    return parse_recipe(raw)
