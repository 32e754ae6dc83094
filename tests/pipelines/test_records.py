"""The tables: documented once, read across versions, compacted without losing a row."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from pipelines import compaction, parquet
from pipelines.export import export_csv
from pipelines.records import (
    SCHEMA_VERSION,
    TABLES,
    EpochRecord,
    PowerRecord,
    Store,
    TrialRecord,
    arrow_schema,
    column_unit,
    schema_markdown,
    to_table,
)
from tests.pipelines import synthetic
from tests.pipelines.synthetic import SWEEP, trial

#: Tables that a synthetic sweep has.
WRITTEN = ("trials", "points", "epochs", "power")
DOCS = Path(__file__).parents[2] / "docs"


def test_the_documentation_of_the_tables_is_what_the_code_says() -> None:
    """After a change of a column: `joulemoe schema --write docs/schema.md`."""
    assert (DOCS / "schema.md").read_text().endswith(schema_markdown())


def test_every_column_is_documented_in_the_files_themselves(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial()])
    for record in map(TABLES.__getitem__, WRITTEN):
        (path,) = store.files(record, SWEEP)
        schema = pq.read_schema(path)
        assert schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
        assert all(field.metadata[b"meaning"] for field in schema)
        assert schema.equals(arrow_schema(record), check_metadata=True)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    row = trial(routing_agreement=None, converged_at=None)
    store = synthetic.write(tmp_path, [row])
    (back,) = store.read(TrialRecord).to_pylist()
    assert TrialRecord(**back) == row


def test_an_older_file_reads_with_nulls_for_what_it_lacks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    table = to_table(TrialRecord, [trial("old")]).drop_columns(["anchor_j_per_token", "decode_j_per_token_b128"])
    table = table.replace_schema_metadata({"schema_version": "1", "table": "trials"})
    path = Path(store.path(TrialRecord, SWEEP, "old", 0))
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    synthetic.write(tmp_path, [trial("new", anchor_j_per_token=1e-3)])
    found = store.read(TrialRecord)
    by_id = dict(zip(found["trial_id"].to_pylist(), found["anchor_j_per_token"].to_pylist(), strict=True))
    assert by_id == {"old": None, "new": 1e-3}
    assert store.read(TrialRecord, columns=["anchor_j_per_token"]).num_rows == 2


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    table = to_table(TrialRecord, [trial()]).replace_schema_metadata({"schema_version": "99"})
    path = Path(store.path(TrialRecord, SWEEP, "t0", 0))
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=rf"schema_version: expected at most {SCHEMA_VERSION}, got 99"):
        store.read(TrialRecord)


def test_unwritten_stores_are_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.read(EpochRecord).num_rows == 0
    assert store.read(TrialRecord, columns=["trial_id"]).schema.names == ["trial_id"]
    assert store.sweep_ids() == []


def test_sweeps_are_listed_by_age(tmp_path: Path) -> None:
    later = synthetic.START + dt.timedelta(hours=1)
    store = synthetic.write(tmp_path, [trial(sweep_id="b"), trial(sweep_id="a", started_at=later)])
    assert store.sweep_ids() == ["b", "a"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store.write(TrialRecord, [trial()], sweep_id=SWEEP, trial_id="t0", attempt=0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_units() -> None:
    assert column_unit("train_energy_j") == "J"
    assert column_unit("router") == ""
    assert column_unit("no_such_column") == ""


# --- compaction --------------------------------------------------------------------------------------------


def sorted_rows(store: Store) -> dict[str, list[dict]]:
    key = ("trial_id", "attempt", "epoch", "epochs", "time_s")
    return {
        name: sorted(store.read(record).to_pylist(), key=lambda row: tuple(row.get(k, 0) for k in key))
        for name, record in TABLES.items()
    }


def test_compaction_keeps_every_row_in_one_file_per_table(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, synthetic.sweep((1, 2, 2)))
    before = sorted_rows(store)
    done = compaction.compact(store, SWEEP)
    assert {one.table: one.parts for one in done} == dict.fromkeys(WRITTEN, 4)
    assert sorted_rows(store) == before
    assert all(len(store.files(TABLES[name], SWEEP)) == 1 for name in WRITTEN)
    assert compaction.compact(store, SWEEP) == []


def test_attempts_after_compaction_are_read_and_compacted_too(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial("a")])
    compaction.compact(store, SWEEP)
    synthetic.write(tmp_path, [trial("b")])
    assert sorted(store.read(TrialRecord)["trial_id"].to_pylist()) == ["a", "b"]
    compaction.compact(store, SWEEP)
    assert store.read(TrialRecord)["trial_id"].to_pylist() == ["a", "b"]


def test_killed_before_the_parts_were_deleted_nothing_counts_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = synthetic.write(tmp_path, [trial("a"), trial("b")])
    before = sorted_rows(store)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    compaction.compact(store, SWEEP)
    for path, content in kept.items():
        path.write_bytes(content)
    assert sorted_rows(store) == before
    compaction.compact(store, SWEEP)
    assert sorted_rows(store) == before


def test_an_attempt_written_again_replaces_its_compacted_rows(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial("a"), trial("b")])
    compaction.compact(store, SWEEP)
    synthetic.write(tmp_path, [trial("a", train_energy_j=1.0)])
    rows = {row["trial_id"]: row["train_energy_j"] for row in store.read(TrialRecord).to_pylist()}
    assert rows == {"a": 1.0, "b": 100.0}
    assert store.read(TrialRecord, trial_ids=["a"], columns=["train_energy_j"])["train_energy_j"].to_pylist() == [1.0]


def test_nan_does_not_keep_a_table_from_being_compacted(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial("a", eval_loss_nats=float("nan")), trial("b")])
    assert compaction.compact(store, SWEEP)
    losses = store.read(TrialRecord)["eval_loss_nats"].to_pylist()
    assert [math.isnan(loss) for loss in losses] == [True, False]


def test_what_does_not_read_back_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = synthetic.write(tmp_path, [trial("a"), trial("b")])
    before = sorted_rows(store)
    monkeypatch.setattr(parquet, "read", lambda path, fs: pq.read_table(path).slice(1))
    with pytest.raises(RuntimeError, match="read back others"):
        compaction.compact(store, SWEEP)
    assert sorted_rows(store) == before
    assert not list(tmp_path.rglob("compacted*"))


def test_compaction_on_an_object_store() -> None:
    store = Store("memory://bucket/results")
    for name in ("a", "b"):
        store.write(TrialRecord, [trial(name)], sweep_id=SWEEP, trial_id=name, attempt=0)
    compaction.compact(store, SWEEP)
    assert store.read(TrialRecord)["trial_id"].to_pylist() == ["a", "b"]
    assert len(store.files(TrialRecord)) == 1


# --- export ------------------------------------------------------------------------------------------------


def test_export_writes_every_table_as_csv(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial("a", error='says "no", twice'), trial("b", gpu_name=None)])
    paths = export_csv(store, SWEEP, tmp_path / "csv")
    assert [path.name for path in paths] == ["trials.csv", "points.csv", "epochs.csv", "power.csv"]
    table = pacsv.read_csv(paths[0])
    assert table.num_rows == 2
    assert table["error"].to_pylist() == ['says "no", twice', ""]
    assert json.loads(table["expert_widths"][0].as_py()) == [0, 64, 128, 256]
    assert pacsv.read_csv(paths[2]).num_rows == store.read(EpochRecord).num_rows
    assert store.read(PowerRecord).num_rows > 0
    assert isinstance(table, pa.Table)
