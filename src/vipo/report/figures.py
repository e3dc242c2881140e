"""What the page plots: gains of rewards and judges, rewards of what was trained on, and the health of the training."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from markupsafe import Markup

from vipo.evaluation.estimate import paired, pairs
from vipo.report.outcome import Role, role_of
from vipo.report.run import RunRecord
from vipo.report.svg import Dots, Line, chart, number, smooth

ROUNDING = 1e-4  # of a value: a metric that moves less is one number
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
    ("kl_reference", "Divergence", "How far the policy is from the untrained model."),
    ("flat_groups", "Flat groups", "Share of prompts whose samples all scored alike: they teach nothing."),
    ("map/top_quarter_mass", "Map concentration", "Share of a map's mass in its heaviest quarter; 0.25 is uniform."),
    ("map/flicker", "Flicker of the maps", "Mean change from one latent frame to the next, in units of a map's mean."),
    ("weight_change", "Change of the weights", "In one iteration, as a share of their size."),
    ("pictures/saturated", "Saturated colours", "Share of values at black or full."),
    ("pictures/grid", "Grid", "Power at the patch period in that of its neighbours: about 1 without a grid."),
    ("pictures/diversity", "Diversity", "Standard deviation of thumbnails within a group."),
    ("map/mean", "Mean of the map", "Scales the learning rate; 1 where maps are normalised to unit mean."),
)


@dataclass(frozen=True)
class Panel:
    """One chart with its heading, what to read in it, and its legend as (style, words)."""

    title: str
    note: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    role: Role | None = None


def gain_panels(run: RunRecord) -> list[Panel]:
    """The paired gain of each evaluated score over the first evaluation; empty while there is no second one."""
    if len(run.evaluations) < 2:
        return []
    names = sorted(run.evaluations[0].values, key=lambda name: name not in run.rewards)
    size = (440, 230) if len(names) < 3 else (340, 200)
    return [panel for name in names if (panel := _gain_panel(run, name, size))]


def _gain_panel(run: RunRecord, name: str, size: tuple[int, int]) -> Panel | None:
    base, *later = run.evaluations
    points = [(float(base.iteration), 0.0, 0.0, 0.0)]
    for record in later:
        if name in record.values and pairs(record.values[name], base.values[name]):
            gain = paired(record.values[name], base.values[name], base.samples_per_prompt)
            points.append((float(record.iteration), gain.mean, gain.low, gain.high))
    if len(points) < 2:
        return None
    x, y, low, high = (list(column) for column in zip(*points, strict=True))
    style = "evaluated" if name in run.rewards else "held-out"
    best = None if run.best is None or run.best.iteration not in x else float(run.best.iteration)
    zero = Line([x[0], max(x[-1], run.iterations_done)], [0.0, 0.0], "zero")
    label = f"{name}, paired gain over iteration {base.iteration}: {number(y[-1])} at iteration {x[-1]:.0f}."
    svg = chart([zero, Dots(x, y, low, high, style, best)], label=label, width=size[0], height=size[1])
    legend = [(style, "paired gain, 95 % interval over prompts")]
    legend += [] if best is None else [("ring", f"the best by {run.best_by}")]
    return Panel(name, "", svg, tuple(legend), role_of(run, name))


def reward_panels(run: RunRecord) -> list[Panel]:
    """The rewards of the samples that were trained on, and their weighted sum if there are several."""
    keys = {name: f"reward/{name}" for name in run.rewards}
    if len(keys) > 1:
        keys = {"weighted sum": "reward", **keys}
    return [panel for name, key in keys.items() if (panel := _reward_panel(run, name, key))]


def _reward_panel(run: RunRecord, name: str, key: str) -> Panel | None:
    x, y = run.series(key)
    if not x:
        return None
    label = f"{name} of the training samples over iterations, from {number(y[0])} to {number(y[-1])}."
    layers = [Line(x, y, "raw"), Line(x, smooth(y, max(1.0, len(y) * SMOOTHING_SHARE)), "smooth")]
    legend = (("raw", "each iteration"), ("smooth", "smoothed"))
    return Panel(name, "", chart(layers, label=label, width=340, height=190, x_end=run.iterations_done), legend)


def health_panels(run: RunRecord) -> list[Panel]:
    """One small panel per health metric that changed over the run; a loss without a ratio has no error in replaying."""
    return [_health_panel(title, note, *run.series(key)) for key, title, note in _logged(run) if not _flat(run, key)]


def constants(run: RunRecord) -> list[tuple[str, str]]:
    """Name and value of every health metric that never changed: a chart of it would say nothing."""
    return [(title, number(run.series(key)[1][0])) for key, title, _ in _logged(run) if _flat(run, key)]


def _logged(run: RunRecord) -> list[tuple[str, str, str]]:
    remark = "Standard deviation within a group: what the advantage is made of."
    spreads = [(f"spread/{name}", f"Spread of {name}", remark) for name in run.rewards]
    without = () if run.series("clipped_fraction")[0] else ("ratio_deviation",)
    return [entry for entry in (*HEALTH, *spreads) if entry[0] not in without and run.series(entry[0])[0]]


def _flat(run: RunRecord, key: str) -> bool:
    _, y = run.series(key)
    return len(y) > 1 and max(y) - min(y) <= ROUNDING * max(map(abs, y))


def _health_panel(title: str, note: str, x: list[float], y: list[float]) -> Panel:
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
