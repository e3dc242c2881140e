"""Reads prompts by the name of their source: files, sets that ship with the package, data sets on the hub."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vipo import embedded
from vipo.errors import UserError
from vipo.files import is_unicode, read_lines
from vipo.prompts.hub import HUB, download, hub_source, kept_entries
from vipo.prompts.selection import Selection, cell, selection, split

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
    plain, asked = split(entry)
    is_file = Path(plain if asked else entry).suffix.lower() in _READERS or _is_folder(entry)
    return is_file or entry.startswith((SHIPPED, EMBEDDED, HUB))


def _is_folder(entry: str) -> bool:
    try:
        return os.path.isdir(entry)
    except ValueError:  # a name with NUL in it
        return False


def named_prompts(name: str) -> list[Prompt]:
    """The prompts of ``prompts.file``: a file or folder, ``set:NAME``, ``embedded:NAME`` or ``hub:OWNER/NAME@COMMIT``.

    After a ``?`` follows which of them are meant, see :mod:`vipo.prompts.selection`. Each prompt then comes once, and
    columns beside it are left out unless they are kept.

    Raises:
        UserError: as :func:`read_entries`, or what is asked for makes no sense.
    """
    if name.startswith(HUB):
        return _as_prompts(_hub_entries(name))
    plain, asked = (name, {}) if os.path.exists(os.path.expanduser(name)) else split(name)
    return read_prompts(prompt_file(plain), selection(name, asked) if asked else None)


def _hub_entries(name: str) -> list[tuple[str, dict[str, Any]]]:
    source = hub_source(name)
    if source.file is not None:
        return read_entries(download(source), source.select)
    return kept_entries(source, lambda rows: _entries(rows, Path(source.repository), source.select))


def read_prompts(path: str | Path, select: Selection | None = None) -> list[Prompt]:
    """The entries of :func:`read_entries` as prompts."""
    return _as_prompts(read_entries(path, select))


def _as_prompts(entries: Iterable[tuple[str, dict[str, Any]]]) -> list[Prompt]:
    from vipo.types import Prompt  # needs torch, and a list of what can be read does not

    return [Prompt(text, index, metadata) for index, (text, metadata) in enumerate(entries)]


def read_entries(path: str | Path, select: Selection | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of a file, or of a folder of ``.json`` files, each with its metadata.

    ``.txt`` has one a line; ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet`` have a column for them; ``.json`` is a list
    of texts or of objects. The column is called prompt, text, caption or prompts; others are metadata.
    Only a newline, alone or after a carriage return, ends a line, and empty lines are skipped. In a folder every file
    is one style, as HPD v2 has it: its name becomes the metadata ``style``, in alphabetical order.

    Raises:
        UserError: the file is missing, unreadable, of another kind, or holds no prompt.
    """
    path = Path(path)
    return _entries(_read_styles(path) if path.is_dir() else _read_rows(path), path, select)


def _entries(rows: Iterable[Any], path: Path, select: Selection | None) -> list[tuple[str, dict[str, Any]]]:
    if select is None:
        entries = [_entry(row, index, path) for index, row in enumerate(rows)]
    else:
        entries = list(islice(_selected(rows, path, select), select.limit))
    if not entries:
        raise UserError(f"prompt file {str(path)!r} holds no prompt{'' if select is None else ' that is asked for'}")
    return entries


def _selected(rows: Iterable[Any], path: Path, select: Selection) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is asked for, each prompt once; rows without one are passed over, like empty lines."""
    seen, source = set[str](), repr(str(path))
    for index, row in enumerate(rows):
        if isinstance(row, Mapping) and (_is_blank(row, select.column) or not select.takes(row, source)):
            continue
        text, _ = _entry(row, index, path, select.column)
        if text not in seen:
            seen.add(text)
            yield text, select.metadata(row, source)


def _read_styles(folder: Path) -> list[Any]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(
            f"folder {str(folder)!r} has no .json file of prompts; name a prompt file, or such a folder; if"
            " it is meant as a prompt, write it into a .txt file"
        )
    pairs = [(file.stem, row) for file in files for row in _read_rows(file)]
    return [{**row, "style": style} if isinstance(row, Mapping) else row for style, row in pairs]


def _read_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"prompt file {str(path)!r} does not exist")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompt file {str(path)!r} must end in one of {', '.join(_READERS)}")
    try:
        yield from reader(path)
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
            yield from (_fitting(row, number) for number, row in enumerate(csv.DictReader(file), start=1))
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
        raise UserError("parquet prompt files need pyarrow: pip install 'vipo[parquet]'") from error
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _is_blank(row: Mapping[Any, Any], column: str | None) -> bool:
    """Whether every cell that may hold the prompt is there and empty."""
    names = [name for name in row if (str(name).lower() in TEXT_KEYS if column is None else name == column)]
    return bool(names) and all(not str(row[name] or "").strip() for name in names)


def _entry(row: object, index: int, path: Path, column: str | None = None) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, Mapping):
        raise UserError(f"entry {index + 1} of {str(path)!r} is not an object with a {' or '.join(TEXT_KEYS)} key")
    if column is not None:
        cell(row, column, repr(str(path)))
    wanted = TEXT_KEYS if column is None else (column.lower(),)
    alone = column is None and len(row) == 1 and isinstance(row.get("prompt"), str) and row["prompt"].strip()
    key = "prompt" if alone else _column(row, wanted)
    if key is None:
        raise UserError(f"entry {index + 1} of {str(path)!r} has no text under {' or '.join(wanted)}")
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


def _column(row: Mapping[str, Any], wanted: Sequence[str]) -> str | None:
    """Which key holds the prompt."""
    named = {str(key).lower(): key for key in reversed(list(row)) if isinstance(row[key], str) and row[key].strip()}
    return next((named[word] for word in wanted if word in named), None)


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
