"""From media to what a scorer's network sees: frames chosen, fitted to a square, normalised; gradients pass through.

    centre_crop    CLIP's own: short side to S, then the middle S x S square
    letterbox      HPSv2's: long side to S, then black borders, so that nothing is cut off

The originals read 8-bit files, these functions tensors, and pictures are not rounded to 8 bits here: rounding has no
gradient, and half a grey level (0.002) is far below what a score reacts to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo.backbones.preprocess import in_batches, normalise, resize
from vipo.types import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Frames = Literal["mean", "first"]
"""Which frames of a video are scored: all of them, averaged, or the first alone."""


def check_frames(reward: str, frames: str) -> None:
    """Refuse a policy that does not exist."""
    if frames not in get_args(Frames):
        raise UserError(f"reward {reward!r} has no frames={frames!r}; choose from {', '.join(get_args(Frames))}")


def scored_frames(media: Float[Tensor, "N 3 F Y X"], frames: Frames) -> Float[Tensor, "N f 3 Y X"]:
    """The frames that count, f = F or 1, in the order of time."""
    return (media if frames == "mean" else media[:, :, :1]).transpose(1, 2)


def per_frame(
    function: Callable[[Tensor], Tensor], media: Float[Tensor, "N 3 F Y X"], frames: Frames, batch_size: int
) -> Float[Tensor, "N f *rest"]:
    """Apply a picture's function to every scored frame, at most ``batch_size`` at a time."""
    shown = scored_frames(media, frames)
    return in_batches(function, shown.flatten(0, 1), batch_size).unflatten(0, shown.shape[:2])


def centre_crop(images: Float[Tensor, "B 3 Y X"], side: int) -> Float[Tensor, "B 3 side side"]:
    """The short side to ``side`` px, clipped to [0, 1] as a file would be, then the middle square.

    Pillow's bicubic filter also rounds and clips to 8 bits between columns and rows: on noise, the worst case, single
    pixels differ by up to 0.03 when shrinking and 0.05 when enlarging, the mean by less than 0.003. The long side and
    the crop's corner are rounded down, as transformers' CLIP processor does.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    size = side * height // short, side * width // short
    top, left = ((edge - side) // 2 for edge in size)
    return resize(images, size)[..., top : top + side, left : left + side]


def letterbox(images: Float[Tensor, "B 3 Y X"], side: int) -> Float[Tensor, "B 3 side side"]:
    """The long side to ``side`` px, then black borders around the centred picture.

    Not clipped: the original resizes tensors, and there the overshoot of the bicubic filter stays.
    """
    images = images.float()
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if size != (height, width):
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    below, right = side - size[0], side - size[1]
    return F.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))


def clip_normalise(images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B 3 y x"]:
    """The statistics of CLIP's training pictures."""
    return normalise(images, CLIP_MEAN, CLIP_STD)
