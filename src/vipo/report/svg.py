"""Line charts as inline SVG. Colours are left to the page's style sheet, so a chart follows light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MOST_POINTS = 400  # of one line; longer ones are averaged in bins
GLYPH = 6.6  # pixels of one digit of an axis label


@dataclass(frozen=True)
class Line:
    """Points joined in order. ``style`` is a CSS class."""

    x: Sequence[float]
    y: Sequence[float]
    style: str


@dataclass(frozen=True)
class Dots:
    """Points with an interval each, joined by a thin line; the one at ``ringed`` has a ring around it."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: str
    ringed: float | None = None


@dataclass(frozen=True)
class Frame:
    """Data coordinates to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float
    right: float
    top: float
    bottom: float

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def number(value: float, digits: int = 3) -> str:
    """A number for people: three significant digits, a true minus sign, no needless exponent."""
    if not math.isfinite(value):
        return "n/a"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:.{places}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], between ``about - 2`` and ``about + 2`` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of equal precision, with an exponent where the numbers are tiny or huge."""
    step = abs(values[1] - values[0]) if len(values) > 1 else abs(values[0]) or 1.0
    if step < 1e-4 or step >= 1e5:
        return [number(value) if value else "0" for value in values]
    places = next(n for n in range(7) if n == 6 or abs(step * 10**n - round(step * 10**n)) < 1e-6)
    return [f"{value:.{places}f}".replace("-", "\N{MINUS SIGN}") if value else "0" for value in values]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``MOST_POINTS`` points: means over bins of equal length."""
    size = math.ceil(len(x) / MOST_POINTS) or 1
    bins = range(0, len(x), size)
    return [_mean(x[i : i + size]) for i in bins], [_mean(y[i : i + size]) for i in bins]


def smooth(y: Sequence[float], width: float) -> list[float]:
    """A centred Gaussian mean with a standard deviation of ``width`` points, its weights normalised at the ends."""
    reach = math.ceil(3 * width)
    weights = [math.exp(-((k / width) ** 2) / 2) for k in range(-reach, reach + 1)]
    out = []
    for i in range(len(y)):
        near = range(max(0, i - reach), min(len(y), i + reach + 1))
        share = [weights[j - i + reach] for j in near]
        out.append(sum(w * y[j] for w, j in zip(share, near, strict=True)) / sum(share))
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def chart(
    layers: Sequence[Line | Dots],
    *,
    label: str,
    width: int = 440,
    height: int = 230,
    from_zero: bool = False,
    x_end: float | None = None,
) -> Markup:
    """A chart over iterations. ``label`` describes it to who cannot see it; ``from_zero`` starts the axis at 0."""
    frame_x = _x_range(layers, x_end)
    frame_y = _y_range(layers, from_zero)
    marks = ticks(*frame_y, about=5)
    names = tick_labels(marks)
    left = 12 + GLYPH * max(map(len, names))
    frame = Frame(frame_x, frame_y, left, width - 10, 10, height - 34)
    body = [_axes(frame, marks, names), *(_layer(frame, layer) for layer in layers)]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" class="chart">'
    return Markup(f"{head}{''.join(body)}</svg>")


def _x_range(layers: Sequence[Line | Dots], x_end: float | None) -> tuple[float, float]:
    values = [value for layer in layers for value in layer.x]
    low, high = min(values), max([*values, x_end] if x_end is not None else values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(layers: Sequence[Line | Dots], from_zero: bool) -> tuple[float, float]:
    values = [value for layer in layers for value in layer.y]
    for layer in layers:
        if isinstance(layer, Dots):
            values += [value for value in (*layer.low, *layer.high) if math.isfinite(value)]
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        low = 0.0
    if high - low <= 1e-12 * max(1.0, abs(high)) and high - low <= 1e-3 * abs(high):
        high, low = high + (0.1 * abs(high) or 1.0), low - (0.1 * abs(low) if low else 0.0)
    pad = 0.07 * (high - low)
    return (0.0 if low >= 0 and low - pad < 0 else low - pad), high + pad


def _axes(frame: Frame, marks: Sequence[float], names: Sequence[str]) -> str:
    parts = []
    for value, name in zip(marks, names, strict=True):
        y = frame.y(value)
        parts.append(f'<line class="rule" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    whole = [value for value in ticks(*frame.x_range) if abs(value - round(value)) < 1e-6]
    for value in whole:
        x = frame.x(value)
        parts.append(_under(x, frame.bottom + 17, f"{value:.0f}"))
    parts.append(_under((frame.left + frame.right) / 2, frame.bottom + 31, "iteration"))
    return "".join(parts)


def _under(x: float, y: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'


def _layer(frame: Frame, layer: Line | Dots) -> str:
    x, y = thinned(layer.x, layer.y) if isinstance(layer, Line) else (list(layer.x), list(layer.y))
    points = [f"{frame.x(a):.1f} {frame.y(b):.1f}" for a, b in zip(x, y, strict=True)]
    path = f'<path class="line {layer.style}" d="M{"L".join(points)}"/>'
    if isinstance(layer, Line):
        return path + (_hover(frame, x, y) if layer.style == "raw" else "")
    marks = [_dot(frame, *values, layer.style) for values in zip(x, y, layer.low, layer.high, strict=True)]
    ring = [_ring(frame, a, b) for a, b in zip(x, y, strict=True) if a == layer.ringed]
    return path + "".join(marks + ring)


def _hover(frame: Frame, x: Sequence[float], y: Sequence[float]) -> str:
    """What a pointer finds along a line."""
    spots = [
        f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="5"><title>{a:.0f}: {number(b)}</title></circle>'
        for a, b in zip(x, y, strict=True)
    ]
    return f'<g class="hover">{"".join(spots)}</g>'


def _dot(frame: Frame, x: float, y: float, low: float, high: float, style: str) -> str:
    title = f"<title>iteration {x:.0f}: {number(y)}, 95 % interval {number(low)} to {number(high)}</title>"
    at, bar = frame.x(x), ""
    if math.isfinite(low) and math.isfinite(high):
        bar = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>'
    return f'<g class="dot {style}">{title}{bar}<circle cx="{at:.1f}" cy="{frame.y(y):.1f}" r="3.6"/></g>'


def _ring(frame: Frame, x: float, y: float) -> str:
    return f'<circle class="ring" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="7.5"/>'


def interval(low: float, middle: float, high: float, *, label: str) -> Markup:
    """A forest-plot mark: the interval as a bar, the estimate as a dot, an axis of its own with zero and a tick."""
    width, height, reach = 148.0, 32.0, max(abs(low), abs(high), 1e-12) * 1.15
    mark = max(value for value in ticks(0.0, reach, about=2) if value <= reach)
    x = {value: width / 2 + value / reach * width / 2 for value in (-mark, 0.0, mark, low, middle, high)}
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" class="interval">',
        f'<line class="axis" x1="0" x2="{width:.0f}" y1="17" y2="17"/>',
        f'<line class="zero" x1="{x[0.0]:.1f}" x2="{x[0.0]:.1f}" y1="0" y2="17"/>',
    ]
    for value, name in zip((-mark, 0.0, mark), tick_labels([-mark, 0.0, mark]), strict=True):
        at = min(max(x[value], GLYPH * len(name) / 2), width - GLYPH * len(name) / 2)
        parts.append(f'<line class="axis" x1="{x[value]:.1f}" x2="{x[value]:.1f}" y1="17" y2="20"/>')
        parts.append(f'<text x="{at:.1f}" y="30" text-anchor="middle">{name}</text>')
    parts += [
        f'<line class="bar" x1="{x[low]:.1f}" x2="{x[high]:.1f}" y1="8" y2="8"/>',
        f'<circle cx="{x[middle]:.1f}" cy="8" r="4"/></svg>',
    ]
    return Markup("".join(parts))
