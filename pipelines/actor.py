"""Ray Tune's side of a trial: an actor that runs one trial after the other."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import gc
import json
import logging
import os
import platform
import warnings
from typing import Any, ClassVar

import torch
import transformers
from ray import tune

from hwcost import EnergyMonitor
from pipelines import anchors, recover
from pipelines.config import TrialConfig
from pipelines.heartbeat import Keeper, keeper_of
from pipelines.journal import Journal, process_start
from pipelines.ledger import trial_monitor
from pipelines.provenance import device_columns, host_columns
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.trial import Trial, TrialKey
from pipelines.trial_rows import is_final


class TrialActor(tune.Trainable):  # type: ignore[misc,unused-ignore]
    """One `step` is one `Trial.advance`. The process, its CUDA context and its monitor serve many trials; every trial
    has windows of its own.
    """

    monitor: EnergyMonitor | None = None
    keeper: Keeper | None = None
    trial: Trial | None = None
    measure_anchor: ClassVar[anchors.Measure] = staticmethod(anchors.measure)
    anchor_actor: ClassVar[type[anchors.AnchorActor]] = anchors.AnchorActor

    def setup(self, config: dict[str, Any]) -> None:
        """Warm up the process. The attempt is claimed by the first step: Tune makes actors that it never uses."""
        quiet_libraries()
        self._watch(config, Journal(config["out"], config["sweep_id"]))

    def _row_before(self) -> TrialRecord | None:
        journal, trial_id = Journal(self.config["out"], self.config["sweep_id"]), self.config["trial"]["trial_id"]
        return recover.row_before(Store(self.config["out"]), journal, trial_id)

    def _begin(self, before: TrialRecord | None) -> Trial:
        config = self.config
        journal, store = Journal(config["out"], config["sweep_id"]), Store(config["out"])
        assert self.monitor is not None
        anchor = anchors.at_start(store, self.monitor, config, measure=type(self).measure_anchor)
        self.monitor.system.clear()
        trial_id = config["trial"]["trial_id"]
        parsed = TrialConfig.parse({k: v for k, v in config["trial"].items() if k != "trial_id"})
        spent_j = recover.spent_j(before, journal.attempts(trial_id))
        attempt = journal.claim(trial_id, self._claim(parsed, spent_j))
        key = TrialKey(sweep_id=config["sweep_id"], trial_id=trial_id, attempt=attempt)
        board = {"anchor_j_per_token": None if anchor.shared else anchor.j_per_token}
        how: dict[str, Any] = {"journal": journal, "spent_j": spent_j, "keeper": self.keeper, "board": board}
        return Trial(parsed, key, store, self.monitor, **how)

    def step(self) -> dict[str, Any]:
        """Advance the trial; the result carries the row that was made (as text, which Tune does not take apart)."""
        if self.trial is None:
            before = self._row_before()
            if before is not None and is_final(before):  # its process died after it had said its last word
                return _last_word(before)
            self.trial = self._begin(before)
        record = self.trial.advance()
        if isinstance(record, EpochRecord):
            point = {"loss": record.eval_loss_nats, "joules": record.train_energy_j}
            code = self.trial.code if not record.epoch else None
            took = {"compiled_s": code.seconds, "waited_s": code.waited_s} if code is not None else {}
            return {"epoch": record.epoch, "epoch_row": _text(record), **took, **point}
        self._let_go()
        return _last_word(record)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial into this process: its imports and CUDA context are warm already."""
        self._let_go()
        self.config = new_config
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """The actor is not needed any more. The driver writes the row of a trial that was stopped."""
        self._let_go()
        if self.keeper is not None:
            self.keeper.close()
        if self.monitor is not None:
            self.monitor.close()
        gc.freeze()  # the process ends: a search for garbage in all of torch would hold the sweep up

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a trial keeps its own checkpoints."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""

    def _watch(self, config: dict[str, Any], journal: Journal) -> None:
        if self.monitor is None:
            self.monitor = trial_monitor(cpu_parallel=config["parallel"], device=config["trial"].get("device", "auto"))
            place_of = functools.partial(journal.beats.place, self._beats)
            self.keeper = keeper_of(self.monitor, place_of, config.get("session", ""))

    @property
    def _beats(self) -> str:
        return f"{platform.node()}-{os.getpid()}-{process_start(os.getpid())}"

    def _claim(self, config: TrialConfig, spent_j: float | None) -> dict[str, Any]:
        assert self.monitor is not None
        return {
            "config": config.model_dump(mode="json"),
            "node": platform.node(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "beats": self._beats if self.keeper is not None else None,
            "spent_j": spent_j,
            "source": self.monitor.source,
            "started_at": dt.datetime.now(dt.UTC).isoformat(),
            "host_columns": host_columns(),
            "device_columns": device_columns(self.monitor, None),
        }

    def _let_go(self) -> None:
        if self.trial is not None:
            self.trial.ledger.close()
            self.trial.release()
            self.trial = None


def quiet_libraries() -> None:
    """Keep third-party chatter out of a trial's output; errors still show."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_float32_matmul_precision("high")


def _last_word(record: TrialRecord) -> dict[str, Any]:
    return {"epoch": record.epochs, "trial_row": _text(record), "done": True}


def _text(record: EpochRecord | TrialRecord) -> str:
    return json.dumps(dataclasses.asdict(record), default=lambda value: str(value.isoformat()))
