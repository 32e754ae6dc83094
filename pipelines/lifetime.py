"""Joules over a model's life: training once, decoding for years. From how many tokens on does a routing pay?"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.pareto import LABELS, Front, pareto_front
from pipelines.records import Store

JOULES_PER_KWH = 3.6e6
_NORMAL_95 = 1.959963984540054


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A configuration and the range of decoded tokens over which its lifetime joules are the lowest.

    Attributes:
        labels: its configuration.
        train_j: training joules.
        decode_j_per_token: joules per decoded token.
        loss: its loss.
        from_tokens: break-even with the segment before; 0 for the first.
        from_range: 95 % interval of the break-even; an end is infinite where the data allow that it is never
            reached; None for the first, and where no uncertainty is known.
    """

    labels: dict[str, Any]
    train_j: float
    decode_j_per_token: float
    loss: float
    from_tokens: float
    from_range: tuple[float, float] | None

    def joules(self, tokens: float) -> float:
        """Lifetime joules after so many decoded tokens."""
        return self.train_j + self.decode_j_per_token * tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lifetime:
    """The cheapest configurations by decoded tokens, among those whose loss is low enough."""

    max_loss: float
    segments: tuple[Segment, ...]
    front: Front

    @property
    def modelled(self) -> bool:
        """True where the joules come from a model."""
        return self.front.modelled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
    """Energy in the units of a bill; None where no price or intensity was stated."""

    kwh: float
    price: float | None
    co2_kg: float | None


def lifetime(
    source: Store | pa.Table | str | os.PathLike[str],
    *,
    sweep_id: str | None = None,
    max_loss: float | None = None,
    loss: str = "eval_loss_nats",
    seed: int = 0,
) -> Lifetime | None:
    """Which configuration costs least over training and N decoded tokens, for every N.

    Args:
        source: a store, the folder or URI of one, or a table of trials.
        sweep_id: one sweep; all where None.
        max_loss: only configurations at most this bad; where None, the best loss and a hundredth of a nat.
        loss: column of loss.
        seed: of the resampling behind the intervals.

    Returns:
        None where no configuration has training joules, decoding joules and a loss.
    """
    front = pareto_front(
        source, "train_energy_j", "decode_j_per_token", loss, sweep_id=sweep_id, bootstrap=0, reference=(1.0, 1.0, 1.0)
    )
    if not len(front.mean_NM):
        return None
    limit = float(front.mean_NM[:, 2].min()) + 0.01 if max_loss is None else max_loss
    good = np.flatnonzero(front.mean_NM[:, 2] <= limit)
    if not len(good):
        return None
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    before: int | None = None
    for i, start in envelope(front.mean_NM[good, 0], front.mean_NM[good, 1]):
        row = int(good[i])
        span = None if before is None else _break_even_range(front, before, row, rng)
        segments.append(_segment(front, row, start, span))
        before = row
    return Lifetime(max_loss=limit, segments=tuple(segments), front=front)


def envelope(start_N: np.ndarray, slope_N: np.ndarray) -> list[tuple[int, float]]:
    """Lower envelope of the lines start + slope · t for t from 0: (line, from which t it is the lowest)."""
    at = int(np.lexsort((slope_N, start_N))[0])
    found = [(at, 0.0)]
    while True:
        flatter = np.flatnonzero(slope_N < slope_N[at])
        if not len(flatter):
            return found
        cross = (start_N[flatter] - start_N[at]) / (slope_N[at] - slope_N[flatter])
        best = np.lexsort((slope_N[flatter], cross))[0]
        at = int(flatter[best])
        found.append((at, float(cross[best])))


def bill(energy_j: float, *, price_per_kwh: float | None = None, co2_g_per_kwh: float | None = None) -> Bill:
    """Joules as kWh, money and CO2, from a stated price and carbon intensity."""
    kwh = energy_j / JOULES_PER_KWH
    return Bill(
        kwh=kwh,
        price=None if price_per_kwh is None else kwh * price_per_kwh,
        co2_kg=None if co2_g_per_kwh is None else kwh * co2_g_per_kwh / 1000,
    )


def _segment(front: Front, row: int, start: float, span: tuple[float, float] | None) -> Segment:
    label = front.configs.slice(row, 1).to_pylist()[0]
    return Segment(
        labels={name: label[name] for name in ("trial_id", "seeds", *LABELS) if name in label},
        train_j=float(front.mean_NM[row, 0]),
        decode_j_per_token=float(front.mean_NM[row, 1]),
        loss=float(front.mean_NM[row, 2]),
        from_tokens=start,
        from_range=span,
    )


def _break_even_range(
    front: Front, a: int, b: int, rng: np.random.Generator, draws: int = 4000
) -> tuple[float, float] | None:
    """Interval of the crossing of two lines, by drawing starts and slopes from their uncertainties."""
    error_2M = front.half_NM[[a, b], :2] / _NORMAL_95
    if not np.isfinite(error_2M).all():
        return None
    drawn = front.mean_NM[[a, b], :2] + error_2M * rng.standard_normal((draws, 2, 2))
    more, saved = drawn[:, 1, 0] - drawn[:, 0, 0], drawn[:, 0, 1] - drawn[:, 1, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(saved > 0, np.maximum(more, 0.0) / saved, math.inf)
    low, high = np.quantile(cross, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)
