"""From calibration points to a profile: non-negative least squares on relative errors, with intervals.

Energy: E/calls = (P_idle + P_context + P_active)·t + leak·(T − T_0)·t + Σ ε·counts, t measured. P_idle and P_context
come from the two idle windows; the rest is fitted. A point that the power limit held down is only a lower bound.
Time: t = max(Σ s·counts, host seconds · launches). Each row is divided by what was
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
from hwcost.reach import quantities, traits
from hwcost.thermal import Thermal, fit_thermal

LEAK_FROM_C = 30.0
HELD_OUT_LOADS = ("ramp", "steady")  # steps of load whose temperatures the thermal fit does not look at
_STEPS = ("train_step", "prefill", "decode_step")
_KERNEL_WEIGHT = 0.3  # kernels tell the coefficients apart; whole steps are what is asked for
_BOOTSTRAPS = 200
_SLOWDOWN_C = 89.0

_NEAR_LIMIT, _AT_CAP = 0.95, 0.99  # of the limit, of the typical mean power at it
_HOST_BOUND = 1.05
_ROUNDS = 20

Kept = Callable[[Point], bool]
_Found = tuple[dict[str, float], dict[str, tuple[float, float]]]


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
    device = calibration.device
    cap_w = _cap_w(busy, device.get("power_limit_w"))
    energy, energy_intervals = _fit_energy(busy, idle_w + context_w, cap_w, bootstraps)
    (seconds, seconds_intervals), host_s_per_launch = _fit_seconds(busy, bootstraps)
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
        host_s_per_launch=host_s_per_launch,
        decode_graph_batch=_graph_batch(calibration.points),
        cap_w=cap_w,
        thermal=_thermal(calibration),
        pressure=Pressure(retry_s=device.get("retry_s", Pressure().retry_s)),
        intervals=energy_intervals | seconds_intervals,
        ranges=_ranges(calibration.points),
        kinds=_kinds(calibration.points),
        provenance={**device, "points": len(points), "source": sorted({str(p.source) for p in points})},
    )


def _idle(points: Sequence[Point]) -> tuple[float, float]:
    """(watts without a context, what contexts add)."""
    power = {point.name: point.power_w for point in points if point.kind == "idle"}
    if "idle-bare" not in power:
        raise ValueError("calibration points: expected an idle window named idle-bare, got none")
    bare = power["idle-bare"]
    return bare, max(0.0, power.get("idle-context", bare) - bare)


def _graph_batch(points: Sequence[Point]) -> float:
    """The largest batch whose decode step was the hand-made one; 0 where none was."""
    return max((step_call(p.params).batch_size for p in points if p.found.get("own_step")), default=0.0)


def _reference_c(points: Sequence[Point]) -> float:
    known = [p.mean_temperature_c for p in points if p.mean_temperature_c is not None and p.kind in _STEPS]
    return float(np.mean(known)) if known else 55.0


def _weights(points: Sequence[Point]) -> np.ndarray:
    return np.array([1.0 if point.kind in _STEPS else _KERNEL_WEIGHT for point in points])


def _cap_w(points: Sequence[Point], limit_w: float | None) -> float | None:
    """Typical mean power of the points that the power limit held down; None where it held none."""
    held = [p.power_w for p in points if p.throttled and limit_w is not None and p.power_w > _NEAR_LIMIT * limit_w]
    return float(np.median(held)) if held else None


def _fit_energy(points: Sequence[Point], static_w: float, cap_w: float | None, bootstraps: int) -> _Found:
    """Coefficients from the points whose joules say something: one at the power cap only says "at least this much"."""
    names = ["active_w", "leak_w_per_c", *COUNTERS]
    seconds = np.array([point.seconds_per_call for point in points])
    joules = np.array([point.energy_per_call_j for point in points])
    warm = np.array([max(0.0, (p.mean_temperature_c or LEAK_FROM_C) - LEAK_FROM_C) for p in points])
    rows = np.column_stack([seconds, seconds * warm, np.array([point.counts.vector() for point in points])])
    target, weight = joules - static_w * seconds, _weights(points) / joules
    at_cap = np.array([cap_w is not None and bool(p.throttled) and p.power_w > _AT_CAP * cap_w for p in points])
    used = ~at_cap
    for _ in range(_ROUNDS):
        best = _nnls(rows[used] * weight[used, None], target[used] * weight[used])
        again = ~at_cap | (rows @ best < target)  # a capped point that is modelled too low still teaches
        if (again == used).all():
            break
        used = again
    return _nnls_with_intervals(rows[used], target[used], weight[used], names, prefix="energy.", bootstraps=bootstraps)


def _fit_seconds(points: Sequence[Point], bootstraps: int) -> tuple[_Found, float]:
    """(device seconds per count, host seconds per launch): each point takes the longer of the two."""
    points = [
        p for p in points if not (p.kind == "launch" and not p.params["graph"])
    ]  # the host's time, not the device's
    seconds = np.array([point.seconds_per_call for point in points])
    rows = np.array([point.counts.vector() for point in points])
    launches = np.array([point.counts.host_launches for point in points])
    weight = _weights(points) / seconds
    candidates = [0.0, *sorted({float(t / n) for t, n in zip(seconds, launches, strict=True) if n > 0})]
    tried = [_with_host(rows, seconds, launches, weight, per_launch) for per_launch in candidates]
    _, per_launch, used = min(tried, key=lambda each: each[0])
    found = _nnls_with_intervals(
        rows[used], seconds[used], weight[used], list(COUNTERS), prefix="seconds.", bootstraps=bootstraps
    )
    return found, per_launch


def _with_host(
    rows: np.ndarray, seconds: np.ndarray, launches: np.ndarray, weight: np.ndarray, per_launch: float
) -> tuple[float, float, np.ndarray]:
    """(loss, host seconds per launch, points that the device bounds) of a first guess at the host's pace."""
    host = per_launch * launches
    used = (seconds > _HOST_BOUND * host) | (launches == 0)
    for _ in range(_ROUNDS):
        best = _nnls(rows[used] * weight[used, None], seconds[used] * weight[used])
        if (~used).any():
            per_launch = float(np.average(seconds[~used] / launches[~used]))
        host = per_launch * launches
        again = (rows @ best >= host) | (launches == 0)
        if (again == used).all() or not again.any():
            break
        used = again
    wrong = weight * (np.maximum(rows @ best, host) - seconds)
    return float(wrong @ wrong), per_launch, used


