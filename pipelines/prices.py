"""What a token pays for an expert: joules from the cost model, or another ordering as a control."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from hwcost import CostModel, ExpertPrices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Normalised prices of one layer's experts at an operating point.

    Attributes:
        join: price of one more token in each expert, in units of c_ref.
        open: price of opening each expert, in units of c_ref.
        c_ref_j: marginal joules per token of the dense FFN at the same operating point.
        profile: name of the cost-model profile.
    """

    join: tuple[float, ...]
    open: tuple[float, ...]
    c_ref_j: float
    profile: str


def expert_prices(
    cost_model: CostModel,
    *,
    kind: str,
    d_model: int,
    widths: Sequence[int],
    top_k: int,
    tokens: int,
    dtype: str,
    phase: str = "train",
    seed: int = 0,
) -> Prices:
    """Prices of a kind (DESIGN §4): `joules` from the cost model, the others as controls of the study.

    Every kind is scaled so that an expert of the dense FFN's width (4·d_model) costs 1.
    """
    table = cost_model.expert_price(
        d_model=d_model, widths=list(widths), top_k=top_k, tokens=tokens, dtype=dtype, phase=phase
    )
    relative = tuple(width / (4 * d_model) for width in widths)
    join, opening = PRICE_KINDS[kind](table, relative, seed)
    return Prices(join=join, open=opening, c_ref_j=table.c_ref_j, profile=table.profile)


Values = tuple[float, ...]


def _joules(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    return table.join, table.open


def _by_width(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    return relative, relative


def _latency(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    """Seconds instead of joules, in units of the seconds of an expert of the dense width."""
    widest = max(range(len(relative)), key=lambda e: relative[e])
    c_ref_s = table.join_s[widest] / relative[widest]
    return tuple(s / c_ref_s for s in table.join_s), tuple(s / c_ref_s for s in table.open_s)


def _uniform(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    ones = (1.0,) * len(relative)
    return ones, ones


def _zero(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    zeros = (0.0,) * len(relative)
    return zeros, zeros


def _shuffled(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    """The joule prices, dealt to other experts: the same spread of prices without their meaning."""
    order = list(range(len(relative)))
    generator = random.Random(f"shuffled prices {seed}")
    while True:
        generator.shuffle(order)
        join = tuple(table.join[e] for e in order)
        if join != table.join or len(set(table.join)) == 1:
            return join, tuple(table.open[e] for e in order)


# FLOPs and parameters of an expert are both proportional to its width.
PRICE_KINDS: dict[str, Callable[[ExpertPrices, Values, int], tuple[Values, Values]]] = {
    "joules": _joules,
    "flops": _by_width,
    "params": _by_width,
    "latency": _latency,
    "uniform": _uniform,
    "shuffled": _shuffled,
    "zero": _zero,
}
