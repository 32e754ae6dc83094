"""What a person sees while a sweep runs: one line per epoch and per finished trial."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipelines.config import TrialConfig
from pipelines.console import standard_output
from pipelines.records import EpochRecord, TrialRecord


def describe(config: TrialConfig) -> str:
    """A trial in a few words: what its space varies."""
    if config.is_dense:
        return f"dense, {config.epochs} ep"
    words = [config.router, f"k={config.top_k}"]
    if config.is_priced:
        words.append(f"λ={config.energy_lambda:g}")
    if config.regularizer != "none" and config.regularizer_weight:
        words.append(f"{config.regularizer}={config.regularizer_weight:g}")
    return " ".join([*words, f"{config.epochs} ep"])


def joules(energy_j: float | None, source: str | None) -> str:
    """Joules with their source where they are not measured."""
    if energy_j is None:
        return "— J"
    return f"{energy_j:,.1f} J" + (" (modelled)" if source == "modelled" else "")


def clock(seconds: float) -> str:
    """Seconds as 42s, 3m05s or 2h04m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Prints lines; knows how much of the sweep is done."""

    def __init__(
        self,
        trials: Sequence[TrialConfig],
        console: Console | None = None,
        *,
        expected: int | None = None,
        earlier: Collection[str] = (),
    ) -> None:
        self.console = console or standard_output()
        self.trials = {trial.trial_id: trial for trial in trials}
        self.expected = expected  # trials in all, where they are not known beforehand
        self.earlier = set(earlier)  # trials that an earlier session ended: counted, but none of this one's time
        self.finished_trials = len(self.earlier)
        self.done: dict[str, int] = {}
        self.start_s = time.monotonic()

    @property
    def total(self) -> float:
        """Epochs in all. Beside its epochs a trial is set up and evaluated: one more epoch for that."""
        mine = [trial.epochs + 1 for trial_id, trial in self.trials.items() if trial_id not in self.earlier]
        if not self.expected or not mine:
            return sum(mine)
        return sum(mine) * max(1.0, (self.expected - len(self.earlier)) / len(mine))

    def started(self, trial_id: str, values: Mapping[str, Any] | None = None) -> None:
        """A trial got its actor; an adaptive search names its configuration here."""
        if trial_id not in self.trials and values is not None:
            self.trials[trial_id] = TrialConfig.parse({k: v for k, v in values.items() if k != "trial_id"})
        self.done.setdefault(trial_id, 0)

    def compiled(self, trial_id: str, seconds: float, waited_s: float) -> None:
        """The first trial of a shape in its process compiled it, or waited for a process that did and loaded that from
        the cache; the others of that shape find it ready.
        """
        text = f"compiled its shape in {clock(seconds)}"
        if waited_s >= 1:
            text = f"waited {clock(waited_s)} for another process with its shape, ready {clock(seconds)} later"
        self._line(trial_id, f"[dim]{text}[/dim]")

    def epoch(self, record: EpochRecord) -> None:
        """An epoch ended."""
        self.done[record.trial_id] = record.epoch
        trial = self.trials[record.trial_id]
        loss = f"loss {record.eval_loss_nats:.4f}" if record.eval_loss_nats is not None else "loss —"
        spent = joules(record.train_energy_j or 0.0, record.energy_source)
        self._line(
            record.trial_id,
            f"{describe(trial):<44} epoch {record.epoch}/{trial.epochs}  {loss}  {spent:>22}  {self._left()}",
        )

    def finished(self, record: TrialRecord) -> None:
        """An attempt ended, well or not; one that died may be tried again."""
        trial = self.trials[record.trial_id]
        again = record.ended_by not in (None, "itself", "scheduler")
        self.finished_trials += 0 if again else 1
        self.done[record.trial_id] = 0 if again else trial.epochs + 1
        if record.state == "FAILED":
            self._line(record.trial_id, f"[red]FAILED[/red] {escape(record.error or '')}")
            return
        spent = joules(record.train_energy_j, record.energy_source)
        loss = f"{record.eval_loss_nats:.4f}" if record.eval_loss_nats is not None else "—"
        self._line(
            record.trial_id, f"[green]{record.state.lower()}[/green]  loss {loss}  {spent} to train  {self._left()}"
        )

    def _left(self) -> str:
        share = sum(self.done.values()) / self.total
        if share <= 0:
            return "time left —"
        elapsed = time.monotonic() - self.start_s
        return f"{clock(elapsed * (1 - share) / share)} left"

    def _line(self, trial_id: str, text: str) -> None:
        count = f"[{self.finished_trials}/{self.expected or len(self.trials)}]"
        self.console.print(f"{count:>8} {trial_id}  {text}", soft_wrap=True, markup=True)
