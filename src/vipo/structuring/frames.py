"""Maps over time: from pixel frames to latent frames, and how much they flicker."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def align_frames(
    maps: Float[Tensor, "B F H W"], latent_frames: int, *, temporal_stride: int, causal: bool = True
) -> Float[Tensor, "B T H W"]:
    """Maps per pixel frame to maps per latent frame, with stride s = ``temporal_stride``.

    A causal video VAE encodes pixel frame 0 alone: latent frame 0 is pixel frame 0, latent frame k the mean of pixel
    frames s(k-1)+1 .. sk, so F = s(T-1) + 1. Otherwise each latent frame is the mean of s consecutive ones, F = sT.

    Raises:
        ValueError: maps that are not (B, F, H, W), or an F that does not belong to T.

    Examples:
        >>> import torch
        >>> from vipo.structuring import align_frames
        >>> frames = torch.arange(9.0).reshape(1, 9, 1, 1)
        >>> align_frames(frames, 3, temporal_stride=4).flatten()
        tensor([0.0000, 2.5000, 6.5000])
    """
    if maps.ndim != 4:
        raise ValueError(f"maps {tuple(maps.shape)} must be (B, F, H, W)")
    if temporal_stride < 1 or latent_frames < 1:
        raise ValueError(f"temporal_stride={temporal_stride} and latent_frames={latent_frames} must be at least 1")
    frames = maps.shape[1]
    expected = temporal_stride * (latent_frames - 1) + 1 if causal else temporal_stride * latent_frames
    if frames != expected:
        kind = "causal" if causal else "non-causal"
        raise ValueError(
            f"{frames} pixel frames do not match {latent_frames} latent frames: a {kind} VAE with"
            f" temporal_stride={temporal_stride} has {expected}"
        )
    head = 1 if causal else 0
    rest = maps[:, head:].unflatten(1, (-1, temporal_stride)) if frames > head else maps[:, :0, None]
    return torch.cat([maps[:, :head], rest.mean(2)], dim=1)


def flicker(maps: Float[Tensor, "N T H W"]) -> Float[Tensor, " N"]:
    """How much the map of a clip changes from one latent frame to the next, in units of its mean:

        mean over t, p of |M(t+1, p) - M(t, p)|  /  mean over t, p of M(t, p)

    0 for maps that stand still, for T = 1 and for a map of zeros. A subject that moves counts too, so compare the
    numbers of one kind of clip.
    """
    if maps.shape[1] == 1:
        return maps.new_zeros(len(maps))
    change, mean = maps.diff(dim=1).abs().mean((1, 2, 3)), maps.mean((1, 2, 3))
    return change / mean.where(mean > 0, torch.ones_like(mean))
