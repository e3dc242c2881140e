"""A run's curves and samples as one small PNG, with the axes and colours of the report's charts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vipo.evaluation.estimate import estimate
from vipo.guards import FIRST, GUARDS, fired
from vipo.report.run import RunRecord
from vipo.report.svg import Frame, tick_labels, ticks

PAPER, INK, SOFT, RULE, ACCENT, WARN = "#fdfdfb", "#1c1d21", "#5b5e66", "#e2e2dd", "#1f5fa8", "#b0500e"
SCALE = 2  # drawn larger, so that lines are smooth on any screen
WIDTH, HEIGHT, TOP, BOTTOM = 330, 200, 26, 28
COLOURS = 128  # of the PNG's palette
ROOM = 0.08  # above and below what is drawn, of its height


@dataclass(frozen=True)
class Figure:
    """What shows a guard: the ``run`` of ``run.py``, metrics with their titles, and whether samples stand below them.

    A metric after ``evaluation/`` is a score of the run's evaluations.
    """

    run: str
    curves: tuple[tuple[str, str], ...]
    samples: bool = False


FIGURES = {
    "gradient_norm": Figure("hasty", (("grad_norm", "Gradient norm"), ("skipped", "Updates skipped"))),
    "first_ratio": Figure("noisy", (("ratio_deviation", "Largest first log-ratio"),)),
    "clipped_fraction": Figure("hasty", (("clipped_fraction", "Clipped fraction"),)),
    "kl": Figure("leaping", (("approx_kl", "Approximate KL"),)),
    "kl_reference": Figure("leaping", (("kl_reference", "Divergence from the untrained model"),)),
    "reward_spread": Figure("hacked", (("reward/redness", "Reward"), ("spread/redness", "Spread within groups"))),
    "flat_groups": Figure("coarse", (("flat_groups", "Share of flat groups"),)),
    "weights_still": Figure("still", (("weight_change", "Change of the weights"),)),
    "saturation": Figure("glaring", (("pictures/saturated", "Saturated share"),), samples=True),
    "grid": Figure("hacked", (("pictures/grid", "Power at the patch period"),), samples=True),
    "diversity": Figure("hacked", (("pictures/diversity", "Differences within groups"),), samples=True),
    "over_optimization": Figure(
        "hacked",
        (("evaluation/redness", "Reward, evaluated"), ("evaluation/emoji_judge", "Held-out judge")),
        samples=True,
    ),
}


@dataclass(frozen=True)
class Curve:
    """Points with an interval each, if they have one."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw(run: RunRecord, guard: str, figure: Figure, file: Path) -> None:
    """Write the figure; where the guard has begun there is an orange rule, and a dashed one at its threshold."""
    begun = next((one.iterations for one in fired(run.events) if one.name == guard), ())
    if not begun:
        raise SystemExit(f"guard {guard} has not fired in {run.folder}, so there is nothing to show")
    panels = [_panel(_curve(run, key), title, begun, _threshold(run, guard, key)) for key, title in figure.curves]
    rows = [_beside(panels), *(_strips(run) if figure.samples else [])]
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def _curve(run: RunRecord, key: str) -> Curve:
    if not key.startswith("evaluation/"):
        x, y = run.series(key)
        return Curve(x, y, [], [])
    name = key.removeprefix("evaluation/")
    found = [estimate(one.values[name], one.samples_per_prompt) for one in run.evaluations]
    x = [float(one.iteration) for one in run.evaluations]
    return Curve(x, [one.mean for one in found], [one.low for one in found], [one.high for one in found])


def _threshold(run: RunRecord, name: str, key: str) -> float | None:
    """In units of the metric, with the options that the run had."""
    guard, options = GUARDS[name], run.recorded("guards", name)
    limit = options["above"] if options["above"] is not None else options["below"]
    if limit is None or not (key == guard.key or (guard.key.endswith("/") and key.startswith(guard.key))):
        return None
    first = run.series(key)[1][:FIRST]
    by_measure = {"value": limit, "rise": statistics.fmean(first) + limit, "share": statistics.fmean(first) * limit}
    return by_measure.get(guard.measure)


