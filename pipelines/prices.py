"""What a token pays for an expert: joules from the cost model, or another ordering as a control.

Training, prefill and decode have prices of their own. A router sees them in units of c_ref, the marginal joules per
token of the dense FFN at the same operating point, so that λ means the same on every GPU; λ / c_ref is λ in 1/J.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from hwcost import CostModel, ExpertPrices

PHASES = ("train", "prefill", "decode")


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

    def lambda_per_j(self, energy_lambda: float) -> float:
        """λ in nats per joule, from nats per c_ref."""
        return energy_lambda / self.c_ref_j

    def lambda_per_c_ref(self, lambda_per_j: float) -> float:
        """λ in nats per c_ref, from nats per joule."""
        return lambda_per_j * self.c_ref_j


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What prices depend on: the experts of a layer, and the tokens of a call in each phase."""

    d_model: int
    widths: tuple[int, ...]
    top_k: int
    dtype: str
    tokens: Mapping[str, int]


def phase_prices(
    cost_model: CostModel, point: OperatingPoint, *, kind: str, seed: int = 0, opens: bool = False
) -> dict[str, Prices]:
    """Prices of training, prefill and decode.

    Args:
        opens: the router weighs open sets. It chooses one per position, as a decode step does, in every phase; so what
            opening costs is that of decode in every phase.
    """
    found = {
        phase: expert_prices(
            cost_model,
            kind=kind,
            d_model=point.d_model,
            widths=point.widths,
            top_k=point.top_k,
            tokens=point.tokens[phase],
            dtype=point.dtype,
            phase=phase,
            seed=seed,
        )
        for phase in PHASES
    }
    if not opens:
        return found
    return {phase: dataclasses.replace(prices, open=found["decode"].open) for phase, prices in found.items()}


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


def _flops(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    """FLOPs: proportional to width for a token that joins; opening an expert computes nothing."""
    return relative, (0.0,) * len(relative)


def _params(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    """Parameters: proportional to width. Opening is scaled to sum to the joule prices of opening."""
    scale = sum(table.open) / sum(relative)
    return relative, tuple(share * scale for share in relative)


def _latency(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    """Seconds instead of joules, in units of the seconds of an expert of the dense width."""
    widest = max(range(len(relative)), key=lambda e: relative[e])
    c_ref_s = table.join_s[widest] / relative[widest]
    return tuple(s / c_ref_s for s in table.join_s), tuple(s / c_ref_s for s in table.open_s)


def _uniform(table: ExpertPrices, relative: Values, seed: int) -> tuple[Values, Values]:
    """One price for all; opening costs what it costs on average."""
    return (1.0,) * len(relative), (sum(table.open) / len(relative),) * len(relative)


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


PRICE_KINDS: dict[str, Callable[[ExpertPrices, Values, int], tuple[Values, Values]]] = {
    "joules": _joules,
    "flops": _flops,
    "params": _params,
    "latency": _latency,
    "uniform": _uniform,
    "shuffled": _shuffled,
    "zero": _zero,
}
