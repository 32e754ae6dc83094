"""Prices of experts: what one more token costs in an open expert, and what opening one costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hwcost.ops import Counts, ModelShape, expert_join, expert_open


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertPrices:
    """Marginal prices of the experts of one layer (DESIGN §4, "Price of an expert").

    Attributes:
        join_j: joules of one more token in each expert, if it is open; 0 for a null expert.
        open_j: joules of opening each expert.
        join_s, open_s: the same in seconds.
        c_ref_j: marginal joules per token of the dense FFN (4·D, gelu) at the same operating point.
        join, open: join_j and open_j in units of c_ref_j: what a router sees.
        profile: name of the profile; `analytic` says that it was not calibrated.
    """

    join_j: tuple[float, ...]
    open_j: tuple[float, ...]
    join_s: tuple[float, ...]
    open_s: tuple[float, ...]
    c_ref_j: float
    join: tuple[float, ...]
    open: tuple[float, ...]
    profile: str
    analytic: bool


def expert_prices(
    shape: ModelShape,
    phase: str,
    *,
    energy: Callable[[Counts], float],
    seconds: Callable[[Counts], float],
    profile: str,
    analytic: bool,
) -> ExpertPrices:
    """Prices of `shape.expert_widths`, from functions that turn counts into joules and seconds."""
    dense = dataclasses.replace(shape, activation="gelu")
    c_ref_j = energy(expert_join(dense, 4.0 * shape.d_model, 1.0, phase))
    joins = [expert_join(shape, width, 1.0, phase) for width in shape.expert_widths]
    opens = [expert_open(shape, width, phase) for width in shape.expert_widths]
    return ExpertPrices(
        join_j=tuple(map(energy, joins)),
        open_j=tuple(map(energy, opens)),
        join_s=tuple(map(seconds, joins)),
        open_s=tuple(map(seconds, opens)),
        c_ref_j=c_ref_j,
        join=tuple(energy(counts) / c_ref_j for counts in joins),
        open=tuple(energy(counts) / c_ref_j for counts in opens),
        profile=profile,
        analytic=analytic,
    )
