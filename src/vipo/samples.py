"""Sampled media on disk under names of the caller's: PNG pictures, lossless WebP or mp4 videos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vipo.files import written_whole
from vipo.report.pictures import save_png, to_uint8
from vipo.types import UserError

Naming = Literal["number", "prompt"]
VideoFormat = Literal["webp", "mp4"]
FPS = 8.0
CRF = "14"  # of H.264: hardly any visible loss
LONGEST_NAME = 235  # bytes; file systems allow 255, and a temporary name is longer


def sample_names(texts: Sequence[str], count: int, naming: Naming) -> list[str]:
    """One name per sample, ``count`` for each prompt.

    ``number`` is in order and readable, ``00012-0-a-cat-on-teal``; ``prompt`` is the prompt itself and the sample's
    number, ``a cat on teal-0``, as VBench's judges look for it.

    Raises:
        UserError: a prompt that cannot be part of a file's name.
    """
    name = {"number": _numbered, "prompt": _prompted}[naming]
    return [name(number, text, k) for number, text in enumerate(texts) for k in range(count)]


def _numbered(number: int, text: str, sample: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")
    return "-".join(part for part in (f"{number:05d}", str(sample), slug) if part)


def _prompted(_number: int, text: str, sample: int) -> str:
    if "/" in text or "\0" in text or text.startswith(".") or len(text.encode()) > LONGEST_NAME:
        raise UserError(f"the prompt {text!r} cannot be a file name: too long, or a slash in it; use --names number")
    return f"{text}-{sample}"


def save_samples(
    folder: Path,
    media: Float[Tensor, "N 3 F Y X"],
    names: Sequence[str],
    *,
    video: VideoFormat = "webp",
    fps: float = FPS,
) -> list[Path]:
    """Write one file per sample, each whole or not at all: a PNG for F = 1, else a video of ``fps`` frames per second.

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
            _save_webp(path, frames, fps)
        written.append(path)
    return written


def _save_webp(path: Path, frames: UInt8[np.ndarray, "F Y X 3"], fps: float) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    with written_whole(path) as aside:
        first.save(
            aside, format="WEBP", lossless=True, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0
        )


def _save_mp4(path: Path, frames: UInt8[np.ndarray, "F Y X 3"], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError("mp4 files need PyAV; install vipo[video], or take --video webp") from error
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"an mp4 needs even sides, these frames are {height} x {width} pixels; take --video webp")
    with written_whole(path) as aside, av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": CRF})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
