"""Dense runs beside a front of mixtures, so that a front which one dense model dominates says so itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks import study_rows as data
from benchmarks.study_rows import Mean, Row, Study
from pipelines.chart import SHAPES, Key, Line, Point
from pipelines.pareto import Front

_CROSS = len(SHAPES) - 1  # a cross, as dense runs are in every report
_LABEL = "dense, of the controls"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """One dense configuration of the controls on the axes of a front: means over seeds."""

    name: str
    x: Mean
    y: Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """A front's members and the dense runs beside it, the cheapest first.

    Attributes:
        member_F2: members' joules and losses.
        runs: dense runs; none where the controls have none, or where joules of boards do not compare.
        spreads: A/A spreads of joules (relative) and of loss; None where they are not known.
    """

    member_F2: np.ndarray
    runs: tuple[Dense, ...]
    spreads: tuple[float, float] | None

    @classmethod
    def of(cls, study: Study, found: Front, rows: Sequence[Row]) -> Beside:
        """Dense runs of the controls on the front's own footing (its joules are those of the mean of its boards);
        `rows` are the front's, corrected over all stages."""
        x, y = (axis.column for axis in found.objectives)
        known = {row["trial_id"]: row for row in rows}
        first = found.rows(members_only=False)[0]
        scale = first[x] / float(np.mean([known[trial_id][x] for trial_id in first["trial_id"].split()]))
        comparable = study.stage("controls") if study.corrected else []
        dense = [row for row in data.named(comparable) if row["router"] == "dense"]
        runs = []
        for group in data.by_config(dense).values():
            joules, loss = Mean.of(scale * row[x] for row in group), Mean.of(row[y] for row in group)
            if joules is not None and loss is not None:
                runs.append(Dense(name=group[0]["name"], x=joules, y=loss))
        runs.sort(key=lambda run: run.x.mean)
        spread, of_loss = data.joules_spread(study, over_boards=True), data.loss_spread(study)
        spreads = None if spread is None or of_loss is None else (spread.value, of_loss.value)
        return cls(member_F2=found.mean_NM[found.order()], runs=tuple(runs), spreads=spreads)

    def dominated_by(self, run: Dense, times: float = 0.0) -> np.ndarray:
        """Which members take no fewer joules and have no less loss than a run, by so many times the spreads."""
        of_joules, of_loss = (times * spread for spread in self.spreads or (0.0, 0.0))
        more_F = np.log(self.member_F2[:, 0] / run.x.mean) >= of_joules
        return more_F & (self.member_F2[:, 1] >= run.y.mean + of_loss)

    @property
    def dominated_F(self) -> np.ndarray:
        """Which members some dense run dominates."""
        none_F = np.zeros(len(self.member_F2), dtype=bool)
        return np.any([none_F, *(self.dominated_by(run) for run in self.runs)], axis=0)

    @property
    def between_F(self) -> np.ndarray:
        """Which of the other members take joules between those of two dense runs."""
        ends = [run.x.mean for run in self.runs] or [np.inf]
        inside_F = (self.member_F2[:, 0] >= ends[0]) & (self.member_F2[:, 0] <= ends[-1])
        return inside_F & ~self.dominated_F

    def line(self, joules: np.ndarray) -> np.ndarray:
        """Loss of the line through the dense runs, straight in log joules."""
        ends = np.array([[np.log(run.x.mean), run.y.mean] for run in self.runs])
        return np.interp(np.log(joules), ends[:, 0], ends[:, 1])

    def text(self) -> str:
        """What stands below a front's table; empty without dense runs."""
        if not self.runs:
            return ""
        count = len(self.member_F2)
        said = [
            f"* {run.name}: {run.x.text(0)} J, {run.y.text(4)} nat/token ({run.x.count} seeds), dominates "
            f"{int(self.dominated_by(run).sum())} of {count} members"
            for run in self.runs
        ]
        told = f"Dense runs dominate {int(self.dominated_F.sum())} of {count} members{self._clearly()}."
        if self.between_F.any():
            joules, loss = self.member_F2[self.between_F].T
            above = int((loss > self.line(joules)).sum())
            told += (
                f" Of the {len(joules)} others whose joules lie between those of dense runs, {above} lie above the "
                "line through these (straight in log joules)."
            )
        cheaper = int((self.member_F2[:, 0] < self.runs[0].x.mean).sum())
        told += f" {cheaper} take fewer joules than any dense run." if cheaper else ""
        head = "Dense, of the controls (means with 95 % intervals over seeds; one epoch where nothing else is said):"
        return "\n\n".join((head, "\n".join(said), told))

    def _clearly(self) -> str:
        """A member is often of one seed: how many are dominated by more than that explains."""
        if self.spreads is None:
            return ""
        clear_F = np.any([self.dominated_by(run, 3.0) for run in self.runs], axis=0)
        return f", {int(clear_F.sum())} by three times the A/A spreads or more on both axes"

    def points(self) -> tuple[Point, ...]:
        """Marks of the dense runs."""
        return tuple(
            Point(x=run.x.mean, y=run.y.mean, tip=run.name, x_range=_span(run.x), y_range=_span(run.y), shape=_CROSS)
            for run in self.runs
        )

    def lines(self) -> tuple[Line, ...]:
        """The line through two dense runs or more."""
        if len(self.runs) < 2:
            return ()
        joules = np.geomspace(self.runs[0].x.mean, self.runs[-1].x.mean, 33)
        return (Line(x=joules.tolist(), y=self.line(joules).tolist(), dash=1, strong=False, tip=_LABEL),)

    def legend(self) -> tuple[Key, ...]:
        """Their entry of the legend."""
        return (Key(label=_LABEL, kind="point", shape=_CROSS),) if self.runs else ()


def _span(mean: Mean) -> tuple[float, float] | None:
    return None if mean.half is None else (mean.mean - mean.half, mean.mean + mean.half)
