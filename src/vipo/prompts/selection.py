"""Which prompts of a source are meant: ``NAME?column=caption&where=toxicity<0.2&keep=style&limit=1000``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from vipo.errors import UserError
from vipo.registry import did_you_mean

COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
MEANINGS: Mapping[str, str] = {
    "column": "the one that holds the prompt",
    "where": "a condition on another column, such as toxicity<0.2 or style=anime; may be given several times",
    "keep": "columns that become metadata, separated by commas; by default none",
    "limit": "the first so many prompts",
}


@dataclass(frozen=True)
class Condition:
    """What a row must hold in a column; compared as numbers where both are."""

    column: str
    sign: str
    value: str

    def holds(self, row: Mapping[str, Any], source: str) -> bool:
        found, wanted = cell(row, self.column, source), self.value
        numbers = _number(found), _number(wanted)
        if None not in numbers:
            return COMPARED[self.sign](*numbers)
        if self.sign in ("=", "!="):
            return COMPARED[self.sign](str(found), wanted)
        raise UserError(
            f"{source}: where={self.column}{self.sign}{wanted} compares numbers, but a row has {found!r} there"
        )


@dataclass(frozen=True)
class Selection:
    """Prompts of a source, each once: what of its rows is meant."""

    column: str | None = None
    where: tuple[Condition, ...] = ()
    keep: tuple[str, ...] = ()
    limit: int | None = None

    def takes(self, row: Mapping[str, Any], source: str) -> bool:
        return all(condition.holds(row, source) for condition in self.where)

    def metadata(self, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        return {name: cell(row, name, source) for name in self.keep}


def cell(row: Mapping[str, Any], column: str, source: str) -> Any:
    """What a row has in a column.

    Raises:
        UserError: it has none of that name.
    """
    if column not in row:
        names = [str(name) for name in row]
        raise UserError(f"{source} has no column {column!r}; it has {', '.join(names)}.{did_you_mean(column, names)}")
    return row[column]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def split(name: str) -> tuple[str, dict[str, list[str]]]:
    """A source's name and what is asked of it, by key."""
    plain, _, query = name.partition("?")
    asked: dict[str, list[str]] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        asked.setdefault(key, []).append(value)
    return plain, asked


def selection(name: str, asked: Mapping[str, list[str]]) -> Selection:
    """What is asked of the source ``name``.

    Raises:
        UserError: a key is unknown or given twice, or a value makes no sense.
    """
    for key, values in asked.items():
        if key not in MEANINGS:
            raise UserError(f"{name}: unknown {key!r} after '?'; there is {', '.join(MEANINGS)}")
        if key != "where" and len(values) > 1:
            raise UserError(f"{name}: {key}= is given {len(values)} times; give it once")
    limit = asked.get("limit", [None])[0]
    if limit is not None and not (limit.isdecimal() and int(limit) > 0):
        raise UserError(f"{name}: limit={limit} must be a whole number of prompts, 1 or more")
    return Selection(
        column=asked.get("column", [None])[0],
        where=tuple(_condition(name, text) for text in asked.get("where", [])),
        keep=tuple(part for part in asked.get("keep", [""])[0].split(",") if part),
        limit=None if limit is None else int(limit),
    )


def _condition(name: str, text: str) -> Condition:
    match = re.fullmatch(r"([^<>=!]+)(<=|>=|!=|<|>|=)(.*)", text)
    if match is None:
        raise UserError(f"{name}: where={text} must be a column, one of {' '.join(COMPARED)}, and a value")
    return Condition(*match.groups())
