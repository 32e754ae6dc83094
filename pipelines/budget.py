"""When a sweep has spent enough: joules of its own ledger, hours, or a front that no longer grows."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune

from pipelines import fronts
from pipelines.config import experiment_of
from pipelines.pareto import Objective
from pipelines.plan import SweepPlan
from pipelines.records import TrialRecord
from pipelines.trial_rows import is_final

_LOOK_EVERY_S = 1.0
#: At most this share of the time goes into looking: through an object store with a thousand actors it takes long.
_LOOK_SHARE = 0.1
#: How long joules may be out of reach before a sweep with a budget ends: a promise that nobody watches is none.
_BLIND_S = 300.0
#: A hypervolume that grew by less than this share did not grow.
_GROWTH = 1e-3


def stalls(trials: Sequence[np.ndarray], count: int) -> bool:
    """Whether the last `count` trials added (almost) nothing to the hypervolume.

    Args:
        trials: costs [points, objectives] of each trial in the order of their ends, less is better. The reference
            point is the worst of all: a trial that makes the front longer adds to it, however dear it is.
        count: trials, at least 1.
    """
    if len(trials) <= count + 1:
        return False
    before_NM, cost_NM = np.concatenate(trials[:-count]), np.concatenate(trials)
    reference_M = fronts.reference_point(cost_NM)
    before = fronts.hypervolume(before_NM, reference_M)
    return fronts.hypervolume(cost_NM, reference_M) <= before * (1 + _GROWTH)


def completed_end(row: TrialRecord) -> list[Mapping[str, Any]]:
    """The one end of a trial that completed."""
    return [vars(row)] if row.state == "COMPLETED" else []


class Budget(tune.Stopper):  # type: ignore[misc,unused-ignore]
    """Ends a sweep. `reason` says why, once it did; `broken` is the error where results cannot be written any more;
    `interrupted` is set from outside.

    Args:
        read_j: joules of the sweep so far, lost work and idle time included; None where nothing is counted.
        before_s: seconds of earlier sessions.
        reserve_j: joules that will be needed after the last trial.
        holds: whether this process still is the sweep's driver; where not, it ends.
        ends_of: what a trial offers the front of the plan's objectives (`epoch_ends.Ends`).
    """

    def __init__(
        self,
        plan: SweepPlan,
        read_j: Callable[[], float | None],
        rows: Sequence[TrialRecord] = (),
        before_s: float = 0.0,
        reserve_j: Callable[[], float] = lambda: 0.0,
        holds: Callable[[], bool] = lambda: True,
        ends_of: Callable[[TrialRecord], Sequence[Mapping[str, Any]]] = completed_end,
    ) -> None:
        self.plan, self.read_j, self.reserve_j, self.holds = plan, read_j, reserve_j, holds
        self.reason: str | None = None
        self.broken: OSError | None = None
        self.interrupted = False
        self._start_s = time.monotonic() - before_s
        self._axes = [Objective.parse(text) for text in plan.objectives]
        self._ends_of = ends_of
        self._trials: dict[str, tuple[str, np.ndarray]] = {}  # of each experiment, its first trial's ends
        self._seen: set[str] = set()
        self._look_s = -math.inf
        self._blind_s: float | None = None
        for row in sorted(rows, key=lambda row: row.started_at):
            self.saw(row)

    def saw(self, row: TrialRecord) -> None:
        """A trial ended. A replicate tells of a point that is known: it is no sign of a front that does not grow."""
        if self.plan.stall is None:
            return
        experiment = experiment_of(row.trial_id)
        if is_final(row):
            self._seen.add(experiment)
        costs = ([axis.cost(end[axis.column]) for axis in self._axes] for end in self._ends_of(row))
        known = [cost for cost in costs if np.isfinite(cost).all()]
        if known and self._trials.get(experiment, (row.trial_id,))[0] == row.trial_id:
            self._trials.pop(experiment, None)  # a further attempt of the same trial takes its place, at the end
            self._trials[experiment] = row.trial_id, np.array(known)

    def give_up(self, error: OSError) -> None:
        """What the sweep does cannot be written down any more."""
        self.reason, self.broken = f"storage: {error}", error

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Asked by Ray Tune many times a second."""
        now = time.monotonic()
        if not self.holds():
            self.reason = "another driver took the sweep over"
        elif not self.ended and now >= self._look_s:
            self.reason = self._judge(now)
            took_s = time.monotonic() - now
            self._look_s = now + max(_LOOK_EVERY_S, took_s / _LOOK_SHARE)
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether no trial runs any more, nor begins."""
        return self.interrupted or self.reason is not None

    def _judge(self, now: float) -> str | None:
        plan = self.plan
        if plan.max_hours is not None and now - self._start_s >= 3600 * plan.max_hours:
            return f"max_hours: {plan.max_hours:g} h have passed"
        if plan.stall is not None and not self._only_replicates() and self._stalls(plan.stall):
            return f"stop_when_hypervolume_stalls: the last {plan.stall} trials added nothing to the front"
        return None if plan.max_joules is None else self._joules(plan.max_joules, now)

    def _joules(self, most_j: float, now: float) -> str | None:
        try:
            spent_j, reserve_j = self.read_j(), self.reserve_j()
        except OSError as error:  # a store that is busy: the next time
            self._blind_s = now if self._blind_s is None else self._blind_s
            if now - self._blind_s < _BLIND_S:
                return None
            return f"max_joules: joules could not be read for {_BLIND_S / 60:.0f} minutes ({error})"
        self._blind_s = None
        if spent_j is None or spent_j + reserve_j < most_j:
            return None
        kept = f", {reserve_j:,.0f} J are kept for the anchor" if reserve_j else ""
        return f"max_joules: {spent_j:,.0f} J of {most_j:,.0f} J are spent{kept}"

    def _stalls(self, count: int) -> bool:
        return stalls([ends for _, ends in self._trials.values()], count)

    def _only_replicates(self) -> bool:
        """Whether every experiment has had a trial, and what is left are further seeds."""
        plan = self.plan
        planned = plan.samples or 0 if plan.is_adaptive else len({experiment_of(t.trial_id) for t in plan.trials})
        return plan.seeds > 1 and len(self._seen) >= planned

    def __getstate__(self) -> dict[str, object]:
        return {}


@contextlib.contextmanager
def ends_at_sigint(budget: Budget) -> Iterator[None]:
    """SIGINT ends the sweep as a spent budget does, once; after that it does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        budget.interrupted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
