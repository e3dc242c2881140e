"""Runs side by side: each run's last evaluation, and its paired difference from the first run named."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vipo.errors import UserError
from vipo.evaluation.estimate import Estimate, estimate, paired, paired_prompts
from vipo.evaluation.records import EvaluationRecord
from vipo.report.groups import SEED, Group, GroupScore, labels
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
    label: str  # the keys in which the runs differ, with the run's values
    seed: int
    iteration: int
    cells: Mapping[str, Cell]


def compare_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """The last evaluation of each run, with differences from the first over the same prompts and starting noise.

    Raises:
        UserError: a folder is not a run directory, has no evaluation, or was evaluated on other prompts.
    """
    return compared(comparable(run_dirs))


def compared(runs: Sequence[RunRecord]) -> list[ComparedRun]:
    """Of runs that are :func:`comparable`; :func:`vipo.report.groups.groups` takes those of other seeds as one."""
    first = runs[0].evaluations[-1]
    return [_compared(run, first, label) for run, label in zip(runs, labels(runs), strict=True)]


def comparable(run_dirs: Sequence[Path]) -> list[RunRecord]:
    """The runs, each with an evaluation, all of the same pictures.

    Raises:
        UserError: as :func:`compare_runs`.
    """
    if not run_dirs:
        raise UserError("there is nothing to compare; name at least one run directory")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    records = [_last(run) for run in runs]
    for run, record in zip(runs[1:], records[1:], strict=True):
        check_pairs(records[0], record, f"{str(runs[0].folder)!r} and {str(run.folder)!r}")
    return runs


def _last(run: RunRecord) -> EvaluationRecord:
    if not run.evaluations:
        raise UserError(f"{str(run.folder)!r} has no evaluation yet; let it run on, or use `vipo evaluate`")
    return run.evaluations[-1]


def _compared(run: RunRecord, first: EvaluationRecord, label: str) -> ComparedRun:
    record = run.evaluations[-1]
    cells = {name: _cell(run, name, record, first) for name in record.values}
    kept = {name: cell for name, cell in cells.items() if cell is not None}
    return ComparedRun(str(run.folder), run.name, label, int(run.recipe.get(SEED) or 0), record.iteration, kept)


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


HEADINGS = ("score", "run", "differs in", "seed", "iteration", "mean", "difference", "95 % interval", "verdict")


def text_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison for a terminal, one line per score and run."""
    return _padded(HEADINGS, _lines(rows), _note(rows))


def _padded(headings: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Columns for a terminal, with a line below."""
    lines = [headings, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(headings))]
    padded = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:], note])


def markdown_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison as a Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *_lines(rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def html_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison as an HTML table."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in _lines(rows))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


Row = TypeVar("Row")
Found = TypeVar("Found", Cell, GroupScore)


def _by_score(rows: Sequence[Row], of: Callable[[Row], Mapping[str, Found]]) -> Iterator[tuple[str, Row, Found]]:
    """Every score of every row, score by score; its name and role on the first line only."""
    for name in dict.fromkeys(name for row in rows for name in of(row)):
        having = [row for row in rows if name in of(row)]
        for row in having:
            found = of(row)[name]
            yield f"{name} ({found.role})" if row is having[0] else "", row, found


def _lines(rows: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    return [
        (title, row.run, row.label, str(row.seed), str(row.iteration), f"{cell.mean.mean:.4f}", *_gain(cell))
        for title, row, cell in _by_score(rows, lambda row: row.cells)
    ]


def _gain(cell: Cell | GroupScore) -> tuple[str, str, str]:
    if cell.difference is None:
        return "", "", ""
    gain = cell.difference
    return f"{gain.mean:+.4f}", f"{gain.low:+.4f} to {gain.high:+.4f}", _VERDICTS[cell.verdict]


def _note(rows: Sequence[ComparedRun]) -> str:
    return f"Differences are from {rows[0].run}, paired picture by picture; intervals are a bootstrap over prompts."


GROUP_HEADINGS = (
    "score",
    "group",
    "seeds",
    "mean",
    "range over seeds",
    "difference",
    "95 % interval",
    "verdict",
    "pictures to level",
)


def group_table(found: Sequence[Group]) -> str:
    """The groups for a terminal, one line per score and group."""
    note = (
        f"Differences are from {found[0].label}, paired by picture and by seed; intervals are a bootstrap over prompts,"
        " of pictures over seeds. The level is that group's final mean."
    )
    return _padded(GROUP_HEADINGS, _group_lines(found), note)


def group_rows(found: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups as flat rows, one per score and group, for CSV."""
    return [_flat_row(name, group, score) for group in found for name, score in group.scores.items()]


def _group_lines(found: Sequence[Group]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for title, group, score in _by_score(found, lambda group: group.scores):
        spread = f"{score.low:.4f} to {score.high:.4f}" if len(group.seeds) > 1 else ""
        seeds = ",".join(map(str, group.seeds))
        lines.append((title, group.label, seeds, f"{score.mean:.4f}", spread, *_gain(score), _reached(score)))
    return lines


def _reached(score: GroupScore) -> str:
    """Pictures with their interval; how many seeds got there where not all did."""
    if score.reach is None:
        return ""
    counts, over = score.reach.by_seed.values(), score.reach.pictures
    if over is None:
        return f"{sum(count is not None for count in counts)} of {len(counts)} seeds reached it"
    return f"{over.mean:.0f}" + (f" [{over.low:.0f}, {over.high:.0f}]" if len(counts) > 1 else "")


def _flat_row(name: str, group: Group, score: GroupScore) -> dict[str, Any]:
    gain, over = score.difference, score.reach.pictures if score.reach else None
    return {
        "score": name,
        "role": score.role,
        "group": group.label,
        "seeds": " ".join(map(str, group.seeds)),
        "mean": score.mean,
        "lowest_seed": score.low,
        "highest_seed": score.high,
        "difference": gain.mean if gain else None,
        "difference_low": gain.low if gain else None,
        "difference_high": gain.high if gain else None,
        "verdict": _VERDICTS[score.verdict] or None,
        "level": score.reach.level if score.reach else None,
        "pictures_to_level": over.mean if over else None,
        "pictures_low": over.low if over else None,
        "pictures_high": over.high if over else None,
    }
