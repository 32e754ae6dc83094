"""What MLflow shows of a record: its parameters, metrics, tags and times. Pure functions."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
import urllib.parse
from collections.abc import Sequence
from typing import Any

from pipelines.records import EpochRecord, TrialRecord

#: Configuration columns of `trials`: parameters of the run, the numeric ones metrics too.
PARAMS = (
    "base",
    "router",
    "energy_lambda",
    "top_k",
    "num_experts",
    "price",
    "regularizer",
    "regularizer_weight",
    "temperature",
    "epochs",
    "schedule",
    "batch_size",
    "seq_len",
    "seed",
    "dtype",
)
_TAGS = (
    "sweep_id",
    "trial_id",
    "attempt",
    "state",
    "censored",
    "error",
    "config_fingerprint",
    "corpus_fingerprint",
    "energy_source",
    "gpu_name",
    "gpu_uuid",
    "driver_version",
    "power_limit_w",
    "shared_gpu",
    "throttled",
    "host",
    "git_sha",
    "expert_widths",
)
#: Columns `layer_<name>` of `epochs` that are curves of their own: effective experts, and the audit of absorption.
_BY_LAYER = ("effective_experts", "price_drift", "lambda_undone", "price_flip_fraction", "logit_std")
_KEYS = ("sweep_id", "trial_id", "attempt", "epoch")
_TAG_LIMIT = 5000


def trial_params(record: TrialRecord) -> dict[str, str]:
    """The configuration as strings; what a router does not have is left out."""
    values = {name: getattr(record, name) for name in PARAMS}
    values["regularizer"] = values["regularizer"] or "none"
    return {name: _text(value) for name, value in values.items() if value is not None}


def trial_metrics(record: TrialRecord) -> dict[str, float]:
    """Every finite number of the row, configuration included (parameters are strings and cannot be plotted)."""
    skipped = {*_KEYS, "error"}
    return _numbers({f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in skipped})


def trial_tags(record: TrialRecord) -> dict[str, str]:
    """Identity, outcome and provenance; `joules` says whether they were measured or modelled."""
    tags = {name: _text(getattr(record, name))[:_TAG_LIMIT] for name in _TAGS if getattr(record, name) is not None}
    if record.energy_source is not None:
        tags["joules"] = "modelled" if record.energy_source == "modelled" else "measured"
    return {**tags, "kind": "trial"}


def epoch_metrics(record: EpochRecord) -> dict[str, float]:
    """The numbers of an epoch as `epoch/<column>`; some of each layer beside their mean, `epoch/<column>_layer_<n>`."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in _KEYS}
    for name in _BY_LAYER:
        values |= {f"{name}_layer_{n}": value for n, value in enumerate(values[f"layer_{name}"] or [])}
    return {f"epoch/{name}": value for name, value in _numbers(values).items()}


def epoch_times(record: TrialRecord, epochs: Sequence[EpochRecord]) -> list[int]:
    """Wall-clock label of each epoch in ms: the start and the training seconds so far."""
    times, seconds = [], 0.0
    for row in epochs:
        seconds += row.duration_s or 0.0
        times.append(start_ms(record) + int(1000 * seconds))
    return times


def start_ms(record: TrialRecord) -> int:
    """Start of the attempt in ms since 1970."""
    started = record.started_at
    if started.tzinfo is None:
        started = started.replace(tzinfo=dt.UTC)
    return int(started.timestamp() * 1000)


def end_ms(record: TrialRecord) -> int:
    """End of the attempt in ms since 1970."""
    return start_ms(record) + int(1000 * (record.duration_s or 0.0))


def compare_link(run_ids: Sequence[str], experiment: str, base: str) -> str:
    """The UI's page that compares runs; the fragment never reaches the server, so its length is no matter."""
    runs = urllib.parse.quote(json.dumps(list(run_ids), separators=(",", ":")))
    experiments = urllib.parse.quote(json.dumps([experiment]))
    return f"{base.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    kept = {name: value for name, value in values.items() if isinstance(value, bool | int | float)}
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def chart_view(sweep_id: str) -> tuple[str, str]:
    """A view of the MLflow UI's chart page: loss against joules and seconds, parallel coordinates, curves.

    The UI keeps shared views as tags of the experiment; a link that names the view's key opens it.

    Returns:
        The view's key, and its JSON.
    """
    section = "joulemoe-front"
    base = {"metricSectionId": section, "deleted": False, "isGenerated": False, "runsCountToCompare": 1000}
    joules, loss = {"key": "train_energy_j", "type": "METRIC"}, {"key": "eval_loss_nats", "type": "METRIC"}
    seconds = {"key": "train_duration_s", "type": "METRIC"}
    curve = {"type": "LINE", "metricKey": "epoch/eval_loss_nats", "xAxisKey": "step", "useGlobalXaxisKey": False}
    axes = {
        "selectedParams": ["router", "top_k", "energy_lambda", "regularizer"],
        "selectedMetrics": ["decode_j_per_token", "train_energy_j", "eval_loss_nats"],
    }
    cards: list[dict[str, Any]] = [
        {"type": "SCATTER", "displayName": "Loss against joules", "xaxis": joules, "yaxis": loss},
        {"type": "PARALLEL", "displayName": "Configuration, joules, loss", "showAllRuns": True, **axes},
        {"type": "SCATTER", "displayName": "Loss against seconds", "xaxis": seconds, "yaxis": loss},
        {"displayName": "Loss over epochs", "selectedMetricKeys": ["epoch/eval_loss_nats"], **curve},
    ]
    view = {
        "searchFilter": f"tags.sweep_id = '{sweep_id}' AND tags.kind = 'trial'",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [{**base, "uuid": f"joulemoe-{i}", **card} for i, card in enumerate(cards)],
        "compareRunSections": [{"uuid": section, "name": "Front", "display": True, "isReordered": True}],
        "isAccordionReordered": True,
        "runListHidden": True,
        "viewMaximized": True,
    }
    key = "joulemoe-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in sweep_id)
    return key, json.dumps(view, separators=(",", ":"))
