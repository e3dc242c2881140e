"""``vipo train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vipo.cli.arguments import AllowCode, Overrides, Recipe
from vipo.cli.consoles import console

STOPPED = 130  # exit code of a run that was asked to stop, as shells have it


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint in --output.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option("--from", help="With --resume: go on from this checkpoint, e.g. step-000010; later ones go."),
    ] = None,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: a key or section that may differ now; may be given several times."),
    ] = None,
    allow_code: AllowCode = False,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
) -> None:
    """Train a recipe.

    Example: `vipo train recipes/quickstart.yaml credit=sample --output runs/scalar`

    Example: `vipo train quickstart optimizer.learning_rate=1e-4 --resume --from step-000010`
    """
    from vipo.recipe import load_recipe

    parsed = load_recipe(
        recipe, overrides or [], allow_code=allow_code
    )  # before the heavy imports, so that a slip is told at once

    from vipo.cli.going_on import ended
    from vipo.cli.progress import follow
    from vipo.runs.run import Run

    folder = output or Path("runs") / parsed.name
    run = Run(parsed, folder, resume=resume, checkpoint=checkpoint, allow_changes=allow_changes or ())
    console.quiet = not run.writes  # with several processes, one speaks
    follow(run, console)
    said = ["--output", str(folder), "--resume", *([] if report else ["--no-report"])]
    said += ["--allow-code"] if allow_code else []
    said += [word for key in allow_changes or () for word in ("--allow-changes", key)]
    for sentence in ended(run, ["train", recipe, *(overrides or [])], said):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if not run.over:
        raise typer.Exit(STOPPED)
    if report and run.writes:
        from vipo.report.page import write_report

        console.print(f"Report: {write_report(folder)}", soft_wrap=True)
