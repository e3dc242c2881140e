"""Segment Anything's image encoder (arXiv 2304.02643), through transformers.

The encoder takes one fixed square. As in its authors' preprocessing the long side is resized to it, the picture is
normalised, and only then padded with zeros at the right and bottom; the cells that saw nothing but padding are cropped
away again, ceil(height / 16) x ceil(width / 16) remain.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo.types import FeatureMap
from vipo.vision.frozen import load_frozen
from vipo.vision.preprocess import check_images, in_batches, normalise, resize

CLASSES = {"sam": "SamVisionModel", "sam_vision_model": "SamVisionModel"}


class Sam:
    """SAM's image embedding.

    Args:
        pretrained: hub id (facebook/sam-vit-base, -large, -huge) or local folder, of the whole SAM or its encoder.
        resolution: None, or the side the encoder was built for (1024 px for the released weights): it has no other.
        layer: None for the embedding after the neck; i for hidden state i of the ViT (0 is the embedding).
        batch_size: pictures per forward pass.
        dtype: of the network; the features are float32.
    """

    def __init__(
        self,
        *,
        pretrained: str | Path = "facebook/sam-vit-base",
        resolution: int | None = None,
        layer: int | None = None,
        batch_size: int = 4,
        dtype: str = "float32",
    ) -> None:
        self.network = load_frozen("backbone 'sam'", pretrained, CLASSES, dtype=dtype)
        config = self.network.config
        self.stride: int = config.patch_size
        self.side: int = config.image_size
        if resolution not in (None, self.side):
            raise ValueError(f"resolution={resolution}: this encoder takes {self.side} px only; leave resolution out")
        if layer is not None and abs(layer) > config.num_hidden_layers:
            raise ValueError(f"layer={layer}: this network has hidden states 0 to {config.num_hidden_layers}")
        self.layer, self.batch_size = layer, batch_size

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 Y X"]) -> FeatureMap:
        """Pictures in [0, 1] to one feature per 16-px cell that shows some of the picture."""
        check_images(images)
        self.network.to(images.device)
        scale = self.side / max(images.shape[-2:])
        height, width = (max(1, int(side * scale + 0.5)) for side in images.shape[-2:])
        images = normalise(resize(images, (height, width))).to(self.network.dtype)
        padded = F.pad(images, (0, self.side - width, 0, self.side - height))
        features = in_batches(self._encode, padded, self.batch_size)
        rows, columns = (-(-side // self.stride) for side in (height, width))
        return FeatureMap(features[..., :rows, :columns].contiguous(), self.stride)

    def _encode(self, images: Float[Tensor, "B 3 s s"]) -> Float[Tensor, "B D h w"]:
        output = self.network(images, output_hidden_states=self.layer is not None)
        features: Tensor = (
            output.last_hidden_state if self.layer is None else output.hidden_states[self.layer].permute(0, 3, 1, 2)
        )
        return features
