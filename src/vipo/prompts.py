"""Reads prompts and deals them out: which prompts an iteration trains on is a function of (seed, iteration) alone."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vipo import randomness
from vipo.files import read_lines
from vipo.types import Prompt, UserError

TEXT_KEYS = ("prompt", "text", "caption", "prompts")  # columns that may hold the prompt, in this order, in any case
SHIPPED = "set:"  # before the name of a benchmark's prompts that come with the package
SPACE = " \t\r\n"  # taken off a prompt's ends; rarer white space may be meant and stays
_SETS = Path(__file__).parent / "prompt_sets"


def shipped_sets() -> dict[str, Path]:
    """The benchmark prompts that ship with the package, by name; ``prompt_sets/README.md`` has sources and licences."""
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


def names_prompts(entry: str) -> bool:
    """Whether a word is meant as a prompt file or a folder of them, not as a prompt."""
    return entry.startswith(SHIPPED) or Path(entry).suffix in _READERS or os.path.isdir(entry)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON and a command line can bring half of a character, a lone surrogate."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file, or of a folder of ``.json`` files.

    ``.txt`` has one a line; ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet`` have a column for them; ``.json`` is a list
    of texts or of objects. The column is called prompt, text, caption or prompts; others become ``Prompt.metadata``.
    Only a newline, alone or after a carriage return, ends a line, and empty lines are skipped. In a folder every file
    is one style, as HPD v2 has it: its name becomes the metadata ``style``, in alphabetical order.

    Raises:
        UserError: the file is missing, unreadable, of another kind, or holds no prompt.
    """
    path = Path(path)
    rows = _read_styles(path) if path.is_dir() else _read_rows(path)
    prompts = [_prompt(row, index, path) for index, row in enumerate(rows)]
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} holds no prompt")
    return prompts


def _read_styles(folder: Path) -> list[Any]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"folder {str(folder)!r} has no .json file of prompts; name a prompt file, or such a folder")
    pairs = [(file.stem, row) for file in files for row in _read_rows(file)]
    return [{**row, "style": style} if isinstance(row, Mapping) else row for style, row in pairs]


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"prompt file {str(path)!r} does not exist")
    if path.suffix not in _READERS:
        raise UserError(f"prompt file {str(path)!r} must end in one of {', '.join(_READERS)}")
    try:
        return list(_READERS[path.suffix](path))
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, not JSON, not Parquet
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
            return list(csv.DictReader(file))
        except csv.Error as error:
            if "new-line" not in str(error):
                raise
            raise ValueError("a carriage return stands alone outside double quotes; put its cell into them") from error


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


def _prompt(row: object, index: int, path: Path) -> Prompt:
    if not isinstance(row, Mapping):
        raise UserError(f"entry {index + 1} of {str(path)!r} is not an object with a {' or '.join(TEXT_KEYS)} key")
    named = {str(key).lower(): key for key in reversed(row) if isinstance(row[key], str) and row[key].strip()}
    key = next((named[wanted] for wanted in TEXT_KEYS if wanted in named), None)
    if key is None:
        raise UserError(f"entry {index + 1} of {str(path)!r} has no text under {' or '.join(TEXT_KEYS)}")
    if not is_unicode(row[key]):
        raise UserError(f"entry {index + 1} of {str(path)!r} holds half of a character: {row[key]!r}; write it again")
    return Prompt(row[key].strip(SPACE), index, {k: v for k, v in row.items() if k != key})


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


@lru_cache(maxsize=2)
def _order(count: int, seed: int, lap: int) -> tuple[int, ...]:
    """How one pass over the prompts goes."""
    return tuple(randomness.permutation(count, seed=seed, purpose="prompts", indices=(lap,)))


class PromptSampler:
    """Deals ``per_iteration`` prompts to each iteration, every prompt once before any comes again.

    The order is reshuffled for each pass over the file from ``seed`` alone, so iteration 500 can be asked for directly.
    """

    def __init__(self, prompts: Sequence[Prompt], *, per_iteration: int, seed: int) -> None:
        if not prompts:
            raise ValueError("no prompts to sample from")
        self.prompts = tuple(prompts)
        self.per_iteration = per_iteration
        self.seed = seed

    def groups(self, iteration: int) -> list[Prompt]:
        """The prompts of one iteration, one per group, over all ranks."""
        first = iteration * self.per_iteration
        return [self._at(position) for position in range(first, first + self.per_iteration)]

    def dealt(self, iterations: int) -> list[Prompt]:
        """The prompts of the first so many iterations, each once, in the order in which they come."""
        return [self._at(position) for position in range(min(iterations * self.per_iteration, len(self.prompts)))]

    def _at(self, position: int) -> Prompt:
        lap, place = divmod(position, len(self.prompts))
        return self.prompts[_order(len(self.prompts), self.seed, lap)[place]]
