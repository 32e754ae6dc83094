"""Rows of a trial: its columns of configuration, routing, prices, outcome and energy."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hwcost import PowerSample
from pipelines.config import TrialConfig
from pipelines.evaluation import Evaluation
from pipelines.ledger import any_true
from pipelines.opening import OpeningCase
from pipelines.prices import Prices
from pipelines.records import EpochRecord, PointRecord, PowerRecord, TrialRecord

DECODE_BATCHES = (1, 8, 32, 128)
"""Batches of decoding that have columns of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialKey:
    """Which attempt of which trial of which sweep."""

    sweep_id: str
    trial_id: str
    attempt: int = 0

    @property
    def name(self) -> str:
        """The attempt within its sweep."""
        return f"{self.trial_id}-{self.attempt}"


#: How a trial may end for good; whatever else ended it, `--resume` runs it again.
FINAL = (None, "itself", "scheduler")


def is_final(row: TrialRecord) -> bool:
    """Whether a row is the last word on its trial."""
    return row.ended_by in FINAL


def price_columns(config: TrialConfig, prices: Mapping[str, Prices]) -> dict[str, Any]:
    """The prices of a trial, normalised and in joules, by phase."""
    train, decode = prices["train"], prices["decode"]
    return {
        "price_c_ref_j": train.c_ref_j,
        "price_join": list(train.join),
        "price_open": list(train.open),
        "price_profile": train.profile,
        "price_lambda_per_j": train.lambda_per_j(config.energy_lambda) if config.is_priced else None,
        "price_prefill_c_ref_j": prices["prefill"].c_ref_j,
        "price_prefill_join": list(prices["prefill"].join),
        "price_decode_c_ref_j": decode.c_ref_j,
        "price_decode_join": list(decode.join),
        "price_decode_open": list(decode.open),
    }


def opening_columns(case: OpeningCase | None) -> dict[str, Any]:
    """Whether router `opening` chose sets, and what the cost model said of it."""
    if case is None:
        return {}
    return {
        "opening_active": case.pays,
        "opening_modelled_saving_j": case.saving_j,
        "opening_modelled_cost_j": case.choosing_j,
        "opening_modelled_share": case.share,
    }


def routing_columns(evaluation: Evaluation) -> dict[str, Any]:
    """The routing columns that trials and epochs share; empty for the dense model."""
    if evaluation.routing is None:
        return {}
    return {
        "routing_diversity": evaluation.routing.routing_diversity,
        "effective_experts": evaluation.routing.effective_experts,
        "load_cv": evaluation.routing.load_cv,
        "logit_std": evaluation.routing.logit_std,
        "routing_agreement": evaluation.routing.unpriced_agreement,
        "price_flip_fraction": evaluation.routing.price_flip_fraction,
    }


def layer_columns(evaluation: Evaluation) -> dict[str, Any]:
    """The routing columns that epochs alone have, most of them by layer; empty for the dense model."""
    routing = evaluation.routing
    if routing is None:
        return {}
    return {
        "max_violation": routing.max_violation,
        "dead_experts": routing.dead_experts,
        "domain_specialisation": routing.domain_specialisation,
        "expert_load": routing.load_LE,
        "layer_effective_experts": routing.layer_effective_experts,
        "layer_max_violation": routing.layer_max_violation,
        "layer_dead_experts": routing.layer_dead_experts,
        "layer_domain_specialisation": routing.layer_domain_specialisation,
        "layer_routing_agreement": routing.layer_unpriced_agreement,
        "layer_logit_std": routing.layer_logit_std,
    }


def config_columns(config: TrialConfig) -> dict[str, Any]:
    """The configuration columns of a `trials` row; what does not apply is null."""
    moe = not config.is_dense
    inner = 4 * config.n_embd
    regularized = moe and config.regularizer_weight != 0 and config.regularizer != "none"
    return {
        "config_fingerprint": config.fingerprint,
        "seed": config.seed,
        "config_json": json.dumps(config.model_dump(mode="json"), sort_keys=True),
        "base": config.base,
        "router": config.router,
        "energy_lambda": config.energy_lambda if moe and config.is_priced else None,
        "top_k": config.top_k if moe and config.router != "topp" else None,
        "num_experts": len(config.width_factors) if moe else None,
        "expert_widths": [round(f * inner / 8) * 8 for f in config.width_factors] if moe else None,
        "price": config.price if moe and config.uses_price else None,
        "regularizer": config.regularizer if regularized else None,
        "regularizer_weight": config.regularizer_weight if regularized else None,
        "temperature": config.temperature if moe else None,
        "epochs": config.epochs,
        "schedule": config.schedule,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the known values; None where there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def parse_row(text: str) -> TrialRecord:
    """A `trials` row from its JSON."""
    values = json.loads(text)
    return TrialRecord(**{**values, "started_at": dt.datetime.fromisoformat(values["started_at"])})


def perplexity(loss_nats: float) -> float | None:
    """exp(loss), None where it is beyond a float."""
    return None if loss_nats > 700 else float(torch.tensor(loss_nats, dtype=torch.float64).exp())


def one_line(error: BaseException) -> str:
    """An exception as one line: its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def point_of(record: TrialRecord, **changes: Any) -> PointRecord:
    """A point from its trial's row: the trial's own end, or what `changes` say of an earlier one.

    What became of the trial (`state`, `censored`) stands on every point of it; the GPU was shared where it was for
    either.
    """
    names = {field.name for field in dataclasses.fields(PointRecord)}
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name in names}
    values |= {"trial_fingerprint": record.config_fingerprint, **changes}
    return PointRecord(**values | {"shared_gpu": any_true((record.shared_gpu, values["shared_gpu"]))})


def power_records(key: TrialKey, samples: Sequence[PowerSample], origin_s: float) -> list[PowerRecord]:
    """The power trace since the attempt began."""
    names = {field.name for field in dataclasses.fields(PowerRecord)}
    rows = []
    for sample in samples:
        time_s = sample.time_s - origin_s
        if time_s >= 0:
            values = {k: v for k, v in dataclasses.asdict(sample).items() if k in names}
            rows.append(PowerRecord(**dataclasses.asdict(key), **(values | {"time_s": time_s})))
    return rows


def continued(rows: Sequence[Mapping[str, Any]], key: TrialKey) -> list[EpochRecord]:
    """Epochs of an earlier attempt as this attempt's own, so that every attempt's history is whole."""
    return [EpochRecord(**{**row, "attempt": key.attempt}) for row in rows]
