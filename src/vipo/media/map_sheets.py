"""Allocation maps for the eye: picture, components, map, and what the map lights up, one row per sample.

A clip is three rows over its latent frames: the frames, their maps, and what the maps light up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
PRAISE, BLAME = (31, 95, 168), (190, 85, 10)
BAR = (280, 12)  # pixels of a colour bar
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


def signed_heat(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Values in [-1, 1]: blue where they are above 0, orange where below, white at 0; what is not finite is grey."""
    clean = np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=-1.0).clip(-1, 1)
    ends = np.where(clean[..., None] > 0, PRAISE, BLAME)
    colours = (255 + np.abs(clean)[..., None] * (ends - 255.0)).round().astype(np.uint8)
    colours[~np.isfinite(values)] = NO_MAP
    return colours


def map_sheet(
    pictures: Float[Tensor, "N 3 Y X"] | Sequence[Tensor],
    components: Float[Tensor, "N K h w"] | Sequence[Tensor] | None,
    maps: Float[Tensor, "N H W"] | Sequence[Tensor],
    captions: Sequence[str],
    max_rows: int = 8,
    *,
    factors: Mapping[str, Float[Tensor, "N H W"]] | None = None,
    advantages: Sequence[float] | None = None,
    tile: int = TILE,
) -> Image.Image:
    """One row per sample: picture, oriented components as RGB, map, credit, and the picture lit by the map.

    Every map has a colour scale of its own, from 0 to its largest weight, which the caption gives: under one scale for
    all rows a map that peaks would leave the others black.

    Args:
        pictures: in [0, 1]; sequences of (3, Y, X) may differ in size.
        components: z'_j; the first three, each stretched to its own range, are the red, green and blue channel. None
            leaves their column out, for maps that do not come from components.
        maps: the weight M(p) of each position.
        captions: one per picture, or none. max_rows: how many of the first samples are shown.
        factors: the maps whose product ``maps`` is, by name: a column each.
        advantages: A of each sample; adds a column of A M(p), blue where a position is praised, orange where blamed,
            the paler the smaller its A is beside the largest on the sheet.
        tile: longest side of each tile in pixels; the aspect ratio is kept.
    """
    _check(pictures, components, maps, captions, max_rows)
    factors = factors or {}
    shown = range(min(max_rows, len(pictures)))
    most = max((abs(float(advantages[i])) for i in shown), default=0.0) if advantages is not None else 0.0
    rows, labels = [], []
    for i in shown:
        plane = _plane(maps[i])
        parts = None if components is None else components[i]
        advantage = None if advantages is None else float(advantages[i])
        others = [_plane(factor[i]) for factor in factors.values()]
        share = None if advantage is None else advantage / (most or 1.0)
        rows.append(_row(pictures[i], parts, others, plane, share, tile))
        labels.append(_label(captions[i] if captions else "", plane, advantage))
    middle = () if components is None else ("components 1-3 as RGB",)
    named = "map M(p)" if not factors else "M(p), their product"
    credit = () if advantages is None else ("credit A M(p)",)
    grid = paper.labelled_grid(rows, labels, ("picture", *middle, *factors, named, *credit, "what the map lights"))
    return _with_colour_bars(grid, signed=advantages is not None)


def _plane(values: Tensor) -> Float[np.ndarray, "*shape"]:
    return values.detach().float().cpu().numpy()


