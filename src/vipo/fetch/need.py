"""One thing that a recipe needs, and what is known of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["model", "data set", "file", "package", "service", "shipped"]
State = Literal["there", "not checked", "in part", "missing"]
WORSE: tuple[State, ...] = ("there", "not checked", "in part", "missing")
ON_HUB = ("model", "data set")
PAGE = "https://huggingface.co/"


@dataclass(frozen=True)
class Need:
    """Something that a recipe needs.

    Args:
        name: hub id, path, package or address.
        used_by: what needs it: "generator", "reward hpsv2.1", "prompts".
        place: where it is, if it is here.
        lacking: what of it is not there.
        files: of a hub repository, as patterns: what is read of it.
        size: bytes of these files; None is unknown. With ``at_least`` it may be more.
        gated: whether a licence must be accepted on the hub first; None is unknown.
        hint: how to get it where no command does, or what to know beside it.
    """

    name: str
    kind: Kind
    used_by: tuple[str, ...]
    state: State
    place: str | None = None
    lacking: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    revision: str | None = None
    size: int | None = None
    at_least: bool = False
    licence: str | None = None
    gated: bool | None = None
    hint: str | None = None

    @property
    def is_here(self) -> bool:
        return self.state in ("there", "not checked")

    @property
    def page(self) -> str | None:
        """Where its licence is accepted."""
        if self.kind not in ON_HUB:
            return None
        return f"{PAGE}{'datasets/' if self.kind == 'data set' else ''}{self.name}"

    @property
    def command(self) -> str | None:
        """What gets the rest of it, to be pasted into a shell; None where there is nothing to get, or no command."""
        if self.is_here or self.kind not in (*ON_HUB, "package") or (self.kind == "data set" and not self.files):
            return None
        if self.kind == "package":
            return f"pip install {shlex.quote(self.name)}"
        words = ["hf", "download", self.name]
        words += ["--repo-type", "dataset"] if self.kind == "data set" else []
        words += ["--revision", self.revision] if self.revision else []
        for pattern in self.files:
            words += ["--include", pattern]
        return shlex.join(words)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "page": self.page, "command": self.command}


def merged(needs: Iterable[Need]) -> list[Need]:
    """Each thing once, whoever needs it; what is lacking for one is lacking."""
    found: dict[tuple[str, str, str | None], Need] = {}
    for need in needs:
        key = (need.kind, need.name, need.revision)
        found[key] = _both(found[key], need) if key in found else need
    return list(found.values())


def _both(first: Need, second: Need) -> Need:
    states = {first.state, second.state}
    mixed = len(states) > 1 and "missing" in states
    return replace(
        first,
        used_by=tuple(dict.fromkeys((*first.used_by, *second.used_by))),
        state="in part" if mixed else max(states, key=WORSE.index),
        lacking=tuple(dict.fromkeys((*first.lacking, *second.lacking))),
        files=tuple(dict.fromkeys((*first.files, *second.files))),
        place=first.place or second.place,
        size=max((size for size in (first.size, second.size) if size is not None), default=None),
        at_least=first.at_least or second.at_least,
        licence=first.licence or second.licence,
        gated=second.gated if first.gated is None else first.gated,
        hint=first.hint or second.hint,
    )
