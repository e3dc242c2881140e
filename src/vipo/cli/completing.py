"""What a shell offers after a tab, beside the options: recipes, recipe keys, runs and lists. It imports no torch.

`vipo --install-completion` sets it up for the shell it is called in, `vipo --show-completion` prints what that writes.
Where nothing here begins as it was typed, the shell offers its own file names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vipo.cli.catalogue import CATALOGUES

RUNS = Path("runs")  # where runs are written unless told otherwise


def recipes(typed: str) -> list[str]:
    """Names of shipped recipes."""
    from vipo.recipe import shipped_recipes

    return _beginning(shipped_recipes(), typed)


def overrides(typed: str) -> list[str]:
    """KEY= of every key of a recipe whose name is fixed."""
    return _beginning((f"{row['key']}=" for row in CATALOGUES["keys"]() if "NAME" not in row["key"]), typed)


def runs(typed: str) -> list[str]:
    """Folders below runs/ that hold a run."""
    return _beginning(sorted(str(recipe.parent) for recipe in RUNS.glob("*/recipe.yaml")), typed)


def kinds(typed: str) -> list[str]:
    """What `vipo list` lists."""
    return _beginning(CATALOGUES, typed)


def _beginning(names: Iterable[str], typed: str) -> list[str]:
    return [name for name in names if name.startswith(typed)]
