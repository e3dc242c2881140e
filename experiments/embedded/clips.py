"""Compose captioned clips of one drawing that moves over a ground, with its exact mask in every frame."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scenes import Array, SceneComposer
from vipo.embedded import clips

SIDES = (0.34, 0.52)
"""Long side of the thing as a share of the picture's side."""
TRAVEL = (0.35, 0.60)
"""How far a moving thing goes over the whole clip, as a share of the picture's side."""


@dataclass(frozen=True)
class Clip:
    """One composed clip.

    frames: uint8 (F, H, W, 3). masks: float32 (F, H, W), share of each pixel that shows the thing. centres: (F, 2) of
    its box as x, y in pixels.
    """

    frames: NDArray[np.uint8]
    masks: Array
    centres: Array
    claims: clips.ClipCaption

    @property
    def caption(self) -> str:
        return clips.make_clip_caption(*self.claims)


class ClipComposer(SceneComposer):
    """Draw random clips from one vendor's emoji art; see :class:`scenes.SceneComposer`."""

    def __init__(
        self, art_root: Path | str, vendor: str = "google", size: int = 64, frames: int = clips.FRAMES
    ) -> None:
        super().__init__(art_root, vendor, clips.OBJECTS, size)
        self.frames = frames

    def clip(self, rng: np.random.Generator, claims: clips.ClipCaption | None = None) -> Clip:
        """Draw one clip; without ``claims`` they are random, and one in five things stands still."""
        claims = claims or clips.ClipCaption(
            str(rng.choice(clips.OBJECTS)), str(rng.choice(list(clips.MOTIONS))), str(rng.choice(clips.GROUNDS))
        )
        drawing = self.drawing(claims.name, rng)
        starts = self._track(rng, drawing.shape, clips.DIRECTIONS[claims.motion])
        ground = self._ground(rng, "plain", claims.ground, 1.0)
        frames, masks = self.render(drawing, starts, ground)
        extent = np.asarray(drawing.shape[1::-1], dtype=np.float32)
        return Clip(frames, masks, starts + extent / 2, claims)

    def drawing(self, name: str, rng: np.random.Generator) -> Array:
        """One thing at a random size: premultiplied RGBA (h, w, 4)."""
        return self._sized(name, round(self.size * rng.uniform(*SIDES)))

    def render(self, drawing: Array, starts: Array, ground: Array) -> tuple[NDArray[np.uint8], Array]:
        """Frames and masks of a drawing with its upper left corner at ``starts`` (F, 2) over one ground."""
        canvas = np.broadcast_to(ground, (len(starts), *ground.shape)).copy()
        masks = np.zeros(canvas.shape[:3], dtype=np.float32)
        for frame, mask, (x, y) in zip(canvas, masks, starts, strict=True):
            _paste_between(frame, mask, drawing, float(x), float(y))
        return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), masks

    def _track(self, rng: np.random.Generator, shape: tuple[int, ...], direction: tuple[int, int]) -> Array:
        """Where the drawing's upper left corner is in each frame (F, 2): straight, at one speed, wholly inside."""
        room = np.asarray([self.size - shape[1], self.size - shape[0]], dtype=np.float32)
        travel = np.minimum(self.size * rng.uniform(*TRAVEL), room) * np.asarray(direction)
        low, high = np.maximum(0, -travel), room - np.maximum(0, travel)
        start = rng.uniform(low, np.maximum(low, high))
        share = np.linspace(0, 1, self.frames, dtype=np.float32)[:, None]
        return np.asarray(start + share * travel, dtype=np.float32)


def _paste_between(frame: Array, mask: Array, drawing: Array, x: float, y: float) -> None:
    """Composite a premultiplied drawing at a place between pixels, linearly; changes ``frame`` and ``mask``."""
    left, top = int(np.floor(x)), int(np.floor(y))
    fx, fy = x - left, y - top
    padded = np.pad(drawing, ((1, 1), (1, 1), (0, 0)))
    across = padded[:, 1:] * (1 - fx) + padded[:, :-1] * fx
    moved = across[1:] * (1 - fy) + across[:-1] * fy
    height, width = min(moved.shape[0], frame.shape[0] - top), min(moved.shape[1], frame.shape[1] - left)
    part, where = moved[:height, :width], (slice(top, top + height), slice(left, left + width))
    alpha = part[..., 3]
    frame[where] = frame[where] * (1 - alpha[..., None]) + part[..., :3]
    mask[where] = alpha


def main() -> None:
    """Command line: write a sheet of random clips to look at, one a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"))
    parser.add_argument("--vendor", default="google")
    parser.add_argument("--out", type=Path, default=Path("clips.png"))
    args = parser.parse_args()
    composer, rng = ClipComposer(args.art, args.vendor), np.random.default_rng(0)
    shown = [composer.clip(rng) for _ in range(12)]
    sheet = np.concatenate([np.concatenate(list(clip.frames[::2]), axis=1) for clip in shown])
    Image.fromarray(sheet).resize((9 * 128, 12 * 128), Image.Resampling.NEAREST).save(args.out)
    for clip in shown:
        print(clip.caption)


if __name__ == "__main__":
    main()
