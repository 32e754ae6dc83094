"""`with monitor.window("train") as window: ...` and then `window.measurement`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import types
from collections.abc import Iterator, Sequence
from typing import Any

from hwcost.devices import find_readers
from hwcost.history import GpuSystemMonitor
from hwcost.processes import synchronize
from hwcost.readers import Clock, DeviceInfo, DeviceReader, PowerBaseline, SystemClock
from hwcost.sampler import DeviceSampler
from hwcost.windows import Measurement, Span, combine, least_trusted, total

PERIOD_S = 0.25
READY_S = 2.0
SETTLE_S = 1.5
BEAT_S = 1.0
WATCH_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """Joules of all windows of one name, open ones up to now. None: not measurable."""

    energy_j: float | None
    duration_s: float
    windows: int
    open: int
    unmeasured_s: float = 0.0
    flags: tuple[str, ...] = ()


class EnergyWindow:
    """A measured span of the code inside its `with`. Nests and overlaps freely."""

    def __init__(self, monitor: EnergyMonitor, name: str, modelled_power_w: float | None) -> None:
        self.monitor, self.name, self.modelled_power_w = monitor, name, modelled_power_w
        self.start_s: float | None = None
        self.end_s: float | None = None
        self.spans: list[Span] = []
        self.flags: dict[str, None] = {}
        self._measurement: Measurement | None = None

    def __enter__(self) -> EnergyWindow:
        if self.start_s is not None:
            raise RuntimeError(f"the window {self.name!r} was entered before: ask the monitor for a new one")
        self.start_s = self.monitor._open(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: types.TracebackType | None
    ) -> None:
        if kind is not None:
            self.flags.setdefault(f"exception:{kind.__name__}")
        self.end_s = self.monitor._close(self)

    def flag(self, text: str | None) -> None:
        """Remember what went wrong; None: nothing did."""
        if text is not None:
            self.flags.setdefault(text)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """A monitor never stops training: its own errors become flags."""
        try:
            yield
        except Exception as error:
            self.flag(f"monitor_error:{type(error).__name__}")

    @property
    def measurement(self) -> Measurement:
        """The result. Read at once it waits for the counter step after the window (about 0.1 s on an H200).

        Raises:
            RuntimeError: the window is still open, or was never entered.
        """
        if self.end_s is None:
            raise RuntimeError(f"the window {self.name!r} is still open: its measurement exists only after the `with`")
        if self._measurement is None:
            self._measurement = self.monitor._measure(self)
        return self._measurement


class EnergyMonitor:
    """Measures the devices it was given. A monitor without devices gives nulls and reasons; nothing here stops
    training.

    Args:
        readers: the devices; `for_assigned_devices` finds them.
        period_s: spacing of the samples in the history.
        baseline: watts without work, from which idle and context joules are separated.
        shared: what was known about sharing before anything was measured (Ray gave a fraction of a GPU).
        clock, threads: for tests; without threads a window's edges settle when its measurement is read.
    """

    def __init__(
        self,
        readers: Sequence[DeviceReader],
        *,
        period_s: float = PERIOD_S,
        baseline: PowerBaseline | None = None,
        system: GpuSystemMonitor | None = None,
        flags: Sequence[str] = (),
        shared: bool | None = None,
        clock: Clock | None = None,
        threads: bool = True,
    ) -> None:
        self.clock = clock or SystemClock()
        self.system = system or GpuSystemMonitor()
        self.flags = tuple(flags)
        self._baseline, self._shared = baseline or PowerBaseline(), shared
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._open_windows: list[EnergyWindow] = []
        self._unread: list[EnergyWindow] = []
        self._ledger: dict[str, LedgerEntry] = {}
        self._closed = False
        self._beat_s = -1.0
        self.samplers = tuple(
            DeviceSampler(
                reader, clock=self.clock, period_s=period_s, system=self.system, phase=self._phase, beat=self._beat
            )
            for reader in readers
        )
        for sampler in self.samplers if threads else ():
            sampler.start()
        for sampler in self.samplers if threads else ():
            sampler.ready.wait(READY_S)
        self._watch_ends = threading.Event()
        if threads and self.samplers:
            threading.Thread(target=self._watch, name="hwcost-watchdog", daemon=True).start()

    @classmethod
    def for_assigned_devices(
        cls,
        *,
        allow_cpu: bool = True,
        cpu_parallel: int = 1,
        period_s: float = PERIOD_S,
        profile: object = None,
        torch_device: object = None,
        history_path: str | os.PathLike[str] | None = None,
    ) -> EnergyMonitor:
        """A monitor of what this process was given. Missing hardware never raises: it leaves flags and nulls.

        Args:
            allow_cpu: measure (RAPL) or model the CPU where no GPU was given.
            cpu_parallel: trials that run on this host at the same time; RAPL serves one only.
            period_s: spacing of the samples in the history.
            profile: a `CostModel`, a profile of one, or a `PowerBaseline`: idle watts; an analytic one is not used.
            torch_device: measure only this one of the assigned devices ("cuda:1"); "cpu" measures none of the GPUs.
            history_path: a file that samples and the ledger are appended to, so that they outlive a killed process.
        """
        found = find_readers(torch_device=torch_device, allow_cpu=allow_cpu, cpu_parallel=cpu_parallel)
        system = GpuSystemMonitor(path=history_path)
        return cls(
            found.readers,
            period_s=period_s,
            baseline=_baseline(profile),
            system=system,
            flags=found.flags,
            shared=found.shared,
        )

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """The devices that are measured."""
        return tuple(sampler.reader.info for sampler in self.samplers)

    @property
    def source(self) -> str | None:
        """Where the joules come from; of several devices the least trustworthy source. None: nothing is measured."""
        return least_trusted([sampler.source for sampler in self.samplers])

    # -- windows -------------------------------------------------------------------------------------------------------

    def window(self, name: str, *, modelled_power_w: float | None = None) -> EnergyWindow:
        """A span to measure; `modelled_power_w` is kept beside the measured watts in the history."""
        return EnergyWindow(self, name, modelled_power_w)

    def ledger(self) -> dict[str, LedgerEntry]:
        """Cumulative joules by window name, at any time and from any thread: open windows count up to now."""
        if self._forked():
            return {}
        for sampler in self.samplers:
            sampler.watch()
        with self._lock:
            for window in [w for w in self._unread if all(span.settled.is_set() for span in w.spans)]:
                window.measurement  # noqa: B018 - reading it enters it into the ledger
            entries = dict(self._ledger)
            waiting = [(w, w.end_s) for w in self._unread] + [(w, None) for w in self._open_windows]
        for window, end_s in waiting:
            entries[window.name] = _add(entries.get(window.name), self._so_far(window, end_s))
        return entries

    def close(self) -> None:
        """Stop the samplers and settle what was closed. Safe to call twice, and in a forked child."""
        if self._closed:
            return
        self._closed = True
        if not self._forked():
            self._watch_ends.set()
            for sampler in self.samplers:
                sampler.stop()
            self.system.close()

    def __enter__(self) -> EnergyMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- behind the windows --------------------------------------------------------------------------------------------

    def _forked(self) -> bool:
        """Whether this is a child of the process that made the monitor: it has no sampler, and locks may be held for
        ever.
        """
        return os.getpid() != self._pid

    def _watch(self) -> None:
        """Look after the samplers, also inside a window that stays open for hours."""
        while not self._watch_ends.wait(WATCH_S):
            for sampler in self.samplers:
                with contextlib.suppress(Exception):
                    sampler.watch()

    def _phase(self) -> tuple[str | None, float | None]:
        innermost = self._open_windows[-1:]
        return (innermost[0].name, innermost[0].modelled_power_w) if innermost else (None, None)

    def _beat(self, now: float) -> None:
        """Write the ledger beside the history once a second, for whoever looks after this process was killed."""
        if self.system.path is not None and now - self._beat_s >= BEAT_S:
            self._beat_s = now
            ledger = {name: dataclasses.asdict(entry) for name, entry in self.ledger().items()}
            self.system.spill({"time_s": now, "ledger": ledger})

    def _open(self, window: EnergyWindow) -> float:
        if self._forked():
            window.flags.setdefault("forked")
            return self.clock.monotonic()
        window.flag(synchronize())
        now = self.clock.monotonic()
        with window.caught(), self._lock:
            window.flag("monitor_closed" if self._closed else None)
            for sampler in self.samplers if not self._closed else ():
                sampler.watch()
                window.spans.append(sampler.open_span(now))
            self._open_windows.append(window)
        return now

    def _close(self, window: EnergyWindow) -> float:
        if self._forked():
            window.flag("forked")
            window.spans.clear()
            return self.clock.monotonic()
        window.flag(synchronize())
        now = self.clock.monotonic()
        with window.caught(), self._lock:
            window.flag("monitor_closed" if self._closed else None)
            for sampler, span in zip(self.samplers, window.spans, strict=False):
                sampler.watch()
                sampler.close_span(span, now)
            self._open_windows.remove(window)
            self._unread.append(window)
        return now

    def _measure(self, window: EnergyWindow) -> Measurement:
        if self._forked():
            window.flag("forked")
            window.spans.clear()
            return self._result(window)
        with window.caught():
            self._wait(window)
        with self._lock:
            result = self._result(window)
            if window in self._unread:
                self._unread.remove(window)
                self._ledger[window.name] = _add(self._ledger.get(window.name), _entry(result))
        return result

    def _wait(self, window: EnergyWindow) -> None:
        """Until the sampler has seen what lies beyond the window's end, but not for ever."""
        deadline = time.monotonic() + SETTLE_S
        for sampler, span in zip(self.samplers, window.spans, strict=False):
            while sampler.thread is None and not span.settled.is_set() and not self._closed:
                sampler.tick()
            if not self._closed and not span.settled.wait(max(deadline - time.monotonic(), 0.0)):
                sampler.watch()
                span.flags.setdefault("unsettled")
                sampler.settle(force=True)

    def _result(self, window: EnergyWindow) -> Measurement:
        assert window.start_s is not None
        assert window.end_s is not None
        parts = [
            span.measurement(window.name, sampler.reader, self._baseline, sampler.min_window_s)
            for sampler, span in zip(self.samplers, window.spans, strict=False)
        ]
        if self._shared:
            parts = [dataclasses.replace(part, shared=True, flags=(*part.flags, "gpu_fraction")) for part in parts]
        flags = (*self.flags, *window.flags, *self.system.flags)
        return combine(window.name, window.end_s - window.start_s, parts, flags)

    def _so_far(self, window: EnergyWindow, end_s: float | None) -> LedgerEntry:
        now = end_s if end_s is not None else self.clock.monotonic()
        start_s = window.start_s if window.start_s is not None else now
        parts: list[float | None] = []
        for sampler, span in zip(self.samplers, window.spans, strict=False):
            first, last = span.start or sampler.cumulative(start_s), sampler.cumulative(now)
            parts.append(max(last.energy_j - first.energy_j, 0.0) if first is not None and last is not None else None)
        is_open = end_s is None
        return LedgerEntry(energy_j=total(parts), duration_s=now - start_s, windows=int(not is_open), open=int(is_open))


