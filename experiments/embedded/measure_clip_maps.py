"""Does the allocation map follow the thing in a clip? Share of its mass on the true track, per smoothing and scope.

Clips are composed, so every frame's true mask is known. "area" is what a map of ones puts there;
"frames shuffled" is the same map with its latent frames in a random order: what is left without following in time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clips import Clip, ClipComposer
from common import DEFAULT_ART
from vipo import backbones
from vipo.options import Scope
from vipo.structuring import PerceptualStructuring, align_frames, flicker

GRID = (16, 16)
STRIDE = 4


def true_masks(clips: list[Clip]) -> Tensor:
    """Share of each latent position that shows the thing, (N, T, H, W)."""
    masks = torch.from_numpy(np.stack([clip.masks for clip in clips]))
    cells = F.adaptive_avg_pool2d(masks, GRID)
    return align_frames(cells, 1 + (masks.shape[1] - 1) // STRIDE, temporal_stride=STRIDE)


def share_on(maps: Tensor, masks: Tensor) -> float:
    """Mean over clips of the share of a map's mass that is on the thing."""
    return float(((maps * masks).sum((1, 2, 3)) / maps.sum((1, 2, 3))).mean())


def measure(media: Tensor, masks: Tensor, scope: Scope, smoothing_sigma: float) -> dict[str, float]:
    """One setting on clips (N, 3, F, Y, X) with true masks (N, T, H, W)."""
    backbone = backbones.build("efficientnet_lite", stride=8, resolution=96)
    source = PerceptualStructuring(backbone, temporal_stride=STRIDE, scope=scope, smoothing_sigma=smoothing_sigma)
    maps = source(media, (masks.shape[1], *GRID))
    rng = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(maps.shape[1], generator=rng) for _ in maps])
    shuffled = maps[torch.arange(len(maps))[:, None], order]
    return {
        "on the thing": round(share_on(maps, masks), 3),
        "frames shuffled": round(share_on(shuffled, masks), 3),
        "area": round(share_on(torch.ones_like(masks), masks), 3),
        "flicker": round(float(flicker(maps).mean()), 3),
    }


def main() -> None:
    """Command line; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=DEFAULT_ART)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    composer, rng = ClipComposer(args.art), np.random.default_rng(3)
    drawn: list[Clip] = []
    while len(drawn) < args.clips:  # only what moves: a thing that stands still is followed by any map
        clip = composer.clip(rng)
        drawn += [clip] if clip.claims.motion != "still" else []
    media = torch.from_numpy(np.stack([clip.frames for clip in drawn])).permute(0, 4, 1, 2, 3).float() / 255
    masks = true_masks(drawn)
    scopes: tuple[Scope, ...] = ("frame", "clip")
    found = {
        f"{scope}, sigma {sigma:g}": measure(media, masks, scope, sigma) for scope in scopes for sigma in (0.0, 1.0)
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
