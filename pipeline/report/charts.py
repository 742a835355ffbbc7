"""Numbers -> inline SVG drawings.  Hand-written, so they share the page's type, follow dark mode and stay small.

Lengths are SVG units, about a pixel at full width.  Colours are CSS variables that the template fills from PALETTE.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from pipeline.report.formats import MINUS, format_count, format_percent

PALETTE = {
    "kept": ("#0072b2", "#4aa8de"),
    "dropped": ("#d3d6da", "#454b54"),
    "failed": ("#d55e00", "#f08a3c"),
    "series-0": ("#767676", "#a0a0a0"),
    "series-1": ("#0072b2", "#4aa8de"),
    "series-2": ("#e69f00", "#e9b13a"),
    "series-3": ("#009e73", "#2fc498"),
    "series-4": ("#cc79a7", "#dc95bc"),
    "series-5": ("#d55e00", "#f08a3c"),
    "series-6": ("#56b4e9", "#86cdf5"),
    "series-7": ("#5b3f9b", "#a18be0"),
}
"""Name -> (light, dark): Okabe and Ito's colours, which most colour-blind readers tell apart; grey is the reference."""
NUM_SERIES = 7
WIDTH = 824
HALF_WIDTH = 400
MAX_MARKED = 30
"""Points of a curve that are still marked one by one."""
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a bar drawing: a label, stretches of (colour, number) from the left, and a text at the right."""

    label: str
    stretches: Sequence[tuple[str, float]]
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: points (x, y), drawn faint as they are and strong smoothed."""

    colour: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


def choose_colours(labels: Sequence[str], *, reference: str) -> dict[str, str]:
    """Return label -> colour; the reference is grey, and colours repeat after seven."""
    others = [label for label in labels if label != reference]
    chosen = {label: f"series-{1 + place % NUM_SERIES}" for place, label in enumerate(others)}
    return {label: chosen.get(label, "series-0") for label in labels}


