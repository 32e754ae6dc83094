"""The report's page on boards: the anchor workload at both ends of the sweep, board against board and over time."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import boards, chart
from pipelines.chart import Axis, Chart, Key, Line, Point
from pipelines.results import Results
from pipelines.section import Section, Sheet

_HEAD = ("board", "host", "reading", "µJ/token", "±", "against the mean", "ms/step", "W", "°C", "remarks")
Row = Mapping[str, Any]


def boards_section(results: Results) -> Section | None:
    """How far apart the boards are and how far each drifted; None where no anchor was measured."""
    rows = sorted(boards.measured(results.anchors), key=lambda row: row["started_at"])
    if not rows:
        return None
    means = boards.board_means(rows)
    mean_j = sum(means.values()) / len(means)
    text = [_apart(means), _drifted(boards.drifts(rows)), "No trial pays for these readings; the sweep's budget does."]
    sheet = Sheet(caption="The anchor workload", head=_HEAD, rows=tuple(_cells(row, mean_j) for row in rows))
    figure = _figure(rows, mean_j, " ".join(text[:2]))
    return Section(id="boards", title="Boards", text=tuple(text), figures=(figure,), sheets=(sheet,))


def unmeasured(results: Results) -> list[str]:
    """Why boards have no anchor reading, one line a reason."""
    reasons = collections.Counter(row["skipped"] for row in results.anchors if row["skipped"] is not None)
    return [f"anchor workload not measured: {reason} ({count} ×)" for reason, count in reasons.most_common()]


def _apart(means: Mapping[str, float]) -> str:
    if len(means) == 1:
        return "One board served the sweep."
    spread = max(means.values()) / min(means.values()) - 1
    return f"{len(means)} boards: the same work takes {spread:.1%} more joules on the dearest than on the cheapest."


def _drifted(found: Sequence[boards.Drift]) -> str:
    shares = [drift.share for drift in found if drift.share is not None]
    if not shares:
        return "No board was measured again at the end, so drift is not known."
    if len(shares) == 1:
        return f"Between start and end it drifted by {shares[0]:+.1%}."
    return f"Between start and end they drifted by {min(shares):+.1%} to {max(shares):+.1%}."


def _figure(rows: Sequence[Row], mean_j: float, alt: str) -> Chart:
    names = list(dict.fromkeys(row["gpu_uuid"] for row in rows))
    origin = rows[0]["started_at"]
    points, lines, legend = [], [], []
    for i, name in enumerate(names):
        colour = round(i * (chart.COLOURS - 1) / max(len(names) - 1, 1)) if len(names) > 1 else 1
        own = [row for row in rows if row["gpu_uuid"] == name]
        x = [(row["started_at"] - origin).total_seconds() / 3600 for row in own]
        y = [100 * (row["j_per_token"] / mean_j - 1) for row in own]
        half = [196 * (row["j_per_token_uncertainty"] or 0.0) / mean_j for row in own]
        shape = i % (len(chart.SHAPES) - 1)
        points += [
            Point(x=a, y=b, y_range=(b - h, b + h), colour=colour, shape=shape, tip=_tip(row))
            for a, b, h, row in zip(x, y, half, own, strict=True)
        ]
        lines.append(Line(x=x, y=y, colour=colour, tip=_short(name)))
        legend.append(Key(label=_short(name), kind="point", colour=colour, shape=shape))
    title = "Anchor workload by board"
    return Chart(
        id="boards-anchor",
        title=title,
        alt=f"{title}: {alt}",
        x=Axis(title="time since the first reading (h)"),
        y=Axis(title="joules against the mean (%)"),
        points=tuple(points),
        lines=tuple(lines),
        legend=tuple(legend),
        height=260,
    )


def _tip(row: Row) -> str:
    return f"{row['gpu_uuid']}, {row['position']}: {1e6 * row['j_per_token']:.4g} µJ/token"


def _cells(row: Row, mean_j: float) -> tuple[str, ...]:
    return (
        row["gpu_uuid"],
        row["host"],
        row["position"],
        f"{1e6 * row['j_per_token']:.4g}",
        _number(row["j_per_token_uncertainty"], 1e6, ".2g"),
        f"{row['j_per_token'] / mean_j - 1:+.2%}",
        _number(row["s_per_step"], 1e3, ".4g"),
        _number(row["mean_power_w"], 1.0, ".0f"),
        _number(row["mean_temperature_c"], 1.0, ".1f"),
        ", ".join(row["flags"] or []) or "–",
    )


def _number(value: float | None, factor: float, form: str) -> str:
    return "–" if value is None else format(factor * value, form)


def _short(uuid: str) -> str:
    return f"board {uuid.removeprefix('GPU-')[:8]}"
