"""``vipo report`` and ``vipo compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vipo.cli.arguments import RunFolder
from vipo.cli.consoles import console


def report(run: RunFolder) -> None:
    """Write a run's report.html: curves, before and after, maps, health. Works while the run is going.

    Example: `vipo report runs/quickstart`
    """
    from vipo.report.page import write_report

    console.print(str(write_report(run)), soft_wrap=True)


def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the yardstick.")]) -> None:
    """Compare the last evaluations of several runs, paired prompt by prompt.

    Example: `vipo compare runs/quickstart-grpo runs/quickstart`
    """
    from vipo.report.compare import compare_runs, text_table

    console.print(text_table(compare_runs(runs)), highlight=False, soft_wrap=True)
