"""What test-time training is told and what it tells: feedback, settings, reports, and states to go back to.

Shapes: E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from moe.budget import Amortised


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareFeedback:
    """What the hardware says of a span of work. Unknown is None.

    `energy_j` are all joules of the span, adapting included; `update_j` those of them that updates took, which the
    controller then hears spread over the work until the next update; `modelled_j` the cost model's for the same work;
    `age_s` how old the reading is when it is handed over.
    """

    energy_j: float | None
    tokens: int
    duration_s: float
    power_w: float | None = None
    temperature_c: float | None = None
    memory_fraction: float | None = None
    modelled_j: float | None = None
    update_j: float | None = None
    age_s: float = 0.0

    def fault(self, max_age_s: float) -> str | None:
        """Why this cannot be acted on; None: it can."""
        if self.energy_j is None or not math.isfinite(self.energy_j) or not math.isfinite(self.duration_s):
            return "not finite"
        if self.energy_j <= 0 or self.tokens <= 0 or self.duration_s <= 0:
            return "not positive"
        if self.update_j is not None and not 0 <= self.update_j <= self.energy_j:
            return "of updates not within the whole"
        if not self.age_s <= max_age_s:
            return "stale"
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTSettings:
    """How the biases learn, and what stops them.

    Attributes:
        learning_rate: of the natural-gradient step.
        energy_weight: μ, nats: weight of Ê/B; acts only under a budget.
        kl_weight: β of KL(π ‖ π_trained).
        kl_step: largest KL of one step, any layer, nats per token. kl_total: of all steps together.
        canary_margin: nats by which the canary's loss may exceed the trained router's at the same λ.
        learn_tokens: an update learns from so many tokens of the chunk, whole sequences and at least one; which ones
            goes round. On chunks of 48 x 1024 an update then costs about as much as a chunk.
        update_share: largest share of the work that updates may be.
        min_window_s: feedback is gathered until it spans this long.
        max_age_s: older telemetry is stale.
        keep_first: each token keeps the expert that the trained router likes best at this λ; router `energy` alone.
    """

    learning_rate: float = 0.05
    energy_weight: float = 0.02
    kl_weight: float = 0.1
    kl_step: float = 1e-3
    kl_total: float = 0.05
    canary_margin: float = 0.01
    learn_tokens: int = 6144
    update_share: float = 0.02
    min_window_s: float = 1.0
    max_age_s: float = 2.0
    keep_first: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTReport:
    """What one call of `ttt_update` did.

    `j_per_token` is that of the window which this call completed, None where none was; `heard_j_per_token` what the
    controller heard of it, the joules of updates spread evenly. `kl` is the largest KL of any layer that the step made
    (0: no step). `events`: guards that acted, one word or two each.
    """

    energy_lambda: float
    j_per_token: float | None = None
    heard_j_per_token: float | None = None
    infeasible: bool = False
    updated: bool = False
    kl: float = 0.0
    canary_delta: float | None = None
    events: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTState:
    """All that adapting has changed, to be given back exactly."""

    offset_LE: Tensor
    kept_LE: Tensor
    null: float
    energy_lambda: float
    controller: dict[str, Any]
    chunks: int
    cost_ratio: float
    pending: tuple[float, ...]
    pending_update_j: float | None
    amortised: Amortised
    learn_from: int
    suspended: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a model is like before it is adapted."""

    offset_LE: Tensor
    keep_first: tuple[bool, ...]
    energy_lambda: float
    training: bool

    @classmethod
    def of(cls, model: Any) -> Found:
        return cls(
            offset_LE=torch.stack([router.offset_E.detach().clone() for router in model.routers]),
            keep_first=tuple(router.keep_first for router in model.routers),
            energy_lambda=float(model.config.energy_lambda),
            training=model.training,
        )

    @torch.no_grad()
    def give_back(self, model: Any) -> None:
        for router, offset_E, keep_first in zip(model.routers, self.offset_LE, self.keep_first, strict=True):
            router.offset_E.copy_(offset_E)
            router.keep_first = keep_first
        model.set_energy_lambda(self.energy_lambda)
        model.train(self.training)
