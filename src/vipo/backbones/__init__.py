"""Frozen vision networks: pictures in [0, 1] to a grid of features, by name.

A new backbone is one file, one entry here and one test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vipo import registry
from vipo.user_file import BACKBONE, is_user_file, load_part

if TYPE_CHECKING:
    from vipo.types import Backbone


@dataclass(frozen=True)
class BackboneEntry(registry.Entry):
    """A backbone and what a list shows of it.

    Args:
        weights: where they come from, for people.
        model: the hub id that its option ``pretrained`` is by default; None where nothing is downloaded.
    """

    weights: str
    licence: str = "Apache-2.0"
    model: str | None = None


BACKBONES: dict[str, BackboneEntry] = {
    "efficientnet_lite": BackboneEntry(
        "vipo.backbones.efficientnet_lite:EfficientNetLite",
        "EfficientNet-Lite0, ImageNet; for CPU",
        "installed with vipo",
    ),
    "dinov2": BackboneEntry(
        "vipo.backbones.dinov2:DinoV2",
        "DINOv2 ViT, with or without registers; stride 14",
        "hub id or folder",
        model="facebook/dinov2-base",
    ),
    "resnet": BackboneEntry(
        "vipo.backbones.resnet:ResNet",
        "ResNet-50 and its family; stride 16 or 32",
        "hub id or folder",
        model="microsoft/resnet-50",
    ),
    "sam": BackboneEntry(
        "vipo.backbones.sam:Sam",
        "Segment Anything's image encoder; stride 16",
        "hub id or folder",
        model="facebook/sam-vit-base",
    ),
}


def build(name: str, **options: Any) -> Backbone:
    """The backbone ``name``, or the user's own for ``path/to/file.py:thing``, with its options.

    Raises:
        UserError: no backbone of that name, an option it does not have, weights that cannot be found, or a file that
            does not give a backbone.
    """
    if is_user_file(name):
        from vipo.backbones.own import OwnBackbone  # torch

        return OwnBackbone(name, load_part(BACKBONE, name, **options))
    backbone: Backbone = registry.build("backbone", BACKBONES, name, options, otherwise=", or give file.py:thing")
    return backbone
