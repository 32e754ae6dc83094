"""Absorption: has the gate learnt the price away?

A price λ·c̃ that stands inside the selection can be taken back by the logits it is subtracted from: by drifting along c̃
(mean logits grow where experts are dear), or by growing until λ is small beside them. The audit says how far, layer by
layer: an evaluation after training is held against the one before it.

Shapes: E experts, L MoE layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe import RoutingSummary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorption:
    """What became of a price, per MoE layer.

    Attributes:
        drift_L: slope of the change of mean logits over c̃ since the start, nats per c_ref: positive where the gate
            has come to favour what is dear. NaN never; 0 where all prices are equal.
        undone_L: drift_L / τ, the part of λ that the gate has taken back. Selection is by s − λ·c̃ with s = z/τ, so
            that it now acts as if λ were λ − undone. Negative: the gate helps the price.
        logit_std_L: standard deviation of the logits within a token, nats. λ acts on what lies closer than λ·Δc̃.
        flip_L: share of the choices that would be others at λ = 0; None for a router without a price.
    """

    drift_L: list[float]
    undone_L: list[float]
    logit_std_L: list[float]
    flip_L: list[float] | None

    @property
    def drift(self) -> float:
        """Mean over layers."""
        return float(np.mean(self.drift_L))

    @property
    def undone(self) -> float:
        """Mean over layers."""
        return float(np.mean(self.undone_L))


def absorption(
    start: RoutingSummary, now: RoutingSummary, price: Sequence[float] | Sequence[Sequence[float]], temperature: float
) -> Absorption:
    """Audit two evaluations of the same split.

    Args:
        start: before training. now: after some of it.
        price: c̃, [E] or [L, E].
        temperature: τ.
    """
    moved_LE = np.asarray(now.mean_logits_LE) - np.asarray(start.mean_logits_LE)
    price_LE = np.broadcast_to(np.asarray(price, dtype=float), moved_LE.shape)
    drift_L = [slope(price_E, moved_E) for price_E, moved_E in zip(price_LE, moved_LE, strict=True)]
    return Absorption(
        drift_L=drift_L,
        undone_L=[drift / temperature for drift in drift_L],
        logit_std_L=now.layer_logit_std,
        flip_L=now.layer_flip_fraction,
    )


def slope(price_E: np.ndarray, moved_E: np.ndarray) -> float:
    """Least-squares slope of moved logits over prices; 0 where the prices do not differ."""
    centred_E = price_E - price_E.mean()
    spread = float(centred_E @ centred_E)
    return float(centred_E @ moved_E) / spread if spread > 1e-12 else 0.0
