"""Does choosing which experts to open pay? Router `opening` runs only where it does.

Decided before a trial or a checkpoint works: what λ lets it close, with a gate of unit spread, and what that saves of a
decode step by the cost model, against what choosing the sets takes. Pure: nothing is measured here or switched.

Shapes: B sequences, S positions, E experts, K choices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from hwcost import CostModel
from hwcost.cost_model import Conditions
from hwcost.ops import Counts, ModelShape
from moe.opening import EXACT_EXPERTS, open_sets

MAX_SHARE = 0.1
"""Largest share of a decode step's time that choosing may take."""
SCORE_STD, POPULARITY_STD = 1.5, 1.0
"""Spread of scores that is assumed of a gate not yet trained, nats: of each token's about an expert's mean, and of
these means. An expert is closed where the scores that its tokens lose come to less than λ·open_e: a sharper gate closes
fewer, one with unpopular experts more. Fitted to the experts that a trained gate opened and closed at batches 8, 32 and
128 (docs/routing.md): within a quarter of one expert."""
SET_S = 2.4e-10
"""Seconds that one set takes for one sequence of a layer, beyond the launches: measured at batches 8 and 128."""
DRAWN_TOKENS = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpeningCase:
    """One decode step with and without chosen sets, as the cost model has it.

    Attributes:
        batch: sequences that decode together. energy_lambda: λ, nats per c_ref.
        open_plain, open_chosen: experts that a layer opens by plain priced top-k and by chosen sets, in experts of the
            mean width.
        step_s: seconds of the step without choosing.
        saving_j: joules that a step saves by the experts closed.
        choosing_j, choosing_s: what choosing takes, above what plain top-k takes.
    """

    batch: int
    energy_lambda: float
    open_plain: float
    open_chosen: float
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
        """Net joules are expected to be lower, and the step hardly longer."""
        return self.saving_j > self.choosing_j and self.share <= MAX_SHARE

    def __str__(self) -> str:
        verdict = "runs" if self.pays else "is off (plain priced top-k routes instead)"
        return (
            f"router opening {verdict}: at batch {self.batch} and λ = {self.energy_lambda:.3g} it opens"
            f" {self.open_chosen:.2f} experts a layer in place of {self.open_plain:.2f}, which saves"
            f" {1e3 * self.saving_j:.3g} mJ of a decode step; choosing takes {1e3 * self.choosing_j:.3g} mJ and"
            f" {self.share:.1%} of its time (modelled; at most {MAX_SHARE:.0%})"
        )


def opening_case(
    cost_model: CostModel,
    shape: ModelShape,
    *,
    batch: int,
    cached: int,
    launches: int,
    energy_lambda: float,
    join: Sequence[float],
    open_: Sequence[float],
) -> OpeningCase:
    """Weigh the sets of a decode step at a price.

    Choosing takes time at the mean power of the step that it lengthens: its kernels of microseconds give the board no
    rest. Where every set is tried, that takes longer the more sequences there are.

    Args:
        batch: sequences. cached: tokens in the cache of each.
        launches: kernels of one layer's choosing, beyond those of top-k (`moe.opening.choosing_launches`).
        energy_lambda: λ, nats per c_ref. join, open_: prices of each expert in decoding, in units of c_ref.
    """

    def step(opened: float) -> tuple[float, float]:
        at = dataclasses.replace(shape, open_experts=opened)
        cost = cost_model.get_cost("decode_step", batch_size=batch, seq_len=cached, shape=at, extrapolate=True)
        return cost.energy_j, cost.duration_s

    drawn = expected_open(shape, batch, energy_lambda=energy_lambda, join=tuple(join), open_=tuple(open_))
    plain, chosen = drawn
    step_j, step_s = step(plain)
    least_j, _ = step(chosen)
    choosing = Counts(launches=float(launches * shape.num_moe_layers))
    tried = 2**shape.num_experts if shape.num_experts <= EXACT_EXPERTS and launches else 0
    choosing_s = cost_model.breakdown_of(choosing, Conditions(extrapolate=True)).duration_s
    choosing_s += SET_S * tried * batch * shape.num_moe_layers
    return OpeningCase(
        batch=batch,
        energy_lambda=energy_lambda,
        open_plain=plain,
        open_chosen=chosen,
        step_s=step_s,
        saving_j=step_j - least_j,
        choosing_j=choosing_s * step_j / step_s,
        choosing_s=choosing_s,
    )


@functools.lru_cache(maxsize=64)
def expected_open(
    shape: ModelShape, batch: int, *, energy_lambda: float, join: tuple[float, ...], open_: tuple[float, ...]
) -> tuple[float, float]:
    """Experts that a layer opens at a position of `batch` sequences: by plain priced top-k, and by the router's sets.

    Both by the router's own search on normal scores, always the same ones; every position stands for a gate of its own.
    In experts of the mean width, as the cost model counts them: a null expert counts nothing.
    """
    generator = torch.Generator().manual_seed(0)
    positions = min(256, max(64, DRAWN_TOKENS // batch))
    popular_SE = POPULARITY_STD * torch.randn(positions, shape.num_experts, generator=generator)
    drawn_BSE = torch.randn(batch, positions, shape.num_experts, generator=generator)
    score_BSE = popular_SE + SCORE_STD * drawn_BSE - energy_lambda * torch.tensor(join, dtype=torch.float32)
    chosen_BSK = score_BSE.topk(shape.top_k, dim=-1).indices
    plain_SE = torch.zeros_like(score_BSE).scatter(-1, chosen_BSK, 1.0).amax(dim=0)
    sets_SE = open_sets(score_BSE, energy_lambda * torch.tensor(open_, dtype=torch.float32), shape.top_k)
    allowed_BSE = score_BSE.masked_fill(~sets_SE, -torch.inf)  # what is open and what anybody takes of it
    taken_BSK = allowed_BSE.topk(shape.top_k, dim=-1).indices
    taken_SE = torch.zeros_like(score_BSE).scatter(-1, taken_BSK, 1.0).amax(dim=0)
    width_E = torch.tensor(shape.expert_widths, dtype=torch.float32) / shape.mean_width
    plain, taken = (float((opened_SE @ width_E).mean()) for opened_SE in (plain_SE, taken_SE))
    return plain, taken
