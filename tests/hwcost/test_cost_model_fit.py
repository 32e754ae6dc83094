"""Fitting: known coefficients come back from synthetic points, held-out points are never looked at."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from hwcost.cost_model import CostModel
from hwcost.fit import LEAK_FROM_C, fit_profile
from hwcost.judge import (
    constant_power_errors,
    cross_validate,
    judge,
    leave_out,
    mape,
    relative_errors,
    sign_agreement,
    steady_error_c,
    with_errors,
)
from hwcost.ops import COUNTERS, ModelShape
from hwcost.points import COUNTS, Calibration, Point, Trace, step_params
from hwcost.profiles import analytic_profile
from hwcost.thermal import Thermal, fit_thermal

IDLE_W, CONTEXT_W, ACTIVE_W, LEAK = 80.0, 40.0, 70.0, 1.2
TRUTH = analytic_profile()
HEAT = Thermal(inlet_c=28.0, resistance_c_per_w=0.045, time_constant_s=9.0, slowdown_c=89.0)


def point(name, kind, params, *, held_out=False, noise=0.0, temperature=52.0, found=None):
    """A point of a made-up GPU that obeys the model exactly, up to `noise`."""
    counts = COUNTS[kind](params, found or {})
    seconds = sum(getattr(counts, c) * TRUTH.seconds[c] for c in COUNTERS) or 1.0
    power = IDLE_W + CONTEXT_W + ACTIVE_W + LEAK * (temperature - LEAK_FROM_C)
    joules = sum(getattr(counts, c) * TRUTH.energy[c] for c in COUNTERS) + power * seconds
    return Point(
        name=name,
        kind=kind,
        params=params,
        held_out=held_out,
        found=found or {},
        calls=1,
        duration_s=seconds,
        energy_j=joules * (1 + noise),
        uncertainty_j=None,
        mean_temperature_c=temperature,
        max_temperature_c=temperature,
        throttled=False,
        source="counter",
        flags=(),
        start_s=0.0,
    )


def idle(name, watts):
    return dataclasses.replace(point(name, "idle", {}), duration_s=4.0, energy_j=4.0 * watts)


def calibration(noise=0.0):
    generator = np.random.default_rng(0)
    points = [idle("idle-bare", IDLE_W), idle("idle-context", IDLE_W + CONTEXT_W), idle("cool-1", 125.0)]

    def add(name, kind, params, **more):
        heat = float(generator.uniform(40, 65))
        points.append(point(name, kind, params, noise=noise * generator.normal(), temperature=heat, **more))

    for m in (64, 4096, 16384):
        add(f"gemm-{m}", "gemm", {"m": m, "k": 768, "n": 3072})
        add(f"grouped-{m}", "grouped", {"slots": m, "experts": 8, "width": 3072, "d_model": 768})
    add("copy", "copy", {"bytes": 2 << 30})
    add("launch", "launch", {"graph": True})
    add("adamw", "adamw", {"parameters": 3e8})
    add("attention", "attention", {"batch": 16, "seq_len": 1024, "heads": 12, "train": True})
    for experts, k, batch in itertools.product((4, 8, 16), (1, 2, 4), (4, 16, 32)):
        shape = ModelShape(expert_widths=(3072 if batch != 16 else 1536,) * experts, top_k=k)
        params = step_params("train_step", batch_size=batch, seq_len=1024, shape=shape)
        add(f"train-{experts}-{k}-{batch}", "train_step", params, held_out=k == 2)
    for batch, opened in itertools.product((1, 32, 256), (1, 4, 8)):
        params = step_params("decode_step", batch_size=batch, seq_len=256, shape=ModelShape(top_k=1), open=opened)
        add(f"decode-{batch}-{opened}", "decode_step", params, held_out=opened == 4, found={"open_experts": opened})
    device = {"name": "NVIDIA H200", "power_limit_w": 700.0, "slowdown_c": 89.0, "driver_version": "580"}
    return Calibration(device=device, points=tuple(points), trace=trace())


def trace():
    time_s = np.arange(0, 120, 0.5)
    power_w = np.where(time_s % 60 < 30, 120.0, 650.0)
    return Trace(time_s=tuple(time_s), power_w=tuple(power_w), temperature_c=tuple(HEAT.trace_c(35.0, time_s, power_w)))


def test_exact_points_give_exact_predictions():
    measured = calibration()
    model = CostModel.fit(measured)
    held = [p for p in measured.points if p.held_out]
    assert mape(relative_errors(model, held, time_measured=True)) < 1e-6
    assert mape(relative_errors(model, held, time_measured=False)) < 1e-6
    assert (model.profile.idle_w, model.profile.context_w) == (IDLE_W, CONTEXT_W)
    assert model.profile.leak_w_per_c == pytest.approx(LEAK, rel=1e-3)
    assert model.profile.energy["gemm_flops"] == pytest.approx(TRUTH.energy["gemm_flops"], rel=0.01)


def test_hand_made_decode_steps_are_counted_as_such():
    """Points that say so up to batch 32, others without: the profile knows where one ends and the other begins."""
    measured = calibration()
    points = [
        point(p.name, p.kind, p.params, found={**p.found, "own_step": float(p.params["batch_size"] <= 32)})
        if p.kind == "decode_step"
        else p
        for p in measured.points
    ]
    model = CostModel.fit(dataclasses.replace(measured, points=tuple(points)))
    assert model.profile.decode_graph_batch == 32
    decode = [p for p in points if p.kind == "decode_step"]
    assert np.abs(relative_errors(model, decode, time_measured=True)).max() < 1e-6
    for p in decode:
        shape = ModelShape(top_k=1, open_experts=p.found["open_experts"])
        cost = model.get_cost("decode_step", p.params["batch_size"], 256, shape=shape, current_temp=52.0)
        assert cost.energy_j == pytest.approx(p.energy_per_call_j, rel=1e-4)


def test_noise_of_one_percent_stays_small_and_intervals_hold_the_truth():
    measured = calibration(noise=0.01)
    model = CostModel.fit(measured)
    held = [p for p in measured.points if p.held_out]
    assert mape(relative_errors(model, held, time_measured=True)) < 0.02
    for name in ("weight_bytes", "optimizer_bytes", "grouped_flops"):
        low, high = model.profile.intervals[f"energy.{name}"]
        assert low <= TRUTH.energy[name] * 1.1
        assert high >= TRUTH.energy[name] * 0.9


def test_held_out_points_do_not_touch_the_fit():
    measured = calibration()
    wild = [dataclasses.replace(p, energy_j=1e6) if p.held_out else p for p in measured.points]
    ours, theirs = (
        fit_profile(measured, name="a"),
        fit_profile(dataclasses.replace(measured, points=tuple(wild)), name="a"),
    )
    assert ours == theirs


def test_errors_are_judged_against_the_rival():
    measured = calibration(noise=0.005)
    model = with_errors(CostModel.fit(measured), measured)
    errors = model.profile.errors
    assert errors["all_time_measured"] < 0.5 * errors["all_constant_power"]
    assert errors["train_pair_signs_right"] > 0.95
    assert judge(model, measured).items() <= errors.items()
    groups = {row.group for row in leave_out(measured)}
    assert {"experts 4", "experts 8", "experts 16", "width 1536"} <= groups


def test_the_rival_is_exact_where_power_is_constant():
    points = [p for p in calibration().points if p.kind == "train_step"]
    flat = [dataclasses.replace(p, energy_j=600.0 * p.duration_s) for p in points]
    assert mape(constant_power_errors(flat[:5], flat[5:])) == pytest.approx(0.0, abs=1e-12)


def test_pairs_within_the_repeatability_are_not_counted():
    model = CostModel.fit(calibration())
    points = [p for p in calibration().points if p.kind == "train_step"][:1]
    twin = dataclasses.replace(points[0], energy_j=points[0].energy_j * 1.004)
    assert sign_agreement(model, [*points, twin]) is None


def test_each_point_is_judged_by_a_refit_without_it():
    measured = calibration()
    kept = [p for p in measured.points if p.kind != "train_step" or p.name.startswith("train-8")]
    errors = cross_validate(dataclasses.replace(measured, points=tuple(kept)))
    assert errors["train_step"][0] == 9
    assert errors["decode_step"][0] == 9
    assert max(error for _, *pair in errors.values() for error in pair) < 0.02


def test_a_host_that_launches_slowly_is_told_from_the_device():
    """Small batches take as long as the host needs; their joules then have idle time in them."""
    measured = calibration()
    host_s = 20e-3

    def slowed(p):
        if p.kind != "train_step" or p.seconds_per_call > host_s:
            return p
        idle_j = (host_s - p.seconds_per_call) * (
            IDLE_W + CONTEXT_W + ACTIVE_W + LEAK * (p.mean_temperature_c - LEAK_FROM_C)
        )
        return dataclasses.replace(p, duration_s=host_s, energy_j=p.energy_j + idle_j)

    slow = dataclasses.replace(measured, points=tuple(map(slowed, measured.points)))
    assert sum(p.duration_s == host_s for p in slow.points) > 3
    model = CostModel.fit(slow)
    held = [p for p in slow.points if p.held_out]
    assert mape(relative_errors(model, held, time_measured=False)) < 1e-3
    launches = next(p for p in slow.points if p.duration_s == host_s).counts.host_launches
    assert model.profile.host_s_per_launch * launches == pytest.approx(host_s, rel=0.01)


def test_points_at_the_power_cap_are_lower_bounds():
    """Where the limit binds, clocks fall and joules per FLOP with them: such a point must not teach coefficients."""
    measured, cap_w = calibration(), 600.0
    limited = dataclasses.replace(measured, device={**measured.device, "power_limit_w": 605.0})

    def capped(p):
        return dataclasses.replace(p, energy_j=cap_w * p.duration_s, throttled=True) if p.power_w > cap_w else p

    points = tuple(map(capped, measured.points))
    assert 3 < sum(bool(p.throttled) for p in points) < len(points) - 20
    model = CostModel.fit(dataclasses.replace(limited, points=points))
    assert model.profile.cap_w == pytest.approx(cap_w)
    held = [p for p in points if p.held_out]
    assert mape(relative_errors(model, held, time_measured=True)) < 0.01
    assert model.profile.energy["weight_bytes"] == pytest.approx(TRUTH.energy["weight_bytes"], rel=0.1)


def test_a_held_out_step_of_load_is_predicted():
    """The ramp's degrees are wrong on purpose: the fit must not have looked at them."""
    measured = calibration()
    ramp = dataclasses.replace(point("ramp", "idle", {}), start_s=30.0, duration_s=30.0, energy_j=30 * 650.0)
    model = CostModel.fit(dataclasses.replace(measured, points=(*measured.points, ramp)))
    seen = dataclasses.replace(measured, points=(ramp,))
    assert steady_error_c(model, seen) < 1.5
    bent = [t + 20 if 30 <= at <= 60 else t for at, t in zip(trace().time_s, trace().temperature_c, strict=True)]
    wrong = dataclasses.replace(
        measured, points=(*measured.points, ramp), trace=dataclasses.replace(trace(), temperature_c=tuple(bent))
    )
    assert steady_error_c(CostModel.fit(wrong), wrong) == pytest.approx(20, abs=3)
    assert steady_error_c(model, measured) is None


