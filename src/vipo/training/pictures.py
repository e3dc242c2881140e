"""What an iteration's pictures look like in numbers: how much is saturated, whether patches show as a grid, how much
the samples of a group differ. Of clips the middle frame stands for all.

Each process makes a row per sample, and the numbers come from the rows of all, so they are the same on each. Nothing
here waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vipo.types import Grid

PICTURES = ("pictures/saturated", "pictures/grid", "pictures/diversity")
DARKEST, BRIGHTEST = 0.5 / 255, 254.5 / 255  # what a file has as 0 and 255
THUMBNAIL = 8  # cells a side: the layout, not the grain
HARMONICS, NEIGHBOURS = 3, 3  # of the patch period; frequencies on either side of each
PIXELS_AT_ONCE = 1 << 24
SAME = 1e-12  # next to the power of any picture


@torch.no_grad()
def picture_rows(media: Float[Tensor, "N 3 F Y X"], period: Grid | None) -> Float[Tensor, "N K"]:
    """What :func:`picture_numbers` needs of each sample.

    Args:
        period: rows and columns of pixels that a token of the network has; None if nobody knows.
    """
    frames = media[:, :, media.shape[2] // 2]
    at_once = max(1, PIXELS_AT_ONCE // frames[0, 0].numel())
    return torch.cat([_rows(part.float(), period) for part in frames.split(at_once)])


def _rows(frames: Float[Tensor, "n 3 Y X"], period: Grid | None) -> Float[Tensor, "n K"]:
    pinned = ((frames <= DARKEST) | (frames >= BRIGHTEST)).float().mean((1, 2, 3))
    light = frames.mean(1)
    powers = [_powers(side, step) for side, step in zip((light.mT, light), period or (0, 0), strict=True)]
    return torch.cat([pinned[:, None], *powers, F.adaptive_avg_pool2d(frames, THUMBNAIL).flatten(1)], 1)


def _powers(lines: Float[Tensor, "n L S"], period: int) -> Float[Tensor, "n 2"]:
    """Along the last dimension, the mean power at the period and its harmonics, and that at frequencies beside them.

    Of differences, whose power is about the same at all frequencies in a natural picture: its own is about 1 / f^2
    (Field 1987, doi:10.1364/JOSAA.4.002379). NaN where there are too few patches to tell.
    """
    size = lines.shape[-1]
    at, beside = frequencies(size, period)
    if not at:
        return lines.new_full((len(lines), 2), torch.nan)
    power = torch.fft.rfft(lines - lines.roll(1, -1)).abs().square().mean(1)
    return torch.stack([_mean(power, at), _mean(power, beside)], 1)


def _mean(power: Float[Tensor, "n f"], places: Sequence[int]) -> Float[Tensor, " n"]:
    return torch.stack([power[:, place] for place in places]).mean(0)


def frequencies(size: int, period: int) -> tuple[list[int], list[int]]:
    """Of a line of ``size`` pixels: those of a period of so many pixels with its harmonics, and those beside them.

    None where the period does not divide the line or fits into it fewer than three times.
    """
    count = size // period if period > 1 and size % period == 0 else 0
    reach = min(NEIGHBOURS, (count - 1) // 2)
    at = [m * count for m in range(1, HARMONICS + 1) if m * count + reach < size / 2] if reach > 0 else []
    return at, [place + side * k for place in at for k in range(1, reach + 1) for side in (-1, 1)]


def picture_numbers(rows: Float[Tensor, "N K"], group_size: int) -> dict[str, Float[Tensor, ""]]:
    """From the rows of all samples, groups consecutive.

    ``grid`` is how often the pictures' power at the patch period has that of the periods beside it: about 1 without a
    grid. ``diversity`` is the standard deviation of thumbnails within a group. What is not known is NaN.
    """
    pinned, powers, thumbnails = rows[:, 0], rows[:, 1:5], rows[:, 5:]
    at, beside = powers.sum(0).view(2, 2).unbind(1)  # of rows and columns
    spread = thumbnails.unflatten(0, (-1, group_size)).var(1, correction=0).mean(1).sqrt()
    ratios = ((at + SAME) / (beside + SAME)).nan_to_num(-torch.inf)
    largest = ratios.amax()
    grid = largest.where(largest.isfinite(), torch.nan)
    return dict(zip(PICTURES, (pinned.mean(), grid, spread.mean()), strict=True))
