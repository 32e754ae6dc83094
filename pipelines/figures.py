"""Charts as matplotlib figures: PNG and SVG for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.chart import COLOURS, Bars, Chart, Figure, Heat, Key, tick_text

#: The ramp of the light page: luminance rises with the index.
RAMP = ("#2b1a5a", "#33408f", "#2b6ca3", "#23908f", "#4aab6d", "#93b83f", "#e0b233")
PARTS = ("#23415f", "#2b8a8f", "#9cc24a", "#e8c46a", "#c9c9c9", "#d9603b")
INK = "#1c2430"
_MARKERS = ("o", "s", "^", "D", "p", "h", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)))
assert len(RAMP) == COLOURS


def save(figure: Figure, folder: Path, *, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write a figure as PNG (200 dpi) and SVG, named by its id, the same to the byte every time; returns the paths."""
    canvas = canvas_of(figure)
    paths = [folder / f"{figure.id}.{kind}" for kind in formats]
    for path in paths:
        meta = {"Date": None, "Description": figure.alt} if path.suffix == ".svg" else {"Description": figure.alt}
        with rc_context({"svg.hashsalt": figure.id}):
            canvas.savefig(path, dpi=200, metadata=meta)
        canvas.set_layout_engine("none")  # where it put things serves the other formats too
    return paths


def canvas_of(figure: Figure) -> Canvas:
    """A matplotlib figure of 7 inches width."""
    rows = len(figure.labels) if isinstance(figure, Bars) else len(figure.rows) if isinstance(figure, Heat) else 0
    canvas = Canvas(figsize=(7, 1.6 + 0.26 * rows if rows else 4.4), layout="constrained")
    axes = canvas.add_subplot()
    if isinstance(figure, Chart):
        _chart(axes, figure)
    elif isinstance(figure, Bars):
        _bars(axes, figure)
    else:
        _heat(axes, figure)
    axes.set_title(figure.title, fontsize=11, loc="left")
    return canvas


def _chart(axes: Any, chart: Chart) -> None:
    for band in chart.bands:
        if band.low:
            axes.fill_between(band.x, band.low, band.high, step="post", color=INK, alpha=0.12, lw=0)
        else:
            axes.axvspan(*band.x, color=INK, alpha=0.12, lw=0)
    for line in chart.lines:
        style = "steps-post" if line.step else "default"
        look = {"color": _colour(line.colour), "ls": _DASHES[line.dash % 4], "lw": 1.6 if line.strong else 0.8}
        axes.plot(line.x, line.y, drawstyle=style, alpha=1 if line.strong else 0.5, **look)
    for point in chart.points:
        if point.x_range:
            axes.plot(point.x_range, (point.y, point.y), color=INK, lw=0.8)
        if point.y_range:
            axes.plot((point.x, point.x), point.y_range, color=INK, lw=0.8)
        if point.ring:
            axes.plot(point.x, point.y, "o", ms=13, mfc="none", mec=INK)
        size = 6.5 if point.strong else 4.5
        face = _colour(point.colour)
        marker = _MARKERS[point.shape % len(_MARKERS)]
        axes.plot(point.x, point.y, marker, ms=size, mfc=face, mec=INK, mew=0.6, alpha=1 if point.strong else 0.45)
    _scales(axes, chart)
    if chart.legend:
        axes.legend(
            handles=[_handle(key) for key in chart.legend], labels=[key.label for key in chart.legend], fontsize=7.5
        )


def _scales(axes: Any, chart: Chart) -> None:
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)
    short = FuncFormatter(lambda value, _: tick_text(value))
    for side, axis, spec in (("x", axes.xaxis, chart.x), ("y", axes.yaxis, chart.y)):
        if spec.log:
            getattr(axes, f"set_{side}scale")("log")
        axis.set_major_formatter(short)
        if spec.whole:
            axis.set_major_locator(MaxNLocator(6, integer=True))
    if chart.x.zero:
        axes.set_xlim(left=0)
    if chart.y.zero:
        axes.set_ylim(bottom=0)
    if chart.y.other:
        title, factor = chart.y.other
        axes.secondary_yaxis("right", functions=(lambda v: v * factor, lambda v: v / factor)).set_ylabel(title)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _handle(key: Key) -> Any:
    alpha = 1 if key.strong else 0.45
    if key.kind == "line":
        return Line2D([], [], color=_colour(key.colour), ls=_DASHES[key.dash % 4], alpha=alpha)
    if key.kind == "point":
        marker = _MARKERS[key.shape % len(_MARKERS)]
        return Line2D([], [], ls="", marker=marker, mfc=_colour(key.colour), mec=INK, mew=0.6, alpha=alpha)
    return Patch(color=INK, alpha=0.12, lw=0)


def _bars(axes: Any, bars: Bars) -> None:
    at = [0.0] * len(bars.labels)
    for part, name in enumerate(bars.parts):
        values = [row[part] for row in bars.values]
        axes.barh(bars.labels, values, left=at, label=name, color=PARTS[part % len(PARTS)], ec="white", lw=0.5)
        at = [a + v for a, v in zip(at, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(bars.x.title)
    axes.legend(fontsize=7.5, ncols=len(bars.parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.tick_params(axis="y", labelsize=7)


def _heat(axes: Any, heat: Heat) -> None:
    values = [[float("nan") if v is None else v for v in row] for row in heat.values]
    image = axes.imshow(values, vmin=0, vmax=heat.top, cmap="Greys", aspect="auto")
    axes.set_xticks(range(len(heat.columns)), heat.columns, fontsize=7)
    axes.set_yticks(range(len(heat.rows)), heat.rows, fontsize=7)
    axes.set_xlabel(heat.column_title)
    axes.set_ylabel(heat.row_title)
    axes.figure.colorbar(image, ax=axes)


def _colour(index: int | None) -> str:
    return INK if index is None else RAMP[index]
