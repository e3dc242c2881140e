"""Frames as a Qwen2-VL reward model was trained to see them: which ones, how large, cut into which patches.

    how many   n = frames / media_fps * fps, at least 4, at most 768 or all there are, then to the nearest even number
    which      round(linspace(0, frames - 1, n))
    how large  both sides to the nearest multiple of 28 px; where that leaves the budget of pixels, both are scaled by
               sqrt(budget / (height * width)) instead, down to the upper limit or up to the lower
    patches    14 x 14 px of 2 frames; the 2 x 2 patches that the network merges into one token lie next to each other

All four are those of VideoAlign's and Qwen2-VL's own preprocessing (qwen-vl-utils); a score moves a lot with the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vipo.errors import UserError
from vipo.vision.preprocess import clip_normalise, resize

PATCH = 14  # px
MERGE = 2  # patches per token and side
PAIR = 2  # frames per patch
CELL = PATCH * MERGE  # px per token and side
FEWEST, MOST = 4, 768  # frames
LONGEST = 200  # ratio of the sides


@dataclass(frozen=True)
class Patches:
    """Pictures cut up for the network: one row per patch, sample after sample. ``grid`` counts them per sample."""

    values: Float[Tensor, "R K"]  # R = samples * t * h * w, K = 3 * 2 * 14 * 14
    grid: tuple[int, int, int]  # (t, h, w) in patches

    @property
    def tokens(self) -> int:
        """How many tokens a sample takes in the text."""
        return math.prod(self.grid) // MERGE**2


def sampled_frames(frames: int, *, media_fps: float, fps: float) -> Int[Tensor, " n"]:
    """Which frames of a video are looked at, in order.

    Args:
        frames: how many there are.
        media_fps: how many of them make a second.
        fps: how many the model looks at in a second.

    Raises:
        UserError: fewer than two frames, or a rate that is not positive.
    """
    if not (media_fps > 0 and fps > 0):
        raise UserError(f"media_fps={media_fps}, fps={fps}: both are frames per second and must be positive")
    if frames < PAIR:
        raise UserError(
            f"media with {frames} frame(s) is no video: this reward looks at pairs of frames; give 2 or more"
        )
    most = min(MOST, frames) // PAIR * PAIR
    count = round(min(max(frames / media_fps * fps, FEWEST), most) / PAIR) * PAIR
    return torch.linspace(0, frames - 1, count).round().long()


def budgeted_size(height: int, width: int, *, least: int, most: int) -> tuple[int, int]:
    """Height and width in px, multiples of 28, with ``least`` to ``most`` pixels where the shape allows it.

    Raises:
        UserError: one side is more than 200 times the other.
    """
    if max(height, width) > LONGEST * min(height, width):
        raise UserError(
            f"media of {height} x {width} px is too narrow for Qwen2-VL; accepted: sides up to 1 : {LONGEST}"
        )
    sides, pixels = (height, width), height * width
    cells = [max(1, round(side / CELL)) for side in sides]
    if math.prod(cells) * CELL**2 > most:
        cells = [math.floor(side / math.sqrt(pixels / most) / CELL) for side in sides]
    elif math.prod(cells) * CELL**2 < least:
        cells = [math.ceil(side * math.sqrt(least / pixels) / CELL) for side in sides]
    return cells[0] * CELL, cells[1] * CELL


def patches(frames: Float[Tensor, "N 3 n Y X"], *, least: int, most: int) -> Patches:
    """Videos of an even number of frames, in [0, 1], to what the network's patch embedding takes."""
    count, size = frames.shape[2], budgeted_size(*frames.shape[-2:], least=least, most=most)
    pictures = clip_normalise(resize(frames.transpose(1, 2).flatten(0, 1), size))
    grid = count // PAIR, size[0] // PATCH, size[1] // PATCH
    pairs = pictures.unflatten(0, (-1, grid[0], PAIR))  # N t pair 3 y x
    cut = pairs.unflatten(5, (-1, MERGE, PATCH)).unflatten(4, (-1, MERGE, PATCH))
    rows = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # N t, token row and column, patch in token, then what it holds
    return Patches(rows.flatten(6).flatten(0, 5), grid)
