"""The joules of one attempt, phase by phase. Unknown joules stay unknown: a sum with a hole is None."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from hwcost import EnergyMonitor, Measurement

SETUP, TRAIN, EVAL = "setup", "train", "eval"


def total(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a part is unknown."""
    known = list(values)
    return None if any(v is None for v in known) else sum(v for v in known if v is not None)


def quadrature(values: Iterable[float | None]) -> float | None:
    """Standard uncertainty of a sum of independent parts; None where a part is unknown."""
    squares = total(None if v is None else v * v for v in values)
    return None if squares is None else squares**0.5


def highest(values: Iterable[float | None]) -> float | None:
    """The largest known value, None where there is none."""
    return max((v for v in values if v is not None), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A closed window and the phase it is booked on."""

    phase: str
    measurement: Measurement


class Ledger:
    """Books every window of an attempt on setup, train or eval; what is between them is idle."""

    def __init__(self, monitor: EnergyMonitor) -> None:
        self.monitor = monitor
        self.entries: list[Entry] = []
        self._span: Any = None
        self._stack = ExitStack()

    def open(self) -> None:
        """Begin the attempt's span."""
        self._span = self._stack.enter_context(self.monitor.window("trial"))

    def close(self) -> None:
        """End the attempt's span; safe to call twice."""
        self._stack.close()

    @contextmanager
    def window(self, phase: str) -> Iterator[Any]:
        """A measured window, booked on the phase when it closes (on an exception too)."""
        with self.monitor.window(phase) as window:
            try:
                yield window
            finally:
                pass
        self.entries.append(Entry(phase=phase, measurement=window.measurement))

    @property
    def span(self) -> Measurement | None:
        """The whole attempt, once closed."""
        return None if self._span is None else self._span.measurement

    def of(self, phase: str) -> list[Measurement]:
        """The measurements of a phase."""
        return [entry.measurement for entry in self.entries if entry.phase == phase]

    def energy_j(self, phase: str) -> float | None:
        """Joules of a phase; None where nothing was measured."""
        return total(m.energy_j for m in self.of(phase)) if self.of(phase) else None

    def columns(self) -> dict[str, Any]:
        """The energy columns of a `trials` row."""
        train = self.of(TRAIN)
        booked = [self.energy_j(phase) for phase in (SETUP, TRAIN, EVAL)]
        span = self.span
        whole = None if span is None else span.energy_j
        parts = total(value for value, phase in zip(booked, (SETUP, TRAIN, EVAL), strict=True) if self.of(phase))
        idle = None if whole is None or parts is None else whole - parts
        duration = sum(m.duration_s for m in train if m.duration_s is not None)
        return {
            "energy_source": None if span is None else span.source,
            "setup_energy_j": booked[0],
            "train_energy_j": booked[1],
            "eval_energy_j": booked[2],
            "idle_energy_j": idle,
            "lost_energy_j": 0.0 if whole is not None else None,
            "total_energy_j": whole,
            "train_energy_uncertainty_j": quadrature(m.uncertainty_j for m in train) if train else None,
            "train_energy_dynamic_j": total(m.dynamic_j for m in train) if train else None,
            "mean_power_w": booked[1] / duration if booked[1] is not None and duration else None,
            "max_temperature_c": highest(m.max_temperature_c for m in train),
            "mean_temperature_c": _time_mean(train),
            "max_memory_bytes": None if span is None else span.max_memory_bytes,
            "throttled": _any(m.throttled for m in train),
            "shared_gpu": None if span is None else span.shared,
            "energy_flags": None if span is None else sorted({f for m in (span, *train) for f in m.flags}),
            "duration_s": None if span is None else span.duration_s,
            "train_duration_s": duration or None,
        }


def _time_mean(measurements: list[Measurement]) -> float | None:
    pairs = [(m.mean_temperature_c, m.duration_s) for m in measurements]
    known = [(t, d) for t, d in pairs if t is not None and d]
    return sum(t * d for t, d in known) / sum(d for _, d in known) if known else None


def _any(values: Iterable[bool | None]) -> bool | None:
    known = [v for v in values if v is not None]
    return any(known) if known else None
