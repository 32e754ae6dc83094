"""Fronts for the terminal: tables by rich, and one line per reason for what is not on them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines import hygiene
from pipelines.console import standard_output
from pipelines.pareto import LABELS, Front
from pipelines.records import TABLES, column_unit

#: Short heads for columns whose names are long.
_HEADS = {
    "energy_lambda": "λ",
    "top_k": "top-k",
    "num_experts": "experts",
    "regularizer_weight": "weight",
    "temperature": "τ",
}


_WORDS = ("router", "regularizer", "price", "schedule")
#: Configurations that are looked at for what varies; of more, the front's members alone.
_LOOKED_AT = 10_000


def axis_title(column: str, *, modelled: bool) -> str:
    """A column with its unit; joules that a model gave say so."""
    unit = "J" if column == "lifetime_energy_j" else column_unit(column)
    words = [word for word in (unit, "modelled" if modelled and hygiene.is_energy(column) else "") if word]
    return f"{column} [{', '.join(words)}]" if words else column


def varying_labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Configuration columns in which the rows differ, the router always."""
    present = [name for name in LABELS if rows and name in rows[0]]
    return [name for name in present if name == "router" or len({repr(row[name]) for row in rows}) > 1]


def print_front(front: Front, console: Console | None = None, *, limit: int = 40) -> None:
    """The front as a table, then hypervolume, knee, context and what was left out.

    Args:
        front: the front.
        console: where to print; standard output where None.
        limit: at most so many members.
    """
    console = console or standard_output()
    console.print(front_table(front, limit=limit))
    for line in front_lines(front, limit=limit):
        console.print(line, markup=False, highlight=False)


def front_table(front: Front, *, limit: int = 40) -> Table:
    """The front's members, the cheapest first."""
    axes = [axis.column for axis in front.objectives]
    joules = "modelled joules" if front.modelled else "joules"
    title = f"Pareto front: {len(front)} of {len(front.on_front_N)} configurations"
    if any(hygiene.is_energy(axis) for axis in axes):
        title += f" ({joules})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = front.rows()[:limit]
    labels = varying_labels(front.rows(members_only=False) if len(front.on_front_N) <= _LOOKED_AT else rows)
    probable = front.probability_N is not None
    for name in labels:
        side: Any = "left" if name in _WORDS else "right"
        table.add_column(_HEADS.get(name, name), justify=side)
    for axis in axes:
        head = axis_title(axis, modelled=front.modelled).replace(" [", "\n[")
        table.add_column(escape(head), justify="right")
    table.add_column("seeds", justify="right")
    if probable:
        table.add_column("P(front)", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("trials", overflow="fold")
    for row in rows:
        cells = [escape(_cell(row[name])) for name in labels] + [interval(row, axis) for axis in axes]
        cells += [str(row["seeds"])] + ([f"{row['front_probability']:.2f}"] if probable else [])
        table.add_row(*cells, "◀" if row["knee"] else "", escape(_shortened(row["trial_id"])))
    return table


def front_lines(front: Front, *, limit: int = 40) -> list[str]:
    """What stands below the table: one fact a line."""
    lines = []
    if len(front) > limit:
        lines.append(f"... and {len(front) - limit} more members")
    if front.hypervolume is not None and front.reference_M is not None:
        at = ", ".join(
            f"{axis.column}={value:.5g}" for axis, value in zip(front.objectives, front.reference_M, strict=True)
        )
        beyond = f"; {front.beyond_reference} members lie beyond it" if front.beyond_reference else ""
        lines.append(f"hypervolume {front.hypervolume:.6g} to the reference point {at}{beyond}")
    if front.knee is not None:
        lines.append(f"◀ knee: {_knee_words(front)}")
    if len(front.on_front_N):  # of no rows there is nothing to say
        lines.append(f"context: {front.context}")
    lines += [f"left out: {left.count} × {left.reason}{_examples(left.trial_ids)}" for left in front.left_out]
    lines += [f"separate front: {rows} rows on {context}" for context, rows in front.others]
    lines += [f"note: {note}" for note in front.notes]
    return lines


def front_csv(front: Front) -> str:
    """Every configuration as CSV, on the front or not."""
    rows = front.rows(members_only=False)
    sink = io.StringIO()
    if rows:
        writer = csv.DictWriter(sink, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return sink.getvalue()


def interval(row: dict[str, Any], axis: str) -> str:
    """A value with half of its 95 % interval where that is known, to the digits that it bears."""
    value, low = row[axis], row.get(f"{axis}_low")
    if low is None:
        return number(value)
    half = value - low
    if half <= 1e-9 * abs(value):
        return number(value)
    digits = _decimals(half)
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def number(value: float) -> str:
    """Five significant digits; large values whole, with thousands apart."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def table_columns(table: str) -> list[str]:
    """Columns of a table, in order."""
    return list(TABLES[table].__dataclass_fields__)


def _decimals(half: float) -> int:
    return next((d for d in range(9) if half * 10**d >= 1.95), 8) if half > 0 else 4


def _knee_words(front: Front) -> str:
    ids = front.configs["trial_id"]
    if front.knee_is_stable:
        return f"{_shortened(ids[front.knee].as_py())}, the same under every scaling"
    parts = [f"{name} {_shortened(ids[at].as_py())}" for name, at in front.knees.items() if at is not None]
    return "depends on the scaling: " + ", ".join(parts)


def _examples(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    return f" ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def _shortened(ids: str) -> str:
    parts = ids.split()
    return ids if len(parts) <= 2 else f"{parts[0]} +{len(parts) - 1}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)
