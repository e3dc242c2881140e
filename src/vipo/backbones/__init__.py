"""Frozen vision networks: pictures in [0, 1] to a grid of features, by name.

A new backbone is one file, one line here and one test. Factories import their file only when called, so that listing
the names costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vipo.types import Backbone, UserError


def _efficientnet_lite(**options: Any) -> Backbone:
    from vipo.backbones.efficientnet_lite import EfficientNetLite

    return EfficientNetLite(**options)


def _dinov2(**options: Any) -> Backbone:
    from vipo.backbones.dinov2 import DinoV2

    return DinoV2(**options)


def _resnet(**options: Any) -> Backbone:
    from vipo.backbones.resnet import ResNet

    return ResNet(**options)


def _sam(**options: Any) -> Backbone:
    from vipo.backbones.sam import Sam

    return Sam(**options)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "efficientnet_lite": _efficientnet_lite,
    "dinov2": _dinov2,
    "resnet": _resnet,
    "sam": _sam,
}
"""Name -> factory, which takes the options of the class in the file of that name."""


@dataclass(frozen=True)
class BackboneNotes:
    """What a list of backbones shows. ``weights`` says where the weights come from."""

    summary: str
    weights: str
    licence: str


NOTES: dict[str, BackboneNotes] = {
    "efficientnet_lite": BackboneNotes("EfficientNet-Lite0, ImageNet; for CPU", "installed with vipo", "Apache-2.0"),
    "dinov2": BackboneNotes("DINOv2 ViT, with or without registers; stride 14", "hub id or folder", "Apache-2.0"),
    "resnet": BackboneNotes("ResNet-50 and its family; stride 16 or 32", "hub id or folder", "Apache-2.0"),
    "sam": BackboneNotes("Segment Anything's image encoder; stride 16", "hub id or folder", "Apache-2.0"),
}


def build(name: str, **options: Any) -> Backbone:
    """The backbone ``name`` with its options.

    Raises:
        UserError: no backbone of that name, an option it does not have, or weights that cannot be found.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UserError(f"there is no backbone {name!r}; choose from {', '.join(BACKBONES)}.{hint}")
    try:
        return BACKBONES[name](**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"backbone {name!r} refused its options {options}: {error}") from error
