"""Where the commands speak: results on the output stream, the rest on the error stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

# What is printed is data: a name may look like markup, or a path like :x:.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


def show(document: Any, view: RenderableType, *, as_json: bool) -> None:
    """One result, for a program or for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        console.print(view)


def warn(sentences: Iterable[str]) -> None:
    """On the error stream, so that what is read by a program stays what it is."""
    for sentence in sentences:
        errors.print(sentence, soft_wrap=True)


@contextmanager
def counting(prompts: int) -> Iterator[Callable[[int], None]]:
    """A line on a terminal's error stream that says how many prompts are done."""
    with errors.status(f"0 of {prompts} prompts") as status:
        yield lambda done: status.update(f"{done} of {prompts} prompts")
