"""``vipo report``, ``vipo watch``, ``vipo metrics`` and ``vipo compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vipo.cli.arguments import Json, RunFolder
from vipo.cli.consoles import console, show, warn
from vipo.errors import UserError


def report(run: RunFolder) -> None:
    """Write a run's report.html: curves, before and after, maps, health. Works while the run is going.

    Example: `vipo report runs/quickstart`
    """
    from vipo.report.page import write_report

    console.print(str(write_report(run)), soft_wrap=True)


def watch(run: RunFolder, port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0) -> None:
    """Serve a run's report on this machine, reloading as the run goes on. Ctrl-C ends it.

    Example: `vipo watch runs/quickstart`
    """
    from vipo.report.watch import watching

    server = watching(run, port)
    host, taken = server.server_address[:2]
    try:
        console.print(f"http://{host!s}:{taken}/ shows {run}; Ctrl-C ends it", highlight=False, soft_wrap=True)
        server.serve_forever()
    except KeyboardInterrupt:
        return
    finally:
        server.finish()


def metrics(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line per run and iteration.")] = False,
    as_json: Json = False,
    parquet: Annotated[Path | None, typer.Option(help="Write this file instead (needs vipo[parquet]).")] = None,
) -> None:
    """Every number that runs have logged, as one table; without a format, each number's course.

    Example: `vipo metrics runs/a runs/b --csv > both.csv`
    """
    from vipo.report.table import course, csv_text, metrics_rows, write_parquet

    _one_format(as_csv, as_json, parquet is not None)
    rows = metrics_rows(runs)
    if parquet is not None:
        write_parquet(rows, parquet)
        console.print(str(parquet), soft_wrap=True)
    elif as_csv:
        sys.stdout.write(csv_text(rows))
    else:
        show(rows, course(rows), as_json=as_json)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the yardstick.")],
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line per score and group of seeds.")] = False,
) -> None:
    """Compare the last evaluations of several runs, paired prompt by prompt; runs that differ in seed only are a group.

    Example: `vipo compare runs/quickstart-grpo runs/quickstart`

    Example: `vipo compare runs/credits/*/ --csv > credits.csv`
    """
    from dataclasses import asdict

    from vipo.report.compare import comparable, compared, group_rows, group_table, text_table
    from vipo.report.groups import groups, plain
    from vipo.report.table import csv_text

    _one_format(as_csv, as_json)
    read = comparable(runs)
    rows, gathered = compared(read), groups(read)
    warn(f"{run.folder}: left out {', '.join(run.left_out)}" for run in read if run.left_out)
    if as_csv:
        sys.stdout.write(csv_text(group_rows(gathered)))
        return
    view = text_table(rows) + (f"\n\n{group_table(gathered)}" if len(rows) > 1 else "")
    document = {"runs": [plain(asdict(row)) for row in rows], "groups": [plain(asdict(group)) for group in gathered]}
    if as_json:
        show(document, view, as_json=True)
    else:
        console.print(view, highlight=False, soft_wrap=True)


def _one_format(*asked: bool) -> None:
    if sum(asked) > 1:
        raise UserError("a table has one format at a time: give one of --csv, --json and --parquet")
