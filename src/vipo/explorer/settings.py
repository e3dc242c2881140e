"""What can be chosen of a map, what of it changed, and the recipe lines that say the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import yaml

from vipo.backbones import BACKBONES
from vipo.errors import UserError
from vipo.options import Aggregation, MapOptions, Normalization, Orientation, Scope
from vipo.recipe import parse_section
from vipo.schema import StructuringSection, keys_of

CHOICES: Mapping[str, tuple[str, ...]] = {
    "aggregation": get_args(Aggregation),
    "orientation": get_args(Orientation),
    "normalization": get_args(Normalization),
    "scope": get_args(Scope),
}
"""The names that an option takes, in the order of ``vipo.options``."""

Chosen = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a file is looked at.

    Args:
        temporal_stride: pixel frames per latent frame of a causal video VAE; 1 shows a map for each frame.
    """

    structuring: StructuringSection
    temporal_stride: int = 1


def settings_of(chosen: Chosen, temporal_stride: int = 1) -> Settings:
    """Checked settings from names and numbers of the ``structuring`` section.

    Raises:
        UserError: one of them is not taken.
    """
    if temporal_stride < 1:
        raise UserError(f"maps: temporal_stride={temporal_stride} must be 1 or more")
    return Settings(parse_section(StructuringSection, dict(chosen), source="maps"), temporal_stride)


def option(key: str, typed: str) -> dict[str, int | str]:
    """One of a backbone's own options as it is typed, digits as a number; nothing where nothing is."""
    typed = typed.strip()
    return {} if not typed else {key: int(typed) if typed.isdecimal() else typed}


def backbones(own: str) -> dict[str, str]:
    """Those that can be chosen, by name, with what they are.

    A file's code is run only if its name was given on the command line, as ``own``.
    """
    listed = {name: f"{name}: {entry.summary}" for name, entry in BACKBONES.items()}
    return listed if own in listed else {own: own, **listed}


def meaning(key: str) -> str:
    """What an option of the ``structuring`` section is, as ``vipo list keys`` says it."""
    return keys_of(StructuringSection)[key].description or ""


def chosen_of(section: StructuringSection) -> dict[str, Any]:
    """The keys that say how a backbone's features become a map, with their values."""
    named = {"backbone": section.backbone, "backbone_options": dict(section.backbone_options)}
    return {**named, **{entry.name: getattr(section, entry.name) for entry in fields(MapOptions)}}


def recipe_lines(section: StructuringSection) -> str:
    """The section as a recipe has it: every choice is there, so that it holds whatever the defaults become."""
    chosen = {key: value for key, value in chosen_of(section).items() if value != {}}
    return yaml.safe_dump({"structuring": {"sources": ["perceptual"], **chosen}}, sort_keys=False)


def changed(before: Settings, after: Settings) -> list[str]:
    """What differs, a setting each: "components: 3 → 1"."""
    old, new = ({**chosen_of(one.structuring), "temporal_stride": one.temporal_stride} for one in (before, after))
    return [f"{key}: {_shown(old[key])} → {_shown(new[key])}" for key in new if old[key] != new[key]]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={one}" for key, one in value.items()) or "none"
    return str(value)
