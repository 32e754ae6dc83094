"""What may stand on one front: rows that can be compared, and a count with a reason for all others.

Pure functions over Arrow tables. A row is left out for the first reason that applies to it, so the counts
of all reasons and the rows kept add up to the rows read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: A front compares rows that share these, as far as its axes depend on them.
CONTEXT = ("energy_source", "gpu_name", "power_limit_w", "corpus_fingerprint")
#: Columns that `clean` looks at; those that a table lacks are skipped.
COLUMNS = (*CONTEXT, "sweep_id", "trial_id", "attempt", "config_fingerprint", "seed", "state", "censored", "shared_gpu")
SHOWN_IDS = 20
#: Columns of this type hold codes already: hashing a million fingerprints once is enough.
CODE = pa.uint32()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Rows that are not on the front, and why.

    Attributes:
        reason: why, in words.
        count: how many rows.
        trial_ids: the first of them (at most 20).
    """

    reason: str
    count: int
    trial_ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the rows of one front share; None where the rows do not say, or where they were mixed on demand."""

    energy_source: str | None = None
    gpu_name: str | None = None
    power_limit_w: float | None = None
    corpus_fingerprint: str | None = None

    @property
    def modelled(self) -> bool:
        """True where the joules come from a model, not from a meter."""
        return self.energy_source == "modelled"

    def __str__(self) -> str:
        parts = [self.gpu_name or "CPU"]
        if self.power_limit_w is not None:
            parts.append(f"{self.power_limit_w:.0f} W limit")
        parts.append(f"joules {self.energy_source}" if self.energy_source else "no energy source")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clean:
    """Rows of one context, ready for a front.

    Attributes:
        table: the rows kept.
        left_out: reasons with counts; the counts and the rows kept add up to the rows read.
        context: what the rows share.
        others: contexts that were separated, with their number of rows.
    """

    table: pa.Table
    left_out: tuple[LeftOut, ...]
    context: Context
    others: tuple[tuple[Context, int], ...] = ()


class _Sieve:
    """Rows still in, and the reasons for which the others went out."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.keep_N = np.ones(table.num_rows, dtype=bool)
        self.left: list[LeftOut] = []

    def has(self, column: str) -> bool:
        return column in self.table.column_names

    def drop(self, reason: str, bad_N: np.ndarray) -> None:
        out_N = self.keep_N & bad_N
        count = int(out_N.sum())
        if count == 0:
            return
        ids: tuple[str, ...] = ()
        if self.has("trial_id"):
            first = np.flatnonzero(out_N)[:SHOWN_IDS]
            ids = tuple(self.table["trial_id"].take(pa.array(first)).to_pylist())
        self.left.append(LeftOut(reason=reason, count=count, trial_ids=ids))
        self.keep_N &= ~bad_N


def clean(
    table: pa.Table,
    axes: Sequence[str],
    *,
    mix: bool = False,
    whole_rows: bool = False,
    context: Context | None = None,
    columns: Sequence[str] | None = None,
) -> Clean:
    """Keep the rows that can be compared on `axes`; count the others by reason.

    Args:
        table: rows of `trials` or `points`.
        axes: numeric columns that the front will use.
        mix: put energy sources, GPU models, power limits and corpora together.
        whole_rows: rows are valid ends whatever became of their trial (the `points` table).
        context: take these rows; the largest group where None.
        columns: of the rows kept only these; all where None.

    Returns:
        The rows kept, with the reasons and counts of the rest.
    """
    sieve = _Sieve(table)
    _drop_unfinished(sieve, whole_rows=whole_rows)
    for axis in axes:
        _drop_bad_numbers(sieve, axis)
    if any(depends_on_device(axis) for axis in axes) and sieve.has("shared_gpu"):
        sieve.drop("shared GPU", is_true(table["shared_gpu"]))
    keys = [] if mix else [key for key in _separating(axes) if sieve.has(key)]
    chosen, others = _separate(sieve, keys, context)
    _drop_duplicates(sieve)
    kept = table if columns is None else table.select(columns)
    kept = kept if sieve.keep_N.all() else kept.filter(pa.array(sieve.keep_N))
    return Clean(table=kept, left_out=tuple(sieve.left), context=chosen, others=others)


def is_energy(column: str) -> bool:
    """True for a column of joules."""
    return column.endswith("_j") or "_j_" in column


def depends_on_device(column: str) -> bool:
    """True for a column whose value belongs to the device: joules, seconds, watts, degrees, speed."""
    return is_energy(column) or column.endswith(("_s", "_w", "_c"))


def is_true(column: pa.ChunkedArray) -> np.ndarray:
    """A boolean column as numpy; null counts as False."""
    return column.fill_null(False).combine_chunks().to_numpy(zero_copy_only=False).astype(bool)


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A numeric column as float64; null becomes NaN."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


class Values:
    """What the codes of a column stand for; the last code is null."""

    def __init__(self, dictionary: pa.Array) -> None:
        self.dictionary = dictionary

    def __len__(self) -> int:
        return len(self.dictionary) + 1

    def __getitem__(self, code: int) -> Any:
        return self.dictionary[int(code)].as_py() if code < len(self.dictionary) else None


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, Values]:
    """A column as integer codes in order of appearance and the values they stand for; null is a value of its own."""
    if column.type == CODE:
        return column.to_numpy(), Values(pa.array([], pa.string()))
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
        encoded = column.combine_chunks()
    else:
        encoded = column.combine_chunks().dictionary_encode()
    indices = encoded.indices
    if indices.null_count:
        indices = indices.fill_null(len(encoded.dictionary))
    return indices.to_numpy(zero_copy_only=False), Values(encoded.dictionary)


