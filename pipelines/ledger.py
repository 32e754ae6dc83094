"""The joules of a trial over its attempts, phase by phase. Unknown joules stay unknown: a sum with a hole is None."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from hwcost import CostModel, EnergyMonitor, Measurement
from hwcost.devices import power_limit_w
from pipelines.heartbeat import Keeper

SETUP, TRAIN, EVAL, BRANCH = "setup", "train", "eval", "branch"
PHASES = (SETUP, TRAIN, EVAL, BRANCH)
_SPAN = "trial"


def trial_monitor(*, cpu_parallel: int = 1, device: str = "auto") -> EnergyMonitor:
    """A monitor of the one device that a trial in this process uses; idle watts from its profile if it has one.

    `device` is what the trial asks for: with `cpu` the GPUs of this host do not do its work.
    """
    if device == "cpu":
        return EnergyMonitor.for_assigned_devices(cpu_parallel=cpu_parallel, torch_device="cpu")
    if not torch.cuda.is_available():
        return EnergyMonitor.for_assigned_devices(cpu_parallel=cpu_parallel)
    profile = CostModel.for_device(torch.cuda.get_device_name(0), power_limit_w("cuda:0"))
    return EnergyMonitor.for_assigned_devices(cpu_parallel=cpu_parallel, torch_device="cuda:0", profile=profile)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    """What a trial had spent when an attempt took over: work that counts by phase, and work that was lost.

    All zero for a first attempt. None: not known, and then the trial's sums are not known either.
    """

    setup_j: float | None = 0.0
    train_j: float | None = 0.0
    eval_j: float | None = 0.0
    branch_j: float | None = 0.0
    idle_j: float | None = 0.0
    lost_j: float | None = 0.0
    train_uncertainty_j: float | None = 0.0
    train_dynamic_j: float | None = 0.0
    train_duration_s: float = 0.0
    flags: tuple[str, ...] = ()

    @property
    def total_j(self) -> float | None:
        """Everything spent so far."""
        return total((self.setup_j, self.train_j, self.eval_j, self.branch_j, self.idle_j, self.lost_j))

    def phase_j(self, phase: str) -> float | None:
        """Joules of a phase."""
        return getattr(self, f"{phase}_j")

    def losing_up_to(self, spent_j: float | None) -> Carry:
        """This state, continued after `spent_j` were spent in all: what was spent beyond it is lost."""
        beyond = None if spent_j is None or self.total_j is None else spent_j - self.total_j
        return dataclasses.replace(self, lost_j=total((self.lost_j, beyond)))

    @classmethod
    def from_document(cls, values: Mapping[str, Any] | None) -> Carry:
        """Read what `dataclasses.asdict` wrote."""
        return cls() if not values else cls(**{**values, "flags": tuple(values["flags"])})


class Ledger:
    """Books every window of an attempt on a phase, on top of what earlier attempts left; between windows is idle."""

    def __init__(
        self, monitor: EnergyMonitor, *, carry: Carry | None = None, keeper: Keeper | None = None, name: str = ""
    ) -> None:
        self.monitor, self.keeper, self.name = monitor, keeper, name
        self.carry = carry or Carry()
        self.entries: list[Entry] = []
        self._span: Any = None
        self._stack = ExitStack()
        self._before_j: float | None = None

    def open(self) -> None:
        """Begin the attempt's span."""
        known = self.monitor.ledger().get(_SPAN)
        self._before_j = known.energy_j if known else 0.0
        self._edge("begin")
        self._stack.callback(self._edge, "end")
        self._span = self._stack.enter_context(self.monitor.window(_SPAN))

    def close(self) -> None:
        """End the attempt's span; safe to call twice."""
        self._stack.close()

    @contextmanager
    def window(self, phase: str, *, modelled_power_w: float | None = None) -> Iterator[Any]:
        """A measured window, booked on the phase when it closes (on an exception too)."""
        self._edge("open", phase)
        try:
            with self.monitor.window(phase, modelled_power_w=modelled_power_w) as window:
                yield window
        finally:
            self._edge("close", phase)
            self.entries.append(Entry(phase=phase, measurement=window.measurement))

    def _edge(self, edge: str, phase: str | None = None) -> None:
        if self.keeper is not None:
            self.keeper.edge(self.name, edge, phase)

    @property
    def span(self) -> Measurement | None:
        """The whole attempt, once closed."""
        return None if self._span is None else self._span.measurement

    def of(self, phase: str) -> list[Measurement]:
        """The measurements of a phase in this attempt."""
        return [entry.measurement for entry in self.entries if entry.phase == phase]

    def energy_j(self, phase: str) -> float | None:
        """Joules of a phase over all attempts that count; None where nothing was measured."""
        carried = self.carry.phase_j(phase)
        if not self.of(phase):
            return carried or None
        return total((carried, *(m.energy_j for m in self.of(phase))))

    def so_far(self) -> Carry:
        """The trial's state at this moment, while the span is open: what a checkpoint keeps."""
        known = self.monitor.ledger().get(_SPAN)
        whole = (
            None
            if known is None or known.energy_j is None or self._before_j is None
            else (known.energy_j - self._before_j)
        )
        return self._state(whole)

    def _state(self, whole_j: float | None) -> Carry:
        own = {phase: total(m.energy_j for m in self.of(phase)) for phase in PHASES}
        train = self.of(TRAIN)
        parts = total(own.values())
        idle = None if whole_j is None or parts is None else whole_j - parts
        return Carry(
            **{f"{phase}_j": total((self.carry.phase_j(phase), own[phase])) for phase in PHASES},
            idle_j=total((self.carry.idle_j, idle)),
            lost_j=self.carry.lost_j,
            train_uncertainty_j=quadrature((self.carry.train_uncertainty_j, *(m.uncertainty_j for m in train))),
            train_dynamic_j=total((self.carry.train_dynamic_j, *(m.dynamic_j for m in train))),
            train_duration_s=self.carry.train_duration_s + sum(m.duration_s or 0.0 for m in train),
            flags=self.carry.flags,
        )

    def columns(self) -> dict[str, Any]:
        """The energy columns of a `trials` row."""
        train, span = self.of(TRAIN), self.span
        if span is None:
            return {"energy_source": None, **self._unmeasured()}
        state = self._state(span.energy_j)
        trained, duration = self.energy_j(TRAIN), state.train_duration_s
        flags = {f for m in (span, *train) for f in m.flags} | set(state.flags)
        return {
            "energy_source": span.source,
            "setup_energy_j": self.energy_j(SETUP),
            "train_energy_j": trained,
            "eval_energy_j": self.energy_j(EVAL),
            "branches_energy_j": self.energy_j(BRANCH),
            "idle_energy_j": state.idle_j,
            "lost_energy_j": state.lost_j if span.energy_j is not None else None,
            "total_energy_j": state.total_j,
            "train_energy_uncertainty_j": state.train_uncertainty_j if trained is not None else None,
            "train_energy_dynamic_j": state.train_dynamic_j if trained is not None else None,
            "mean_power_w": trained / duration if trained is not None and duration else None,
            "max_temperature_c": highest(m.max_temperature_c for m in train),
            "mean_temperature_c": _time_mean(train),
            "max_memory_bytes": span.max_memory_bytes,
            "throttled": any_true(m.throttled for m in train),
            "shared_gpu": span.shared,
            "energy_flags": sorted(flags),
            "duration_s": span.duration_s,
            "train_duration_s": duration or None,
        }

    def _unmeasured(self) -> dict[str, Any]:
        return {"train_energy_j": None, "train_duration_s": None}


def _time_mean(measurements: list[Measurement]) -> float | None:
    pairs = [(m.mean_temperature_c, m.duration_s) for m in measurements]
    known = [(t, d) for t, d in pairs if t is not None and d]
    return sum(t * d for t, d in known) / sum(d for _, d in known) if known else None


def any_true(values: Iterable[bool | None]) -> bool | None:
    """Whether one of the known values is true; None where none is known."""
    known = [v for v in values if v is not None]
    return any(known) if known else None
