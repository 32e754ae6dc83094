"""What a person sees while a sweep runs: one line per epoch and per finished trial."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from pipelines.config import TrialConfig
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

    def __init__(self, trials: Sequence[TrialConfig], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.trials = {trial.trial_id: trial for trial in trials}
        # Beside its epochs a trial is set up and evaluated: count one more epoch for that.
        self.total = sum(trial.epochs + 1 for trial in trials)
        self.finished_trials = 0
        self.done: dict[str, int] = {}
        self.start_s = time.monotonic()

    def started(self, trial_id: str) -> None:
        """A trial got its actor."""
        self.done.setdefault(trial_id, 0)

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
        """A trial ended, well or not."""
        self.finished_trials += 1
        trial = self.trials[record.trial_id]
        self.done[record.trial_id] = trial.epochs + 1
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
        count = f"[{self.finished_trials}/{len(self.trials)}]"
        self.console.print(f"{count:>8} {trial_id}  {text}", soft_wrap=True, markup=True)
