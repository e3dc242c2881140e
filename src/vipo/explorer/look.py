"""A file and settings to what the eye needs: components, their shares of the variance, map, overlay, what changed."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.backbones.perceptual import perceptual
from vipo.errors import UserError
from vipo.explorer.settings import Settings, changed, chosen_of, recipe_lines
from vipo.files import write_text
from vipo.media.map_sheets import (
    as_colours,
    clip_map_sheet,
    fitted,
    heat,
    largest,
    lit,
    map_sheet,
    shown_frames,
    signed_heat,
)
from vipo.media.pictures import save_png
from vipo.media.reading import read_media
from vipo.schema import StructuringSection
from vipo.structuring import PerceptualStructuring
from vipo.structuring.frames import flicker
from vipo.types import Backbone

MAP_SIDE = 64  # map cells along the longer side: fine enough to look at
SHORTEST = 8  # pixels of a side; fewer have no structure to speak of
TILE = 448  # pixels of a picture's longer side on the page


@dataclass(frozen=True)
class Looked:
    """One file under one choice of settings.

    Args:
        clip: the file's frames in [0, 1].
        maps: M of each latent frame. components: z'_j of the frame that is shown for each latent frame, with
            ``explained``, the lambda_j.
        frames: which pixel frame that is.
    """

    name: str
    settings: Settings
    clip: Float[Tensor, "3 F Y X"]
    maps: Float[Tensor, "T H W"]
    components: Float[Tensor, "T K h w"]
    explained: Float[Tensor, "T K"]
    frames: tuple[int, ...]
    seconds: float


def look(name: str, clip: Float[Tensor, "3 F Y X"], settings: Settings) -> Looked:
    """Ask the backbone and make the map, as ``vipo maps`` does.

    Raises:
        UserError: a clip that does not fit the stride, or a backbone that cannot be had.
    """
    check_media(name, clip, settings.temporal_stride)
    begun, source = time.perf_counter(), kept_source(settings)
    maps, seen = source.with_seen(clip, map_grid(clip, settings.temporal_stride))
    frames = shown_frames(len(maps), settings.temporal_stride)
    taken = time.perf_counter() - begun
    return Looked(name, settings, clip, maps, seen.components[frames], seen.explained[frames], tuple(frames), taken)


def source_of(section: StructuringSection, temporal_stride: int) -> PerceptualStructuring:
    """The map source that these settings name, on the CPU."""
    return perceptual(
        section.backbone, section.backbone_options, section, temporal_stride=temporal_stride, device="cpu"
    )


def kept_source(settings: Settings) -> PerceptualStructuring:
    """The same, with the networks of the last backbones kept for the next call."""
    section = settings.structuring
    network = _network(section.backbone, json.dumps(dict(section.backbone_options), sort_keys=True))
    options: dict[str, Any] = {k: v for k, v in chosen_of(section).items() if not k.startswith("backbone")}
    return PerceptualStructuring(network, temporal_stride=settings.temporal_stride, **options)


@lru_cache(maxsize=2)
def _network(backbone: str, options: str) -> Backbone:
    return source_of(StructuringSection(backbone=backbone, backbone_options=json.loads(options)), 1).backbone


def map_grid(clip: Float[Tensor, "3 F Y X"], temporal_stride: int) -> tuple[int, int, int]:
    """Latent frames, and cells of a map that is fine enough to look at."""
    frames, height, width = clip.shape[1:]
    scale = MAP_SIDE / max(height, width)
    return (frames - 1) // temporal_stride + 1, max(1, round(height * scale)), max(1, round(width * scale))


def check_media(name: str, clip: Float[Tensor, "3 F Y X"], stride: int) -> None:
    """Raises:
    UserError: a picture too small for a map, or a clip that does not fit the stride.
    """
    frames, height, width = clip.shape[1:]
    if min(height, width) < SHORTEST:
        raise UserError(
            f"{name!r} is {width} x {height} pixels, but a map needs at least {SHORTEST} a side; give a larger one"
        )
    if (frames - 1) % stride:
        fits = (frames - 1) // stride * stride + 1
        raise UserError(
            f"{name!r} has {frames} frames, but with a temporal stride of {stride} a clip has one more than a"
            f" multiple of {stride}; cut it to {fits} frames, or use a temporal stride of 1"
        )


def read(path: Path) -> Float[Tensor, "3 F Y X"]:
    """A file's frames.

    Raises:
        UserError: it cannot be read, or is too small for a map.
    """
    clip = read_media(path)
    check_media(str(path), clip, 1)
    return clip


def picture(looked: Looked, latent: int) -> Image.Image:
    return fitted(looked.clip[:, looked.frames[latent]], TILE)


def _as_large(small: Image.Image, as_this: Image.Image) -> Image.Image:
    return small.resize(as_this.size, Image.Resampling.NEAREST)


def map_picture(looked: Looked, latent: int) -> Image.Image:
    """M, the colours from 0 to the largest weight of all frames."""
    planes = looked.maps.numpy()
    return _as_large(Image.fromarray(heat(planes[latent] / largest(planes))), picture(looked, latent))


def overlay(looked: Looked, latent: int) -> Image.Image:
    """The picture where the map is large, dark where it is small."""
    planes = looked.maps.numpy()
    return lit(picture(looked, latent), planes[latent], largest(planes))


def component_picture(looked: Looked, latent: int, number: int | None) -> Image.Image:
    """z'_j, or the first three as red, green and blue."""
    parts = looked.components[latent]
    shown = as_colours(parts) if number is None else Image.fromarray(heat(parts[number].float().numpy()))
    return _as_large(shown, picture(looked, latent))


