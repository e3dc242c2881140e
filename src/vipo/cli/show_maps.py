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

from vipo.backbones.perceptual import perceptual
from vipo.errors import UserError
from vipo.media.map_sheets import clip_map_sheet, map_sheet
from vipo.media.pictures import save_png
from vipo.media.reading import read_media
from vipo.recipe import parse_section
from vipo.schema import StructuringSection
from vipo.structuring import PerceptualStructuring, oriented_components

MAP_SIDE = 64  # map cells along the longer side: fine enough to look at
SHORTEST = 8  # pixels of a side; fewer have no structure to speak of


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
        _check(path, read_media(path), temporal_stride)
    options = {"backbone": backbone, "backbone_options": backbone_options, **structuring}
    section = parse_section(StructuringSection, options, source="maps")
    source = perceptual(
        section.backbone, section.backbone_options, section, temporal_stride=temporal_stride, device="cpu"
    )
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


def _check(path: Path, clip: Float[Tensor, "3 F Y X"], stride: int) -> None:
    frames, height, width = clip.shape[1:]
    if min(height, width) < SHORTEST:
        raise UserError(
            f"{str(path)!r} is {width} x {height} pixels, but a map needs at least {SHORTEST} a side; give a larger one"
        )
    _check_stride(path, frames, stride)


def _check_stride(path: Path, frames: int, stride: int) -> None:
    if (frames - 1) % stride:
        fits = (frames - 1) // stride * stride + 1
        raise UserError(
            f"{str(path)!r} has {frames} frames, but with a temporal stride of {stride} a clip has one more than a"
            f" multiple of {stride}; cut it to {fits} frames, or use a temporal stride of 1"
        )


def _sheet(name: str, clip: Float[Tensor, "1 3 F Y X"], source: PerceptualStructuring) -> Image.Image:
    frames, height, width = clip.shape[2:]
    scale = MAP_SIDE / max(height, width)
    stride = source.temporal_stride
    grid = ((frames - 1) // stride + 1, max(1, round(height * scale)), max(1, round(width * scale)))
    maps = source(clip, grid)
    if frames > 1:
        return clip_map_sheet(clip, maps, [name], temporal_stride=stride)
    return map_sheet(clip[:, :, 0], oriented_components(source, clip[:, :, 0]), maps[:, 0], [name])
