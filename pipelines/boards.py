"""What the anchor workload says of a sweep's boards: how far apart they are, and how far each drifted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.records import AnchorRecord, Store

START, END = "start", "end"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """One board in one session: joules per token of the anchor at its start and its end; None: not measured."""

    board: str
    session: str
    start_j: float | None
    end_j: float | None

    @property
    def share(self) -> float | None:
        """end / start − 1."""
        return None if self.start_j is None or self.end_j is None else self.end_j / self.start_j - 1


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Readings that compare: of the workload that most boards ran, on boards that nobody else used meanwhile."""
    whole = [row for row in rows if row["j_per_token"] is not None and not row["shared"]]
    boards: dict[str, set[str]] = {}
    for row in whole:
        boards.setdefault(row["workload"], set()).add(row["gpu_uuid"])
    best = max(boards, key=lambda workload: (len(boards[workload]), workload), default=None)
    return [row for row in whole if row["workload"] == best]


def board_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Joules per token of the anchor by board, mean of its readings: start and end enclose what ran between."""
    values: dict[str, list[float]] = {}
    for row in measured(rows):
        values.setdefault(row["gpu_uuid"], []).append(row["j_per_token"])
    return {board: sum(found) / len(found) for board, found in values.items()}


def drifts(rows: Sequence[Mapping[str, Any]]) -> list[Drift]:
    """Each board of each session, in order of the readings."""
    ends: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted(measured(rows), key=lambda row: row["started_at"]):
        ends.setdefault((row["gpu_uuid"], row["session"]), {})[row["position"]] = row["j_per_token"]
    return [
        Drift(board=board, session=session, start_j=found.get(START), end_j=found.get(END))
        for (board, session), found in ends.items()
    ]


def with_anchors(rows: pa.Table, store: Store, sweep_id: str | None) -> pa.Table:
    """Rows of `trials` or `points` whose `anchor_j_per_token` is the mean of all readings of their board."""
    if "gpu_uuid" not in rows.column_names:
        return rows
    columns = ["gpu_uuid", "workload", "j_per_token", "shared"]
    means = board_means(store.read(AnchorRecord, sweep_id, columns=columns).to_pylist())
    if not means:
        return rows
    index = pc.index_in(rows["gpu_uuid"].cast(pa.string()), value_set=pa.array(list(means), pa.string()))
    column = pc.take(pa.array(list(means.values()), pa.float64()), index)
    if "anchor_j_per_token" in rows.column_names:
        return rows.set_column(rows.column_names.index("anchor_j_per_token"), "anchor_j_per_token", column)
    return rows.append_column("anchor_j_per_token", column)
