"""Allocation maps for the eye: picture, components, map, and what the map lights up, one row per sample.

A clip is three rows over its latent frames: the frames, their maps, and what the maps light up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vipo.media import pictures as paper
from vipo.media.clips import spaced

TILE, CLIP_TILES = 192, (64, 1536)  # pixels of a tile; of a clip's: at least, and all of a row together
MOST_FRAMES = 24  # columns of a clip
DIM = 0.22  # brightness of what a map leaves unlit
NO_MAP = (226, 227, 230)
MAGMA = (
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779"
    " d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 fcfdbf"
)
"""17 equidistant colours of matplotlib's magma (CC0): as bright as the value is large."""


def heat(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Values in [0, 1] to magma; what is not finite is grey."""
    stops = np.array([tuple(bytes.fromhex(code)) for code in MAGMA.split()], np.float64)
    clean = np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0)
    channels = [np.interp(clean, np.linspace(0, 1, len(stops)), stops[:, k]) for k in range(3)]
    colours = np.stack(channels, -1).round().astype(np.uint8)
    colours[~np.isfinite(values)] = NO_MAP
    return colours


def map_sheet(
    pictures: Float[Tensor, "N 3 Y X"] | Sequence[Tensor],
    components: Float[Tensor, "N K h w"] | Sequence[Tensor] | None,
    maps: Float[Tensor, "N H W"] | Sequence[Tensor],
    captions: Sequence[str],
    max_rows: int = 8,
    *,
    tile: int = TILE,
) -> Image.Image:
    """One row per sample: picture, oriented components as RGB, map, and the picture lit by the map.

    Args:
        pictures: in [0, 1]; sequences of (3, Y, X) may differ in size.
        components: z'_j; the first three, each stretched to its own range, are the red, green and blue channel. None
            leaves their column out, for maps that do not come from components.
        maps: the weight M(p) of each position. The colour scale is one for all rows and starts at 0.
        captions: one per picture, or none. max_rows: how many of the first samples are shown.
        tile: longest side of each tile in pixels; the aspect ratio is kept.
    """
    _check(pictures, components, maps, captions, max_rows)
    shown = min(max_rows, len(pictures))
    arrays = [plane.detach().float().cpu().numpy() for plane in maps[:shown]]
    top = max((float(plane[np.isfinite(plane)].max(initial=0.0)) for plane in arrays), default=0.0) or 1.0
    parts = [None] * shown if components is None else components
    rows = [_row(pictures[i], parts[i], arrays[i], top, tile) for i in range(shown)]
    labels = [_label(captions[i] if captions else "", arrays[i]) for i in range(shown)]
    middle = () if components is None else ("components 1-3 as RGB",)
    headings = ("picture", *middle, "map M(p)", "what the map lights")
    grid = paper.labelled_grid(rows, labels, headings)
    return _with_colour_bar(grid, top)


def _check(
    pictures: Tensor | Sequence[Tensor],
    components: Tensor | Sequence[Tensor] | None,
    maps: Tensor | Sequence[Tensor],
    captions: Sequence[str],
    rows: int,
) -> None:
    components = [torch.zeros(1, 1, 1)] * len(maps) if components is None else components
    counts = len(pictures), len(components), len(maps)
    if len(set(counts)) > 1 or (captions and len(captions) != counts[0]):
        raise ValueError(f"{counts} pictures, components and maps with {len(captions)} captions: give one per sample")
    if not counts[0] or rows < 1:
        raise ValueError(f"a map sheet needs at least 1 sample and 1 row, not {counts[0]} and {rows}")
    shapes = tuple(pictures[0].shape), tuple(components[0].shape), tuple(maps[0].shape)
    if tuple(map(len, shapes)) != (3, 3, 2) or shapes[0][0] != 3:
        raise ValueError(f"one sample has shapes {shapes}; give pictures (3, Y, X), components (K, h, w), maps (H, W)")


def _row(picture: Tensor, components: Tensor | None, plane: np.ndarray, top: float, tile: int) -> list[Image.Image]:
    image = _fitted(picture, tile)
    middle = [] if components is None else [_components(components).resize(image.size, Image.Resampling.NEAREST)]
    return [
        image,
        *middle,
        Image.fromarray(heat(plane / top)).resize(image.size, Image.Resampling.NEAREST),
        lit(image, plane),
    ]


def _fitted(picture: Float[Tensor, "3 Y X"], tile: int) -> Image.Image:
    image = Image.fromarray(paper.to_uint8(picture[None, :, None])[0, 0])
    factor = tile / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def shown_frames(latent_frames: int, temporal_stride: int) -> list[int]:
    """The pixel frame that is shown for each latent frame: 0 for the first, then the middle of s(k-1)+1 .. sk."""
    return [max(0, temporal_stride * k - temporal_stride // 2) for k in range(latent_frames)]


def clip_map_sheet(
    clips: Float[Tensor, "N 3 F Y X"],
    maps: Float[Tensor, "N T H W"],
    captions: Sequence[str],
    max_clips: int = 3,
    *,
    temporal_stride: int,
) -> Image.Image:
    """Three rows per clip, a column per latent frame (evenly spaced ones of a long clip).

    Args:
        clips: in [0, 1]. maps: the weight M(p) of each position; the colour scale is one for the sheet and starts at 0,
            what is fully lit is the clip's largest weight.
        captions: one per clip. max_clips: how many of the first ones are shown.
        temporal_stride: pixel frames per latent frame; F = temporal_stride (T - 1) + 1, as in ``align_frames``.
    """
    frames, expected = clips.shape[2], temporal_stride * (maps.shape[1] - 1) + 1
    if not len(clips) == len(maps) == len(captions) or frames != expected or not len(clips):
        raise ValueError(
            f"clips {tuple(clips.shape)}, maps {tuple(maps.shape)} and {len(captions)} captions do not belong together:"
            f" give one of each per sample, and temporal_stride={temporal_stride} has {expected} frames"
        )
    pairs = spaced(list(enumerate(shown_frames(maps.shape[1], temporal_stride))), MOST_FRAMES)
    planes = maps[:max_clips].detach().float().cpu().numpy()
    top = float(planes[np.isfinite(planes)].max(initial=0.0)) or 1.0
    rows, labels = [], []
    for clip, plane, caption in zip(clips, planes, captions, strict=False):
        rows += _clip_rows(clip, plane, pairs, top)
        labels += [_label(caption, plane), "\nmap M(p)", "\nwhat the map lights"]
    headings = [f"frame {frame}\nlatent {latent}" for latent, frame in pairs]
    return _with_colour_bar(paper.labelled_grid(rows, labels, headings), top)


def _clip_rows(
    clip: Float[Tensor, "3 F Y X"], planes: Float[np.ndarray, "T H W"], pairs: Sequence[tuple[int, int]], top: float
) -> list[list[Image.Image]]:
    """Frames, maps and lit frames of the (latent frame, pixel frame) ``pairs``."""
    smallest, row = CLIP_TILES
    tile = max(smallest, min(TILE, row // len(pairs)))
    images = [_fitted(clip[:, frame], tile) for _, frame in pairs]
    most = float(planes[np.isfinite(planes)].max(initial=0.0))
    maps = [Image.fromarray(heat(planes[latent] / top)) for latent, _ in pairs]
    return [
        images,
        [plane.resize(image.size, Image.Resampling.NEAREST) for plane, image in zip(maps, images, strict=True)],
        [lit(image, planes[latent], most) for image, (latent, _) in zip(images, pairs, strict=True)],
    ]


def _components(components: Float[Tensor, "K h w"]) -> Image.Image:
    """The first three components, each from its minimum to its maximum; a missing or flat one is black."""
    flat = components[:3].detach().float().nan_to_num(0.0).cpu().flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    unit = ((flat - low) / (high - low).clamp_min(1e-12)).reshape(-1, *components.shape[1:])
    filled = torch.cat([unit, unit.new_zeros(3 - len(unit), *unit.shape[1:])])
    return Image.fromarray(paper.to_uint8(filled[None, :, None])[0, 0])


def lit(picture: Image.Image, plane: Float[np.ndarray, "H W"], most: float | None = None) -> Image.Image:
    """The picture where the map is at its maximum, or at ``most``; dark grey where it is 0, mixed in between."""
    finite = np.nan_to_num(plane, nan=0.0, posinf=0.0, neginf=0.0)
    share = Image.fromarray((finite / ((finite.max() if most is None else most) or 1.0) * 255).round().astype(np.uint8))
    mask = share.resize(picture.size, Image.Resampling.BILINEAR)
    unlit = picture.convert("L").point(lambda level: round(level * DIM)).convert("RGB")
    return Image.composite(picture.convert("RGB"), unlit, mask)


def _label(caption: str, plane: np.ndarray) -> str:
    if not np.isfinite(plane).all():
        return f"{caption}\nno map: not finite"
    return f"{caption}\nmin {plane.min():.2f}, mean {plane.mean():.2f}, max {plane.max():.2f}"


def _with_colour_bar(grid: Image.Image, top: float) -> Image.Image:
    """The sheet with its colour scale underneath, in line with the first tile."""
    left, width, height = paper.MARGIN + paper.LABEL_WIDTH + 2 * paper.GAP, 320, 12
    canvas = Image.new("RGB", (grid.width, grid.height + 44), paper.PAPER)
    canvas.paste(grid, (0, 0))
    ramp = heat(np.broadcast_to(np.linspace(0, 1, width), (height, width)))
    y = grid.height - paper.GAP
    canvas.paste(Image.fromarray(ramp), (left, y))
    paper.draw_text(canvas, (paper.MARGIN, y - 4), [("map M(p), all rows", paper.MUTED)])
    for share in (0.0, 0.5, 1.0):
        text = f"{share * top:.2f}" if share else "0"
        place = left + round(share * (width - paper.font().getlength(text)))
        paper.draw_text(canvas, (place, y + height + 4), [(text, paper.MUTED)])
    return canvas
