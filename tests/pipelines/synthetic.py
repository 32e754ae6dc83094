"""Synthetic sweeps for tests: numbers from closed formulas, never measured, so they stay in tests only."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import parquet
from pipelines.records import (
    AnchorRecord,
    EpochRecord,
    PointRecord,
    PowerRecord,
    Record,
    Store,
    TrialRecord,
    to_table,
)

START = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
SWEEP = "synthetic"


def trial(trial_id: str = "t0", **changes: Any) -> TrialRecord:
    """One row of `trials`, whole and comparable unless changed."""
    values: dict[str, Any] = {
        "sweep_id": SWEEP,
        "trial_id": trial_id,
        "attempt": 0,
        "config_fingerprint": f"config-{trial_id}",
        "seed": 0,
        "state": "COMPLETED",
        "censored": False,
        "config_json": "{}",
        "base": "random",
        "router": "topk",
        "energy_lambda": 0.0,
        "top_k": 2,
        "num_experts": 4,
        "expert_widths": [0, 64, 128, 256],
        "price": "join",
        "regularizer": "load_balance",
        "regularizer_weight": 0.01,
        "temperature": 1.0,
        "epochs": 2,
        "schedule": "cosine",
        "batch_size": 8,
        "seq_len": 128,
        "eval_loss_nats": 3.5,
        "test_loss_nats": 3.52,
        "eval_perplexity": math.exp(3.5),
        "eval_bits_per_byte": 1.4,  # 0.4 bits per byte a nat per token
        "converged_at": None,
        "tokens_trained": 100_000,
        "corpus_fingerprint": "corpus-a",
        "energy_source": "counter",
        "train_energy_j": 100.0,
        "train_energy_uncertainty_j": 1.0,
        "train_energy_dynamic_j": 80.0,
        "setup_energy_j": 20.0,
        "eval_energy_j": 10.0,
        "idle_energy_j": 5.0,
        "lost_energy_j": 0.0,
        "total_energy_j": 135.0,
        "train_j_per_token": 1e-3,
        "prefill_j_per_token": 2e-4,
        "decode_j_per_token": 2e-3,
        "decode_batch": 8,
        "mean_power_w": 400.0,
        "max_temperature_c": 60.0,
        "mean_temperature_c": 55.0,
        "max_memory_bytes": 2_000_000_000,
        "throttled": False,
        "shared_gpu": False,
        "energy_flags": [],
        "routing_diversity": 0.9,
        "effective_experts": 3.2,
        "load_cv": 0.4,
        "dropped_fraction": 0.0,
        "routing_agreement": 0.8,
        "tokens_per_s": 50_000.0,
        "duration_s": 30.0,
        "train_duration_s": 20.0,
        "gpu_name": "Synthetic GPU",
        "gpu_uuid": "GPU-0",
        "driver_version": "0.0",
        "power_limit_w": 700.0,
        "host": "localhost",
        "device": "cuda",
        "dtype": "bfloat16",
        "versions_json": '{"python": "3.11"}',
        "git_sha": "0" * 40,
        "started_at": START,
    }
    return TrialRecord(**{**values, **changes})


def point(trial_id: str = "t0", **changes: Any) -> PointRecord:
    """One row of `points`."""
    values: dict[str, Any] = {
        "sweep_id": SWEEP,
        "trial_id": trial_id,
        "attempt": 0,
        "config_fingerprint": f"config-{trial_id}-1",
        "trial_fingerprint": f"config-{trial_id}",
        "seed": 0,
        "state": "COMPLETED",
        "censored": False,
        "router": "topk",
        "energy_lambda": 0.0,
        "top_k": 2,
        "num_experts": 4,
        "schedule": "cosine",
        "epochs": 1,
        "eval_loss_nats": 3.7,
        "tokens_trained": 50_000,
        "train_energy_j": 50.0,
        "train_energy_uncertainty_j": 0.7,
        "energy_source": "counter",
        "shared_gpu": False,
        "gpu_name": "Synthetic GPU",
        "gpu_uuid": "GPU-0",
        "power_limit_w": 700.0,
    }
    return PointRecord(**{**values, **changes})


def epochs(record: TrialRecord) -> list[EpochRecord]:
    """Curves that end at the trial's loss and joules."""
    rows = []
    for epoch in range(record.epochs + 1):
        share = epoch / record.epochs
        later = epoch > 0
        rows.append(
            EpochRecord(
                sweep_id=record.sweep_id,
                trial_id=record.trial_id,
                attempt=record.attempt,
                epoch=epoch,
                train_loss_nats=record.eval_loss_nats + 2 * (1 - share) if later else None,
                aux_loss=0.01 if later else None,
                eval_loss_nats=record.eval_loss_nats + 2 * (1 - share) ** 2,
                eval_bits_per_byte=0.4 * (record.eval_loss_nats + 2 * (1 - share) ** 2),
                learning_rate=1e-3 if later else None,
                tokens_trained=int(record.tokens_trained * share),
                epoch_energy_j=record.train_energy_j / record.epochs if later else None,
                epoch_energy_uncertainty_j=0.5 if later else None,
                train_energy_j=record.train_energy_j * share,
                modelled_energy_j=record.train_energy_j / record.epochs * 1.03 if later else None,
                eval_energy_j=2.0,
                energy_source=record.energy_source,
                duration_s=10.0 if later else None,
                tokens_per_s=50_000.0 if later else None,
                mean_power_w=400.0 if later else None,
                max_temperature_c=50.0 + 5 * epoch,
                routing_diversity=1 - 0.1 * share,
                effective_experts=4 - 0.8 * share,
                load_cv=0.4 * share,
                dropped_fraction=0.0,
                routing_agreement=1 - 0.2 * share,
                expert_load=[[0.25 + 0.1 * share, 0.25, 0.25, 0.25 - 0.1 * share]] * 2,
                layer_effective_experts=[4 - 0.5 * share, 4 - 1.1 * share],
                **_audit(record, share),
            )
        )
    return rows