def test_too_few_points_are_refused():
    measured = calibration()
    with pytest.raises(ValueError, match="expected at least 4"):
        CostModel.fit(dataclasses.replace(measured, points=measured.points[:5]))
    without = tuple(p for p in measured.points if p.kind != "idle")
    with pytest.raises(ValueError, match="idle-bare"):
        CostModel.fit(dataclasses.replace(measured, points=without))


def test_points_survive_their_file(tmp_path):
    measured = calibration()
    measured.write(tmp_path / "points.json")
    assert Calibration.read(tmp_path / "points.json").points == tuple(
        dataclasses.replace(p, params=q.params)
        for p, q in zip(measured.points, Calibration.read(tmp_path / "points.json").points, strict=True)
    )
    assert fit_profile(Calibration.read(tmp_path / "points.json"), name="a") == fit_profile(measured, name="a")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="expected calibration points"):
        Calibration.read(tmp_path / "other.json")


def test_thermal_constants_come_back_from_a_trace():
    seen = trace()
    found = fit_thermal(seen.time_s, seen.power_w, seen.temperature_c, slowdown_c=89.0)
    assert found.resistance_c_per_w == pytest.approx(HEAT.resistance_c_per_w, rel=0.02)
    assert found.time_constant_s == pytest.approx(HEAT.time_constant_s, rel=0.02)
    assert found.steady_c(650.0) == pytest.approx(HEAT.steady_c(650.0), abs=0.3)
    assert found.after_c(40.0, 650.0, 1e6) == pytest.approx(found.steady_c(650.0))


@pytest.mark.parametrize(("samples", "swing", "message"), [(5, 500.0, "10 samples"), (50, 10.0, "50 W")])
def test_a_trace_that_says_nothing_is_refused(samples, swing, message):
    power = np.linspace(100, 100 + swing, samples)
    with pytest.raises(ValueError, match=message):
        fit_thermal(np.arange(samples), power, power, slowdown_c=89.0)
