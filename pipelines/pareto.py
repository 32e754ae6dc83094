"""Pareto fronts from Parquet alone: what may be compared, what is not dominated, and how sure that is.

A point is a configuration: the mean over its seeds, with intervals on both axes. `hygiene` decides which
rows may stand on one front, `fronts` holds the mathematics, `seeds` the statistics.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import fronts, hygiene, seeds
from pipelines.boards import with_anchors
from pipelines.hygiene import Clean, Context, LeftOut
from pipelines.records import PointRecord, Record, Store, TrialRecord, arrow_schema
from pipelines.reference import stored_reference

#: Columns that say which configuration a point is, in the order in which they are shown.
LABELS = (
    "router",
    "energy_lambda",
    "top_k",
    "num_experts",
    "price",
    "regularizer",
    "regularizer_weight",
    "temperature",
    "epochs",
    "schedule",
)
#: Derived axis: train joules plus decoded tokens times joules per decoded token.
LIFETIME = "lifetime_energy_j"
#: Derived columns and what they are made of.
_DERIVED = {LIFETIME: ("train_energy_j", "decode_j_per_token")}
_MORE = ("gpu_uuid", "anchor_j_per_token", "trial_fingerprint")
_TABLES: dict[str, type[Record]] = {"trials": TrialRecord, "points": PointRecord}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """One axis of a front.

    Attributes:
        column: a numeric column.
        maximise: True where more is better.
    """

    column: str
    maximise: bool = False

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read `column`, `column:min` or `column:max`.

        Raises:
            ValueError: another direction.
        """
        column, _, direction = text.partition(":")
        if direction not in ("", "min", "max"):
            raise ValueError(f"direction of {column!r}: expected 'min' or 'max', got {direction!r}")
        return cls(column=column, maximise=direction == "max")

    @property
    def sign(self) -> float:
        """Factor that turns values into costs."""
        return -1.0 if self.maximise else 1.0

    def cost(self, value: float | None) -> float:
        """A value as searches count it: less is better, joules as logarithms (nats); NaN where it is none."""
        if value is None or not math.isfinite(value):
            return math.nan
        if hygiene.is_energy(self.column):
            value = math.log(value) if value > 0 else math.nan
        return self.sign * value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Front:
    """A front and everything that was decided on the way to it.

    Legend: N configurations, M objectives.

    Attributes:
        objectives: the axes.
        configs: one row per configuration: trial ids, seeds, labels.
        mean_NM: mean over seeds, in the units of the columns.
        half_NM: half width of the 95 % interval of the mean; NaN where it is not known.
        on_front_N: which configurations are not dominated.
        dominated_by_N: row of a configuration that dominates this one; -1 on the front.
        probability_N: bootstrap probability of being on the front; None where no configuration has two seeds.
        knee: row of the knee, None where the front has none.
        knees: row of the knee by scaling; they agree where the knee is a property of the front.
        hypervolume: volume dominated up to `reference_M`; None without points.
        reference_M: reference point, fixed at the sweep's first front.
        beyond_reference: front members beyond the reference point, which add no volume.
        context: what all rows share.
        left_out: rows that are not here, with reasons.
        others: contexts that stand on fronts of their own.
        notes: what else a reader should know.
    """

    objectives: tuple[Objective, ...]
    configs: pa.Table
    mean_NM: np.ndarray
    half_NM: np.ndarray
    on_front_N: np.ndarray
    dominated_by_N: np.ndarray
    probability_N: np.ndarray | None
    knee: int | None
    knees: Mapping[str, int | None]
    hypervolume: float | None
    reference_M: tuple[float, ...] | None
    beyond_reference: int
    context: Context
    left_out: tuple[LeftOut, ...]
    others: tuple[tuple[Context, int], ...]
    notes: tuple[str, ...]
    attainment: seeds.Attainment | None = None

    def __len__(self) -> int:
        """Number of front members."""
        return int(self.on_front_N.sum())

    @property
    def modelled(self) -> bool:
        """True where an axis shows joules that a model gave."""
        return self.context.modelled and any(hygiene.is_energy(axis.column) for axis in self.objectives)

    @property
    def knee_is_stable(self) -> bool | None:
        """True where every scaling that has a knee names the same one; None without a knee."""
        return None if self.knee is None else {at for at in self.knees.values() if at is not None} == {self.knee}

    def order(self) -> np.ndarray:
        """Rows of the front members, the cheapest first."""
        members_F = np.flatnonzero(self.on_front_N)
        keys = [self.mean_NM[members_F, m] * axis.sign for m, axis in enumerate(self.objectives)]
        return members_F[np.lexsort(keys[::-1])]

    def rows(self, *, members_only: bool = True) -> list[dict[str, Any]]:
        """Plain rows, one per configuration: labels, each axis with `_low` and `_high`, place on the front."""
        index = self.order() if members_only else np.arange(len(self.on_front_N))
        labels = self.configs.take(pa.array(index)).to_pylist()
        ids = self.configs["trial_id"]
        return [self._row(int(i), label, ids) for i, label in zip(index, labels, strict=True)]

    def _row(self, i: int, label: Mapping[str, Any], ids: pa.ChunkedArray) -> dict[str, Any]:
        row = dict(label)
        for m, axis in enumerate(self.objectives):
            mean, half = float(self.mean_NM[i, m]), float(self.half_NM[i, m])
            known = np.isfinite(half)
            row[axis.column] = mean
            row[f"{axis.column}_low"] = mean - half if known else None
            row[f"{axis.column}_high"] = mean + half if known else None
        row["on_front"] = bool(self.on_front_N[i])
        row["front_probability"] = None if self.probability_N is None else float(self.probability_N[i])
        row["knee"] = i == self.knee
        by = int(self.dominated_by_N[i])
        row["dominated_by"] = ids[by].as_py() if by >= 0 else None
        row["energy_source"] = self.context.energy_source
        return row

    def metrics(self) -> dict[str, float]:
        """Numbers that describe the front as a whole."""
        found: dict[str, float | None] = {"front_size": float(len(self)), "hypervolume": self.hypervolume}
        found["configurations"] = float(len(self.on_front_N))
        found["rows_left_out"] = float(sum(left.count for left in self.left_out))
        if self.knee is not None:
            for m, axis in enumerate(self.objectives):
                found[f"knee_{axis.column}"] = float(self.mean_NM[self.knee, m])
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> str:
        """The whole front as JSON."""
        ids = self.configs["trial_id"]
        knees = {name: None if at is None else ids[at].as_py() for name, at in self.knees.items()}
        document = {
            "objectives": [dataclasses.asdict(axis) for axis in self.objectives],
            "context": dataclasses.asdict(self.context),
            "joules": "modelled" if self.modelled else self.context.energy_source,
            "front": self.rows(),
            "hypervolume": self.hypervolume,
            "reference": None if self.reference_M is None else list(self.reference_M),
            "beyond_reference": self.beyond_reference,
            "knee_by_scaling": knees,
            "left_out": [dataclasses.asdict(left) for left in self.left_out],
            "other_contexts": [{**dataclasses.asdict(context), "rows": rows} for context, rows in self.others],
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2, allow_nan=False)


