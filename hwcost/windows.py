"""Measured spans: what a window says after it was closed, and what is gathered while it is open."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence

from hwcost.history import PowerSample
from hwcost.integrate import Reading
from hwcost.nvml import THROTTLE_REASONS
from hwcost.processes import Occupancy
from hwcost.readers import DeviceReader, PowerBaseline

POWER_ERRORS = (0.01, 0.03)
"""Relative standard uncertainty of integrated power beside the counter: the driver's ring, and sampled instant power.
On an H200 they were within 0.3 % and 1-3 %."""
POWER_EDGES_S = (0.02, 0.1)
"""The spacing of the same samples: how far a window's edges may be off in them."""
AVERAGED_S = 1.0  # ... where the driver has nothing but a one-second mean
STEP_S = 0.1  # and in the counter, unless its period is longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Joules of one window, on one device or (with `devices`) in total. Unknown is None, never 0.

    Attributes:
        energy_j: all joules of the span.
        uncertainty_j: its standard uncertainty from edges and gaps; a constant error of the board's sensor is not in
        it. idle_j, context_j, dynamic_j: idle watts × time, what contexts add, and the rest; None without a baseline.
        integral_j: the same span from sampled power, beside the counter. source: counter, integrated, rapl or modelled.
        coverage: share of the span for which joules are known. throttled: heat or power held the clocks down. shared:
        somebody else used the device. flags: what was wrong, one word each.
    """

    name: str
    device_id: str | None = None
    energy_j: float | None = None
    uncertainty_j: float | None = None
    dynamic_j: float | None = None
    idle_j: float | None = None
    context_j: float | None = None
    duration_s: float = 0.0
    mean_power_w: float | None = None
    peak_power_w: float | None = None
    mean_temperature_c: float | None = None
    max_temperature_c: float | None = None
    max_memory_bytes: int | None = None
    integral_j: float | None = None
    source: str | None = None
    coverage: float = 0.0
    throttled: bool | None = None
    shared: bool | None = None
    flags: tuple[str, ...] = ()
    devices: tuple[Measurement, ...] = ()


class Span:
    """One window on one device while it is being measured; only that device's sampler writes to it, under its lock."""

    def __init__(self, start_s: float, flags: Sequence[str] = ()) -> None:
        self.start_s = start_s
        self.end_s: float | None = None
        self.start: Reading | None = None
        self.end: Reading | None = None
        self.powers_start: tuple[Reading | None, ...] = ()
        self.powers_end: tuple[Reading | None, ...] = ()
        self.settled = threading.Event()
        self.flags: dict[str, None] = dict.fromkeys(flags)
        self.shared: bool | None = None
        self.context = False
        self._peak_w: float | None = None
        self._temperatures = (0, 0.0, -math.inf)  # count, sum, max
        self._max_memory: int | None = None
        self._throttle: int | None = None

    def contains(self, time_s: float) -> bool:
        return time_s >= self.start_s and (self.end_s is None or time_s <= self.end_s)

    def add_power(self, time_s: float, watts: float) -> None:
        """Count a power value towards the peak."""
        if self.contains(time_s):
            self._peak_w = watts if self._peak_w is None else max(self._peak_w, watts)

    def add(self, sample: PowerSample) -> None:
        """Count a sample if it falls into the span."""
        if not self.contains(sample.time_s):
            return
        if sample.temperature_c is not None:
            n, total, highest = self._temperatures
            self._temperatures = (n + 1, total + sample.temperature_c, max(highest, sample.temperature_c))
        if sample.memory_bytes is not None:
            self._max_memory = max(self._max_memory or 0, sample.memory_bytes)
        if sample.throttle_reasons is not None:
            self._throttle = (self._throttle or 0) | sample.throttle_reasons

    def see(self, seen: Occupancy | None) -> None:
        """Count the processes on the device."""
        if seen is None:
            return
        self.shared = bool(self.shared) or seen.others > 0
        self.context = self.context or seen.total > 0
        for flag in seen.flags:
            self.flags.setdefault(flag)

    def measurement(self, name: str, reader: DeviceReader, baseline: PowerBaseline, min_s: float) -> Measurement:
        """What the span amounts to, once settled."""
        duration = (self.end_s or self.start_s) - self.start_s
        count, total, highest = self._temperatures
        reasons = (
            [] if self._throttle is None else [word for bit, word in THROTTLE_REASONS.items() if self._throttle & bit]
        )
        energy, sigma, coverage = self._energy(duration, min_s)
        power = self._integral(duration, reader)
        if energy is not None and power is not None:
            edges_j = (power.edge_s + max(STEP_S, min_s)) * (power.edge_w or energy / duration)
            allowed_j = edges_j + 3 * math.hypot(sigma or 0.0, power.sigma_j, power.error * energy)
            if abs(energy - power.energy_j) > allowed_j:
                self.flags.setdefault("counter_disagrees")
        watts = baseline if reader.info.kind == "gpu" else PowerBaseline()
        idle, context, dynamic = _separate(energy, duration, watts, self.context)
        return Measurement(
            name=name,
            device_id=reader.info.device_id,
            energy_j=energy,
            uncertainty_j=sigma,
            idle_j=idle,
            context_j=context,
            dynamic_j=dynamic,
            duration_s=duration,
            mean_power_w=energy / (coverage * duration) if energy is not None and coverage * duration > 0 else None,
            peak_power_w=self._peak_w,
            mean_temperature_c=total / count if count else None,
            max_temperature_c=highest if count else None,
            max_memory_bytes=self._max_memory,
            integral_j=power.energy_j if power is not None else None,
            source=self._source(reader.source) if energy is not None else None,
            coverage=coverage,
            throttled=None if self._throttle is None else bool(reasons),
            shared=True if reader.info.mig else self.shared,
            flags=(*self.flags, *(f"throttled:{word}" for word in reasons)),
        )

    def _energy(self, duration: float, min_s: float) -> tuple[float | None, float | None, float]:
        if duration < min_s or duration <= 0:
            self.flags.setdefault("too_short")
            return None, None, 0.0
        if self.start is None or self.end is None:
            return None, None, 0.0
        coverage = min(max((self.end.covered_s - self.start.covered_s) / duration, 0.0), 1.0)
        if coverage <= 0:
            return None, None, 0.0
        if coverage < 0.99:
            self.flags.setdefault("partial")
        energy = max(self.end.energy_j - self.start.energy_j, 0.0)
        return energy, math.hypot(self.start.sigma_j, self.end.sigma_j), coverage

    def _source(self, counter: str) -> str:
        """The counter, unless power had to stand in for more than 1 % of the span."""
        assert self.start is not None
        assert self.end is not None
        bridged_s = self.end.bridged_s - self.start.bridged_s
        return "integrated" if bridged_s > 0.01 * (self.end.covered_s - self.start.covered_s) else counter

    def _integral(self, duration: float, reader: DeviceReader) -> _Integral | None:
        """Joules from power alone, of the finest samples that cover the span."""
        coarse_s = AVERAGED_S if "averaged_power" in reader.notes else POWER_EDGES_S[1]
        edges = ((POWER_EDGES_S[0], None), (coarse_s, reader.info.power_limit_w or self._peak_w))
        for first, last, error, edge in zip(self.powers_start, self.powers_end, POWER_ERRORS, edges, strict=True):
            if first is not None and last is not None and last.covered_s - first.covered_s > 0.95 * duration:
                sigma = math.hypot(first.sigma_j, last.sigma_j)
                return _Integral(last.energy_j - first.energy_j, sigma, error, *edge)
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Integral:
    """Joules of a span from power, their uncertainty at its edges, the relative one, and how far and at what watts
    (None: the mean of the span; coarse samples do not see what is just beyond it) the samples may miss the edges.
    """

    energy_j: float
    sigma_j: float
    error: float
    edge_s: float
    edge_w: float | None


