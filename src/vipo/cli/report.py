"""``vipo report``, ``vipo watch``, ``vipo metrics`` and ``vipo compare``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from vipo.cli import completing
from vipo.cli.arguments import Json, RunFolder
from vipo.cli.consoles import console, show, warn
from vipo.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="A run directory.", autocompletion=completing.runs)],
) -> None:
    """Write a run's report.html: curves, before and after, maps, health. Works while the run is going.

    Example: `vipo report runs/quickstart`
    """
    if len(runs) > 1:
        words = " ".join(shlex.quote(str(run)) for run in runs)
        raise UserError(
            f"a report is of one run, not of {len(runs)}; several runs on one page: vipo compare {words} --html PATH"
        )

    from vipo.report.page import write_report

    console.print(str(write_report(runs[0])), soft_wrap=True)


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

    _one_format({"--csv": as_csv, "--json": as_json, "--parquet": parquet is not None})
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
    html: Annotated[
        Path | None, typer.Option(help="Write this page instead: the tables, curves and pictures side by side.")
    ] = None,
) -> None:
    """Compare the last evaluations of several runs, paired prompt by prompt; runs that differ in seed only are a group.

    Example: `vipo compare runs/quickstart-grpo runs/quickstart`

    Example: `vipo compare runs/credits/*/ --csv > credits.csv`

    Example: `vipo compare runs/credits/*/ --html credits.html`
    """
    _one_format({"--csv": as_csv, "--json": as_json, "--html": html is not None})
    if html is not None and html.is_dir():  # such as a run, where the path was forgotten
        raise UserError(f"--html names the page to write, and {str(html)!r} is a folder; add a file name to it")

    from dataclasses import asdict

    from vipo.report.compare import comparable, compared, group_rows, group_table, missing, text_table
    from vipo.report.groups import groups, plain
    from vipo.report.table import csv_text
    from vipo.report.together import write_together

    read = comparable(runs)
    warn(missing(read))
    if html is not None:
        write_together(read, html)
        console.print(str(html), soft_wrap=True)
        return
    rows, gathered = compared(read), groups(read)
    if as_csv:
        sys.stdout.write(csv_text(group_rows(gathered)))
        return
    view = text_table(rows) + (f"\n\n{group_table(gathered)}" if len(rows) > 1 else "")
    document = {"runs": [plain(asdict(row)) for row in rows], "groups": [plain(asdict(group)) for group in gathered]}
    if as_json:
        show(document, view, as_json=True)
    else:
        console.print(view, highlight=False, soft_wrap=True)


def _one_format(asked: Mapping[str, bool]) -> None:
    """By the option that asks for it."""
    *others, last = asked
    if sum(asked.values()) > 1:
        raise UserError(f"a table has one format at a time: give one of {', '.join(others)} and {last}")
