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
_LEAST = 3  # reads of a field, however short the time


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldProbe:
    """One field of one device.

    Attributes:
        value, cost_s: None where it cannot be read (`reason` says why).
        period_s: between new values; None where it changed less than three times within `watched_s`, as most fields of
            an idle GPU do.
    """

    field: str
    value: Any = None
    cost_s: float | None = None
    period_s: float | None = None
    watched_s: float = 0.0
    reason: str | None = None


def probe_fields(reader: DeviceReader, *, seconds: float = 1.0) -> tuple[FieldProbe, ...]:
    """Read every field of a device for `seconds` in total: half of them the counter alone, whose reads are slow, then
    all the others in turn.

    A second at least is needed to see the period of a counter that steps every 100 ms.
    """
    ring = _Ring(reader)
    counter = _Watched("energy", reader.energy_j)
    others = [
        _Watched("power", reader.power_w),
        _Watched("power_ring", ring),
        _Watched("temperature", reader.temperature_c),
        _Watched("memory", reader.memory_used_bytes),
        _Watched("utilization", reader.utilization),
        _Watched("sm_clock", reader.sm_clock_mhz),
        _Watched("memory_clock", reader.memory_clock_mhz),
        _Watched("throttle_reasons", reader.throttle_reasons),
        _Watched("processes", reader.processes),
    ]
    _watch([counter], 0.5 * seconds)
    _watch(others, 0.5 * seconds)
    found = [field.probe() for field in (counter, *others)]
    return tuple(
        dataclasses.replace(probe, period_s=ring.spacing_s) if probe.field == "power_ring" else probe for probe in found
    )


def _watch(fields: list[_Watched], seconds: float) -> None:
    """Each field at least three times; then the first one at every turn and one of the others, until the time is up."""
    for field in fields * _LEAST:
        field.read()
    end = time.monotonic() + seconds
    rotation = itertools.cycle(fields[1:] or fields)
    while time.monotonic() < end:
        turn = {id(field): field for field in (fields[0], next(rotation))}
        slowest = max(field.read() for field in turn.values())
        if slowest < SLOW_S:
            time.sleep(SLOW_S)


class _Watched:
    """A field that is read again and again: what a read costs, and when the value was a new one."""

    def __init__(self, field: str, call: Callable[[], Any]) -> None:
        self.field, self.call = field, call
        self.value: Any = None
        self.reason: str | None = None
        self.times: list[float] = []
        self.costs: list[float] = []
        self.changes: list[float] = []

    def read(self) -> float:
        """Seconds that the read took; 0 where the field cannot be read."""
        if self.reason is not None:
            return 0.0
        before = time.perf_counter()
        try:
            got = self.call()
        except ReadError as error:
            self.reason = str(error) or type(error).__name__
            return 0.0
        self.costs.append(time.perf_counter() - before)
        if self.times and got != self.value:
            self.changes.append(before)
        self.times.append(before)
        self.value = got
        return self.costs[-1]

    def probe(self) -> FieldProbe:
        if self.reason is not None:
            return FieldProbe(field=self.field, reason=self.reason)
        gaps = [b - a for a, b in itertools.pairwise(self.changes)]
        return FieldProbe(
            field=self.field,
            value=self.value,
            cost_s=statistics.median(self.costs),
            period_s=statistics.median(gaps) if len(gaps) >= 2 else None,
            watched_s=self.times[-1] - self.times[0],
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
