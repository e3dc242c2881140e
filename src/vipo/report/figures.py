"""What the page plots: the reward curve, the judges beside it, and the health of the training."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from markupsafe import Markup

from vipo.evaluation.estimate import estimate
from vipo.report.outcome import Role, role_of
from vipo.report.run import RunRecord
from vipo.report.svg import Dots, Line, chart, number, smooth

SMOOTHING_SHARE = 1 / 30  # of the points, the standard deviation of the smoothed line

HEALTH = (
    (
        "clipped_fraction",
        "Clipped fraction",
        "Share of likelihood ratios outside the clip range; near 1 little is learned.",
    ),
    ("ratio_deviation", "Replay error", "Largest log-ratio before the first update. It must be 0, up to rounding."),
    ("matching_error", "Matching error", "Squared distance of the velocity from the one that leads to the sample."),
    ("grad_norm", "Gradient norm", "Before clipping. Spikes far above the median are skipped."),
    ("learning_rate", "Learning rate", "Its schedule: a function of the iteration's number."),
    ("approx_kl", "Approximate KL", "How far one update moves the policy from the one that sampled."),
    ("flat_groups", "Flat groups", "Share of prompts whose samples all scored alike: they teach nothing."),
    ("map/top_quarter_mass", "Map concentration", "Share of a map's mass in its heaviest quarter; 0.25 is uniform."),
    ("map/flicker", "Flicker of the maps", "Mean change from one latent frame to the next, in units of a map's mean."),
    ("map/mean", "Mean of the map", "Scales the learning rate; 1 where maps are normalised to unit mean."),
)


@dataclass(frozen=True)
class Panel:
    """One chart with its heading, what to read in it, and its legend as (style, words)."""

    title: str
    note: str
    svg: Markup  # empty where the value never changes; then ``constant`` says it
    legend: tuple[tuple[str, str], ...] = ()
    role: Role | None = None
    constant: str = ""


def reward_panels(run: RunRecord) -> list[Panel]:
    """One panel per score that was trained on or evaluated, and the weighted sum if there are several rewards."""
    trained = list(run.rewards)
    others = [name for record in run.evaluations for name in record.values if name not in trained]
    names = [*trained, *sorted(set(others), key=others.index)]
    keys = {name: f"reward/{name}" for name in names}
    if len(trained) > 1:
        keys = {"weighted sum": "reward", **keys}
    size = (440, 230) if len(keys) < 3 else (340, 200)
    return [panel for name, key in keys.items() if (panel := _score_panel(run, name, key, size))]


def _score_panel(run: RunRecord, name: str, key: str, size: tuple[int, int]) -> Panel | None:
    x, y = run.series(key)
    layers: list[Line | Dots] = []
    legend: list[tuple[str, str]] = []
    if x:
        layers += [Line(x, y, "raw"), Line(x, smooth(y, max(1.0, len(y) * SMOOTHING_SHARE)), "smooth")]
        legend += [("raw", "each iteration"), ("smooth", "smoothed")]
    if dots := _evaluation_dots(run, name):
        layers.append(dots)
        legend.append((dots.style, "evaluation, 95 % interval"))
        legend += [("ring", f"the best by {run.best_by}")] if dots.ringed is not None else []
    if not layers:
        return None
    role = role_of(run, name) if name != "weighted sum" else None
    svg = chart(layers, label=_described(name, layers), width=size[0], height=size[1], x_end=run.iterations_done)
    return Panel(name, "", svg, tuple(legend), role)


def _evaluation_dots(run: RunRecord, name: str) -> Dots | None:
    points = []
    for record in run.evaluations:
        values = record.values.get(name)
        if values is not None and bool(values.isfinite().any()):
            found = estimate(values, record.samples_per_prompt)
            points.append((float(record.iteration), found.mean, found.low, found.high))
    style = "evaluated" if name in run.rewards else "held-out"
    if not points:
        return None
    x, y, low, high = (list(column) for column in zip(*points, strict=True))
    best = run.best
    return Dots(x, y, low, high, style, None if best is None or best.iteration not in x else float(best.iteration))


def _described(name: str, layers: list[Line | Dots]) -> str:
    last = layers[-1]
    kind = "evaluations" if isinstance(last, Dots) else "training"
    return f"{name} over iterations; {kind} go from {number(last.y[0])} to {number(last.y[-1])}."


def health_panels(run: RunRecord) -> list[Panel]:
    """One small panel per health metric that the run logged; a loss without a ratio has no error in replaying one."""
    remark = "Standard deviation within a group: what the advantage is made of."
    spreads = [(f"spread/{name}", f"Spread of {name}", remark) for name in run.rewards]
    without = () if run.series("clipped_fraction")[0] else ("ratio_deviation",)
    entries = [entry for entry in (*HEALTH, *spreads) if entry[0] not in without]
    return [panel for entry in entries if (panel := _health_panel(run, *entry))]


def _health_panel(run: RunRecord, key: str, title: str, note: str) -> Panel | None:
    x, y = run.series(key)
    if not x:
        return None
    if len(x) > 1 and max(y) == min(y):
        return Panel(title, note, Markup(), constant=number(y[0]))
    label = f"{title} over iterations: median {number(statistics.median(y))}, largest {number(max(y))}."
    layers = [Line(x, y, "raw"), Line(x, smooth(y, max(1.0, len(y) * SMOOTHING_SHARE)), "smooth")]
    svg = chart(layers, label=label, width=340, height=190, from_zero=True)
    return Panel(title, f"{note} Median {number(statistics.median(y))}, largest {number(max(y))}.", svg)


@dataclass(frozen=True)
class Phase:
    """Wall time of one phase of the loop."""

    name: str
    total: float  # seconds
    share: float
    median: float  # seconds per iteration


def phases(run: RunRecord) -> list[Phase]:
    """Where the time went, in the order of the loop."""
    names = list(dict.fromkeys(name for step in run.steps for name in step.seconds))
    rows = [step.seconds for step in run.steps]
    columns = {name: [row[name] for row in rows if math.isfinite(row.get(name, math.nan))] for name in names}
    whole = sum(map(sum, columns.values()))
    return [
        Phase(name, sum(seconds), sum(seconds) / whole if whole else 0.0, statistics.median(seconds))
        for name, seconds in columns.items()
        if seconds
    ]


def skipped_updates(run: RunRecord) -> int:
    """How many optimiser steps the guard refused."""
    return round(sum(run.series("skipped")[1]))
