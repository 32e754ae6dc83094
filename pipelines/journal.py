"""What a sweep must remember beside its tables: its plan, who claimed which attempt, and whose turn it is.

OUT/sweeps/<sweep_id>/plan.json              what was asked for
OUT/sweeps/<sweep_id>/attempts/<trial>-<n>.json   one claim per attempt: configuration, process, joules before it
OUT/sweeps/<sweep_id>/points/<trial>-<n>.json     points that an anytime attempt has reached so far
OUT/sweeps/<sweep_id>/beats/                      counters of the devices of each actor (see `beats`)
OUT/sweeps/<sweep_id>/driver.lock            held by the one driver (driver.json on an object store)
OUT/sweeps/<sweep_id>/sessions.json          how long each session ran
OUT/checkpoints/<sweep_id>/<trial>/          see `checkpoints`
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import pyarrow.fs as pafs

from pipelines import parquet
from pipelines.beats import Beats
from pipelines.config import ConfigError, StorageError

#: A remote lease that was not renewed for so long belongs to a driver that is gone.
LEASE_S = 30.0


def points_document(attempt: str) -> str:
    """Name of the document in which an attempt (`<trial>-<n>`) keeps the points that it has reached."""
    return f"points/{attempt}.json"


class Journal:
    """The folder of one sweep under OUT, on a disk or an object store."""

    def __init__(self, out: str, sweep_id: str) -> None:
        self.sweep_id = sweep_id
        if "://" in out:
            self.fs, root = parquet.filesystem(out)
            self.local = out.startswith("file://")
        else:
            self.fs, root, self.local = pafs.LocalFileSystem(), os.path.abspath(out), True
        self.out = root
        self.root = f"{root}/sweeps/{sweep_id}"
        remote = {} if self.local else {"out": out, "key": f"sweeps/{sweep_id}/beats"}
        self.beats = Beats(self.fs, f"{self.root}/beats", **remote)
        self._lease: dict[str, Any] | None = None
        self._renewed_s, self._lost = 0.0, threading.Event()
        self.checkpoints = f"{root}/checkpoints/{sweep_id}"

    # -- documents --------------------------------------------------------------------------------------

    def put(self, name: str, document: Any) -> None:
        """Write a JSON document whole or not at all."""
        path = f"{self.root}/{name}"
        data = json.dumps(document, indent=1).encode()
        if not self.local:
            with self.fs.open_output_stream(path) as sink:
                sink.write(data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def get(self, name: str) -> Any:
        """A JSON document; None where there is none."""
        path = f"{self.root}/{name}"
        if self.fs.get_file_info(path).type != pafs.FileType.File:
            return None
        with self.fs.open_input_stream(path) as source:
            return json.loads(source.read())

    def names(self, folder: str, suffix: str = ".json") -> list[str]:
        """Names of the documents in a folder of the journal, sorted."""
        selector = pafs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        return sorted(e.base_name for e in self.fs.get_file_info(selector) if e.base_name.endswith(suffix))

    def has(self, name: str) -> bool:
        """Whether a document exists."""
        return bool(self.fs.get_file_info(f"{self.root}/{name}").type == pafs.FileType.File)

    def seconds(self) -> float:
        """Seconds that earlier sessions of this sweep ran."""
        return float(sum(session["seconds"] for session in self.get("sessions.json") or []))

    def book_session(self, session: str, seconds: float, joules: float | None = None) -> None:
        """Remember how long a session has run, again and again while it does, and last what the sweep had drawn."""
        others = [entry for entry in self.get("sessions.json") or [] if entry.get("session") != session]
        mine = {"session": session, "seconds": seconds, "sweep_energy_j": joules}
        self.put("sessions.json", [*others, mine])

    # -- attempts ---------------------------------------------------------------------------------------

    def claim(self, trial_id: str, document: dict[str, Any]) -> int:
        """Take the next attempt of a trial; returns its number."""
        attempt = self.attempts(trial_id)
        self.put(f"attempts/{trial_id}-{attempt}.json", {**document, "trial_id": trial_id, "attempt": attempt})
        return attempt

    def attempts(self, trial_id: str) -> int:
        """How many attempts of a trial were claimed so far."""
        attempt = 0
        while self.has(f"attempts/{trial_id}-{attempt}.json"):
            attempt += 1
        return attempt

    def claims(self) -> list[dict[str, Any]]:
        """All claims, by trial and attempt."""
        found = [self.get(f"attempts/{name}") for name in self.names("attempts")]
        return sorted((c for c in found if c), key=lambda c: (c["trial_id"], c["attempt"]))

    def claims_of(self, trial_id: str) -> list[dict[str, Any]]:
        """The claims of one trial, in order."""
        return [self.get(f"attempts/{trial_id}-{n}.json") for n in range(self.attempts(trial_id))]

    # -- one driver -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def driving(self) -> Iterator[None]:
        """Be the one driver of this sweep.

        Raises:
            ConfigError: another driver is alive.
            StorageError: there is no writing under OUT.
        """
        if self.local and os.name != "nt":
            with self._locked():
                yield
        else:
            with self._leased():
                yield

    def holds(self) -> bool:
        """Whether nobody took the sweep over from the driver that `driving` made of this process.

        A lock on a disk is never lost. A lease is, to whoever finds it lapsed because this process stood still; one
        that was not renewed for half of its life is looked up now: a driver that wakes up knows before it writes.
        """
        if self._lease is not None and time.time() - self._renewed_s >= LEASE_S / 2:
            with contextlib.suppress(Exception):  # nobody takes over through a store that does not answer
                self._look()
        return not self._lost.is_set()

    def taken_over(self) -> StorageError:
        """What to end with when the sweep is no longer this driver's."""
        who = None
        with contextlib.suppress(Exception):
            who = self.get("driver.json")
        return StorageError(
            f"resume: expected to be the one driver of {self.sweep_id}, got {_who(who)}, which took it over while this"
            " one stood still; what was written is kept, this driver ends and writes no more"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A lock that the kernel gives back when its holder dies, however it dies."""
        import fcntl

        try:
            os.makedirs(self.root, exist_ok=True)
            lock = open(f"{self.root}/driver.lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise StorageError(
                f"out: expected a folder that can be written, got {self.out}: {error.strerror or error}"
            ) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise self._refusal(_read(lock)) from None
            with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk has no room for that
                lock.seek(0)
                lock.truncate()
                lock.write(json.dumps(_myself()))
                lock.flush()
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.close()

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        """A document that says until when, renewed by a thread: whatever the driver waits for, it stays the driver."""
        holder = self.get("driver.json")
        if holder and not holder.get("released") and time.time() - holder["renewed"] < LEASE_S:
            raise self._refusal(holder)
        lease, ended = {**_myself(), "lease": uuid.uuid4().hex}, threading.Event()
        self._lost.clear()
        self._put_lease(lease)
        self._lease = lease
        keeper = threading.Thread(target=self._renew, args=(lease, ended), name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join(LEASE_S)
            with contextlib.suppress(OSError):  # it lapses by itself
                if self._look():
                    self._put_lease({**lease, "released": True})
            self._lease = None

    def _renew(self, lease: Mapping[str, Any], ended: threading.Event) -> None:
        while not ended.wait(LEASE_S / 6):
            with contextlib.suppress(Exception):  # a store that is busy: the next time
                if not self._look():  # it lapsed (this process stood still), and somebody else took it
                    return
                self._put_lease(lease)

    def _put_lease(self, lease: Mapping[str, Any]) -> None:
        now_s = time.time()
        self.put("driver.json", {**lease, "renewed": now_s})
        self._renewed_s = now_s

    def _look(self) -> bool:
        """Whether the lease is still ours, by the store; once it is not, it is lost for good."""
        assert self._lease is not None
        if (self.get("driver.json") or {}).get("lease") != self._lease["lease"]:
            self._lost.set()
        return not self._lost.is_set()

    def _refusal(self, holder: Any) -> ConfigError:
        return ConfigError(
            f"resume: expected a sweep that nobody drives, got {self.sweep_id}, driven by {_who(holder)}"
        )


def _myself() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid()}


def _who(holder: Any) -> str:
    known = isinstance(holder, dict) and {"pid", "host"} <= set(holder)
    return f"process {holder['pid']} on {holder['host']}" if known else "another process"


def _read(file: TextIO) -> Any:
    file.seek(0)
    with contextlib.suppress(ValueError):
        return json.loads(file.read())
    return None


def process_start(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None where it is gone (or not on Linux)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else fields[19]
