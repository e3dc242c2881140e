"""The page's drawings: curves with a band over seeds, and intervals on one common scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from markupsafe import Markup, escape

from matrix import ARMS
from results import SCALAR, Results, Signal, Spread, gain, levels, paired, signals, spread
from tables import CLIP_SCORES, CLIPPED, REDNESS, SCORES, SOURCES, STRUCTURE, clipped_share, last, rival
from vipo.report.figures import Panel
from vipo.report.svg import Band, Line, chart, fixed, number, signed

WIDTH, HEIGHT = 340, 220
BEST_SOURCES = 2
STYLES = {"sample": "s1", "vipo": "s0", "uniform": "s2", "deviation": "s3", "detached": "s3"}
CURVE_SHARES = tuple(k / 10 for k in range(11))


def curve(name: str, style: str, points: Sequence[tuple[float, Spread]]) -> Band:
    """A mean over seeds at each x, and the smallest and largest seed as a band. ``style`` is a CSS class."""
    x, found = [at for at, _ in points], [spread for _, spread in points]
    low, high = [s.range[0] for s in found], [s.range[1] for s in found]
    return Band(name, style, x, [s.mean for s in found], low, high)


def plot(curves: Sequence[Band], *, across: str, label: str) -> Markup:
    return chart(curves, label=label, width=WIDTH, height=HEIGHT, across=across)


def described(curves: Sequence[Band], what: str) -> str:
    ends = "; ".join(f"{c.name} ends at {number(c.y[-1])}" for c in curves)
    return f"{what}: {ends}."


def gain_panels(results: Results) -> list[Panel]:
    """A panel per score: the gain over training of both methods and of the sources that ended highest."""
    arms = {"sample": "s1", "vipo": "s0"} | dict(zip(best_sources(results), ("s2", "s3"), strict=False))
    panels = []
    for score in SCORES:
        curves = [c for arm, style in arms.items() if (c := _gain_curve(results, arm, style, score))]
        if curves:
            svg = plot(curves, across="iteration", label=described(curves, f"Gain in {score}"))
            panels.append(Panel(score, "", svg, tuple((c.style, c.name) for c in curves)))
    return panels


WORDS = {
    "sample": "scalar GRPO",
    "perceptual": "the paper's map",
    "vipo": "the paper's map",
    "quickstart": "deviation x the paper's map",
}
GROUP_STYLES = {"sample": "s1", "perceptual": "s0", "quickstart": "s2", "consensus": "s3"}
GROUP_PANELS = (  # heading, score, arms' ending
    ("emoji_match, trained on, 1e-3", "emoji_match", "1e-3"),
    ("emoji_match, trained on, 2e-3", "emoji_match", "2e-3"),
    ("emoji_flaws, nobody's, 1e-3", "emoji_flaws", "1e-3"),
    ("emoji_match, + emoji_clean", "emoji_match", "clean"),
    ("emoji_flaws, + emoji_clean", "emoji_flaws", "clean"),
    ("emoji_quality, + emoji_clean", "emoji_quality", "clean"),
)
PICTURES = 96  # an iteration
CLIP_STYLES = {"sample": "s1", "vipo": "s0", "deviation": "s2", "consensus": "s3"}
CLIPS_SEEN = 32  # an iteration


def group_panels(results: Results) -> list[Panel]:
    """Gains against the pictures seen, full groups; one rate and one reward a panel."""
    found = [
        _seen(results, title, score, {f"groups-{credit}-{ending}": credit for credit in GROUP_STYLES}, GROUP_STYLES)
        for title, score, ending in GROUP_PANELS
    ]
    return [panel for panel in found if panel]


def clip_panels(results: Results) -> list[Panel]:
    """Gains against the clips seen, a panel per score; at the higher rate of what is trained on alone."""
    found = []
    for rate, ending, scores in (("1e-3", "", CLIP_SCORES), ("2e-3", "-rate-2e-3", CLIP_SCORES[:2])):
        arms = {f"clips-{credit}{ending}": credit for credit in CLIP_STYLES if f"clips-{credit}{ending}" in ARMS}
        for score in scores:
            found.append(_seen(results, f"{score}, {rate}", score, arms, CLIP_STYLES, "clips", CLIPS_SEEN))
    return [panel for panel in found if panel]


def _seen(
    results: Results,
    title: str,
    score: str,
    arms: Mapping[str, str],
    styles: Mapping[str, str],
    what: str = "pictures",
    each: int = PICTURES,
) -> Panel | None:
    """Gain in a score against what was seen; ``arms`` are in the words of their credits. None if none is trained."""
    curves = []
    for arm, credit in arms.items():
        found = _gain_curve(results, arm, styles[credit], score, across=each)
        if found:
            seeds = found.name.rpartition("(")[2]
            curves.append(replace(found, name=f"{WORDS.get(credit, credit)} ({seeds}"))
    if not curves:
        return None
    svg = plot(curves, across=f"{what} seen", label=described(curves, f"Gain in {title}"))
    return Panel(title, "", svg, tuple((c.style, c.name) for c in curves))


def best_sources(results: Results) -> list[str]:
    """The sources trained as long as ViPO whose reward rose most."""
    end = last(results, "vipo")
    found = {arm: gain(results, arm, SCORES[0], end) for arm in SOURCES if end}
    means = {arm: spread.mean for arm, spread in found.items() if spread}
    return sorted(means, key=lambda arm: -means[arm])[:BEST_SOURCES]


def _gain_curve(results: Results, arm: str, style: str, score: str, across: int = 1) -> Band | None:
    """From the start on; the axis counts ``across`` for each iteration."""
    found = [(k, gain(results, arm, score, k)) for k in results.iterations(arm)]
    points = [(float(k * across), spread) for k, spread in found if spread]
    if not points:
        return None
    nothing = Spread(0.0, dict.fromkeys(points[0][1].per_seed, 0.0), 0.0, 0.0)
    return curve(f"{arm} ({count(points[-1][1].seeds)})", style, [(0.0, nothing), *points])


def count(seeds: int) -> str:
    return f"{seeds} seed{'s' * (seeds != 1)}"


def structure_panels(results: Results) -> list[Panel]:
    """A panel per measure against the redness gained, as far as every run got."""
    trained = [arm for arm in REDNESS if results.arms.get(arm)]
    reached = levels(results, trained, CURVE_SHARES)
    panels = []
    for name in STRUCTURE if reached else ():
        curves = []
        for arm in trained:
            found = [(level.gain, spread(level.measures[arm].get(name, {}))) for level in reached]
            points = [(gained, values) for gained, values in found if values]
            if points:
                curves.append(curve(f"{arm} ({count(points[-1][1].seeds)})", STYLES[arm.split("-")[1]], points))
        if curves:
            svg = plot(curves, across="redness gained", label=described(curves, f"{name} against redness"))
            panels.append(Panel(name, "", svg, tuple((c.style, c.name) for c in curves)))
    return panels


def clipping_panels(results: Results) -> list[Panel]:
    """A panel per clip range: the clipped share at each iteration, mean over seeds."""
    panels = []
    for clip_range in dict.fromkeys(arm.split("-clip-")[1] for arm in CLIPPED):
        lines, legend = [], []
        for arm in (a for a in CLIPPED if a.endswith(f"-clip-{clip_range}")):
            shares = list(clipped_share(results, arm).values())
            if not shares:
                continue
            mean = torch.stack([s[: min(map(len, shares))] for s in shares]).mean(0).tolist()
            style = STYLES[arm.split("-")[0]]
            lines.append(Line([float(k + 1) for k in range(len(mean))], mean, style))
            legend.append((style, f"{arm} ({count(len(shares))})"))
        if lines:
            label = f"Clipped share over iterations at a clip range of {clip_range}"
            svg = chart(lines, label=label, width=WIDTH, height=HEIGHT, from_zero=True)
            panels.append(Panel(f"Clip range {clip_range}", "", svg, tuple(legend)))
    return panels


@dataclass(frozen=True)
class Mark:
    """One line of a forest plot: what it is, its interval on the scale that all lines share, and the figure."""

    name: str
    svg: Markup
    text: str


def forest(results: Results) -> list[Mark]:
    """Each map's signal, the clearest first; the rule is scalar GRPO."""
    if results.gradient is None or SCALAR not in results.gradient["maps"]:
        return []
    found = sorted(signals(results.gradient).items(), key=lambda item: -item[1].ratio_to_noise)
    rows = {name: (s.low, s.ratio_to_noise, s.high) for name, s in found}
    return marks(rows, rows[SCALAR][1], {name: _in_words(s) for name, s in found})


