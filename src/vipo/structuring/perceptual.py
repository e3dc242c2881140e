"""Media to maps by what a frozen vision backbone sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vipo.options import MapOptions, Scope
from vipo.structuring.components import principal_components
from vipo.structuring.frames import align_frames
from vipo.structuring.maps import normalise, resample, structure
from vipo.structuring.orientation import oriented
from vipo.types import Backbone, LatentGrid


class Seen(NamedTuple):
    """The oriented components z'_j of each frame, in [0, 1], and their shares lambda_j of its variance."""

    components: Float[Tensor, "F K h w"]
    explained: Float[Tensor, "F K"]


@dataclass(frozen=True)
class PerceptualStructuring(MapOptions):
    """Media to one non-negative weight per latent position: backbone, principal components, latent frames.

    Args:
        backbone: frozen vision network, pictures in [0, 1] to a ``FeatureMap``.
        components, aggregation, smoothing_sigma, normalization, orientation: as in ``allocation_map``.
        scope: ``frame`` (the paper: each frame has its own components and is normalised alone) or ``clip`` (one basis
            for all frames of a clip, normalised over the clip: no flicker, and a frame may weigh more than another).
        temporal_stride, causal: how the VAE maps pixel frames to latent frames, as in ``align_frames``.
        batch_size: frames per call of the backbone.
    """

    backbone: Backbone
    temporal_stride: int = field(default=1, kw_only=True)
    causal: bool = field(default=True, kw_only=True)
    batch_size: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r} is not known; choose from {', '.join(get_args(Scope))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")

    @torch.no_grad()
    def __call__(self, media: Float[Tensor, "N 3 F Y X"], latent_grid: LatentGrid) -> Float[Tensor, "N T H W"]:
        """Maps for media in [0, 1]. A frame of one colour has no structure and gives ones (or the clip's floor)."""
        if media.ndim != 5 or media.shape[1] != 3 or 0 in media.shape:
            raise ValueError(f"media {tuple(media.shape)} must be (N, 3, F, Y, X); an image has F = 1")
        _, *grid = latent_grid
        clips = media.transpose(1, 2)
        parts = self._by_frame(clips.flatten(0, 1), grid) if self.scope == "frame" else self._by_clip(clips, grid)
        maps = torch.cat([maps for maps, _ in parts]).unflatten(0, clips.shape[:2])
        return self._aligned(maps, latent_grid)

    @torch.no_grad()
    def with_seen(self, clip: Float[Tensor, "3 F Y X"], latent_grid: LatentGrid) -> tuple[Float[Tensor, "T H W"], Seen]:
        """The map of one clip, and of each of its frames what that is made of; the backbone is asked once."""
        _, *grid = latent_grid
        frames = clip.transpose(0, 1)
        parts = list(self._by_frame(frames, grid) if self.scope == "frame" else self._by_clip(frames[None], grid))
        maps = torch.cat([maps for maps, _ in parts])
        components = torch.cat([seen.components for _, seen in parts])
        explained = torch.cat([seen.explained for _, seen in parts])
        return self._aligned(maps[None], latent_grid)[0], Seen(components, explained)

    def _by_frame(self, frames: Float[Tensor, "B 3 Y X"], grid: Sequence[int]) -> Iterator[tuple[Tensor, Seen]]:
        """Each frame's map (B, H, W), so many at a time, and what it is made of."""
        for part in frames.split(self.batch_size):
            seen = self._seen(self._see(part))
            yield normalise(self._map(seen, grid), self.normalization), seen

    def _by_clip(self, clips: Float[Tensor, "N F 3 Y X"], grid: Sequence[int]) -> Iterator[tuple[Tensor, Seen]]:
        """Each clip's frames' maps (F, H, W), which are normalised together later, and what they are made of."""
        for clip in clips:
            seen = self._seen(self._see_all(clip).transpose(0, 1)[None])
            by_frame = Seen(seen.components[0].transpose(0, 1), seen.explained.expand(len(clip), -1))
            yield self._map(seen, grid)[0], by_frame

    def _seen(self, features: Float[Tensor, "B D *F h w"]) -> Seen:
        found = principal_components(features, self.components)
        return Seen(oriented(found, self.orientation), found.explained)

    def _map(self, seen: Seen, grid: Sequence[int]) -> Float[Tensor, "B *F H W"]:
        summed = structure(seen.components, seen.explained, self.aggregation, self.smoothing_sigma)
        return resample(summed, (grid[0], grid[1]))

    def _aligned(self, maps: Float[Tensor, "N F H W"], latent_grid: LatentGrid) -> Float[Tensor, "N T H W"]:
        aligned = align_frames(maps, latent_grid[0], temporal_stride=self.temporal_stride, causal=self.causal)
        return aligned if self.scope == "frame" else normalise(aligned, self.normalization)

    def _see_all(self, clip: Float[Tensor, "F 3 Y X"]) -> Float[Tensor, "F D h w"]:
        return torch.cat([self._see(part) for part in clip.split(self.batch_size)])

    def _see(self, frames: Float[Tensor, "b 3 Y X"]) -> Float[Tensor, "b D h w"]:
        """Features of frames; one colour everywhere gives constant features, whatever the padding made."""
        features = self.backbone(frames).features
        blank = frames.flatten(2).amax(2) - frames.flatten(2).amin(2) <= 1e-3
        return features.where(~blank.all(1)[:, None, None, None], features.new_ones(()))


def oriented_components(source: PerceptualStructuring, pictures: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B K h w"]:
    """The oriented principal components of pictures, in [0, 1], as the map source sees them."""
    seen = source.backbone(pictures).features
    return oriented(principal_components(seen, source.components), source.orientation)
