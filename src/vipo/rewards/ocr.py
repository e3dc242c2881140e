"""How much of the text that a prompt asks for can be read in the picture, in [0, 1]: Flow-GRPO's rule (2505.05470).

    target   what stands between the first two double quotes of the prompt
    read     all lines that the engine finds, joined; both without blanks and in lower case
    score    1 - d / |target|,  d = 0 where read contains target, else min(Levenshtein(read, target), |target|)

A prompt that quotes nothing gets NaN, no score. Videos are read frame by frame and averaged.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vipo.errors import UserError
from vipo.types import Prompt

Picture = NDArray[np.uint8]  # (Y, X, 3), RGB
Engine = Callable[[Picture], Sequence[str]]
"""A picture to the lines of text in it."""


class Ocr:
    """The text reward.

    Args:
        engine: "rapidocr" (``pip install 'vipo[ocr]'``), or a function from a picture to its lines of text.
    """

    def __init__(self, *, engine: str | Engine = "rapidocr") -> None:
        if isinstance(engine, str) and engine not in ENGINES:
            raise UserError(f"ocr has no engine {engine!r}; choose from {', '.join(ENGINES)}, or give a function")
        self.read: Engine = ENGINES[engine]() if isinstance(engine, str) else engine

    def __call__(self, media: Float[Tensor, "N 3 F Y X"], prompts: Sequence[Prompt]) -> Float[Tensor, " N"]:
        pictures = media.detach().mul(255).round().byte().permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
        scores = [self._score(frames, target(prompt.text)) for frames, prompt in zip(pictures, prompts, strict=True)]
        return torch.tensor(scores, device=media.device)

    def _score(self, frames: NDArray[np.uint8], wanted: str) -> float:
        if not wanted:
            return float("nan")
        return float(np.mean([legibility("".join(self.read(picture)), wanted) for picture in frames]))


def target(prompt: str) -> str:
    """What a prompt asks to be written: the text in its first pair of double quotes, "" where there is none."""
    quoted = re.search(r'"([^"]*)"', prompt)
    return _plain(quoted.group(1)) if quoted else ""


def legibility(read: str, wanted: str) -> float:
    """1 where ``wanted`` was read, less by an edit per character. Text besides it costs nothing if it is there."""
    read, wanted = _plain(read), _plain(wanted)
    if wanted in read:
        return 1.0
    return 1.0 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of a character from a to b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _rapidocr() -> Engine:
    """RapidOCR 3: detection and recognition networks that come inside its wheel, so nothing is downloaded."""
    try:
        engine = importlib.import_module("rapidocr").RapidOCR(params={"Global.log_level": "error"})
    except ImportError as error:  # it imports onnxruntime only when it is built
        raise UserError(
            f"the ocr reward lacks {error.name}: pip install 'vipo[ocr]', or give engine a function"
        ) from error

    def read(picture: Picture) -> Sequence[str]:
        found = engine(np.ascontiguousarray(picture[:, :, ::-1]))  # it takes arrays as BGR
        return found.txts or ()

    return read


ENGINES: dict[str, Callable[[], Engine]] = {"rapidocr": _rapidocr}
