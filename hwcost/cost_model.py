"""CostModel: joules and seconds of an operation before it runs.

E = (P_idle + P_context + P_active)·t + P_leak(T)·t + Σ ε·counts, with counts from `hwcost.ops` (FLOPs, bytes,
launches) and non-negative ε above idle from a profile. Time is a sum of the same counts times
seconds per unit, never less than what the power limit allows, and may be given instead (measured).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from hwcost.fit import fit_profile
from hwcost.ops import COMPUTE, COUNTERS, MEMORY, OPS, STEP_PHASES, Call, Counts, ModelShape, counts_of
from hwcost.points import Calibration
from hwcost.prices import ExpertPrices, expert_prices
from hwcost.profiles import Profile, load_profile, select_profile
from hwcost.reach import outside
from hwcost.shares import share_energy

_CAUSES = (COMPUTE, MEMORY, ("launches",))


class CalibrationRangeError(ValueError):
    """An operation outside the calibrated range, where extrapolation was not asked for."""


class MemoryPressureError(ValueError):
    """A batch refused because the GPU's memory is too full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Modelled joules and seconds of one call of an operation.

    `j_per_sequence` is `energy_j / batch_size`; `j_per_token` divides by the tokens that pass through
    (batch_size · seq_len; batch_size for a decode step); `j_per_expert_slot` divides that by K.
    """

    energy_j: float
    duration_s: float
    j_per_sequence: float
    j_per_token: float
    j_per_expert_slot: float
    flags: tuple[str, ...] = ()

    @property
    def power_w(self) -> float:
        return self.energy_j / self.duration_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostBreakdown:
    """The terms of `Cost.energy_j`; they sum to it."""

    compute_j: float
    memory_j: float
    launch_j: float
    static_j: float
    thermal_j: float
    duration_s: float
    flags: tuple[str, ...] = ()

    @property
    def energy_j(self) -> float:
        return self.compute_j + self.memory_j + self.launch_j + self.static_j + self.thermal_j


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """The state of the device, and what is known of the call beside its shape.

    Attributes:
        current_temp: °C; None: the temperature of the calibration.
        memory_pressure: share of the GPU's memory in use, 0 to 1; None: unknown, costs nothing.
        duration_s: measured time of the call; None: predicted.
        extrapolate: answer outside the calibrated range, with a flag, instead of raising.
    """

    current_temp: float | None = None
    memory_pressure: float | None = None
    duration_s: float | None = None
    extrapolate: bool = False

    def __post_init__(self) -> None:
        pressure = self.memory_pressure
        if pressure is not None and not 0 <= pressure <= 1:
            raise ValueError(f"memory_pressure: expected a share from 0 to 1, got {pressure!r}")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ValueError(f"duration_s: expected seconds > 0, got {self.duration_s!r}")
        if self.current_temp is not None and not -50 < self.current_temp < 150:
            raise ValueError(f"current_temp: expected degrees Celsius, got {self.current_temp!r}")


class CostModel:
    """Joules, seconds, prices and thermally safe batches of one kind of GPU."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """The model of a profile file; ValueError where it is not one."""
        return cls(load_profile(path))

    @classmethod
    def for_device(cls, gpu_name: str | None, power_limit_w: float | None = None) -> CostModel:
        """The model of a device: the shipped profile of its name and power limit, else the analytic default."""
        return cls(select_profile(gpu_name, power_limit_w))

    @classmethod
    def fit(cls, probes: Calibration, *, name: str = "calibrated") -> CostModel:
        """The model of measured points, fitted to those that are not held out.

        Raises:
            ValueError: too few points.
        """
        return cls(fit_profile(probes, name=name))

    @property
    def analytic(self) -> bool:
        """True where nothing was calibrated: coefficients are reasoned, not measured."""
        return self.profile.analytic

    @property
    def static_w(self) -> float:
        """Watts that a busy GPU draws whatever it computes: idle, context, active."""
        return self.profile.idle_w + self.profile.context_w + self.profile.active_w

    def get_cost(
        self,
        op_type: str,
        batch_size: float,
        seq_len: float,
        *,
        shape: ModelShape | None = None,
        phase: str = "train",
        current_temp: float | None = None,
        memory_pressure: float | None = None,
        duration_s: float | None = None,
        extrapolate: bool = False,
    ) -> Cost:
        """Joules and seconds of one call.

        Args:
            op_type: one of `hwcost.ops.OPS`.
            batch_size: sequences, always. seq_len: tokens per sequence; for a decode step, in the cache.
            shape: of the model; None: DistilGPT2 with 8 experts.
            phase: `train` (forward and backward), `prefill` or `decode`; whole steps know their own.
            current_temp, memory_pressure, duration_s, extrapolate: see `Conditions`.

        Raises:
            CalibrationRangeError: outside the calibrated range and not told to extrapolate.
            MemoryPressureError: memory_pressure at or above the profile's refusal.
            ValueError: an unknown operation, or numbers that make no sense.
        """
        shape = shape or ModelShape()
        conditions = Conditions(
            current_temp=current_temp, memory_pressure=memory_pressure, duration_s=duration_s, extrapolate=extrapolate
        )
        call = _call(op_type, batch_size, seq_len, phase)
        terms = self.breakdown_of(self._counts(op_type, shape, call), conditions, self._flags(shape, call, conditions))
        top_k = shape.top_k if shape.expert_widths else 1
        passed = call.tokens / call.batch_size  # 1 for a decode step, whatever its cache holds
        shares = share_energy(terms.energy_j, batch_size=call.batch_size, seq_len=passed, top_k=top_k)
        return Cost(
            energy_j=terms.energy_j,
            duration_s=terms.duration_s,
            j_per_sequence=shares.sequence_j,
            j_per_token=shares.token_j,
            j_per_expert_slot=shares.slot_j,
            flags=terms.flags,
        )

    def get_cost_breakdown(
        self,
        op_type: str,
        batch_size: float,
        seq_len: float,
        *,
        shape: ModelShape | None = None,
        phase: str = "train",
        conditions: Conditions | None = None,
    ) -> CostBreakdown:
        """The terms of `get_cost` (compute, memory, launch, static, thermal); they sum to it. Raises as it does."""
        shape, conditions = shape or ModelShape(), conditions or Conditions()
        call = _call(op_type, batch_size, seq_len, phase)
        return self.breakdown_of(self._counts(op_type, shape, call), conditions, self._flags(shape, call, conditions))

    def _counts(self, op_type: str, shape: ModelShape, call: Call) -> Counts:
        return counts_of(op_type, shape, call, graphed_batch=self.profile.decode_graph_batch)

    def breakdown_of(self, counts: Counts, conditions: Conditions, flags: tuple[str, ...] = ()) -> CostBreakdown:
        """Joules by cause of any counts, for workloads that are not in `OPS`."""
        profile = self.profile
        retry_s = self._retry_s(conditions.memory_pressure)
        temperature = profile.reference_c if conditions.current_temp is None else conditions.current_temp
        leak_w = profile.leak_w_per_c * max(0.0, temperature - profile.leak_from_c)
        duration_s = conditions.duration_s or self._duration_s(counts, leak_w)
        compute_j, memory_j, launch_j = (_weighted(counts, profile.energy, names) for names in _CAUSES)
        share = self._capped_share(compute_j + memory_j + launch_j, duration_s, leak_w)
        return CostBreakdown(
            compute_j=share * compute_j,
            memory_j=share * memory_j,
            launch_j=share * launch_j,
            static_j=self.static_w * (duration_s + retry_s),
            thermal_j=leak_w * (duration_s + retry_s),
            duration_s=duration_s + retry_s,
            flags=flags + (("memory_retries",) if retry_s else ()),
        )

    def expert_price(
        self,
        *,
        d_model: int,
        widths: Sequence[int],
        top_k: int,
        tokens: int,
        dtype: str,
        phase: str = "train",
        activation: str = "gelu",
    ) -> ExpertPrices:
        """Join and open prices of the experts of one layer, in joules and in units of c_ref.

        `tokens` and `top_k` are the operating point (tokens per call). The marginal price of a token
        in an open expert does not depend on them: dividing the opening among the tokens that share
        it would make popular experts cheap and collapse the routing.

        Raises:
            ValueError: a width < 0, K outside 1 to E, an unknown dtype, phase or activation.
        """
        if not widths:
            raise ValueError("widths: expected at least one expert, got none")
        shape = ModelShape(
            d_model=d_model, expert_widths=tuple(widths), top_k=top_k, dtype=dtype, activation=activation
        )
        Call(batch_size=tokens, seq_len=1, phase=phase)
        return expert_prices(
            shape,
            phase,
            energy=lambda counts: _weighted(counts, self.profile.energy, COUNTERS),
            seconds=lambda counts: _weighted(counts, self.profile.seconds, COUNTERS),
            profile=self.profile.name,
            analytic=self.analytic,
        )

    def get_thermal_safe_batch_size(
        self,
        op_type: str,
        current_temp: float,
        *,
        seq_len: float,
        shape: ModelShape | None = None,
        max_batch: int = 256,
        margin_c: float = 5.0,
    ) -> int:
        """The largest batch that keeps the GPU `margin_c` below its slowdown threshold; 0 where none does.

        A batch is judged by the temperature that it settles at, T_inlet + R_th·P̄, with power taken at the limit, where
        leakage is highest. A board above the limit gets no batch at all, whatever the model thinks.
        """
        thermal, shape = self.profile.thermal, shape or ModelShape()
        limit_c = thermal.slowdown_c - margin_c
        if current_temp > limit_c:
            return 0
        for batch in range(max_batch, 0, -1):
            if thermal.steady_c(self._power_at(op_type, batch, seq_len, shape, limit_c)) <= limit_c:
                return batch
        return 0

    def _power_at(self, op_type: str, batch: int, seq_len: float, shape: ModelShape, temperature_c: float) -> float:
        cost = self.get_cost(
            op_type, batch_size=batch, seq_len=seq_len, shape=shape, current_temp=temperature_c, extrapolate=True
        )
        return cost.power_w

    def _duration_s(self, counts: Counts, leak_w: float) -> float:
        """Predicted seconds: device time, at least what the host needs to launch and what the power limit allows."""
        profile = self.profile
        device_s = _weighted(counts, profile.seconds, COUNTERS)
        host_s = profile.host_s_per_launch * counts.host_launches
        head_w = self._head_w(leak_w) if profile.cap_w is None else None
        limit_s = _weighted(counts, profile.energy, COUNTERS) / head_w if head_w is not None else 0.0
        return max(device_s, host_s, limit_s)

    def _capped_share(self, dynamic_j: float, duration_s: float, leak_w: float) -> float:
        """Share of the dynamic joules that the power cap leaves: at lower clocks the same work takes fewer joules."""
        head_w = self._head_w(leak_w)
        return 1.0 if head_w is None or dynamic_j <= head_w * duration_s else head_w * duration_s / dynamic_j

    def _head_w(self, leak_w: float) -> float | None:
        """Watts between what is always drawn and the cap; None where no cap is known or nothing is left under it."""
        cap_w = self.profile.cap_w or self.profile.power_limit_w
        head_w = None if cap_w is None else cap_w - self.static_w - leak_w
        return head_w if head_w is not None and head_w > 0 else None

    def _retry_s(self, memory_pressure: float | None) -> float:
        pressure = self.profile.pressure
        if memory_pressure is None or memory_pressure <= pressure.onset:
            return 0.0
        if memory_pressure >= pressure.refuse:
            raise MemoryPressureError(
                f"memory_pressure: expected less than {pressure.refuse:.2f}, got {memory_pressure:.2f}"
            )
        return pressure.retry_s * (memory_pressure - pressure.onset) / (pressure.refuse - pressure.onset)

    def _flags(self, shape: ModelShape, call: Call, conditions: Conditions) -> tuple[str, ...]:
        if self.analytic:
            return ("analytic",)
        beyond = outside(shape, call, conditions.current_temp, self.profile)
        if beyond and not conditions.extrapolate:
            raise CalibrationRangeError(
                f"{call.phase}: {beyond[0]}, the calibrated range; pass extrapolate=True to go beyond it"
            )
        return tuple(f"extrapolated: {each}" for each in beyond)


def _call(op_type: str, batch_size: float, seq_len: float, phase: str) -> Call:
    if op_type not in OPS:
        raise ValueError(f"op_type: expected one of {', '.join(OPS)}, got {op_type!r}")
    return Call(batch_size=batch_size, seq_len=seq_len, phase=STEP_PHASES.get(op_type, phase))


def _weighted(counts: Counts, per_unit: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(getattr(counts, name) * per_unit[name] for name in names)
