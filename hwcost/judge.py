"""How wrong a cost model is on points that it has not seen, and how wrong the simplest rival is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from hwcost.cost_model import Conditions, CostModel
from hwcost.fit import HELD_OUT_LOADS, fit_profile
from hwcost.points import Calibration, Point, of_kind, step_call, step_shape

REPEATABILITY = 0.008  # spread of joules per token between A/A windows of one board
_STEADY_TAIL_S = 3.0


def modelled_j(model: CostModel, point: Point, *, time_measured: bool) -> float:
    """Joules of one call of a point, at its temperature, with the time measured or predicted."""
    return model.breakdown_of(point.counts, _conditions(point, time_measured)).energy_j


def _conditions(point: Point, time_measured: bool) -> Conditions:
    return Conditions(
        current_temp=point.mean_temperature_c, duration_s=point.seconds_per_call if time_measured else None
    )


def relative_errors(model: CostModel, points: Sequence[Point], *, time_measured: bool) -> np.ndarray:
    """Signed relative error of the modelled joules of each point."""
    return np.array([modelled_j(model, p, time_measured=time_measured) / p.energy_per_call_j - 1 for p in points])


def mape(errors: Iterable[float]) -> float:
    """Mean absolute error of relative errors; NaN of none."""
    values = np.abs(np.fromiter(errors, dtype=float))
    return float(values.mean()) if values.size else float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A group of training steps that a refit did not see, and its errors with the time measured and predicted."""

    group: str
    points: int
    measured: float
    predicted: float


def judge(model: CostModel, calibration: Calibration) -> dict[str, float]:
    """Errors on held-out points, as fractions (°C for the temperature); only those that the points allow."""
    held = [p for p in calibration.points if p.held_out]
    train, decode = of_kind(held, "train_step"), of_kind(held, "decode_step")
    steps = [*train, *decode]
    fitted = [p for p in of_kind(calibration.points, "train_step", "decode_step") if not p.held_out]
    found: dict[str, float] = {}
    for name, points in (("train", train), ("decode", decode), ("all", steps)):
        if points:
            found[f"{name}_time_measured"] = mape(relative_errors(model, points, time_measured=True))
            found[f"{name}_time_predicted"] = mape(relative_errors(model, points, time_measured=False))
    if steps and fitted:
        found["all_constant_power"] = mape(constant_power_errors(fitted, steps))
        found["all_constant_power_by_phase"] = mape(constant_power_errors(fitted, steps, by_kind=True))
    for name, points in (("train", train), ("decode", decode)):
        right = sign_agreement(model, points)
        if right is not None:
            found[f"{name}_pair_signs_right"] = right
    steady = steady_error_c(model, calibration)
    return found if steady is None else found | {"steady_temperature_c": steady}


def constant_power_errors(fitted: Sequence[Point], points: Sequence[Point], *, by_kind: bool = False) -> np.ndarray:
    """The rival: mean power of the fitted points times measured time; `by_kind` gives it one power per kind of step."""
    errors = []
    for point in points:
        alike = [p.power_w for p in fitted if not by_kind or p.kind == point.kind] or [p.power_w for p in fitted]
        errors.append(float(np.mean(alike)) / point.power_w - 1)
    return np.array(errors)


def tokens_per_call(point: Point) -> float:
    """Tokens that one call of a step processes."""
    return step_call(point.params).tokens


def sign_agreement(model: CostModel, points: Sequence[Point]) -> float | None:
    """Share of pairs whose joules per token differ in the modelled direction (time predicted); None without pairs.

    Pairs closer than the repeatability of the measurement are not counted.
    """
    measured = np.array([p.energy_per_call_j / tokens_per_call(p) for p in points])
    modelled = np.array([modelled_j(model, p, time_measured=False) / tokens_per_call(p) for p in points])
    right = []
    for i in range(len(points)):
        for j in range(i):
            if abs(measured[i] - measured[j]) > REPEATABILITY * min(measured[i], measured[j]):
                right.append((measured[i] > measured[j]) == (modelled[i] > modelled[j]))
    return float(np.mean(right)) if right else None


def steady_error_c(model: CostModel, calibration: Calibration) -> float | None:
    """Largest |T_inlet + R_th·P̄ − T| at the end of a load that the thermal fit has not seen; None without one."""
    errors = []
    for load in (p for p in calibration.points if p.name in HELD_OUT_LOADS):
        end_s = load.start_s + load.duration_s
        trace = zip(calibration.trace.time_s, calibration.trace.temperature_c, strict=True)
        last = [degrees for at, degrees in trace if end_s - _STEADY_TAIL_S <= at <= end_s]
        if last:
            errors.append(abs(model.profile.thermal.steady_c(load.power_w) - float(np.mean(last))))
    return max(errors) if errors else None


def leave_out(calibration: Calibration) -> list[LeftOut]:
    """Refits that have not seen one expert count or one width, judged on exactly those training steps."""
    trains = of_kind(calibration.points, "train_step")
    rows = []
    for name, group in (("experts", _experts), ("width", _width)):
        for value in sorted({group(p) for p in trains}):
            out = [p for p in trains if group(p) == value]
            rest = [p for p in trains if group(p) != value and not p.held_out]
            if value and len(rest) >= 4 and (name == "experts" or value != 3072.0):
                rows.append(_left_out(calibration, f"{name} {value:g}", out, group, value))
    return rows


def cross_validate(calibration: Calibration) -> dict[str, tuple[int, float, float]]:
    """{kind of step: (points, error with the time measured, predicted)}, each point judged by a refit without it."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for point in of_kind(calibration.points, "train_step", "decode_step"):
        others = tuple(dataclasses.replace(p, held_out=p is point) for p in calibration.points)
        alone = dataclasses.replace(calibration, points=others)
        model = CostModel(fit_profile(alone, name="without one", bootstraps=0))
        known, predicted = (relative_errors(model, [point], time_measured=flag)[0] for flag in (True, False))
        errors.setdefault(point.kind, []).append((known, predicted))
    return {kind: (len(pairs), mape(p[0] for p in pairs), mape(p[1] for p in pairs)) for kind, pairs in errors.items()}


def _left_out(
    calibration: Calibration, name: str, out: Sequence[Point], group: Callable[[Point], float], value: float
) -> LeftOut:
    def keep(point: Point) -> bool:
        return point.kind != "train_step" or group(point) != value

    model = CostModel(fit_profile(calibration, name=name, keep=keep, bootstraps=0))
    return LeftOut(
        group=name,
        points=len(out),
        measured=mape(relative_errors(model, out, time_measured=True)),
        predicted=mape(relative_errors(model, out, time_measured=False)),
    )


def _experts(point: Point) -> float:
    return float(step_shape(point.params, point.found).num_experts)


def _width(point: Point) -> float:
    shape = step_shape(point.params, point.found)
    return float(shape.mean_width) if shape.expert_widths else 0.0


def with_errors(model: CostModel, calibration: Calibration) -> CostModel:
    """The model with its held-out errors written into the profile."""
    errors: Mapping[str, float] = {
        **judge(model, calibration),
        **{f"train_without_{row.group.replace(' ', '_')}": row.predicted for row in leave_out(calibration)},
    }
    return CostModel(dataclasses.replace(model.profile, errors=errors))