def _audit(record: TrialRecord, share: float) -> dict[str, Any]:
    """Two layers, of which the second takes back two thirds of λ; nothing without a price."""
    if not record.energy_lambda:
        return {}
    undone = [0.1 * share * record.energy_lambda, share * record.energy_lambda / 1.5]
    return {
        "layer_price_drift": undone,
        "layer_lambda_undone": undone,
        "layer_price_flip_fraction": [0.3, 0.3 - 0.2 * share],
        "layer_logit_std": [1.0, 1.0 + share],
    }


def power(record: TrialRecord, samples: int = 60) -> list[PowerRecord]:
    """A trace of watts with a warm-up, training and a pause."""
    rows = []
    for i in range(samples):
        phase = "setup" if i < 10 else None if 40 <= i < 45 else "train"
        watts = {"setup": 200.0, "train": 400.0, None: 90.0}[phase]
        rows.append(
            PowerRecord(
                sweep_id=record.sweep_id,
                trial_id=record.trial_id,
                attempt=record.attempt,
                device_id=record.gpu_uuid or "cpu",
                time_s=0.5 * i,
                phase=phase,
                power_w=watts + 10 * math.sin(i),
                modelled_power_w=watts + 5.0 if phase == "train" else None,
                temperature_c=40 + 15 * (1 - math.exp(-i / 20)),
                memory_bytes=2_000_000_000,
                sm_utilization=0.9,
                memory_utilization=0.4,
                sm_clock_mhz=1900.0,
                throttle_reasons=4 if 20 <= i < 25 else 0,
            )
        )
    return rows


def anchor(board: str, position: str, joules: float | None, **changes: Any) -> AnchorRecord:
    """One row of `anchors`."""
    values: dict[str, Any] = {
        "sweep_id": SWEEP,
        "trial_id": board,
        "attempt": 0 if position == "start" else 1,
        "session": "s1",
        "position": position,
        "gpu_uuid": board,
        "gpu_name": "Synthetic GPU",
        "host": "localhost",
        "workload": "anchor 2, torch 2",
        "energy_source": "counter",
        "j_per_token": joules,
        "energy_j": 8000.0,
        "shared": False,
        "started_at": START,
    }
    return AnchorRecord(**{**values, **changes})


def write_anchors(store: Store, *rows: AnchorRecord) -> None:
    """Each reading in a file of its own, as boards write them."""
    for row in rows:
        store.write(AnchorRecord, [row], sweep_id=row.sweep_id, trial_id=row.trial_id, attempt=row.attempt)


