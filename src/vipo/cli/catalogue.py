"""What can be named in a recipe, as rows for a table or JSON. Each list imports what it lists, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = dict[str, str]


def _generators() -> list[Row]:
    from vipo.generators import GENERATORS

    return [{"generator": name, "adapts": entry.summary} for name, entry in GENERATORS.items()]


def _backbones() -> list[Row]:
    from vipo.backbones import BACKBONES

    return [
        {"backbone": name, "what": entry.summary, "weights": entry.weights, "licence": entry.licence}
        for name, entry in BACKBONES.items()
    ]


def _rewards() -> list[Row]:
    from vipo.rewards import REWARDS, state

    return [
        {
            "reward": name,
            "what": entry.summary,
            "range": entry.value_range,
            "licence": entry.licence,
            "size": entry.size,
            "state": state(entry),
        }
        for name, entry in REWARDS.items()
    ]


def _sources() -> list[Row]:
    from vipo.options import SOURCE_MEANINGS

    return list(_meanings("source", SOURCE_MEANINGS))


def _credits() -> list[Row]:
    from vipo.options import CREDIT_MEANINGS

    return list(_meanings("credit", CREDIT_MEANINGS))


def _losses() -> list[Row]:
    from vipo.options import LOSS_MEANINGS

    return list(_meanings("loss", LOSS_MEANINGS))


def _meanings(what: str, meanings: Mapping[str, str]) -> Iterable[Row]:
    return ({what: name, "meaning": meaning} for name, meaning in meanings.items())


def _prompts() -> list[Row]:
    from vipo.prompts.files import read_entries, shipped_sets

    return [{"prompts": f"set:{name}", "count": str(len(read_entries(path)))} for name, path in shipped_sets().items()]


def _recipes() -> list[Row]:
    from vipo.recipe import load_recipe, shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        rows.append(
            {
                "recipe": name,
                "generator": recipe.generator.path,
                "rewards": ", ".join(recipe.rewards),
                "credit": recipe.credit,
                "iterations": str(recipe.training.iterations),
            }
        )
    return rows


def _keys() -> list[Row]:
    from vipo.schema import Recipe

    return list(_keys_of(Recipe, ""))


def _keys_of(section: type[Any], prefix: str) -> Iterable[Row]:
    """Every key of a section, nested ones with dots."""
    from vipo.runs.rules import rule_of
    from vipo.schema import keys_of, nested_section

    for name, entry in keys_of(section).items():
        nested, key = nested_section(entry.annotation), prefix + name
        if nested is None or entry.description:
            default = "required" if entry.is_required() else str(entry.get_default(call_default_factory=True))
            yield {"key": key, "default": default, "meaning": entry.description or "", "on resume": rule_of(key)}
        if nested is not None:
            many = "NAME." if entry.description and "dict" in str(entry.annotation) else ""
            yield from _keys_of(nested, f"{key}.{many}")


CATALOGUES: Mapping[str, Callable[[], list[Row]]] = {
    "generators": _generators,
    "backbones": _backbones,
    "rewards": _rewards,
    "sources": _sources,
    "credits": _credits,
    "losses": _losses,
    "prompts": _prompts,
    "recipes": _recipes,
    "keys": _keys,
}
