"""Parquet files on a disk or an object store: written whole or not at all, read across versions."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.faults import passing

#: What the system says where results cannot be written any more.
_STORAGE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
)
#: File that holds all attempts of a sweep after compaction, beside which later attempts may stand.
COMPACTED = "compacted.parquet"


def is_storage_error(error: BaseException) -> bool:
    """Whether an error is the disk's (full, read-only, gone), not the fault of what was to be written."""
    return isinstance(error, OSError) and error.errno in _STORAGE


def write(table: pa.Table, target: str, fs: pafs.FileSystem | None = None) -> None:
    """Write a table whole or not at all: renamed into place on a local disk, one PUT on an object store."""
    if fs is None:
        _write_renamed(table, target)
        return
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    with fs.open_output_stream(target) as sink:
        sink.write(buffer.getvalue())


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


def without_stale_rows(paths: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Files to read, each group with the filter that its rows must pass (None: all do).

    Where an attempt's own file stands beside the compacted one, its rows are the ones that count: compaction was
    killed before it deleted the parts, or the attempt was written again.
    """
    folders = {os.path.dirname(path) for path in paths if os.path.basename(path) == COMPACTED}
    parts_of: dict[str, list[str]] = {folder: [] for folder in folders}
    for path in paths:
        folder, name = os.path.split(path)
        if folder in folders and name != COMPACTED:
            parts_of[folder].append(name)
    plain: list[str] = []
    groups: list[tuple[list[str], Any]] = []
    for path in paths:
        folder, name = os.path.split(path)
        parts = parts_of.get(folder, [])
        if name != COMPACTED or not parts:
            plain.append(path)
            continue
        key = pc.binary_join_element_wise(pads.field("trial_id"), pads.field("attempt").cast(pa.string()), "-")
        groups.append(([path], ~key.isin([part.removesuffix(".parquet") for part in parts])))
    return [*([(plain, None)] if plain else []), *groups]


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """A file system and the path within it, from any URI that pyarrow or fsspec opens.

    On S3 a file is one PUT, not a multipart upload of three requests, as long as it is shorter than a part (10 MB).
    """
    if uri.startswith("s3://") and "allow_delayed_open" not in uri:
        uri += ("&" if "?" in uri else "?") + "allow_delayed_open=true"
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
        passing("parquet.rename", target)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
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
