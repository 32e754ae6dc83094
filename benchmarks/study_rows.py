"""What the reference study reads: rows of each stage, comparable and named, and the statistics of a few seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats as distributions

from pipelines import hygiene, seeds
from pipelines.boards import with_anchors
from pipelines.hygiene import Context
from pipelines.records import AnchorRecord, EpochRecord, PointRecord, PowerRecord, Store, TrialRecord

#: Stages in the order in which they run; a sweep's id is its stage's name, or begins with it and a dash.
STAGES = (
    "pretrain", "repeatability", "front", "members", "epochs", "controls", "controls_routers", "phases", "collapse",
    "long",
)  # fmt: skip
#: Stages on text of their own: their losses compare with no other stage's.
OTHER_TEXT = ("long",)
#: JSON beside the Parquet, of benchmarks that are no sweeps.
FILES = ("adapt", "opening")
AXES = ("train_energy_j", "eval_loss_nats")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """All tables of a study.

    Attributes:
        attempts: every row of `trials`, for the bill.
        tables: by stage the rows that compare, joules as measured (`pareto_front` and `compare` correct boards).
        rows: the same as values, joules corrected to the mean of the boards by their anchor, with `stage`, `config`,
            `board_factor` (corrected over measured joules) and `footing` (the board, where boards do not compare).
        left_out: by stage, what was left out and why.
        notes: what the correction of boards says.
        files: what benchmarks wrote beside the Parquet, by name: `adapt`, `opening`.
    """

    store: Store
    attempts: tuple[Row, ...]
    tables: Mapping[str, pa.Table]
    rows: Mapping[str, tuple[Row, ...]]
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    context: Context
    files: Mapping[str, Mapping[str, Any]]

    @property
    def corrected(self) -> bool:
        """True where joules of different boards compare: one board, or all corrected by their anchors."""
        return not any("not corrected" in note for note in self.notes)

    def stage(self, *names: str) -> list[Row]:
        """Corrected rows of some stages."""
        return [row for name in names for row in self.rows.get(name, ())]

    def table(self, *names: str) -> pa.Table | None:
        """Measured rows of some stages; None where nothing ran."""
        found = [self.tables[name] for name in names if name in self.tables]
        return pa.concat_tables(found) if found else None

    def epochs(self, stage: str) -> dict[str, Row]:
        """The last epoch of every trial of a stage."""
        last: dict[str, Row] = {}
        for row in self._read(EpochRecord, stage):
            if row["epoch"] > 0 and row["epoch"] >= last.get(row["trial_id"], row)["epoch"]:
                last[row["trial_id"]] = row
        return last

    def points(self, stage: str) -> pa.Table:
        """Rows of `points` of a stage, boards' anchors beside them."""
        tables = [self.store.read(PointRecord, sweep_id) for sweep_id in self._sweeps(stage)]
        return with_anchors(pa.concat_tables(tables), self.store, None)

    def power(self, stage: str) -> list[Row]:
        """Power samples of a stage."""
        return self._read(PowerRecord, stage)

    def anchors(self) -> list[Row]:
        """All readings of the anchor workload."""
        return list(self.store.read(AnchorRecord).to_pylist())

    def _sweeps(self, stage: str) -> list[str]:
        return sorted({row["sweep_id"] for row in self.attempts if row["stage"] == stage})

    def _read(self, record: Any, stage: str) -> list[Row]:
        return [row for sweep_id in self._sweeps(stage) for row in self.store.read(record, sweep_id).to_pylist()]


def load(folder: str | os.PathLike[str]) -> Study:
    """Read a study.

    Raises:
        ValueError: no trial stands there.
    """
    store = Store(folder)
    table = store.read(TrialRecord)
    if table.num_rows == 0:
        raise ValueError(f"data: expected the results of a study, got {os.fspath(folder)}, where no trial is")
    table = with_anchors(table, store, None)
    stage_of = {sweep_id: stage(sweep_id) for sweep_id in pc.unique(table["sweep_id"]).to_pylist()}
    attempts = tuple({**row, "stage": stage_of[row["sweep_id"]]} for row in table.to_pylist())
    judged = [sweep_id for sweep_id, name in stage_of.items() if name not in (None, "pretrain")]
    usual = [sweep_id for sweep_id in judged if stage_of[sweep_id] not in OTHER_TEXT]
    context = hygiene.clean(_of(table, usual or judged), AXES).context
    tables, left_out = {}, {}
    for name in STAGES[1:]:
        found = _of(table, [sweep_id for sweep_id in judged if stage_of[sweep_id] == name])
        if found.num_rows:
            wanted = context
            if name in OTHER_TEXT:
                own = hygiene.clean(found, AXES).context.corpus_fingerprint
                wanted = dataclasses.replace(context, corpus_fingerprint=own)
            cleaned = hygiene.clean(found, AXES, context=wanted)
            left_out[name] = tuple(f"{left.count} × {left.reason}" for left in cleaned.left_out)
            if cleaned.table.num_rows:
                tables[name] = cleaned.table
    rows, notes = _corrected(tables)
    return Study(
        store=store,
        attempts=attempts,
        tables=tables,
        rows=rows,
        left_out=left_out,
        notes=notes,
        context=context,
        files={path.stem: json.loads(path.read_text(encoding="utf-8")) for path in _written(folder)},
    )


