"""Numbers of epochs on a front: points that one anytime trial passed through, or trials of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from pipelines.records import PointRecord, Store, TrialRecord, arrow_schema

TRIALS, POINTS = "trials", "points"
_ANYTIME = r'"anytime":\s*true'


def front_table(store: Store, sweep_id: str | None, axes: Sequence[str] = ()) -> str:
    """The table that a sweep's front is drawn from: `points` where trials are anytime, else `trials`.

    `axes` (`COLUMN`, `COLUMN:min` or `COLUMN:max`) that points do not have are of trials.
    """
    known = set(arrow_schema(PointRecord).names)
    if any(axis.partition(":")[0] not in known for axis in axes):
        return TRIALS
    schedules = store.read(TrialRecord, sweep_id, columns=["schedule"])["schedule"]
    if not pc.any(pc.equal(schedules, "wsd")).as_py():
        return TRIALS
    configs = store.read(TrialRecord, sweep_id, columns=["config_json"])["config_json"]
    anytime = pc.any(pc.match_substring_regex(configs, _ANYTIME)).as_py()
    return POINTS if anytime and len(store.read(PointRecord, sweep_id, columns=["epochs"])) else TRIALS


def is_anytime(row: Mapping[str, Any]) -> bool:
    """True for a row of `trials` that passed through every number of epochs up to its own."""
    return re.search(_ANYTIME, row["config_json"] or "") is not None


class Ends:
    """What each trial of a running sweep offers a front by `axes`: the points of an anytime trial, whatever became of
    it, or else the end of a trial that completed.

    Points that are there at first are read once, later ones from the file of their attempt.
    """

    def __init__(self, store: Store, sweep_id: str, axes: Sequence[str] = ()) -> None:
        self.store, self.sweep_id = store, sweep_id
        self._by_points = {axis.partition(":")[0] for axis in axes} <= set(arrow_schema(PointRecord).names)
        self._early: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for point in store.read(PointRecord, sweep_id).to_pylist() if self._by_points else ():
            self._early.setdefault((point["trial_id"], point["attempt"]), []).append(point)

    def of(self, row: TrialRecord) -> list[dict[str, Any]]:
        """The ends of a trial, as rows of `points` or of `trials`; none where it left nothing to compare."""
        values = vars(row)
        if self._by_points and is_anytime(values):
            key = (row.trial_id, row.attempt)
            return self._early.get(key) or self.store.of_attempt(PointRecord, self.sweep_id, *key)
        return [dict(values)] if row.state == "COMPLETED" else []


def epochs_line(trials: Sequence[Mapping[str, Any]]) -> str:
    """What a number of epochs is in this sweep, in one line."""
    own = sorted({row["schedule"] for row in trials if not is_anytime(row)})
    points = (
        "Epochs are points of one trial (anytime): each has the trunk's joules up to where its decay begins, and its "
        "own decay's; uncertainty is drawn by trial, not by point."
    )
    if not own:
        return points
    alone = f"Each number of epochs is a trial of its own ({', '.join(own)})"
    return f"{points} {alone} where trials are not anytime." if any(map(is_anytime, trials)) else f"{alone}."
