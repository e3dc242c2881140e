"""From pictures of any size in [0, 1] to what a vision network wants: resize, normalise, pad.

Written out here rather than taken from each model's processor, so that every backbone sees tensors (never PIL files),
batches stay on their device, and the arithmetic does not depend on which imaging library happens to be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def normalise(
    images: Float[Tensor, "B 3 y x"],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Float[Tensor, "B 3 y x"]:
    """(x - mean) / std per channel; by default the statistics of ImageNet."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def in_batches(
    function: Callable[[Tensor], Tensor], images: Float[Tensor, "B 3 *size"], batch_size: int
) -> Float[Tensor, "B *rest"]:
    """Apply ``function`` to at most ``batch_size`` pictures or clips at a time; float32 comes out."""
    return torch.cat([function(part).float() for part in images.split(batch_size)])


def freeze(network: Network) -> Network:
    """Evaluation mode, no gradients, and weights in the memory layout in which convolutions are fast on CPU."""
    over_time = any(parameter.ndim == 5 for parameter in network.parameters())
    layout = torch.channels_last_3d if over_time else torch.channels_last
    frozen: Network = network.eval().requires_grad_(False).to(memory_format=layout)  # type: ignore[call-overload]
    return frozen


def tokens_to_grid(tokens: Float[Tensor, "B n D"], grid: tuple[int, int], dropped: int) -> Float[Tensor, "B D h w"]:
    """Drop the leading class and register tokens and lay the patch tokens out as the grid they came from."""
    patches = tokens[:, dropped:]
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{tokens.shape[1]} tokens less {dropped} leading ones are {patches.shape[1]} patches, not a grid"
            f" {grid[0]} x {grid[1]}; the number of register tokens in the model's config is probably wrong"
        )
    return patches.transpose(1, 2).unflatten(2, grid)
