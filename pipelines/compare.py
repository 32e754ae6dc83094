"""Joules at equal loss, and loss at equal joules: what a candidate saves against a baseline, with evidence or without.

Two answers are given. Pair by pair: is a candidate's loss equivalent to a baseline's (two one-sided tests at a
stated margin), and are its joules fewer? The claim needs both, so its p-value is the larger one
(intersection-union test), Holm-adjusted over the candidates tried against one baseline. And as a whole: the mean
saving between both sides' fronts over the losses that both reach (Bjøntegaard's delta with joules as the rate),
with an interval over seeds.

Sources: D. Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987 (TOST); R. Berger, Technometrics 24, 1982
(intersection-union); S. Holm, Scand. J. Stat. 6, 1979; G. Bjøntegaard, VCEG-M33, 2001.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats as distributions

from pipelines import fronts, hygiene, seeds, select
from pipelines.boards import with_anchors
from pipelines.epoch_ends import POINTS, TRIALS, front_table
from pipelines.hygiene import Context, LeftOut
from pipelines.pareto import LABELS, with_corpus
from pipelines.records import PointRecord, Store, TrialRecord

MARGIN_NATS = 0.01
ALPHA = 0.05
NO_EVIDENCE = "no evidence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval; the ends are None where a single seed gives none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """True where the interval is known and lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One candidate configuration against one baseline configuration.

    Attributes:
        baseline: labels of the baseline configuration.
        candidate: labels of the candidate.
        paired: compared seed by seed; else by Welch's test.
        loss_difference: candidate minus baseline in the unit of the loss, with its 1 - 2α interval (the one that
            the equivalence test compares with the margin).
        saving: 1 - joules ratio, with an interval at level 1 - α shared over the candidates of the baseline.
        p_equal: p-value of "the losses differ by the margin or more".
        p_claim: Holm-adjusted p-value of the verdict's claim; None without evidence of any.
        verdict: `saves`, `costs more`, `better` (less loss and fewer joules), `worse`, or `no evidence`.
        reason: why there is no evidence.
    """

    baseline: dict[str, Any]
    candidate: dict[str, Any]
    paired: bool
    loss_difference: Estimate
    saving: Estimate
    p_equal: float | None
    p_claim: float | None
    verdict: str
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer: all pairs, the mean saving at equal loss, the mean difference of loss at equal joules.

    `table` says whose rows were compared: whole `trials`, or `points` that anytime trials passed through.
    """

    baseline: str
    candidate: str
    table: str
    margin_nats: float
    alpha: float
    pairs: tuple[Pair, ...]
    saving_at_equal_loss: Estimate | None
    loss_at_equal_joules: Estimate | None
    why_no_means: str
    context: Context
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Pair | None:
        """Of the pairs with evidence of a saving, the one whose interval promises most."""
        proven = [pair for pair in self.pairs if pair.verdict in ("saves", "better")]
        return max(proven, key=lambda pair: pair.saving.low or -math.inf, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Config:
    """One configuration: per seed its log joules, loss, and the meter's relative uncertainty."""

    labels: dict[str, Any]
    log_x: dict[int, float]
    y: dict[int, float]
    noise: dict[int, float]


def compare(
    source: Store | pa.Table | str | os.PathLike[str],
    baseline: str,
    candidate: str,
    *,
    sweep_id: str | None = None,
    table: str | None = None,
    x: str = "train_energy_j",
    y: str = "eval_loss_nats",
    margin: float = MARGIN_NATS,
    alpha: float = ALPHA,
) -> Comparison:
    """Compare what two expressions select.

    Args:
        source: a store, the folder or URI of one, or a table of rows.
        baseline: expression such as `router=topk,top_k=2` (see `select`).
        candidate: the same for the other side.
        sweep_id: one sweep; all where None.
        table: `trials` or `points` (every number of epochs of a trial as a configuration of its own). Where None:
            points where trials are anytime and points have the columns that the expressions ask for.
        x: column of joules (or seconds).
        y: column of loss.
        margin: losses closer than this count as equal, in the unit of `y`.
        alpha: level of the tests.

    Raises:
        ValueError: a malformed expression, a side without trials, or trials on both sides.
    """
    if table is None:
        table = _table_of(source, sweep_id, (x, y, *select.columns(baseline), *select.columns(candidate)))
    rows = _rows(source, sweep_id, table, x, y)
    cleaned = hygiene.clean(rows, [x, y], whole_rows=table == POINTS)
    corrected, notes = seeds.correct_boards(cleaned.table, [x])
    base_R, cand_R = (_side(corrected, text, name) for text, name in ((baseline, "baseline"), (candidate, "candidate")))
    if (base_R & cand_R).any():
        raise ValueError(
            f"candidate: expected trials that the baseline lacks, got {int((base_R & cand_R).sum())} on both sides"
        )
    base = _configs(corrected.filter(pa.array(base_R)), x, y)
    cand = _configs(corrected.filter(pa.array(cand_R)), x, y)
    pairs = [pair for one in base for pair in _against(one, cand, margin, alpha)]
    saving, loss, why = _means(base, cand, alpha)
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        table=table,
        margin_nats=margin,
        alpha=alpha,
        pairs=tuple(pairs),
        saving_at_equal_loss=saving,
        loss_at_equal_joules=loss,
        why_no_means=why,
        context=cleaned.context,
        left_out=cleaned.left_out,
        notes=tuple(notes),
    )


