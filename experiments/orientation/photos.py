"""Real photographs with hand-drawn outlines of their subject, and crops in which it touches the border."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OUTLINES: dict[str, str] = {
    "astronaut": "30 12 33 4 45 2 55 6 59 18 55 27 51 33 57 42 58 50 68 56 70 67 83 68 95 78 99 90 98 100 4 100 3 90"
    " 7 75 5 63 10 52 20 45 22 38 27 31 36 30 36 25 30 20",
    "chelsea": "14 0 85 5 80 35 72 60 66 85 55 93 30 100 8 100 10 70 2 55 2 42 10 35 8 10",
    "coffee": "30 15 37 6 48 4 60 8 66 18 70 18 70 24 67 35 75 40 80 55 79 72 72 86 58 95 42 95 27 85 16 68 13 50"
    " 17 38 29 29",
    "rocket": "46 36 50 30 54 36 54 95 46 95",
    "camera": "31 22 36 14 46 12 53 20 53 28 63 27 64 38 56 42 55 55 50 60 37 64 28 80 30 100 0 100 0 52 8 40 20 29"
    " 33 30",
    "motorcycle": "12 42 20 32 35 36 55 40 62 22 70 16 78 28 74 45 86 58 92 75 90 90 82 88 74 74 60 74 40 70 35 78"
    " 24 78 16 60 14 48",
    "hopper": "33 12 40 5 50 4 62 6 69 11 72 17 72 28 73 33 70 46 66 53 80 60 97 66 100 72 100 100 2 100 8 63 35 53"
    " 32 45 30 33 34 24",
}
"""x y in percent of the picture's width and height."""


class Labelled(NamedTuple):
    """A picture (H, W, 3) uint8 and the share of each pixel that is subject (H, W) float32."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]


def photographs() -> dict[str, Labelled]:
    """The photographs that come with scikit-image and matplotlib, and scikit-image's silhouette of a horse."""
    import matplotlib
    from skimage import data

    pictures = {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "camera")}
    pictures["motorcycle"] = data.stereo_motorcycle()[0]
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pictures["hopper"] = np.asarray(Image.open(hopper).convert("RGB"))
    horse = data.horse()
    found = {name: Labelled(_colour(picture), _outline(name, picture.shape)) for name, picture in pictures.items()}
    return {**found, "horse": Labelled(_colour(horse.astype(np.uint8) * 255), (~horse).astype(np.float32))}


def _colour(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture


def _outline(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    numbers = [float(n) / 100 for n in OUTLINES[name].split()]
    corners = [(x * shape[1], y * shape[0]) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
    canvas = Image.new("L", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas, dtype=np.float32) / 255


def portraits(rng: np.random.Generator, per_photo: int) -> list[Labelled]:
    """Random crops in which the subject covers 20-70 % of the picture and 15-50 % of its border."""
    sources = photographs()
    return [
        _crop(rng, sources[name])
        for name in ("astronaut", "chelsea", "coffee", "camera", "motorcycle", "hopper")
        for _ in range(per_photo)
    ]


def _crop(rng: np.random.Generator, source: Labelled, tries: int = 500) -> Labelled:
    height, width = source.mask.shape
    for _ in range(tries):
        side = int(rng.uniform(0.45, 1.0) * min(height, width))
        y, x = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        mask = source.mask[y : y + side, x : x + side]
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        if 0.2 < mask.mean() < 0.7 and 0.15 < edge.mean() < 0.5:
            break
    else:
        raise ValueError(f"no crop of a {height}x{width} photograph was a portrait in {tries} tries")
    flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
    return Labelled(source.image[y : y + side, x : x + side][:, flip], mask[:, flip])
