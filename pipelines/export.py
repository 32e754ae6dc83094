"""Tables for people without a Parquet reader."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from pipelines.records import TABLES, Store


def export_csv(store: Store, sweep_id: str, folder: Path) -> list[Path]:
    """Write every table of a sweep as CSV; lists become JSON, null an empty cell.

    Args:
        store: where the tables are.
        sweep_id: the sweep.
        folder: where the files go; made where it is missing.

    Returns:
        The files, one per table that has rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, record in TABLES.items():
        table = store.read(record, sweep_id)
        if table.num_rows:
            path = folder / f"{name}.csv"
            pacsv.write_csv(_flat(table), path)
            written.append(path)
    return written


def _flat(table: pa.Table) -> pa.Table:
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            cells = [None if value is None else json.dumps(value) for value in table[i].to_pylist()]
            table = table.set_column(i, field.name, pa.array(cells, pa.string()))
    return table
