"""What a price is worth against K, with and without a price, and against other prices: joules at equal loss.

Savings are differences of log joules: how far below the straight line (in log joules) between two configurations
without a price another one lies, at its own loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import study_rows as data
from benchmarks.study_rows import Mean, Row
from benchmarks.study_text import markdown
from pipelines.compare import gap

Ends = tuple[Row, Row]


def saving(ends: Ends, row: Row) -> float | None:
    """Log joules of the line through two trials at the loss of a third, less its own; None beyond the line's ends."""
    line, point = (np.array([[data.loss(one), data.log_total(one)] for one in rows]) for rows in (ends, [row]))
    more = gap(line, point)
    return None if more is None else -more


def against_lines(rows: Sequence[Row]) -> str:
    """Trials with a price against lines from the least K to the next without one, of their own experts and of equal
    ones, at the same regularizer; one seed. Empty where there are none."""
    body = []
    for row in sorted(rows, key=data.log_total):
        if not data.acts(row):
            continue
        same = [other for other in rows if other["regularizer"] == row["regularizer"] and not data.acts(other)]
        lines = [_line(same, data.widths(row)), _line(same, (1.0,) * len(data.widths(row)))]
        found = [None if line is None else saving(line, row) for line in lines]
        if any(value is not None for value in found):
            body.append([row["name"], *("–" if value is None else f"{100 * value:+.1f}" for value in found)])
    if not body:
        return ""
    head = ("configuration", "line of its own experts", "line of equal experts")
    return (
        "Joules saved at equal loss, % (log ratio), against the line from K = 1 to K = 2 without a price, at the same "
        f"regularizer (one seed, one board each; a dash: beyond the line):\n\n{markdown(head, body)}"
    )


def _line(rows: Sequence[Row], widths: Sequence[float]) -> Ends | None:
    by_k = {row["config"]["top_k"]: row for row in rows if data.widths(row) == tuple(widths)}
    return (by_k[1], by_k[2]) if 1 in by_k and 2 in by_k else None


def among_prices(groups: Mapping[str, Sequence[Row]], lower: str, plain: str) -> str:
    """Other prices, and routing with the price's histogram but no skill, against the price in joules, seed by seed.

    Args:
        groups: trials by configuration.
        lower, plain: the configurations between which the line without a price runs.
    """
    in_joules = (group[0] for group in groups.values() if group[0]["config"]["price"] == "joules")
    joules = data.first(in_joules, lambda row: data.acts(row) and row["router"] == "energy")
    if joules is None:
        return ""
    base = groups[joules["config_fingerprint"]]
    ends = {
        row["seed"]: (row, other) for row in groups[lower] for other in groups[plain] if row["seed"] == other["seed"]
    }

    def saved(row: Row) -> float | None:
        return saving(ends[row["seed"]], row) if row["seed"] in ends else None

    body = []
    for group in groups.values():
        row = group[0]
        if row is joules or not data.acts(row) or row["config"]["energy_lambda"] != joules["config"]["energy_lambda"]:
            continue
        joules_change, loss_change, saved_change = (
            data.paired(group, base, value) for value in (data.log_total, data.loss, saved)
        )
        if joules_change is None or loss_change is None:
            continue
        body.append(
            [
                row["name"],
                str(joules_change.count),
                joules_change.text(2, scale=100, sign=True),
                loss_change.text(4, sign=True),
                "–" if saved_change is None else _with_count(saved_change, joules_change.count),
            ]
        )
    if not body:
        return ""
    head = ("configuration", "seeds", "joules, %", "loss, nat", "saved at equal loss, points")
    return (
        f"**Against the price in joules** ({joules['name']}): differences paired by seed, with 95 % intervals; joules "
        f"as log ratios, savings against the line of K without a price.\n\n{markdown(head, body)}"
    )


def _with_count(mean: Mean, seeds: int) -> str:
    text = mean.text(1, scale=100, sign=True)
    return text if mean.count == seeds else f"{text} ({mean.count} seeds)"
