"""Pictures, clips and videos from outside, as a viewer shows them: the one place where their files are decoded.

A picture is turned as its EXIF says, and laid over white where it is transparent. Levels become [0, 1]: 8 bits by 255,
16 bits by 65535; floats in [0, 1] stay, any other range is stretched to it. At most ``MOST_PIXELS`` are decoded, over
all frames, so that a small file cannot take a large memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from vipo.errors import UserError

MOST_FRAMES = 1024  # of an animation or a video
MOST_PIXELS = 2**26  # 8192 x 8192, or 160 frames of 832 x 480: 0.8 GB as float32
VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")  # what only PyAV reads
CLIPS = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # formats whose pictures are frames; those of others are previews
KINDS = {"picture": "PNG, JPEG, WebP, GIF, TIFF or BMP", "video": "mp4 or webm"}
DEEPEST = 65535  # the largest level of 16 bits


def read_media(path: Path) -> Float[Tensor, "3 F Y X"]:
    """A picture or a video file in [0, 1]; a picture has F = 1.

    Raises:
        UserError: it does not exist, is neither, is too large, or is a video that needs PyAV.
    """
    if not path.is_file():
        raise UserError(f"picture {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}; give a file")
    return _video(path) if path.suffix.lower() in VIDEOS else _picture(path)


def _picture(path: Path) -> Float[Tensor, "3 F Y X"]:
    with _told(path, "picture"), opened(path) as picture:
        return _levels(_frames(picture))


def _video(path: Path) -> Float[Tensor, "3 F Y X"]:
    try:
        import av
    except ImportError as error:
        raise UserError(
            f"{str(path)!r} needs PyAV to be read: pip install 'vipo[video]', or give an animated WebP or GIF"
        ) from error
    frames, room = [], Room()
    with _told(path, "video"), av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = frame.to_ndarray(format="rgb24")
            room.take(pixels.shape[1], pixels.shape[0])
            frames.append(np.rot90(pixels, frame.rotation // 90))  # both count counterclockwise
        return _levels(frames)


class UnfitError(ValueError):
    """A file that can be decoded but is not taken: why, and what to do."""


@contextmanager
def _told(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except UnfitError as error:
        raise UserError(f"{str(path)!r} is not taken: {error}") from error
    except Exception as error:  # the bytes are a stranger's, and parsers raise what they like
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{str(path)!r} cannot be read as a {kind}: {why}; give a whole {KINDS[kind]}") from error


class Room:
    """How many pixels may still be decoded."""

    def __init__(self) -> None:
        self.frames = self.pixels = 0

    def take(self, width: int, height: int) -> None:
        """Raises:
        UnfitError: with this frame it is more than ``MOST_PIXELS``, or ``MOST_FRAMES``.
        """
        self.frames, self.pixels = self.frames + 1, self.pixels + width * height
        if self.frames > MOST_FRAMES:
            raise UnfitError(f"it has more than the {MOST_FRAMES} frames that are read at most; cut it")
        if self.pixels > MOST_PIXELS:
            each, cut = (f" in each of its first {self.frames} frames", " or cut it") if self.frames > 1 else ("", "")
            raise UnfitError(
                f"it has {width} x {height} pixels{each}, but at most {MOST_PIXELS} are read; make it smaller{cut}"
            )


@contextmanager
def opened(source: Path | BytesIO, formats: list[str] | None = None) -> Iterator[Image.Image]:
    """A picture of a size that may be decoded; its pixels are not decoded yet.

    Raises:
        UnfitError: it has more than ``MOST_PIXELS``. Whatever Pillow raises about a file that it cannot read.
    """
    try:
        with Image.open(source, formats=formats) as picture:
            Room().take(picture.width, picture.height)
            yield picture
    except Image.DecompressionBombError as error:
        raise UnfitError(f"it has more than the {MOST_PIXELS} pixels that are read at most; make it smaller") from error


def _frames(picture: Image.Image) -> list[np.ndarray]:
    """One picture, or all of an animation or a TIFF."""
    if picture.format not in CLIPS:
        return [pixels_of(picture)]
    still = bool(picture.info.get("default_image"))  # of an animated PNG, for readers that know no animation
    room, frames = Room(), []
    for frame in ImageSequence.Iterator(picture):
        room.take(frame.width, frame.height)
        frames.append(pixels_of(frame))
    return frames[still:]


def pixels_of(picture: Image.Image) -> np.ndarray:
    """What the picture shows: (Y, X, 3) uint8, or (Y, X) levels of any range for the modes of more than 8 bits."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode[0] in "IF":
        return _keyed(np.asarray(upright), upright.info.get("transparency"))
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return np.asarray(upright.convert("RGB"))


def _keyed(levels: np.ndarray, transparent: object) -> np.ndarray:
    """White where a 16-bit PNG has the one level that stands for transparent."""
    return np.where(levels == transparent, DEEPEST, levels) if isinstance(transparent, int) else levels


def _levels(frames: Sequence[np.ndarray]) -> Float[Tensor, "3 F Y X"]:
    kinds = {(frame.shape[1::-1], frame.dtype.itemsize) for frame in frames}
    if len(kinds) > 1:
        sizes = " and ".join(sorted({f"{width} x {height}" for (width, height), _ in kinds}))
        raise UnfitError(f"its {len(frames)} pictures differ in size or depth ({sizes}); give each as a file")
    if not frames:
        raise UnfitError("it holds no frame; give a video with pictures in it")
    if frames[0].dtype == np.uint8:
        height, width = frames[0].shape[:2]
        levels = torch.empty(3, len(frames), height, width)
        for place, frame in enumerate(frames):  # as float32 they take four times as much: they are there once
            levels[:, place] = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
        return levels.div_(255)
    stacked = np.stack(frames)
    return torch.from_numpy(_by_range(stacked)).expand(3, *stacked.shape)


def _by_range(levels: np.ndarray) -> Float[np.ndarray, "F Y X"]:
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite([low, high]).all():
        raise UnfitError("it holds levels that are not finite; save it with 8 or 16 bits")
    whole = levels.dtype.kind != "f"
    if low >= 0 and high <= (DEEPEST if whole else 1):
        low, high = 0.0, float(DEEPEST if whole else 1)
    return ((levels.astype(np.float64) - low) / ((high - low) or 1.0)).astype(np.float32)
