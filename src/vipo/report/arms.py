"""Groups of runs as one page shows them: named in words, each with its line, and their curves against pictures seen."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vipo.report.figures import Panel
from vipo.report.groups import Group, gathered, groups, in_words, is_scored, mean_of
from vipo.report.outcome import Role
from vipo.report.run import RunRecord
from vipo.report.svg import Band, Line, chart, number, y_span

RATE = "optimizer.learning_rate"
STYLES = 6  # colours; then come the same ones with dashes
SIZES = {True: (440, 230), False: (340, 200)}  # of a panel in pixels, by whether there are few in a row
FAR = 2.0  # heights of what the other lines cover, below them: what falls so far is broken off the axis


@dataclass(frozen=True)
class Arm:
    """A group and its runs by seed.

    Args:
        words: the keys in which the groups differ.
        line: the same without the learning rate, where each rate has a panel of its own.
        rate: the learning rate in words, empty where the panels do not differ in it.
        style: CSS classes of its line, those of other arms but for the rate.
    """

    group: Group
    runs: Mapping[int, RunRecord]
    words: str
    line: str
    rate: str
    style: str


def arms(runs: Sequence[RunRecord]) -> list[Arm]:
    """The groups of some runs; the first is the yardstick."""
    found, by_label = groups(runs), gathered(runs)
    apart = any(set(group.settings) > {RATE} for group in found)
    lines = [_line(group, apart) for group in found]
    order = list(dict.fromkeys(lines))
    return [
        Arm(
            group,
            by_label[group.label],
            in_words(group.settings) or group.label,
            line,
            in_words({RATE: group.settings[RATE]}) if apart and RATE in group.settings else "",
            style_of(order.index(line)),
        )
        for group, line in zip(found, lines, strict=True)
    ]


def one_model(found: Sequence[Arm]) -> bool:
    """Whether all began with the same model: then its noise and untrained pictures are the same too."""
    return not any(key.startswith("generator") for arm in found for key in arm.group.settings)


def _line(group: Group, apart: bool) -> str:
    kept: dict[str, Any] = {key: value for key, value in group.settings.items() if not apart or key != RATE}
    return in_words(kept) or group.label


def style_of(place: int) -> str:
    return f"s{place % STYLES}{' dash' if place // STYLES % 2 else ''}"


@dataclass(frozen=True)
class Curves:
    """One score: a panel, or one for each learning rate, all with the same axis."""

    name: str
    role: Role
    panels: tuple[Panel, ...]
    note: str


def curves(found: Sequence[Arm]) -> list[Curves]:
    """A mean over seeds for each score and arm, and a band from the least to the largest seed."""
    names = dict.fromkeys(name for arm in found for name in arm.group.scores)
    return [one for name in names if (one := _curves(name, found))]


def _curves(name: str, found: Sequence[Arm]) -> Curves | None:
    bands = {arm.group.label: band for arm in found if (band := _band(name, arm, in_pictures(found)))}
    having = [arm for arm in found if arm.group.label in bands]
    if not having:
        return None
    axis, off = _axis([bands[arm.group.label] for arm in having])
    role = next(arm.group.scores[name].role for arm in found if name in arm.group.scores)
    rates = dict.fromkeys(arm.rate for arm in having)
    panels = [_panel(name, rate, [arm for arm in having if arm.rate == rate], bands, axis, found) for rate in rates]
    fallen = [
        f"{arm.words} falls to {number(min(band.y))}" for arm in having if (band := bands[arm.group.label]) in off
    ]
    note = f"Broken off the axis at its lower end: {'; '.join(fallen)}." if fallen else ""
    return Curves(name, role, tuple(panels), note)


def in_pictures(found: Sequence[Arm]) -> bool:
    """Whether every recipe says how many pictures an iteration trains on; curves are against iterations otherwise."""
    return all(run.pictures_per_iteration for arm in found for run in arm.runs.values())


def _band(name: str, arm: Arm, pictures: bool) -> Band | None:
    """None where the seeds share no evaluation with that score."""
    rows = [{r.iteration: mean_of(r, name) for r in run.evaluations if is_scored(r, name)} for run in arm.runs.values()]
    shared = sorted(set(rows[0]).intersection(*rows))
    if not shared:
        return None
    each = next(iter(arm.runs.values())).pictures_per_iteration if pictures else 1
    values = [[row[iteration] for row in rows] for iteration in shared]
    x = [float((each or 1) * iteration) for iteration in shared]
    low, high = ([ends(row) for row in values] for ends in (min, max))
    return Band(arm.words, arm.style, x, [statistics.fmean(row) for row in values], low, high)


def _axis(bands: Sequence[Band]) -> tuple[tuple[float, float], list[Band]]:
    """The vertical range, and the bands that leave it: at most every third one, fallen far below all others.

    What rises is never cut off.
    """
    deepest = sorted(bands, key=lambda band: min(band.low))
    for count in range(len(bands) // 3, 0, -1):
        low, high = y_span(deepest[count:])
        if all(min(band.low) < low - FAR * (high - low) for band in deepest[:count]):
            return (low, high), deepest[:count]
    return y_span(bands), []


def _panel(
    name: str,
    rate: str,
    having: Sequence[Arm],
    bands: Mapping[str, Band],
    axis: tuple[float, float],
    found: Sequence[Arm],
) -> Panel:
    drawn = [bands[arm.group.label] for arm in having]
    end = max(band.x[-1] for band in bands.values())
    legend = [(arm.style, f"{arm.line} ({_seeds(arm)})") for arm in having]
    reach = found[0].group.scores[name].reach if name in found[0].group.scores else None
    level = [Line([0.0, end], [reach.level] * 2, "level")] if reach else []
    legend += [("level", f"the level: where {found[0].words} ended")] if reach else []
    ends = "; ".join(f"{band.name} ends at {number(band.y[-1])}" for band in drawn)
    across = "pictures seen" if in_pictures(found) else "iteration"
    width, height = SIZES[len({arm.rate for arm in found}) < 3]
    label = f"{name} over {across}: {ends}."
    svg = chart([*level, *drawn], label=label, width=width, height=height, x_end=end, across=across, y_range=axis)
    return Panel(rate, "", svg, tuple(legend))


def _seeds(arm: Arm) -> str:
    return f"{len(arm.runs)} seed{'s' * (len(arm.runs) != 1)}"


def gaps(found: Sequence[Arm]) -> Iterator[str]:
    """What the curves do without, in words."""
    if not in_pictures(found):
        yield "not every recipe says how many pictures an iteration trains on, so the curves are against iterations"
    for arm in found:
        at = [{record.iteration for record in run.evaluations} for run in arm.runs.values()]
        lacking = sorted(at[0].union(*at) - at[0].intersection(*at))
        if lacking:
            where = ", ".join(map(str, lacking))
            yield f"{arm.words}: no point in the curves at iteration {where}, where not every seed was evaluated"
