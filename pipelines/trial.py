"""One trial: build, train epoch by epoch, evaluate, and write what was measured.

`Trial` is a small state machine so that an actor can report after each epoch; `run_trial` drives it
without Ray.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hwcost import EnergyMonitor
from pipelines.absorption import absorption
from pipelines.config import TrialConfig
from pipelines.data import load_corpus
from pipelines.evaluation import (
    Evaluation,
    PhaseEnergy,
    converged_at,
    evaluate,
    evaluation_splits,
    measure_decode,
    measure_prefill,
)
from pipelines.ledger import EVAL, SETUP, TRAIN, Ledger
from pipelines.model import Hardware, build_model, modelled_step_j, set_prices
from pipelines.prices import Prices
from pipelines.provenance import device_columns, host_columns
from pipelines.records import EpochRecord, PointRecord, PowerRecord, Store, TrialRecord
from pipelines.training import EpochSums, Trainer

class Trial:
    """One attempt of a trial. Call `advance` until it returns the trial's record."""

    def __init__(self, config: TrialConfig, key: TrialKey, store: Store, monitor: EnergyMonitor) -> None:
        self.config, self.key, self.store, self.monitor = config, key, store, monitor
        self.ledger = Ledger(monitor)
        self.started_at = dt.datetime.now(dt.UTC)
        self._origin_s = time.monotonic()
        self.epochs: list[EpochRecord] = []
        self.epoch = 0
        self.record: TrialRecord | None = None
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
        """Load data, build and compile the model, and evaluate it before training (epoch 0)."""
        self.ledger.open()
        with self.ledger.window(SETUP):
            device = self.monitor.devices[0] if self.monitor.devices else None
            self.hardware = Hardware.of(
                self.config,
                gpu_name=device.name if device else None,
                power_limit_w=device.power_limit_w if device else None,
            )
            if self.config.threads and self.hardware.device.type == "cpu":
                torch.set_num_threads(self.config.threads)
            self.corpus = load_corpus(self.config)
            self.validation, self.test = evaluation_splits(self.corpus, self.config)
            self.model, self.prices = build_model(self.config, self.corpus, self.hardware)
            train = self.corpus.splits["train"].first(self.config.max_train_tokens)
            self.trainer = Trainer(self.model, self.config, self.hardware, train)
            self.trainer.warm_up()
        return self._evaluated(None)

    def run_epoch(self) -> EpochRecord:
        """Train one epoch inside its window, then evaluate."""
        self.epoch += 1
        with self.ledger.window(TRAIN):
            sums = self.trainer.run_epoch(self.epoch)
        return self._evaluated(sums)

    def _evaluated(self, sums: EpochSums | None) -> EpochRecord:
        with self.ledger.window(EVAL):
            self.evaluation = evaluate(self.model, self.validation, self.config, self.hardware)
        record = self._epoch_record(sums, self.evaluation)
        self.epochs.append(record)
        return record

    def finish(self) -> TrialRecord:
        """Measure prefill and decode, close the span, write all tables."""
        self._measure_phases()
        columns = self._outcome_columns()
        self.ledger.close()
        return self._write("COMPLETED", columns)

    def stop(self) -> TrialRecord:
        """End early at a scheduler's word: what was measured so far is kept, the row is censored."""
        columns = self._outcome_columns() if self.epochs else {}
        self.ledger.close()
        return self._write("STOPPED", columns)

    def fail(self, error: BaseException) -> TrialRecord:
        """Close what is open and write a FAILED row with its reason."""
        self.ledger.close()
        return self._write("FAILED", {"error": one_line(error)})

    def release(self) -> None:
        """Drop the model and its memory, so that an actor can be reused."""
        self.model = self.trainer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- phases ------------------------------------------------------------------------------------

    def _measure_phases(self) -> None:
        with self.ledger.window(EVAL):
            if self.test is not None:
                loss = evaluate(self.model, self.test, self.config, self.hardware).loss_nats
                self._measured["test_loss_nats"] = loss
            self._price("prefill")
            prefill = measure_prefill(self.model, self.validation, self.config, self.hardware, self.monitor)
            self._measured["prefill_j_per_token"] = prefill.j_per_token
            self._price("decode")
            for batch in self.config.decode_batches:
                phase = measure_decode(self.model, self.validation, batch, self.config, self.hardware, self.monitor)
                self._book_decode(batch, phase)

    def _price(self, phase: str) -> None:
        """Put the prices of a phase on the routers: training, prefill and decode have their own."""
        if self.prices is not None:
            set_prices(self.model, self.prices[phase])

    def _book_decode(self, batch: int, phase: PhaseEnergy) -> None:
        if "decode_batch" not in self._measured:
            self._measured |= {"decode_batch": batch, "decode_j_per_token": phase.j_per_token}
        if batch in DECODE_COLUMNS:
            self._measured[DECODE_COLUMNS[batch]] = phase.j_per_token

    # --- records -----------------------------------------------------------------------------------

    def _write(self, state: str, outcome: dict[str, Any]) -> TrialRecord:
        energy = self.ledger.columns()
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
            **energy,
            **outcome,
        )
        where = dataclasses.asdict(self.key)
        if self.epochs:
            self.store.write(EpochRecord, self.epochs, **where)
        power = self._power_records()
        if power:
            self.store.write(PowerRecord, power, **where)
        if state == "COMPLETED":
            self.store.write(PointRecord, [self._point(record)], **where)
        self.store.write(TrialRecord, [record], **where)  # last: a trial's row says that the others are whole
        self.record = record
        return record

    def _outcome_columns(self) -> dict[str, Any]:
        last, evaluation = self.epochs[-1], self.evaluation
        columns: dict[str, Any] = {
            "eval_loss_nats": evaluation.loss_nats,
            "eval_perplexity": perplexity(evaluation.loss_nats),
            "eval_bits_per_byte": evaluation.bits_per_byte,
            "converged_at": converged_at([e.eval_loss_nats for e in self.epochs[1:]]),
            "tokens_trained": last.tokens_trained,
            "corpus_fingerprint": self.corpus.fingerprint,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "modelled_train_energy_j": self._modelled_j(evaluation) if self.epoch else None,
            **routing_columns(evaluation),
            "price_drift": last.price_drift,
            "lambda_undone": last.lambda_undone,
            **self._measured,
        }
        if evaluation.routing is not None:
            columns["open_experts"] = evaluation.routing.open_experts
            columns["mean_selected_width"] = evaluation.routing.mean_selected_width
        if self.prices is not None and self.config.uses_price:
            columns |= price_columns(self.config, self.prices)
        return columns

    def _modelled_j(self, evaluation: Evaluation) -> float | None:
        width = evaluation.routing.mean_selected_width if evaluation.routing else None
        step_j = modelled_step_j(self.config, self.model, self.hardware, width)
        return None if step_j is None else step_j * self.trainer.step

    def _epoch_record(self, sums: EpochSums | None, evaluation: Evaluation) -> EpochRecord:
        before = self.epochs[-1].tokens_trained if self.epochs else 0
        train = self.ledger.of(TRAIN)[-1] if sums is not None else None
        duration = train.duration_s if train is not None else None
        routing = evaluation.routing
        return EpochRecord(
            **dataclasses.asdict(self.key),
            epoch=self.epoch,
            train_loss_nats=sums.loss_nats if sums else None,
            aux_loss=sums.aux_loss if sums else None,
            eval_loss_nats=evaluation.loss_nats,
            eval_bits_per_byte=evaluation.bits_per_byte,
            learning_rate=sums.learning_rate if sums else None,
            tokens_trained=before + (sums.tokens if sums else 0),
            epoch_energy_j=train.energy_j if train else None,
            epoch_energy_uncertainty_j=train.uncertainty_j if train else None,
            train_energy_j=self.ledger.energy_j(TRAIN),
            eval_energy_j=self.ledger.of(EVAL)[-1].energy_j,
            energy_source=self.monitor.source,
            duration_s=duration,
            tokens_per_s=sums.tokens / duration if sums and duration else None,
            mean_power_w=train.mean_power_w if train else None,
            max_temperature_c=train.max_temperature_c if train else None,
            expert_load=[list(load) for load in routing.load_LE] if routing else None,
            layer_effective_experts=list(routing.layer_effective_experts) if routing else None,
            **routing_columns(evaluation),
            **self._audit_columns(evaluation),
        )

    def _audit_columns(self, evaluation: Evaluation) -> dict[str, Any]:
        """What became of the price since epoch 0; empty where no price acts on the router."""
        routing = evaluation.routing
        if routing is None:
            return {}
        if not self.epochs:
            self._routing_at_start = routing
        columns: dict[str, Any] = {"layer_logit_std": routing.layer_logit_std}
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

    def _point(self, record: TrialRecord) -> PointRecord:
        """The trial's own end. Earlier boundaries are valid ends only under a schedule that decays there."""
        names = {field.name for field in dataclasses.fields(PointRecord)}
        shared = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name in names}
        return PointRecord(**shared, trial_fingerprint=record.config_fingerprint)

    def _power_records(self) -> list[PowerRecord]:
        names = {field.name for field in dataclasses.fields(PowerRecord)}
        rows = []
        for sample in self.monitor.system.history:
            time_s = sample.time_s - self._origin_s
            if time_s >= 0:
                values = {k: v for k, v in dataclasses.asdict(sample).items() if k in names}
                rows.append(PowerRecord(**dataclasses.asdict(self.key), **(values | {"time_s": time_s})))
        return rows


def run_trial(
    config: TrialConfig,
    *,
    out: str | os.PathLike[str],
    sweep_id: str = "single",
    attempt: int = 0,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    monitor: EnergyMonitor | None = None,
) -> TrialRecord:
    """Run one trial without Ray and write its tables under `out`.

    An error becomes a FAILED record with its reason.
    """
    key = TrialKey(sweep_id=sweep_id, trial_id=config.trial_id, attempt=attempt)
    with monitor or EnergyMonitor.for_assigned_devices() as own:
        trial = Trial(config, key, Store(out), own)
        while isinstance(record := trial.advance(), EpochRecord):
            if on_epoch is not None:
                on_epoch(record)
        trial.release()
    return record
