"""What the explorer is opened with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vipo.errors import UserError
from vipo.explorer.look import read
from vipo.explorer.opened import open_run
from vipo.explorer.settings import Settings


@dataclass(frozen=True)
class Opening:
    """What is there when the page is opened.

    Args:
        picture: a picture or clip to look at, run: a run's folder; None for neither.
        output: the folder that sheets and recipe lines are saved in.
    """

    picture: Path | None
    run: Path | None
    settings: Settings
    output: Path


def opening_of(named: Sequence[Path], settings: Settings, output: Path) -> Opening:
    """What is named on the command line: a file, a run's folder, one of each, or nothing.

    Raises:
        UserError: more than one of a kind, or what cannot be opened.
    """
    runs = [path for path in named if path.is_dir()]
    pictures = [path for path in named if not path.is_dir()]
    for kind, found in (("run's folder", runs), ("picture or clip", pictures)):
        if len(found) > 1:
            raise UserError(f"--ui opens one {kind}, not {len(found)}; give one, and choose the others on the page")
    for path in pictures:
        read(path)
    for folder in runs:
        open_run(folder)
    return Opening(next(iter(pictures), None), next(iter(runs), None), settings, output)
