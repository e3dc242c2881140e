"""The report of a run: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vipo.errors import UserError
from vipo.evaluation.best import place
from vipo.evaluation.estimate import Estimate
from vipo.files import write_text
from vipo.guards import fired
from vipo.options import CREDIT_MEANINGS, NEEDS_MAPS, needs_sources
from vipo.report import figures, gallery, svg
from vipo.report.outcome import Change, Verdict, before_and_after, changes, headline
from vipo.report.run import RunRecord, flat, read_run
from vipo.report.template import rendered

MOST_EVENTS = 200
MARKS: Mapping[Verdict, tuple[str, str]] = {
    "rose in this run": ("▲", "up"),
    "fell in this run": ("▼", "down"),
    "within noise": ("◆", "flat"),
    "too few prompts to tell": ("○", "flat"),
}
"""Sign and tone of each verdict."""


def write_report(run_dir: Path) -> Path:
    """Read ``run_dir`` and write ``report.html`` into it.

    Raises:
        UserError: ``run_dir`` is not a run directory.
    """
    target = Path(run_dir) / "report.html"
    write_text(target, render(read_run(Path(run_dir))))
    return target


def render(run: RunRecord) -> str:
    """The page as text."""
    found, problem = _changes(run)
    sheets = ["clips.css"] if run.makes_clips else []
    noun = "clip" if run.makes_clips else "picture"
    return rendered(
        Path(__file__).with_name("page.html.j2"),
        sheets,
        run=run,
        facts=facts(run),
        status=_status(run),
        environment=_flat(run.environment),
        changes=[_row(change) for change in found],
        pair=before_and_after(run),
        headline=headline(found, noun) if found else "",
        noun=noun,
        problem=problem,
        gain_panels=[] if problem else figures.gain_panels(run),
        reward_panels=figures.reward_panels(run),
        gallery=None if problem else gallery.gallery(run),
        strip=gallery.strip(run),
        maps=(maps := gallery.map_figures(run)).shown,
        unreadable_maps=maps.unreadable,
        uses_maps=run.recipe.get("credit") in (None, *NEEDS_MAPS),
        health=figures.health_panels(run),
        constant=figures.constants(run),
        phases=figures.phases(run),
        skipped=figures.skipped_updates(run),
        events=run.events[-MOST_EVENTS:],
        event_count=len(run.events),
        fired=fired(run.events),
    )


def _changes(run: RunRecord) -> tuple[list[Change], str]:
    try:
        return changes(run), ""
    except UserError as error:
        return [], str(error)


def facts(run: RunRecord) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what was run."""
    generator = run.recipe.get("generator") or {}
    credit = str(run.recipe.get("credit", "not recorded"))
    rewards = ", ".join(run.rewards) or "not recorded"
    weights = ", ".join(f"{weight:g}" for weight in run.rewards.values())
    judges = run.recipe.get("judges") or []
    facts = [
        ("Recipe", run.name, f"seed {run.recipe.get('seed', 0)}"),
        ("Credit", credit, CREDIT_MEANINGS.get(credit, "")),
        ("Generator", str(generator.get("name", "not recorded")), str(generator.get("path", ""))),
        ("Trained on", rewards, f"weight {weights}" if len(run.rewards) > 1 else ""),
        ("Held-out judges", ", ".join(map(str, judges)) or "none", "measured, never trained on"),
        ("Iterations", str(run.iterations_done), _of_planned(run)),
        *_best_fact(run),
    ]
    if needs_sources(credit) and "structuring" in run.recipe:
        facts.insert(2, _map_fact(run))
    return facts


def _best_fact(run: RunRecord) -> list[tuple[str, str, str]]:
    """Which evaluation is the best, where its checkpoint is kept."""
    best = run.best
    if best is None:
        return []
    remark = "nothing better was found" if best.is_untrained else f"kept in checkpoints/step-{best.iteration:06d}"
    return [("Best evaluation", place(best.iteration), f"{run.best_by} {svg.number(best.mean)}; {remark}")]


def _map_fact(run: RunRecord) -> tuple[str, str, str]:
    """Where the allocation map comes from."""
    recorded = partial(run.recorded, "structuring")
    sources, remark = recorded("sources"), f"normalised by {recorded('normalization')}"
    if "perceptual" in sources:
        seen = f"{recorded('backbone')}, {recorded('components')} components"
        remark = f"perceptual: {seen}; {remark}"
    return "Map", " x ".join(map(str, sources)), remark


def _of_planned(run: RunRecord) -> str:
    return f"of {run.iterations_planned} planned" if run.iterations_planned else ""


def _status(run: RunRecord) -> tuple[str, str]:
    """A tone and a sentence on how far the run got."""
    done, planned = run.iterations_done, run.iterations_planned
    left_out = f" Left out: {', '.join(run.left_out)}." if run.left_out else ""
    if run.failure:
        return "open", f"Failed: {run.failure}.{left_out}"
    if run.stopped:
        return "open", f"Ended after {done} of {planned} iterations, {run.stopped}.{left_out}"
    if planned and done >= planned:
        return "done", f"Complete: all {planned} iterations.{left_out}"
    goal = f" of {planned}" if planned else ""
    return "open", f"Not complete: {done}{goal} iterations so far; what follows is the state of then.{left_out}"


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    lists = {key: ", ".join(map(str, value)) or "none" for key, value in flat(values) if isinstance(value, list)}
    return [(key, lists.get(key, str(value))) for key, value in flat(values)]


def _row(change: Change) -> dict[str, Any]:
    """A line of the before/after table; all numbers share the precision that the interval allows."""
    gain = change.gain
    places = decimals(gain)
    mean, low, high = (svg.signed(value, places) for value in (gain.mean, gain.low, gain.high))
    return {
        "name": change.name,
        "role": change.role,
        "base": svg.fixed(change.base.mean, places),
        "trained": svg.fixed(change.trained.mean, places),
        "gain": mean,
        "low": low,
        "high": high,
        "scored": change.scored,
        "pictures": len(change.differences),
        "verdict": change.verdict,
        "sign": MARKS[change.verdict][0],
        "tone": MARKS[change.verdict][1],
        "plot": svg.interval(
            gain.low, gain.mean, gain.high, label=f"paired gain {mean}, 95 % interval {low} to {high}"
        ),
    }


def decimals(gain: Estimate) -> int:
    """Decimals so that half the interval shows two significant digits, between 2 and 6."""
    half = (gain.high - gain.low) / 2 or abs(gain.mean)
    return min(6, max(2, 1 - math.floor(math.log10(half)))) if half > 0 else 2
