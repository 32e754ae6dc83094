"""What a token pays for an expert: joules from the cost model, or another ordering as a control."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from hwcost import CostModel


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
    joules = cost_model.expert_price(
        d_model=d_model, widths=list(widths), top_k=top_k, tokens=tokens, dtype=dtype, phase=phase
    )
    base = Prices(
        join=tuple(joules.join), open=tuple(joules.open), c_ref_j=joules.c_ref_j, profile=str(joules.profile)
    )
    return PRICE_KINDS[kind](base, tuple(width / (4 * d_model) for width in widths), seed)


def _as_measured(prices: Prices, relative: tuple[float, ...], seed: int) -> Prices:
    return prices


def _by_width(prices: Prices, relative: tuple[float, ...], seed: int) -> Prices:
    return dataclasses.replace(prices, join=relative, open=relative)


def _uniform(prices: Prices, relative: tuple[float, ...], seed: int) -> Prices:
    ones = (1.0,) * len(relative)
    return dataclasses.replace(prices, join=ones, open=ones)


def _zero(prices: Prices, relative: tuple[float, ...], seed: int) -> Prices:
    zeros = (0.0,) * len(relative)
    return dataclasses.replace(prices, join=zeros, open=zeros)


def _shuffled(prices: Prices, relative: tuple[float, ...], seed: int) -> Prices:
    """The joule prices, dealt to other experts: the same spread of prices without their meaning."""
    order = list(range(len(relative)))
    generator = random.Random(f"shuffled prices {seed}")
    while True:
        generator.shuffle(order)
        join = tuple(prices.join[i] for i in order)
        if join != prices.join or len(set(prices.join)) == 1:
            return dataclasses.replace(prices, join=join, open=tuple(prices.open[i] for i in order))


# FLOPs and parameters of an expert are both proportional to its width.
PRICE_KINDS: dict[str, Callable[[Prices, tuple[float, ...], int], Prices]] = {
    "joules": _as_measured,
    "flops": _by_width,
    "params": _by_width,
    "uniform": _uniform,
    "shuffled": _shuffled,
    "zero": _zero,
}
