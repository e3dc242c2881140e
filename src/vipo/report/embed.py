"""Pictures and clips as data URIs, small enough that a page of them can be sent around."""

from __future__ import annotations

import base64
import io

from PIL import Image

from vipo.media.clips import LOSSLESS_SIDE, Clip, resized, save_webp, spaced

LARGEST_SIDE = 384  # pixels; larger pictures are embedded smaller and compressed
MOST_FRAMES = 25  # of an embedded clip; a longer one shows every second, third, ... frame at the same speed
LADDER = ((192, 75), (160, 65), (128, 50), (96, 40), (96, 20))  # longest side and WebP quality, best first


def data_uri(picture: Image.Image, largest: int = LARGEST_SIDE, *, lossless: int = LOSSLESS_SIDE) -> str:
    """A picture inside the page: lossless if small, else at most ``largest`` pixels a side and compressed."""
    buffer, kind = io.BytesIO(), "png"
    if max(picture.size) <= lossless:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        smaller = picture.convert("RGB")
        smaller.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        smaller.save(buffer, format="WEBP", quality=86)
        kind = "webp"
    return _uri(kind, buffer.getvalue())


def clip_uri(clip: Clip, fps: float, room: int) -> str:
    """A clip inside the page as animated WebP of at most ``room`` bytes: lossless if it fits, else as good as fits.

    First it gets smaller and coarser (``LADDER``), then it loses every other frame; what is left of a clip of noise is
    a single frame, which is shown whatever its size.
    """
    step = -(-len(clip) // MOST_FRAMES)
    clip, fps = clip[::step], fps / step
    if max(clip[0].size) <= LOSSLESS_SIDE and len(whole := _encoded(clip, fps, None)) <= room:
        return _uri("webp", whole)
    for side, quality in LADDER:
        smaller = resized(clip, side)
        if len(clip) > 1 and len(clip) * len(_encoded(spaced(smaller, 1), fps, quality)) > 2 * room:
            continue  # one frame tells that all of them will not fit: do not encode the others
        if len(found := _encoded(smaller, fps, quality)) <= room:
            return _uri("webp", found)
    if len(clip) > 1:
        return clip_uri(clip[::2], fps / 2, room)
    return _uri("webp", _encoded(resized(clip, LADDER[-1][0]), fps, LADDER[-1][1]))


def _encoded(clip: Clip, fps: float, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    save_webp(buffer, clip, fps, quality=quality)
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
