"""Contact sheets: every sample of an evaluation in one PNG, under its prompt, and a JSON file that finds each tile.

The samples of a prompt stand side by side; a clip is its frames side by side. The tiles are untouched: whoever reads a
sheet back gets the very bytes that were scored; both files have a checksum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vipo.errors import UserError
from vipo.files import SEAL, is_intact, sealed, sha256, write_text
from vipo.media.pictures import MARGIN, PAPER, Media, draw_text, save_png, text_height, to_bytes, to_uint8, wrapped

MOST_PIXELS = 1 << 26  # on a sheet of samples, 64 pictures of 1024 x 1024; later ones are files alone
MOST_FRAMES = 8  # of a clip on it: it is there to be looked through, and each clip is a file that plays
NARROWEST = 160  # pixels of a group of tiles: narrower ones leave no room for their prompt
BETWEEN, APART = 4, 16  # pixels between the tiles of a group, and between groups
LINES = 2  # of a prompt; the JSON has all of it

Corner = tuple[int, int]


def contact_sheet(media: Media, prompts: Sequence[str]) -> tuple[Image.Image, list[Corner]]:
    """The sheet, and the top left corner of each tile. A tile is a picture, or a clip's frames from left to right.

    Args:
        prompts: one per sample; neighbours that share theirs stand side by side under it.
    """
    strips = _strips(to_uint8(media))
    height, width = strips.shape[1:3]
    groups = [(prompt, list(rows)) for prompt, rows in groupby(range(len(strips)), lambda row: prompts[row])]
    cell = max(NARROWEST, (width + BETWEEN) * max(len(rows) for _, rows in groups) - BETWEEN)
    captions = [_caption(prompt, cell) for prompt, _ in groups]
    band = max(text_height(lines) for lines in captions) + BETWEEN
    columns = max(1, round(math.sqrt(len(groups) * (band + height) / cell)))
    canvas = Image.new("RGB", _size(len(groups), columns, cell, band + height), PAPER)
    corners: list[Corner] = []
    for place, ((_, rows), lines) in enumerate(zip(groups, captions, strict=True)):
        x = MARGIN + place % columns * (cell + APART)
        y = MARGIN + place // columns * (band + height + APART) + band
        draw_text(canvas, (x, y - BETWEEN - text_height(lines)), lines)
        for k, row in enumerate(rows):
            corners.append((x + k * (width + BETWEEN), y))
            canvas.paste(Image.fromarray(strips[row]), corners[-1])
    return canvas, corners


def _strips(frames: UInt8[np.ndarray, "N F Y X 3"]) -> UInt8[np.ndarray, "N Y FX 3"]:
    if not len(frames):
        raise ValueError("a sheet needs at least 1 picture, not 0")
    count, _, height = frames.shape[:3]
    return np.ascontiguousarray(frames.transpose(0, 2, 1, 3, 4).reshape(count, height, -1, 3))


def _caption(prompt: str, width: int) -> list[tuple[str, str]]:
    lines = wrapped(" ".join(prompt.split()), width)
    if len(lines) > LINES:
        last, colour = lines[LINES - 1]
        lines = [*lines[: LINES - 1], (f"{last[:-3]}...", colour)]
    return lines


def _size(cells: int, columns: int, width: int, height: int) -> tuple[int, int]:
    rows = math.ceil(cells / columns)
    return 2 * MARGIN + columns * (width + APART) - APART, 2 * MARGIN + rows * (height + APART) - APART


def save_sheet(
    path: Path, media: Media, prompts: Sequence[str], scores: Mapping[str, Sequence[float] | Tensor]
) -> None:
    """Write ``path`` (PNG) and the JSON of the same name. A score that is not finite becomes null.

    Raises:
        ValueError: prompts or scores that are not one per picture.
    """
    listed = {name: _plain(values) for name, values in scores.items()}
    for name, values in {"prompts": prompts, **listed}.items():
        if len(values) != len(media):
            raise ValueError(f"{len(values)} entries of {name!r} for {len(media)} pictures: give one per picture")
    texts = [str(prompt) for prompt in prompts]
    sheet, corners = contact_sheet(media, texts)
    frames, *tile = map(int, media.shape[2:])
    info = {"tile": tile, "frames": frames, "corners": corners, "prompts": texts, "scores": listed}
    save_png(path, sheet)
    write_text(path.with_suffix(".json"), json.dumps(sealed({**info, "picture": sha256(path)}), ensure_ascii=False))


class FirstSamples:
    """Samples on their way to files, of which the first that fit make one sheet with their prompts."""

    def __init__(self) -> None:
        self._tiles: list[UInt8[Tensor, "n 3 f Y X"]] = []
        self._texts: list[str] = []
        self._room: int | None = None  # of samples; known with the first

    @property
    def is_full(self) -> bool:
        """Whether what is added now is shown no more."""
        return self._room is not None and len(self._texts) >= self._room

    def add(self, media: Float[Tensor, "N 3 F Y X"], texts: Sequence[str]) -> None:
        """Further ones, of the same size; of a clip, frames from its first to its last."""
        frames = torch.linspace(0, media.shape[2] - 1, min(MOST_FRAMES, media.shape[2])).round().long()
        if self._room is None:
            self._room = max(1, MOST_PIXELS // (len(frames) * media.shape[-2] * media.shape[-1]))
        left = self._room - len(self._texts)
        if left > 0:
            self._tiles.append(to_bytes(media[:left, :, frames.to(media.device)]).cpu())
            self._texts += texts[:left]

    def save(self, path: Path) -> int:
        """Write the sheet and its JSON; how many samples it shows."""
        save_sheet(path, torch.cat(self._tiles), self._texts, {})
        return len(self._texts)


def _plain(values: Sequence[float] | Tensor) -> list[float | None]:
    numbers = values.tolist() if isinstance(values, Tensor) else [float(value) for value in values]
    return [number if math.isfinite(number) else None for number in numbers]


def load_sheet(path: Path) -> tuple[list[Image.Image], dict[str, Any]]:
    """The tiles of a contact sheet in the order they were given, and the JSON beside it.

    A tile of more than one of the JSON's ``frames`` is a clip, side by side, see ``vipo.media.clips.cut``.

    Raises:
        UserError: one of the two files is missing, damaged, or they do not belong together.
    """
    try:
        info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if SEAL not in info or not is_intact(info) or info["picture"] != sha256(path):
            raise ValueError("the picture or its JSON file is not as it was written")
        (height, width), frames = map(int, info["tile"]), int(info["frames"])
        boxes = [(int(x), int(y), int(x) + frames * width, int(y) + height) for x, y in info["corners"]]
        if len(boxes) != len(info["prompts"]) or min(height, width, frames) < 1:
            raise ValueError(f"{len(boxes)} tiles of {frames} x {height} x {width} for {len(info['prompts'])} prompts")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"contact sheet {str(path)!r} cannot be read: {error}") from error
    sheet = open_sheet(path)
    with _of_any_size():
        return [sheet.crop(box) for box in boxes], info


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
