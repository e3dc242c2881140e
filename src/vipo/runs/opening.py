"""Putting a folder to where a run begins or goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from vipo.environment import environment
from vipo.files import complete_lines, remove, write_text, written_whole
from vipo.media.recordings import ROLLOUTS
from vipo.runs.directory import CHECKPOINTS, EVALUATIONS, LOGS, RECIPE, RunDirectory
from vipo.runs.resume import Start
from vipo.training.saved import discard, name_of

PICTURED = ("samples", "maps", ROLLOUTS)  # folders of files by iteration
_STEP = re.compile(r"step-(\d{6,})")


def settle(root: Path, start: Start, recipe_yaml: str, *, processes: int) -> None:
    """Put the folder to where the run begins; the recipe is the one it goes on with."""
    if start.resumed:
        _rewind(root, start)
    else:
        for name in LOGS:  # of a run that failed before its first iteration was done
            (root / name).unlink(missing_ok=True)
    write_text(root / RECIPE, recipe_yaml)
    if not start.resumed:
        write_text(root / "environment.json", json.dumps(environment(processes), indent=2) + "\n")


def _stays(line: str, last: int) -> bool:
    """Whether a record is of an iteration before ``last``; damaged wall times stay, for the report to count."""
    try:
        return bool(json.loads(line)["iteration"] < last)
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def _left_behind(root: Path) -> list[Path]:
    """What a killed process had begun to write or to remove."""
    folders = (".", CHECKPOINTS, *PICTURED)
    return [path for folder in folders for path in (root / folder).glob(".*.partial")]


def _rewind(root: Path, start: Start) -> None:
    """Drop what was saved and logged after the checkpoint: those iterations will be run again.

    Checkpoints go first, the newest before the others: killed at any moment, the latest that is left has its log. One
    from elsewhere is copied among the run's own before.
    """
    saved, own = start.saved, root / CHECKPOINTS
    if saved is not None and saved.path.resolve().parent != own.resolve():
        with written_whole(own / name_of(start.iteration)) as aside:
            shutil.copytree(saved.path, aside)
    later = saved.later if saved is not None else ()
    for path in later:
        discard(path)
    told = [root / "report.html", *RunDirectory(root).exports_after(start.iteration)] if later else []
    for path in [*told, *_left_behind(root)]:
        remove(path)
    for name in filter(lambda name: (root / name).exists(), LOGS):
        # An evaluation stands for the state *before* the iteration of its number, a metric for the iteration.
        last = start.evaluations_end if name == EVALUATIONS else start.iteration
        kept = [line for line in complete_lines(root / name, errors="replace") if _stays(line, last)]
        write_text(root / name, "".join(f"{line}\n" for line in kept))
    for path in [path for folder in PICTURED for path in root.glob(f"{folder}/step-*")]:
        last = start.evaluations_end if path.parent.name == "samples" else start.iteration
        number = _STEP.fullmatch(path.stem)
        if number and int(number[1]) >= last:
            remove(path)