def coloured(plane: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """By a scale of its own; a map that blames positions as well is shown as credit is."""
    if np.nanmin(plane, initial=0.0) < 0:
        return signed_heat(plane / largest(abs(plane)))
    return heat(plane / largest(plane))


def largest(plane: Float[np.ndarray, "*shape"]) -> float:
    """The largest finite weight; 1 if there is none above 0."""
    return float(plane[np.isfinite(plane)].max(initial=0.0)) or 1.0


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


def _row(
    picture: Tensor,
    components: Tensor | None,
    factors: Sequence[np.ndarray],
    plane: np.ndarray,
    share: float | None,
    tile: int,
) -> list[Image.Image]:
    """``share`` is the sample's advantage as a share of the largest on the sheet."""
    image = fitted(picture, tile)
    cells = [] if components is None else [as_colours(components)]
    cells += [Image.fromarray(coloured(values)) for values in (*factors, plane)]
    cells += [] if share is None else [Image.fromarray(signed_heat(share * plane / largest(abs(plane))))]
    return [image, *(cell.resize(image.size, Image.Resampling.NEAREST) for cell in cells), lit(image, abs(plane))]


def fitted(picture: Float[Tensor, "3 Y X"], tile: int) -> Image.Image:
    """A picture whose longest side is ``tile`` pixels."""
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
    advantages: Sequence[float] | None = None,
) -> Image.Image:
    """Three rows per clip, a column per latent frame (evenly spaced ones of a long clip).

    Args:
        clips: in [0, 1]. maps: the weight M(p) of each position; each clip has its own colour scale, from 0 to its
            largest weight, over all its frames.
        captions: one per clip. max_clips: how many of the first ones are shown.
        temporal_stride: pixel frames per latent frame; F = temporal_stride (T - 1) + 1, as in ``align_frames``.
        advantages: A of each sample; the caption says it.
    """
    frames, expected = clips.shape[2], temporal_stride * (maps.shape[1] - 1) + 1
    if not len(clips) == len(maps) == len(captions) or frames != expected or not len(clips):
        raise ValueError(
            f"clips {tuple(clips.shape)}, maps {tuple(maps.shape)} and {len(captions)} captions do not belong together:"
            f" give one of each per sample, and temporal_stride={temporal_stride} has {expected} frames"
        )
    pairs = spaced(list(enumerate(shown_frames(maps.shape[1], temporal_stride))), MOST_FRAMES)
    rows, labels = [], []
    for i in range(min(max_clips, len(clips))):
        planes = _plane(maps[i])
        rows += _clip_rows(clips[i], planes, pairs)
        advantage = None if advantages is None else float(advantages[i])
        labels += [_label(captions[i], planes, advantage), "\nmap M(p)", "\nwhat the map lights"]
    headings = [f"frame {frame}\nlatent {latent}" for latent, frame in pairs]
    return _with_colour_bars(paper.labelled_grid(rows, labels, headings), signed=False)


def _clip_rows(
    clip: Float[Tensor, "3 F Y X"], planes: Float[np.ndarray, "T H W"], pairs: Sequence[tuple[int, int]]
) -> list[list[Image.Image]]:
    """Frames, maps and lit frames of the (latent frame, pixel frame) ``pairs``."""
    smallest, row = CLIP_TILES
    tile = max(smallest, min(TILE, row // len(pairs)))
    images = [fitted(clip[:, frame], tile) for _, frame in pairs]
    most, colours = largest(abs(planes)), coloured(planes)
    maps = [Image.fromarray(colours[latent]) for latent, _ in pairs]
    return [
        images,
        [plane.resize(image.size, Image.Resampling.NEAREST) for plane, image in zip(maps, images, strict=True)],
        [lit(image, abs(planes[latent]), most) for image, (latent, _) in zip(images, pairs, strict=True)],
    ]


def as_colours(components: Float[Tensor, "K h w"]) -> Image.Image:
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


def _label(caption: str, plane: np.ndarray, advantage: float | None) -> str:
    words = caption if advantage is None else f"{caption}\nadvantage {advantage:+.2f}"
    if not np.isfinite(plane).all():
        return f"{words}\nno map: not finite"
    return f"{words}\nweights {plane.min():.2f} to {plane.max():.2f}, mean {plane.mean():.2f}"


def _with_colour_bars(grid: Image.Image, *, signed: bool) -> Image.Image:
    """The sheet with what its colours mean underneath, in line with the first tile."""
    left, top = paper.MARGIN + paper.LABEL_WIDTH + 2 * paper.GAP, grid.height - paper.GAP
    bars = [(heat(np.linspace(0, 1, BAR[0])), ("0", "largest weight of its own map"))]
    if signed:
        bars.append((signed_heat(np.linspace(-1, 1, BAR[0])), ("blamed", "praised")))
    step = BAR[0] + 4 * paper.GAP
    canvas = Image.new("RGB", (max(grid.width, left + len(bars) * step), grid.height + 44), paper.PAPER)
    canvas.paste(grid, (0, 0))
    for place, (ramp, (low, high)) in enumerate(bars):
        x = left + place * step
        canvas.paste(Image.fromarray(np.broadcast_to(ramp, (BAR[1], *ramp.shape)).copy()), (x, top))
        ends = x + BAR[0] - round(paper.font().getlength(high))
        for at, text in ((x, low), (ends, high)):
            paper.draw_text(canvas, (at, top + BAR[1] + 4), [(text, paper.MUTED)])
    return canvas
