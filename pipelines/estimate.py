"""What training will cost, before it runs: joules and seconds from the cost model. Modelled, and called so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hwcost import CostModel
from hwcost.ops import ModelShape
from moe import ROUTERS
from pipelines.config import MEASURE_S, WARMUP_S, TrialConfig
from pipelines.model import expert_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Modelled joules and seconds of the training of some trials, one after the other.

    `phases_s` is what they take to measure prefill and decode, by their settings; `shapes` is how many models of
    different code there are to compile, once per process.
    """

    energy_j: float
    duration_s: float
    phases_s: float
    shapes: int
    analytic: bool
    profile: str
    flags: tuple[str, ...] = ()


def estimate(
    trials: Sequence[TrialConfig], *, gpu_name: str | None, epoch_tokens: int, power_limit_w: float | None = None
) -> Estimate:
    """Training joules and seconds of trials on a GPU.

    Args:
        trials: what will run; decay branches of anytime trials count.
        gpu_name: the GPU; None takes the analytic default.
        epoch_tokens: tokens of an epoch where a trial does not cap them (`max_train_tokens`).
        power_limit_w: the GPU's enforced limit; None: not known, the profile of its name serves.
    """
    model = CostModel.for_device(gpu_name, power_limit_w)
    energy_j = duration_s = 0.0
    flags: dict[str, None] = {}
    for trial in trials:
        cost = model.get_cost(
            "train_step", batch_size=trial.batch_size, seq_len=trial.seq_len, shape=shape_of(trial), extrapolate=True
        )
        tokens = min(trial.max_train_tokens or epoch_tokens, epoch_tokens)
        steps = epochs_trained(trial) * max(1, tokens // (trial.batch_size * trial.seq_len))
        energy_j += steps * cost.energy_j
        duration_s += steps * cost.duration_s
        flags.update(dict.fromkeys(cost.flags))
    return Estimate(
        energy_j=energy_j,
        duration_s=duration_s,
        phases_s=sum(phases_s(trial) for trial in trials),
        shapes=len({code_of(trial) for trial in trials}),
        analytic=model.analytic,
        profile=model.profile.name,
        flags=tuple(flags),
    )


def phases_s(trial: TrialConfig) -> float:
    """Seconds of measuring prefill and decode on a GPU, warm-up included."""
    phases = int(trial.prefill) + len(trial.decode_batches)
    return phases * ((trial.measure_seconds or MEASURE_S["cuda"]) + WARMUP_S["cuda"])


def code_of(trial: TrialConfig) -> tuple[object, ...]:
    """What tells compiled code apart, as far as settings go (`warm.shape_of` knows it from the model)."""
    widths: tuple[object, ...] = (trial.base, trial.dropout, trial.n_embd, trial.n_layer, trial.n_head)
    batch = (trial.batch_size, trial.seq_len, trial.dtype)
    if trial.is_dense:
        return (*widths, *batch)
    regularized = (trial.regularizer, trial.regularizer_weight) if trial.regularizer_weight else None
    seed = None if ROUTERS[trial.router].learned else trial.seed
    routed = (trial.router, seed, trial.top_k, trial.width_factors, trial.moe_layers, regularized)
    return (
        *widths,
        *batch,
        *routed,
        trial.router_jitter,
        trial.bias_balance_rate,
        trial.capacity_factor,
        trial.top_p,
    )


def epochs_trained(trial: TrialConfig) -> float:
    """Epochs of training steps: of an anytime trial the trunk once and every decay."""
    if not trial.anytime:
        return float(trial.epochs)
    branches = trial.decay_fraction * sum(range(1, trial.epochs))
    return trial.epochs + branches


def shape_of(trial: TrialConfig) -> ModelShape:
    """The shape of a trial's model."""
    widths = () if trial.is_dense else tuple(expert_width(f, 4 * trial.n_embd) for f in trial.width_factors)
    return ModelShape(
        d_model=trial.n_embd,
        num_layers=trial.n_layer,
        num_heads=trial.n_head,
        expert_widths=widths,
        top_k=trial.top_k,
        moe_layers=None if trial.moe_layers is None else len(trial.moe_layers),
        dtype="fp32" if trial.dtype == "fp32" else "bf16",
    )
