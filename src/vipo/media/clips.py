"""Clips for the eye: animated WebP and GIF files, clips that play together, frames laid side by side.

A clip is a sequence of pictures of one size, in order. What programs read back is the lossless sheet of
``vipo.media.pictures``; these files are for looking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

Clip = Sequence[Image.Image]
GAP, GROUND = 4, (128, 128, 128)  # pixels and colour between clips that share a picture
GIF_FPS = 50  # a GIF's frames last whole hundredths of a second, and players slow down those of one or none
LOSSLESS_SIDE = 160  # pixels; larger frames are compressed where nobody reads them back

V = TypeVar("V")


def spaced(values: Sequence[V], count: int) -> list[V]:
    """At most ``count`` of the values, evenly spaced, the first and the last among them; of one, the middle."""
    if len(values) <= count:
        return list(values)
    if count == 1:
        return [values[len(values) // 2]]
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def cut(strip: Image.Image, frames: int) -> list[Image.Image]:
    """The frames of a clip that lie side by side in one picture, as ``load_sheet`` returns it.

    Raises:
        ValueError: the strip's width is not a multiple of ``frames``.
    """
    width, rest = divmod(strip.width, frames)
    if rest:
        raise ValueError(f"a strip of {strip.width} pixels does not hold {frames} frames of one width")
    return [strip.crop((k * width, 0, (k + 1) * width, strip.height)) for k in range(frames)]


def resized(clip: Clip, side: int) -> list[Image.Image]:
    """Frames at most ``side`` pixels long; smaller ones as they are."""
    width, height = clip[0].size
    factor = min(1.0, side / max(width, height))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return [frame if frame.size == size else frame.resize(size, Image.Resampling.LANCZOS) for frame in clip]


def table(rows: Sequence[Clip]) -> Image.Image:
    """Pictures of one size in rows, with a gap between them."""
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    size = columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP
    canvas = Image.new("RGB", size, GROUND)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture, (x * (width + GAP), y * (height + GAP)))
    return canvas


def together(clips: Sequence[Clip], side: int) -> list[Image.Image]:
    """Clips of equal length as one that shows all of them, about twice as wide as high.

    Args:
        side: pixels of the longer side of each; small frames are enlarged by a whole factor, so pixels stay pixels.
    """
    columns = min(len(clips), 2 * math.ceil(math.sqrt(len(clips) / 2)))
    shown = [_enlarged(resized(clip, side), side) for clip in clips]
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    return [table([[clip[k] for clip in row] for row in rows]) for k in range(len(clips[0]))]


def _enlarged(clip: Clip, side: int) -> list[Image.Image]:
    width, height = clip[0].size
    factor = side // max(width, height)
    if factor <= 1:
        return list(clip)
    return [frame.resize((width * factor, height * factor), Image.Resampling.NEAREST) for frame in clip]


def save_webp(target: Path | BytesIO, clip: Clip, fps: float, *, quality: int | None = None) -> None:
    """An endless animated WebP of ``fps`` frames per second; without ``quality`` (0 to 100) it is lossless."""
    how = {"lossless": True} if quality is None else {"quality": quality, "method": 2}
    _save(target, clip, "WEBP", fps, **how)


def save_gif(target: Path | BytesIO, clip: Clip, fps: float) -> None:
    """An endless GIF whose frames share one palette of 256 colours, so that what stands still does not flicker.

    Of a clip that is faster than a GIF can be, every other frame, or every third, plays as long as the clip.
    """
    step = math.ceil(fps / GIF_FPS)
    clip, fps = clip[::step], fps / step
    small = [frame.resize((max(1, frame.width // 2), max(1, frame.height // 2))) for frame in spaced(clip, 16)]
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in small])).quantize(256)
    _save(target, [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in clip], "GIF", fps)


def _save(target: Path | BytesIO, clip: Clip, kind: str, fps: float, **options: object) -> None:
    first, *rest = clip
    first.save(target, format=kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **options)
