"""Runs side by side: each run's last evaluation, and its paired difference from the first run named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vipo.errors import UserError
from vipo.evaluation.estimate import Estimate, estimate, paired, paired_prompts
from vipo.evaluation.records import EvaluationRecord
from vipo.report.groups import Group, GroupScore, gathered, is_scored, labels
from vipo.report.outcome import Role, Verdict, check_pairs, role_of, verdict_of
from vipo.report.run import RunRecord, read_run

VERDICTS: Mapping[Verdict | None, str] = {
    "rose in this run": "better in these runs",
    "fell in this run": "worse in these runs",
    "within noise": "within noise",
    "too few prompts to tell": "too few prompts to tell",
    None: "",
}
OVER_SEEDS: Mapping[Verdict, str] = {"rose in this run": "better over seeds", "fell in this run": "worse over seeds"}


def verdict_words(found: Cell | GroupScore) -> str:
    """What a difference comes to, and whether that is said of these runs or of seeds."""
    here = VERDICTS[found.verdict]
    if found.verdict is None or isinstance(found, Cell) or len(found.by_seed) < 2:
        return here
    return OVER_SEEDS.get(found.verdict, here)


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


def missing(runs: Sequence[RunRecord]) -> list[str]:
    """What a comparison does without, a sentence each: lines, evaluations, seeds and scores."""
    found = [f"{run.folder}: left out {', '.join(run.left_out)}" for run in runs if run.left_out]
    found += [f"{run.folder}: {told}" for run in runs if (told := _unfinished(run))]
    found += [told for run in runs[1:] for told in _scored_otherwise(runs[0], run)]
    for label, of_group in gathered(runs).items():
        found += _named_twice(label, [run for run, own in zip(runs, labels(runs), strict=True) if own == label])
        found += _unscored(label, of_group.values())
    return found


def _unfinished(run: RunRecord) -> str:
    last, planned = _last(run).iteration, run.iterations_planned
    if planned is None or last >= (run.iterations_done if run.stopped else planned):
        return ""
    why = f"it failed, {run.failure}; " if run.failure else ""
    return f"{why}its last evaluation is of iteration {last}, of {planned} planned"


def _scored_otherwise(first: RunRecord, run: RunRecord) -> Iterator[str]:
    """Scores of one name that are of other files, such as a reward of the user's that was edited between two runs."""
    for name in _last(run).values:
        then, now = (_files_of(name, one) for one in (first, run))
        keys = [key for key, file in now.items() if then.get(key, file) != file]
        if keys:
            yield (
                f"{run.folder}: {name} was scored with another {' and '.join(keys)} than in {first.folder} (the file"
                " has changed), so its difference means nothing"
            )


def _files_of(name: str, run: RunRecord) -> dict[str, str]:
    """Fingerprints of what a reward or judge of this name is from, by the key below ``rewards`` or ``judges``."""
    below = {key.partition(".")[2]: file for key, file in run.inputs.items() if key.startswith(("rewards.", "judges."))}
    return {key: file for key, file in below.items() if f"{key}.".startswith(f"{name}.")}


def _named_twice(label: str, runs: Sequence[RunRecord]) -> list[str]:
    """Of runs of one group: only the last of a seed counts."""
    counted = {run.seed: run for run in runs}
    hidden = [run for run in runs if run.folder.resolve() != counted[run.seed].folder.resolve()]
    return [
        f"{run.folder}: seed {run.seed} of {label} is also {counted[run.seed].folder}, which counts in its group"
        for run in hidden
    ]


def _unscored(label: str, runs: Iterable[RunRecord]) -> list[str]:
    last = [_last(run) for run in runs]
    names = dict.fromkeys(name for record in last for name in record.values)
    lacking = [name for name in names if not all(is_scored(record, name) for record in last)]
    return [f"{label}: no row for {name}, of which not every seed has a score at its end" for name in lacking]


def _last(run: RunRecord) -> EvaluationRecord:
    if not run.evaluations:
        raise UserError(
            f"{str(run.folder)!r} has no evaluation yet; let it run on to its first, or see with `vipo evaluate` what"
            " it gained, without this comparison"
        )
    return run.evaluations[-1]


def _compared(run: RunRecord, first: EvaluationRecord, label: str) -> ComparedRun:
    record = run.evaluations[-1]
    cells = {name: _cell(run, name, record, first) for name in record.values}
    kept = {name: cell for name, cell in cells.items() if cell is not None}
    return ComparedRun(str(run.folder), run.name, label, run.seed, record.iteration, kept)


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
    return _padded(HEADINGS, run_lines(rows), _note(rows))


def _padded(headings: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Columns for a terminal, with a line below."""
    lines = [headings, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(headings))]
    padded = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([padded[0], "  ".join("-" * width for width in widths), *padded[1:], note])


def markdown_table(rows: Sequence[ComparedRun]) -> str:
    """The comparison as a Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *run_lines(rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


Row = TypeVar("Row")
Found = TypeVar("Found", Cell, GroupScore)


def _by_score(rows: Sequence[Row], of: Callable[[Row], Mapping[str, Found]]) -> Iterator[tuple[str, Row, Found]]:
    """Every score of every row, score by score; its name and role on the first line only."""
    for name in dict.fromkeys(name for row in rows for name in of(row)):
        having = [row for row in rows if name in of(row)]
        for row in having:
            found = of(row)[name]
            yield f"{name} ({found.role})" if row is having[0] else "", row, found


def run_lines(rows: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """The table's cells below ``HEADINGS``; a score is named on its first line only."""
    return [
        (title, row.run, row.label, str(row.seed), str(row.iteration), f"{cell.mean.mean:.4f}", *_gain(cell))
        for title, row, cell in _by_score(rows, lambda row: row.cells)
    ]


def _gain(cell: Cell | GroupScore) -> tuple[str, str, str]:
    if cell.difference is None:
        return "", "", ""
    gain = cell.difference
    return f"{gain.mean:+.4f}", f"{gain.low:+.4f} to {gain.high:+.4f}", verdict_words(cell)


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
    return _padded(GROUP_HEADINGS, _group_lines(found), group_note(found[0].label))


def group_note(yardstick: str) -> str:
    """What the numbers of groups are, in words."""
    return (
        f"Differences are from {yardstick}, paired by picture and by seed; intervals are over seeds and prompts"
        " (over prompts alone where one seed is shared), of pictures a bootstrap over seeds. The level is that group's"
        " final mean."
    )


def group_rows(found: Sequence[Group]) -> list[dict[str, Any]]:
    """The groups as flat rows, one per score and group, for CSV."""
    return [_flat_row(name, group, score) for group in found for name, score in group.scores.items()]


def _group_lines(found: Sequence[Group]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for title, group, score in _by_score(found, lambda group: group.scores):
        spread = f"{score.low:.4f} to {score.high:.4f}" if len(group.seeds) > 1 else ""
        seeds = ",".join(map(str, group.seeds))
        lines.append((title, group.label, seeds, f"{score.mean:.4f}", spread, *_gain(score), reached(score)))
    return lines


def reached(score: GroupScore) -> str:
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
        "verdict": verdict_words(score) or None,
        "level": score.reach.level if score.reach else None,
        "pictures_to_level": over.mean if over else None,
        "pictures_low": over.low if over else None,
        "pictures_high": over.high if over else None,
    }