def _nnls_with_intervals(
    rows: np.ndarray, target: np.ndarray, weight: np.ndarray, names: Sequence[str], *, prefix: str, bootstraps: int
) -> _Found:
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
    """From the trace without the loads that are held out; reasoned values where there is no trace."""
    held = [(p.start_s, p.start_s + p.duration_s) for p in calibration.points if p.name in HELD_OUT_LOADS]
    trace = calibration.trace
    used = [not any(start <= at <= end for start, end in held) for at in trace.time_s]
    slowdown_c = calibration.device.get("slowdown_c") or _SLOWDOWN_C
    try:
        return fit_thermal(trace.time_s, trace.power_w, trace.temperature_c, slowdown_c=slowdown_c, used=used)
    except ValueError:
        return dataclasses.replace(analytic_profile().thermal, slowdown_c=slowdown_c)


def _ranges(points: Sequence[Point]) -> dict[str, Mapping[str, tuple[float, float]]]:
    """Per phase, the span of what was measured (fitted, or held out and judged); degrees of all that was measured."""
    heat = [t for p in points for t in (p.mean_temperature_c, p.max_temperature_c) if t is not None]
    spans: dict[str, dict[str, list[float]]] = {}
    for point in points:
        if point.kind not in _STEPS:
            continue
        call = step_call(point.params)
        table = spans.setdefault(call.phase, {"temperature_c": heat} if heat else {})
        for name, values in quantities(step_shape(point.params, point.found), call).items():
            table.setdefault(name, []).extend(values)
    return {phase: {name: (min(v), max(v)) for name, v in table.items()} for phase, table in spans.items()}


def _kinds(points: Sequence[Point]) -> dict[str, Mapping[str, tuple[str, ...]]]:
    """Per phase, what was measured of things without an order."""
    seen: dict[str, dict[str, set[str]]] = {}
    for point in points:
        if point.kind in _STEPS:
            table = seen.setdefault(step_call(point.params).phase, {})
            for name, value in traits(step_shape(point.params, point.found)).items():
                table.setdefault(name, set()).add(value)
    return {phase: {name: tuple(sorted(v)) for name, v in table.items()} for phase, table in seen.items()}
