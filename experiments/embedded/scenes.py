"""Compose captioned scenes of emoji drawings on coloured grounds, with exact masks of every object.

The scenes train the generator (``SceneComposer.sample``) and, with ``hard=True``, are the pictures on which reward
allocation maps are measured: because every object was pasted, the true mask of every named thing is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vipo.embedded import VOCABULARY, make_caption

Array = NDArray[np.float32]

COUNT_ODDS = (0.60, 0.32, 0.08)
GROUND_KINDS = ("plain", "gradient", "textured")
GROUND_ODDS = (0.60, 0.25, 0.15)
SIDES = {1: (0.32, 0.75), 2: (0.28, 0.50), 3: (0.26, 0.40)}
"""Long side of an object as a share of the picture's side, by number of objects."""
HARD_SIDES = {1: (0.22, 0.85), 2: (0.20, 0.62), 3: (0.20, 0.50)}


@dataclass(frozen=True)
class Scene:
    """One composed picture.

    image: uint8 (H, W, 3). masks: float32 (n, H, W), share of each pixel that shows object i after occlusion.
    boxes: int (n, 4) as x0, y0, x1, y1, clipped to the picture. ground: (kind, colour name).
    """

    image: NDArray[np.uint8]
    masks: Array
    names: tuple[str, ...]
    boxes: NDArray[np.int64]
    ground: tuple[str, str]
    relation: str | None
    caption: str


class SceneComposer:
    """Draw random scenes from one vendor's emoji art.

    art_root is the folder that fetch_art.py fills (it holds ``<vendor>/package/img/<vendor>/64``).
    """

    def __init__(
        self, art_root: Path | str, vendor: str = "google", objects: Sequence[str] | None = None, size: int = 64
    ) -> None:
        self.size = size
        self.names = tuple(objects or VOCABULARY.names)
        folder = Path(art_root).expanduser() / vendor / "package" / "img" / vendor / "64"
        self._art = {name: _load_drawing(folder / f"{VOCABULARY.objects[name].lower()}.png") for name in self.names}
        self._sized = lru_cache(maxsize=None)(self._resize)
        axis = (np.arange(size, dtype=np.float32) + 0.5) / size
        self._grid = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))

    def sample(
        self,
        rng: np.random.Generator,
        *,
        count: int | None = None,
        names: Sequence[str] | None = None,
        ground: str | None = None,
        relation: str | None = None,
        hard: bool = False,
    ) -> Scene:
        """Draw one scene; whatever is not given is random. ``hard`` means cut, overlapping, on busy or soft grounds."""
        if names is None:
            n = count or int(rng.choice(3, p=(0.3, 0.4, 0.3) if hard else COUNT_ODDS)) + 1
            names = [self.names[i] for i in rng.choice(len(self.names), size=n, replace=False)]
        if len(names) == 2 and relation is None:
            relation = "left" if rng.random() < 0.5 else "above"
        boxes = self._place(rng, names, relation, hard)
        ground = ground or VOCABULARY.ground_names[rng.integers(len(VOCABULARY.grounds))]
        kind = GROUND_KINDS[rng.choice(3, p=(0.1, 0.35, 0.55) if hard else GROUND_ODDS)]
        canvas = self._ground(rng, kind, ground, 2.5 if hard else 1.0)
        masks = self._paste(canvas, names, boxes, hard and rng.random() < 0.5)
        image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
        caption = make_caption(names, relation, ground)
        clipped = np.clip(boxes, 0, self.size)
        return Scene(image, masks, tuple(names), clipped, (kind, ground), relation, caption)

    def _resize(self, name: str, long_side: int) -> Array:
        """Return one drawing as premultiplied RGBA float32 (h, w, 4), colour 0-255 and alpha 0-1."""
        art = self._art[name]
        scale = long_side / max(art.size)
        shape = max(1, round(art.width * scale)), max(1, round(art.height * scale))
        pixels = np.asarray(art.resize(shape, Image.Resampling.LANCZOS), dtype=np.float32).copy()
        pixels[..., 3] /= 255.0
        return pixels

    def _place(
        self, rng: np.random.Generator, names: Sequence[str], relation: str | None, hard: bool
    ) -> NDArray[np.int64]:
        """Choose boxes (n, 4), not clipped, by rejection; after 40 tries the last one is kept, ordered by relation."""
        low, high = (HARD_SIDES if hard else SIDES)[len(names)]
        boxes = np.zeros((len(names), 4), dtype=np.int64)
        for attempt in range(40):
            shrink = 1.0 - 0.008 * attempt
            for i, name in enumerate(names):
                side = max(6, round(self.size * rng.uniform(low, high) * shrink))
                height, width = self._sized(name, side).shape[:2]
                slack = 0.35 if hard else 0.03
                x, y = (_corner(rng, self.size, extent, slack) for extent in (width, height))
                boxes[i] = x, y, x + width, y + height
            if len(names) == 1 or _well_placed(boxes, relation, self.size, 0.30 if hard else 0.06):
                break
        return boxes if relation is None else _ordered(boxes, relation)

    def _ground(self, rng: np.random.Generator, kind: str, colour: str, strength: float) -> Array:
        """Paint a ground (H, W, 3) in 0-255: flat, a linear ramp of brightness, or a soft pattern of it."""
        size = self.size
        base = np.asarray(VOCABULARY.grounds[colour], dtype=np.float32) + rng.uniform(-5, 5, 3).astype(np.float32)
        if kind == "plain":
            return np.broadcast_to(base, (size, size, 3)).copy()
        x, y = self._grid
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        if kind == "gradient":
            shade = 55.0 * min(strength, 1.6) * ramp
        else:
            across = (y - 0.5) * np.cos(angle) - (x - 0.5) * np.sin(angle)
            f, g = rng.uniform(2, 7, 2) * 2 * np.pi
            wave = np.sin(f * ramp) if rng.random() < 0.5 else np.sin(f * ramp) * np.sin(g * across)
            shade = 13.0 * strength * wave
            if strength > 1:
                shade = shade + rng.normal(0, 7, (size, size))
        return base + shade.astype(np.float32)[..., None]

    def _paste(self, canvas: Array, names: Sequence[str], boxes: NDArray[np.int64], flip: bool) -> Array:
        """Composite the drawings onto the canvas in place; return occlusion-corrected masks (n, H, W)."""
        masks = np.zeros((len(names), self.size, self.size), dtype=np.float32)
        for i, (name, (x0, y0, x1, y1)) in enumerate(zip(names, boxes, strict=True)):
            drawing = self._sized(name, int(max(x1 - x0, y1 - y0)))
            drawing = drawing[:, ::-1] if flip else drawing
            left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, self.size), min(y1, self.size)
            if left >= right or top >= bottom:
                continue  # a hard scene can put an object wholly outside
            part = drawing[top - y0 : bottom - y0, left - x0 : right - x0]
            alpha = part[..., 3]
            where = (slice(top, bottom), slice(left, right))
            canvas[where] = canvas[where] * (1 - alpha[..., None]) + part[..., :3]
            masks[(slice(0, i), *where)] *= 1 - alpha
            masks[(i, *where)] = alpha
        return masks


