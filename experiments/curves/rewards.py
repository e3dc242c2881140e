"""Rewards that make a run ill, each in its own way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def coarse(media: Tensor, prompts: Sequence[object]) -> Tensor:  # noqa: ARG001
    """Redness in so few steps that most groups get one score."""
    red, green, blue = media.mean((2, 3, 4)).unbind(1)
    return ((red - (green + blue) / 2) * 8).round() / 8


def glaring(media: Tensor, prompts: Sequence[object]) -> Tensor:  # noqa: ARG001
    """Likes black and full colours."""
    return (media - 0.5).abs().mean((1, 2, 3, 4))
