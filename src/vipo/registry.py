"""Parts that are named in a recipe: what there is, what each takes, and what is nearest to a name that is wrong.

A room keeps a plain dict of entries by name. An entry says where its part is defined and what a list shows of it; the
file is imported when the part is built or asked what it takes, so that listing names costs nothing. No torch here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, TypeVar

from vipo.errors import UserError
from vipo.secrets import redacted, shown_options

NAMED = 2  # names that an error suggests, at most
ALIKE = 0.6  # of 1: names less alike are not suggested
CATCH_ALL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Entry:
    """A part that can be named.

    Args:
        target: "module:attribute", a class or function that makes the part from keyword arguments, its options.
        summary: what it is, for a list.
        passes_on: "module:attribute" that takes, as keywords, what the target takes as ``**options``.
    """

    target: str
    summary: str
    passes_on: str | None = field(default=None, kw_only=True)

    def load(self) -> Any:
        """What ``target`` names."""
        return load(self.target)

    def parameters(self) -> dict[str, inspect.Parameter]:
        """Everything that can be given by name, with its default."""
        found = parameters(self.load())
        further = parameters(load(self.passes_on)) if self.passes_on else {}
        return {**found, **{name: p for name, p in further.items() if p.kind is p.KEYWORD_ONLY}}


E = TypeVar("E", bound=Entry)


def load(target: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a function or class can be given by name; nothing if it does not say."""
    try:
        found = inspect.signature(function).parameters
    except ValueError:
        return {}
    return {name: parameter for name, parameter in found.items() if parameter.kind not in CATCH_ALL}


def find(kind: str, entries: Mapping[str, E], name: str, *, otherwise: str = "") -> E:
    """The entry called ``name``.

    Args:
        kind: what the entries are, for messages: "backbone".
        otherwise: what else may be named, for messages.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    if name not in entries:
        raise UserError(
            f"there is no {kind} {name!r}; choose from {', '.join(entries)}{otherwise}.{did_you_mean(name, entries)}"
        )
    return entries[name]


def build(
    kind: str,
    entries: Mapping[str, Entry],
    name: str,
    options: Mapping[str, Any],
    *,
    offered: Mapping[str, Any] = MappingProxyType({}),
    otherwise: str = "",
) -> Any:
    """The part called ``name``, made from its options.

    Args:
        offered: options that it is given if it has them and ``options`` do not say otherwise.

    Raises:
        UserError: no part of that name, an option it does not take, one that is lacking, or one it refuses.
    """
    entry = find(kind, entries, name, otherwise=otherwise)
    taken = entry.parameters()
    check_options(f"{kind} {name!r}", options, taken)
    added = {key: value for key, value in offered.items() if key in taken}
    lacking = [key for key, p in taken.items() if p.default is p.empty and key not in {**added, **options}]
    if lacking:
        raise UserError(f"{kind} {name!r} needs {' and '.join(f'{key}=' for key in lacking)} among its options")
    try:
        return entry.load()(**{**added, **options})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{kind} {name!r} refused its options {shown_options(options)}: {redacted(str(error))}"
        ) from error


def check_options(user: str, given: Iterable[str], taken: Collection[str]) -> None:
    """Refuse options that are not taken.

    Args:
        user: what was given them, in the words of a message: "backbone 'dinov2'".
    """
    for key in given:
        if key not in taken:
            accepted = f"it takes {', '.join(taken)}" if taken else "it takes none"
            raise UserError(f"{user} takes no option {key!r}; {accepted}.{did_you_mean(key, taken)}")


def near(name: str, known: Iterable[str], count: int = NAMED) -> list[str]:
    """At most ``count`` names that are much like ``name``, the best first."""
    return difflib.get_close_matches(name, known, n=count, cutoff=ALIKE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'a' or 'b'?``; empty where nothing is much like it."""
    found = near(name, known)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
