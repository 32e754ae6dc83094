"""Many small files into one per table: written, read back and compared before anything is deleted."""

from __future__ import annotations

import dataclasses
import os

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import parquet
from pipelines.records import TABLES, Record, Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacted:
    """One table of a sweep that is now one file.

    Attributes:
        table: its name.
        parts: files that became one.
        rows: rows in it.
    """

    table: str
    parts: int
    rows: int


def compact(store: Store, sweep_id: str) -> list[Compacted]:
    """Put every table of a sweep into one file each.

    The parts are deleted only after the new file was read back and held the same rows. If this is killed in
    between, readers take the parts' rows and no row counts twice; compacting again finishes the work.

    Raises:
        RuntimeError: what was read back differs; the parts are untouched.
    """
    done = [_compact(store, record, sweep_id) for record in TABLES.values()]
    return [one for one in done if one is not None]


def _compact(store: Store, record: type[Record], sweep_id: str) -> Compacted | None:
    paths = store.files(record, sweep_id)
    parts = [path for path in paths if os.path.basename(path) != parquet.COMPACTED]
    if not parts:
        return None
    table = _sorted(store.read(record, sweep_id))
    target = f"{os.path.dirname(parts[0])}/{parquet.COMPACTED}"
    fresh = f"{target}.new"
    parquet.write(table, fresh, None if store.local else store.fs)
    back = parquet.read(fresh, store.fs)
    if not _comparable(back).equals(_comparable(table)) or not back.schema.equals(table.schema, check_metadata=True):
        store.fs.delete_file(fresh)
        raise RuntimeError(f"{target}: expected the {table.num_rows} rows that were written, read back others")
    store.fs.move(fresh, target)
    for path in parts:
        store.fs.delete_file(path)
    return Compacted(table=record.TABLE, parts=len(parts), rows=table.num_rows)


def _comparable(table: pa.Table) -> pa.Table:
    """The table with NaN, which equals nothing, as infinity beside a mask of where it was."""
    for index, field in enumerate(table.schema):
        if pa.types.is_floating(field.type):
            is_nan = pc.is_nan(table[index])
            table = table.set_column(
                index, field, pc.if_else(is_nan, pa.scalar(float("inf"), field.type), table[index])
            )
            table = table.append_column(f"{field.name} is nan", is_nan)
    return table


def _sorted(table: pa.Table) -> pa.Table:
    """Rows by trial, attempt, and what orders them within."""
    keys = [name for name in ("trial_id", "attempt", "epoch", "epochs", "time_s") if name in table.column_names]
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in keys])
    return table.take(order).combine_chunks()
