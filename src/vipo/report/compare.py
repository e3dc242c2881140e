"""Runs side by side: each run's last evaluation, and its paired difference from the first run named."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vipo.errors import UserError
from vipo.evaluation.estimate import Estimate, estimate, paired, paired_prompts
from vipo.evaluation.records import EvaluationRecord
from vipo.report.outcome import Role, Verdict, check_pairs, role_of, verdict_of
from vipo.report.run import RunRecord, read_run

_VERDICTS: Mapping[Verdict | None, str] = {
    "rose in this run": "better in these runs",
    "fell in this run": "worse in these runs",
    "within noise": "within noise",
    "too few prompts to tell": "too few prompts to tell",
    None: "",
}


@dataclass(frozen=True)
class Cell:
    """One score of one run. ``difference`` is paired with the first run's pictures; None for the first run itself."""

    role: Role
    mean: Estimate
    difference: Estimate | None
    verdict: Verdict | None


@dataclass(frozen=True)
class ComparedRun:
    """One line of the table. ``iteration`` is that of the run's last evaluation."""

    run: str
    name: str
    credit: str
    iteration: int
    cells: Mapping[str, Cell]


def compare_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """The last evaluation of each run, with differences from the first over the same prompts and starting noise.

    Raises:
        UserError: a folder is not a run directory, has no evaluation, or was evaluated on other prompts.
    """
    if not run_dirs:
        raise UserError("there is nothing to compare; name at least one run directory")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    records = [_last(run) for run in runs]
    for run, record in zip(runs[1:], records[1:], strict=True):
        check_pairs(records[0], record, f"{str(runs[0].folder)!r} and {str(run.folder)!r}")
    return [_compared(run, record, records[0]) for run, record in zip(runs, records, strict=True)]


def _last(run: RunRecord) -> EvaluationRecord:
    if not run.evaluations:
        raise UserError(f"{str(run.folder)!r} has no evaluation yet; let it run on, or use `vipo evaluate`")
    return run.evaluations[-1]


def _compared(run: RunRecord, record: EvaluationRecord, first: EvaluationRecord) -> ComparedRun:
    cells = {name: _cell(run, name, record, first) for name in record.values}
    kept = {name: cell for name, cell in cells.items() if cell is not None}
    return ComparedRun(str(run.folder), run.name, str(run.recipe.get("credit", "")), record.iteration, kept)


def _cell(run: RunRecord, name: str, record: EvaluationRecord, first: EvaluationRecord) -> Cell | None:
    values, role = record.values[name], role_of(run, name)
    if not bool(values.isfinite().any()):
        return None
    mean = estimate(values, record.samples_per_prompt)
    if record is first or name not in first.values:
        return Cell(role, mean, None, None)
    both = values, first.values[name], record.samples_per_prompt
    prompts = paired_prompts(*both)
    if not prompts:
        return Cell(role, mean, None, None)
    gain = paired(*both)
    return Cell(role, mean, gain, verdict_of(gain, prompts))


HEADINGS = ("score", "run", "credit", "iteration", "mean", "difference", "95 % interval", "verdict")


def text_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison for a terminal, one line per score and run."""
    lines = [HEADINGS, *_lines(rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS))]
    padded = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:], _note(rows)])


def markdown_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison as a Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *_lines(rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def html_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison as an HTML table."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in _lines(rows))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _lines(rows: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """One line per score and run, the score named once."""
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for row in rows for name in row.cells):
        having = [row for row in rows if name in row.cells]
        for row in having:
            cell = row.cells[name]
            title = f"{name} ({having[0].cells[name].role})" if row is having[0] else ""
            lines.append((title, row.run, row.credit, str(row.iteration), f"{cell.mean.mean:.4f}", *_gain(cell)))
    return lines


def _gain(cell: Cell) -> tuple[str, str, str]:
    if cell.difference is None:
        return "", "", ""
    gain = cell.difference
    return f"{gain.mean:+.4f}", f"{gain.low:+.4f} to {gain.high:+.4f}", _VERDICTS[cell.verdict]


def _note(rows: Sequence[ComparedRun]) -> str:
    return f"Differences are from {rows[0].run}, paired picture by picture; intervals are a bootstrap over prompts."
