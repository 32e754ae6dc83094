"""Where the heartbeats of a sweep are kept (`heartbeat` says what is in them): beside its other results.

    OUT/sweeps/<sweep_id>/beats/<name>.jsonl          on a disk: a file per actor, appended to
    OUT/sweeps/<sweep_id>/beats/<name>/<part>.jsonl   on an object store: the same file in parts

An object store cannot append. There the file lies on the actor's own node, and its keeper sends on what was appended:
the last part is put again, whole, at every heartbeat, until it is full and the next one begins.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.fs as pafs

from pipelines import heartbeat
from pipelines.shipping import PART_BYTES, Place

#: How long after an actor's end its last line may still be on its way to an object store, on a busy machine.
_LAST_ARRIVES_S = 2 * heartbeat.LAST_COMES_S


class Beats:
    """The heartbeat files of one sweep.

    Args:
        fs, root: the folder in which they are kept.
        out, key: the same place as another process opens it (`shipping.Place`); `out` is None on a disk.
    """

    def __init__(self, fs: pafs.FileSystem, root: str, *, out: str | None = None, key: str = "") -> None:
        self.fs, self.root, self.out, self.key = fs, root, out, key

    def place(self, name: str) -> Place:
        """Where the actor of this name writes, once: on an object store every call makes a new file."""
        if self.out is None:
            os.makedirs(self.root, exist_ok=True)
            return Place(f"{self.root}/{name}.jsonl")
        handle, path = tempfile.mkstemp(prefix=f"joulemoe-{name}-", suffix=".jsonl")
        os.close(handle)
        return Place(path, self.out, f"{self.key}/{name}")

    def sizes(self) -> dict[str, int]:
        """Bytes of each actor's lines."""
        found: dict[str, int] = {}
        for info in self._files(self.root, recursive=self.out is not None):
            path = info.path.removesuffix(".jsonl") if self.out is None else os.path.dirname(info.path)
            name = os.path.basename(path)
            found[name] = found.get(name, 0) + (info.size or 0)
        return found

    def read(self, name: str, start: int = 0) -> bytes:
        """An actor's lines from a byte on; empty where there are none."""
        if self.out is None:
            return self._tail(f"{self.root}/{name}.jsonl", start)
        data, part = b"", start // PART_BYTES
        while start + len(data) >= part * PART_BYTES:  # what came before is full
            got = self._tail(f"{self.root}/{name}/{part:05d}.jsonl", max(0, start - part * PART_BYTES))
            if not got:
                break
            data, part = data + got, part + 1
        return data

    def lines(self, name: str) -> list[dict[str, Any]]:
        """An actor's lines by time; a torn last line is left out. None on a disk that does not read."""
        with contextlib.suppress(*(() if self.out else (OSError,))):
            return heartbeat.parse(self.read(name))
        return []

    def await_last(self, names: Iterable[str]) -> None:
        """Wait until the keepers of dead actors have written their last lines. Those that write nothing any more are
        dead too.
        """
        comes_s = heartbeat.LAST_COMES_S if self.out is None else _LAST_ARRIVES_S
        deadline = time.monotonic() + comes_s
        for name in names:
            while time.monotonic() < deadline and self._may_come(name, comes_s):
                time.sleep(heartbeat.PERIOD_S / 10 if self.out is None else heartbeat.PERIOD_S / 2)

    def await_next(self, name: str) -> bool:
        """Wait until what an actor has drawn up to now is known; whether it is. On a disk it is at once. What arrives
        next through an object store may have been on its way already, so two arrivals are waited for.
        """
        if self.out is None:
            return True
        deadline, start = time.monotonic() + _LAST_ARRIVES_S, self.size(name)
        if any(line.get("last") for line in self.lines(name)):
            return True
        known, arrived = start, 0
        while time.monotonic() < deadline:
            size = self.size(name)
            arrived, known = arrived + (size > known), size
            if arrived >= 2 or (arrived and any(line.get("last") for line in heartbeat.parse(self.read(name, start)))):
                return True
            time.sleep(heartbeat.PERIOD_S / 5)
        return False

    def settle(self) -> None:
        """Wait, as a sweep ends, for what is still on its way to an object store."""
        if self.out is not None:
            self.await_last(self.sizes())

    def size(self, name: str) -> int:
        """Bytes of one actor's lines on an object store."""
        return sum(info.size or 0 for info in self._files(f"{self.root}/{name}"))

    def _may_come(self, name: str, comes_s: float) -> bool:
        """Whether a last line is missing, and what is there young enough for it to come. In a store the first one may
        still be on its way.
        """
        if self.out is None:
            files = [info for info in (self.fs.get_file_info(f"{self.root}/{name}.jsonl"),) if info.is_file]
        else:
            files = sorted(self._files(f"{self.root}/{name}"), key=lambda info: info.path)
        if not files:
            return self.out is not None
        written_s = (files[-1].mtime_ns or 0) / 1e9
        young = time.time() - written_s < comes_s
        return young and not any(line.get("last") for line in heartbeat.parse(self._tail(files[-1].path, 0)))

    def _files(self, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(folder, allow_not_found=True, recursive=recursive)
        return [info for info in self.fs.get_file_info(selector) if info.is_file and info.extension == "jsonl"]

    def _tail(self, path: str, start: int) -> bytes:
        """The end of a file; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError), self.fs.open_input_file(path) as source:
            if source.size() > start:
                source.seek(start)
                return bytes(source.read())
        return b""


class Meter:
    """Joules of a whole sweep so far, idle time between trials and lost work included: reads on where it stopped."""

    def __init__(self, beats: Beats) -> None:
        self.beats = beats
        self._at: dict[str, int] = {}
        self._key: dict[str, tuple[str, ...]] = {}
        self._range: dict[tuple[str, ...], tuple[float, float]] = {}

    def read_j(self) -> float | None:
        """Joules of all actors; None where none was counted."""
        for name, size in self.beats.sizes().items():
            at = self._at.get(name, 0)
            if size > at:
                data = self.beats.read(name, at)
                whole = data[: data.rfind(b"\n") + 1]
                self._at[name] = at + len(whole)
                for line in heartbeat.parse(whole):
                    self._take(name, line)
        return sum(last - first for first, last in self._range.values()) if self._range else None

    def _take(self, name: str, line: Mapping[str, Any]) -> None:
        if "spec" in line:  # a board's counter goes on from actor to actor, a process's does not
            one_board = str(line["spec"]).startswith("gpu:")
            self._key[name] = (line["session"], line["spec"]) if one_board else (name,)
        joules = line.get("j")
        if joules is not None:
            key = self._key.get(name, (name,))
            first, last = self._range.get(key, (joules, joules))
            self._range[key] = min(first, joules), max(last, joules)
