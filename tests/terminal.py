"""What a command said, and what a refusal looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Said(NamedTuple):
    code: int
    out: str
    err: str


Vipo = Callable[..., Said]


def assert_refused(said: Said, *words: str) -> None:
    """Exit code 2, one sentence on the error stream, no trace."""
    assert said.code == 2, said
    sentence = said.err.strip()
    assert sentence.startswith("vipo: ") and "\n" not in sentence and "Traceback" not in said.out + said.err, said
    for word in words:
        assert word in sentence


def imported(code: str, *arguments: str | Path) -> set[str]:
    """Every module that a new process has loaded at the end of ``code``, whatever its exit code."""
    tell = "import atexit, sys; atexit.register(lambda: sys.stderr.write('\\nloaded ' + ' '.join(sys.modules)))\n"
    command = [sys.executable, "-c", tell + code, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in said.stderr, said.stderr
    return set(said.stderr.rpartition("\nloaded ")[2].split())
