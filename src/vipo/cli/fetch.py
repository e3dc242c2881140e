"""``vipo fetch``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipo.cli.arguments import Json, Overrides, Recipe
from vipo.cli.consoles import console, errors, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vipo.fetch.need import Need
    from vipo.schema import Recipe as ParsedRecipe

MISSING = 1  # exit code where something is not there


def fetch(
    recipe: Recipe,
    overrides: Overrides = None,
    download: Annotated[bool, typer.Option("--download", help="Get what can be got, then look again.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the hub for what is not known here.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe needs, what of it is here, and what gets the rest: weights, prompts, licences, sizes.

    Ends with 0 if everything is there, 1 if something is missing, 2 for a bad recipe.

    Example: `vipo fetch flux1-dev-vipo-hpsv2`
    """
    from vipo.fetch.hub import looked_up
    from vipo.fetch.needs import needs
    from vipo.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    found = needs(parsed)
    if download:
        _download(parsed, found)
        found = needs(parsed)
    if not offline and os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes", "on"):
        found = looked_up(found)
    document = _document(found)
    show(document, _table(found), as_json=as_json)
    for line in () if as_json else _lines(found, document):
        console.print(line, soft_wrap=True)  # a command is there to be copied
    if not document["complete"]:
        raise typer.Exit(MISSING)


def _download(recipe: ParsedRecipe, found: Sequence[Need]) -> None:
    """Weights and files of data sets, then the prompts that ``datasets`` reads; each is told on the error stream."""
    from vipo.errors import UserError
    from vipo.fetch.hub import download_all
    from vipo.prompts.files import named_prompts
    from vipo.prompts.hub import HUB

    for need, told in download_all(found):
        errors.print(f"{need.name}: {told}", soft_wrap=True)
    for name in dict.fromkeys((recipe.prompts.file, recipe.evaluation.prompts)):
        if name.startswith(HUB):
            try:
                errors.print(f"{name}: {len(named_prompts(name))} prompts", soft_wrap=True)
            except UserError as error:
                errors.print(str(error), soft_wrap=True)


def _document(found: Sequence[Need]) -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from vipo.files import nearest_folder

    absent = [need for need in found if not need.is_here]
    hub = [need for need in absent if need.page]
    return {
        "complete": not absent,
        "needs": [need.as_json() for need in found],
        "bytes_to_download": sum(need.size or 0 for need in hub),
        "at_least": any(need.size is None or need.at_least or need.state == "in part" for need in hub),
        "cache": HF_HUB_CACHE,
        "bytes_free": shutil.disk_usage(nearest_folder(Path(HF_HUB_CACHE))).free,
    }


def _table(found: Sequence[Need]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading, width in (("need, and what for", None), ("state", 7), ("size", 8), ("licence", 16)):
        table.add_column(heading, min_width=width, max_width=width, overflow="fold")
    for need in found:
        named = f"{need.name}\n  for {', '.join(need.used_by)}"
        table.add_row(named, need.state, _size(need), _licence(need))
    return table


def _lines(found: Sequence[Need], document: dict[str, Any]) -> list[str]:
    return [*(line for need in found if not need.is_here for line in _how(need)), *_total(document)]


def _size(need: Need) -> str:
    if need.size is None:
        return "unknown" if need.page else ""
    return f"{'at least ' if need.at_least else ''}{need.size / 1e9:.1f} GB"


def _licence(need: Need) -> str:
    if need.page is None:
        return need.licence or ""
    gate = {True: "; gated", False: "", None: "; gate unknown"}[need.gated]
    return f"{need.licence or 'unknown'}{gate}"


def _how(need: Need) -> list[str]:
    """What to do about something that is not there."""
    told = [f"lacks {', '.join(need.lacking)}"] if need.state == "in part" else []
    told += [f"gated: accept its licence at {need.page}, then `hf auth login`"] if need.gated else []
    told += [need.hint] if need.hint else []
    told += [need.command] if need.command else []
    return [f"{need.name}: {told[0]}", *(f"  {what}" for what in told[1:])] if told else [f"{need.name} is missing"]


def _total(document: dict[str, Any]) -> list[str]:
    if document["complete"]:
        return ["Everything is there."]
    least = "at least " if document["at_least"] else ""
    return [
        f"To download: {least}{document['bytes_to_download'] / 1e9:.1f} GB; {document['bytes_free'] / 1e9:.1f} GB are"
        f" free in {document['cache']}."
    ]
