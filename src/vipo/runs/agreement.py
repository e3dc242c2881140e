"""Processes that train together must begin with the same: what each sees is compared before anything is built.

Otherwise they wait for each other until a time-out, or train on with different weights and say nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

from vipo.engine import Engine
from vipo.errors import UserError
from vipo.runs import lock
from vipo.schema import Recipe

SECONDS = 5.0  # until a file that another machine has just written is seen on a shared disk
FOLDER, CHECKPOINT = "output folder", "checkpoint"
MISSING = ""


def check_agreed(
    engine: Engine, recipe: Recipe, versions: Mapping[str, str], root: Path, *, shared: bool, state: Path | None
) -> None:
    """Compare what all processes see.

    Args:
        versions: of packages and files, by what they are called.
        root: the run's folder, which the first process has locked.
        shared: whether every process must see that folder.
        state: the index of the checkpoint to go on from.

    Raises:
        UserError: one sees something else than the first; every process raises it.
    """
    if engine.ranks == 1:
        return
    seen = {**versions, "recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:16]}
    if shared:
        seen[FOLDER] = _text(root / lock.NAME)
    if state is not None:
        seen[CHECKPOINT] = hashlib.sha256(_text(state).encode()).hexdigest() if _text(state) else MISSING
    first, *others = engine.everyones(seen)
    for rank, other in enumerate(others, 1):
        for key in (key for key in {**first, **other} if first.get(key) != other.get(key)):
            where = root if key == FOLDER or state is None else state.parent
            raise UserError(_told(rank, key, other.get(key), first.get(key), where))


def _text(file: Path) -> str:
    """What is in a file, soon if not at once; nothing if it is not there."""
    end = time.monotonic() + SECONDS
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return MISSING


def _told(rank: int, key: str, here: str | None, first: str | None, where: Path) -> str:
    share = "the output folder must be on a disk that all processes share"
    if key == FOLDER:
        return f"rank {rank} does not see {str(where)!r} as rank 0 does: {share}"
    if key == CHECKPOINT and here == MISSING:
        return f"rank {rank} sees no checkpoint {where.name!r} in {str(where.parent)!r}: {share}"
    if key == CHECKPOINT:
        return f"rank {rank} sees another checkpoint {where.name!r} in {str(where.parent)!r} than rank 0: {share}"
    return (
        f"rank {rank} has {key} {here or 'none'}, but rank 0 has {first or 'none'}: start every process with the same"
        " recipe, files and packages"
    )
