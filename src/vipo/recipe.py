"""From YAML to a frozen and fully checked :class:`vipo.schema.Recipe`.

A recipe may start from another one (``extends: other.yaml``, relative to itself, or the name of a shipped one) and
change some keys; the command line changes more of them (``key=value``, dots for nested keys).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from vipo.errors import UserError
from vipo.files import is_unicode, read_yaml
from vipo.registry import near
from vipo.schema import Judges, JudgeSection, Recipe, Section, keys_of, nested_section, shown
from vipo.secrets import in_the_open
from vipo.user_file import is_user_file

S = TypeVar("S")


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = True) -> Recipe:
    """Read a recipe file (or the name of a shipped one) and apply ``key=value`` overrides.

    Args:
        allow_code: whether a part that the file names may be Python code, ``file.py:thing``. What an override names may
            be in any case: whoever gives it has read it.

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown (the nearest known one is named), a value does
            not fit, or the file names code and that is not allowed.
    """
    raw = _read(_locate(path))
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(raw, override)
        apply_override(given, override)
    recipe = parse_recipe(raw, source=str(path))
    check_code(code_in(recipe), str(path), own=set(_words(given)), allowed=allow_code)
    return recipe


def code_in(recipe: Recipe) -> dict[str, str]:
    """Every ``file.py:thing`` that a recipe names, with how it is named on the command line."""
    structuring = recipe.structuring
    parts = [
        ("generator.name={}", recipe.generator.name or ""),
        ("credit={}", recipe.credit),
        ("objective.loss={}", recipe.objective.loss),
        ("structuring.backbone={}", structuring.backbone),
        *(("structuring.sources=[{}]", name) for name in structuring.sources),
    ]
    found = {name: how.format(name) for how, name in parts if is_user_file(name)}
    return {**code_of([recipe.rewards, recipe.judges]), **found}


def code_of(sections: Iterable[Mapping[str, JudgeSection]]) -> dict[str, str]:
    """:func:`code_in` of rewards or judges."""
    named = [section.reward or name for sections_of in sections for name, section in sections_of.items()]
    return {name: f"rewards={{{name}: 1.0}}, --rewards {name}" for name in named if is_user_file(name)}


def _words(value: Any) -> Iterator[str]:
    """Every key and text of a nested mapping."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in (*value, *(value.values() if isinstance(value, Mapping) else ())):
            yield from _words(entry)


def check_generator_code(recipe: Recipe, source: str, *, allowed: bool) -> None:
    """Refuse a generator by file of a run that may be somebody else's; no other part works where nothing is trained.

    Raises:
        UserError: there is one, and it is not allowed.
    """
    name = recipe.generator.name or ""
    check_code({name: ""} if is_user_file(name) else {}, source, own=(), allowed=allowed)


def check_code(named: Mapping[str, str], source: str, *, own: Collection[str], allowed: bool) -> None:
    """Refuse code that the user has not named and not allowed.

    Args:
        named: each ``file.py:thing``, with how it is named on the command line; empty where it cannot be.
        own: what the user has named.

    Raises:
        UserError: there is some.
    """
    foreign = sorted(set(named) - set(own))
    if foreign and not allowed:
        first = foreign[0]
        yourself = f", or name it yourself on the command line ({named[first]})" if named[first] else ""
        raise UserError(
            f"{source} names Python code, {first!r}, which would run here with all your rights; read that file, then"
            f" add --allow-code{yourself}"
        )


def parse_recipe(raw: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Check a nested mapping and freeze it."""
    return parse_section(Recipe, raw, source=source)


def parse_section(section: type[S], raw: Mapping[str, Any], *, source: str) -> S:
    """Check one section alone, for values that do not come from a recipe; ``source`` begins the message."""
    for problem in _unsound(raw, ""):
        raise UserError(f"{source}: {problem}")
    for problem in in_the_open(raw):
        raise UserError(f"{source}: {problem}")
    try:
        return TypeAdapter(section).validate_python(raw)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise UserError(f"{source}: {problems}") from error


def _unsound(value: Any, where: str) -> Iterator[str]:
    """What no recipe may hold at any depth, options included: numbers that are none, text that is no Unicode."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _unsound(key, where)
            named = str(key) if str(key).isprintable() else repr(key)  # a message is one line whatever a key holds
            yield from _unsound(entry, f"{where}.{named}" if where else named)
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            yield from _unsound(entry, f"{where}.{place}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is not a finite number; give one"
    elif isinstance(value, str) and not is_unicode(value):
        yield f"{where or 'a key'}: {shown(value)} holds half of a character, which no file can; write it again"


class _JudgesFile(Section):
    judges: Judges


def read_judges(path: str | Path) -> dict[str, JudgeSection]:
    """A YAML file of rewards with options, written as under ``judges`` in a recipe.

    Raises:
        UserError: the file is missing or is not such a list.
    """
    if not Path(path).is_file():
        raise UserError(f"judges file {str(path)!r} does not exist; give a YAML file, or names separated by commas")
    return parse_section(_JudgesFile, {"judges": _parsed(Path(path), "judges file")}, source=str(path)).judges


def _parsed(path: Path, what: str) -> Any:
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, no such date
        raise UserError(f"{what} {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _locate(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    shipped = shipped_recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    raise UserError(f"recipe {str(path)!r} does not exist; give a YAML file or one of {', '.join(shipped)}")


def _read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe as a mapping, with what it extends; ``children`` are the recipes that extend it."""
    if path.resolve() in children:
        raise UserError(f"recipe {str(path)!r} extends itself, by way of {', '.join(c.name for c in children)}")
    raw = _parsed(path, "recipe")
    if not isinstance(raw, dict):
        raise UserError(f"recipe {str(path)!r} must be a mapping of keys to values")
    if "extends" in raw:
        parent = _parent(path, raw.pop("extends"))
        return _merge(_read(parent, (*children, path.resolve())), raw)
    return raw


def _parent(child: Path, named: Any) -> Path:
    """The recipe that ``child`` extends: a file beside it, else a shipped one of that name."""
    if isinstance(named, str) and (child.parent / named).is_file():
        return child.parent / named
    shipped = shipped_recipes()
    if isinstance(named, str) and named in shipped:
        return shipped[named]
    raise UserError(
        f"recipe {str(child)!r} extends {shown(named)}, but there is no such file in {str(child.parent)!r} and no"
        f" shipped recipe of that name; give a YAML file or one of {', '.join(shipped)}"
    )


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``change`` over ``base``, nested keys one by one; ``rewards`` and ``judges`` are replaced whole."""
    merged = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in ("rewards", "judges")
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key=value``, dots for nested keys, in a nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {shown(override)} is not of the form key=value, e.g. optimizer.learning_rate=1e-4")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    try:
        node[leaf] = _number(read_yaml(text))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"override {shown(override)}: {shown(text)} is not a YAML value") from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (no dot) as text; people mean the number."""
    scientific = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if scientific else value


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(problem["loc"][:-1])
        found = near(str(problem["loc"][-1]), known, 1)
        instead = f"the nearest known one is {found[0]!r}" if found else f"known there: {', '.join(known) or 'none'}"
        return f"unknown key {shown(where)}; {instead}"
    if problem["type"] == "missing":
        return f"{where} is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message} (given: {shown(problem['input'])})" if where else message


def _known_keys(location: Sequence[Any]) -> list[str]:
    """The keys of the section at ``location``."""
    section: type[Any] = Recipe
    for part in location:
        keys = keys_of(section)
        if part in keys:  # else it is the name that a reward was given
            nested = nested_section(keys[part].annotation)
            if nested is None:
                return []
            section = nested
    return list(keys_of(section))
