"""One trial: build, train epoch by epoch, evaluate, and write what was measured.

`Trial` is a small state machine so that an actor can report after each epoch; `run_trial` drives it
without Ray.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from hwcost import EnergyMonitor, Measurement
from pipelines import warm
from pipelines.absorption import absorption
from pipelines.checkpoints import Checkpoint, Checkpoints, restore
from pipelines.config import TrialConfig
from pipelines.evaluation import (
    Evaluation,
    PhaseEnergy,
    converged_at,
    evaluate,
    evaluation_splits,
    measure_decode,
    measure_prefill,
)
from pipelines.faults import passing
from pipelines.heartbeat import Keeper
from pipelines.journal import Journal, points_document
from pipelines.ledger import BRANCH, EVAL, SETUP, TRAIN, Carry, Ledger, any_true, quadrature, total, trial_monitor
from pipelines.model import Hardware, build_model, opening_at, set_prices, switch_opening, weigh_opening
from pipelines.modelled import PhaseModel
from pipelines.parquet import is_storage_error
from pipelines.provenance import device_columns, host_columns
from pipelines.records import EpochRecord, PointRecord, PowerRecord, Store, TrialRecord
from pipelines.training import EpochSums, Trainer, decay_start
from pipelines.trial_rows import (
    DECODE_BATCHES,
    TrialKey,
    config_columns,
    continued,
    layer_columns,
    mean_of,
    one_line,
    opening_columns,
    perplexity,
    point_of,
    power_records,
    price_columns,
    routing_columns,
)


class Trial:
    """One attempt of a trial. Call `advance` until it returns the trial's record.

    With a journal the attempt continues from the trial's newest checkpoint, if there is one, and writes its own.

    Args:
        carry: what earlier attempts spent (`recover.carried`); nothing where this is the first.
        keeper: writes the attempt's heartbeats.
        board: columns that say more of the board.
    """

    def __init__(
        self,
        config: TrialConfig,
        key: TrialKey,
        store: Store,
        monitor: EnergyMonitor,
        *,
        journal: Journal | None = None,
        spent_j: float | None = 0.0,
        keeper: Keeper | None = None,
        board: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.key, self.store, self.monitor = config, key, store, monitor
        self._journal = journal
        self.checkpoints = Checkpoints(journal, key.trial_id) if journal is not None and config.checkpoint else None
        self.ledger = Ledger(monitor, keeper=keeper, name=key.name)
        self.ledger.carry = Carry().losing_up_to(spent_j)
        self._spent_j, self._board = spent_j, dict(board or {})
        self.started_at = dt.datetime.now(dt.UTC)
        self._origin_s = time.monotonic()
        self.epochs: list[EpochRecord] = []
        self.points: list[dict[str, Any]] = []
        self.epoch = 0
        self.record: TrialRecord | None = None
        self.evaluation: Evaluation | None = None
        self.code: warm.Compiled | None = None
        self.modelled = PhaseModel()
        self._measured: dict[str, Any] = {}

    @property
    def done(self) -> bool:
        """True once every configured epoch was trained."""
        return self.epoch >= self.config.epochs

    def advance(self) -> EpochRecord | TrialRecord:
        """The next stretch: begin, one epoch, or the end. An error ends the trial as FAILED, here and only here."""
        try:
            if not self.epochs:
                return self.begin()
            return self.finish() if self.done else self.run_epoch()
        except Exception as error:
            return self.fail(error)

    def begin(self) -> EpochRecord:
        """Load data, build and compile the model, and evaluate it before training (epoch 0), or continue."""
        self.ledger.open()
        passing("trial.begin", self.key.name)
        with self.ledger.window(SETUP):
            device = self.monitor.devices[0] if self.monitor.devices else None
            self.hardware = Hardware.of(
                self.config,
                gpu_name=device.name if device else None,
                power_limit_w=device.power_limit_w if device else None,
            )
            if self.config.threads and self.hardware.device.type == "cpu":
                torch.set_num_threads(self.config.threads)
            self.corpus = warm.corpus_of(self.config)
            self.validation, self.test = evaluation_splits(self.corpus, self.config)
            model, self.prices = build_model(self.config, self.corpus, self.hardware)
            self.code = warm.compiled(model, self.config, self.hardware)
            self.model = self.code.module
            self.opening = weigh_opening(self.config, self.model.config, self.hardware)
            switch_opening(self.model, self.opening)
            self.modelled = PhaseModel.of(self.config, self.model.config, self.hardware)
            train = self.corpus.splits["train"].first(self.config.max_train_tokens)
            name, forward = self.key.name, self.code.forward
            self.trainer = Trainer(self.model, self.config, self.hardware, train, forward=forward, name=name)
            with warm.compiling(self.code):
                self.trainer.warm_up()
        checkpoint = self._checkpoint()
        return self._evaluated(None) if checkpoint is None else self._continue(checkpoint)

    def run_epoch(self) -> EpochRecord:
        """Train one epoch inside its window, then evaluate."""
        self.epoch += 1
        if self.config.anytime:
            return self._run_to_point(self.epoch)
        with self._training(TRAIN):
            sums = self.trainer.run_epoch(self.epoch)
        record = self._evaluated(sums)
        self._save()
        return record

    def _run_to_point(self, count: int) -> EpochRecord:
        """The stable trunk up to where a run of `count` epochs begins to decay, then that decay on a branch."""
        total_steps = count * self.trainer.per_epoch
        with self._training(TRAIN):
            self.trainer.run_to(decay_start(self.config, total_steps), sys.maxsize)
        if self.done:
            with self._training(TRAIN):
                sums = self.trainer.run_to(total_steps, total_steps)
            record = self._evaluated(sums)
        else:
            with self.trainer.branch():
                with self._training(BRANCH):
                    sums = self.trainer.run_to(total_steps, total_steps)
                record = self._evaluated(sums, branch=self.ledger.of(BRANCH)[-1])
                self.points.append(self._point_values(record, self.ledger.of(BRANCH)[-1]))
                self._keep_points()
        self._save()
        return record

    def _keep_points(self) -> None:
        """Put down the points so far: whoever ends this attempt from outside makes rows of them."""
        if self._journal is not None:
            self._journal.put(
                points_document(self.key.name), {"corpus": self.corpus.fingerprint, "points": self.points}
            )

    def _training(self, phase: str) -> AbstractContextManager[Any]:
        return self.ledger.window(phase, modelled_power_w=self.modelled.power_w("train"))

    def _evaluated(self, sums: EpochSums | None, *, branch: Measurement | None = None) -> EpochRecord:
        record = self._epoch_record(sums, self._evaluate(), branch)
        self.epochs.append(record)
        self.store.write(EpochRecord, self.epochs, **dataclasses.asdict(self.key))
        return record

    def _evaluate(self) -> Evaluation:
        """Loss and routing; the phases are modelled anew with the experts that were routed to."""
        with self.ledger.window(EVAL):
            self.evaluation = evaluate(self.model, self.validation, self.config, self.hardware)
        width = self.evaluation.routing.mean_selected_width if self.evaluation.routing else None
        self.modelled = PhaseModel.of(self.config, self.model.config, self.hardware, selected_width=width)
        return self.evaluation

    def finish(self) -> TrialRecord:
        """Measure prefill and decode, close the span, write all tables."""
        if self.evaluation is None:
            self._evaluate()
        self._measure_phases()
        columns = self._outcome_columns()
        if self.checkpoints is not None:
            self.checkpoints.save_final(self.model)
        self.ledger.close()
        record = self._write("COMPLETED", columns)
        if self.checkpoints is not None:
            self.checkpoints.prune()
        passing("trial.end", self.key.name)
        return record

    def stop(self) -> TrialRecord:
        """End early at a scheduler's word: what was measured so far is kept, the row is censored."""
        columns = self._outcome_columns() if self.evaluation is not None else {}
        self.ledger.close()
        return self._write("STOPPED", columns | {"ended_by": "scheduler"})

    def fail(self, error: BaseException) -> TrialRecord:
        """Close what is open and write a FAILED row with its reason."""
        self.ledger.close()
        if self.code is not None and self.code.shape:
            warm.forget()  # the error may have come from the compiled code
        ended_by = "storage" if is_storage_error(error) else "itself"
        return self._write("FAILED", {"error": one_line(error), "ended_by": ended_by})

    def release(self) -> None:
        """Drop the model and its memory, so that an actor can be reused."""
        self.model = None
        trainer = self.__dict__.pop("trainer", None)
        if trainer is not None:
            trainer.drop_capture()
        if self.code is not None:
            warm.release(self.code)
            self.code = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- checkpoints -------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        values = {
            "carry": dataclasses.asdict(self.ledger.so_far()),
            "epochs": [dataclasses.asdict(record) for record in self.epochs],
            "points": self.points,
            "corpus": self.corpus.fingerprint,
        }
        self.checkpoints.save(self.epoch, self.model, self.trainer.state_dict(), values)

    def _checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint of this trial on this text."""
        found = self.checkpoints.load(self.hardware.device) if self.checkpoints is not None else None
        return found if found is not None and found.values["corpus"] == self.corpus.fingerprint else None

    def _continue(self, checkpoint: Checkpoint) -> EpochRecord:
        """Go on where the checkpoint was taken: what was spent since then is lost."""
        if self.config.is_priced:  # the audit compares with the routers before training
            with self.ledger.window(EVAL):
                at_start = evaluate(self.model, self.validation, self.config, self.hardware).routing
            assert at_start is not None
            self._routing_at_start = at_start
        restore(self.model, checkpoint)
        self.trainer.load_state_dict(checkpoint.tensors)
        self.ledger.carry = Carry.from_document(checkpoint.values["carry"]).losing_up_to(self._spent_j)
        self.epochs = continued(checkpoint.values["epochs"], self.key)
        self.points = checkpoint.values["points"]
        if self.points:
            self._keep_points()
        self.epoch = int(checkpoint.values["epoch"])
        self.store.write(EpochRecord, self.epochs, **dataclasses.asdict(self.key))
        return self.epochs[-1]

    # --- phases ------------------------------------------------------------------------------------

    def _measure_phases(self) -> None:
        with self.ledger.window(EVAL):
            if self.test is not None:
                loss = evaluate(self.model, self.test, self.config, self.hardware).loss_nats
                self._measured["test_loss_nats"] = loss
            where = (self.config, self.hardware, self.monitor)
            if self.config.prefill:
                self._price("prefill")
                watts = self.modelled.power_w("prefill")
                prefill = measure_prefill(self.model, self.validation, *where, modelled_power_w=watts)
                self._measured["prefill_j_per_token"] = prefill.j_per_token
                self._measured["prefill_tokens_per_s"] = prefill.tokens_per_s
            self._price("decode")
            for batch in self.config.decode_batches:
                watts = self.modelled.power_w(f"decode_b{batch}")
                with opening_at(self.model, self.config, self.hardware, batch):
                    phase = measure_decode(self.model, self.validation, batch, *where, modelled_power_w=watts)
                self._book_decode(batch, phase)

    def _price(self, phase: str) -> None:
        """Put the prices of a phase on the routers: training, prefill and decode have their own."""
        if self.prices is not None:
            set_prices(self.model, self.prices[phase])

    def _book_decode(self, batch: int, phase: PhaseEnergy) -> None:
        if "decode_batch" not in self._measured:
            self._measured |= {"decode_batch": batch, "decode_j_per_token": phase.j_per_token}
        if batch in DECODE_BATCHES:
            self._measured[f"decode_j_per_token_b{batch}"] = phase.j_per_token
            self._measured[f"decode_tokens_per_s_b{batch}"] = phase.tokens_per_s

    # --- records -----------------------------------------------------------------------------------

    def _write(self, state: str, outcome: dict[str, Any]) -> TrialRecord:
        energy = self.ledger.columns()
        if self.modelled.flags:
            energy["energy_flags"] = sorted({*energy.get("energy_flags", []), *self.modelled.flags})
        tokens = outcome.get("tokens_trained")
        if tokens and energy["train_energy_j"] is not None:
            energy["train_j_per_token"] = energy["train_energy_j"] / tokens
        if tokens and energy["train_duration_s"]:
            energy["tokens_per_s"] = tokens / energy["train_duration_s"]
        record = TrialRecord(
            **dataclasses.asdict(self.key),
            state=state,
            censored=state == "STOPPED",
            started_at=self.started_at,
            **config_columns(self.config),
            **host_columns(),
            **device_columns(self.monitor, getattr(self, "hardware", None)),
            **self._board,
            **energy,
            **({"ended_by": "itself"} | outcome),
        )
        where = dataclasses.asdict(self.key)
        power = power_records(self.key, self.monitor.system.history, self._origin_s)
        if power:
            self.store.write(PowerRecord, power, **where)
        points = [point_of(record, **values) for values in self.points]
        if state == "COMPLETED":
            points.append(point_of(record))
        if points:
            self.store.write(PointRecord, points, **where)
        self.store.write(TrialRecord, [record], **where)  # last: a trial's row says that the others are whole
        self.record = record
        return record

    def _outcome_columns(self) -> dict[str, Any]:
        last, evaluation = self.epochs[-1], self.evaluation
        assert evaluation is not None
        columns: dict[str, Any] = {
            "eval_loss_nats": evaluation.loss_nats,
            "eval_perplexity": perplexity(evaluation.loss_nats),
            "eval_bits_per_byte": evaluation.bits_per_byte,
            "converged_at": converged_at([e.eval_loss_nats for e in self.epochs[1:]]),
            "tokens_trained": last.tokens_trained,
            "corpus_fingerprint": self.corpus.fingerprint,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "modelled_train_energy_j": self.modelled.training_j(self.trainer.step) if self.epoch else None,
            **routing_columns(evaluation),
            "dropped_fraction": mean_of([e.dropped_fraction for e in self.epochs]),
            "price_drift": last.price_drift,
            "lambda_undone": last.lambda_undone,
            **self._measured,
        }
        if evaluation.routing is not None:
            columns["open_experts"] = evaluation.routing.open_experts
            columns["mean_selected_width"] = evaluation.routing.mean_selected_width
        if self.prices is not None and self.config.uses_price:
            columns |= price_columns(self.config, self.prices) | opening_columns(self.opening)
        return columns

    def _epoch_record(
        self, sums: EpochSums | None, evaluation: Evaluation, branch: Measurement | None = None
    ) -> EpochRecord:
        train = branch or (self.ledger.of(TRAIN)[-1] if sums is not None else None)
        duration = train.duration_s if train is not None else None
        trained_j = self.ledger.energy_j(TRAIN)
        return EpochRecord(
            **dataclasses.asdict(self.key),
            epoch=self.epoch,
            train_loss_nats=sums.loss_nats if sums else None,
            aux_loss=sums.aux_loss if sums else None,
            eval_loss_nats=evaluation.loss_nats,
            eval_bits_per_byte=evaluation.bits_per_byte,
            learning_rate=sums.learning_rate if sums else None,
            tokens_trained=self.trainer.tokens,
            epoch_energy_j=train.energy_j if train else None,
            epoch_energy_uncertainty_j=train.uncertainty_j if train else None,
            modelled_energy_j=self.modelled.training_j(sums.steps) if sums else None,
            train_energy_j=trained_j if branch is None else total((trained_j, branch.energy_j)),
            eval_energy_j=self.ledger.of(EVAL)[-1].energy_j,
            energy_source=self.monitor.source,
            duration_s=duration,
            tokens_per_s=sums.tokens / duration if sums and duration else None,
            mean_power_w=train.mean_power_w if train else None,
            max_temperature_c=train.max_temperature_c if train else None,
            dropped_fraction=mean_of(sums.dropped_L or []) if sums else None,
            layer_dropped_fraction=sums.dropped_L if sums else None,
            **routing_columns(evaluation),
            **layer_columns(evaluation),
            **self._audit_columns(evaluation),
        )

    def _audit_columns(self, evaluation: Evaluation) -> dict[str, Any]:
        """What became of the price since epoch 0; empty where no price acts on the router."""
        routing = evaluation.routing
        if routing is None:
            return {}
        if not self.epochs:
            self._routing_at_start = routing
        columns: dict[str, Any] = {}
        if self.prices is None or not self.config.is_priced:
            return columns
        audit = absorption(self._routing_at_start, routing, self.prices["train"].join, self.config.temperature)
        return columns | {
            "price_drift": audit.drift,
            "lambda_undone": audit.undone,
            "layer_price_drift": audit.drift_L,
            "layer_lambda_undone": audit.undone_L,
            "layer_price_flip_fraction": audit.flip_L,
        }

    def _point_values(self, record: EpochRecord, branch: Measurement) -> dict[str, Any]:
        """What this trial would have been had it ended here: the trunk so far and the branch's own decay."""
        shorter = self.config.model_copy(update={"epochs": record.epoch, "anytime": False})
        trunk = [m.uncertainty_j for m in self.ledger.of(TRAIN)]
        return {
            "config_fingerprint": shorter.fingerprint,
            "epochs": record.epoch,
            "eval_loss_nats": record.eval_loss_nats,
            "tokens_trained": record.tokens_trained,
            "train_energy_j": record.train_energy_j,
            "train_energy_uncertainty_j": quadrature(
                (self.ledger.carry.train_uncertainty_j, *trunk, branch.uncertainty_j)
            ),
            "branch_energy_j": branch.energy_j,
            "shared_gpu": any_true(m.shared for m in (*self.ledger.of(TRAIN), branch)),
        }


def run_trial(
    config: TrialConfig,
    *,
    out: str | os.PathLike[str],
    sweep_id: str = "single",
    attempt: int = 0,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    monitor: EnergyMonitor | None = None,
    keep: bool = False,
) -> TrialRecord:
    """Run one trial without Ray and write its tables under `out`.

    An error becomes a FAILED record with its reason. `keep` writes checkpoints and the trained model too.
    """
    key = TrialKey(sweep_id=sweep_id, trial_id=config.trial_id, attempt=attempt)
    with monitor or trial_monitor(device=config.device) as own:
        journal = Journal(os.fspath(out), sweep_id) if keep else None
        trial = Trial(config, key, Store(out), own, journal=journal)
        while isinstance(record := trial.advance(), EpochRecord):
            if on_epoch is not None:
                on_epoch(record)
        trial.release()
    return record


__all__ = ["Trial", "TrialKey", "config_columns", "one_line", "price_columns", "run_trial"]
