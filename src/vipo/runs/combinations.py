"""The runs of a sweep: every combination of the values that keys are given. No torch: a slip is told at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from vipo.errors import UserError
from vipo.recipe import load_recipe
from vipo.schema import Recipe

MOST_RUNS = 1000  # of one sweep: a slip in a range would begin for years
LONGEST_FOLDER = 120  # characters

_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")
_UNFIT = re.compile(r"[^A-Za-z0-9._=+-]+")
_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "'\""


@dataclass(frozen=True)
class Combination:
    """One run: its folder's name, the overrides that make it, and the recipe that comes of them."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def combinations(recipe: str, given: Sequence[str], *, allow_code: bool = False) -> list[Combination]:
    """Every combination of values, the last key's changing first; each is checked as `vipo train` would.

    Args:
        recipe: a file or the name of a shipped one.
        given: ``KEY=VALUE``, ``KEY=A,B,C`` or, of whole numbers, ``KEY=0..4``, both ends included. A comma inside
            brackets or quotes separates nothing.

    Raises:
        UserError: a recipe that does not fit, two values of one key that are the same, or too many runs.
    """
    keys = [_values(argument) for argument in given]
    if len({key for key, _ in keys}) < len(keys):
        raise UserError("a key of a sweep stands once, with all its values: KEY=A,B,C")
    count = prod(len(values) for _, values in keys)
    if count > MOST_RUNS:
        raise UserError(f"these are {count} runs, more than the {MOST_RUNS} that a sweep may have; name fewer values")
    swept = [key for key, values in keys if len(values) > 1]
    found = []
    for chosen in product(*(values for _, values in keys)):
        settings = dict(zip((key for key, _ in keys), chosen, strict=True))
        found.append(_combination(recipe, settings, swept, allow_code))
    return found


def _combination(recipe: str, settings: dict[str, str], swept: Sequence[str], allow_code: bool) -> Combination:
    overrides = tuple(f"{key}={value}" for key, value in settings.items())
    name = _folder([(key, settings[key]) for key in swept], swept) if swept else "run"
    named = () if "name" in settings else (f"name={name}",)
    return Combination(name, (*overrides, *named), load_recipe(recipe, (*overrides, *named), allow_code=allow_code))


def _folder(pairs: Sequence[tuple[str, str]], swept: Sequence[str]) -> str:
    """``credit=sample,seed=0``: the last words of the keys, where these tell them apart."""
    leaves = [key.rpartition(".")[2] for key in swept]
    short = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(swept, leaves, strict=True)}
    exact = [f"{short[key]}={value}" for key, value in pairs]
    name = ",".join(_UNFIT.sub("-", one) for one in exact)
    if len(name) <= LONGEST_FOLDER and all(_UNFIT.sub("-", one) == one for one in exact):
        return name
    return f"{name[:LONGEST_FOLDER]}-{hashlib.sha256(','.join(exact).encode()).hexdigest()[:8]}"


def _values(argument: str) -> tuple[str, list[str]]:
    """A key and what it is given in turn."""
    key, separator, text = argument.partition("=")
    if not separator or not key:
        raise UserError(f"{argument!r} is not of the form KEY=VALUE, KEY=A,B,C or KEY=0..4")
    found = [value for part in _parts(text) for value in _counted(part.strip(), argument)]
    if len(set(found)) < len(found) or (len(found) > 1 and "" in found):
        raise UserError(f"{argument!r} names a value twice, or none between two commas")
    return key, found


def _parts(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote or char in _QUOTES:
            quote = "" if char == quote else quote or char
        elif char in _OPEN or char in _CLOSE:
            depth += 1 if char in _OPEN else -1
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _counted(part: str, argument: str) -> list[str]:
    span = _RANGE.fullmatch(part)
    if span is None:
        return [part]
    first, last = int(span[1]), int(span[2])
    if not 0 <= last - first < MOST_RUNS:
        raise UserError(f"{argument!r}: {part} must count up, over at most {MOST_RUNS} numbers")
    return [str(number) for number in range(first, last + 1)]
