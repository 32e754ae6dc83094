"""Temperature of a GPU under load: one thermal resistance, one time constant.

dT/dt = (T_inlet + R_th·P − T) / τ, so that the steady temperature is T_inlet + R_th·P̄.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thermal:
    """A fitted GPU: inlet temperature °C, resistance °C/W, time constant s, slowdown threshold °C."""

    inlet_c: float
    resistance_c_per_w: float
    time_constant_s: float
    slowdown_c: float

    def steady_c(self, power_w: float) -> float:
        """Temperature that a constant load of `power_w` watts settles at."""
        return self.inlet_c + self.resistance_c_per_w * power_w

    def after_c(self, start_c: float, power_w: float, elapsed_s: float) -> float:
        """Temperature `elapsed_s` seconds into a constant load that began at `start_c`."""
        steady = self.steady_c(power_w)
        return steady + (start_c - steady) * math.exp(-elapsed_s / self.time_constant_s)

    def trace_c(self, start_c: float, time_s: Sequence[float], power_w: Sequence[float]) -> np.ndarray:
        """Temperatures at `time_s` under a load that is `power_w[i]` from `time_s[i]` to `time_s[i + 1]`."""
        trace = np.empty(len(time_s))
        trace[0] = start_c
        decay = np.exp(-np.diff(np.asarray(time_s, dtype=float)) / self.time_constant_s)
        for i, share in enumerate(decay):
            steady = self.steady_c(power_w[i])
            trace[i + 1] = steady + (trace[i] - steady) * share
        return trace


def fit_thermal(
    time_s: Sequence[float],
    power_w: Sequence[float],
    temperature_c: Sequence[float],
    *,
    slowdown_c: float,
    used: Sequence[bool] | None = None,
) -> Thermal:
    """Fit a trace of watts and degrees; samples must be in order of time.

    Args:
        used: samples whose degrees are looked at; the watts of the others still heat. None: all.

    Raises:
        ValueError: fewer than 10 samples, or a load that never changed by 50 W (nothing to fit).
    """
    if len(time_s) < 10:
        raise ValueError(f"thermal fit: expected at least 10 samples, got {len(time_s)}")
    if max(power_w) - min(power_w) < 50:
        raise ValueError(f"thermal fit: expected a load that changes by 50 W, got {max(power_w) - min(power_w):.0f} W")
    observed = np.asarray(temperature_c, dtype=float)
    looked_at = np.ones(len(observed)) if used is None else np.asarray(used, dtype=float)

    def build(x: np.ndarray) -> Thermal:
        inlet_c, resistance, time_constant_s = map(float, x[:3])
        return Thermal(
            inlet_c=inlet_c,
            resistance_c_per_w=resistance,
            time_constant_s=time_constant_s,
            slowdown_c=slowdown_c,
        )

    def residual(x: np.ndarray) -> np.ndarray:
        return looked_at * (build(x).trace_c(x[3], time_s, power_w) - observed)

    start = [min(observed), 0.03, 10.0, observed[0]]
    found = least_squares(residual, start, bounds=([-20, 1e-4, 0.2, -20], [80, 1, 1000, 110]), loss="soft_l1")
    return build(found.x)
