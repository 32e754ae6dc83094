"""The power trace: what the sampler saw, bounded in memory whatever the length of a trial."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from typing import Any, TextIO


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerSample:
    """One moment of one device. `time_s` is monotonic; unknown is None."""

    time_s: float
    device_id: str
    power_w: float | None = None
    temperature_c: float | None = None
    memory_bytes: int | None = None
    sm_utilization: float | None = None
    memory_utilization: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle_reasons: int | None = None
    phase: str | None = None
    modelled_power_w: float | None = None


class GpuSystemMonitor:
    """Bounded history of samples. When it is full every second sample goes and only every second one is kept from then
    on.

    Args:
        max_samples: per device.
        path: a file to which samples are appended as JSON lines, so that they outlive a killed process; None keeps them
        in memory
            only. A path that cannot be written leaves the flag `history_unwritable` and nothing else.
    """

    def __init__(self, *, max_samples: int = 20_000, path: str | os.PathLike[str] | None = None) -> None:
        self.max_samples = max(int(max_samples), 2)
        self.flags: dict[str, None] = {}
        self._lock = threading.Lock()
        self._samples: dict[str, list[PowerSample]] = {}
        self._stride: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self.path = os.fspath(path) if path is not None else None
        self._sink: TextIO | None = None

    @property
    def history(self) -> tuple[PowerSample, ...]:
        """All samples kept, in order of time."""
        with self._lock:
            merged = [sample for samples in self._samples.values() for sample in samples]
        return tuple(sorted(merged, key=lambda sample: sample.time_s))

    def clear(self) -> None:
        """Forget the samples, so that the next trial in this process starts an empty trace."""
        with self._lock:
            self._samples.clear()
            self._stride.clear()
            self._seen.clear()

    def add(self, sample: PowerSample) -> None:
        """Keep a sample, thinning where the bound is reached."""
        key = sample.device_id
        with self._lock:
            seen = self._seen.get(key, 0)
            self._seen[key] = seen + 1
            stride = self._stride.setdefault(key, 1)
            if seen % stride:
                return
            samples = self._samples.setdefault(key, [])
            samples.append(sample)
            if len(samples) >= self.max_samples:
                del samples[1::2]
                self._stride[key] = 2 * stride
        self.spill({"sample": dataclasses.asdict(sample)})

    def spill(self, record: dict[str, Any]) -> None:
        """Append a record to the file, if there is one."""
        if self.path is None:
            return
        try:
            if self._sink is None:
                self._sink = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - stays open
            self._sink.write(json.dumps(record) + "\n")
            self._sink.flush()
        except (OSError, ValueError):
            self.path = None
            self.flags.setdefault("history_unwritable")

    def close(self) -> None:
        """Close the file, if there is one."""
        self.path = None
        if self._sink is not None:
            try:
                self._sink.close()
            except OSError:
                self.flags.setdefault("history_unwritable")
            self._sink = None
