"""What a run is fed beside its recipe: fingerprints of the files that the recipe names, and versions of packages.

A recipe names files; what is in them can change between a run and its resume, and the scores with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vipo.environment import environment
from vipo.prompts.hub import HUB
from vipo.schema import Recipe

WHOLE = 1 << 26  # files up to this many bytes are read whole; of larger ones, weights, the two ends
END = 1 << 16
OUTPUTS = ("generator.text_cache",)  # folders that a run writes to
CODE = ".py:"  # file.py:function


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """What tells one state of every named file and folder from another, by the key that names it.

    Packages are there as ``packages.NAME``. Of a file of more than 64 MB the size and both ends count, not all of it.
    """
    found = {key: _of(path) for key, path in _named(recipe.model_dump(mode="json"), "") if key not in OUTPUTS}
    packages: Mapping[str, str] = environment()["packages"]
    return found | {f"packages.{name}": version for name, version in packages.items()}


def others(recorded: Mapping[str, str], recipe: Recipe, keys: Collection[str]) -> list[str]:
    """Which of the files that the recipe names under these keys or sections are not what is on record, in words.

    What is on no record, or not there now, is left to whoever reads it.
    """
    if not recorded:
        return []
    return [
        f"{key} ({str(path)!r})"
        for key, path in _named(recipe.model_dump(mode="json"), "")
        if key in recorded and any(f"{key}.".startswith(f"{one}.") for one in keys) and _of(path) != recorded[key]
    ]


def _named(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    """The files that the recipe names, also as keys, as rewards are."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            below = f"{key}.{name}" if key else name
            yield from _named(name, below)
            yield from _named(entry, below)
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from _named(entry, f"{key}.{place}")
    elif isinstance(value, str) and (path := _file(value)) is not None:
        yield key, path


def _file(value: str) -> Path | None:
    """A word with a slash or an ending that is there: ``sample`` names a kind of credit whatever lies about."""
    plain = value.split(CODE)[0] + ".py" if CODE in value else _prompts_in(value)
    path = Path(plain).expanduser()
    if os.sep not in value and not path.suffix:
        return None
    try:
        return path if path.exists() else None
    except (OSError, ValueError):  # too long, or a zero byte: no path
        return None


def _prompts_in(value: str) -> str:
    """A prompt source without what is asked of it; of one on the hub the name says all, but for a folder on disk."""
    plain = value if "?" not in value or Path(value).exists() else value.partition("?")[0]
    return plain.removeprefix(HUB) if plain.startswith((f"{HUB}.", f"{HUB}/", f"{HUB}~")) else plain


def _of(path: Path) -> str:
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        digest.update(f"{file.relative_to(path)} {file.stat().st_size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as handle:
            if file.stat().st_size <= WHOLE:
                digest.update(handle.read())
            else:
                digest.update(handle.read(END))
                handle.seek(-END, os.SEEK_END)
                digest.update(handle.read())
    return digest.hexdigest()[:16]
