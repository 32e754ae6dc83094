"""What a device's fields cost and how often they change: measured, never assumed from its architecture."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from hwcost.readers import DeviceReader, ReadError

SLOW_S = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldProbe:
    """One field of one device. `value` and `cost_s` are None where it cannot be read (`reason` says why); `period_s` is
    None
    where it did not change often enough to tell."""

    field: str
    value: Any = None
    cost_s: float | None = None
    period_s: float | None = None
    reason: str | None = None


def probe_fields(reader: DeviceReader, *, seconds: float = 1.0) -> tuple[FieldProbe, ...]:
    """Read every field of a device for a while (`seconds` in total for those that change).

    A second at least is needed to see the period of a counter that steps every 100 ms.
    """
    newest = _Ring(reader)
    timed: list[tuple[str, Callable[[], Any], float]] = [
        ("energy", reader.energy_j, 0.5 * seconds),
        ("power", reader.power_w, 0.5 * seconds),
        ("power_ring", newest, 0.0),
        ("temperature", reader.temperature_c, 0.0),
        ("memory", reader.memory_used_bytes, 0.0),
        ("utilization", reader.utilization, 0.0),
        ("sm_clock", reader.sm_clock_mhz, 0.0),
        ("memory_clock", reader.memory_clock_mhz, 0.0),
        ("throttle_reasons", reader.throttle_reasons, 0.0),
        ("processes", reader.processes, 0.0),
    ]
    found = [_probe(field, call, span) for field, call, span in timed]
    return tuple(
        dataclasses.replace(probe, period_s=newest.spacing_s) if probe.field == "power_ring" else probe
        for probe in found
    )


def _probe(field: str, call: Callable[[], Any], seconds: float) -> FieldProbe:
    costs: list[float] = []
    changes: list[float] = []
    value: Any = None
    end = time.monotonic() + seconds
    try:
        while len(costs) < 3 or time.monotonic() < end:
            before = time.perf_counter()
            got = call()
            costs.append(time.perf_counter() - before)
            if len(costs) > 1 and got != value:
                changes.append(before)
            value = got
            if costs[-1] < SLOW_S and seconds:
                time.sleep(SLOW_S)
    except ReadError as error:
        return FieldProbe(field=field, reason=str(error) or type(error).__name__)
    gaps = [b - a for a, b in itertools.pairwise(changes)]
    return FieldProbe(
        field=field,
        value=value,
        cost_s=statistics.median(costs),
        period_s=statistics.median(gaps) if len(gaps) >= 2 else None,
    )


class _Ring:
    """The driver's ring as a field: how many samples, how far apart."""

    def __init__(self, reader: DeviceReader) -> None:
        self.reader = reader
        self.spacing_s: float | None = None

    def __call__(self) -> int:
        samples = self.reader.power_ring(0)
        stamps = [stamp for stamp, _ in samples]
        if len(stamps) > 2:
            self.spacing_s = 1e-6 * statistics.median(b - a for a, b in itertools.pairwise(stamps))
        return len(samples)
