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
class Band:
    """A mean at each x, with the least and the largest around it; ``name`` is what a pointer reads."""

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


Layer = Line | Dots | Band


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


def fixed(value: float, places: int = 3) -> str:
    """A number with that many decimals and a true minus sign."""
    if not math.isfinite(value):
        return "n/a"
    text = f"{value:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, places: int = 3) -> str:
    """As ``fixed``, with a plus sign."""
    text = fixed(value, places)
    return f"+{text}" if value > 0 and float(f"{value:.{places}f}") else text


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
    layers: Sequence[Layer],
    *,
    label: str,
    width: int = 440,
    height: int = 230,
    from_zero: bool = False,
    x_end: float | None = None,
    across: str = "iteration",
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """A chart.

    Args:
        label: describes it to who cannot see it.
        from_zero: start the vertical axis at 0.
        across: names the horizontal axis.
        y_range: of the vertical axis; what leaves it at its lower end is broken off there, and marked.
    """
    frame_x = _x_range(layers, x_end)
    frame_y = y_range or y_span(layers, from_zero)
    marks = ticks(*frame_y, about=5)
    names = tick_labels(marks)
    left = 12 + GLYPH * max(map(len, names))
    frame = Frame(frame_x, frame_y, left, width - 10, 10, height - 34)
    drawn = [_layer(frame, layer) for layer in layers]
    body = [_axes(frame, marks, names, across), *(drawn if y_range is None else _broken_off(frame, layers, drawn))]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" class="chart">'
    return Markup(f"{head}{''.join(body)}</svg>")


def _x_range(layers: Sequence[Layer], x_end: float | None) -> tuple[float, float]:
    values = [value for layer in layers for value in layer.x]
    low, high = min(values), max([*values, x_end] if x_end is not None else values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def y_span(layers: Sequence[Layer], from_zero: bool = False) -> tuple[float, float]:
    """What a vertical axis has to cover, with some room."""
    values = [value for layer in layers for value in layer.y]
    for layer in layers:
        if isinstance(layer, Dots | Band):
            values += [value for value in (*layer.low, *layer.high) if math.isfinite(value)]
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        low = 0.0
    if high - low <= 1e-12 * max(1.0, abs(high)) and high - low <= 1e-3 * abs(high):
        high, low = high + (0.1 * abs(high) or 1.0), low - (0.1 * abs(low) if low else 0.0)
    pad = 0.07 * (high - low)
    return (0.0 if low >= 0 and low - pad < 0 else low - pad), high + pad


def _axes(frame: Frame, marks: Sequence[float], names: Sequence[str], across: str) -> str:
    parts = []
    for value, name in zip(marks, names, strict=True):
        y, style = frame.y(value), "rule" if value else "rule zero"
        parts.append(f'<line class="{style}" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    counts = all(
        float(end).is_integer() or end % 1 == 0.5 for end in frame.x_range
    )  # one point has half a step of room
    along = [value for value in ticks(*frame.x_range) if not counts or abs(value - round(value)) < 1e-6]
    for value, name in zip(along, tick_labels(along), strict=True):
        parts.append(_under(frame.x(value), frame.bottom + 17, name))
    parts.append(_under((frame.left + frame.right) / 2, frame.bottom + 31, across))
    return "".join(parts)


def _under(x: float, y: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _layer(frame: Frame, layer: Layer) -> str:
    if isinstance(layer, Band):
        return _band(frame, layer)
    x, y = thinned(layer.x, layer.y) if isinstance(layer, Line) else (list(layer.x), list(layer.y))
    points = [f"{frame.x(a):.1f} {frame.y(b):.1f}" for a, b in zip(x, y, strict=True)]
    path = f'<path class="line {layer.style}" d="M{"L".join(points)}"/>'
    if isinstance(layer, Line):
        return path + (_hover(frame, x, y) if layer.style == "raw" else "")
    marks = [_dot(frame, *values, layer.style) for values in zip(x, y, layer.low, layer.high, strict=True)]
    ring = [_ring(frame, a, b) for a, b in zip(x, y, strict=True) if a == layer.ringed]
    return path + "".join(marks + ring)


def _band(frame: Frame, band: Band) -> str:
    rows = list(zip(band.x, band.y, band.low, band.high, strict=True))
    edge = [(x, high) for x, _, _, high in rows] + [(x, low) for x, _, low, _ in reversed(rows)]
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in edge)
    line = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y, _, _ in rows)
    dots = [
        f'<circle class="{band.style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"><title>{escape(band.name)} at '
        f"{number(x)}: {number(y)}, seeds {number(low)} to {number(high)}</title></circle>"
        for x, y, low, high in rows
    ]
    return f'<path class="band {band.style}" d="M{path}Z"/><path class="line {band.style}" d="M{line}"/>{"".join(dots)}'


def _broken_off(frame: Frame, layers: Sequence[Layer], drawn: Sequence[str]) -> list[str]:
    """What was drawn, cut at the lower end, with a mark where a band's mean leaves."""
    view = f"0 0 {frame.right + 10:.1f} {frame.bottom:.1f}"
    size = f'width="{frame.right + 10:.1f}" height="{frame.bottom:.1f}"'
    marks = [_leaving(frame, layer) for layer in layers if isinstance(layer, Band)]
    return [f'<svg x="0" y="0" {size} viewBox="{view}">', *drawn, "</svg>", *marks]


def _leaving(frame: Frame, band: Band) -> str:
    """An arrow at the axis where the mean goes below it; nothing for one that stays."""
    floor = frame.y_range[0]
    below = [k for k, value in enumerate(band.y) if value < floor]
    if not below:
        return ""
    at, before = below[0], max(0, below[0] - 1)
    drop = band.y[before] - band.y[at]
    share = (band.y[before] - floor) / drop if drop else 1.0
    x, y = frame.x(band.x[before] + share * (band.x[at] - band.x[before])), frame.bottom
    title = f"<title>{escape(band.name)} falls below this axis, to {number(min(band.y))}</title>"
    return f'<path class="off {band.style}" d="M{x - 6:.1f} {y - 2:.1f}h12l-6 10Z">{title}</path>'


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


def interval(low: float, middle: float, high: float, *, label: str, widest: float | None = None) -> Markup:
    """A forest-plot mark: the interval as a bar, the estimate as a dot, an axis with zero and a tick.

    Args:
        widest: distance from zero that the axis holds, where several marks share their scale; None takes this one's.
            An estimate beyond it is an arrow at that end.
    """
    own = max(abs(low), abs(high)) if widest is None else widest
    width, height, reach = 148.0, 32.0, max(own, 1e-12) * 1.15
    low, high = max(low, -reach), min(high, reach)
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
    if abs(middle) > reach:
        end, inward = (0.0, 9.0) if middle < 0 else (width, -9.0)
        return Markup("".join([*parts, f'<path class="off" d="M{end} 8l{inward} -6v12Z"/></svg>']))
    parts += [
        f'<line class="bar" x1="{x[low]:.1f}" x2="{x[high]:.1f}" y1="8" y2="8"/>',
        f'<circle cx="{x[middle]:.1f}" cy="8" r="4"/></svg>',
    ]
    return Markup("".join(parts))