def _load_drawing(file: Path) -> Image.Image:
    """Read a drawing, trim its transparent margin, and premultiply its colours (mode RGBa)."""
    with Image.open(file) as picture:
        rgba = picture.convert("RGBA")
    box = rgba.getchannel("A").getbbox()
    return rgba.crop(box).convert("RGBa")


def _corner(rng: np.random.Generator, size: int, extent: int, slack: float) -> int:
    """Draw the start of an interval of this extent; it may leave the picture by a share ``slack`` of itself."""
    over = int(slack * extent)
    return int(rng.integers(-over, max(-over, size - extent + over) + 1))


def _well_placed(boxes: NDArray[np.int64], relation: str | None, size: int, overlap: float) -> bool:
    """Whether boxes overlap little and, where a relation is asked, clearly stand in it (in either order)."""
    for i in range(len(boxes)):
        for j in range(i):
            sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
            areas = [np.prod(b[2:] - b[:2]) for b in (boxes[i], boxes[j])]
            if np.all(sides > 0) and np.prod(sides) > overlap * min(areas):
                return False
    if relation is None:
        return True
    dx, dy = np.abs(boxes[0, :2] + boxes[0, 2:] - boxes[1, :2] - boxes[1, 2:]) / 2
    along, other = (dx, dy) if relation == "left" else (dy, dx)
    return bool(along > 0.25 * size and along > 1.2 * other)


def _ordered(boxes: NDArray[np.int64], relation: str) -> NDArray[np.int64]:
    """Move the two boxes so that the first has the smaller centre along the relation's axis (sizes stay)."""
    axis = 0 if relation == "left" else 1
    centres = boxes[:, axis] + boxes[:, axis + 2]
    if centres[0] <= centres[1]:
        return boxes
    extents = boxes[:, 2:] - boxes[:, :2]
    mirrored = boxes.copy()
    mirrored[:, axis] = boxes[::-1, axis] if extents[0, axis] == extents[1, axis] else _mirror(boxes, axis)
    mirrored[:, axis + 2] = mirrored[:, axis] + extents[:, axis]
    return mirrored


def _mirror(boxes: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Reflect the start coordinates of both boxes inside the span that the two of them cover."""
    span = boxes[:, axis].min() + boxes[:, axis + 2].max()
    return np.asarray(span - boxes[:, axis + 2])


def main() -> None:
    """Command line: write a sheet of random scenes to look at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--art", type=Path, default=Path("~/.cache/vipo/art"))
    parser.add_argument("--vendor", default="google")
    parser.add_argument("--hard", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("scenes.png"))
    args = parser.parse_args()
    composer, rng = SceneComposer(args.art, args.vendor), np.random.default_rng(0)
    scenes = [composer.sample(rng, hard=args.hard) for _ in range(96)]
    rows = [np.concatenate([s.image for s in scenes[i : i + 12]], axis=1) for i in range(0, 96, 12)]
    Image.fromarray(np.concatenate(rows)).resize((12 * 128, 8 * 128), Image.Resampling.NEAREST).save(args.out)
    for scene in scenes[:12]:
        print(scene.caption)


if __name__ == "__main__":
    main()
