"""Charts as SVG, a text each: lines over steps, intervals, squares of shares. Pure functions of numbers.

Colours are classes of page.css (c0 to c5, for curves; d1: dashed), as a page's policy allows no style of an element's own, and
light and dark are its scheme's business. Every text is escaped here.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cola_ds.errors import cut, inline

WIDTH, HEIGHT = 400, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 382, 16, 206  # of what is drawn in
COLORS = 6
MOST_CURVES = 2 * COLORS
_MARKED = 60  # points: more of them are a line
_LOG_FROM = 1000  # times: of a range that wide the small values would be a flat line


@dataclass(frozen=True)
class Curve:
    """Values by x, NaN where there is none."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: int = 0
    marked: bool = False
    """Whether each point has a mark: values of their own, such as evaluations, and not a course."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval, and the values that it is of."""

    name: str
    mean: float
    low: float
    high: float
    values: Sequence[float]


def escaped(text: str, most: int = 300) -> str:
    """A text of anybody's, in an element or an attribute."""
    return html.escape(inline(text, most))


def kept_places(values: Sequence[float], most: int) -> list[int]:
    """The places of at most `most` values that stand for all: the first, the last, and the least, the greatest and a missing one
    of each of equal parts, so that no peak is lost, nor a gap. All, where there are no more."""
    count = len(values)
    if count <= most:
        return list(range(count))
    missing = any(value != value for value in values)
    parts = max((most - 2) // (3 if missing else 2), 1)
    kept = {0, count - 1}
    for part in range(parts):
        places = [at for at in range(part * count // parts, (part + 1) * count // parts) if values[at] == values[at]]
        gaps = [at for at in range(part * count // parts, (part + 1) * count // parts) if values[at] != values[at]]
        kept |= set(gaps[:1])  # a line is not drawn across it
        if places:
            kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)


def ticks(low: float, high: float, log: bool = False, most: int = 6) -> list[float]:
    """Round numbers within a range, at most about so many."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        every = max(1, math.ceil((last - first + 1) / most))
        return [10.0**power for power in range(first, last + 1, every)]
    span = high - low
    size = 10 ** math.floor(math.log10(span / (most - 1)))
    step = next(size * times for times in (1, 2, 5, 10, 20) if span / (size * times) <= most - 1)
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [place * step for place in places]


def shown(value: float) -> str:
    """A number in six digits, as tables have it."""
    return "-" if math.isnan(value) else f"{value:.6g}"


def labels(values: Sequence[float]) -> list[str]:
    """Round numbers as an axis has them: as many digits as tell them apart."""
    largest = max(map(abs, values), default=0.0)
    apart = min((abs(b - a) for a, b in itertools.pairwise(values)), default=largest)
    if not 1e-3 <= largest < 1e4 or apart < 1e-6 * largest:
        in_digits = ([_in_thousands(value, digits) for value in values] for digits in range(4, 16))
        return next((each for each in in_digits if len(set(each)) == len(values)), [repr(value) for value in values])
    places = max(0, -math.floor(math.log10(apart) + 1e-9)) if apart else 0
    return [f"{value:.{places}f}" for value in values]


def _in_thousands(value: float, digits: int) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e13:
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


class _Axis:
    """Values to places between two ends, by their logarithm where all are above 0 and reach far."""

    def __init__(
        self, values: Iterable[float], start: float, end: float, may_be_log: bool = False, margin: float = 0.0
    ):
        """`margin`: the share of the range that is left free at both ends."""
        found = [value for value in values if not math.isnan(value)]
        low, high = min(found, default=0.0), max(found, default=1.0)
        self.log = may_be_log and low > 0 and high / low > _LOG_FROM
        if not self.log and high - low <= 1e-12 * max(abs(low), abs(high)):  # one value, or as good as
            low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
        beside = margin * (high - low)
        self.low, self.high, self.start, self.end = low - beside, high + beside, start, end

    def __call__(self, value: float) -> float:
        low, high = (math.log10(end) for end in (self.low, self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def labelled(self, most: int = 6, whole: bool = False) -> list[tuple[float, str]]:
        """Round numbers and their labels; of steps and links, `whole` ones."""
        found = ticks(self.low, self.high, self.log, most)
        found = [value for value in found if value == int(value)] if whole else found
        return list(zip(found, [f"{value:g}" for value in found] if self.log else labels(found), strict=True))


def line_chart(title: str, curves: Sequence[Curve], x_name: str = "step", knots: Sequence[float] = ()) -> str:
    """Curves over x, with a dashed line at each knot."""
    x = _Axis((at for curve in curves for at in curve.xs), _LEFT, _RIGHT)
    y = _Axis((value for curve in curves for value in curve.ys), _BOTTOM, _TOP, may_be_log=True)
    parts = [_opened(title, WIDTH, HEIGHT)]
    for value, label in y.labelled():
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{_RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 5}" y="{y(value) + 4:.1f}">{label}</text>')
    for value, label in x.labelled(whole=True):
        parts.append(f'<text class="x" x="{x(value):.1f}" y="{_BOTTOM + 15}">{label}</text>')
    if inside := [knot for knot in knots if x.low <= knot <= x.high]:
        parts.append(f'<path class="knot" d="{"".join(f"M{x(knot):.1f} {_TOP}V{_BOTTOM}" for knot in inside)}"/>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>')
    parts.append(f'<text class="x" x="{(_LEFT + _RIGHT) / 2}" y="{HEIGHT - 4}">{escaped(x_name)}</text>')
    parts += [_drawn(curve, x, y) for curve in curves]
    return "".join([*parts, "</svg>"])


def _opened(title: str, width: float, height: float) -> str:
    return f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escaped(title)}">'


def line_class(color: int) -> str:
    """The classes of a curve's colour: after the last colour, the first again, dashed."""
    return f"c{color % COLORS}" + (" d1" if color // COLORS % 2 else "")


def _drawn(curve: Curve, x: _Axis, y: _Axis) -> str:
    path, open_at, last = [], False, (math.nan, math.nan)
    marks = []
    for at, value in zip(curve.xs, curve.ys, strict=True):
        if math.isnan(at) or math.isnan(value):
            open_at = False
            continue
        place = (x(at), y(value))
        path.append(f"{'L' if open_at else 'M'}{place[0]:.1f} {place[1]:.1f}" + ("" if open_at else "h0"))
        open_at, last = True, place
        marks.append(f'<circle class="{line_class(curve.color)}" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="2.6"/>')
    line = f'<path class="line {line_class(curve.color)}" d="{"".join(path)}"/>' if path else ""
    return line + ("".join(marks) if curve.marked and len(marks) <= _MARKED else "")


def interval_chart(title: str, intervals: Sequence[Interval], x_name: str) -> str:
    """A line each: the mean with its interval, and below it a small mark for each value."""
    every, left, right = 26, 160, 424
    bottom = 10 + every * len(intervals)
    x = _Axis((v for i in intervals for v in (i.mean, i.low, i.high, *i.values)), left + 8, right, margin=0.04)
    parts = [_opened(title, right + 16, bottom + 36)]
    for value, label in x.labelled(most=5):
        parts.append(f'<path class="grid" d="M{x(value):.1f} 6V{bottom}"/>')
        parts.append(f'<text class="x" x="{x(value):.1f}" y="{bottom + 15}">{label}</text>')
    for number, each in enumerate(intervals):
        at = 20 + every * number
        parts.append(f'<text class="y" x="{left}" y="{at + 4}">{escaped(cut(each.name, 22))}</text>')
        parts.append(f'<path class="line c0" d="M{x(each.low):.1f} {at}H{x(each.high):.1f}"/>')
        parts.append(f'<circle class="c0" cx="{x(each.mean):.1f}" cy="{at}" r="4"/>')
        parts += [f'<path class="value" d="M{x(value):.1f} {at + 6}v5"/>' for value in each.values]
    parts.append(f'<path class="axis" d="M{left + 8} {bottom}H{right}"/>')
    parts.append(f'<text class="x" x="{(left + 8 + right) / 2}" y="{bottom + 31}">{escaped(x_name)}</text>')
    return "".join([*parts, "</svg>"])


def square_chart(title: str, shares: Sequence[Sequence[float]]) -> str:
    """A square of shares, 0 to 1: the darker the greater; nothing where there is none. Rows are links, columns earlier ones."""
    size = len(shares)
    side = (_BOTTOM - _TOP) / max(size, 1)
    left = (WIDTH - side * size) / 2
    parts = [_opened(title, WIDTH, HEIGHT)]
    parts.append(f'<path class="axis" d="M{left:.1f} {_TOP}V{_BOTTOM}H{left + side * size:.1f}"/>')
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            if not math.isnan(share):
                place = (
                    f'x="{left + column * side:.1f}" y="{_TOP + row * side:.1f}" width="{side:.1f}" height="{side:.1f}"'
                )
                parts.append(f'<rect class="share" {place} fill-opacity="{min(max(share, 0), 1):.3f}"/>')
    every = max(1, math.ceil(size / 12))
    for number in range(1, size + 1, every):
        middle = (number - 0.5) * side
        parts.append(f'<text class="y" x="{left - 5:.1f}" y="{_TOP + middle + 4:.1f}">{number}</text>')
        parts.append(f'<text class="x" x="{left + middle:.1f}" y="{_BOTTOM + 15}">{number}</text>')
    parts.append(f'<text class="x" x="{WIDTH / 2}" y="{HEIGHT - 4}">earlier link (down: link)</text>')
    return "".join([*parts, "</svg>"])