def _panel(curve: Curve, title: str, begun: Sequence[int], threshold: float | None) -> Image.Image:
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    pen = ImageDraw.Draw(picture)
    values = [*curve.y, *curve.low, *curve.high, *([] if threshold is None else [threshold])]
    low, high = min(values), max(values)
    low, pad = min(low, 0.0) if low >= 0 else low, ROOM * ((high - low) or 1.0)
    marks = ticks(low, high + pad)
    names = [name.replace("\N{MINUS SIGN}", "-") for name in tick_labels(marks)]  # a glyph that the font lacks
    left = 14 + 6.6 * max(map(len, names))
    span = (min(curve.x), max(curve.x))
    frame = Frame(span, (low, high + pad), left, WIDTH - 14.0, TOP + 4.0, HEIGHT - float(BOTTOM))
    _text(pen, (left, 4), title, INK, 13)
    for value, name in zip(marks, names, strict=True):
        _line(pen, [(left, frame.y(value)), (frame.right, frame.y(value))], RULE, 1)
        _text(pen, (left - 7 - 6.2 * len(name), frame.y(value) - 7), name, SOFT, 11)
    for value in [value for value in ticks(*span) if value == round(value)]:
        text = f"{value:.0f}"
        _text(pen, (frame.x(value) - 3.3 * len(text), frame.bottom + 6), text, SOFT, 11)
    for at in [at for at in begun if span[0] <= at <= span[1]]:
        _line(pen, [(frame.x(at), frame.top), (frame.x(at), frame.bottom)], WARN, 1.6)
    if threshold is not None:
        _dashed(pen, frame, threshold)
    points = [(frame.x(a), frame.y(b)) for a, b in zip(curve.x, curve.y, strict=True)]
    _line(pen, points, ACCENT, 2)
    for (x, y), ends in zip(points, list(zip(curve.low, curve.high, strict=True)) or [None] * len(points), strict=True):
        if ends is not None:
            _line(pen, [(x, frame.y(ends[0])), (x, frame.y(ends[1]))], ACCENT, 1.4)
        pen.ellipse([SCALE * (x - 2.4), SCALE * (y - 2.4), SCALE * (x + 2.4), SCALE * (y + 2.4)], fill=ACCENT)
    return picture


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
    scaled = [(SCALE * x, SCALE * y) for x, y in points]
    pen.line(scaled, fill=colour, width=round(SCALE * width), joint="curve")


def _dashed(pen: ImageDraw.ImageDraw, frame: Frame, value: float) -> None:
    x, y = frame.left, frame.y(value)
    while x < frame.right:
        _line(pen, [(x, y), (min(x + 5, frame.right), y)], WARN, 1)
        x += 9


def _text(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: str, size: int) -> None:
    pen.text((SCALE * place[0], SCALE * place[1]), text, fill=colour, font=ImageFont.load_default(SCALE * size))


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height), PAPER)
    for number_, picture in enumerate(pictures):
        row.paste(picture, (number_ * picture.width, 0))
    return row


def _strips(run: RunRecord) -> list[Image.Image]:
    """The evaluation's pictures before and after, each under a line that says so."""
    strips = []
    for iteration in (min(run.sheets), max(run.sheets)):
        sheet = Image.open(run.sheets[iteration]).convert("RGB")
        inner = WIDTH - 28
        sheet = sheet.resize(
            (SCALE * inner, round(SCALE * inner * sheet.height / sheet.width)), Image.Resampling.LANCZOS
        )
        strip = Image.new("RGB", (SCALE * WIDTH, sheet.height + SCALE * 26), PAPER)
        words = "untrained" if iteration == 0 else f"after {iteration} iterations"
        _text(ImageDraw.Draw(strip), (14, 3), words, SOFT, 11)
        strip.paste(sheet, (SCALE * 14, SCALE * 20))
        strips.append(strip)
    return strips
