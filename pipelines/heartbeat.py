"""Counters of an actor's devices, written by a process that outlives it.

An actor starts one keeper, a small process of its own session, which appends a JSON line with the devices'
cumulative joules at least once a second and once more when the actor is gone. Into the same file the actor writes
where its attempts and energy windows begin and end. So after any death the joules of the attempt are the difference
of two counter readings, and `joules_of` finds them.

    {"t": monotonic seconds, "j": joules or null, "last": the actor is gone}            the keeper
    {"t": ..., "attempt": "trial-0", "edge": "begin|end|open|close", "phase": "train"}  the actor

Where these files are kept, on a disk or an object store: `beats`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.shipping import Place, Shipper

PERIOD_S = 0.5
IDLE = "idle"
#: How long lines that a full disk did not take outlive their actor.
_LINGER_S = 600.0
#: How late a keeper may be on a busy machine before it is taken for dead.
LAST_COMES_S = 3.0
#: How a keeper is told where its file is sent to: out of sight of `ps`, since an address can hold a key.
_SENT_TO = "JOULEMOE_HEARTBEATS_SENT_TO"


class _Lines:
    """Appends whole lines for as long as the disk takes them, and keeps them until it does again."""

    def __init__(self, path: str) -> None:
        self._handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        self.left = b""

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line and what is left of earlier ones."""
        self.append(json.dumps(line).encode() + b"\n")

    def append(self, data: bytes) -> None:
        """One write: what another process appends comes before or after it. A torn line is written again whole."""
        data, written = self.left + data, 0
        with contextlib.suppress(OSError):
            written = os.write(self._handle, data)
        self.left = b"" if written == len(data) else b"\n" + data.lstrip(b"\n")

    def close(self) -> None:
        """Give the file back."""
        os.close(self._handle)


class Keeper:
    """An actor's side: starts the process, tells it nothing more than that the actor lives (an open pipe).

    Args:
        place: the file, which both append to, and the object store that it is sent to, if any.
        spec: what the process reads (`spec_of`).
        read: the same counter as this process reads it, for exact edges; None where it counts from another zero.
    """

    def __init__(
        self,
        place: Place,
        spec: str,
        *,
        read: Callable[[], float] | None = None,
        session: str = "",
        period_s: float = PERIOD_S,
    ) -> None:
        path, self._read = place.path, read
        self._path, self._lines = path, _Lines(path)
        self._lines.add({"t": time.monotonic(), "spec": spec, "session": session})
        words = [sys.executable, "-m", "pipelines.heartbeat", path, str(os.getpid()), spec, str(period_s), "detach"]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths)}
            | ({} if place.out is None else {_SENT_TO: json.dumps([place.out, place.key])}),
        )

    def edge(self, attempt: str, edge: str, phase: str | None = None) -> None:
        """Note where an attempt or one of its windows begins or ends."""
        line: dict[str, Any] = {"attempt": attempt, "edge": edge, "phase": phase}
        before_s = time.monotonic()
        if self._read is not None:
            with contextlib.suppress(Exception):  # a heartbeat never stops training
                line["j"] = self._read()
        self._lines.add({"t": (before_s + time.monotonic()) / 2, **line})

    def close(self) -> None:
        """Let the keeper write its last line and go; what a full disk did not take is left to it."""
        left = self._lines.left
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(left)
        self._process.wait()
        deadline = time.monotonic() + LAST_COMES_S
        while not left and time.monotonic() < deadline and not self._has_last():
            time.sleep(PERIOD_S / 10)
        self._lines.close()

    def _has_last(self) -> bool:
        """Whether the last line is there, or has been sent on already and the file is gone."""
        try:
            with open(self._path, "rb") as file:
                return any(line.get("last") for line in parse(file.read()))
        except OSError:
            return True


def keeper_of(monitor: Any, place_of: Callable[[], Place], session: str) -> Keeper | None:
    """A keeper for a monitor's devices (`hwcost.EnergyMonitor`); None where nothing is counted.

    `place_of` makes its file. `session` tells one driver's time from the next one's: what a board draws between two
    sessions is nobody's.
    """
    if not monitor.devices:
        return None
    place = place_of()
    if monitor.source in ("counter", "integrated"):
        readers = [sampler.reader for sampler in monitor.samplers]
        uuids = ",".join(device.uuid for device in monitor.devices)
        return Keeper(place, f"gpu:{uuids}", read=lambda: sum(reader.energy_j() for reader in readers), session=session)
    if monitor.source == "rapl":
        return Keeper(place, "rapl", session=session)
    watts = float(monitor.samplers[0].reader.watts_per_core)
    return Keeper(place, f"cpu:{watts}", read=reader_of(f"cpu:{watts}", os.getpid()), session=session)


def reader_of(spec: str, pid: int) -> Callable[[], float]:
    """A function that reads cumulative joules."""
    kind, _, rest = spec.partition(":")
    if kind == "gpu":
        from hwcost.nvml import Nvml

        boards = [Nvml().open(uuid) for uuid in rest.split(",")]
        return lambda: sum(board.energy_j() for board in boards)
    if kind == "rapl":
        from hwcost.rapl import RaplReader

        return RaplReader().energy_j
    watts, ticks = float(rest), os.sysconf("SC_CLK_TCK")
    return lambda: watts * _cpu_ticks(pid) / ticks


