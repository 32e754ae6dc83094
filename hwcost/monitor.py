"""`with monitor.window("train") as window: ...` and then `window.measurement`."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from hwcost.cpu import CpuTimeReader
from hwcost.devices import assigned, gpu_host
from hwcost.history import GpuSystemMonitor
from hwcost.nvml import Nvml
from hwcost.rapl import RaplReader
from hwcost.readers import (
    Clock,
    DeviceInfo,
    DeviceReader,
    PowerBaseline,
    ReadError,
    SourceUnavailableError,
    SystemClock,
)
from hwcost.processes import synchronize
from hwcost.sampler import DeviceSampler
from hwcost.windows import Measurement, Span, combine

PERIOD_S = 0.1
READY_S = 2.0
SETTLE_S = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """Joules of all windows of one name, open ones up to now. None: not measurable."""

    energy_j: float | None
    duration_s: float
    windows: int
    open: int
    flags: tuple[str, ...] = ()


class EnergyWindow:
    """A measured span of the code inside its `with`. Nests and overlaps freely."""

    def __init__(self, monitor: EnergyMonitor, name: str, modelled_power_w: float | None) -> None:
        self.monitor, self.name, self.modelled_power_w = monitor, name, modelled_power_w
        self.start_s: float | None = None
        self.end_s: float | None = None
        self.spans: tuple[Span, ...] = ()
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
    """Measures the devices it was given. Use `for_assigned_devices`; a monitor without devices gives nulls and reasons."""

    def __init__(
        self,
        readers: Sequence[DeviceReader],
        *,
        period_s: float = PERIOD_S,
        baselines: Mapping[str, PowerBaseline] | PowerBaseline | None = None,
        system: GpuSystemMonitor | None = None,
        flags: Sequence[str] = (),
        clock: Clock | None = None,
        threads: bool = True,
    ) -> None:
        self.clock = clock or SystemClock()
        self.system = system or GpuSystemMonitor()
        self.flags: dict[str, None] = dict.fromkeys(flags)
        self.shared_share: bool | None = None
        self._baselines = baselines
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._open_windows: list[EnergyWindow] = []
        self._unread: list[EnergyWindow] = []
        self._ledger: dict[str, LedgerEntry] = {}
        self._closed = False
        self.samplers = tuple(
            DeviceSampler(reader, clock=self.clock, period_s=period_s, system=self.system, phase=self._phase)
            for reader in readers
        )
        for sampler in self.samplers if threads else ():
            sampler.start()
        for sampler in self.samplers if threads else ():
            sampler.ready.wait(READY_S)

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
            profile: a `PowerBaseline`, or anything with `idle_w` and `context_w`, from which idle joules are separated.
            torch_device: measure only this one of the assigned devices ("cuda:1"); "cpu" measures none of the GPUs.
            history_path: a file that samples are appended to, so that they outlive a killed process.
        """
        readers, flags, shared = _find(torch_device, allow_cpu, cpu_parallel)
        system = GpuSystemMonitor(path=history_path)
        monitor = cls(readers, period_s=period_s, baselines=_baseline(profile), system=system, flags=flags)
        monitor.shared_share = shared
        return monitor

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        return tuple(sampler.reader.info for sampler in self.samplers)

    @property
    def source(self) -> str | None:
        """The least trustworthy source among the devices; None when nothing is measured."""
        sources = [sampler.source for sampler in self.samplers]
        order = ("modelled", "rapl", "integrated", "counter")
        known = [source for source in sources if source is not None]
        return min(known, key=order.index) if known and len(known) == len(sources) else None

    # -- windows -----------------------------------------------------------------------------------------------------

    def window(self, name: str, *, modelled_power_w: float | None = None) -> EnergyWindow:
        """A span to measure; `modelled_power_w` is kept beside the measured watts in the history."""
        return EnergyWindow(self, name, modelled_power_w)

    def ledger(self) -> dict[str, LedgerEntry]:
        """Cumulative joules by window name, at any time: closed windows in full, open ones up to now."""
        with self._lock:
            for window in [w for w in self._unread if all(span.settled.is_set() for span in w.spans)]:
                window.measurement  # noqa: B018 - enters the ledger
            entries = dict(self._ledger)
            waiting = [(w, w.end_s) for w in self._unread] + [(w, None) for w in self._open_windows]
        for window, end_s in waiting:
            entries[window.name] = _add(entries.get(window.name), self._so_far(window, end_s))
        return entries

    def close(self) -> None:
        """Stop the samplers and settle what is open. Safe to call twice, and in a forked child."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._pid:
            for sampler in self.samplers:
                sampler.stop()
            self.system.close()

    def __enter__(self) -> EnergyMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- behind the windows ------------------------------------------------------------------------------------------

    def _forked(self) -> bool:
        return os.getpid() != self._pid

    def _phase(self) -> tuple[str | None, float | None]:
        windows = self._open_windows
        innermost = windows[-1] if windows else None
        return (innermost.name, innermost.modelled_power_w) if innermost else (None, None)

    def _open(self, window: EnergyWindow) -> float:
        if self._forked():
            window.flags.setdefault("forked")
            return self.clock.monotonic()
        flag = synchronize()
        if flag:
            window.flags.setdefault(flag)
        now = self.clock.monotonic()
        with self._lock:
            if not self._closed:
                for sampler in self.samplers:
                    sampler.watch()
                window.spans = tuple(sampler.open_span(now) for sampler in self.samplers)
            else:
                window.flags.setdefault("monitor_closed")
            self._open_windows.append(window)
        return now

    def _close(self, window: EnergyWindow) -> float:
        if self._forked():
            window.flags.setdefault("forked")
            window.spans = ()
            return self.clock.monotonic()
        flag = synchronize()
        if flag:
            window.flags.setdefault(flag)
        now = self.clock.monotonic()
        with self._lock:
            for sampler, span in zip(self.samplers, window.spans, strict=False):
                sampler.close_span(span, now)
                sampler.watch()
            self._open_windows.remove(window)
            self._unread.append(window)
        return now

    def _measure(self, window: EnergyWindow) -> Measurement:
        deadline = time.monotonic() + SETTLE_S
        for sampler, span in zip(self.samplers, window.spans, strict=False):
            if self._closed or self._forked():
                break
            if sampler.thread is None:
                while not span.settled.is_set():
                    sampler.tick()
            elif not span.settled.wait(max(deadline - time.monotonic(), 0.0)):
                sampler.watch()
                span.flags.setdefault("unsettled")
                sampler.settle(force=True)
        with self._lock:
            result = self._result(window)
            if window in self._unread:
                self._unread.remove(window)
                entry = LedgerEntry(
                    energy_j=result.energy_j, duration_s=result.duration_s, windows=1, open=0, flags=result.flags
                )
                self._ledger[window.name] = _add(self._ledger.get(window.name), entry)
        return result

    def _result(self, window: EnergyWindow) -> Measurement:
        assert window.start_s is not None
        assert window.end_s is not None
        duration = window.end_s - window.start_s
        parts = [
            span.measurement(window.name, sampler.reader, self._baseline_of(sampler.reader.info), sampler.min_window_s)
            for sampler, span in zip(self.samplers, window.spans, strict=False)
        ]
        if self.shared_share:
            parts = [dataclasses.replace(part, shared=True, flags=(*part.flags, "gpu_fraction")) for part in parts]
        flags = (*self.flags, *window.flags, *self.system.flags)
        return combine(window.name, duration, parts, flags)

    def _baseline_of(self, device: DeviceInfo) -> PowerBaseline:
        if isinstance(self._baselines, PowerBaseline):
            return self._baselines if device.kind == "gpu" else PowerBaseline()
        return (self._baselines or {}).get(device.device_id, PowerBaseline())

    def _so_far(self, window: EnergyWindow, end_s: float | None) -> LedgerEntry:
        now = end_s if end_s is not None else self.clock.monotonic()
        start_s = window.start_s if window.start_s is not None else now
        total: float | None = 0.0 if window.spans else None
        for sampler, span in zip(self.samplers, window.spans, strict=False):
            first = span.start or sampler.cumulative(start_s)
            last = sampler.cumulative(now)
            known = first is not None and last is not None and total is not None
            total = total + max(last.energy_j - first.energy_j, 0.0) if known else None  # type: ignore[operator, union-attr]
        is_open = end_s is None
        return LedgerEntry(energy_j=total, duration_s=now - start_s, windows=int(not is_open), open=int(is_open))


def _add(entry: LedgerEntry | None, more: LedgerEntry) -> LedgerEntry:
    if entry is None:
        return more
    known = entry.energy_j is not None and more.energy_j is not None
    return LedgerEntry(
        energy_j=entry.energy_j + more.energy_j if known else None,  # type: ignore[operator]
        duration_s=entry.duration_s + more.duration_s,
        windows=entry.windows + more.windows,
        open=entry.open + more.open,
        flags=tuple(dict.fromkeys((*entry.flags, *more.flags))),
    )


def _baseline(profile: object) -> PowerBaseline | None:
    if profile is None or isinstance(profile, PowerBaseline):
        return profile
    source: Any = getattr(profile, "baseline", profile)
    return PowerBaseline(idle_w=getattr(source, "idle_w", None), context_w=getattr(source, "context_w", None))


def _find(
    torch_device: object, allow_cpu: bool, cpu_parallel: int
) -> tuple[list[DeviceReader], list[str], bool | None]:
    """Readers of the devices this process was given, flags, and whether only a share of a GPU was given."""
    flags: list[str] = []
    wanted = str(torch_device) if torch_device is not None else None
    if wanted is None or wanted.startswith("cuda"):
        try:
            readers, shared = _find_gpus(wanted, flags)
            if readers:
                return readers, flags, shared
        except (SourceUnavailableError, ReadError) as error:
            flags.append(f"nvml_unavailable:{error}")
        if gpu_host() and (wanted is not None or flags):
            return [], flags, None  # a GPU does the work and cannot be measured: the CPU's joules would mislead
    if not allow_cpu:
        return [], [*flags, "no_gpu_assigned"], None
    return [_cpu_reader(cpu_parallel, flags)], [flag for flag in flags if not flag.startswith("nvml_unavailable")], None


def _find_gpus(wanted: str | None, flags: list[str]) -> tuple[list[DeviceReader], bool | None]:
    nvml = Nvml()
    given = assigned(nvml)
    flags.extend(given.flags)
    uuids = given.uuids
    if wanted is not None:
        index = int(wanted.partition(":")[2] or 0)
        uuids = uuids[index : index + 1]
    readers: list[DeviceReader] = []
    for uuid in uuids:
        try:
            readers.append(nvml.open(uuid))
        except ReadError as error:
            flags.append(f"gpu_unreadable:{uuid}:{error}")
    return readers, given.shared


def _cpu_reader(cpu_parallel: int, flags: list[str]) -> DeviceReader:
    if cpu_parallel == 1:
        try:
            return RaplReader()
        except (SourceUnavailableError, ReadError):
            pass
    return CpuTimeReader()
