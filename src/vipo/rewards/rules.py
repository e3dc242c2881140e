"""Rewards that are a formula: no weights, no prompt, exact. Good for tests and for telling a loop that learns from one
that does not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.types import Prompt

KILOBYTE = 1000.0


class Redness:
    """r = mean over frames and pixels of x_R - (x_G + x_B) / 2, in [-1, 1]: the collapse test of arXiv 2511.18719."""

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        red, green, blue = media.float().mean((2, 3, 4)).unbind(1)
        return red - (green + blue) / 2

    def with_evidence(
        self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N F Y X"]]:
        """Scores, and the same of each pixel, whose mean they are."""
        red, green, blue = media.float().unbind(1)
        return self(media, prompts), red - (green + blue) / 2


class Brightness:
    """Mean Rec. 709 luma over frames and pixels, in [0, 1]."""

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        means = media.float().mean((2, 3, 4))
        return means @ means.new_tensor([0.2126, 0.7152, 0.0722])


class JpegCompressibility:
    """Minus the kilobytes (1000 bytes) of the picture as a JPEG, averaged over frames (DDPO, arXiv 2305.13301).

    Args:
        quality: JPEG quality, 1 to 95.
    """

    def __init__(self, *, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"quality={quality}: JPEG quality goes from 1 to 95")
        self.quality = quality

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        videos = (media.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
        sizes = [np.mean([self._bytes(frame) for frame in video]) for video in videos]
        return -torch.tensor(sizes, dtype=torch.float32, device=media.device) / KILOBYTE

    def _bytes(self, frame: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
