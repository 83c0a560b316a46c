"""Line charts as SVG, without a library: equal numbers give equal bytes, so a test can compare page and results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Point", "line_chart"]

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 50
TICKS = 5
# Distinguishable with every common form of colour blindness (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True, slots=True)
class Point:
    """A value with the ends of its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis: maps values to coordinates.

    Attributes:
        low, high: range of the values.
        begin, end: coordinates of `low` and `high`.
        is_log: logarithmic.
    """

    low: float
    high: float
    begin: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        part = (at - low) / (high - low) if high > low else 0.5
        return round(self.begin + part * (self.end - self.begin), 1)

    def ticks(self) -> list[float]:
        if self.is_log:
            values = [
                digit * 10.0**exponent
                for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                for digit in (1, 2, 5)
            ]
        else:
            step = _round_step((self.high - self.low) / TICKS or 1.0)
            values = [step * index for index in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Return an SVG document.

    Raises:
        ValueError: there are no points, or a value is not above zero on a logarithmic axis.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("nothing to draw")
    xs, lows, highs = [p.x for p in points], [p.low for p in points], [p.high for p in points]
    if (log_x and min(xs) <= 0) or (log_y and min(lows) <= 0):
        raise ValueError("a logarithmic axis needs values above zero")
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    y_low, y_high = (min(lows) / 1.1, max(highs) * 1.1) if log_y else (0.0, max(highs) * 1.05)
    y_axis = _Axis(y_low, y_high, HEIGHT - BOTTOM, TOP, log_y)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12">'
        ),
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        *_grid(x_axis, y_axis, sorted(set(xs))),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
        (
            f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        ),
    ]
    for index, (name, line) in enumerate(lines.items()):
        parts += _line(index, name, sorted(line, key=lambda point: point.x), x_axis, y_axis)
    return "\n".join([*parts, "</svg>", ""])


def _grid(x_axis: _Axis, y_axis: _Axis, xs: Sequence[float]) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in xs if len(xs) <= 2 * TICKS else x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<path d="M{x} {HEIGHT - BOTTOM}v4" stroke="#444"/>')
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#444"/>')
    return parts


def _line(index: int, name: str, line: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    places = [(x_axis.place(point.x), y_axis.place(point.y)) for point in line]
    path = "L".join(f"{x} {y}" for x, y in places)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for point, (x, y) in zip(line, places, strict=True):
        low, high = y_axis.place(point.low), y_axis.place(point.high)
        parts.append(f'<path d="M{x} {low}V{high}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
    at = TOP + 18 * index
    parts.append(f'<path d="M{WIDTH - RIGHT + 12} {at}h18" stroke="{colour}" stroke-width="2"/>')
    parts.append(f'<text x="{WIDTH - RIGHT + 36}" y="{at + 4}">{escape(name)}</text>')
    return parts


def _round_step(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * 0.999))


def _short(value: float) -> str:
    """Format a number with a unit prefix, such as 100000 as 100k."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor and value >= 10_000:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"