def pareto_front(
    source: Store | pa.Table | str | os.PathLike[str],
    x: str = "train_energy_j",
    y: str = "eval_loss_nats",
    z: str | None = None,
    *,
    sweep_id: str | None = None,
    table: str = "trials",
    mix: bool = False,
    context: Context | None = None,
    per_trial: bool = False,
    decode_tokens: float | None = None,
    reference: Sequence[float] | None = None,
    bootstrap: int = 1000,
) -> Front:
    """The non-dominated configurations of a sweep.

    Args:
        source: a store, the folder or URI of one, or a table of rows.
        x: first axis: `column`, `column:min` (default) or `column:max`.
        y: second axis.
        z: third axis.
        sweep_id: one sweep; all where None.
        table: `trials`, or `points` (every epoch boundary as a configuration of its own).
        mix: put energy sources, GPU models, power limits and corpora on one front.
        context: take this one; the one with most rows where None.
        per_trial: every trial stands for itself; else seeds of one configuration are averaged.
        decode_tokens: adds the axis `lifetime_energy_j` = train joules + this many decoded tokens.
        reference: reference point of the hypervolume, in the units of the axes. Where None, the one that was
            stored at the sweep's first front, or the worst values and a tenth of their range beyond.
        bootstrap: resamples for the probability of being on the front; 0 for none.

    Returns:
        The front; empty where no row may stand on it.

    Raises:
        ValueError: an unknown table, column or direction.
    """
    axes = tuple(Objective.parse(text) for text in (x, y, z) if text is not None)
    store = None if isinstance(source, pa.Table) else _as_store(source)
    rows = _load(source if store is None else store, axes, table, sweep_id)
    if any(axis.column == LIFETIME for axis in axes):
        rows = with_lifetime(rows, decode_tokens)
    spent = (*hygiene.CONTEXT, "attempt", "state", "censored", "shared_gpu")
    cleaned = hygiene.clean(
        rows,
        [axis.column for axis in axes],
        mix=mix,
        whole_rows=table == "points",
        context=context,
        columns=[name for name in rows.column_names if name not in spent],
    )
    front = _front_of(cleaned, axes, per_trial=per_trial, bootstrap=bootstrap)
    if reference is None and store is not None and len(front.mean_NM):
        key: dict[str, Any] = {
            "table": table,
            "axes": [x, y, z],
            "decode_tokens": decode_tokens,
            "sweep_id": sweep_id,
            "mix": mix,
        }
        key |= {"context": dataclasses.asdict(cleaned.context)}
        reference, note = stored_reference(store, key, _default_reference(front))
        front = dataclasses.replace(front, notes=(*front.notes, *note))
    return _with_hypervolume(front, reference)


