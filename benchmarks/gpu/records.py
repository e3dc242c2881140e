"""What the parts of the check hand to one another: JSON files, each whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vipo.files import lines, write_text


def write(path: Path, record: Any) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")


def read(path: Path) -> Any:
    """The record at ``path``, None if its part wrote none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_all(path: Path) -> list[Any]:
    """The records of a ``.jsonl`` file; a line that is being written does not count."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in lines(whole)]
