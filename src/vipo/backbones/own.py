"""A backbone of the user's own, whose answers are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.types import FeatureMap
from vipo.user_answer import checked
from vipo.user_file import BACKBONE, answering


class OwnBackbone(torch.nn.Module):
    """``file.py:thing`` as a backbone. If it is a network, that one is frozen and goes where this one is put."""

    def __init__(self, name: str, backbone: Callable[..., Any]) -> None:
        super().__init__()
        self.name, self.backbone = name, backbone
        self.requires_grad_(False).eval()

    def forward(self, images: Float[Tensor, "B 3 Y X"]) -> FeatureMap:
        """Raises:
        UserError: it raised, or gave no finite features for each picture.
        """
        with answering(BACKBONE, self.name):
            seen = self.backbone(images)
        if not isinstance(seen, FeatureMap):
            raise UserError(
                f"backbone {self.name!r} returned a {type(seen).__name__}; return vipo.types.FeatureMap(features,"
                " stride), features (B, D, h, w) and the side of a cell in pixels"
            )
        checked(BACKBONE, self.name, seen.features, [(len(images), None, None, None)], "(B, D, h, w)")
        return seen
