"""Everything that a report of one sweep looks at, read once; and how configurations look on its charts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import chart, hygiene
from pipelines.epoch_ends import POINTS, front_table
from pipelines.pareto import Front, pareto_front
from pipelines.records import AnchorRecord, EpochRecord, PowerRecord, Store, TrialRecord
from pipelines.show import axis_title, number

#: Words for columns whose names are for machines.
WORDS = {
    "train_energy_j": "training energy",
    "eval_loss_nats": "validation loss",
    "test_loss_nats": "test loss",
    "train_duration_s": "training time",
    "lifetime_energy_j": "lifetime energy",
    "decode_j_per_token": "decoding energy",
    "prefill_j_per_token": "prefill energy",
    "eval_perplexity": "validation perplexity",
    "eval_bits_per_byte": "validation loss",
    "tokens_per_s": "training speed",
}
#: Labels of which a configuration's name is made.
NAMED = ("router", "top_k", "energy_lambda", "regularizer", "regularizer_weight", "temperature", "schedule", "epochs")
FILTERS = ("router", "top_k", "energy_lambda", "regularizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """One sweep.

    Attributes:
        trials: rows of `trials`, the last attempt of each.
        front: loss against training joules.
        by_points: the front is of the points that anytime trials passed through.
        seconds: loss against training seconds; None where no trial has both.
        curves: rows of `epochs` by trial, in order; of an epoch that was repeated the last attempt's.
        links: address of each trial's MLflow run.
        look: colours and shapes.
    """

    out: str
    sweep_id: str
    store: Store
    trials: tuple[dict[str, Any], ...]
    front: Front
    by_points: bool
    seconds: Front | None
    curves: Mapping[str, list[dict[str, Any]]]
    links: Mapping[str, str]
    look: Look

    @property
    def members(self) -> set[str]:
        """Trials whose configuration is on the front."""
        return {trial for row in self.front.rows() for trial in row["trial_id"].split()}

    @property
    def knee_trial(self) -> str | None:
        """The first trial of the knee's configuration."""
        if self.front.knee is None:
            return None
        return str(self.front.configs["trial_id"][self.front.knee].as_py()).split()[0]

    @property
    def bits_per_nat(self) -> float | None:
        """Factor from nats per token to bits per byte, where all trials agree on it (one corpus, one tokenizer)."""
        factors = [
            row["eval_bits_per_byte"] / row["eval_loss_nats"]
            for row in self.trials
            if row["eval_bits_per_byte"] and row["eval_loss_nats"] and math.isfinite(row["eval_loss_nats"])
        ]
        if not factors or max(factors) > 1.001 * min(factors):
            return None
        return sum(factors) / len(factors)

    @property
    def anchors(self) -> list[dict[str, Any]]:
        """Readings of the anchor workload, those that were skipped too."""
        return list(self.store.read(AnchorRecord, self.sweep_id).to_pylist())

    def power(self, trial_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Power samples of some trials, in order of time, of each its last attempt."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.store.read(PowerRecord, self.sweep_id, trial_ids=trial_ids).to_pylist():
            found.setdefault(row["trial_id"], []).append(row)
        for trial, rows in found.items():
            last = max(row["attempt"] for row in rows)
            found[trial] = sorted((row for row in rows if row["attempt"] == last), key=lambda row: row["time_s"])
        return found


def load(out: str | os.PathLike[str], sweep_id: str, links: Mapping[str, str] | None = None) -> Results:
    """Read one sweep.

    Raises:
        ValueError: the sweep has no trials here.
    """
    store = Store(out)
    rows = store.read(TrialRecord, sweep_id).to_pylist()
    if not rows:
        raise ValueError(f"sweep: expected one that has trials in {os.fspath(out)}, got {sweep_id!r}")
    last: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["attempt"]):
        last[row["trial_id"]] = row
    seconds = pareto_front(store, "train_duration_s", "eval_loss_nats", sweep_id=sweep_id)
    trials = tuple(last.values())
    table = front_table(store, sweep_id)
    front = pareto_front(store, sweep_id=sweep_id, table=table)
    ends = front.rows(members_only=False) if table == POINTS else []
    return Results(
        out=os.fspath(out),
        sweep_id=sweep_id,
        store=store,
        trials=trials,
        front=front,
        by_points=table == POINTS,
        seconds=seconds if len(seconds) else None,
        curves=_curves(store, sweep_id),
        links=links or {},
        look=Look.of([*trials, *ends]),
    )


