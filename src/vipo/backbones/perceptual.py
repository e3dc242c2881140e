"""The paper's map from options alone: a backbone by name, and how its features become a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from vipo import backbones
from vipo.options import MapOptions
from vipo.structuring import PerceptualStructuring


def perceptual(
    backbone: str, backbone_options: Mapping[str, Any], how: MapOptions, *, temporal_stride: int, device: str
) -> PerceptualStructuring:
    """Media to maps, by the backbone of that name on ``device``.

    Raises:
        UserError: no backbone of that name, an option it does not have, or weights that cannot be found.
    """
    options: dict[str, Any] = {entry.name: getattr(how, entry.name) for entry in fields(MapOptions)}
    network = backbones.build(backbone, **backbone_options)
    if isinstance(network, torch.nn.Module):
        network.to(device)
    return PerceptualStructuring(network, temporal_stride=temporal_stride, **options)
