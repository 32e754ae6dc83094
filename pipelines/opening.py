"""Does choosing which experts to open pay? Router `opening` runs only where it does.

Decided before a trial or a checkpoint works, from what the cost model expects of a decode step: the most that closing
experts can save, against what choosing the sets takes. Pure: nothing is measured here, nothing is switched.
"""

from __future__ import annotations

import dataclasses

from hwcost import CostModel
from hwcost.cost_model import Conditions
from hwcost.ops import Counts, ModelShape

MAX_SHARE = 0.1
"""Largest share of a decode step's time that choosing may take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpeningCase:
    """One decode step with and without chosen sets, as the cost model has it.

    Attributes:
        batch: sequences that decode together.
        step_s: seconds of the step without choosing.
        saving_j: joules that a step saves when every layer opens K experts and no more: nothing can save more.
        choosing_j, choosing_s: what choosing takes, above what plain top-k takes.
    """

    batch: int
    step_s: float
    saving_j: float
    choosing_j: float
    choosing_s: float

    @property
    def share(self) -> float:
        """Of the step's time."""
        return self.choosing_s / self.step_s

    @property
    def pays(self) -> bool:
        """Net joules can be lower, and the step hardly longer."""
        return self.saving_j > self.choosing_j and self.share <= MAX_SHARE

    def __str__(self) -> str:
        verdict = "runs" if self.pays else "is off (plain priced top-k routes instead)"
        return (
            f"router opening {verdict}: at batch {self.batch} a decode step can save {1e3 * self.saving_j:.3g} mJ,"
            f" choosing takes {1e3 * self.choosing_j:.3g} mJ and {self.share:.1%} of its time (modelled; at most"
            f" {MAX_SHARE:.0%})"
        )


def opening_case(cost_model: CostModel, shape: ModelShape, *, batch: int, cached: int, launches: int) -> OpeningCase:
    """Weigh the sets of a decode step.

    Args:
        batch: sequences. cached: tokens in the cache of each.
        launches: kernels of one layer's choosing, beyond those of top-k (`moe.opening.choosing_launches`).
    """
    layers = shape.num_moe_layers

    def step(shape: ModelShape) -> tuple[float, float]:
        cost = cost_model.get_cost("decode_step", batch_size=batch, seq_len=cached, shape=shape, extrapolate=True)
        return cost.energy_j, cost.duration_s

    step_j, step_s = step(shape)
    least_j, _ = step(dataclasses.replace(shape, open_experts=float(shape.top_k)))
    chosen = cost_model.breakdown_of(Counts(launches=float(launches * layers)), Conditions(extrapolate=True))
    return OpeningCase(
        batch=batch, step_s=step_s, saving_j=step_j - least_j, choosing_j=chosen.energy_j, choosing_s=chosen.duration_s
    )
