"""Charts as inline SVG: coloured by the page's style sheet, so that dark mode and print need no second drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pipelines.chart import (
    DASHES,
    SHAPES,
    Axis,
    Bars,
    Chart,
    Figure,
    Heat,
    Key,
    Line,
    Point,
    Scale,
    chart_extent,
    extent,
    stepped,
    tick_text,
)

WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 18, 14, 50
_RADIUS = 5.5


def draw(figure: Figure) -> str:
    """One `<svg>` element; its text alternative is the figure's `alt`."""
    if isinstance(figure, Chart):
        return _chart(figure)
    if isinstance(figure, Bars):
        return _bars(figure)
    return _heat(figure)


def shape_path(shape: str, x: float, y: float, r: float) -> str:
    """The outline of a marker of about the area of a circle of radius r."""
    if shape == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    if shape == "cross":
        a, b = r * 1.15, r * 0.42
        corners = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    else:
        sides, size, turn = _POLYGONS[shape]
        angles = [turn + 2 * math.pi * i / sides for i in range(sides)]
        corners = [(size * r * math.sin(a), -size * r * math.cos(a)) for a in angles]
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners) + "z"


_POLYGONS = {
    "square": (4, 1.25, math.pi / 4),
    "triangle": (3, 1.4, 0.0),
    "diamond": (4, 1.35, 0.0),
    "pentagon": (5, 1.2, 0.0),
    "hexagon": (6, 1.15, math.pi / 6),
}


def _open(figure: Figure, height: float, width: float = WIDTH) -> str:
    small = f' style="max-width:{width:.0f}px"' if width < WIDTH else ""
    kind = "chart small" if small else "chart"
    return (
        f'<svg id="fig-{escape(figure.id)}" class="{kind}"{small} viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(figure.alt)}" preserveAspectRatio="xMidYMid meet">'
    )


def _chart(chart: Chart) -> str:
    (x_low, x_high), (y_low, y_high) = chart_extent(chart)
    right = _RIGHT + (52 if chart.y.other else 0)
    legend, rows = _legend(chart.legend, _LEFT, WIDTH - right)
    top = _TOP + 20 * rows
    height = chart.height + 20 * rows
    x = Scale(low=x_low, high=x_high, start=_LEFT, end=WIDTH - right, log=chart.x.log, whole=chart.x.whole)
    y = Scale(low=y_low, high=y_high, start=height - _BOTTOM, end=top, log=chart.y.log)
    parts = [_open(chart, height), legend, _frame(chart, x, y)]
    for band in chart.bands:
        if band.low:
            there = list(zip(*stepped(band.x, band.low), strict=True))
            back = list(zip(*stepped(band.x, band.high), strict=True))[::-1]
            path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in there + back)
            parts.append(f'<path class="band" d="M{path}z">{_title(band.tip)}</path>')
        else:
            a, b = x(band.x[0]), x(band.x[1])
            parts.append(
                f'<rect class="span" x="{a:.1f}" y="{top}" width="{max(b - a, 1.5):.1f}" '
                f'height="{height - _BOTTOM - top}">{_title(band.tip)}</rect>'
            )
    parts += [_line(line, x, y) for line in chart.lines]
    weak_first = sorted(chart.points, key=lambda point: point.strong)
    parts += [_point(point, x, y) for point in weak_first]
    return "".join([*parts, "</svg>"])