def _table_of(source: Store | pa.Table | str | os.PathLike[str], sweep_id: str | None, columns: Sequence[str]) -> str:
    if isinstance(source, pa.Table):
        return POINTS if "trial_fingerprint" in source.column_names else TRIALS
    return front_table(source if isinstance(source, Store) else Store(source), sweep_id, columns)


def _rows(
    source: Store | pa.Table | str | os.PathLike[str], sweep_id: str | None, table: str, x: str, y: str
) -> pa.Table:
    kinds: dict[str, Any] = {"trials": TrialRecord, "points": PointRecord}
    if table not in kinds:
        raise ValueError(f"table: expected one of {sorted(kinds)}, got {table!r}")
    if not isinstance(source, pa.Table):
        store = source if isinstance(source, Store) else Store(source)
        source = with_anchors(store.read(kinds[table], sweep_id), store, sweep_id)
        if table == POINTS:
            source = with_corpus(source, store, sweep_id)
    for name in (x, y):
        if name not in source.column_names:
            raise ValueError(f"axis: expected a numeric column of {table!r}, got {name!r}")
    return source


def _side(table: pa.Table, expression: str, name: str) -> np.ndarray:
    found = select.matching(table, expression)
    if not found.any():
        raise ValueError(f"{name}: expected an expression that selects a completed trial, got {expression!r}")
    return found


def _configs(table: pa.Table, x: str, y: str) -> list[_Config]:
    found: dict[str, _Config] = {}
    noise_name = seeds.uncertainty_column(x)
    for row in table.to_pylist():
        labels = {name: row[name] for name in ("trial_id", *LABELS) if name in row}
        config = found.setdefault(row["config_fingerprint"], _Config(labels=labels, log_x={}, y={}, noise={}))
        config.log_x[row["seed"]] = math.log(row[x])
        config.y[row["seed"]] = row[y]
        config.noise[row["seed"]] = (row.get(noise_name) or 0.0) / row[x]
    return list(found.values())


# --- pair by pair ------------------------------------------------------------------------------------------


def _against(base: _Config, candidates: Sequence[_Config], margin: float, alpha: float) -> list[Pair]:
    """Every candidate against one baseline; p-values are adjusted over the candidates."""
    shared = alpha / len(candidates)
    raw = [_test(base, candidate, margin, alpha, shared) for candidate in candidates]
    claims = [claim for _, claim in raw]
    adjusted = holm([1.0 if claim is None else claim[1] for claim in claims])
    pairs = []
    for (pair, claim), p in zip(raw, adjusted, strict=True):
        if claim is None:
            pairs.append(pair)
        elif p < alpha:
            pairs.append(dataclasses.replace(pair, verdict=claim[0], p_claim=p))
        else:
            pairs.append(dataclasses.replace(pair, p_claim=p, reason=_reason(pair, margin)))
    return pairs


def _test(
    base: _Config, cand: _Config, margin: float, alpha: float, shared: float
) -> tuple[Pair, tuple[str, float] | None]:
    """One pair with the claim that its data favour most, and that claim's p-value."""
    common = sorted(set(base.y) & set(cand.y))
    paired = len(common) >= 2
    loss, loss_se, loss_dof = _difference(base.y, cand.y, common, paired)
    ratio, ratio_se, ratio_dof = _difference(base.log_x, cand.log_x, common, paired)
    ratio_se, ratio_dof = _with_noise(ratio_se, ratio_dof, math.hypot(_noise(base), _noise(cand)))
    known = math.isfinite(loss_se) and math.isfinite(ratio_se)
    count = len(common) if paired else min(len(base.y), len(cand.y))
    loss_estimate = _estimate(loss, loss_se, loss_dof, 2 * alpha, count)
    change = _estimate(ratio, ratio_se, ratio_dof, shared, count)
    saving = Estimate(
        mean=-math.expm1(change.mean),
        low=None if change.high is None else -math.expm1(change.high),
        high=None if change.low is None else -math.expm1(change.low),
        seeds=count,
    )
    pair = Pair(
        baseline=base.labels,
        candidate=cand.labels,
        paired=paired,
        loss_difference=loss_estimate,
        saving=saving,
        p_equal=None,
        p_claim=None,
        verdict=NO_EVIDENCE,
        reason="a side has one seed, so nothing is known of its spread",
    )
    if not known:
        return pair, None
    p_equal = max(_upper(loss + margin, loss_se, loss_dof), _upper(margin - loss, loss_se, loss_dof))
    p_fewer = _upper(-ratio, ratio_se, ratio_dof)
    p_less = _upper(-loss, loss_se, loss_dof)
    claims = {
        "saves": max(p_equal, p_fewer),
        "costs more": max(p_equal, 1 - p_fewer),
        "better": max(p_less, p_fewer),
        "worse": max(1 - p_less, 1 - p_fewer),
    }
    # Four claims are looked at, of which at most two can hold: half of alpha for each is paid by doubling.
    name = min(claims, key=lambda claim: claims[claim])
    return dataclasses.replace(pair, p_equal=p_equal), (name, min(1.0, 2 * claims[name]))


