"""How to go on with a run: a command that works when it is pasted."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vipo.runs.run import Run

WATCHING = ("training.keep_best=", "training.stop_when=")


def ended(run: Run, words: Sequence[str], options: Sequence[str]) -> list[str]:
    """What to say of a run at its end, if anything: why it stopped and how to go on, and its best checkpoint.

    Args:
        words, options: what goes on with it, after the program's name; overrides have their place in between.
    """
    best = [] if run.best is None else [run.best]
    if run.finished:
        return best
    if run.stopped is None:
        return [*best, f"Stopped and saved after iteration {run.iteration}. {_how(run)}:\n  {_line(*words, *options)}"]
    without = [f"training.keep_best={run.recipe.training.keep_best}", "training.stop_when=null"]
    others = [word for word in words if not word.startswith(WATCHING)]
    return [
        f"Ended after iteration {run.iteration} of {run.recipe.training.iterations}, {run.stopped}.",
        *best,
        f"{_how(run)}:\n  {_line(*others, *without, *options)}\nor, with the rule, from an earlier checkpoint with"
        " --from and a lower optimizer.learning_rate.",
    ]


def _how(run: Run) -> str:
    count = run.processes
    return f"Go on, with the same launcher of {count} processes, with" if count > 1 else "Go on with"


def _line(*words: str) -> str:
    return shlex.join([*_vipo(), *words])


def _vipo() -> list[str]:
    """The words that start this program again."""
    called = Path(sys.argv[0])
    if called.suffix == ".py":  # python -m vipo
        return [sys.executable, "-m", "vipo"]
    found = shutil.which("vipo")
    return ["vipo"] if found and Path(found).resolve() == called.resolve() else [str(called)]
