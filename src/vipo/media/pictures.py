"""Pictures on disk and on paper: lossless contact sheets for programs, labelled grids for people.

A contact sheet is tiles row by row without padding, beside it a JSON file that names them. A clip is a row of its own,
with its frames as columns. Whoever reads a sheet back gets the very bytes that were scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vipo.errors import UserError
from vipo.files import write_text, written_whole

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


def contact_sheet(media: Media, columns: int) -> Image.Image:
    """Pictures as tiles, row by row, no padding between them; a clip is a row of frames. Places left over are black."""
    tiles = to_uint8(media).reshape(-1, *media.shape[3:], 3)
    columns = media.shape[2] if media.shape[2] > 1 else columns
    count, height, width = tiles.shape[:3]
    if count == 0 or columns < 1:
        raise ValueError(f"a sheet needs at least 1 picture and 1 column, not {count} and {columns}")
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * columns, height, width, 3), np.uint8)
    canvas[:count] = tiles
    grid = canvas.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(grid.reshape(rows * height, columns * width, 3))


def save_sheet(
    path: Path,
    media: Media,
    columns: int,
    prompts: Sequence[str],
    scores: Mapping[str, Sequence[float] | Tensor],
) -> None:
    """Write ``path`` (PNG) and the JSON of the same name. A score that is not finite becomes null.

    Args:
        columns: pictures in a row; clips have one column per frame instead, and the JSON says how many ``frames``.

    Raises:
        ValueError: prompts or scores that are not one per picture.
    """
    listed = {name: _plain(values) for name, values in scores.items()}
    for name, values in {"prompts": prompts, **listed}.items():
        if len(values) != len(media):
            raise ValueError(f"{len(values)} entries of {name!r} for {len(media)} pictures: give one per picture")
    sheet, tile = contact_sheet(media, columns), [int(side) for side in media.shape[-2:]]
    frames = media.shape[2]
    layout = {"columns": columns, "tile": tile} if frames == 1 else {"columns": frames, "tile": tile, "frames": frames}
    info = {**layout, "prompts": [str(prompt) for prompt in prompts], "scores": listed}
    write_text(path.with_suffix(".json"), json.dumps(info, ensure_ascii=False))
    save_png(path, sheet)


def _plain(values: Sequence[float] | Tensor) -> list[float | None]:
    numbers = values.tolist() if isinstance(values, Tensor) else [float(value) for value in values]
    return [number if math.isfinite(number) else None for number in numbers]


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as a whole or not at all."""
    with written_whole(path) as aside:
        picture.save(aside, format="PNG")


def load_sheet(path: Path) -> tuple[list[Image.Image], dict[str, Any]]:
    """The tiles of a contact sheet in the order they were given, and the JSON beside it.

    If the JSON has ``frames``, a tile is a clip: that many frames side by side, see ``vipo.media.clips.cut``.

    Raises:
        UserError: one of the two files is missing, damaged, or they do not belong together.
    """
    try:
        info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        (height, width), columns, count = info["tile"], info["columns"], len(info["prompts"])
        width, columns = width * info.get("frames", 1), columns // info.get("frames", 1)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"contact sheet {str(path)!r} cannot be read: {error}") from error
    sheet = open_sheet(path)
    if sheet.size != (columns * width, math.ceil(count / columns) * height):
        raise UserError(f"contact sheet {str(path)!r} is {sheet.size} pixels, which its JSON file does not describe")
    corners = [((i % columns) * width, (i // columns) * height) for i in range(count)]
    with _of_any_size():
        return [sheet.crop((x, y, x + width, y + height)) for x, y in corners], info


def open_sheet(path: Path) -> Image.Image:
    """A sheet that we wrote, of any size.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with _of_any_size(), Image.open(path) as opened:
            return opened.convert("RGB")
    except Exception as error:  # of a damaged file, parsers raise what they like
        raise UserError(f"sheet {str(path)!r} cannot be read: {error}") from error


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Without Pillow's bound on pixels: it guards against hostile files, and sheets of clips exceed it."""
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = bound


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
