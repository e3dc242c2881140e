"""Reads prompts and deals them out: which prompts an iteration trains on is a function of (seed, iteration) alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vipo import randomness
from vipo.types import Prompt, UserError

TEXT_KEYS = ("prompt", "text", "caption")  # columns that may hold the prompt, in this order


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file: ``.txt`` (one a line), or ``.jsonl``, ``.csv``, ``.parquet`` with a column for them.

    Empty lines are skipped. The column is called prompt, text or caption; others become
    ``Prompt.metadata``.

    Raises:
        UserError: the file is missing, unreadable, of another kind, or holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {str(path)!r} does not exist")
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"prompt file {str(path)!r} must end in one of {', '.join(readers)}")
    try:
        rows = list(readers[path.suffix](path))
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, not JSON, not Parquet
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error}") from error
    prompts = [_prompt(row, index, path) for index, row in enumerate(rows)]
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} holds no prompt")
    return prompts


def _read_text(path: Path) -> Iterable[Mapping[str, Any]]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return ({"prompt": line} for line in lines if line)


def _read_jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())


def _read_csv(path: Path) -> Iterable[Mapping[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


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
    key = next((key for key in TEXT_KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if key is None:
        raise UserError(f"entry {index + 1} of {str(path)!r} has no text under {' or '.join(TEXT_KEYS)}")
    return Prompt(row[key].strip(), index, {k: v for k, v in row.items() if k != key})


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

    def _at(self, position: int) -> Prompt:
        lap, place = divmod(position, len(self.prompts))
        order = randomness.permutation(len(self.prompts), seed=self.seed, purpose="prompts", indices=(lap,))
        return self.prompts[order[place]]