def _written(folder: str | os.PathLike[str]) -> list[Path]:
    return [path for name in FILES if (path := Path(folder) / f"{name}.json").exists()]


def stage(sweep_id: str) -> str | None:
    """The stage that a sweep belongs to, None where it is none of the study's."""
    fits = [name for name in STAGES if re.fullmatch(f"{name}(-.*)?", sweep_id)]
    return max(fits, key=len, default=None)


def _of(table: pa.Table, sweep_ids: Sequence[str]) -> pa.Table:
    return table.filter(pc.is_in(table["sweep_id"], value_set=pa.array(sweep_ids, pa.string())))


def _corrected(tables: Mapping[str, pa.Table]) -> tuple[dict[str, tuple[Row, ...]], tuple[str, ...]]:
    """Rows by stage, their joules on the footing of the mean board: one correction for all stages."""
    if not tables:
        return {}, ()
    energies = [name for name in next(iter(tables.values())).column_names if name in _CORRECTED]
    measured = pa.concat_tables(tables.values())
    whole, notes = seeds.correct_boards(measured, energies)
    rows, before = whole.to_pylist(), measured["train_energy_j"].to_pylist()
    names = iter([name for name, table in tables.items() for _ in range(table.num_rows)])
    found: dict[str, list[Row]] = {}
    for row, name, joules in zip(rows, names, before, strict=True):
        factor = row["train_energy_j"] / joules if joules else 1.0
        footing = row["gpu_uuid"] if any("not corrected" in note for note in notes) else None
        more = {"stage": name, "config": json.loads(row["config_json"]), "footing": footing, "board_factor": factor}
        found.setdefault(name, []).append({**row, **more})
    return {name: tuple(part) for name, part in found.items()}, tuple(notes)


_CORRECTED = (
    "train_energy_j", "train_energy_dynamic_j", "train_j_per_token", "prefill_j_per_token", "decode_j_per_token",
    *(f"decode_j_per_token_b{batch}" for batch in (1, 8, 32, 128)),
)  # fmt: skip


# --- names -------------------------------------------------------------------------------------------------


def parts(row: Row) -> dict[str, str]:
    """What a configuration is, in words by kind; what cannot act is left out."""
    config = row["config"]
    said = {"router": "dense" if config["router"] == "dense" else _router(row)}
    if config["router"] != "dense":
        said |= {"k": f"K={config['top_k']}"}
        if acts(row):
            price = "" if config["price"] == "joules" else f" in {config['price']}"
            said["price"] = f"λ={config['energy_lambda']:g}{price}"
        said["widths"] = widths_word(widths(row))
        weight = config["regularizer_weight"]
        named = config["regularizer"] != "none" and weight
        said["regularizer"] = f"{config['regularizer']} {weight:g}" if named else "no regularizer"
        if config["temperature"] != 1:
            said["temperature"] = f"τ={config['temperature']:g}"
        if config["bias_balance_rate"]:
            said["bias"] = f"bias balancing {config['bias_balance_rate']:g}"
    if config["max_train_tokens"] is not None:
        said["tokens"] = f"{config['max_train_tokens'] / 1e6:g} M tokens"
    said["epochs"] = f"{row['epochs']} epochs" if row["epochs"] != 1 else "1 epoch"
    return said


def _router(row: Row) -> str:
    return "top-k" if row["config"]["router"] in ("energy", "topk") and not acts(row) else row["config"]["router"]


def acts(row: Row) -> bool:
    """True where λ is above 0 and the router has a price."""
    return bool(row["config"]["energy_lambda"]) and row["energy_lambda"] is not None


def widths(row: Row) -> tuple[float, ...]:
    """Width of each expert over that of the dense network."""
    config = row["config"]
    return tuple(config["expert_width_factors"] or (1.0,) * (config["num_experts"] or 8))


