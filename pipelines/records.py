"""The tables of a sweep: the one place where a column's name, type, unit and meaning stand.

Each table is a frozen dataclass whose fields carry their documentation. The Arrow schema, the
documentation (`joulemoe schema`) and every reader are built from these classes, so a column is added
by adding a field. Unknown is `None` (null), never 0.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from pipelines import parquet

#: 1: the first. 2: `trials` gained `anchor_j_per_token` (null in older files).
#: 3: `trials` gained `ended_by` and `branches_energy_j` (null in older files).
#: 4: `power` gained `memory_clock_mhz` (null in older files); the table `anchors`.
#: 5: `adapt` gained `modelled_j`, `update_energy_j` and `memory_fraction` (null in older files).
SCHEMA_VERSION = 5


def column(meaning: str, *, unit: str = "", null: str = "") -> Any:
    """A documented field: what it means, its unit, and what null says (empty: never null)."""
    meta = {"meaning": meaning, "unit": unit, "null": null}
    if null:
        return dataclasses.field(default=None, metadata=meta)
    return dataclasses.field(metadata=meta)


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One row per attempt of a trial: configuration, outcome, energy, provenance."""

    TABLE: ClassVar[str] = "trials"

    # identity
    sweep_id: str = column("sweep this trial belongs to")
    trial_id: str = column("trial within the sweep")
    attempt: int = column("attempt of the trial, 0 first")
    config_fingerprint: str = column("hash of the effective configuration without the seed; replicates share it")
    seed: int = column("random seed")
    state: str = column("COMPLETED, STOPPED (ended early by a scheduler or a budget) or FAILED")
    censored: bool = column("true where the trial ended before its configured epochs; never on a final front")
    error: str | None = column("reason of a FAILED trial, one line", null="did not fail")
    ended_by: str | None = column("itself, scheduler, budget, interrupt, timeout, storage (it could not be written to) or died (its process); only the first two are final: the others run again at --resume", null="written by an older version: itself")
    config_json: str = column("the whole configuration as JSON")
    # configuration
    base: str = column("base checkpoint: hub name, folder or 'random'")
    router: str = column("router name; 'dense' is the plain model")
    energy_lambda: float | None = column("energy price λ", unit="nat per c_ref", null="router without a price")
    top_k: int | None = column("experts selected per token", null="dense, or K varies")
    num_experts: int | None = column("experts per MoE layer, null experts included", null="dense")
    expert_widths: list[int] | None = column("inner width of each expert; 0 is a null expert", unit="neurons", null="dense")
    price: str | None = column("what the prices are made of", null="router without a price")
    regularizer: str | None = column("router regularizer", null="none")
    regularizer_weight: float | None = column("weight of the regularizer", null="no regularizer")
    temperature: float | None = column("router softmax temperature τ", null="dense")
    epochs: int = column("epochs as configured")
    schedule: str = column("learning-rate schedule")
    batch_size: int = column("sequences per optimizer step", unit="sequences")
    seq_len: int = column("tokens per sequence", unit="tokens")
    parameters: int | None = column("parameters of the model", null="not built")
    active_parameters: int | None = column("parameters that a token passes through, on average", null="not known")
    # loss
    eval_loss_nats: float | None = column("next-token cross-entropy, validation split", unit="nat/token", null="no evaluation")
    test_loss_nats: float | None = column("next-token cross-entropy, test split", unit="nat/token", null="no test split or not asked for")
    eval_perplexity: float | None = column("exp(eval_loss_nats)", null="no evaluation")
    eval_bits_per_byte: float | None = column("validation loss per byte of text", unit="bit/byte", null="no evaluation")
    converged_at: int | None = column("first epoch after which validation loss improves by less than 0.5 %", unit="epoch", null="not yet")
    tokens_trained: int | None = column("target tokens of all training steps", unit="tokens", null="did not train")
    corpus_fingerprint: str | None = column("hash of the token ids of all splits", null="data was not read")
    # energy
    energy_source: str | None = column("counter, integrated, rapl or modelled", null="nothing measured")
    train_energy_j: float | None = column("training steps of all epochs, all attempts that count", unit="J", null="not measurable")
    train_energy_uncertainty_j: float | None = column("standard uncertainty of train_energy_j", unit="J", null="not known")
    train_energy_dynamic_j: float | None = column("train_energy_j above idle power", unit="J", null="idle power not known")
    setup_energy_j: float | None = column("load, compile, warm-up", unit="J", null="not measurable")
    eval_energy_j: float | None = column("evaluation, prefill and decode", unit="J", null="not measurable")
    idle_energy_j: float | None = column("rest of the trial's span: between the windows", unit="J", null="not measurable")
    lost_energy_j: float | None = column("work of earlier attempts that was lost", unit="J", null="not measurable")
    branches_energy_j: float | None = column("decay branches of an anytime trial: the points of other epoch counts", unit="J", null="no branches")
    total_energy_j: float | None = column("setup + train + eval + branches + idle + lost, over all attempts up to this one", unit="J", null="not measurable")
    train_j_per_token: float | None = column("train_energy_j / tokens_trained", unit="J/token", null="not measurable")
    anchor_j_per_token: float | None = column("joules per token of the anchor workload on this board as the session began (`anchors` has all readings)", unit="J/token", null="not measured")
    prefill_j_per_token: float | None = column("prefill, per prompt token", unit="J/token", null="not measured")
    decode_j_per_token: float | None = column("decode at decode_batch, per generated token", unit="J/token", null="not measured")
    decode_batch: int | None = column("batch of decode_j_per_token", unit="sequences", null="not measured")
    decode_j_per_token_b1: float | None = column("decode at batch 1", unit="J/token", null="not measured")
    decode_j_per_token_b8: float | None = column("decode at batch 8", unit="J/token", null="not measured")
    decode_j_per_token_b32: float | None = column("decode at batch 32", unit="J/token", null="not measured")
    decode_j_per_token_b128: float | None = column("decode at batch 128", unit="J/token", null="not measured")
    prefill_tokens_per_s: float | None = column("prompt tokens of prefill over its time", unit="tokens/s", null="not measured, or written by an older version")
    decode_tokens_per_s_b1: float | None = column("generated tokens of decode at batch 1 over its time, prompts included", unit="tokens/s", null="not measured, or written by an older version")
    decode_tokens_per_s_b8: float | None = column("the same at batch 8", unit="tokens/s", null="not measured, or written by an older version")
    decode_tokens_per_s_b32: float | None = column("the same at batch 32", unit="tokens/s", null="not measured, or written by an older version")
    decode_tokens_per_s_b128: float | None = column("the same at batch 128", unit="tokens/s", null="not measured, or written by an older version")
    modelled_train_energy_j: float | None = column("train_energy_j as the cost model predicts it", unit="J", null="no calibrated profile of this GPU, or not compiled (see energy_flags)")
    mean_power_w: float | None = column("mean power over the training windows", unit="W", null="not measurable")
    max_temperature_c: float | None = column("highest temperature in the training windows", unit="°C", null="not readable")
    mean_temperature_c: float | None = column("mean temperature in the training windows", unit="°C", null="not readable")
    max_memory_bytes: int | None = column("highest memory in use on the device", unit="byte", null="not readable")
    throttled: bool | None = column("clocks were held down by heat or power during training", null="not readable")
    shared_gpu: bool | None = column("another process used the device: kept off fronts", null="not known")
    energy_flags: list[str] | None = column("what the monitor found wrong, and what the cost model could not predict or had to extrapolate (cost_model:...)", null="nothing measured")
    # prices
    price_c_ref_j: float | None = column("c_ref: marginal joules per token of the dense FFN", unit="J/token", null="router without a price")
    price_join: list[float] | None = column("normalised join price of each expert", unit="c_ref", null="router without a price")
    price_open: list[float] | None = column("normalised opening price of each expert", unit="c_ref", null="router without a price")
    price_profile: str | None = column("cost-model profile the prices come from", null="router without a price")
    price_lambda_per_j: float | None = column("λ in nats per joule of training: energy_lambda / price_c_ref_j; those of prefill and decode are energy_lambda / price_prefill_c_ref_j and energy_lambda / price_decode_c_ref_j", unit="nat/J", null="router without a price")
    price_prefill_c_ref_j: float | None = column("c_ref of prefill", unit="J/token", null="router without a price")
    price_prefill_join: list[float] | None = column("normalised join prices of prefill", unit="c_ref", null="router without a price")
    price_decode_c_ref_j: float | None = column("c_ref of decode", unit="J/token", null="router without a price")
    price_decode_join: list[float] | None = column("normalised join prices of decode", unit="c_ref", null="router without a price")
    price_decode_open: list[float] | None = column("normalised opening prices of decode", unit="c_ref", null="router without a price")
    opening_active: bool | None = column("router `opening` chose sets, as weighed at the first decode batch; false: it would not pay, plain priced top-k routed. While another decode batch is measured, what pays there holds", null="another router, or no GPU")
    opening_modelled_saving_j: float | None = column("what the experts closed at this λ are expected to save of a decode step at the first decode batch, modelled", unit="J", null="another router, or no GPU")
    opening_modelled_cost_j: float | None = column("what choosing the sets of that step takes, modelled", unit="J", null="another router, or no GPU")
    opening_modelled_share: float | None = column("share of that step's time that choosing takes, modelled", null="another router, or no GPU")
    price_drift: float | None = column("drift of mean logits along the price since the start", unit="nat per c_ref", null="router without a price")
    price_flip_fraction: float | None = column("share of decisions that flip when λ → 0", null="router without a price")
    lambda_undone: float | None = column("part of λ that the gate has taken back since the start: price_drift / τ, mean over layers", unit="nat per c_ref", null="router without a price")
    logit_std: float | None = column("standard deviation of the router logits", unit="nat", null="dense")
    # routing
    routing_diversity: float | None = column("fraction of experts used, mean over layers", null="dense")
    effective_experts: float | None = column("exp(entropy of the load), mean over layers", null="dense")
    load_cv: float | None = column("std(n_e)/mean(n_e), mean over layers", null="dense")
    dropped_fraction: float | None = column("share of the choices dropped by capacity while training, mean over the epochs' rows; 0 for a router that drops none", null="dense, or did not train")
    open_experts: float | None = column("distinct experts open per evaluation batch, mean over layers", null="dense")
    mean_selected_width: float | None = column("mean inner width that a token passes through per layer", unit="neurons", null="dense")
    routing_agreement: float | None = column("agreement with the same checkpoint at λ = 0, chance taken off", null="dense, or K = E")
    # speed and provenance
    tokens_per_s: float | None = column("training tokens per second of the training windows", unit="tokens/s", null="did not train")
    duration_s: float | None = column("span of the attempt", unit="s", null="not known")
    train_duration_s: float | None = column("sum of the training windows", unit="s", null="did not train")
    gpu_name: str | None = column("device model", null="no GPU")
    gpu_uuid: str | None = column("device UUID", null="no GPU")
    driver_version: str | None = column("GPU driver", null="no GPU")
    power_limit_w: float | None = column("enforced power limit", unit="W", null="not readable")
    host: str | None = column("host name", null="not known")
    device: str | None = column("torch device type", null="not built")
    dtype: str | None = column("compute precision", null="not built")
    versions_json: str | None = column("versions of Python, torch, transformers, ray, joulemoe as JSON", null="not known")
    git_sha: str | None = column("commit of the code", null="not a checkout")
    started_at: dt.datetime = column("wall-clock start: a label, never used for durations")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointRecord:
    """One row per epoch boundary: what this trial would have been had it ended there."""

    TABLE: ClassVar[str] = "points"

    sweep_id: str = column("sweep this trial belongs to")
    trial_id: str = column("trial within the sweep")
    attempt: int = column("attempt of the trial, 0 first")
    config_fingerprint: str = column("hash of the effective configuration of a trial of this many epochs, without the seed")
    trial_fingerprint: str = column("config_fingerprint of the trial that passed through this point")
    seed: int = column("random seed")
    state: str = column("state of the trial's row; a point itself is whole")
    censored: bool = column("true where the trial ended before its configured epochs; a point that it had reached is a valid end, and may be on a front")
    router: str = column("router name")
    energy_lambda: float | None = column("energy price λ", unit="nat per c_ref", null="router without a price")
    top_k: int | None = column("experts selected per token", null="dense, or K varies")
    num_experts: int | None = column("experts per MoE layer, null experts included", null="dense")
    price: str | None = column("what the prices are made of", null="router without a price")
    regularizer: str | None = column("router regularizer", null="none")
    regularizer_weight: float | None = column("weight of the regularizer", null="no regularizer")
    temperature: float | None = column("router softmax temperature τ", null="dense")
    schedule: str = column("learning-rate schedule")
    epochs: int = column("epochs of this point")
    eval_loss_nats: float | None = column("validation cross-entropy at this point", unit="nat/token", null="no evaluation")
    tokens_trained: int | None = column("target tokens up to this point", unit="tokens", null="not known")
    train_energy_j: float | None = column("training joules up to the branch plus the branch's own decay", unit="J", null="not measurable")
    train_energy_uncertainty_j: float | None = column("standard uncertainty", unit="J", null="not known")
    branch_energy_j: float | None = column("joules of the decay branch alone", unit="J", null="no branch: the trunk itself ended here")
    energy_source: str | None = column("counter, integrated, rapl or modelled", null="nothing measured")
    shared_gpu: bool | None = column("another process used the device", null="not known")
    gpu_name: str | None = column("device model", null="no GPU")
    gpu_uuid: str | None = column("device UUID", null="no GPU")
    power_limit_w: float | None = column("enforced power limit", unit="W", null="not readable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One row per epoch of a trial: its curves."""

    TABLE: ClassVar[str] = "epochs"

    sweep_id: str = column("sweep this trial belongs to")
    trial_id: str = column("trial within the sweep")
    attempt: int = column("attempt of the trial, 0 first")
    epoch: int = column("1 after the first epoch; 0 is the model before training")
    train_loss_nats: float | None = column("mean training cross-entropy of the epoch", unit="nat/token", null="epoch 0")
    aux_loss: float | None = column("mean weighted regularizer of the epoch", unit="nat", null="epoch 0, or no regularizer")
    eval_loss_nats: float | None = column("validation cross-entropy after the epoch", unit="nat/token", null="no evaluation")
    eval_bits_per_byte: float | None = column("validation loss per byte of text", unit="bit/byte", null="no evaluation")
    learning_rate: float | None = column("learning rate of the last step", null="epoch 0")
    tokens_trained: int = column("target tokens so far", unit="tokens")
    epoch_energy_j: float | None = column("training joules of this epoch", unit="J", null="not measurable")
    epoch_energy_uncertainty_j: float | None = column("standard uncertainty", unit="J", null="not known")
    train_energy_j: float | None = column("training joules so far", unit="J", null="not measurable")
    modelled_energy_j: float | None = column("training joules of this epoch as the cost model predicts", unit="J", null="no model")
    eval_energy_j: float | None = column("joules of the evaluation after this epoch", unit="J", null="not measurable")
    energy_source: str | None = column("counter, integrated, rapl or modelled", null="nothing measured")
    duration_s: float | None = column("span of the epoch's training window", unit="s", null="epoch 0")
    tokens_per_s: float | None = column("training speed of the epoch", unit="tokens/s", null="epoch 0")
    mean_power_w: float | None = column("mean power of the training window", unit="W", null="not measurable")
    max_temperature_c: float | None = column("highest temperature of the training window", unit="°C", null="not readable")
    routing_diversity: float | None = column("fraction of experts used, mean over layers", null="dense")
    effective_experts: float | None = column("exp(entropy of the load), mean over layers", null="dense")
    load_cv: float | None = column("std(n_e)/mean(n_e), mean over layers", null="dense")
    dropped_fraction: float | None = column("share of the choices dropped by capacity in this epoch's training steps, mean over layers; 0 for a router that drops none", null="dense, or epoch 0")
    routing_agreement: float | None = column("agreement with the same weights at λ = 0, chance taken off", null="dense, or K = E")
    price_drift: float | None = column("drift of mean logits along the price since the start", unit="nat per c_ref", null="router without a price")
    price_flip_fraction: float | None = column("share of decisions that flip when λ → 0", null="router without a price")
    logit_std: float | None = column("standard deviation of the router logits", unit="nat", null="dense")
    expert_load: list[list[float]] | None = column("share of the choices per expert, one list per MoE layer", null="dense")
    layer_effective_experts: list[float] | None = column("effective experts of each MoE layer", null="dense")
    max_violation: float | None = column("max(n_e)/mean(n_e) − 1, mean over layers", null="dense, or written by an older version")
    dead_experts: float | None = column("experts that no token takes, mean over layers", unit="experts", null="dense, or written by an older version")
    domain_specialisation: float | None = column("I(expert; domain)/H(domain), mean over layers", null="dense, one domain, or written by an older version")
    layer_max_violation: list[float] | None = column("max_violation of each MoE layer", null="dense, or written by an older version")
    layer_dead_experts: list[float] | None = column("dead_experts of each MoE layer", unit="experts", null="dense, or written by an older version")
    layer_domain_specialisation: list[float | None] | None = column("domain_specialisation of each MoE layer", null="dense, or written by an older version")
    layer_routing_agreement: list[float | None] | None = column("routing_agreement of each MoE layer", null="router without a price, or written by an older version")
    layer_dropped_fraction: list[float] | None = column("dropped_fraction of each MoE layer", null="dense, epoch 0, or written by an older version")
    lambda_undone: float | None = column("part of λ that the gate has taken back since the start: price_drift / τ, mean over layers", unit="nat per c_ref", null="router without a price")
    layer_price_drift: list[float] | None = column("price_drift of each MoE layer", unit="nat per c_ref", null="router without a price")
    layer_lambda_undone: list[float] | None = column("lambda_undone of each MoE layer", unit="nat per c_ref", null="router without a price")
    layer_price_flip_fraction: list[float] | None = column("price_flip_fraction of each MoE layer", null="router without a price")
    layer_logit_std: list[float] | None = column("logit_std of each MoE layer", unit="nat", null="dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptRecord:
    """One row per window of a test-time run under a joule budget."""

    TABLE: ClassVar[str] = "adapt"

    sweep_id: str = column("always 'adapt'")
    trial_id: str = column("the run")
    attempt: int = column("always 0")
    window: int = column("window of the run, 1 first")
    energy_lambda: float = column("λ in force as the window began", unit="nat per c_ref")
    budget_j_per_token: float = column("the budget", unit="J/token")
    j_per_token: float | None = column("joules of the window per token predicted, adapting included", unit="J/token", null="not measurable")
    energy_j: float | None = column("joules of the window", unit="J", null="not measurable")
    energy_uncertainty_j: float | None = column("standard uncertainty", unit="J", null="not known")
    energy_source: str | None = column("counter, integrated, rapl or modelled", null="nothing measured")
    modelled_j: float | None = column("joules of the window's chunks as the cost model has them at the width selected, updates not in it: modelled, never measured", unit="J", null="no GPU, not compiled or no calibrated profile of it, or written by an older version")
    tokens: int = column("tokens predicted", unit="tokens")
    loss_nats: float = column("mean next-token cross-entropy, each chunk before anything learnt from it", unit="nat/token")
    batch_size: int = column("sequences per chunk", unit="sequences")
    duration_s: float = column("span of the window", unit="s")
    updates: int = column("steps of the biases in the window")
    update_duration_s: float = column("time of these steps, canary included", unit="s")
    update_energy_j: float | None = column("joules of these steps, part of energy_j: energy_j by their share of the window's time", unit="J", null="not measurable, or written by an older version")
    infeasible: bool | None = column("no λ keeps the budget", null="the controller did not hear of the window")
    mean_power_w: float | None = column("mean power", unit="W", null="not measurable")
    max_temperature_c: float | None = column("highest temperature", unit="°C", null="not readable")
    memory_fraction: float | None = column("largest share of the device's memory in use, 0 to 1", null="not readable, several devices, or written by an older version")
    events: list[str] = column("guards that acted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorRecord:
    """One row per reading of the anchor workload (a fixed compiled step) on a board, at both ends of a sweep's session."""

    TABLE: ClassVar[str] = "anchors"

    sweep_id: str = column("sweep that the board served")
    trial_id: str = column("the board: its GPU UUID, or the host's name where no GPU was measured")
    attempt: int = column("reading of this board, 0 first")
    session: str = column("session of the sweep (a resume is another one)")
    position: str = column("start or end of the session")
    skipped: str | None = column("why nothing was measured", null="it was measured")
    gpu_uuid: str | None = column("device UUID", null="no GPU")
    gpu_name: str | None = column("device model", null="no GPU")
    power_limit_w: float | None = column("enforced power limit", unit="W", null="not readable")
    host: str = column("host name")
    workload: str | None = column("version of the anchor and of torch; only readings of one workload compare", null="not measured")
    energy_source: str | None = column("counter or integrated", null="nothing measured")
    j_per_token: float | None = column("joules per token of the anchor", unit="J/token", null="not measured")
    j_per_token_uncertainty: float | None = column("standard uncertainty of j_per_token", unit="J/token", null="not known")
    s_per_step: float | None = column("time of an anchor step", unit="s", null="not measured")
    steps: int | None = column("steps of the reading", null="not measured")
    mean_power_w: float | None = column("mean power of the reading", unit="W", null="not measurable")
    mean_temperature_c: float | None = column("mean temperature of the reading", unit="°C", null="not readable")
    energy_j: float | None = column("joules of the whole reading: build, warm-up, window; part of the sweep's joules, of no trial's", unit="J", null="not measured")
    shared: bool | None = column("another process used the board: the reading corrects nothing", null="not known")
    flags: list[str] | None = column("what the monitor found wrong", null="not measured")
    started_at: dt.datetime = column("wall-clock start: a label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerRecord:
    """The power trace of a trial: timestamped samples of its devices."""

    TABLE: ClassVar[str] = "power"

    sweep_id: str = column("sweep this trial belongs to")
    trial_id: str = column("trial within the sweep")
    attempt: int = column("attempt of the trial, 0 first")
    device_id: str = column("GPU UUID, or 'cpu'")
    time_s: float = column("monotonic time since the attempt began", unit="s")
    phase: str | None = column("innermost energy window open at that time", null="between windows")
    power_w: float | None = column("power", unit="W", null="not readable")
    modelled_power_w: float | None = column("mean power of the phase (training, prefill, decode) as the cost model predicts it", unit="W", null="the phase is not modelled")
    temperature_c: float | None = column("temperature", unit="°C", null="not readable")
    memory_bytes: int | None = column("device memory in use", unit="byte", null="not readable")
    sm_utilization: float | None = column("share of time the multiprocessors were busy", null="not readable")
    memory_utilization: float | None = column("share of time the memory was busy", null="not readable")
    sm_clock_mhz: float | None = column("multiprocessor clock", unit="MHz", null="not readable")
    memory_clock_mhz: float | None = column("memory clock", unit="MHz", null="not readable, or written by an older version")
    throttle_reasons: int | None = column("NVML bit mask of clock event reasons", null="not readable")
# fmt: on


Record = TrialRecord | PointRecord | EpochRecord | AdaptRecord | PowerRecord | AnchorRecord
TABLES: dict[str, type[Record]] = {
    cls.TABLE: cls for cls in (TrialRecord, PointRecord, EpochRecord, AdaptRecord, PowerRecord, AnchorRecord)
}

#: Text that hardly repeats: not worth a dictionary.
_UNIQUE = ("trial_id", "config_fingerprint", "trial_fingerprint", "config_json", "error")

_ARROW: dict[type, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    dt.datetime: pa.timestamp("us", tz="UTC"),
}


_SCHEMAS: dict[type, pa.Schema] = {}


def arrow_schema(record: type[Record]) -> pa.Schema:
    """The explicit Arrow schema of a table, documentation in the field metadata. Made once: every write needs it."""
    if record not in _SCHEMAS:
        _SCHEMAS[record] = _schema(record)
    return _SCHEMAS[record]


def _schema(record: type[Record]) -> pa.Schema:
    hints = typing.get_type_hints(record)
    fields = []
    for field in dataclasses.fields(record):
        doc = {key: value for key, value in field.metadata.items() if value}
        fields.append(
            pa.field(field.name, _arrow_type(hints[field.name]), nullable=bool(field.metadata["null"]), metadata=doc)
        )
    return pa.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION), "table": record.TABLE})


def _arrow_type(hint: Any) -> pa.DataType:
    if isinstance(hint, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is list:
        return pa.list_(pa.field("element", _arrow_type(typing.get_args(hint)[0])))  # as Parquet names it
    return _ARROW[hint]


def to_table(record: type[Record], rows: Iterable[Record]) -> pa.Table:
    """Rows as an Arrow table with the explicit schema (an empty table keeps it too)."""
    return pa.Table.from_pylist([_as_row(row) for row in rows], schema=arrow_schema(record))


def _as_row(record: Record) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


class Store:
    """Where a sweep's tables live: a local folder or any URI that pyarrow.fs opens."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        uri = os.fspath(out)
        if "://" in uri:
            self.fs, self.root = parquet.filesystem(uri)
            self.local = uri.startswith("file://")
        else:
            self.fs, self.root, self.local = pafs.LocalFileSystem(), os.path.abspath(uri), True

    def path(self, record: type[Record], sweep_id: str, trial_id: str, attempt: int) -> str:
        """Where the rows of one attempt stand."""
        return f"{self.root}/{record.TABLE}/sweep_id={sweep_id}/{trial_id}-{attempt}.parquet"

    def write(self, record: type[Record], rows: Sequence[Record], *, sweep_id: str, trial_id: str, attempt: int) -> str:
        """Write one attempt's rows of one table: whole or not at all. Returns the path."""
        target = self.path(record, sweep_id, trial_id, attempt)
        table = to_table(record, rows)
        parquet.write(table, target, None if self.local else self.fs)
        return target

    def of_attempt(self, record: type[Record], sweep_id: str, trial_id: str, attempt: int) -> list[dict[str, Any]]:
        """One attempt's rows of a table; none where its file is not there (or was compacted)."""
        path = self.path(record, sweep_id, trial_id, attempt)
        if not self.fs.get_file_info(path).is_file:
            return []
        return list(pads.dataset(path, schema=arrow_schema(record), filesystem=self.fs).to_table().to_pylist())

    def read(
        self,
        record: type[Record],
        sweep_id: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        trial_ids: Sequence[str] | None = None,
        encode: bool = False,
    ) -> pa.Table:
        """All rows of a table, of one sweep or of all; an empty table where there are none.

        Args:
            record: the table.
            sweep_id: one sweep; all where None.
            columns: only these; all where None. Columns that an older file lacks are null.
            trial_ids: only these trials; all where None.
            encode: text whose values repeat comes as dictionaries: less memory, faster to group.

        Raises:
            ValueError: a file was written by a newer version than this one.
        """
        try:
            return self._read(record, sweep_id, columns, trial_ids, encode)
        except FileNotFoundError:  # compacted while we read
            return self._read(record, sweep_id, columns, trial_ids, encode)

    def _read(
        self,
        record: type[Record],
        sweep_id: str | None,
        columns: Sequence[str] | None,
        trial_ids: Sequence[str] | None,
        encode: bool,
    ) -> pa.Table:
        schema = arrow_schema(record)
        repeated = [f.name for f in schema if encode and f.type == pa.string() and f.name not in _UNIQUE]
        for name in repeated:
            field = schema.field(name)
            schema = schema.set(schema.get_field_index(name), field.with_type(pa.dictionary(pa.int32(), pa.string())))
        paths = self.files(record, sweep_id)
        if not paths:
            return schema.empty_table().select(list(columns) if columns else schema.names)
        form = pads.ParquetFileFormat(dictionary_columns=repeated)
        tables = []
        for part, rows in parquet.without_stale_rows(paths):
            data = pads.dataset(part, schema=schema, format=form, filesystem=self.fs)
            for fragment in data.get_fragments():
                parquet.check_version(fragment, SCHEMA_VERSION)
            if trial_ids is not None:
                wanted = pads.field("trial_id").isin(list(trial_ids))
                rows = wanted if rows is None else rows & wanted
            tables.append(data.to_table(columns=list(columns) if columns else None, filter=rows))
        return pa.concat_tables(tables)

    def files(self, record: type[Record], sweep_id: str | None = None) -> list[str]:
        """Paths of a table's Parquet files, of one sweep or of all, sorted."""
        base = f"{self.root}/{record.TABLE}" + (f"/sweep_id={sweep_id}" if sweep_id else "")
        info = self.fs.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
        return sorted(entry.path for entry in info if entry.is_file and entry.path.endswith(".parquet"))

    def sweep_ids(self) -> list[str]:
        """Ids of the sweeps that have trials here, oldest first."""
        table = self.read(TrialRecord, columns=["sweep_id", "started_at"])
        firsts = table.group_by("sweep_id").aggregate([("started_at", "min")])
        starts = dict(zip(firsts["sweep_id"].to_pylist(), firsts["started_at_min"].to_pylist(), strict=True))
        return sorted(starts, key=lambda sweep_id: (starts[sweep_id], sweep_id))


def schema_markdown() -> str:
    """The documentation of all tables, column by column, as Markdown."""
    lines: list[str] = []
    for name, record in TABLES.items():
        lines += [f"## `{name}`", "", (record.__doc__ or "").strip(), ""]
        lines += ["| column | type | unit | meaning | null means |", "| --- | --- | --- | --- | --- |"]
        for field in arrow_schema(record):
            doc: Mapping[str, str] = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
            cells = (
                f"`{field.name}`",
                str(field.type),
                doc.get("unit", ""),
                doc["meaning"],
                doc.get("null", "never null"),
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def column_unit(name: str) -> str:
    """Unit of a column, by its name in any table; empty where it has none or is not known."""
    for record in TABLES.values():
        for field in dataclasses.fields(record):
            if field.name == name:
                return str(field.metadata["unit"])
    return ""
