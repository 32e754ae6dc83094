"""Fronts as pure mathematics over arrays of costs: non-dominated sets, knee, hypervolume, dominators.

Legend: N points, M objectives, F front members. All objectives are minimised here; callers flip signs.
The non-dominated sets and hypervolumes are moocore's (López-Ibáñez et al.).
"""

from __future__ import annotations

from collections.abc import Mapping

import moocore
import numpy as np

#: Points whose front sorts out most of a large set before the exact test.
SAMPLE = 20_000


def nondominated(cost_NM: np.ndarray) -> np.ndarray:
    """Which points no other point dominates; equal points all stay.

    Args:
        cost_NM: finite costs, minimised.

    Returns:
        Boolean mask (N,).
    """
    keep_N = np.ones(len(cost_NM), dtype=bool)
    if len(cost_NM) > 10 * SAMPLE and cost_NM.shape[1] == 2:
        sample = cost_NM[np.linspace(0, len(cost_NM) - 1, SAMPLE).astype(np.int64)]
        keep_N = ~_dominated_by(sample[nondominated(sample)], cost_NM)
    if keep_N.any():
        keep_N[keep_N] = moocore.is_nondominated(cost_NM[keep_N], keep_weakly=True)
    return keep_N


def _dominated_by(front_F2: np.ndarray, cost_N2: np.ndarray) -> np.ndarray:
    """Which points a front of two objectives dominates: most points fall to a small sample's front already."""
    front_F2 = front_F2[np.lexsort(front_F2.T[::-1])]
    at_N = np.searchsorted(front_F2[:, 0], cost_N2[:, 0], side="right") - 1
    best_N2 = front_F2[np.maximum(at_N, 0)]
    worse_N = (best_N2[:, 1] < cost_N2[:, 1]) | ((best_N2[:, 1] == cost_N2[:, 1]) & (best_N2[:, 0] < cost_N2[:, 0]))
    return np.asarray((at_N >= 0) & worse_N)


def dominators(cost_NM: np.ndarray, front_N: np.ndarray) -> np.ndarray:
    """For each point off the front one front member that dominates it.

    With two objectives it is the member with the largest first cost not above the point's own: of the
    members that are at most as expensive, the one that is best in the second objective.

    Returns:
        Row index (N,) of the dominating member; -1 for front members.
    """
    by_N = np.full(len(cost_NM), -1, dtype=np.int64)
    members_F = np.flatnonzero(front_N)
    off = np.flatnonzero(~front_N)
    if len(members_F) == 0 or len(off) == 0:
        return by_N
    order = np.lexsort(cost_NM[members_F].T[::-1])
    members_F = members_F[order]
    if cost_NM.shape[1] == 2:
        at = np.searchsorted(cost_NM[members_F, 0], cost_NM[off, 0], side="right") - 1
        by_N[off] = members_F[at]
        return by_N
    for member in members_F:
        beaten = (cost_NM[off] >= cost_NM[member]).all(axis=1)
        by_N[off[beaten]] = member
        off = off[~beaten]
    return by_N


def hypervolume(cost_NM: np.ndarray, reference_M: np.ndarray) -> float:
    """Volume that the points dominate up to the reference point; points beyond it add nothing."""
    inside = (cost_NM < reference_M).all(axis=1)
    if not inside.any():
        return 0.0
    return float(moocore.hypervolume(cost_NM[inside], ref=reference_M))


def reference_point(cost_NM: np.ndarray, *, margin: float = 0.1) -> np.ndarray:
    """The worst value of each objective, and a tenth of its range beyond."""
    worst_M = cost_NM.max(axis=0)
    range_M = worst_M - cost_NM.min(axis=0)
    range_M = np.where(range_M > 0, range_M, np.maximum(np.abs(worst_M), 1.0))
    return np.asarray(worst_M + margin * range_M)


def knee(cost_FM: np.ndarray) -> int | None:
    """The front member that lies farthest below the chord (the plane) through the front's extremes.

    Objectives are scaled to [0, 1] over the front, where that plane is sum(cost) = 1; so the knee is the
    member with the smallest sum. None for fewer than three distinct members, and where no member lies below.
    Source: I. Das, "On characterizing the 'knee' of the Pareto curve", Structural Optimization 18, 1999.
    """
    if len(np.unique(cost_FM, axis=0)) < 3:
        return None
    unit_FM = _unit(cost_FM)
    at = int(unit_FM.sum(axis=1).argmin())
    return at if unit_FM[at].sum() < 1 - 1e-12 else None


def knees_by_scaling(cost_FM: np.ndarray, positive_M: np.ndarray) -> Mapping[str, int | None]:
    """The knee under other scalings: how far it is a property of the front and not of the ruler.

    Args:
        cost_FM: costs of the front members, minimised.
        positive_M: objectives for which a logarithm makes sense.

    Returns:
        Knee (row of `cost_FM`) by scaling: `linear`, `log` (positive objectives), `utopia` (nearest to the
        best corner), `trimmed` (without the two extremes of the first objective).
    """
    log_FM = cost_FM.copy()
    for m in np.flatnonzero(positive_M & (cost_FM > 0).all(axis=0)):
        log_FM[:, m] = np.log(cost_FM[:, m])
    inner = np.argsort(cost_FM[:, 0], kind="stable")[1:-1]
    trimmed = knee(cost_FM[inner])
    utopia = None
    if knee(cost_FM) is not None:
        utopia = int((_unit(cost_FM) ** 2).sum(axis=1).argmin())
    return {
        "linear": knee(cost_FM),
        "log": knee(log_FM),
        "utopia": utopia,
        "trimmed": None if trimmed is None else int(inner[trimmed]),
    }


def _unit(cost_FM: np.ndarray) -> np.ndarray:
    low_M, high_M = cost_FM.min(axis=0), cost_FM.max(axis=0)
    span_M = np.where(high_M > low_M, high_M - low_M, 1.0)
    return np.asarray((cost_FM - low_M) / span_M)
