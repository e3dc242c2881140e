"""How to go on with a run: a command that works when it is pasted."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vipo.runs.run import Run


def stopped(run: Run, words: Sequence[str]) -> str:
    """What to say of a run that was stopped; ``words`` after the program's name go on with it."""
    count = run.processes
    how = f"Go on, with the same launcher of {count} processes, with" if count > 1 else "Go on with"
    return f"Stopped and saved after iteration {run.iteration}. {how}:\n  {shlex.join([*_vipo(), *words])}"


def _vipo() -> list[str]:
    """The words that start this program again."""
    called = Path(sys.argv[0])
    if called.suffix == ".py":  # python -m vipo
        return [sys.executable, "-m", "vipo"]
    found = shutil.which("vipo")
    return ["vipo"] if found and Path(found).resolve() == called.resolve() else [str(called)]
