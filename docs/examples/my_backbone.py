"""A backbone of your own: what is seen of a picture is the mean colour and the contrast of each cell."""

import torch
import torch.nn.functional as F

from vipo.types import FeatureMap


class Colours:
    """Options are keyword arguments, given as structuring.backbone_options."""

    def __init__(self, *, cell: int = 8) -> None:
        self.cell = cell

    def __call__(self, images) -> FeatureMap:  # (B, 3, Y, X) in [0, 1] -> features (B, D, h, w)
        """Mean and spread of the three channels over cells of so many pixels."""
        mean = F.avg_pool2d(images, self.cell)
        spread = (F.avg_pool2d(images.square(), self.cell) - mean.square()).clamp_min(0).sqrt()
        return FeatureMap(torch.cat([mean, spread], 1), self.cell)