def _separate(
    energy: float | None, duration: float, baseline: PowerBaseline, context: bool
) -> tuple[float | None, float | None, float | None]:
    """Joules of an idle board, of the contexts on it, and of the work."""
    if energy is None or baseline.idle_w is None:
        return None, None, None
    idle = baseline.idle_w * duration
    extra = 0.0 if not context else None if baseline.context_w is None else baseline.context_w * duration
    return idle, extra, energy - idle - (extra or 0.0)


def combine(name: str, duration_s: float, parts: Sequence[Measurement], flags: Sequence[str]) -> Measurement:
    """The total over devices. Joules are known only if every device's are; the source is the least trustworthy one."""
    energy = total([part.energy_j for part in parts])
    sigmas = [part.uncertainty_j for part in parts]
    known = [s for s in sigmas if s is not None]
    return Measurement(
        name=name,
        energy_j=energy,
        uncertainty_j=math.hypot(*known) if energy is not None and len(known) == len(parts) else None,
        idle_j=total([part.idle_j for part in parts]),
        context_j=total([part.context_j for part in parts]),
        dynamic_j=total([part.dynamic_j for part in parts]),
        integral_j=total([part.integral_j for part in parts]),
        duration_s=duration_s,
        mean_power_w=total([part.mean_power_w for part in parts]),
        peak_power_w=total([part.peak_power_w for part in parts]),
        mean_temperature_c=_mean([part.mean_temperature_c for part in parts]),
        max_temperature_c=max((p.max_temperature_c for p in parts if p.max_temperature_c is not None), default=None),
        max_memory_bytes=max((p.max_memory_bytes for p in parts if p.max_memory_bytes is not None), default=None),
        source=least_trusted([part.source for part in parts]) if energy is not None else None,
        coverage=min((part.coverage for part in parts), default=0.0),
        throttled=_any([part.throttled for part in parts]),
        shared=_any([part.shared for part in parts]),
        flags=tuple(dict.fromkeys([*flags, *(flag for part in parts for flag in part.flags)])),
        devices=tuple(parts),
    )


def least_trusted(sources: Sequence[str | None]) -> str | None:
    """The least trustworthy of several sources; None if one is unknown, or none is given."""
    order = ("modelled", "rapl", "integrated", "counter")
    known = [source for source in sources if source is not None]
    return min(known, key=order.index) if known and len(known) == len(sources) else None


def total(values: Sequence[float | None]) -> float | None:
    """The sum; None if one is unknown, or none is given."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _any(values: Sequence[bool | None]) -> bool | None:
    known = [value for value in values if value is not None]
    return any(known) if known else None