def _difference(
    base: dict[int, float], cand: dict[int, float], common: Sequence[int], paired: bool
) -> tuple[float, float, float]:
    """Mean of candidate minus baseline, its standard error (infinite where not known), degrees of freedom."""
    if paired:
        change = np.array([cand[seed] - base[seed] for seed in common])
        return float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change))), len(change) - 1.0
    a, b = np.array(list(base.values())), np.array(list(cand.values()))
    mean = float(b.mean() - a.mean())
    if len(a) < 2 or len(b) < 2:
        return mean, math.inf, 1.0
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return mean, 0.0, float(len(a) + len(b) - 2)
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return mean, math.sqrt(va + vb), float(dof)


def _noise(config: _Config) -> float:
    """The meter's relative standard uncertainty of a configuration's mean."""
    return math.sqrt(sum(value**2 for value in config.noise.values())) / len(config.noise)


def _with_noise(error: float, dof: float, noise: float) -> tuple[float, float]:
    """Seed spread and the meter's own uncertainty together; degrees of freedom by Satterthwaite's formula."""
    if noise == 0 or not math.isfinite(error):
        return error, dof
    if error == 0:
        return noise, math.inf
    return math.hypot(error, noise), dof * ((error**2 + noise**2) / error**2) ** 2


def _upper(value: float, error: float, dof: float) -> float:
    """p-value of "the mean is 0 or less"."""
    if error == 0:
        return 0.0 if value > 0 else 1.0
    return float(distributions.t.sf(value / error, dof))


def _estimate(mean: float, error: float, dof: float, alpha: float, count: int) -> Estimate:
    if not math.isfinite(error):
        return Estimate(mean=mean, low=None, high=None, seeds=count)
    half = float(distributions.t.ppf(1 - alpha / 2, dof)) * error
    return Estimate(mean=mean, low=mean - half, high=mean + half, seeds=count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false claim stays below the level."""
    order = np.argsort(p_values, kind="stable")
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, worst)
    return adjusted


def _reason(pair: Pair, margin: float) -> str:
    loss, saving = pair.loss_difference, pair.saving
    assert loss.low is not None
    assert loss.high is not None
    if loss.low < -margin or loss.high > margin:
        return f"the losses are not shown to be equal: {loss.low:+.4f} to {loss.high:+.4f}, margin ±{margin:g}"
    if not saving.excludes_zero:
        return "the joules are not shown to differ"
    return "not significant once all candidates are counted"


# --- as a whole --------------------------------------------------------------------------------------------


def _means(
    base: Sequence[_Config], cand: Sequence[_Config], alpha: float
) -> tuple[Estimate | None, Estimate | None, str]:
    """Mean saving at equal loss and mean loss difference at equal joules over the seeds all configurations have."""
    common = sorted(set.intersection(*(set(config.y) for config in (*base, *cand))))
    if not common:
        return None, None, "the configurations have no seed in common"
    savings, losses = [], []
    for seed in common:
        a, b = _curve(base, seed), _curve(cand, seed)
        savings.append(gap(a[:, ::-1], b[:, ::-1]))
        losses.append(gap(a, b))
    saving = _over_seeds([None if gap is None else -math.expm1(gap) for gap in savings], alpha)
    loss = _over_seeds(losses, alpha)
    why = "" if saving is not None else "the two sides reach no loss in common"
    return saving, loss, why


def _curve(configs: Sequence[_Config], seed: int) -> np.ndarray:
    """The front of one seed: columns log joules (rising) and loss (falling)."""
    both = np.array([[config.log_x[seed], config.y[seed]] for config in configs])
    front = np.unique(both[fronts.nondominated(both)], axis=0)
    return front[np.argsort(front[:, 0])]


def gap(a: np.ndarray, b: np.ndarray, steps: int = 201) -> float | None:
    """Mean over the shared first coordinate of b's second coordinate minus a's; None where nothing is shared.

    Args:
        a, b: points of two curves, [N, 2]; one point will do.
    """
    a, b = a[np.argsort(a[:, 0])], b[np.argsort(b[:, 0])]
    low, high = max(a[0, 0], b[0, 0]), min(a[-1, 0], b[-1, 0])
    if low > high:
        return None
    at = np.linspace(low, high, steps)
    return float(np.mean(np.interp(at, b[:, 0], b[:, 1]) - np.interp(at, a[:, 0], a[:, 1])))


def _over_seeds(values: Sequence[float | None], alpha: float) -> Estimate | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = float(np.mean(known))
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.inf
    return _estimate(mean, error, max(len(known) - 1.0, 1.0), alpha, len(known))
