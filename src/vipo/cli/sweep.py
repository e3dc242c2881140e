"""``vipo sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vipo.cli.arguments import AllowCode, Recipe
from vipo.cli.consoles import console
from vipo.cli.train import STOPPED
from vipo.errors import RunFailed, UserError

if TYPE_CHECKING:
    from vipo.runs.pool import Ended

LAST_LINES = 3  # of a failed run's log that are shown


def sweep(
    recipe: Recipe,
    values: Annotated[
        list[str], typer.Argument(metavar="KEY=A,B,C...", help="Values in turn; of whole numbers also KEY=0..4.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/RECIPE-sweep.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how far they are; start none.")] = False,
    allow_code: AllowCode = False,
    report: Annotated[bool, typer.Option(help="Write each run's report.html at its end.")] = True,
) -> None:
    """Train every combination of values, a folder for each; called again it goes on where it was.

    Example: `vipo sweep quickstart credit=sample,advantage_map seed=0..2 --output runs/credits`

    Example: `vipo sweep quickstart optimizer.learning_rate=5e-4,1e-3 training.iterations=20 --jobs 2 --dry-run`
    """
    from vipo.runs.combinations import combinations

    found = combinations(recipe, values, allow_code=allow_code)  # before the heavy imports

    from vipo.runs.sweep import Sweep

    root = output or Path("runs") / f"{Path(recipe).stem}-sweep"
    words = [*(["--allow-code"] if allow_code else []), *([] if report else ["--no-report"])]
    runs = Sweep(recipe, found, root, words=words, jobs=jobs)
    if dry_run:
        for name, state in runs.states().items():
            _say(f"{root / name}: {state}")
        _say(f"{len(found)} runs")
        return
    ended: list[Ended] = []
    for one in runs.run(begun=lambda name: _say(f"{name}: begins")):
        ended.append(one)
        _say(f"[{len(ended)}/{len(found)}] {_said(one)}")
    _table(root, [one.name for one in ended if not one.code])
    failed = [one.name for one in ended if one.code and one.code != STOPPED]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(found)} runs failed: {'; '.join(failed)}; each has a log of that name in"
            f" {str(root)!r}; mend the cause and call the same command again, which skips what is finished"
        )
    if runs.stop.asked:
        _say("Stopped; what was under way is saved. Call the same command again to go on.")
        raise typer.Exit(STOPPED)


def _table(root: Path, finished: list[str]) -> None:
    """What the runs came to, compared with the first; a run that has nothing to compare says so in a sentence."""
    from vipo.report.compare import comparable, group_table
    from vipo.report.groups import groups

    if not finished:
        return
    try:
        console.print(
            group_table(groups(comparable([root / name for name in finished]))), highlight=False, soft_wrap=True
        )
    except UserError as error:
        _say(f"The runs cannot be compared: {error}")


def _said(one: Ended) -> str:
    if one.code is None:
        return f"{one.name}: was finished"
    if one.code == 0:
        return f"{one.name}: done in {one.seconds:.0f} s"
    what = "stopped" if one.code == STOPPED else f"FAILED with exit code {one.code}"
    tail = one.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    return "\n    ".join([f"{one.name}: {what} after {one.seconds:.0f} s; {one.log} ends with", *tail])


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
