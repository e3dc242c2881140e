"""Frozen vision networks: pictures in [0, 1] to a grid of features, by name.

A new backbone is one file, one entry here and one test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vipo import registry

if TYPE_CHECKING:
    from vipo.types import Backbone


@dataclass(frozen=True)
class BackboneEntry(registry.Entry):
    """A backbone and what a list shows of it. ``weights`` says where the weights come from."""

    weights: str
    licence: str = "Apache-2.0"


BACKBONES: dict[str, BackboneEntry] = {
    "efficientnet_lite": BackboneEntry(
        "vipo.backbones.efficientnet_lite:EfficientNetLite",
        "EfficientNet-Lite0, ImageNet; for CPU",
        "installed with vipo",
    ),
    "dinov2": BackboneEntry(
        "vipo.backbones.dinov2:DinoV2", "DINOv2 ViT, with or without registers; stride 14", "hub id or folder"
    ),
    "resnet": BackboneEntry(
        "vipo.backbones.resnet:ResNet", "ResNet-50 and its family; stride 16 or 32", "hub id or folder"
    ),
    "sam": BackboneEntry("vipo.backbones.sam:Sam", "Segment Anything's image encoder; stride 16", "hub id or folder"),
}


def build(name: str, **options: Any) -> Backbone:
    """The backbone ``name`` with its options.

    Raises:
        UserError: no backbone of that name, an option it does not have, or weights that cannot be found.
    """
    backbone: Backbone = registry.build("backbone", BACKBONES, name, options)
    return backbone
