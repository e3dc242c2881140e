"""The tiny image generator that ships with vipo, and the closed language of its prompts.

This package is pure Python (no torch): it finds the shipped folders, knows the vocabulary, and can write and read the
captions that the generator was trained on. The grammar is deliberately tidy, so that a reward can know exactly what a
prompt asks for::

    a cat on a teal background
    a cat left of an apple on a teal background
    a cat above an apple on a teal background
    a cat, an apple and a sun on a teal background
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from vipo.files import read_lines

__all__ = [
    "PICTURE_SIZE",
    "PROMPT_TOKENS",
    "RELATIONS",
    "VOCABULARY",
    "Vocabulary",
    "load_vocabulary",
    "make_caption",
    "parse_caption",
    "path",
    "prompts",
    "with_article",
]

PICTURE_SIZE = 64
"""Side in pixels of the pictures that the embedded generator was trained on."""

PROMPT_TOKENS = 16
"""Padded prompt length the embedded generator was trained with; pass it as ``max_sequence_length``."""

RELATIONS: Mapping[str, str] = MappingProxyType({"left": "left of", "above": "above"})
"""Relation name -> the words that stand for it between the two objects of a caption."""

_HERE = Path(__file__).parent
_CAPTION = re.compile(r"^(?P<scene>.+) on an? (?P<ground>[a-z]+) background$")
_NOUN = re.compile(r"^(?P<article>an?) (?P<name>[a-z]+)$")


@dataclass(frozen=True)
class Vocabulary:
    """The closed vocabulary: object name -> emoji code point(s), ground colour name -> RGB triple (0-255)."""

    objects: Mapping[str, str]
    grounds: Mapping[str, tuple[int, int, int]]

    @property
    def names(self) -> tuple[str, ...]:
        """Object names in the fixed order that classifiers use as class indices."""
        return tuple(self.objects)

    @property
    def ground_names(self) -> tuple[str, ...]:
        """Ground colour names in their fixed order."""
        return tuple(self.grounds)


def path(name: str = "emoji-flux") -> Path:
    """Return the folder of a shipped artefact, for example the pipeline folder ``emoji-flux``."""
    folder = _HERE / name
    if not folder.is_dir():
        shipped = sorted(p.name for p in _HERE.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
        raise FileNotFoundError(f"no embedded folder {name!r}; this installation ships {shipped}")
    return folder


def load_vocabulary(file: Path | None = None) -> Vocabulary:
    """Read a vocabulary file; without an argument, the shipped one."""
    raw = json.loads((file or _HERE / "vocabulary.json").read_text(encoding="utf-8"))
    grounds = {name: (int(r), int(g), int(b)) for name, (r, g, b) in raw["grounds"].items()}
    return Vocabulary(MappingProxyType(dict(raw["objects"])), MappingProxyType(grounds))


VOCABULARY: Vocabulary = load_vocabulary()
"""The shipped vocabulary."""


def prompts(split: Literal["train", "eval"]) -> tuple[str, ...]:
    """Return the shipped prompts of a split; no eval prompt occurs among the train prompts."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}")
    lines = read_lines(_HERE / f"prompts_{split}.txt")
    return tuple(line.strip() for line in lines if line.strip())


def make_caption(names: Sequence[str], relation: str | None, ground: str) -> str:
    """Write the caption of a scene of one to three objects; two objects need a relation, others must not have one."""
    if (relation is not None) != (len(names) == 2) or not 1 <= len(names) <= 3:
        raise ValueError(f"no caption for {len(names)} objects with relation {relation!r}")
    nouns = [with_article(name) for name in names]
    if relation is not None:
        scene = f"{nouns[0]} {RELATIONS[relation]} {nouns[1]}"
    else:
        scene = nouns[0] if len(nouns) == 1 else f"{nouns[0]}, {nouns[1]} and {nouns[2]}"
    return f"{scene} on {with_article(ground)} background"


def parse_caption(caption: str) -> tuple[tuple[str, ...], str | None, str]:
    """Read a caption back: (object names in order, relation or None, ground colour name).

    Raises ValueError on anything outside the grammar, so that a reward never guesses what a prompt meant.
    """
    match = _CAPTION.match(caption.strip())
    if match is None or match["ground"] not in VOCABULARY.grounds:
        raise ValueError(f"not a caption of this vocabulary: {caption!r}")
    scene, relation = match["scene"], None
    for key, words in RELATIONS.items():
        if f" {words} " in scene:
            relation, scene = key, scene.replace(f" {words} ", ", ")
    names = tuple(_noun(part, caption) for part in scene.replace(" and ", ", ").split(", "))
    if make_caption(names, relation, match["ground"]) != caption.strip():
        raise ValueError(f"not a caption of this vocabulary: {caption!r}")
    return names, relation, match["ground"]


def _noun(part: str, caption: str) -> str:
    """Strip the article of one noun and check that the vocabulary has it."""
    match = _NOUN.match(part)
    if match is None or match["name"] not in VOCABULARY.objects:
        raise ValueError(f"{part!r} is not an object of this vocabulary, in {caption!r}")
    return match["name"]


def with_article(word: str) -> str:
    """A word after its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
