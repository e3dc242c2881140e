"""Evidence on the wire, in each score of an answer (``wire.py``): null where there is none, or an object

    {"map": M}                                   M with numbers from -1 (at fault) to 1 (earned)
    {"flaws": F}, {"support": F}, or both        F with numbers from 0 to 1; the evidence is support - flaws

    M    lists of numbers, (H, W) or (T, H, W), or {"kind": "npy", "data": base64 of float32 (T, H, W)}
    F    such an M, or {"boxes": [[x0, y0, x1, y1, score], ...]}, a share of the picture's sides each, from its upper
         left corner, for all frames; no boxes are no flaws

of at most ``MOST_CELLS`` numbers or ``MOST_BOXES`` boxes. Whatever does not fit raises ``WireError``, one sentence.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vipo.rewards.evidence import OVERSHOOT, Box, drawn
from vipo.rewards.npy import TooLargeError, WireError, npy, read_npy

MOST_CELLS = 2**17  # of a sample's evidence: of a clip of 81 x 480 x 832, at a latent's resolution
MOST_BOXES = 1000
MOST_BYTES = 8 * MOST_CELLS  # of a sample on the wire, at most: base64 takes 5.4 a number
CELL = 8  # pixels of a picture's side to a cell on which boxes are drawn: a latent's of most models
QUOTED_CHARACTERS = 200  # of a parser's complaint
KEYS = ({"map"}, {"flaws"}, {"support"}, {"flaws", "support"})


def said(found: Float[Tensor, "t h w"] | None) -> dict[str, Any] | None:
    """A sample's evidence for an answer.

    Raises:
        TooLargeError: it has more numbers than an answer takes.
    """
    if found is None:
        return None
    if found.numel() > MOST_CELLS:
        raise TooLargeError(
            f"evidence of {tuple(found.shape)} has more than {MOST_CELLS} numbers; give it at a lower resolution"
        )
    data = base64.b64encode(npy(found.float().cpu().numpy())).decode()
    return {"map": {"kind": "npy", "data": data}}


def heard(entry: Mapping[str, Any], picture: tuple[int, int]) -> Float[Tensor, "t h w"] | None:
    """What an answer says of a sample's positions.

    Args:
        entry: the sample's, with its id.
        picture: height and width in pixels; boxes are drawn on cells of ``CELL``.

    Raises:
        WireError: it does not follow the protocol.
    """
    grid = math.ceil(picture[0] / CELL), math.ceil(picture[1] / CELL)
    said, where = entry.get("evidence"), f"the evidence of id {entry['id']!r}"
    if said is None:
        return None
    if not isinstance(said, Mapping) or not said or set(said) not in KEYS:
        raise WireError(f'{where} must be null or an object with "map", or with "flaws", "support" or both')
    parts = {key: _part(value, key, where, grid) for key, value in said.items()}
    if "map" in parts:
        return parts["map"]
    flaws, support = parts.get("flaws"), parts.get("support")
    if flaws is None or support is None:
        return support if support is not None else -parts["flaws"]
    if flaws.shape != support.shape:
        raise WireError(
            f"{where} has flaws of {tuple(flaws.shape)} and support of {tuple(support.shape)}; give one shape"
        )
    return support - flaws


def _part(said: Any, key: str, where: str, grid: tuple[int, int]) -> Float[Tensor, "t h w"]:
    """One map of an answer, or its boxes drawn; -1 to 1 in "map", 0 to 1 in the others."""
    if isinstance(said, Mapping) and set(said) == {"boxes"} and key != "map":
        return drawn(_boxes(said["boxes"], where), grid)
    try:
        found = _numbers(said)
    except Exception as error:  # the bytes are a stranger's, and parsers raise what they like
        why = " ".join(str(error).split())[:QUOTED_CHARACTERS]
        raise WireError(f"{where}, {key}, is neither lists of numbers nor base64 of a whole npy: {why}") from error
    if found.ndim != 3 or not 0 < found.numel() <= MOST_CELLS:
        raise WireError(
            f"{where}, {key}, is {tuple(found.shape)}, not (H, W) or (T, H, W) of at most {MOST_CELLS} numbers"
        )
    least = -1.0 if key == "map" else 0.0
    if not bool(((found >= least - OVERSHOOT) & (found <= 1 + OVERSHOOT)).all()):  # nor is NaN
        raise WireError(f"{where}, {key}, has numbers that are not from {least:g} to 1")
    return found


def _numbers(said: Any) -> Tensor:
    if isinstance(said, Mapping):
        if said.get("kind") != "npy":
            raise ValueError('an object must have the "kind" npy')
        return torch.from_numpy(read_npy(base64.b64decode(said["data"], validate=True), _check_map))
    if not isinstance(said, list):
        raise ValueError(f"it is {type(said).__name__}")
    found = torch.tensor(said)
    if found.dtype not in (torch.float32, torch.int64):
        raise ValueError(f"it holds {found.dtype}")
    return found.float() if found.ndim != 2 else found.float()[None]


def _boxes(said: Any, where: str) -> list[Box]:
    """Boxes that lie in the picture."""
    if not isinstance(said, list) or len(said) > MOST_BOXES:
        raise WireError(f'{where}: "boxes" must be a list of at most {MOST_BOXES} boxes')
    for box in said:
        if not isinstance(box, list) or len(box) != 5 or not all(_is_share(value) for value in box):
            raise WireError(f"{where}: a box is [x0, y0, x1, y1, score], five numbers from 0 to 1, not {box!r:.60}")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise WireError(f"{where}: the box {box!r:.60} is empty; x0 and y0 are its upper left corner")
    return [(float(x0), float(y0), float(x1), float(y1), float(score)) for x0, y0, x1, y1, score in said]


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_map(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.float32 or len(shape) != 3:
        raise ValueError(f"{dtype} {shape} is not float32 of shape (T, H, W)")