def _entry(result: Measurement) -> LedgerEntry:
    return LedgerEntry(
        energy_j=result.energy_j,
        duration_s=result.duration_s,
        windows=1,
        open=0,
        unmeasured_s=result.duration_s if result.energy_j is None else 0.0,
        flags=result.flags,
    )


def _add(entry: LedgerEntry | None, more: LedgerEntry) -> LedgerEntry:
    """Two entries of one name; joules of windows that could not be measured are missing, and their time says so."""
    if entry is None:
        return more
    known = [j for j in (entry.energy_j, more.energy_j) if j is not None]
    return LedgerEntry(
        energy_j=sum(known) if known else None,
        duration_s=entry.duration_s + more.duration_s,
        windows=entry.windows + more.windows,
        open=entry.open + more.open,
        unmeasured_s=entry.unmeasured_s + more.unmeasured_s,
        flags=tuple(dict.fromkeys((*entry.flags, *more.flags))),
    )


def _baseline(profile: object) -> PowerBaseline | None:
    if profile is None or isinstance(profile, PowerBaseline):
        return profile
    source: Any = getattr(profile, "profile", profile)  # a CostModel holds one
    if getattr(source, "analytic", False):
        return None  # assumed watts would make dynamic joules an assumption too
    return PowerBaseline(idle_w=getattr(source, "idle_w", None), context_w=getattr(source, "context_w", None))
