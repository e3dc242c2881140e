"""Reads prompts from files, and from the sets that ship with the package."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vipo import embedded
from vipo.errors import UserError
from vipo.files import is_unicode, read_lines

if TYPE_CHECKING:
    from vipo.types import Prompt

TEXT_KEYS = ("prompt", "text", "caption", "prompts")  # columns that may hold the prompt, in this order, in any case
EMBEDDED = "embedded:"  # before the name of a file or model that ships with the package
SHIPPED = "set:"  # before the name of a benchmark's prompts that come with the package
LONGEST_PROMPT = 2**16  # characters; models read some hundred words
SPACE = " \t\r\n"  # taken off a prompt's ends; rarer white space may be meant and stays
_SETS = Path(__file__).parent / "sets"


def shipped_sets() -> dict[str, Path]:
    """The benchmark prompts that ship with the package, by name; ``sets/README.md`` has sources and licences."""
    return {path.stem: path for path in sorted(_SETS.iterdir()) if path.suffix in _READERS}


def shipped_set(name: str) -> Path:
    """The file of one of them.

    Raises:
        UserError: there is none of that name.
    """
    found = shipped_sets()
    if name not in found:
        raise UserError(f"there is no prompt set {name!r}; choose from {', '.join(SHIPPED + known for known in found)}")
    return found[name]


def prompt_file(name: str) -> Path:
    """A prompt file's path; ``embedded:NAME`` and a benchmark's ``set:NAME`` ship with the package."""
    if name.startswith(EMBEDDED):
        return Path(embedded.__file__).parent / f"{name.removeprefix(EMBEDDED)}.txt"
    if name.startswith(SHIPPED):
        return shipped_set(name.removeprefix(SHIPPED))
    return Path(name).expanduser()


def names_prompts(entry: str) -> bool:
    """Whether a word is meant as a prompt file or a folder of them, not as a prompt."""
    return entry.startswith(SHIPPED) or Path(entry).suffix.lower() in _READERS or _is_folder(entry)


def _is_folder(entry: str) -> bool:
    try:
        return os.path.isdir(entry)
    except ValueError:  # a name with NUL in it
        return False


def read_prompts(path: str | Path) -> list[Prompt]:
    """The entries of :func:`read_entries` as prompts."""
    from vipo.types import Prompt  # needs torch, and a list of what can be read does not

    return [Prompt(text, index, metadata) for index, (text, metadata) in enumerate(read_entries(path))]


def read_entries(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of a file, or of a folder of ``.json`` files, each with its metadata.

    ``.txt`` has one a line; ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet`` have a column for them; ``.json`` is a list
    of texts or of objects. The column is called prompt, text, caption or prompts; others are metadata.
    Only a newline, alone or after a carriage return, ends a line, and empty lines are skipped. In a folder every file
    is one style, as HPD v2 has it: its name becomes the metadata ``style``, in alphabetical order.

    Raises:
        UserError: the file is missing, unreadable, of another kind, or holds no prompt.
    """
    path = Path(path)
    rows = _read_styles(path) if path.is_dir() else _read_rows(path)
    entries = [_entry(row, index, path) for index, row in enumerate(rows)]
    if not entries:
        raise UserError(f"prompt file {str(path)!r} holds no prompt")
    return entries


def _read_styles(folder: Path) -> list[Any]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(
            f"folder {str(folder)!r} has no .json file of prompts; name a prompt file, or such a folder; if"
            " it is meant as a prompt, write it into a .txt file"
        )
    pairs = [(file.stem, row) for file in files for row in _read_rows(file)]
    return [{**row, "style": style} if isinstance(row, Mapping) else row for style, row in pairs]


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"prompt file {str(path)!r} does not exist")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompt file {str(path)!r} must end in one of {', '.join(_READERS)}")
    try:
        return list(reader(path))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {str(path)!r} cannot be read as UTF-8: {error}; save it in that encoding"
        ) from error
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # ValueError: not JSON, not Parquet
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error}") from error


def _read_text(path: Path) -> Iterable[Mapping[str, Any]]:
    return ({"prompt": line} for line in read_lines(path) if line.strip())


def _read_jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    return (json.loads(line) for line in read_lines(path) if line.strip())


def _read_json(path: Path) -> Iterable[Any]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("it must be a list of texts or of objects")
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]


def _read_csv(path: Path) -> Iterable[Mapping[str, Any]]:
    """In double quotes a cell may hold newlines; outside them a lone carriage return is refused, not taken for one."""
    with path.open(newline="\n", encoding="utf-8-sig") as file:
        try:
            return [_fitting(row, number) for number, row in enumerate(csv.DictReader(file), start=1)]
        except csv.Error as error:
            if "new-line" not in str(error):
                raise
            raise ValueError("a carriage return stands alone outside double quotes; put its cell into them") from error


def _fitting(row: dict[Any, Any], number: int) -> Mapping[str, Any]:
    """A row without cells beyond the columns that have a name; only empty ones may be there."""
    if any(cell.strip() for cell in row.pop(None, None) or ()):
        raise ValueError(f"row {number} has more cells than there are columns; put a cell with commas into quotes")
    return row


def _read_tsv(path: Path) -> Iterable[Mapping[str, Any]]:
    """Tabs only: in PartiPrompts a quotation mark is part of the prompt."""
    cells = [line.split("\t") for line in read_lines(path) if line]
    return [dict(zip(cells[0], row, strict=False)) for row in cells[1:]]


def _read_parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet prompt files need pyarrow; install vipo[parquet]") from error
    rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _entry(row: object, index: int, path: Path) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, Mapping):
        raise UserError(f"entry {index + 1} of {str(path)!r} is not an object with a {' or '.join(TEXT_KEYS)} key")
    key = "prompt" if len(row) == 1 and isinstance(row.get("prompt"), str) and row["prompt"].strip() else _column(row)
    if key is None:
        raise UserError(f"entry {index + 1} of {str(path)!r} has no text under {' or '.join(TEXT_KEYS)}")
    if "\0" in row[key]:
        raise UserError(f"entry {index + 1} of {str(path)!r} holds a NUL: it is no text, or not UTF-8; save it so")
    if len(row[key]) > LONGEST_PROMPT:
        raise UserError(
            f"entry {index + 1} of {str(path)!r} has {len(row[key])} characters, more than the {LONGEST_PROMPT} of a"
            " prompt; is it a prompt file, one a line?"
        )
    if not is_unicode(row[key]):
        raise UserError(f"entry {index + 1} of {str(path)!r} holds half of a character: {row[key]!r}; write it again")
    metadata = {k: v for k, v in row.items() if k != key} if len(row) > 1 else {}
    return row[key].strip(SPACE), metadata


def _column(row: Mapping[str, Any]) -> str | None:
    """Which key holds the prompt."""
    named = {str(key).lower(): key for key in reversed(list(row)) if isinstance(row[key], str) and row[key].strip()}
    return next((named[wanted] for wanted in TEXT_KEYS if wanted in named), None)


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
