"""Parquet files on a disk or an object store: written whole or not at all, read across versions."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

#: File that holds all attempts of a sweep after compaction, beside which later attempts may stand.
COMPACTED = "compacted.parquet"


def write(table: pa.Table, target: str, fs: pafs.FileSystem | None = None) -> None:
    """Write a table whole or not at all: renamed into place on a local disk, one PUT on an object store."""
    if fs is None:
        _write_renamed(table, target)
        return
    with fs.open_output_stream(target) as sink:
        pq.write_table(table, sink)


def read(path: str, fs: pafs.FileSystem) -> pa.Table:
    """One file, as it is."""
    with fs.open_input_file(path) as source:
        return pq.read_table(source)


def check_version(fragment: Any, supported: int) -> None:
    """Older files read as they are (what they lack is null); newer ones may mean something else."""
    metadata = fragment.physical_schema.metadata or {}
    version = int(metadata.get(b"schema_version", b"1"))
    if version > supported:
        raise ValueError(
            f"{fragment.path}: schema_version: expected at most {supported}, got {version}: newer joulemoe wrote it"
        )


def without_stale_rows(paths: Sequence[str]) -> Any:
    """Where a part still stands beside the compacted file, the part's rows are the ones that count.

    That happens when compaction was killed before it deleted the parts, or when an attempt was written again.
    """
    folders = {os.path.dirname(path) for path in paths if os.path.basename(path) == COMPACTED}
    parts = [path for path in paths if os.path.dirname(path) in folders and os.path.basename(path) != COMPACTED]
    if not parts:
        return None
    keep = pads.field("__filename").isin(paths) & ~pads.field("__filename").isin([f"{f}/{COMPACTED}" for f in folders])
    for folder in sorted(folders):
        names = [os.path.basename(path).removesuffix(".parquet") for path in parts if os.path.dirname(path) == folder]
        name = pc.binary_join_element_wise(pads.field("trial_id"), pads.field("attempt").cast(pa.string()), "-")
        keep |= (pads.field("__filename") == f"{folder}/{COMPACTED}") & ~name.isin(names)
    return keep


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """A file system and the path within it, from any URI that pyarrow or fsspec opens."""
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        backend, path = fsspec.core.url_to_fs(uri)
        fs = pafs.PyFileSystem(pafs.FSSpecHandler(backend))
    return fs, path.rstrip("/")


def _write_renamed(table: pa.Table, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as sink:
            pq.write_table(table, sink)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    _fsync_folder(os.path.dirname(target))


def _fsync_folder(folder: str) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