def _cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return sum(int(value) for value in fields[11:15])


def keep(place: Place, pid: int, spec: str, period_s: float) -> None:
    """The keeper's life: a line per period until the actor is gone, and longer while nobody takes them."""
    lines, gone, last = _Lines(place.path), False, None
    shipper = None if place.out is None else Shipper(place, retry_s=period_s)
    read = reader_of(spec, pid)
    while not gone:
        gone = bool(select.select([sys.stdin], [], [], period_s)[0]) or not os.path.exists(f"/proc/{pid}")
        before_s = time.monotonic()
        try:
            last = read()
        except Exception:  # a dead process has no CPU time any more, and a lost board no counter
            last = last if gone else None
        lines.add({"t": (before_s + time.monotonic()) / 2, "j": last, **({"last": True} if gone else {})})
        if shipper is not None:
            shipper.wake()
    while select.select([sys.stdin], [], [], 0)[0] and (data := os.read(sys.stdin.fileno(), 1 << 16)):
        lines.append(data)
    for _ in range(round(_LINGER_S / period_s)):
        if not lines.left:
            break
        time.sleep(period_s)
        lines.append(b"")
    if shipper is not None:
        shipper.end(_LINGER_S)


# -- reading ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
    """Joules of an attempt as its heartbeats tell. `phases_j` holds setup, train, eval, branch; the rest is idle.

    Attributes:
        total_j: None where no counter was read.
        missing_s: time after the last heartbeat that nothing is known of; its joules are estimated from the last watts.
        flags: what is estimated.
    """

    total_j: float | None
    phases_j: Mapping[str, float]
    duration_s: float
    missing_s: float
    flags: tuple[str, ...]


def parse(data: bytes) -> list[dict[str, Any]]:
    """The lines of a heartbeat file by time; a torn last line is left out."""
    found = []
    for line in data.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return sorted(found, key=lambda line: line["t"])


def joules_of(lines: Sequence[Mapping[str, Any]], attempt: str, *, alive: bool = False) -> Spent | None:
    """What an attempt drew, from its actor's heartbeats; None where the attempt left no trace.

    `alive`: its actor lives (the attempt was stopped, and counts up to now).
    """
    edges = [line for line in lines if line.get("attempt") == attempt]
    if not edges:
        return None
    counter = [(line["t"], line["j"]) for line in lines if line.get("j") is not None]
    begin_s = edges[0]["t"]
    ended = next((line["t"] for line in edges if line["edge"] == "end"), None)
    seen_last = any(line.get("last") for line in lines)
    end_s = ended if ended is not None else max([edges[-1]["t"], *(t for t, _ in counter[-1:])])
    duration_s = end_s - begin_s
    if not counter:
        return Spent(total_j=None, phases_j={}, duration_s=duration_s, missing_s=0.0, flags=("heartbeat_lost",))
    total_j = _at(counter, end_s) - _at(counter, begin_s)
    phases = _phases(edges, counter, end_s)
    flags: list[str] = ["from_heartbeats"]
    missing_s = 0.0
    if ended is None and not seen_last and not alive:  # the keeper died too: half a period on average is unknown
        missing_s = PERIOD_S / 2
        total_j += missing_s * _last_watts(counter)
        flags.append("heartbeat_estimated")
    return Spent(total_j=total_j, phases_j=phases, duration_s=duration_s, missing_s=missing_s, flags=tuple(flags))


def _phases(
    edges: Sequence[Mapping[str, Any]], counter: Sequence[tuple[float, float]], end_s: float
) -> dict[str, float]:
    found: dict[str, float] = {}
    open_s: dict[str, float] = {}
    for line in edges:
        if line["edge"] == "open":
            open_s[line["phase"]] = line["t"]
        elif line["edge"] == "close" and line["phase"] in open_s:
            _book(found, line["phase"], counter, open_s.pop(line["phase"]), line["t"])
    for phase, start_s in open_s.items():
        _book(found, phase, counter, start_s, end_s)
    return found


def _book(found: dict[str, float], phase: str, counter: Sequence[tuple[float, float]], a: float, b: float) -> None:
    found[phase] = found.get(phase, 0.0) + _at(counter, b) - _at(counter, a)


def _at(counter: Sequence[tuple[float, float]], time_s: float) -> float:
    """The counter between its readings, and at its ends what it last showed."""
    before = [(t, j) for t, j in counter if t <= time_s]
    after = [(t, j) for t, j in counter if t > time_s]
    if not before:
        return after[0][1]
    if not after:
        return before[-1][1]
    (t0, j0), (t1, j1) = before[-1], after[0]
    return j0 + (j1 - j0) * (time_s - t0) / (t1 - t0)


def _last_watts(counter: Sequence[tuple[float, float]]) -> float:
    recent = counter[-5:]
    (t0, j0), (t1, j1) = recent[0], recent[-1]
    return (j1 - j0) / (t1 - t0) if t1 > t0 else 0.0


if __name__ == "__main__":
    # Ray's workers kill their children when they are ended: a keeper is nobody's child.
    if sys.argv[5:] != ["detach"] or os.fork() == 0:
        out, key = json.loads(os.environ.get(_SENT_TO, '[null, ""]'))
        keep(Place(sys.argv[1], out, key), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