def _in_words(signal: Signal) -> str:
    ratio, low, high = (fixed(v, 2) for v in (signal.relative, signal.relative_low, signal.relative_high))
    return f"{fixed(signal.ratio_to_noise, 2)}, {ratio} x [{low}, {high}]"


def differences(results: Results, arms: Sequence[str], base: str) -> list[Mark]:
    """Each arm's reward minus that of ``base`` where its own training ended; the rule is no difference."""
    ends = {arm: last(results, arm) for arm in arms}
    found = {arm: paired(results, arm, rival(arm, base), SCORES[0], end) for arm, end in ends.items() if end}
    known = {f"{arm}, {ends[arm]} iterations, {count(s.seeds)}": s for arm, s in found.items() if s}
    rows = {name: (s.low, s.mean, s.high) for name, s in known.items()}
    return marks(rows, 0.0, {name: signed(s.mean) for name, s in known.items()})


def marks(rows: Mapping[str, tuple[float, float, float]], rule: float, texts: Mapping[str, str]) -> list[Mark]:
    """Lines of (low, middle, high) on one scale, which holds the rule and zero."""
    low, high = (side(0.0, rule, *(v for row in rows.values() for v in row)) for side in (min, max))
    span = (high - low) or 1.0
    return [
        Mark(name, _mark(row, lambda value: 6 + (value - low) / span * 288, rule), texts[name])
        for name, row in rows.items()
    ]


def _mark(row: tuple[float, float, float], at: Callable[[float], float], rule: float) -> Markup:
    label = f"{number(row[1])}, 95 % interval {number(row[0])} to {number(row[2])}"
    low, middle, high = map(at, row)
    return Markup(
        f'<svg viewBox="0 0 300 18" role="img" aria-label="{escape(label)}" class="interval far">'
        f'<title>{escape(label)}</title><line class="zero" x1="{at(rule):.1f}" x2="{at(rule):.1f}" y1="0" y2="18"/>'
        f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="9" y2="9"/><circle cx="{middle:.1f}" cy="9" r="4"/>'
        "</svg>"
    )
