"""What emoji-wan can show: one thing of the vocabulary that moves, or does not, and the captions that say so.

a cat moving left on a teal background
an apple standing still on a navy background
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from vipo.embedded import with_article

FRAMES = 17
"""Pixel frames of a clip: latent frame 0 is the first one, each further latent frame is four of them."""

OBJECTS = ("apple", "cat", "frog", "panda", "fish", "heart", "car", "ball")
"""The things that emoji-wan was trained on, a part of the vocabulary."""

GROUNDS = ("white", "navy", "teal", "pink")
"""The ground colours that emoji-wan was trained on."""

MOTIONS: Mapping[str, str] = MappingProxyType(
    {
        "left": "moving left",
        "right": "moving right",
        "up": "moving up",
        "down": "moving down",
        "still": "standing still",
    }
)
"""Motion name -> the words that stand for it."""

DIRECTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
)
"""Motion name -> (x, y) of its direction in the picture, y downwards."""

_CAPTION = re.compile(r"^an? (?P<name>[a-z]+) (?P<motion>[a-z]+ [a-z]+) on an? (?P<ground>[a-z]+) background$")
_NAMED = {words: name for name, words in MOTIONS.items()}


class ClipCaption(NamedTuple):
    """What a caption of a clip claims."""

    name: str
    motion: str
    ground: str


def make_clip_caption(name: str, motion: str, ground: str) -> str:
    """Write the caption of a clip of one thing that moves as ``motion`` says."""
    return f"{with_article(name)} {MOTIONS[motion]} on {with_article(ground)} background"


def parse_clip_caption(caption: str) -> ClipCaption:
    """Read a caption back.

    Raises ValueError on anything outside the grammar, so that a reward never guesses what a prompt meant.
    """
    match = _CAPTION.match(caption.strip())
    found = match and ClipCaption(match["name"], _NAMED.get(match["motion"], ""), match["ground"])
    if not found or found.motion not in MOTIONS or found.name not in OBJECTS or found.ground not in GROUNDS:
        raise ValueError(f"not a caption of a clip of this vocabulary: {caption!r}")
    if make_clip_caption(*found) != caption.strip():
        raise ValueError(f"not a caption of a clip of this vocabulary: {caption!r}")
    return found
