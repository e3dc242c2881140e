"""Which frames of a video a picture's reward looks at: all of them, averaged, or the first alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from vipo.errors import UserError
from vipo.vision.preprocess import in_batches

Frames = Literal["mean", "first"]


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
