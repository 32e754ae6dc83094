"""Joules of a CPU host without a readable counter: process CPU time times a stated wattage. Modelled, and called so."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence

from hwcost.readers import DeviceInfo, FieldUnavailableError, ProcessUse

WATTS_PER_CORE = 6.0
"""Watts of one busy core unless `JOULEMOE_WATTS_PER_CORE` says otherwise: thermal design power over cores of current
server parts lies between 4 and 8 W (280 W / 64, 350 W / 56). An assumption, not a measurement."""


class SettingError(ValueError):
    """An environment variable that cannot be what it says."""


def watts_per_core() -> float:
    """The stated watts of one busy core.

    Raises:
        SettingError: `JOULEMOE_WATTS_PER_CORE` is not a positive number.
    """
    text = os.environ.get("JOULEMOE_WATTS_PER_CORE")
    if text is None:
        return WATTS_PER_CORE
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1000:
        raise SettingError(f"JOULEMOE_WATTS_PER_CORE: expected watts of one core, between 0 and 1000; got {text!r}")
    return value


class UnreadableFields:
    """The fields that only a GPU has."""

    def power_w(self) -> float:
        raise FieldUnavailableError("no power sensor")

    def power_ring(self, since_us: int) -> Sequence[tuple[int, float]]:
        raise FieldUnavailableError("no power samples")

    def temperature_c(self) -> float:
        raise FieldUnavailableError("no temperature sensor")

    def memory_used_bytes(self) -> int:
        raise FieldUnavailableError("no device memory")

    def utilization(self) -> tuple[float, float]:
        raise FieldUnavailableError("no utilisation")

    def sm_clock_mhz(self) -> float:
        raise FieldUnavailableError("no clock")

    def memory_clock_mhz(self) -> float:
        raise FieldUnavailableError("no clock")

    def throttle_reasons(self) -> int:
        raise FieldUnavailableError("no throttle reasons")

    def processes(self) -> Sequence[ProcessUse]:
        raise FieldUnavailableError("no process list")


class CpuTimeReader(UnreadableFields):
    """CPU seconds of this process and of its finished children, times watts per core."""

    source = "modelled"
    stepped = False

    def __init__(self, watts: float | None = None) -> None:
        self.watts_per_core = watts_per_core() if watts is None else watts
        self.info = DeviceInfo(device_id="cpu", kind="cpu", name=platform.processor() or platform.machine() or None)
        self.notes: tuple[str, ...] = (f"modelled:{self.watts_per_core:g}_w_per_core",)

    def energy_j(self) -> float:
        times = os.times()
        return self.watts_per_core * (time.process_time() + times.children_user + times.children_system)
