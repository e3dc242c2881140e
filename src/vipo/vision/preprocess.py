"""From pictures of any size in [0, 1] to what a vision network wants: resize, crop, pad, normalise; gradients pass.

    fitted_size    a backbone's: long side to a resolution, both sides multiples of its stride
    centre_crop    CLIP's own: short side to S, then the middle S x S square
    letterbox      HPSv2's: long side to S, then black borders, so that nothing is cut off

Written out here rather than taken from each model's processor, so that every backbone sees tensors (never PIL files),
batches stay on their device, and the arithmetic does not depend on which imaging library happens to be installed.
Nothing is rounded to 8 bits: rounding has no gradient, and half a grey level (0.002) is far below what a score
reacts to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_images(images: Tensor) -> None:
    """Refuse anything but a batch of RGB pictures in floating point."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images {tuple(images.shape)} of {images.dtype} must be (B, 3, Y, X), floating point in [0, 1];"
            " fold video frames into the batch first"
        )


def check_resolution(resolution: int | None, multiple: int) -> None:
    """Refuse a resolution that holds no single cell."""
    if resolution is not None and resolution < multiple:
        raise ValueError(f"resolution={resolution} px is less than one cell of {multiple} px; give at least {multiple}")


def fitted_size(images: Float[Tensor, "B 3 Y X"], resolution: int | None, multiple: int) -> tuple[int, int]:
    """Height and width in px with the long side at ``resolution`` (None: as it is), each a multiple of ``multiple``."""
    height, width = images.shape[-2:]
    scale = 1.0 if resolution is None else resolution / max(height, width)
    rounded = [max(multiple, round(side * scale / multiple) * multiple) for side in (height, width)]
    return rounded[0], rounded[1]


def resize(images: Float[Tensor, "B 3 Y X"], size: tuple[int, int]) -> Float[Tensor, "B 3 y x"]:
    """Antialiased bicubic resampling to ``size`` (height, width), float32, overshoot clipped back into [0, 1]."""
    images = images.float()
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)


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


def normalise(
    images: Float[Tensor, "B 3 y x"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "B 3 y x"]:
    """(x - mean) / std per channel; by default the statistics of ImageNet."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def clip_normalise(images: Float[Tensor, "B 3 y x"]) -> Float[Tensor, "B 3 y x"]:
    """The statistics of CLIP's training pictures."""
    return normalise(images, CLIP_MEAN, CLIP_STD)


def in_batches(
    function: Callable[[Tensor], Tensor], images: Float[Tensor, "B 3 *size"], batch_size: int
) -> Float[Tensor, "B *rest"]:
    """Apply ``function`` to at most ``batch_size`` pictures or clips at a time; float32 comes out."""
    return torch.cat([function(part).float() for part in images.split(batch_size)])


def tokens_to_grid(tokens: Float[Tensor, "B n D"], grid: tuple[int, int], dropped: int) -> Float[Tensor, "B D h w"]:
    """Drop the leading class and register tokens and lay the patch tokens out as the grid they came from."""
    patches = tokens[:, dropped:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{tokens.shape[1]} tokens less {dropped} leading ones are {patches.shape[1]} patches, not a grid"
            f" {grid[0]} x {grid[1]}; the number of register tokens in the model's config is probably wrong"
        )
    return patches.transpose(1, 2).unflatten(2, grid)
