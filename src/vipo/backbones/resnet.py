"""ResNet (arXiv 1512.03385), ImageNet weights, through transformers: the control for self-supervised backbones."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.types import FeatureMap
from vipo.vision.frozen import load_frozen
from vipo.vision.preprocess import check_images, check_resolution, fitted_size, in_batches, normalise, resize

CLASSES = {"resnet": "ResNetModel"}

SIDE_MULTIPLE = 32
"""Input sides are multiples of the deepest stride, so that no border cell sees padding alone."""


class ResNet:
    """One stage of a ResNet.

    Args:
        pretrained: hub id (microsoft/resnet-50, ...) or local folder.
        resolution: long side of the network's input in px; both sides are rounded to 32. None keeps the size.
        layer: 1 to 4, the stage: strides 4, 8, 16 and 32. The default 3 has 1024 channels in ResNet-50.
        batch_size: pictures per forward pass.
        dtype: of the network; the features are float32.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "microsoft/resnet-50",
        resolution: int | None = 512,
        layer: int = 3,
        batch_size: int = 16,
        dtype: str = "float32",
    ) -> None:
        self.network = load_frozen("backbone 'resnet'", pretrained, CLASSES, dtype=dtype)
        stages = len(self.network.config.depths)
        check_resolution(resolution, SIDE_MULTIPLE)
        if not 1 <= layer <= stages:
            raise ValueError(f"layer={layer}: this network has stages 1 to {stages}")
        first = 2 if self.network.config.downsample_in_first_stage else 1
        self.stride = 4 * first * 2 ** (layer - 1)
        self.resolution, self.layer, self.batch_size = resolution, layer, batch_size

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 Y X"]) -> FeatureMap:
        """Pictures in [0, 1] to the chosen stage's activations."""
        check_images(images)
        self.network.to(images.device)
        images = resize(images, fitted_size(images, self.resolution, max(SIDE_MULTIPLE, self.stride)))
        images = normalise(images).to(self.network.dtype)
        return FeatureMap(in_batches(self._stage, images, self.batch_size), self.stride)

    def _stage(self, images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B D h w"]:
        stage: Tensor = self.network(images, output_hidden_states=True).hidden_states[self.layer]
        return stage