def draw_bars(bars: Sequence[Bar], *, total: float, width: int = WIDTH, label_width: int = 130) -> Markup:
    """Return horizontal stacked bars; `total` fills the whole length."""
    step, thick, text_width = 24, 14, 138
    span = width - label_width - text_width
    parts = []
    for place, bar in enumerate(bars):
        top, x = place * step + 5, float(label_width)
        parts.append(_text(label_width - 8, top + 11, _cut(bar.label, (label_width - 8) // 6), "end", title=bar.label))
        parts.append(_line(label_width, top - 2, label_width, top + thick + 2, "axis"))
        for colour, number in bar.stretches:
            length = span * number / total if total else 0
            parts.append(_rect(x, top, length, thick, colour))
            x += length
        parts.append(_text(width, top + 11, bar.text, "end"))
    return _frame(width, len(bars) * step + 6, parts)


def draw_histogram(
    edges: np.ndarray,
    kept: np.ndarray | None,
    counts: np.ndarray,
    *,
    marks: Sequence[tuple[float, str]] = (),
    width: int = HALF_WIDTH,
) -> Markup:
    """Return a histogram (bins,) over edges (bins + 1,); kept rows are the lower part of each bar."""
    left, top, right, bottom, height = 46, 20, width - 8, 136, 160
    x_of = _scale(float(edges[0]), float(edges[-1]), left, right)
    ticks = find_ticks(0, max(1, int(counts.max())), 4, whole=True)
    y_of = _scale(0, max(ticks[-1], float(counts.max())), bottom, top)
    parts = [_line(left, y_of(t), right, y_of(t), "grid") for t in ticks]
    parts += [_text(left - 5, y_of(t) + 3.5, format_count(int(t)), "end") for t in ticks]
    lower = counts if kept is None else kept
    for place, (number, below) in enumerate(zip(counts.tolist(), lower.tolist(), strict=True)):
        x, next_x = x_of(float(edges[place])), x_of(float(edges[place + 1]))
        gap = min(0.8, 0.15 * (next_x - x))
        colour = "series-0" if kept is None else "kept"
        parts.append(_rect(x, y_of(below), next_x - x - gap, bottom - y_of(below), colour))
        parts.append(_rect(x, y_of(number), next_x - x - gap, y_of(below) - y_of(number), "dropped"))
    parts += _draw_x_axis(x_of, float(edges[0]), float(edges[-1]), bottom, num=5)
    for value, label in marks:
        x = x_of(value)
        parts.append(_line(x, 4, x, bottom, "mark"))
        anchor = "end" if x > (left + right) / 2 else "start"
        parts.append(_text(x + (-4 if anchor == "end" else 4), 12, label, anchor, css="strong"))
    return _frame(width, height, parts)


def draw_lines(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    width: int = WIDTH,
    smoothed: bool = True,
    marked: bool = False,
) -> Markup:
    """Return curves over a common x axis from 0; each raw curve faint, its smoothed one strong.

    Without smoothing curves are strong as they are; `marked` shows the points of short ones.
    """
    height = 302 if width == WIDTH else 190
    left, top, right, bottom = 46, 22, width - 12, height - 40
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ticks = find_ticks(min(ys), max(ys), 6)
    x_of = _scale(0, max(xs), left, right)
    margin = 0.04 * (max(ys) - min(ys))
    y_of = _scale(min(ticks[0], min(ys) - margin), max(ticks[-1], max(ys)), bottom, top)
    parts = [_line(left, y_of(t), right, y_of(t), "grid") for t in ticks]
    parts += [_text(left - 6, y_of(t) + 3.5, _format_tick(t, ticks), "end") for t in ticks]
    for line in lines:
        raw = [(x_of(x), y_of(y)) for x, y in _thin_out(line.points)]
        if not smoothed:
            dots = raw if marked and len(raw) <= MAX_MARKED else ()
            parts += [
                _path(raw, line, "smooth"),
                *(part for x, y in dots for part in _draw_dot(x, y, line.colour, 2.6)),
            ]
            continue
        parts.append(_path(raw, line, "raw"))
        parts.append(_path([(x_of(x), y_of(y)) for x, y in _thin_out(smooth(line.points))], line, "smooth"))
    parts += _draw_x_axis(x_of, 0, max(xs), bottom, num=6 if width == WIDTH else 3)
    parts.append(_text((left + right) / 2, height - 4, x_label, "middle", css="label"))
    parts.append(_text(0, 10, y_label, "start", css="label"))
    return _frame(width, height, parts)


def smooth(points: Sequence[tuple[float, float]], *, fraction: float = 0.05) -> list[tuple[float, float]]:
    """Return the running mean of y over a centred window of that share of the points, shorter at the ends."""
    reach = max(0, round(len(points) * fraction / 2))
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    smoothed = []
    for place, (x, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        smoothed.append((x, float(sums[place + near + 1] - sums[place - near]) / (2 * near + 1)))
    return smoothed


def _thin_out(points: Sequence[tuple[float, float]], *, most: int = 240) -> list[tuple[float, float]]:
    """Return at most about `most` points, each the mean of neighbours."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


class Score(NamedTuple):
    """One group of bars."""

    label: str
    values: Mapping[str, float | None]
    """By series."""
    baseline: float | None
    """What guessing scores."""
    intervals: Mapping[str, Sequence[float]]
    """(low, high) of those series that have them."""


def draw_scores(rows: Sequence[Score], colours: Mapping[str, str]) -> Markup:
    """Return shares in [0, 1] as bars from 0, with their intervals as thin lines.

    With many bars each is a dot instead: on the group's line, or above one another where there are intervals to tell
    apart.  The baseline is a vertical mark.
    """
    num_bars = sum(len(row.values) for row in rows)
    is_dots = num_bars > 60
    thick, left, right, top = 9, 160, WIDTH - 34, 22
    lane = (6 if any(row.intervals for row in rows) else 0) if is_dots else thick
    known = [v for row in rows for v in (*row.values.values(), row.baseline) if v is not None]
    known += [high for row in rows for _, high in row.intervals.values()]
    num_fifths = min(5, math.ceil(5.2 * max(known, default=1))) or 1
    x_of = _scale(0, num_fifths / 5, left, right)
    parts: list[str] = []
    y = float(top)
    for label, values, baseline, intervals in rows:
        height = 20 + lane * (len(values) - 1) if is_dots else thick * len(values) + 14
        middle = y + height / 2
        parts.append(_text(left - 10, middle + 3.5, _cut(label, 30), "end", title=label))
        if is_dots:
            parts.append(_line(left, middle, right, middle, "grid"))
        shares: list[str] = []
        for place, (name, value) in enumerate(values.items()):
            if value is None:
                continue
            line_y = middle + lane * (place - (len(values) - 1) / 2)
            low, high = map(x_of, intervals.get(name, (value, value)))
            whisker = [_line(low, line_y, high, line_y, "whisker")] if name in intervals else []
            if is_dots:
                parts += [*whisker, *_draw_dot(x_of(value), line_y, colours[name])]
            else:
                bar_y, end = line_y - (thick - 1.5) / 2, max(x_of(value), high)
                bar, share = _draw_value_bar(left, x_of(value), bar_y, thick - 1.5, colours[name], value, end)
                parts += [bar, *whisker]
                shares.append(share)
        if baseline is not None:
            parts.append(_line(x_of(baseline), y + 3, x_of(baseline), y + height - 3, "mark"))
        parts += shares  # over the mark, which may pass under them
        y += height
    axis = [_line(x_of(t / 5), top - 4, x_of(t / 5), y, "grid") for t in range(num_fifths + 1)]
    axis += [_text(x_of(t / 5), 10, format_percent(t / 5).replace(".0", ""), "middle") for t in range(num_fifths + 1)]
    return _frame(WIDTH, round(y) + 4, axis + parts)


def _draw_dot(x: float, y: float, colour: str, radius: float = 3.6) -> list[str]:
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:var(--{colour})"/>']


def _draw_value_bar(
    left: float, x: float, y: float, thick: float, colour: str, value: float, text_x: float
) -> list[str]:
    label = _text(text_x + 4, y + thick - 0.6, format_percent(value, unit=False), "start", css="small")
    return [_rect(left, y, x - left, thick, colour), label]


def find_ticks(low: float, high: float, num: int, *, whole: bool = False) -> list[float]:
    """Return about `num` round numbers that lie in [low, high], at least two unless the range is empty."""
    if high <= low:
        return [low]
    raw = (high - low) / num
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) for place in range(first, last + 1)]


def _format_tick(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1
    digits = max(0, min(6, -math.floor(math.log10(abs(step)) + 1e-9)))
    if round(step * 10**digits, 6) != round(step * 10**digits):
        digits += 1
    return f"{value + 0.0:,.{digits}f}".replace("-", MINUS)


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return the linear map that takes [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _draw_x_axis(x_of: Scale, low: float, high: float, bottom: float, *, num: int) -> list[str]:
    ticks = find_ticks(low, high, num)
    parts = [_line(x_of(low), bottom, x_of(high), bottom, "axis")]
    for tick in ticks:
        parts.append(_line(x_of(tick), bottom, x_of(tick), bottom + 4, "axis"))
        parts.append(_text(x_of(tick), bottom + 16, _format_tick(tick, ticks), "middle"))
    return parts


def _frame(width: int, height: int, parts: Sequence[str]) -> Markup:
    inside = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" style="min-width:{0.62 * width:.0f}px" role="img">{inside}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    if width <= 0 or height <= 0:
        return ""
    size = f'width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} style="fill:var(--{colour})"/>'


def _line(x: float, y: float, to_x: float, to_y: float, css: str) -> str:
    return f'<line class="{css}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, *, css: str = "", title: str = "") -> str:
    named = f' class="{css}"' if css else ""
    hover = f"<title>{escape(title)}</title>" if title and title != text else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{hover}</text>'


def _path(points: Sequence[tuple[float, float]], line: Line, css: str) -> str:
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ";stroke-dasharray:5 3" if line.is_dashed and css == "smooth" else ""
    return f'<polyline class="{css}" points="{steps}" style="stroke:var(--{line.colour}){dashes}"/>'


def _cut(text: str, num_chars: int) -> str:
    return text if len(text) <= num_chars else text[: num_chars - 1] + "…"
