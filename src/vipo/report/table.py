"""Runs as one table of numbers: a row per iteration, for a spreadsheet, a notebook or a program."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.files import written_whole
from vipo.report.run import RunRecord, read_run

Row = dict[str, Any]
FIRST = ("run", "iteration", "pictures")  # columns


def metrics_rows(run_dirs: Sequence[Path | str]) -> list[Row]:
    """Every number on record of some runs, a row per run and iteration; a missing number is None.

    ``pictures`` counts the samples drawn before the iteration, ``seconds/PHASE`` is its wall time,
    ``evaluation/NAME`` the mean score found before it, and ``events`` what fired in it. The evaluation after the last
    iteration has a row of its own.

    Raises:
        UserError: a folder is not a run directory.
    """
    rows = [row for folder in run_dirs for row in _rows(read_run(Path(folder)))]
    columns = dict.fromkeys([*FIRST, *(key for row in rows for key in row if key != "events"), "events"])
    return [{key: row.get(key) for key in columns} for row in rows]


def metrics_frame(*run_dirs: Path | str) -> Any:
    """:func:`metrics_rows` as a pandas ``DataFrame``.

    Raises:
        UserError: pandas is not installed, or a folder is not a run directory.
    """
    if find_spec("pandas") is None:
        raise UserError(
            "metrics_frame needs pandas: pip install 'vipo[pandas]', or take vipo.report.table.metrics_rows"
        )
    import pandas

    return pandas.DataFrame(metrics_rows(run_dirs))


def course(rows: Sequence[Row]) -> str:
    """For people: of each run and number the first value, the last, and the extremes between."""
    lines = []
    for run in dict.fromkeys(str(row["run"]) for row in rows):
        own = [row for row in rows if row["run"] == run]
        lines.append(f"{run}: {len(own)} rows, to iteration {own[-1]['iteration']}")
        keys = [key for key in own[0] if key not in (*FIRST, "events")]
        wide = max(map(len, keys), default=0)
        for key in keys:
            values = [row[key] for row in own if row[key] is not None]
            if values:
                ends = f"{values[0]:>10.5g} -> {values[-1]:<10.5g}"
                lines.append(f"  {key:<{wide}} {ends} {min(values):>10.5g} to {max(values):.5g}")
    return "\n".join(lines)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as CSV with a line of headings; a missing number is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else FIRST, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """The table as a Parquet file.

    Raises:
        UserError: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise UserError("a Parquet file needs pyarrow: pip install 'vipo[parquet]', or take --csv")
    from pyarrow import Table, parquet

    with written_whole(path) as aside:
        parquet.write_table(Table.from_pylist(list(rows)), aside)


def _rows(run: RunRecord) -> list[Row]:
    rows: dict[int, Row] = {}
    each = run.pictures_per_iteration

    def row(iteration: int) -> Row:
        head = {"run": str(run.folder), "iteration": iteration, "pictures": each * iteration if each else None}
        return rows.setdefault(iteration, head)

    for step in run.steps:
        seconds = {f"seconds/{phase}": value for phase, value in step.seconds.items()}
        found = row(step.iteration)
        found |= {key: _known(value) for key, value in {**step.metrics, **seconds}.items()}
        found["events"] = "; ".join([*step.events, *([step.failure] if step.failure else [])]) or None
    for record in run.evaluations:
        means = {f"evaluation/{name}": _known(float(values.nanmean())) for name, values in record.values.items()}
        row(record.iteration).update(means)
    return [rows[iteration] for iteration in sorted(rows)]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