def shares(looked: Looked, latent: int) -> list[float]:
    """lambda_j of each component, of 1."""
    return [float(value) for value in looked.explained[latent]]


def weights(looked: Looked) -> str:
    """The map in numbers."""
    planes = looked.maps
    words = f"weights {planes.min():.2f} to {planes.max():.2f}, mean {planes.mean():.2f}"
    half = _half_of(planes.flatten())
    words += f"; half of the credit lies on {half:.0%} of the positions"
    return words + (f"; flicker {float(flicker(planes[None])[0]):.2f}" if len(planes) > 1 else "")


def _half_of(values: Float[Tensor, " n"]) -> float:
    """The smallest share of positions that holds half of all weight."""
    ordered = values.double().sort(descending=True).values.cumsum(0)
    return (int((ordered < ordered[-1] / 2).sum()) + 1) / len(values)


@dataclass(frozen=True)
class Change:
    """From one look at a file to the next.

    Args:
        settings: what was chosen otherwise, in words.
        moved: mean |M' - M| over the mean of M. agreement: correlation of the two maps; NaN of a map of ones.
        difference: M' - M of each latent frame; None where the maps have other shapes.
    """

    settings: tuple[str, ...]
    moved: float
    agreement: float
    difference: Float[Tensor, "T H W"] | None


def change(before: Looked, after: Looked) -> Change:
    """What another choice of settings did to the map of the same file."""
    told = tuple(changed(before.settings, after.settings))
    if before.maps.shape != after.maps.shape:
        return Change(told, math.nan, math.nan, None)
    old, new = before.maps.double(), after.maps.double()
    flat = torch.stack([old.flatten(), new.flatten()])
    there = bool((flat.std(1, correction=0) > 0).all())
    agreement = float(torch.corrcoef(flat)[0, 1]) if there else math.nan
    moved = float((new - old).abs().mean() / old.mean()) if float(old.mean()) > 0 else math.nan
    return Change(told, moved, agreement, after.maps - before.maps)


def difference_picture(looked: Looked, difference: Float[Tensor, "T H W"], latent: int) -> Image.Image:
    """Blue where the map rose, orange where it fell."""
    planes = difference.numpy()
    shown = Image.fromarray(signed_heat(planes[latent] / largest(np.abs(planes))))
    return _as_large(shown, picture(looked, latent))


def sheet(looked: Looked) -> Image.Image:
    """The sheet that ``vipo maps`` writes."""
    if looked.clip.shape[1] > 1:
        stride = looked.settings.temporal_stride
        return clip_map_sheet(looked.clip[None], looked.maps[None], [looked.name], temporal_stride=stride)
    return map_sheet(looked.clip[None, :, 0], looked.components[:1], looked.maps[:1], [looked.name])


def save(looked: Looked, folder: Path) -> list[Path]:
    """Write the sheet and the recipe lines under the first names that are free; where they are."""
    stem = Path(looked.name).stem or "picture"
    names = (f"{stem}-map{'' if number == 1 else f'-{number}'}" for number in range(1, 1 << 20))
    free = next(name for name in names if not any((folder / f"{name}{end}").exists() for end in (".png", ".yaml")))
    picture_file, lines_file = folder / f"{free}.png", folder / f"{free}.yaml"
    save_png(picture_file, sheet(looked))
    write_text(lines_file, recipe_lines(looked.settings.structuring))
    return [picture_file, lines_file]