def sweep(sizes: tuple[int, int, int] = (2, 3, 3), seed: int = 0) -> list[TrialRecord]:
    """Routers × λ × seeds: the energy router reaches a loss with about a fifth fewer joules."""
    rng = np.random.default_rng(seed)
    top_ks, lambdas, seeds = sizes
    rows = []
    for k in range(1, top_ks + 1):
        for i in range(lambdas):
            energy_lambda = 0.0 if i == 0 else 0.1 * 3.0**i
            for s in range(seeds):
                joules = (90 + 60 * k) * (1 - 0.12 * i) * (1 + 0.005 * rng.standard_normal())
                loss = 3.6 - 0.15 * k + 0.05 * i**2 + 0.003 * rng.standard_normal()
                rows.append(
                    trial(
                        f"k{k}-l{i}-s{s}",
                        config_fingerprint=f"k{k}-l{i}",
                        seed=s,
                        router="energy" if i else "topk",
                        energy_lambda=energy_lambda,
                        top_k=k,
                        train_energy_j=joules,
                        train_energy_uncertainty_j=0.01 * joules,
                        total_energy_j=joules + 35,
                        eval_loss_nats=loss,
                        eval_perplexity=math.exp(loss),
                        eval_bits_per_byte=loss * 0.4,
                        effective_experts=3.5 - 0.4 * i,
                        routing_diversity=1 - 0.1 * i,
                        decode_j_per_token=1e-3 * (1 + 0.5 * k - 0.2 * i),
                        train_duration_s=joules / 5,
                        started_at=START + dt.timedelta(minutes=len(rows)),
                    )
                )
    return rows


def anytime(sizes: tuple[int, int, int] = (2, 2, 2)) -> list[TrialRecord]:
    """The same sweep with trials that pass through every number of epochs."""
    config = '{"anytime": true, "epochs": 2}'
    return [dataclasses.replace(row, config_json=config, schedule="wsd") for row in sweep(sizes)]


def write(out: Path | str, rows: list[TrialRecord]) -> Store:
    """A store with all four tables of these trials, a file per attempt."""
    store = Store(out)
    for row in rows:
        key = {"sweep_id": row.sweep_id, "trial_id": row.trial_id, "attempt": row.attempt}
        for record, found in tables_of(row).items():
            store.write(record, found, **key)
    return store


def write_compacted(out: Path | str, rows: list[TrialRecord]) -> Store:
    """The same, a file per sweep: much faster to write and to read where there are hundreds of trials."""
    store = Store(out)
    files: dict[tuple[type[Record], str], list[Record]] = {}
    for row in rows:
        for record, found in tables_of(row).items():
            files.setdefault((record, row.sweep_id), []).extend(found)
    for (record, sweep_id), found in files.items():
        folder = f"{store.root}/{record.TABLE}/sweep_id={sweep_id}"
        parquet.write(to_table(record, found), f"{folder}/{parquet.COMPACTED}")
    return store


def tables_of(row: TrialRecord) -> dict[type[Record], list[Record]]:
    """A trial's rows of each table."""
    if row.train_energy_j is None or row.eval_loss_nats is None or row.tokens_trained is None:
        return {TrialRecord: [row]}
    curves = epochs(row)
    ends = [
        point(
            row.trial_id,
            sweep_id=row.sweep_id,
            attempt=row.attempt,
            seed=row.seed,
            config_fingerprint=f"{row.config_fingerprint}-{curve.epoch}",
            trial_fingerprint=row.config_fingerprint,
            router=row.router,
            energy_lambda=row.energy_lambda,
            top_k=row.top_k,
            epochs=curve.epoch,
            schedule=row.schedule,
            eval_loss_nats=curve.eval_loss_nats,
            train_energy_j=curve.train_energy_j,
            energy_source=row.energy_source,
            gpu_name=row.gpu_name,
            gpu_uuid=row.gpu_uuid,
            power_limit_w=row.power_limit_w,
        )
        for curve in curves[1:]
    ]
    return {TrialRecord: [row], EpochRecord: [*curves], PowerRecord: [*power(row)], PointRecord: [*ends]}
