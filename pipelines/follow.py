"""The driver's eye on a running sweep: terminal, MLflow, rows for attempts that could not write their own."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from pipelines import recover
from pipelines.background import Background
from pipelines.budget import Budget
from pipelines.config import TrialConfig
from pipelines.faults import passing
from pipelines.journal import Journal
from pipelines.plan import SweepPlan
from pipelines.progress import Progress
from pipelines.records import EpochRecord, PowerRecord, Store, TrialRecord
from pipelines.tracking import Tracker
from pipelines.trial_rows import is_final, parse_row

_LOOK_EVERY_S = 5.0
#: Seconds that an actor has to end in order when its sweep ends.
STOP_S = 3.0
#: Without a limit of the user's, a trial is taken for hung after so many times the longest stretch between reports.
_HUNG_FACTOR, _HUNG_LEAST_S = 20.0, 900.0


class SweepCallback(tune.Callback):  # type: ignore[misc,unused-ignore]
    """Follows the trials in the driver."""

    def __init__(
        self,
        plan: SweepPlan,
        out: str,
        tracking_uri: str | None,
        budget: Budget,
        timeout_s: float | None = None,
        book: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.out, self.tracking_uri, self.budget = plan, out, tracking_uri, budget
        self.timeout_s, self.book = timeout_s, book

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Build clients here: Tune pickles callbacks before."""
        self.store, self.journal = Store(self.out), Journal(self.out, self.plan.sweep_id)
        self.tracker = Tracker.open(self.out, self.tracking_uri)
        self.mirror = Background("MLflow")  # trials do not wait for it
        rules = {"search": self.plan.search, "scheduler": self.plan.scheduler}
        self.mirror.post(
            self.tracker.start_sweep, self.plan.sweep_id, self.plan.space, question=self.plan.question, params=rules
        )
        ended = recover.rows_of(self.store, self.plan.sweep_id)
        earlier = [trial_id for trial_id, row in ended.items() if is_final(row)]
        expected = len(earlier) + self.plan.left(earlier) if self.plan.is_adaptive else None
        self.progress = Progress(self.plan.trials, expected=expected, earlier=earlier)
        self.epochs: dict[str, list[EpochRecord]] = {}
        self.heard_s: dict[str, float] = {}
        self.hung: set[str] = set()
        self.written: set[str] = set()  # trials that wrote their own row
        self.longest_s = 0.0
        self.actors: dict[str, Any] = {}  # of the trials that run
        self._looked_s = 0.0
        self._ending: threading.Timer | None = None

    def close(self) -> None:
        """Wait for MLflow to hold what was seen."""
        if "mirror" in self.__dict__:
            if self._ending is not None:
                self._ending.cancel()
            self.mirror.close()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Where another driver took the sweep over, the trials that run here end before they write."""
        if not self.budget.holds():
            for trial in trials:
                with contextlib.suppress(Exception):  # it has no actor
                    ray.kill(trial.temporary_state.ray_actor, no_restart=True)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial began."""
        values = trial.config["trial"]
        self.heard_s[values["trial_id"]] = time.monotonic()
        self.actors[values["trial_id"]] = trial.temporary_state.ray_actor
        self.progress.started(values["trial_id"], values)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Show and mirror an epoch, or the whole trial."""
        if not self.budget.holds():
            return
        self._heard(trial.config["trial"]["trial_id"])
        if "trial_row" in result:
            row = parse_row(result["trial_row"] if self.plan.is_adaptive else result.pop("trial_row"))
            passing("driver.end", f"{row.trial_id}-{row.attempt}")
            result["state"] = row.state
            self.written.add(row.trial_id)
            self.actors.pop(row.trial_id, None)
            self._finished(row)
            if row.ended_by == "storage":
                self.budget.give_up(OSError(row.error))
        elif "epoch_row" in result:
            record = EpochRecord(**json.loads(result.pop("epoch_row")))
            passing("driver.report", f"{record.trial_id}-{record.attempt}")
            self.epochs.setdefault(record.trial_id, []).append(record)
            self.progress.epoch(record)
            self.mirror.post(self.tracker.log_epoch, record)
            if result.get("compiled_s"):
                self.progress.compiled(record.trial_id, result["compiled_s"], result["waited_s"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial that ended without a row of its own was stopped by the scheduler."""
        self.actors.pop(trial.config["trial"]["trial_id"], None)
        if trial.config["trial"]["trial_id"] not in self.written:
            self._write_missing(trial, "scheduler", alive=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """An attempt died and another one follows: its joules are booked first."""
        self._write_missing(trial, self._cause(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The actor died and no attempt follows, so nobody else can write the row."""
        self._write_missing(trial, self._cause(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for hung trials, and book how long this session has run: it may end by SIGKILL. At the end of a sweep
        Ray waits ten seconds for actors in the middle of an epoch, of which nothing would be kept.
        """
        if self.budget.ended and self._ending is None:
            self._ending = threading.Timer(STOP_S, self._end_actors)
            self._ending.daemon = True
            self._ending.start()
        now = time.monotonic()
        if now - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now
        with contextlib.suppress(OSError):
            self.book()
        limit_s = self.timeout_s or max(_HUNG_LEAST_S, _HUNG_FACTOR * self.longest_s)
        for trial in trials:
            trial_id = trial.config.get("trial", {}).get("trial_id")
            if trial.status == "RUNNING" and now - self.heard_s.get(trial_id, now) > limit_s:
                self.heard_s[trial_id] = now
                self.hung.add(trial_id)
                end_actor(trial, self.journal, trial_id)

    def _end_actors(self) -> None:
        for actor in list(self.actors.values()):
            with contextlib.suppress(Exception):  # it ended in order
                ray.kill(actor, no_restart=True)

    def _heard(self, trial_id: str) -> None:
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.heard_s.get(trial_id, now))
        self.heard_s[trial_id] = now

    def _cause(self, trial: Any) -> str:
        trial_id = trial.config["trial"]["trial_id"]
        if trial_id in self.hung:
            self.hung.discard(trial_id)
            return "timeout"
        return "died"

    def _write_missing(self, trial: Any, ended_by: str, *, alive: bool = False) -> None:
        trial_id = trial.config["trial"]["trial_id"]
        if not self.budget.holds():  # whoever drives the sweep now writes it
            return
        try:
            rows = recover.write_missing(self.store, self.journal, ended_by=ended_by, trial_id=trial_id, alive=alive)
            if not rows and not alive and not self.journal.attempts(trial_id):
                rows = [self._never_began(trial)]
        except OSError as error:  # what cannot be written down is not begun again: the sweep ends
            self.budget.give_up(error)
            return
        for row in rows:
            self._finished(row)

    def _never_began(self, trial: Any) -> TrialRecord:
        """The row of a trial whose actor did not even come up."""
        values = {k: v for k, v in trial.config["trial"].items() if k != "trial_id"}
        config = TrialConfig.parse(values)
        self.journal.claim(config.trial_id, recover.empty_claim(config))
        (row,) = recover.write_missing(self.store, self.journal, ended_by="died", trial_id=config.trial_id)
        return row

    def _finished(self, record: TrialRecord) -> None:
        self.budget.saw(record)
        self.progress.finished(record)
        where = self.store.path(PowerRecord, record.sweep_id, record.trial_id, record.attempt)
        self.mirror.post(self.tracker.log_trial, record, self.epochs.pop(record.trial_id, []), where)


def end_actor(trial: Any, journal: Journal, trial_id: str) -> None:
    """Kill a trial's process: through Ray, and on this host by the signal that a stopped process obeys too."""
    with contextlib.suppress(Exception):
        ray.kill(trial.temporary_state.ray_actor, no_restart=True)
    claims = journal.claims_of(trial_id)
    if claims and claims[-1]["node"] == platform.node():
        with contextlib.suppress(ProcessLookupError):
            os.kill(claims[-1]["pid"], signal.SIGKILL)
