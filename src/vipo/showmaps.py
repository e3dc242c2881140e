"""Allocation maps of the user's own pictures and clips, as sheets to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from vipo.build import build_structuring
from vipo.files import written_whole
from vipo.recipe import StructuringSection, parse_section
from vipo.report.maps import clip_map_sheet, map_sheet
from vipo.run import components
from vipo.structuring import PerceptualStructuring
from vipo.types import UserError

MAP_SIDE = 64  # map cells along the longer side: fine enough to look at
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")  # what only PyAV reads


def read_media(path: Path) -> Float[Tensor, "3 F Y X"]:
    """A picture or a video file in [0, 1]; a picture has F = 1.

    Raises:
        UserError: it does not exist, is neither, or is a video that needs PyAV.
    """
    if not path.is_file():
        raise UserError(f"picture {str(path)!r} does not exist")
    frames = _video_frames(path) if path.suffix.lower() in VIDEOS else _frames(path)
    pixels = torch.from_numpy(np.stack(frames))
    return pixels.permute(3, 0, 1, 2).float() / 255


def _frames(path: Path) -> list[np.ndarray]:
    """One, or all of an animated WebP, GIF or PNG."""
    try:
        with Image.open(path) as picture:
            return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)]
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def _video_frames(path: Path) -> list[np.ndarray]:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{str(path)!r} needs PyAV to be read; install vipo[video], or give an animated WebP or GIF"
        ) from error
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a video: {error}") from error
    if not frames:
        raise UserError(f"{str(path)!r} holds no frame; give a video with pictures in it")
    return frames


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
    Every file is read before the first sheet is written, so a bad one leaves nothing behind.

    Args:
        temporal_stride: pixel frames per latent frame of a causal video VAE, for clips; 1 shows a map per frame.

    Raises:
        UserError: a file that cannot be read, a clip that does not fit the stride, or an unknown option.
    """
    media = [read_media(path) for path in files]
    for path, clip in zip(files, media, strict=True):
        _check_stride(path, clip.shape[1], temporal_stride)
    options = {"backbone": backbone, "backbone_options": backbone_options, **structuring}
    section = parse_section(StructuringSection, options, source="maps")
    source = build_structuring(section, temporal_stride=temporal_stride, device="cpu")
    written = []
    for path, clip in zip(files, media, strict=True):
        target = output / f"{path.stem}-map.png"
        sheet = _sheet(path.name, clip[None], source)
        with written_whole(target) as aside:
            sheet.save(aside, format="PNG")
        written.append(target)
    return written


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
    return map_sheet(clip[:, :, 0], components(source, clip[:, :, 0]), maps[:, 0], [name])