def widths_word(widths: Sequence[float]) -> str:
    """Widths of experts by size: `4×1+3×0.5+1×0`."""
    return "+".join(f"{count}×{width:g}" for width, count in sorted(Counter(widths).items(), reverse=True))


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows with a `name`: router, K and price where they differ, all else where it is not what most rows have."""
    said = [parts(row) for row in rows]
    sparse = [one for one in said if one["router"] != "dense"] or said
    kinds = list(dict.fromkeys(kind for one in said for kind in one))
    usual: dict[str, str | None] = {}
    for kind in kinds:
        (value, count), *others = Counter(one.get(kind) for one in sparse).most_common()
        most = 2 * count > len(sparse) and (kind not in _ALWAYS or not others)
        usual[kind] = value if most and kind != "router" else ""
    return [
        {**row, "name": ", ".join(value for kind, value in one.items() if value != usual[kind])}
        for row, one in zip(rows, said, strict=True)
    ]


#: Told of every row where rows differ in them.
_ALWAYS = ("k", "price")


def baseline(configs: Sequence[Mapping[str, Any]]) -> int | None:
    """The configuration against which a front is held: K = 2 without a price; of several, unequal experts, balanced by
    load, the weakest regularizer."""

    def place(i: int) -> tuple[Any, ...]:
        config = configs[i]
        equal = len(set(config["expert_width_factors"] or [1.0])) == 1
        return (equal, config["regularizer"] != "load_balance", config["regularizer_weight"], i)

    fits = [i for i, config in enumerate(configs) if config["top_k"] == 2 and not config["energy_lambda"]]
    return min((i for i in fits if configs[i]["router"] in ("energy", "topk")), key=place, default=None)


def by_config(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by configuration, seeds in order."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        found.setdefault(row["config_fingerprint"], []).append(row)
    return found


def first(rows: Iterable[Row], fits: Callable[[Row], bool]) -> Row | None:
    """The first row that fits."""
    return next((row for row in rows if fits(row)), None)


# --- statistics --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean with half of its 95 % interval (None from a single value) and the number of values."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Mean | None:
        """Student's t interval; None without a value."""
        known = np.array([value for value in values if value is not None], dtype=float)
        if not len(known):
            return None
        half = None
        if len(known) > 1:
            error = known.std(ddof=1) / math.sqrt(len(known))
            half = float(distributions.t.ppf(0.975, len(known) - 1) * error)
        return cls(mean=float(known.mean()), half=half, count=len(known))

    def text(self, digits: int, *, scale: float = 1.0, sign: bool = False, unit: str = "") -> str:
        """`1.234 ± 0.005`, without the half where it is not known."""
        form = f"{'+' if sign else ''}.{digits}f"
        value = f"{self.mean * scale:{form}}"
        return f"{value} ± {self.half * scale:.{digits}f}{unit}" if self.half is not None else f"{value}{unit}"


def paired(rows: Sequence[Row], base: Sequence[Row], value: Callable[[Row], float | None]) -> Mean | None:
    """Mean of the differences from `base`, seed by seed; within boards where joules of boards do not compare."""
    of_base = {(row["seed"], row["footing"]): value(row) for row in base}
    pairs = [(value(row), of_base.get((row["seed"], row["footing"]))) for row in rows]
    return Mean.of([a - b for a, b in pairs if a is not None and b is not None])


def footing(study: Study, rows: Sequence[Row], base: Sequence[Row]) -> str:
    """On which boards paired trials ran, and what makes their joules compare."""
    board = {row["seed"]: row["gpu_uuid"] for row in base}
    others = [row for row in rows if row["seed"] in board and row not in base]
    same = sum(row["gpu_uuid"] == board[row["seed"]] for row in others)
    where = f"{same} of {len(others)} pairs of trials ran on one board each"
    if not study.corrected:
        return f"{where}; boards have no anchor, so only these are compared."
    boards = {row["gpu_uuid"] for row in (*rows, *base)}
    return "All ran on one board." if len(boards) < 2 else f"{where}; joules of boards are corrected by their anchors."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A standard deviation pooled over cells of equal trials, with its degrees of freedom."""

    value: float
    dof: int

    @classmethod
    def of(cls, cells: Iterable[Sequence[float]]) -> Spread | None:
        """Pooled over cells of at least two values; None without one."""
        arrays = [np.asarray(cell, dtype=float) for cell in cells if len(cell) > 1]
        dof = sum(len(cell) - 1 for cell in arrays)
        if not dof:
            return None
        return cls(value=math.sqrt(sum(((c - c.mean()) ** 2).sum() for c in arrays) / dof), dof=dof)


def cells(rows: Iterable[Row], value: Callable[[Row], float], *keys: str) -> list[list[float]]:
    """Values of rows that agree in some columns."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(value(row))
    return list(found.values())


def log_joules(row: Row) -> float:
    """log of joules per token: differences are relative ones."""
    return math.log(row["train_energy_j"] / row["tokens_trained"])


def log_total(row: Row) -> float:
    """log of all joules of training, where numbers of epochs differ."""
    return math.log(row["train_energy_j"])


def loss(row: Row) -> float:
    """Validation loss."""
    return float(row["eval_loss_nats"])


def test_loss(row: Row) -> float | None:
    """Loss on the test split, where it was taken."""
    return None if row["test_loss_nats"] is None else float(row["test_loss_nats"])


def joules_spread(study: Study, *, over_boards: bool = False) -> Spread | None:
    """A/A repeatability of joules per token, relative, over seeds; within one board, or over all, as corrected."""
    boards = () if over_boards else ("gpu_uuid",)
    return Spread.of(cells(study.stage("repeatability"), log_joules, "config_fingerprint", *boards))


def loss_spread(study: Study) -> Spread | None:
    """Spread of loss between seeds of one configuration."""
    return Spread.of(cells(study.stage("repeatability"), loss, "config_fingerprint"))
