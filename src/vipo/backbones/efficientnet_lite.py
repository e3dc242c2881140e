"""EfficientNet-Lite0, the backbone that ships; its network is :mod:`vipo.vision.efficientnet_lite`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.types import FeatureMap
from vipo.vision.efficientnet_lite import LAST_BLOCK, SIDE_MULTIPLE, FoldedTrunk, load_unfolded, to_input
from vipo.vision.frozen import freeze
from vipo.vision.preprocess import check_images, check_resolution, fitted_size, in_batches, resize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LARGEST = 320
"""Long side in px that pictures are brought to at most, unless told otherwise."""


class EfficientNetLite:
    """EfficientNet-Lite0 up to one stride.

    On composed 64-px scenes with known masks, allocation maps separate objects from ground with an area under the curve
    of 0.99 at stride 8 and 96 px (2 ms a picture on one CPU thread) and 0.98 at stride 16 and 128 px (4 ms).

    Args:
        stride: side of a feature cell in input pixels: 2, 4, 8, 16 or 32.
        resolution: long side of the network's input in px (the other follows, both rounded to 32). None takes twice
            the picture's own, at most 320: small pictures need magnifying, large ones cost time.
        batch_size: pictures per forward pass; on CPU 16 stays in cache and is faster than more.
        dtype: "float32" or "bfloat16" for the convolutions. bfloat16 halves the time where the processor has it and
            moves features by about 4 %; the result is float32 either way.
    """

    def __init__(
        self, *, stride: int = 16, resolution: int | None = None, batch_size: int = 16, dtype: str = "float32"
    ) -> None:
        if stride not in LAST_BLOCK:
            raise UserError(f"efficientnet_lite has no stride {stride}; choose from {', '.join(map(str, LAST_BLOCK))}")
        if dtype not in DTYPES:
            raise UserError(f"efficientnet_lite has no dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        check_resolution(resolution, SIDE_MULTIPLE)
        self.stride, self.resolution, self.batch_size, self.dtype = stride, resolution, batch_size, DTYPES[dtype]
        self.network = freeze(FoldedTrunk(load_unfolded(), stride)).to(self.dtype)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 Y X"]) -> FeatureMap:
        """Pictures in [0, 1] to 16, 24, 40, 112 or 320 features per cell."""
        check_images(images)
        resolution = self.resolution or min(2 * max(images.shape[-2:]), LARGEST)
        images = resize(images, fitted_size(images, resolution, SIDE_MULTIPLE))
        network = self.network.to(images.device)
        features = in_batches(lambda part: network(to_input(part).to(self.dtype)), images, self.batch_size)
        return FeatureMap(features, self.stride)
