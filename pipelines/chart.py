"""Charts as values: what is drawn, apart from how. `svg` draws them for the report, `figures` for papers.

Colour and shape carry meaning by index: colour 0 .. 6 is a ramp of rising luminance (readable in greyscale),
shapes differ in outline, dashes in pattern.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from matplotlib import ticker

COLOURS = 7
SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "hexagon", "cross")
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis.

    Attributes:
        title: what it shows, with its unit.
        log: logarithmic.
        other: title of a second scale on the opposite side, and the factor from this scale to it.
        zero: the axis begins at 0.
        whole: ticks at whole numbers only.
    """

    title: str
    log: bool = False
    other: tuple[str, float] | None = None
    zero: bool = False
    whole: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One marker: `x_range` and `y_range` are intervals, `keys` what filters look at."""

    x: float
    y: float
    tip: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    colour: int | None = None
    shape: int = 0
    strong: bool = True
    ring: bool = False
    href: str = ""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points; `step` holds a value until the next x; `colour` None is the ink of the text."""

    x: Sequence[float]
    y: Sequence[float]
    tip: str = ""
    colour: int | None = None
    dash: int = 0
    strong: bool = True
    step: bool = False
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """A shaded region between two step curves, or a span of x over the whole height (`low` empty)."""

    x: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    tip: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of the legend."""

    label: str
    kind: str  # point, line, band, box
    colour: int | None = None
    shape: int = 0
    dash: int = 0
    strong: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Axes, marks and legend; `alt` says in words what the picture shows."""

    id: str
    title: str
    alt: str
    x: Axis
    y: Axis
    points: tuple[Point, ...] = ()
    lines: tuple[Line, ...] = ()
    bands: tuple[Band, ...] = ()
    legend: tuple[Key, ...] = ()
    height: int = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """Stacked horizontal bars: one row per label, one part per column of `values`."""

    id: str
    title: str
    alt: str
    x: Axis
    labels: tuple[str, ...]
    parts: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    keys: tuple[Mapping[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heat:
    """A matrix of shares in [0, 1]: rows and columns with labels; darker is more (lighter in dark mode)."""

    id: str
    title: str
    alt: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    row_title: str
    column_title: str
    top: float


Figure = Chart | Bars | Heat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; values that a logarithm does not take sit at the start."""
        if self.log:
            if value <= 0:
                return self.start
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the scale: 1, 2 and 5 on short logarithmic ones, decades on long ones."""
        if self.log and self.high / self.low > 20:
            long = self.high / self.low > 1e4
            values = ticker.LogLocator(subs=(1.0,) if long else (1.0, 2.0, 5.0)).tick_values(self.low, self.high)
        else:
            values = ticker.MaxNLocator(6, integer=self.whole, min_n_ticks=1).tick_values(self.low, self.high)
        slack = 1e-9 * abs(self.high - self.low)
        return [float(v) for v in values if self.low - slack <= v <= self.high + slack]


def extent(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """Lower and upper end of an axis: the finite values and a margin of 5 %."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    if not known:
        return (1.0, 10.0) if axis.log else (0.0, 1.0)
    low, high = min(known), max(known)
    if axis.log:
        if low == high:
            return low / 1.5, high * 1.5
        pad = (high / low) ** 0.05
        return low / pad, high * pad
    if axis.zero:
        low = min(low, 0.0)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
    else:
        pad = 0.05 * (high - low)
    return (low if axis.zero and low == 0 else low - pad), high + pad


def chart_extent(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """Extents of both axes over all marks and their intervals."""
    xs: list[float] = []
    ys: list[float] = []
    for point in chart.points:
        xs += [point.x, *(point.x_range or ())]
        ys += [point.y, *(point.y_range or ())]
    for line in chart.lines:
        xs += list(line.x)
        ys += list(line.y)
    for band in chart.bands:
        xs += list(band.x)
        ys += [*band.low, *band.high]
    return extent(xs, chart.x), extent(ys, chart.y)


def tick_text(value: float) -> str:
    """A tick's label: no exponent for usual sizes, k / M / G beyond ten thousand."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if size == 1e3 else 1):
            return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"


def stepped(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """A staircase that holds each value until the next x."""
    xs, ys = [x[0]], [y[0]]
    for i in range(1, len(x)):
        xs += [x[i], x[i]]
        ys += [y[i - 1], y[i]]
    return xs, ys
