"""Several runs on one page: what `vipo compare` prints, curves with a band over seeds, and pictures side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vipo.evaluation.estimate import Estimate
from vipo.files import write_text
from vipo.options import CREDIT_MEANINGS
from vipo.report import svg
from vipo.report.arms import Arm, arms, curves, gaps, one_model
from vipo.report.beside import PROMPTS, Sheets, beside, movements
from vipo.report.compare import HEADINGS, compared, group_note, missing, reached, run_lines, verdict_words
from vipo.report.groups import GroupScore, short_names
from vipo.report.outcome import Verdict
from vipo.report.page import MARKS, decimals, facts
from vipo.report.run import RunRecord
from vipo.report.template import rendered

YARDSTICKS = "the yardstick\N{RIGHT SINGLE QUOTATION MARK}s"
ENDED: Mapping[Verdict, str] = {
    "rose in this run": f"higher than {YARDSTICKS}",
    "fell in this run": f"lower than {YARDSTICKS}",
    "within noise": "within noise of it",
    "too few prompts to tell": f"where so few prompts cannot tell it from {YARDSTICKS}",
}
FAR_INTERVALS = 4.0  # times what the others reach: such an interval is an arrow
OF_ONE_RUN = ("Recipe", "Best evaluation")  # facts that say nothing of all runs


def write_together(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page of runs that are :func:`vipo.report.compare.comparable`."""
    write_text(path, render(runs))


def render(runs: Sequence[RunRecord]) -> str:
    """The page as text."""
    found, rows = arms(runs), compared(runs)
    sheets = Sheets(clips=PROMPTS * (1 + len(found)) + 12 * len(found))
    prompts, pictures = beside(found, sheets)
    moved = movements(found, sheets)
    return rendered(
        Path(__file__).with_name("together.html.j2"),
        ["bands.css", "together.css"],
        title=_title(found, len(runs)),
        arms=found,
        runs=runs,
        one_model=one_model(found),
        one_seed=all(len(arm.runs) == 1 for arm in found),
        noun="clip" if any(run.makes_clips for run in runs) else "picture",
        missing=[*missing(runs), *_unlogged(runs), *gaps(found), *dict.fromkeys(sheets.problems)],
        meanings=CREDIT_MEANINGS,
        shared=_shared(runs),
        headline=list(_headline(found)),
        scores=_scores(found),
        note=group_note(found[0].words),
        headings=HEADINGS,
        lines=run_lines(rows),
        curves=curves(found),
        prompts=prompts,
        pictures=pictures,
        movements=moved,
    )


def _unlogged(runs: Sequence[RunRecord]) -> Iterator[str]:
    """The page tells how far each run got from another log than its scores."""
    for run in runs:
        last, done = run.evaluations[-1].iteration, run.iterations_done
        if done < last:
            yield f"{run.folder}: its last evaluation is of iteration {last}, its metrics.jsonl has {done}"


def _title(found: Sequence[Arm], runs: int) -> str:
    """The keys in which the runs differ."""
    names = [name.replace("_", " ") for name in short_names(found[0].group.settings).values()]
    if not names:
        return found[0].words if len(found) == 1 else f"{runs} runs"
    first = ", ".join(names[:-1])
    title = f"{first} and {names[-1]}" if first else names[-1]
    return title[:1].upper() + title[1:]


def _shared(runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
    """What is equal in all runs, as a report has it."""
    every = [facts(run) for run in runs]
    return [fact for fact in every[0] if fact[0] not in OF_ONE_RUN and all(fact in one for one in every)]


def _headline(found: Sequence[Arm]) -> Iterator[str]:
    """How the groups did against the first, in a sentence for what was trained on and one for each judge that fell."""
    yardstick, *others = found
    for name, own in yardstick.group.scores.items():
        verdicts = {arm.words: arm.group.scores[name].verdict for arm in others if name in arm.group.scores}
        if own.role == "trained on" and verdicts:
            counted = [(said, [words for words, one in verdicts.items() if one == v]) for v, said in ENDED.items()]
            told = [f"{said} with {_listed(words)}" for said, words in counted if words]
            yield f"{name}, which was trained on, ended {'; '.join(told)}." if told else ""
        fell = [words for words, verdict in verdicts.items() if verdict == "fell in this run"]
        if own.role != "trained on" and fell:
            who = f"The held-out judge {name}" if own.role == "held-out judge" else name
            yield f"{who} ended lower than {YARDSTICKS} with {_listed(fell)}: look at the pictures."


def _listed(words: Sequence[str]) -> str:
    """Names that may hold commas."""
    *others, last = [f"\N{LEFT DOUBLE QUOTATION MARK}{one}\N{RIGHT DOUBLE QUOTATION MARK}" for one in words]
    return f"{', '.join(others)} and {last}" if others else last


def _scores(found: Sequence[Arm]) -> list[dict[str, Any]]:
    """A table for each score, a line for each group; intervals of one score share their scale."""
    names = dict.fromkeys(name for arm in found for name in arm.group.scores)
    return [_score(name, [arm for arm in found if name in arm.group.scores]) for name in names]


def _score(name: str, having: Sequence[Arm]) -> dict[str, Any]:
    own = [arm.group.scores[name] for arm in having]
    gains = [score.difference for score in own if score.difference]
    digits = max((min(4, decimals(gain)) for gain in gains), default=3)
    rows = [_line(arm, score, digits, _widest(gains)) for arm, score in zip(having, own, strict=True)]
    level = next((score.reach.level for score in own if score.reach), None)
    return {"name": name, "role": own[0].role, "rows": rows, "level": level}


def _widest(gains: Sequence[Estimate]) -> float:
    """How far from zero the intervals reach, but for the few that would make all others dots."""
    far = sorted(max(abs(gain.low), abs(gain.high)) for gain in gains)
    for count in range(len(far) // 3, 0, -1):
        if far[-count] > FAR_INTERVALS * far[-count - 1]:
            return far[-count - 1]
    return far[-1] if far else 0.0


def _line(arm: Arm, score: GroupScore, digits: int, widest: float) -> dict[str, Any]:
    gain, several = score.difference, len(arm.runs) > 1
    line = {
        "words": arm.words,
        "style": arm.style,
        "seeds": ", ".join(map(str, arm.group.seeds)),
        "mean": svg.fixed(score.mean, digits),
        "range": f"{svg.fixed(score.low, digits)} to {svg.fixed(score.high, digits)}" if several else "one seed",
        "reached": reached(score),
        "gain": None,
    }
    if gain is None or score.verdict is None:
        return line
    mean, low, high = (svg.signed(value, digits) for value in (gain.mean, gain.low, gain.high))
    label = f"difference {mean}, 95 % interval {low} to {high}"
    sign, tone = MARKS[score.verdict]
    plot = svg.interval(gain.low, gain.mean, gain.high, label=label, widest=widest)
    verdict = {"verdict": verdict_words(score), "sign": sign, "tone": tone}
    return line | {"gain": mean, "low": low, "high": high, "plot": plot, **verdict}