def _curves(store: Store, sweep_id: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    rows = store.read(EpochRecord, sweep_id).to_pylist()
    for row in sorted(rows, key=lambda row: row["attempt"]):
        found.setdefault(row["trial_id"], {})[row["epoch"]] = row
    return {trial: [by_epoch[epoch] for epoch in sorted(by_epoch)] for trial, by_epoch in found.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How a configuration is drawn: λ is colour, top-k is shape and dash; no λ is ink, dense a cross."""

    lambdas: tuple[float, ...]
    top_ks: tuple[int, ...]
    dense: bool
    named: tuple[str, ...] = NAMED

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Look:
        """The look that tells these rows apart."""
        sparse = [row for row in rows if row["router"] != "dense"]
        return cls(
            lambdas=tuple(sorted({row["energy_lambda"] for row in rows if row["energy_lambda"] is not None})),
            top_ks=tuple(sorted({row["top_k"] for row in rows if row["top_k"] is not None})),
            dense=any(row["top_k"] is None for row in rows),
            named=tuple(name for name in NAMED if name == "router" or len({row[name] for row in sparse}) > 1),
        )

    def name(self, row: Mapping[str, Any]) -> str:
        """A configuration in a few words: what tells it from the others."""
        return name_of({name: row[name] for name in self.named if name in row})

    def colour(self, row: Mapping[str, Any]) -> int | None:
        """Index of the colour ramp; None for a router without a price."""
        value = row["energy_lambda"]
        if value is None:
            return None
        if len(self.lambdas) < 2:
            return 1
        return round(self.lambdas.index(value) * (chart.COLOURS - 1) / (len(self.lambdas) - 1))

    def shape(self, row: Mapping[str, Any]) -> int:
        """Index of the marker."""
        if row["top_k"] is None:
            return len(chart.SHAPES) - 1
        return self.top_ks.index(row["top_k"]) % (len(chart.SHAPES) - 1)

    def dash(self, row: Mapping[str, Any]) -> int:
        """Index of the dash pattern."""
        return 0 if row["top_k"] is None else self.top_ks.index(row["top_k"]) % len(chart.DASHES)

    def legend(self, kind: str = "point") -> tuple[chart.Key, ...]:
        """Entries for λ by colour and top-k by shape or dash."""
        keys = [
            chart.Key(label=f"λ = {value:g}", kind=kind, colour=self.colour({"energy_lambda": value}))
            for value in self.lambdas
        ]
        for value in self.top_ks:
            row = {"top_k": value}
            keys.append(chart.Key(label=f"top-{value}", kind=kind, shape=self.shape(row), dash=self.dash(row)))
        if self.dense:
            keys.append(chart.Key(label="dense, or K varies", kind=kind, shape=self.shape({"top_k": None})))
        return tuple(keys)


def title_of(column: str, *, modelled: bool) -> str:
    """A column in words, with its unit; joules that a model gave say so."""
    head = axis_title(column, modelled=modelled)
    unit = head[head.index("[") :].replace("[", "(").replace("]", ")") if "[" in head else ""
    return f"{WORDS.get(column, column)} {unit}".strip()


def name_of(row: Mapping[str, Any]) -> str:
    """A configuration in a few words."""
    words = [str(row["router"])]
    if row.get("top_k") is not None:
        words.append(f"top-{row['top_k']}")
    if row.get("energy_lambda") is not None:
        words.append(f"λ={row['energy_lambda']:g}")
    weight = row.get("regularizer_weight")
    if row.get("regularizer"):
        words.append(str(row["regularizer"]) + ("" if weight is None else f" {number(weight)}"))
    elif weight is not None:
        words.append(f"weight {number(weight)}")
    if row.get("temperature") is not None:
        words.append(f"τ={row['temperature']:g}")
    if row.get("schedule"):
        words.append(str(row["schedule"]))
    if row.get("epochs") is not None:
        words.append(f"{row['epochs']:g} epochs" if row["epochs"] != 1 else "1 epoch")
    return ", ".join(words)


def keys_of(row: Mapping[str, Any], **more: str) -> dict[str, str]:
    """What the filters of the page look at."""
    found = {name.replace("_", "-"): _key(row.get(name)) for name in FILTERS}
    return {**found, **more}


def joules_word(front: Front) -> str:
    """`joules`, or `modelled joules`."""
    return "modelled joules" if front.modelled else "joules"


def is_modelled(row: Mapping[str, Any]) -> bool:
    """True where a row's joules come from a model."""
    return row.get("energy_source") == "modelled"


def energy_cell(row: Mapping[str, Any], column: str) -> str:
    """A value of joules for a table; modelled ones say so."""
    value = row.get(column)
    if value is None:
        return "–"
    return number(value) + (" modelled" if is_modelled(row) and hygiene.is_energy(column) else "")


def _key(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