def pareto_fronts(source: Store | pa.Table | str | os.PathLike[str], *axes: str, **options: Any) -> list[Front]:
    """One front for every context (energy source, GPU model, power limit, corpus), the largest first."""
    first = pareto_front(source, *axes, **options)
    return [first, *(pareto_front(source, *axes, **{**options, "context": other}) for other, _ in first.others)]


def with_lifetime(rows: pa.Table, decode_tokens: float | None) -> pa.Table:
    """Rows with `lifetime_energy_j`: training joules plus `decode_tokens` times joules per decoded token.

    Raises:
        ValueError: no number of tokens was given.
    """
    if decode_tokens is None:
        raise ValueError(f"{LIFETIME}: expected decode_tokens (tokens decoded over the model's life), got None")
    train, decode = (rows[name].cast(pa.float64()) for name in _DERIVED[LIFETIME])
    rows = rows.append_column(LIFETIME, pc.add(train, pc.multiply(decode, float(decode_tokens))))
    if "train_energy_uncertainty_j" in rows.column_names:
        rows = rows.append_column(seeds.uncertainty_column(LIFETIME), rows["train_energy_uncertainty_j"])
    return rows


def _as_store(source: Store | str | os.PathLike[str]) -> Store:
    return source if isinstance(source, Store) else Store(source)


def _load(source: Store | pa.Table, axes: Sequence[Objective], table: str, sweep_id: str | None) -> pa.Table:
    """Only the columns that a front needs; an unknown table or axis is an error."""
    if table not in _TABLES:
        raise ValueError(f"table: expected one of {sorted(_TABLES)}, got {table!r}")
    schema = source.schema if isinstance(source, pa.Table) else arrow_schema(_TABLES[table])
    wanted = [name for axis in axes for name in _DERIVED.get(axis.column, (axis.column,))]
    for name in wanted:
        if name not in schema.names or not _is_number(schema.field(name).type):
            raise ValueError(f"axis: expected a numeric column of {table!r}, got {name!r}")
    extra = (*hygiene.COLUMNS, *LABELS, *map(seeds.uncertainty_column, wanted), *_MORE)
    names = [name for name in dict.fromkeys([*wanted, *extra]) if name in schema.names]
    if isinstance(source, pa.Table):
        rows = source.select(names)
        return rows if sweep_id is None else rows.filter(pc.equal(source["sweep_id"], sweep_id))
    rows = with_anchors(source.read(_TABLES[table], sweep_id, columns=names, encode=True), source, sweep_id)
    if table == "points":
        rows = with_corpus(rows, source, sweep_id)
    at = names.index("config_fingerprint")
    coded = rows["config_fingerprint"].combine_chunks().dictionary_encode().indices.cast(hygiene.CODE)
    return rows.set_column(at, "config_fingerprint", coded)


