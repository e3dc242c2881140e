"""Files that are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of ``path`` to write to; it takes the name ``path`` only once it is complete.

    Works for a file or a folder. Whatever goes wrong inside, ``path`` keeps what it was and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    remove(aside)
    try:
        yield aside
        _flush(aside)
        if path.is_dir():
            remove(path)
        os.replace(aside, path)
    finally:
        remove(aside)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Force the bytes to disk, so that the rename never survives a crash that the contents did not."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")
