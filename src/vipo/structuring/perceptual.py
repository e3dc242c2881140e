"""Media to maps by what a frozen vision backbone sees."""

from __future__ import annotations

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
from vipo.types import Backbone, Grid, LatentGrid


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
        latent_frames, *grid = latent_grid
        by_row = self._by_frame if self.scope == "frame" else self._by_clip
        maps = by_row(media, (grid[0], grid[1]))
        aligned = align_frames(maps, latent_frames, temporal_stride=self.temporal_stride, causal=self.causal)
        return aligned if self.scope == "frame" else normalise(aligned, self.normalization)

    @torch.no_grad()
    def seen(self, frames: Float[Tensor, "F 3 Y X"]) -> Seen:
        """What the maps of these frames of one clip are made of, by its ``scope``: one basis for each, or for all."""
        features = self._see_all(frames)
        if self.scope == "frame":
            found = principal_components(features, self.components)
            return Seen(oriented(found, self.orientation), found.explained)
        found = principal_components(features.transpose(0, 1)[None], self.components)
        components = oriented(found, self.orientation)[0].transpose(0, 1)
        return Seen(components, found.explained.expand(len(frames), -1))

    def _by_frame(self, media: Tensor, grid: Grid) -> Float[Tensor, "N F H W"]:
        frames = media.transpose(1, 2).flatten(0, 1)
        maps = [
            normalise(self._map(self._see(part), grid), self.normalization) for part in frames.split(self.batch_size)
        ]
        return torch.cat(maps).unflatten(0, (media.shape[0], media.shape[2]))

    def _by_clip(self, media: Tensor, grid: Grid) -> Float[Tensor, "N F H W"]:
        clips = []
        for clip in media.transpose(1, 2):
            features = self._see_all(clip)
            clips.append(self._map(features.transpose(0, 1)[None], grid))
        return torch.cat(clips)

    def _map(self, features: Tensor, grid: Grid) -> Tensor:
        smoothed = structure(features, self.components, self.aggregation, self.smoothing_sigma, self.orientation)
        return resample(smoothed, grid)

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