def with_corpus(points: pa.Table, store: Store, sweep_id: str | None) -> pa.Table:
    """Rows of `points` with the column `corpus_fingerprint` of their trials, so that texts do not mix."""
    key = ("sweep_id", "trial_id")
    trials = store.read(TrialRecord, sweep_id, columns=[*key, "corpus_fingerprint"]).to_pylist()
    known = {(r["sweep_id"], r["trial_id"]): r["corpus_fingerprint"] for r in trials if r["corpus_fingerprint"]}
    pairs = zip(*(points[name].to_pylist() for name in key), strict=True)
    return points.append_column("corpus_fingerprint", pa.array([known.get(pair) for pair in pairs], pa.string()))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _front_of(cleaned: Clean, axes: tuple[Objective, ...], *, per_trial: bool, bootstrap: int) -> Front:
    columns = [axis.column for axis in axes]
    sign_M = np.array([axis.sign for axis in axes])
    table, notes = seeds.correct_boards(cleaned.table, columns)
    stats = seeds.summarise(table, columns, per_trial=per_trial)
    cost_NM = stats.mean_NM * sign_M
    on_N = fronts.nondominated(cost_NM)
    members = np.flatnonzero(on_N)
    positive_M = np.array([hygiene.is_energy(column) or column.endswith("_s") for column in columns])
    knees: dict[str, int | None] = {}
    if len(members):
        found = fronts.knees_by_scaling(cost_NM[members], positive_M)
        knees = {name: None if at is None else int(members[at]) for name, at in found.items()}
    kept = [name for name in ("sweep_id", *LABELS) if name in table.column_names]
    configs = table.select(kept)
    if not stats.each_row_once:
        configs = configs.take(pa.array(stats.first_N))
    configs = configs.append_column("trial_id", stats.trial_ids(table)).append_column("seeds", pa.array(stats.count_N))
    return Front(
        objectives=axes,
        configs=configs,
        mean_NM=stats.mean_NM,
        half_NM=stats.half_NM,
        on_front_N=on_N,
        dominated_by_N=fronts.dominators(cost_NM, on_N),
        probability_N=seeds.front_probability(stats, sign_M, resamples=bootstrap),
        knee=knees.get("linear"),
        knees=knees,
        hypervolume=None,
        reference_M=None,
        beyond_reference=0,
        context=cleaned.context,
        left_out=cleaned.left_out,
        others=cleaned.others,
        notes=tuple(notes),
        attainment=seeds.attainment(stats, sign_M),
    )


def _default_reference(front: Front) -> tuple[float, ...]:
    sign_M = np.array([axis.sign for axis in front.objectives])
    return tuple(float(v) for v in fronts.reference_point(front.mean_NM * sign_M) * sign_M)


def _with_hypervolume(front: Front, reference: Sequence[float] | None) -> Front:
    if len(front.mean_NM) == 0:
        return front
    reference = _default_reference(front) if reference is None else tuple(float(v) for v in reference)
    if len(reference) != len(front.objectives):
        raise ValueError(f"reference: expected {len(front.objectives)} numbers, got {len(reference)}")
    sign_M = np.array([axis.sign for axis in front.objectives])
    cost_FM = front.mean_NM[front.on_front_N] * sign_M
    reference_M = np.array(reference) * sign_M
    beyond = int((cost_FM >= reference_M).any(axis=1).sum())
    volume = fronts.hypervolume(cost_FM, reference_M)
    return dataclasses.replace(front, hypervolume=volume, reference_M=tuple(reference), beyond_reference=beyond)