def _drop_unfinished(sieve: _Sieve, *, whole_rows: bool) -> None:
    table = sieve.table
    if sieve.has("attempt") and sieve.has("trial_id"):
        sieve.drop("superseded by a later attempt", _superseded(table, whole_rows=whole_rows))
    if whole_rows:
        return
    if sieve.has("state"):
        sieve.drop("FAILED", is_true(pc.equal(table["state"], "FAILED")))
        sieve.drop("censored (ended early)", is_true(pc.equal(table["state"], "STOPPED")))
    if sieve.has("censored"):
        sieve.drop("censored (ended early)", is_true(table["censored"]))
        _merge_last(sieve)


def _merge_last(sieve: _Sieve) -> None:
    """One line for the trials that say censored by state and those that say it by flag."""
    *head, last = sieve.left or [LeftOut(reason="", count=0)]
    if head and head[-1].reason == last.reason:
        ids = (*head[-1].trial_ids, *last.trial_ids)[:SHOWN_IDS]
        sieve.left = [*head[:-1], dataclasses.replace(last, count=head[-1].count + last.count, trial_ids=ids)]


def _superseded(table: pa.Table, *, whole_rows: bool) -> np.ndarray:
    attempt_N = table["attempt"].to_numpy()
    if table.num_rows == 0 or (attempt_N == attempt_N[0]).all():
        return np.zeros(table.num_rows, dtype=bool)
    keys = [name for name in ("sweep_id", "trial_id") if name in table.column_names]
    if whole_rows:
        keys.append("epochs")
    group_N = _combine([codes(table[key])[0] for key in keys])
    last_G = np.full(group_N.max() + 1, -1, dtype=np.int64)
    np.maximum.at(last_G, group_N, attempt_N)
    return attempt_N < last_G[group_N]


def _drop_bad_numbers(sieve: _Sieve, axis: str) -> None:
    column = sieve.table[axis]
    value_N = numbers(column)
    null_N = np.zeros(len(value_N), dtype=bool)
    if column.null_count:
        null_N = column.is_null().to_numpy()
    sieve.drop(f"{axis} is null", null_N)
    sieve.drop(f"{axis} is NaN", np.isnan(value_N))
    sieve.drop(f"{axis} is infinite", np.isinf(value_N))
    if is_energy(axis):
        sieve.drop(f"{axis} is not positive", ~(value_N > 0))


def _separating(axes: Sequence[str]) -> list[str]:
    keys: list[str] = []
    if any(is_energy(axis) for axis in axes):
        keys.append("energy_source")
    if any(depends_on_device(axis) for axis in axes):
        keys += ["gpu_name", "power_limit_w"]
    if any("loss" in axis or "perplexity" in axis or "bits_per_byte" in axis for axis in axes):
        keys.append("corpus_fingerprint")
    return keys


def _separate(
    sieve: _Sieve, keys: Sequence[str], wanted: Context | None
) -> tuple[Context, tuple[tuple[Context, int], ...]]:
    """Keep one context; drop the rows of the others with a reason that names what differs."""
    encoded = {key: codes(sieve.table[key]) for key in keys}
    if not keys or not sieve.keep_N.any():
        return _shared_context(sieve), ()
    group_N = _combine([code for code, _ in encoded.values()])
    groups, first, counts = np.unique(group_N[sieve.keep_N], return_index=True, return_counts=True)
    rows = np.flatnonzero(sieve.keep_N)[first]
    found = [Context(**{key: values[code[row]] for key, (code, values) in encoded.items()}) for row in rows]
    order = sorted(range(len(groups)), key=lambda i: (-counts[i], found[i].modelled, str(found[i])))
    best = order[0]
    if wanted is not None:
        match = [i for i in order if all(getattr(found[i], key) == getattr(wanted, key) for key in keys)]
        best = match[0] if match else best
    for i in order:
        if i != best:
            differing = [key for key in keys if getattr(found[i], key) != getattr(found[best], key)]
            what = ", ".join(f"{key}={getattr(found[i], key)}" for key in differing)
            sieve.drop(f"other context: {what}", group_N == groups[i])
    return found[best], tuple((found[i], int(counts[i])) for i in order if i != best)


def _shared_context(sieve: _Sieve) -> Context:
    """What the kept rows all share where nothing had to be separated."""
    shared: dict[str, Any] = {}
    for key in CONTEXT:
        if sieve.has(key) and sieve.keep_N.any():
            code_N, values = codes(sieve.table[key])
            seen = np.unique(code_N[sieve.keep_N])
            shared[key] = values[seen[0]] if len(seen) == 1 else None
    return Context(**shared)


def _drop_duplicates(sieve: _Sieve) -> None:
    """Of rows with one configuration and one seed the first stays: choosing the best would flatter it."""
    if not (sieve.has("config_fingerprint") and sieve.has("seed")):
        return
    kept = np.flatnonzero(sieve.keep_N)
    config_N = codes(sieve.table["config_fingerprint"])[0]
    if np.bincount(config_N[kept], minlength=1).max() <= 1:
        return
    pair = _combine([config_N[kept], codes(sieve.table["seed"])[0][kept]])
    first = np.zeros(len(kept), dtype=bool)
    first[np.unique(pair, return_index=True)[1]] = True
    again_N = np.zeros(len(sieve.keep_N), dtype=bool)
    again_N[kept[~first]] = True
    sieve.drop("duplicate of a configuration and seed", again_N)


def _combine(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One dense integer code for rows that agree in every part."""
    code_N = parts[0]
    for part_N in parts[1:]:
        if len(part_N) == 0:
            return code_N
        code_N = code_N.astype(np.int64) * (int(part_N.max()) + 1) + part_N
        if code_N.max() > 2**31:
            code_N = np.unique(code_N, return_inverse=True)[1]
    return code_N
