"""Sampled media on disk under names of the caller's: PNG pictures, WebP or mp4 videos, a GIF of several clips."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.media.clips import LOSSLESS_SIDE, save_gif, save_webp, together
from vipo.media.pictures import Media, save_png, to_uint8

Naming = Literal["number", "prompt"]
VideoFormat = Literal["webp", "mp4"]
FPS = 8.0
ENCODER, CRF = "libx264", "14"  # H.264 with hardly any visible loss
LONGEST_NAME = 235  # bytes; file systems allow 255, and a temporary name is longer
SHOWN, SHOWN_QUALITY = 8, 90  # clips of an evaluation that become files, and the WebP quality of large ones
GIF_SIDE = 192  # pixels of each clip in the GIF of all of them


def sample_names(texts: Sequence[str], samples_per_prompt: int, naming: Naming) -> list[str]:
    """One name per sample, ``samples_per_prompt`` for each prompt.

    ``number`` is in order and readable, ``00012-0-a-cat-on-teal``; ``prompt`` is the prompt itself and the sample's
    number, ``a cat on teal-0``, as VBench looks for it.

    Raises:
        UserError: a prompt that cannot be part of a file's name.
    """
    name = {"number": _numbered, "prompt": _prompted}[naming]
    return [name(number, text, k) for number, text in enumerate(texts) for k in range(samples_per_prompt)]


def _numbered(number: int, text: str, sample: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")
    return "-".join(part for part in (f"{number:05d}", str(sample), slug) if part)


def _prompted(_number: int, text: str, sample: int) -> str:
    if "/" in text or "\0" in text or text.startswith(".") or len(text.encode()) > LONGEST_NAME:
        raise UserError(f"the prompt {text!r} cannot be a file name: too long, or a slash in it; use --names number")
    return f"{text}-{sample}"


def save_samples(
    folder: Path,
    media: Media,
    names: Sequence[str],
    *,
    video: VideoFormat = "webp",
    fps: float = FPS,
    quality: int | None = None,
) -> list[Path]:
    """Write one file per sample, each whole or not at all: a PNG for F = 1, else a video of ``fps`` frames per second.

    Args:
        quality: of WebP videos, 0 to 100; None is lossless.

    Raises:
        UserError: mp4 without PyAV, or of an odd width or height.
    """
    if len(names) != len(media):
        raise ValueError(f"{len(names)} names for {len(media)} samples: give one per sample")
    written = []
    for frames, name in zip(to_uint8(media), names, strict=True):
        path = folder / f"{name}.{'png' if len(frames) == 1 else video}"
        if len(frames) == 1:
            save_png(path, Image.fromarray(frames[0]))
        elif video == "mp4":
            _save_mp4(path, frames, fps)
        else:
            with written_whole(path) as aside:
                save_webp(aside, [Image.fromarray(frame) for frame in frames], fps, quality=quality)
        written.append(path)
    return written


def save_clips(folder: Path, media: Media, texts: Sequence[str], *, samples_per_prompt: int, fps: float) -> None:
    """Write an evaluation's first clips as files to open: ``folder``/NAME.webp and, playing together, ``folder``.gif.

    Frames over ``LOSSLESS_SIDE`` pixels are compressed here; what was scored, byte for byte, is in the sheet. Where
    PyAV can write mp4 of this size there is NAME.mp4 too.

    Args:
        texts: the prompt of each sample, the samples of a prompt consecutive.
    """
    shown = media[:SHOWN]
    names = sample_names(texts[::samples_per_prompt], samples_per_prompt, "number")[: len(shown)]
    quality = None if max(media.shape[-2:]) <= LOSSLESS_SIDE else SHOWN_QUALITY
    with written_whole(folder) as aside:
        save_samples(aside, shown, names, fps=fps, quality=quality)
        if _makes_mp4(*media.shape[-2:]):
            save_samples(aside, shown, names, video="mp4", fps=fps)
    clips = [[Image.fromarray(frame) for frame in frames] for frames in to_uint8(shown)]
    with written_whole(folder.with_name(f"{folder.name}.gif")) as aside:
        save_gif(aside, together(clips, GIF_SIDE), fps)


def _makes_mp4(height: int, width: int) -> bool:
    """Whether PyAV is installed, has the encoder, and takes frames of this size."""
    if importlib.util.find_spec("av") is None or height % 2 or width % 2:
        return False
    import av

    return ENCODER in av.codecs_available


def _save_mp4(path: Path, frames: UInt8[np.ndarray, "F Y X 3"], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError("mp4 files need PyAV: pip install 'vipo[video]', or take --video webp") from error
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"an mp4 needs even sides, these frames are {height} x {width} pixels; take --video webp")
    with written_whole(path) as aside, av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream(ENCODER, rate=Fraction(fps).limit_denominator(1001), options={"crf": CRF})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