def _frame(chart: Chart, x: Scale, y: Scale) -> str:
    parts = ['<g class="axes">']
    for value in y.ticks():
        at = y(value)
        parts.append(f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>')
        parts.append(f'<text x="{x.start - 8}" y="{at + 4:.1f}" class="end">{tick_text(value)}</text>')
        if chart.y.other:
            parts.append(f'<text x="{x.end + 8}" y="{at + 4:.1f}">{value * chart.y.other[1]:.3g}</text>')
    for value in x.ticks():
        at = x(value)
        parts.append(f'<path class="tick" d="M{at:.1f} {y.start:.1f}v5"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 19:.1f}" class="mid">{tick_text(value)}</text>')
    parts.append(f'<path class="frame" d="M{x.start:.1f} {y.end:.1f}V{y.start:.1f}H{x.end:.1f}"/>')
    middle = (y.start + y.end) / 2
    parts.append(_axis_title(chart.x, (x.start + x.end) / 2, y.start + 40, 0))
    parts.append(_axis_title(chart.y, 16, middle, -90))
    if chart.y.other:
        parts.append(_axis_title(Axis(title=chart.y.other[0]), WIDTH - 8, middle, -90))
    return "".join([*parts, "</g>"])


def _axis_title(axis: Axis, x: float, y: float, turn: int) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="mid title" x="{x:.1f}" y="{y:.1f}"{turned}>{escape(axis.title)}</text>'


def _line(line: Line, x: Scale, y: Scale) -> str:
    known = [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not known:
        return ""
    xs, ys = zip(*known, strict=True)
    if line.step:
        xs, ys = map(tuple, stepped(xs, ys))
    path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    dash = f' stroke-dasharray="{DASHES[line.dash % len(DASHES)]}"' if line.dash % len(DASHES) else ""
    weak = "" if line.strong else " weak"
    return (
        f'<path class="line {_colour(line.colour)}{weak}" d="M{path}"{dash}{_data(line.keys)}>{_title(line.tip)}</path>'
    )


def _point(point: Point, x: Scale, y: Scale) -> str:
    px, py = x(point.x), y(point.y)
    parts = []
    if point.x_range:
        parts.append(f'<path class="bar" d="M{x(point.x_range[0]):.1f} {py:.1f}H{x(point.x_range[1]):.1f}"/>')
    if point.y_range:
        parts.append(f'<path class="bar" d="M{px:.1f} {y(point.y_range[0]):.1f}V{y(point.y_range[1]):.1f}"/>')
    if point.ring:
        parts.append(f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="{_RADIUS + 5}"/>')
    outline = shape_path(SHAPES[point.shape % len(SHAPES)], px, py, _RADIUS if point.strong else _RADIUS * 0.75)
    parts.append(f'<path class="dot {_colour(point.colour)}" d="{outline}"/>')
    weak = "" if point.strong else " weak"
    group = (
        f'<g class="mark{weak}" tabindex="0" role="img" aria-label="{escape(point.tip)}"{_data(point.keys)}>'
        f"{_title(point.tip)}{''.join(parts)}</g>"
    )
    if point.href:
        return f'<a href="{escape(point.href)}" target="_blank" rel="noopener noreferrer" tabindex="-1">{group}</a>'
    return group


def _legend(keys: Sequence[Key], left: float, right: float) -> tuple[str, int]:
    """Entries in rows above the plot, broken where a row is full."""
    parts, x, row = ['<g class="legend">'], left, 0
    for key in keys:
        width = 34 + 6.6 * len(key.label)
        if x > left and x + width > right:
            x, row = left, row + 1
        parts.append(_swatch(key, x, 11 + 20 * row))
        parts.append(f'<text x="{x + 26:.1f}" y="{15 + 20 * row}">{escape(key.label)}</text>')
        x += width
    return "".join([*parts, "</g>"]), (row + 1 if keys else 0)


def _swatch(key: Key, x: float, y: float) -> str:
    weak = "" if key.strong else " weak"
    if key.kind == "line":
        dash = f' stroke-dasharray="{DASHES[key.dash]}"' if key.dash else ""
        return f'<path class="line {_colour(key.colour)}{weak}" d="M{x:.1f} {y}h22"{dash}/>'
    if key.kind == "point":
        outline = shape_path(SHAPES[key.shape % len(SHAPES)], x + 14, y, _RADIUS)
        return f'<g class="mark{weak}"><path class="dot {_colour(key.colour)}" d="{outline}"/></g>'
    name = "band" if key.kind == "band" else "span" if key.kind == "span" else f"box p{key.colour}"
    return f'<rect class="{name}" x="{x + 4:.1f}" y="{y - 6}" width="16" height="12"/>'


def _bars(bars: Bars) -> str:
    step, left = 24, 12 + min(300.0, 6.8 * max((len(label) for label in bars.labels), default=4))
    keys = [Key(label=part, kind="box", colour=i) for i, part in enumerate(bars.parts)]
    legend, rows = _legend(keys, 12, WIDTH - 12)
    top = 8 + 20 * rows
    bottom = top + step * len(bars.labels) + 6
    low, high = extent([0.0, *(sum(row) for row in bars.values)], bars.x)
    x = Scale(low=low, high=high, start=left, end=WIDTH - 30)
    parts = [_open(bars, bottom + 46), legend, '<g class="axes">']
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value):.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="mid" x="{x(value):.1f}" y="{bottom + 16}">{tick_text(value)}</text>')
    parts.append(_axis_title(bars.x, (x.start + x.end) / 2, bottom + 38, 0) + "</g>")
    for i, (label, row) in enumerate(zip(bars.labels, bars.values, strict=True)):
        parts.append(_bar_row(bars, i, label, row, x, top + step * i))
    return "".join([*parts, "</svg>"])


def _bar_row(bars: Bars, i: int, label: str, row: Sequence[float], x: Scale, y: float) -> str:
    keys = _data(bars.keys[i]) if bars.keys else ""
    shown = label if len(label) <= 43 else label[:42] + "…"
    parts = [f'<g class="row"{keys}><text class="end" x="{x.start - 8:.1f}" y="{y + 16}">{escape(shown)}</text>']
    at = 0.0
    for k, value in enumerate(row):
        if value > 0:
            tip = f"{label}\n{bars.parts[k]}: {value:.4g} of {sum(row):.4g} {bars.x.title}"
            wide = x(at + value) - x(at)
            box = f'<rect class="box p{k}" x="{x(at):.1f}" y="{y + 3}" width="{wide:.1f}" height="{18}"'
            parts.append(f'{box} tabindex="0" aria-label="{escape(tip)}">{_title(tip)}</rect>')
            at += value
    return "".join([*parts, "</g>"])


def _heat(heat: Heat) -> str:
    left = 18 + 7.0 * max((len(row) for row in heat.rows), default=4)
    wide = min(56.0, (WIDTH - left - 20) / max(len(heat.columns), 1))
    width = max(left + wide * len(heat.columns) + 12, 340)
    tall, top = 24, 28
    bottom = top + tall * len(heat.rows)
    parts = [_open(heat, bottom + 34, width), '<g class="axes">']
    every = max(1, math.ceil(len(heat.columns) * 34 / (WIDTH - left)))
    for j, column in enumerate(heat.columns):
        if j % every == 0:
            parts.append(f'<text class="mid" x="{left + wide * (j + 0.5):.1f}" y="{top - 8}">{escape(column)}</text>')
    middle = left + wide * len(heat.columns) / 2
    parts.append(f'<text class="mid title" x="{middle:.1f}" y="{bottom + 22}">{escape(heat.column_title)}</text>')
    for i, row in enumerate(heat.rows):
        parts.append(f'<text class="end" x="{left - 8:.1f}" y="{top + tall * i + 16}">{escape(row)}</text>')
    parts.append("</g>")
    for i, values in enumerate(heat.values):
        for j, value in enumerate(values):
            if value is not None:
                tip = f"{heat.rows[i]}, {heat.column_title} {heat.columns[j]}: {value:.3f}"
                share = min(max(value / heat.top, 0.0), 1.0)
                box = f'<rect class="cell" x="{left + wide * j:.1f}" y="{top + tall * i}" width="{wide - 1:.1f}"'
                parts.append(f'{box} height="{tall - 1}" fill-opacity="{share:.3f}">{_title(tip)}</rect>')
                if wide >= 38:
                    side = " on" if share > 0.5 else ""
                    at = f'x="{left + wide * (j + 0.5):.1f}" y="{top + tall * i + 16}"'
                    parts.append(f'<text class="mid value{side}" {at}>{value:.2f}</text>')
    return "".join([*parts, "</svg>"])


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def _colour(index: int | None) -> str:
    return "ink" if index is None else f"c{index}"


def _data(keys: Mapping[str, str]) -> str:
    return "".join(f' data-{escape(name)}="{escape(value)}"' for name, value in keys.items())
