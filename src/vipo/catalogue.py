"""What can be named in a recipe, as rows for a table or JSON."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from vipo.backbones import NOTES
from vipo.generators import GENERATORS
from vipo.prompts import read_prompts, shipped_sets
from vipo.recipe import Recipe, load_recipe, nested_section, shipped_recipes
from vipo.resume import rule_of
from vipo.rewards import REWARDS, state

Row = dict[str, str]


def _generators() -> list[Row]:
    return [{"generator": name, "adapts": entry.summary} for name, entry in GENERATORS.items()]


def _backbones() -> list[Row]:
    return [
        {"backbone": name, "what": notes.summary, "weights": notes.weights, "licence": notes.licence}
        for name, notes in NOTES.items()
    ]


def _rewards() -> list[Row]:
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


def _prompts() -> list[Row]:
    return [{"prompts": f"set:{name}", "count": str(len(read_prompts(path)))} for name, path in shipped_sets().items()]


def _recipes() -> list[Row]:
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


def _keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[Row]:
    """Every key of a recipe, nested ones with dots."""
    rows: list[Row] = []
    for name, entry in section.model_fields.items():
        nested = nested_section(entry.annotation)
        if nested is None or entry.description:
            default = "required" if entry.is_required() else str(entry.get_default(call_default_factory=True))
            key = prefix + name
            rows.append({"key": key, "default": default, "meaning": entry.description or "", "on resume": rule_of(key)})
        if nested is not None:
            many = "NAME." if entry.description and "dict" in str(entry.annotation) else ""
            rows += _keys(nested, f"{prefix}{name}.{many}")
    return rows


CATALOGUES: dict[str, Callable[[], list[Row]]] = {
    "generators": _generators,
    "backbones": _backbones,
    "rewards": _rewards,
    "prompts": _prompts,
    "recipes": _recipes,
    "keys": _keys,
}
