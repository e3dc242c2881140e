"""DINOv2 (arXiv 2304.07193), with or without register tokens (arXiv 2309.16588), through transformers.

The ViT's last hidden state is a class token, then the register tokens, then one token per 14-px patch in reading
order; only the patches are kept. Position embeddings are interpolated by the model, so any grid will do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.types import FeatureMap
from vipo.vision.frozen import load_frozen
from vipo.vision.preprocess import (
    check_images,
    check_resolution,
    fitted_size,
    in_batches,
    normalise,
    resize,
    tokens_to_grid,
)

CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


class DinoV2:
    """DINOv2's patch tokens.

    Args:
        pretrained: hub id (facebook/dinov2-base, facebook/dinov2-with-registers-large, ...) or local folder.
        resolution: long side of the network's input in px; both sides are rounded to the patch. None keeps the size.
        layer: None for the last layer after the final layer norm; i for hidden state i (0 is the embedding), raw.
        batch_size: pictures per forward pass.
        dtype: of the network; the features are float32.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "facebook/dinov2-base",
        resolution: int | None = 518,
        layer: int | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
    ) -> None:
        self.network = load_frozen("backbone 'dinov2'", pretrained, CLASSES, dtype=dtype)
        config = self.network.config
        self.stride: int = config.patch_size
        self.dropped: int = 1 + getattr(config, "num_register_tokens", 0)
        check_resolution(resolution, self.stride)
        if layer is not None and abs(layer) > config.num_hidden_layers:
            raise ValueError(f"layer={layer}: this network has hidden states 0 to {config.num_hidden_layers}")
        self.resolution, self.layer, self.batch_size = resolution, layer, batch_size

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 Y X"]) -> FeatureMap:
        """Pictures in [0, 1] to one token per patch."""
        check_images(images)
        self.network.to(images.device)
        height, width = fitted_size(images, self.resolution, self.stride)
        images = normalise(resize(images, (height, width))).to(self.network.dtype)
        tokens = in_batches(self._tokens, images, self.batch_size)
        grid = height // self.stride, width // self.stride
        return FeatureMap(tokens_to_grid(tokens, grid, self.dropped), self.stride)

    def _tokens(self, images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B n D"]:
        output = self.network(images, output_hidden_states=self.layer is not None)
        tokens: Tensor = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        return tokens
