"""The JSON between a reward's client and its server, version 1. No pickle.

    POST /score  {"version": 1, "items": [{"id", "prompt", "index", "metadata", "media": {"kind", "data"}}]}
    answer       {"scores": [{"id", "score": number or null, "error": text or null}]}

A request with ``"evidence": true`` beside its items asks where the scores come from too; each score then has an
``"evidence"``, see :mod:`vipo.rewards.evidence_wire`.


``data`` is base64 of a PNG (kind "png": one RGB frame) or of a NumPy file (kind "npy": (3, F, Y, X), float32 in [0, 1],
or uint8 where 255 is 1). Float32 arrives as it was; the others were rounded to 256 levels before they were sent. All
media of a request have one shape; the answer has each id once, in any order. Whatever does not fit raises
``WireError``, one sentence.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vipo.errors import UserError
from vipo.media.reading import MOST_PIXELS, opened, pixels_of
from vipo.rewards import evidence_wire
from vipo.rewards.answer import Answer
from vipo.rewards.npy import TooLargeError as TooLargeError
from vipo.rewards.npy import WireError as WireError
from vipo.rewards.npy import npy, read_npy
from vipo.secrets import redacted
from vipo.types import Prompt

VERSION = 1
QUOTED_CHARACTERS = 200  # of a parser's complaint
MOST_VALUES = 10**6  # of JSON in a request: its text is bounded, and an empty list takes twenty times its text
LARGEST = float(np.finfo(np.float32).max)
NO_REASON = "the server gave no score and no reason"
Encoding = Literal["exact", "8bit"]  # the first is float32, 16 bytes a pixel in base64
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
FLOAT_BYTES = 4 * 4 / 3  # of one number on the wire, in base64


@dataclass(frozen=True)
class Request:
    """What a server is asked to score."""

    ids: tuple[str, ...]
    media: Float[Tensor, "N 3 F Y X"]
    prompts: tuple[Prompt, ...]
    evidence: bool = False


def encode_request(
    media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt], *, encoding: Encoding, evidence: bool = False
) -> bytes:
    """The body of POST /score; ids are the places in the batch.

    Raises:
        UserError: a prompt's metadata holds something that JSON has no word for.
    """
    items = [
        {
            "id": str(place),
            "prompt": prompt.text,
            "index": prompt.index,
            "metadata": dict(prompt.metadata),
            "media": _encode(sample, encoding),
        }
        for place, (sample, prompt) in enumerate(zip(media.detach().float().cpu(), prompts, strict=True))
    ]
    try:
        asked = {"evidence": True} if evidence else {}
        return json.dumps({"version": VERSION, **asked, "items": items}, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a prompt's metadata cannot be sent to a reward server: {error}; keep to text, numbers and lists of them"
        ) from error


def fitting(media: Float[Tensor, "N 3 F Y X"], most: int, megabytes: float) -> int:
    """How many of the samples a request may hold: at most ``most``, fewer if they are long clips, at least one."""
    return max(1, min(most, int(megabytes * 1e6 / (FLOAT_BYTES * math.prod(media.shape[1:])))))


def decode_request(content: bytes, max_pixels: int = MOST_PIXELS) -> Request:
    """Read and check the body of POST /score.

    Args:
        max_pixels: of all media together, over all frames; they are counted before any is decoded.
    """
    raw = _parsed(content)
    if not isinstance(raw, Mapping) or raw.get("version") != VERSION:
        raise WireError(f'the body must be an object with "version": {VERSION}')
    items = raw.get("items")
    if not isinstance(items, list) or not items:
        raise WireError('"items" must be a list of at least one item')
    ids = tuple(_text(item, place, "id") for place, item in enumerate(items))
    if len(set(ids)) < len(ids):
        raise WireError("every item needs an id of its own, and some are the same")
    prompts = tuple(_prompt(item, place) for place, item in enumerate(items))
    evidence = raw.get("evidence", False)
    if not isinstance(evidence, bool):
        raise WireError('"evidence" must be true or false')
    return Request(ids, _decoded([item.pop("media", None) for item in items], max_pixels), prompts, evidence)


def _decoded(items: list[Any], max_pixels: int) -> Float[Tensor, "N 3 F Y X"]:
    """All media in one tensor, which is there once: each is decoded into its place."""
    first = _decode(items[0], 0, max_pixels)
    shape = tuple(first.shape)
    if len(items) * math.prod(shape[1:]) > max_pixels:
        raise TooLargeError(f"{len(items)} media of {shape} have more than the {max_pixels} pixels of a request")
    media = first.new_empty(len(items), *shape)
    media[0], items[0] = first, None
    del first
    for place in range(1, len(items)):
        sample = _decode(items[place], place, max_pixels)
        if tuple(sample.shape) != shape:
            raise WireError(f"all media of a request must have one shape, not {shape} and {tuple(sample.shape)}")
        media[place], items[place] = sample, None
    return media


def encode_answer(ids: Sequence[str], answer: Answer, *, evidence: bool = False) -> dict[str, Any]:
    """The body of a 200; a score that is not finite is null, and so is evidence that is not there.

    Raises:
        TooLargeError: a sample's evidence.
    """
    scores: list[dict[str, Any]] = []
    for place, (name, value) in enumerate(zip(ids, answer.scores.tolist(), strict=True)):
        if math.isfinite(value):
            scores.append({"id": name, "score": value, "error": None})
        else:
            why = answer.causes.get(place, "the reward gave no finite score")
            scores.append({"id": name, "score": None, "error": why})
        if evidence:
            scores[-1]["evidence"] = evidence_wire.said(answer.evidence.get(place))
    return {"scores": scores}


def decode_answer(raw: Any, count: int, picture: tuple[int, int] | None = None) -> Answer:
    """Check what a server says about the ids that ``encode_request`` gave to ``count`` samples.

    Args:
        picture: height and width of the media in pixels, if evidence was asked for.
    """
    scores = raw.get("scores") if isinstance(raw, Mapping) else None
    if not isinstance(scores, list) or not all(isinstance(entry, Mapping) for entry in scores):
        raise WireError('it lacks "scores", a list of objects')
    by_id = {entry.get("id"): entry for entry in scores if isinstance(entry.get("id"), str)}
    expected = [str(place) for place in range(count)]
    if len(scores) != count or set(by_id) != set(expected):
        raise WireError(f"it has {len(scores)} scores for {count} items, or other ids than those it was sent")
    values = torch.tensor([_score(by_id[name]) for name in expected])
    unscored = values.isnan().nonzero().flatten().tolist()
    causes = {place: str(by_id[str(place)].get("error") or NO_REASON) for place in unscored}
    told = {place: redacted(cause)[:QUOTED_CHARACTERS] for place, cause in causes.items()}
    if picture is None:
        return Answer(values, told)
    if not any("evidence" in entry for entry in scores):
        raise WireError("it has no evidence, which it was asked for")
    found = {place: evidence_wire.heard(by_id[name], picture) for place, name in enumerate(expected)}
    return Answer(values, told, evidence={place: maps for place, maps in found.items() if maps is not None})


def _score(entry: Mapping[str, Any]) -> float:
    value = entry.get("score", "missing")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise WireError(f"the score of id {entry['id']!r} is {value!r:.40}, neither a finite number nor null")
    return float(value)


def to_8bit(media: Float[Tensor, "*shape"]) -> np.ndarray:
    """[0, 1] to 0 ... 255, the nearest."""
    return (media.clamp(0, 1) * 255).round().byte().numpy()


def png(frame: Float[Tensor, "3 Y X"]) -> bytes:
    """One frame in [0, 1] on the CPU as an RGB PNG."""
    buffer = io.BytesIO()
    Image.fromarray(to_8bit(frame.permute(1, 2, 0))).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _encode(sample: Float[Tensor, "3 F Y X"], encoding: Encoding) -> dict[str, str]:
    """A sample that is not finite goes as it is: 8 bits would make a picture of it."""
    kind = "npy"
    if encoding == "exact" or not sample.isfinite().all():
        data = npy(sample.numpy())
    elif sample.shape[1] == 1:
        kind, data = "png", png(sample[:, 0])
    else:
        data = npy(to_8bit(sample))
    return {"kind": kind, "data": base64.b64encode(data).decode()}


def _decode(media: Any, place: int, max_pixels: int) -> Float[Tensor, "3 F Y X"]:
    kind, data = (media.get("kind"), media.get("data")) if isinstance(media, Mapping) else (None, None)
    if not isinstance(kind, str) or kind not in _READERS or not isinstance(data, str):
        raise WireError(f'item {place}: "media" must have a "kind" of {" or ".join(_READERS)}, and "data"')
    try:
        return _READERS[kind](base64.b64decode(data, validate=True), max_pixels)
    except TooLargeError as error:
        raise TooLargeError(f"item {place}: {error}") from error
    except Exception as error:  # the bytes are a stranger's, and parsers raise what they like
        why = " ".join(str(error).split())[:QUOTED_CHARACTERS]
        raise WireError(f'item {place}: "media" is not base64 of a whole {kind}: {why}') from error


def _check_pixels(count: int, max_pixels: int) -> None:
    if count > max_pixels:
        raise TooLargeError(f"it has {count} pixels, more than the {max_pixels} of a request")


def _read_png(data: bytes, max_pixels: int = MOST_PIXELS) -> Float[Tensor, "3 1 Y X"]:
    with opened(io.BytesIO(data), formats=["PNG"]) as picture:
        _check_pixels(picture.width * picture.height, max_pixels)
        if picture.mode != "RGB" or picture.has_transparency_data or getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"{picture.mode} {picture.size} is not RGB, opaque and one frame")
        pixels = np.array(pixels_of(picture))
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(1).float().div_(255)


def _read_npy(data: bytes, max_pixels: int) -> Float[Tensor, "3 F Y X"]:
    array = torch.from_numpy(read_npy(data, _check_media))
    _check_pixels(math.prod(array.shape[1:]), max_pixels)
    return array.float().div_(255) if array.dtype == torch.uint8 else array


def _check_media(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype not in (np.float32, np.uint8) or len(shape) != 4 or shape[0] != 3 or 0 in shape:
        raise ValueError(f"{dtype} {shape} is not float32 or uint8 of shape (3, F, Y, X)")


_READERS = {"png": _read_png, "npy": _read_npy}


def _parsed(content: bytes) -> Any:
    if sum(content.count(mark) for mark in (b"[", b"{", b",")) > MOST_VALUES:  # base64 has none of these
        raise TooLargeError(f"the body holds more than {MOST_VALUES} values")
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON: {error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _text(item: Any, place: int, key: str) -> str:
    if not isinstance(item, Mapping) or not isinstance(item.get(key), str):
        raise WireError(f'item {place} must be an object whose "{key}" is text')
    return str(item[key])


def _prompt(item: Mapping[str, Any], place: int) -> Prompt:
    index, metadata = item.get("index", place), item.get("metadata", {})
    if not isinstance(index, int) or not isinstance(metadata, Mapping):
        raise WireError(f'item {place}: "index" must be a whole number and "metadata" an object')
    return Prompt(_text(item, place, "prompt"), index, metadata)
