"""A chart as SVG, drawn in units that suit a phone as they are; classes of page.css give its colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from peftcli.reporting.blocks import Chart, Points, Series, number

MAX_SERIES = 8
"""Curves of different looks; page.css has as many."""
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 352, 8, 160
_BUCKETS = 180
"""A longer curve is drawn by the least and the largest value of as many pieces: no peak is lost."""
_MOST_DOTS = 40
_SPREAD = 50
"""From this ratio of the largest value to the median on, the axis is logarithmic."""


def draw_chart(chart: Chart) -> str:
    """Return the SVG element."""
    points = [point for series in chart.series for point in series.points]
    ys = sorted(y for _, y in points)
    log = ys[0] > 0 and ys[-1] > _SPREAD * ys[len(ys) // 2]
    low, high = _room(ys[0], ys[-1], log)
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    right += left == right

    def place(x: float, y: float) -> tuple[float, float]:
        share = (_scaled(y, log) - low) / (high - low)
        return _LEFT + (x - left) / (right - left) * (_RIGHT - _LEFT), _BOTTOM - share * (_BOTTOM - _TOP)

    drawn = []
    for value in _ticks(low, high):
        y = place(left, 10**value if log else value)[1]
        shown = f"{10**value if log else value:.4g}"
        drawn.append(f'<line class="grid-line" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for value in _ticks(left, right):
        if value == int(value):
            x, anchor = place(value, ys[-1])[0], "middle" if value < right else "end"
            drawn.append(f'<text x="{x:.1f}" y="{_BOTTOM + 14}" text-anchor="{anchor}">{int(value):,}</text>')
    drawn.append(f'<text x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_HEIGHT - 2}" text-anchor="middle">step</text>')
    for index, series in enumerate(chart.series):
        placed = [place(*point) for point in _thinned(series.points)]
        drawn.append(_curve(placed, index % MAX_SERIES, series.dots))
    label = f"{chart.title} by step{', on a logarithmic axis' * log}. {' '.join(map(_in_words, chart.series))}"
    content = "".join(drawn)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(ascii(label)[1:-1])}">{content}</svg>'


def _in_words(series: Series) -> str:
    (_, first), (step, last) = series.points[0], series.points[-1]
    return f"{series.name} from {number(first)} to {number(last)} at step {step:,.0f}.".strip()


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _room(least: float, most: float, log: bool) -> tuple[float, float]:
    """The ends of the axis: a little more than the values need."""
    low, high = _scaled(least, log), _scaled(most, log)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (0.0 if least == 0 and not log else low - margin), high + margin


def _ticks(low: float, high: float) -> Sequence[float]:
    """About five round numbers between two."""
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(count * step, 12) for count in range(first, math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Points) -> Points:
    if len(points) <= 2 * _BUCKETS:
        return points
    size = math.ceil(len(points) / _BUCKETS)
    kept = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        ends = {min(piece, key=lambda point: point[1]), max(piece, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _curve(placed: Points, look: int, dots: bool) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    line = f'<polyline class="curve s{look}" points="{path}"/>' if len(placed) > 1 else ""
    if len(placed) > 1 and (not dots or len(placed) > _MOST_DOTS):
        return line
    return line + "".join(f'<circle class="dot d{look}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in placed)
