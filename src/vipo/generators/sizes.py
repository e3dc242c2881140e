"""Sizes of media that a model can make, and what they are in latents and tokens."""

from __future__ import annotations

from typing import Any

from vipo.errors import UserError
from vipo.types import Grid


def check_multiple(cell: int, model: str, **sides: int) -> None:
    """Sides in pixels must fill whole tokens.

    Raises:
        UserError: one does not.
    """
    if any(side % cell for side in sides.values()):
        given = " and ".join(f"{name}={side}" for name, side in sides.items())
        raise UserError(f"{given} must be multiples of {cell} pixels for this {model} model")


def latent_and_token_grid(model: str, pipeline: Any, height: int, width: int, patch: int = 2) -> tuple[Grid, Grid]:
    """(H, W) of a picture's latents, and of its tokens of ``patch`` x ``patch`` positions.

    Raises:
        UserError: sides that do not fill whole tokens.
    """
    stride = int(pipeline.vae_scale_factor)
    check_multiple(stride * patch, model, height=height, width=width)
    latent = height // stride, width // stride
    return latent, (latent[0] // patch, latent[1] // patch)


def check_frames(model: str, frames: int, stride: int) -> None:
    """The first pixel frame is a latent frame of its own, and then ``stride`` of them are one.

    Raises:
        UserError: a number of frames that leaves some over.
    """
    accepted = stride * max(0, round((frames - 1) / stride)) + 1
    if frames != accepted:
        raise UserError(
            f"frames={frames} is not one more than a multiple of {stride}, as the clips of this {model} model are;"
            f" the nearest is frames={accepted}"
        )


def check_sides(model: str, height: int, width: int, row: int, column: int) -> None:
    """Sides in pixels must fill whole tokens of ``row`` x ``column``.

    Raises:
        UserError: one does not.
    """
    accepted = _nearest(height, row), _nearest(width, column)
    if (height, width) != accepted:
        raise UserError(
            f"height={height} and width={width} must be multiples of {row} and {column} pixels for this {model} model;"
            f" the nearest are height={accepted[0]} and width={accepted[1]}"
        )


def _nearest(value: float, step: int) -> int:
    """The positive multiple of ``step`` that is closest."""
    return max(1, round(value / step)) * step
