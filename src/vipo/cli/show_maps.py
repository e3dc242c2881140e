"""Allocation maps of the user's own pictures and clips, as sheets to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.errors import UserError
from vipo.explorer.look import check_media, map_grid, source_of
from vipo.media.map_sheets import clip_map_sheet, map_sheet
from vipo.media.pictures import save_png
from vipo.media.reading import read_media
from vipo.recipe import parse_section
from vipo.schema import StructuringSection
from vipo.structuring import PerceptualStructuring


def show_maps(
    files: Sequence[Path],
    output: Path,
    *,
    backbone: str,
    backbone_options: dict[str, Any],
    temporal_stride: int = 1,
    **structuring: Any,
) -> list[Path]:
    """Write one sheet per file and return their paths.

    A picture's sheet shows picture, components as colours, map, overlay; a clip's sheet has a column per latent frame.
    Every file is read before the first sheet is written, so a bad one leaves nothing behind; and again for its sheet,
    so that memory holds one at a time. A sheet is called as ``sheet_paths`` says.

    Args:
        temporal_stride: pixel frames per latent frame of a causal video VAE, for clips; 1 shows a map per frame.

    Raises:
        UserError: a file that cannot be read, a clip that does not fit the stride, or an unknown option.
    """
    targets = sheet_paths(files, output)
    for path in files:
        check_media(str(path), read_media(path), temporal_stride)
    options = {"backbone": backbone, "backbone_options": backbone_options, **structuring}
    section = parse_section(StructuringSection, options, source="maps")
    source = source_of(section, temporal_stride)
    for path, target in zip(files, targets, strict=True):
        save_png(target, _sheet(path.name, read_media(path)[None], source))
    return targets


def sheet_paths(files: Sequence[Path], output: Path) -> list[Path]:
    """Where the sheet of each file goes: STEM-map.png, or NAME-map.png (NAME-2-map.png ...) where a stem comes twice.

    Raises:
        UserError: a sheet would take the place of one of the files.
    """
    stems = Counter(_folded(path.stem) for path in files)
    taken = {stem for stem, times in stems.items() if times == 1}
    names = []
    for path in files:
        name = path.stem
        if stems[_folded(name)] > 1:
            name = next(free for free in _names(path.name) if _folded(free) not in taken)
            taken.add(_folded(name))
        names.append(output / f"{name}-map.png")
    overwritten = {path.resolve() for path in files} & {name.resolve() for name in names}
    if overwritten:
        first = str(min(overwritten))
        raise UserError(f"the sheets would overwrite {first!r}, which is one of the files; choose another --output")
    return names


def _folded(name: str) -> str:
    """Some file systems take names that differ in case only for the same."""
    return name.casefold()


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in count(2))


def _sheet(name: str, clip: Float[Tensor, "1 3 F Y X"], source: PerceptualStructuring) -> Image.Image:
    stride = source.temporal_stride
    grid = map_grid(clip[0], stride)
    if clip.shape[2] > 1:
        return clip_map_sheet(clip, source(clip, grid), [name], temporal_stride=stride)
    maps, seen = source.with_seen(clip[0], grid)
    return map_sheet(clip[:, :, 0], seen.components, maps, [name])
