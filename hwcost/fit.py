"""From calibration points to a profile: non-negative least squares on relative errors, with intervals.

Energy: E/calls = (P_idle + P_context + P_active)·t + leak·(T − T_0)·t + Σ ε·counts, t measured. P_idle and P_context
come from the two idle windows; the rest is fitted. Time: t = Σ s·counts. Each row is divided by what was
measured, so that a millijoule of a decode step weighs as much as its share, and every coefficient is ≥ 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from hwcost.ops import COUNTERS
from hwcost.points import NOT_FITTED, Calibration, Point, step_call, step_shape
from hwcost.profiles import Pressure, Profile, analytic_profile
from hwcost.thermal import Thermal, fit_thermal

LEAK_FROM_C = 30.0
_STEPS = ("train_step", "prefill", "decode_step")
_KERNEL_WEIGHT = 0.3  # kernels tell the coefficients apart; whole steps are what is asked for
_BOOTSTRAPS = 200
_SLOWDOWN_C = 89.0

Kept = Callable[[Point], bool]


def fit_profile(
    calibration: Calibration, *, name: str, keep: Kept | None = None, bootstraps: int = _BOOTSTRAPS
) -> Profile:
    """A profile from the points that are not held out (and that `keep` keeps); no intervals with 0 `bootstraps`.

    Raises:
        ValueError: too few points, or no idle window.
    """
    points = [
        p for p in calibration.points if not p.held_out and p.kind not in NOT_FITTED and (keep is None or keep(p))
    ]
    busy = [p for p in points if p.kind != "idle"]
    if len(busy) < 4:
        raise ValueError(f"calibration points: expected at least 4 that are not held out, got {len(busy)}")
    idle_w, context_w = _idle(points)
    energy, energy_intervals = _fit_energy(busy, idle_w + context_w, bootstraps)
    seconds, seconds_intervals = _fit_seconds(busy, bootstraps)
    device = calibration.device
    return Profile(
        name=name,
        gpu_name=device.get("name"),
        power_limit_w=device.get("power_limit_w"),
        idle_w=idle_w,
        context_w=context_w,
        active_w=energy.pop("active_w"),
        leak_w_per_c=energy.pop("leak_w_per_c"),
        leak_from_c=LEAK_FROM_C,
        reference_c=_reference_c(busy),
        energy=energy,
        seconds=seconds,
        thermal=_thermal(calibration),
        pressure=Pressure(retry_s=device.get("retry_s", Pressure().retry_s)),
        intervals=energy_intervals | seconds_intervals,
        ranges=_ranges(calibration.points),
        provenance={**device, "points": len(points), "source": sorted({str(p.source) for p in points})},
    )


def _idle(points: Sequence[Point]) -> tuple[float, float]:
    """(watts without a context, what contexts add)."""
    power = {point.name: point.power_w for point in points if point.kind == "idle"}
    if "idle-bare" not in power:
        raise ValueError("calibration points: expected an idle window named idle-bare, got none")
    bare = power["idle-bare"]
    return bare, max(0.0, power.get("idle-context", bare) - bare)


def _reference_c(points: Sequence[Point]) -> float:
    known = [p.mean_temperature_c for p in points if p.mean_temperature_c is not None and p.kind in _STEPS]
    return float(np.mean(known)) if known else 55.0


def _weights(points: Sequence[Point]) -> np.ndarray:
    return np.array([1.0 if point.kind in _STEPS else _KERNEL_WEIGHT for point in points])


def _fit_energy(
    points: Sequence[Point], static_w: float, bootstraps: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    names = ["active_w", "leak_w_per_c", *COUNTERS]
    seconds = np.array([point.seconds_per_call for point in points])
    joules = np.array([point.energy_per_call_j for point in points])
    warm = np.array([max(0.0, (p.mean_temperature_c or LEAK_FROM_C) - LEAK_FROM_C) for p in points])
    rows = np.column_stack([seconds, seconds * warm, np.array([point.counts.vector() for point in points])])
    weight = _weights(points) / joules
    return _nnls_with_intervals(
        rows, joules - static_w * seconds, weight, names, prefix="energy.", bootstraps=bootstraps
    )


def _fit_seconds(points: Sequence[Point], bootstraps: int) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    seconds = np.array([point.seconds_per_call for point in points])
    rows = np.array([point.counts.vector() for point in points])
    return _nnls_with_intervals(
        rows, seconds, _weights(points) / seconds, list(COUNTERS), prefix="seconds.", bootstraps=bootstraps
    )


def _nnls_with_intervals(
    rows: np.ndarray, target: np.ndarray, weight: np.ndarray, names: Sequence[str], *, prefix: str, bootstraps: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Coefficients ≥ 0 and their 95 % intervals from a bootstrap over the points."""
    weighted, aim = rows * weight[:, None], target * weight
    best = _nnls(weighted, aim)
    values = dict(zip(names, map(float, best), strict=True))
    if not bootstraps:
        return values, {}
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(bootstraps):
        pick = generator.integers(0, len(aim), len(aim))
        draws.append(_nnls(weighted[pick], aim[pick]))
    low, high = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
    return values, {prefix + name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _nnls(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Non-negative least squares with columns brought to one scale first."""
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    solution, _ = nnls(rows / scale, target, maxiter=50 * rows.shape[1])
    return solution / scale


def _thermal(calibration: Calibration) -> Thermal:
    """From the trace up to the last specs, which are held out; reasoned values where there is no trace."""
    held = [p.start_s for p in calibration.points if p.name == "steady"]
    end = held[0] if held else float("inf")
    trace = calibration.trace
    used = [i for i, at in enumerate(trace.time_s) if at < end]
    slowdown_c = calibration.device.get("slowdown_c") or _SLOWDOWN_C
    try:
        return fit_thermal(
            [trace.time_s[i] for i in used],
            [trace.power_w[i] for i in used],
            [trace.temperature_c[i] for i in used],
            slowdown_c=slowdown_c,
        )
    except ValueError:
        return dataclasses.replace(analytic_profile().thermal, slowdown_c=slowdown_c)


def _ranges(points: Sequence[Point]) -> dict[str, Mapping[str, tuple[float, float]]]:
    """Per phase, the span of what was measured (fitted, or held out and judged)."""
    spans: dict[str, dict[str, list[float]]] = {}
    for point in points:
        if point.kind not in _STEPS:
            continue
        call, shape = step_call(point.params), step_shape(point.params, point.found)
        values = {
            "batch_size": call.batch_size,
            "seq_len": call.seq_len,
            "num_experts": shape.num_experts,
            "mean_width": shape.mean_width,
            "d_model": shape.d_model,
            "num_layers": shape.num_layers,
        }
        if shape.expert_widths:
            values["top_k"] = shape.top_k
        table = spans.setdefault(call.phase, {})
        for name, value in values.items():
            table.setdefault(name, []).append(float(value))
    return {phase: {name: (min(v), max(v)) for name, v in table.items()} for phase, table in spans.items()}
