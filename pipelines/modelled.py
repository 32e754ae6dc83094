"""What the cost model says of a trial's phases: watts to stand beside the measured ones, joules of its training.

A phase is modelled as the calibration ran it: compiled, with a profile of this GPU's name and power limit. Where that
does not hold nothing is modelled, and a flag says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hwcost import CostModel
from hwcost.cost_model import Cost
from hwcost.ops import ModelShape
from pipelines.config import TrialConfig
from pipelines.model import Hardware, model_shape

TRAIN, PREFILL = "train", "prefill"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """Modelled joules and seconds of one repetition of a phase."""

    energy_j: float
    duration_s: float

    @property
    def power_w(self) -> float:
        """Mean watts while the phase runs."""
        return self.energy_j / self.duration_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseModel:
    """Modelled costs of a trial's phases.

    Attributes:
        costs: by phase: `train` (a step), `prefill` (a batch), `decode_b8` (a generation at batch 8), ...
        flags: why a phase is not modelled, or what the model had to extrapolate.
    """

    costs: Mapping[str, PhaseCost] = dataclasses.field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, config: TrialConfig, model_config: Any, hardware: Hardware, *, selected_width: float | None = None
    ) -> PhaseModel:
        """The phases of a trial.

        Args:
            model_config: of the built model (`n_embd`, `n_layer`, `n_head`, `vocab_size`, `expert_widths`).
            selected_width: mean inner width that a token passes through a layer, where routing was seen; else all
                experts are taken to be chosen alike.
        """
        if hardware.gpu_name is None:  # its joules are modelled already
            return cls()
        cost_model = CostModel.for_device(hardware.gpu_name, hardware.power_limit_w)
        if cost_model.analytic:
            return cls(flags=("cost_model:no_profile",))
        if not hardware.compile:
            return cls(flags=("cost_model:not_compiled",))
        shape = _shape(config, model_config, hardware, selected_width)
        found = {TRAIN: [_cost(cost_model, "train_step", config.batch_size, config.seq_len, shape)]}
        found[PREFILL] = [_cost(cost_model, "prefill", config.batch_size, config.seq_len, shape)]
        for batch in config.decode_batches:
            found[f"decode_b{batch}"] = _generation(cost_model, batch, config, shape)
        flags = {f"cost_model:{flag}" for parts in found.values() for part in parts for flag in part.flags}
        return cls(costs={phase: _sum(parts) for phase, parts in found.items()}, flags=tuple(sorted(flags)))

    def power_w(self, phase: str) -> float | None:
        """Mean watts of a phase; None where it is not modelled."""
        cost = self.costs.get(phase)
        return None if cost is None else cost.power_w

    def training_j(self, steps: int) -> float | None:
        """Joules of training steps; None where they are not modelled."""
        cost = self.costs.get(TRAIN)
        return None if cost is None else cost.energy_j * steps


def _shape(config: TrialConfig, model_config: Any, hardware: Hardware, selected_width: float | None) -> ModelShape:
    shape = model_shape(model_config, hardware)
    if config.is_dense:
        return dataclasses.replace(shape, expert_widths=(), moe_layers=None)
    return shape if selected_width is None else at_width(shape, selected_width)


def at_width(shape: ModelShape, selected_width: float) -> ModelShape:
    """The shape with what was routed, not what could have been: all experts as wide as those selected on average.

    Args:
        selected_width: mean inner width that a token passes through a layer, its K experts together, neurons.
    """
    widths = (round(selected_width / shape.top_k),) * shape.num_experts
    return dataclasses.replace(shape, expert_widths=widths)


def _cost(cost_model: CostModel, op: str, batch: int, seq_len: float, shape: ModelShape) -> Cost:
    return cost_model.get_cost(op, batch_size=batch, seq_len=seq_len, shape=shape, extrapolate=True)


def _generation(cost_model: CostModel, batch: int, config: TrialConfig, shape: ModelShape) -> list[Cost]:
    """A prompt, then new tokens; joules are linear in the cache, so its mean length stands for all of them."""
    prompt, new = config.decode_prompt_tokens, config.decode_new_tokens
    step = _cost(cost_model, "decode_step", batch, prompt + new / 2, shape)
    steps = dataclasses.replace(step, energy_j=new * step.energy_j, duration_s=new * step.duration_s)
    return [_cost(cost_model, "prefill", batch, prompt, shape), steps]


def _sum(parts: list[Cost]) -> PhaseCost:
    return PhaseCost(energy_j=sum(p.energy_j for p in parts), duration_s=sum(p.duration_s for p in parts))
