"""Pictures as bytes and on paper: text, grids with headings and captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vipo.files import written_whole

PAPER, INK, MUTED = "#ffffff", "#1c1d21", "#63666e"
MARGIN, GAP, LABEL_WIDTH, TEXT_SIZE, LEADING = 24, 8, 190, 14, 1.35


Media = Float[Tensor, "N 3 F Y X"] | UInt8[Tensor, "N 3 F Y X"]  # in [0, 1], or what becomes of it on disk


def to_bytes(media: Media) -> UInt8[Tensor, "N 3 F Y X"]:
    """Media in [0, 1] to bytes, rounded; what lies outside the range is clamped."""
    if media.ndim != 5 or media.shape[1] != 3:
        raise ValueError(f"media {tuple(media.shape)} must be (N, 3, F, Y, X); an image has F = 1")
    if media.dtype == torch.uint8:
        return media
    return media.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()


def to_uint8(media: Media) -> UInt8[np.ndarray, "N F Y X 3"]:
    """The bytes of media as pictures have them."""
    return to_bytes(media).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as a whole or not at all."""
    with written_whole(path) as aside:
        picture.save(aside, format="PNG")


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    scale: float = 1.0,
    *,
    smooth: bool = True,
) -> Image.Image:
    """A sheet for people: pictures in a grid, a heading over each column, a wrapped caption left of each row.

    Args:
        row_labels: one per row, empty for none; lines after the first are set in grey.
        column_labels: one per column, empty for none.
        scale: output pixels per picture pixel. ``smooth`` resamples with Lanczos, else the pixels stay visible.
    """
    if not rows or not rows[0]:
        raise ValueError("a grid needs at least one picture")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} row labels for {len(rows)} rows: give one per row, or none")
    scaled = [[_scaled(picture, scale, smooth) for picture in row] for row in rows]
    widths = [max(row[k].width for row in scaled if k < len(row)) for k in range(max(map(len, scaled)))]
    captions = [wrapped(label, LABEL_WIDTH) for label in row_labels] or [[] for _ in rows]
    heights = [
        max(*(picture.height for picture in row), text_height(caption))
        for row, caption in zip(scaled, captions, strict=True)
    ]
    left = MARGIN + (LABEL_WIDTH + 2 * GAP if any(row_labels) else 0)
    headings = [wrapped(label, width - GAP) for label, width in zip(column_labels, widths, strict=False)]
    top = MARGIN + max((text_height(heading) + GAP for heading in headings), default=0)
    size = left + sum(widths) + GAP * (len(widths) - 1) + MARGIN, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN
    canvas = Image.new("RGB", size, PAPER)
    _place(canvas, scaled, captions, headings, (left, top), widths, heights)
    return canvas


def _scaled(picture: Image.Image, scale: float, smooth: bool) -> Image.Image:
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return picture.convert("RGB") if size == picture.size else picture.convert("RGB").resize(size, how)


def _place(
    canvas: Image.Image,
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[list[tuple[str, str]]],
    headings: Sequence[list[tuple[str, str]]],
    origin: tuple[int, int],
    widths: Sequence[int],
    heights: Sequence[int],
) -> None:
    columns = [origin[0] + sum(widths[:k]) + GAP * k for k in range(len(widths))]
    for x, heading in zip(columns, headings, strict=False):
        draw_text(canvas, (x, origin[1] - GAP - text_height(heading)), heading)
    y = origin[1]
    for row, caption, height in zip(rows, captions, heights, strict=True):
        draw_text(canvas, (MARGIN, y), caption)
        for x, picture in zip(columns, row, strict=False):
            canvas.paste(picture, (x, y))
        y += height + GAP


@lru_cache
def font(size: float = TEXT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The small font that comes with Pillow."""
    return ImageFont.load_default(size=size)


def wrapped(text: str, width: int) -> list[tuple[str, str]]:
    """Lines of at most ``width`` pixels with their colours: ink for the first line of ``text``, grey for the others."""
    lines: list[tuple[str, str]] = []
    for number, paragraph in enumerate(text.split("\n")):
        lines += [(line, MUTED if number else INK) for line in _wrap(paragraph, width)]
    return lines


def _wrap(paragraph: str, width: int) -> list[str]:
    face, lines = font(), [""]
    for word in paragraph.split():
        joined = f"{lines[-1]} {word}".strip()
        if face.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = lines[-1] or word
        while face.getlength(lines[-1]) > width and len(lines[-1]) > 1:  # one word wider than the column
            too_long = (k for k in range(2, len(lines[-1]) + 1) if face.getlength(lines[-1][:k]) > width)
            fits = next(too_long) - 1
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def text_height(lines: Sequence[tuple[str, str]]) -> int:
    """Pixels that wrapped lines take."""
    return round(len(lines) * TEXT_SIZE * LEADING)


def draw_text(canvas: Image.Image, corner: tuple[int, int], lines: Sequence[tuple[str, str]]) -> None:
    """Set wrapped lines with their top left at ``corner``."""
    pen = ImageDraw.Draw(canvas)
    for number, (line, colour) in enumerate(lines):
        pen.text((corner[0], corner[1] + round(number * TEXT_SIZE * LEADING)), line, font=font(), fill=colour)
