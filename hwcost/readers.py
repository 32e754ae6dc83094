"""What a device that draws power can tell, and the errors of asking it.

Everything above this file (integration, sampling, windows) knows devices only through `DeviceReader`. NVML, RAPL and
the CPU model each translate their own errors into the three below, once.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class ReadError(Exception):
    """A value could not be read this time; the next attempt may succeed."""


class FieldUnavailableError(ReadError):
    """This device never gives this field: not supported, or no permission."""


class DeviceLostError(ReadError):
    """The device is gone and stays gone until the host is mended."""


class SourceUnavailableError(Exception):
    """The whole library or interface cannot be used here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """Who a device is. Unknown is None."""

    device_id: str  # GPU UUID, or "cpu"
    kind: str  # "gpu" or "cpu"
    name: str | None = None
    uuid: str | None = None
    index: int | None = None
    driver_version: str | None = None
    power_limit_w: float | None = None
    slowdown_temperature_c: float | None = None
    memory_bytes: int | None = None
    mig: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerBaseline:
    """Watts that a device draws without work, as measured by `joulemoe doctor` or `joulemoe calibrate`.

    Attributes:
        idle_w: no process holds a context on the device.
        context_w: what an idle context adds to that (35-45 W on an H200).
    """

    idle_w: float | None = None
    context_w: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessUse:
    """A process that holds a context on a device."""

    pid: int
    memory_bytes: int | None = None


class DeviceReader(Protocol):
    """One device's readings. Every method may raise `ReadError`, `FieldUnavailableError` or `DeviceLostError`.

    `source` is what its energy counter is called in results: counter, rapl or modelled. A `stepped` counter moves at
    intervals and is slow to read (NVML); the others can be read at the very edge of a window.
    """

    info: DeviceInfo
    source: str
    stepped: bool
    notes: tuple[str, ...]

    def energy_j(self) -> float: ...
    def power_w(self) -> float: ...
    def power_ring(self, since_us: int) -> Sequence[tuple[int, float]]:
        """Samples (µs since 1970 by the driver's stamp, watts) newer than `since_us`, oldest first."""

    def temperature_c(self) -> float: ...
    def memory_used_bytes(self) -> int: ...
    def utilization(self) -> tuple[float, float]: ...
    def sm_clock_mhz(self) -> float: ...
    def memory_clock_mhz(self) -> float: ...
    def throttle_reasons(self) -> int: ...
    def processes(self) -> Sequence[ProcessUse]: ...


class Clock(Protocol):
    """Time as the sampler sees it; tests give a simulated one."""

    def monotonic(self) -> float: ...
    def wall(self) -> float: ...
    def wait(self, event: threading.Event, seconds: float) -> bool: ...


class SystemClock:
    """The machine's clocks. Durations come from the monotonic one alone."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(max(seconds, 0.0))


class Guard:
    """Reads each field on its own: one that fails leaves None and a flag, never an exception."""

    def __init__(self, *, flag: Callable[[str], None], stand: Callable[[str], None]) -> None:
        self.flag, self.stand = flag, stand  # of the windows open now; of these and all later ones
        self.unavailable: dict[str, str] = {}
        self.lost = False

    def read(self, field: str, call: Callable[[], T]) -> T | None:
        """The field's value; None where it is not readable, now or for good."""
        if self.lost or field in self.unavailable:
            return None
        try:
            value = call()
        except FieldUnavailableError as error:
            self.unavailable[field] = str(error)
            self.stand(f"unreadable:{field}")
        except DeviceLostError:
            self.lost = True
            self.stand("gpu_lost")
        except Exception as error:  # a monitor never stops training
            self.flag(f"{field}_failed:{type(error).__name__}")
        else:
            if isinstance(value, float) and not math.isfinite(value):
                self.flag(f"{field}_not_finite")
                return None
            return value
        return None
