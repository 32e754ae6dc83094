"""Windows against boards whose true joules are known."""

from __future__ import annotations

import numpy as np
import pytest

from hwcost import PowerBaseline
from tests.hwcost.conftest import Bench
from tests.hwcost.fake_nvml import Board, fail


def bursts(t: np.ndarray) -> np.ndarray:
    """1.14 s at 600 W, 0.5 s at 120 W."""
    return np.where(t % 1.64 < 1.14, 600.0, 120.0)


def test_the_counters_period_and_cost_are_learnt(bench: Bench) -> None:
    bench.board(step_s=0.1, read_s=0.003)
    counter = bench.monitor(settle_s=3.0).samplers[0].counter
    assert counter.period_s == pytest.approx(0.1, abs=0.001)
    assert counter.cost_s == pytest.approx(0.003, abs=0.0002)


@pytest.mark.parametrize("step_s", [0.02, 0.05, 0.1, 0.25])
def test_one_second_windows_of_a_steady_load(bench: Bench, step_s: float) -> None:
    board = bench.board(power=lambda t: 500 + 40 * np.sin(37 * t), step_s=step_s)
    monitor = bench.monitor()
    windows = bench.measure(monitor, 1.0, count=15)
    joules = np.array([w.measurement.energy_j for w in windows])
    whole = board.true_energy(windows[-1].end_s) - board.true_energy(windows[0].start_s)
    assert np.std(joules) / np.mean(joules) < 0.01
    assert joules.sum() == pytest.approx(whole, rel=0.002)
    assert {w.measurement.source for w in windows} == {"counter"}
    assert all(w.measurement.flags == () for w in windows)


def test_bursts_shorter_than_the_average_power_can_follow(bench: Bench) -> None:
    board = bench.board(power=bursts)
    monitor = bench.monitor()
    for i in range(12):
        (window,) = bench.measure(monitor, 1.14 + 0.01 * i)
        true = board.true_energy(window.end_s) - board.true_energy(window.start_s)
        assert window.measurement.energy_j == pytest.approx(true, rel=0.02)
        assert window.measurement.uncertainty_j < 0.05 * true


def test_windows_nest_and_overlap(bench: Bench) -> None:
    board = bench.board(power=bursts)
    monitor = bench.monitor()
    outer, inner, late = monitor.window("outer"), monitor.window("inner"), monitor.window("late")
    t = bench.world.now + 0.01
    for at, action in ((0, outer.__enter__), (0.5, inner.__enter__), (0.9, late.__enter__)):
        bench.world.at(t + at, action)
    for at, window in ((1.6, inner), (2.2, outer), (2.7, late)):
        bench.world.at(t + at, lambda w=window: w.__exit__(None, None, None))
    bench.run(monitor, 3.2)
    for window in (outer, inner, late):
        true = board.true_energy(window.end_s) - board.true_energy(window.start_s)
        assert window.measurement.energy_j == pytest.approx(true, rel=0.03)


def test_idle_context_and_dynamic_joules_sum(bench: Bench) -> None:
    bench.board(pids=(1 << 22,))
    monitor = bench.monitor(baseline=PowerBaseline(idle_w=80.0, context_w=40.0))
    result = bench.measure(monitor, 2.0)[0].measurement
    assert result.idle_j == pytest.approx(160.0)
    assert result.context_j == pytest.approx(80.0)
    assert result.idle_j + result.context_j + result.dynamic_j == pytest.approx(result.energy_j)


def test_fields_of_a_measurement(bench: Bench) -> None:
    board = bench.board()
    monitor = bench.monitor()
    start = bench.world.now
    bench.world.at(start + 1.0, lambda: setattr(board, "temperature", 60.0))
    bench.world.at(start + 1.0, lambda: setattr(board, "memory", 9 << 30))
    result = bench.measure(monitor, 2.0)[0].measurement
    assert 45.0 < result.mean_temperature_c < 60.0
    assert result.max_temperature_c == 60.0
    assert result.max_memory_bytes == 9 << 30
    assert result.mean_power_w == pytest.approx(500.0, rel=0.01)
    assert result.peak_power_w == pytest.approx(500.0, rel=0.01)
    assert (result.throttled, result.shared, result.coverage) == (False, False, 1.0)
    assert result.devices[0].device_id == "GPU-0000"


def test_two_devices_are_summed(bench: Bench) -> None:
    bench.board()
    bench.board(power=lambda t: np.full_like(t, 200.0))
    result = bench.measure(bench.monitor(settle_s=3.0), 3.0)[0].measurement
    assert result.energy_j == pytest.approx(2100.0, rel=0.01)
    assert [part.energy_j for part in result.devices] == [
        pytest.approx(1500.0, rel=0.02),
        pytest.approx(600.0, rel=0.01),
    ]


def test_a_measurement_is_not_readable_inside_its_window(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()
    with monitor.window("train") as window, pytest.raises(RuntimeError, match="'train' is still open"):
        window.measurement  # noqa: B018
    with pytest.raises(RuntimeError, match="entered before"):
        window.__enter__()


def test_the_ledger_counts_open_windows_too(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()
    bench.measure(monitor, 1.0, "train", count=2)
    t = bench.world.now
    bench.world.at(t + 0.01, monitor.window("train").__enter__)
    bench.run(monitor, 2.0)
    entry = monitor.ledger()["train"]
    assert (entry.windows, entry.open) == (2, 1)
    assert entry.energy_j == pytest.approx(500.0 * entry.duration_s, rel=0.02)
    assert monitor.ledger()["train"].energy_j == pytest.approx(entry.energy_j)


def test_history_carries_phase_and_modelled_watts(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()
    window = monitor.window("train", modelled_power_w=480.0)
    t = bench.world.now
    bench.world.at(t + 0.01, window.__enter__)
    bench.world.at(t + 1.01, lambda: window.__exit__(None, None, None))
    bench.run(monitor, 2.0)
    inside = [s for s in monitor.system.history if s.phase == "train"]
    assert len(inside) >= 3
    assert {s.modelled_power_w for s in inside} == {480.0}
    assert inside[0].sm_utilization == pytest.approx(0.97)
    assert (inside[0].sm_clock_mhz, inside[0].memory_clock_mhz) == (1980.0, 3201.0)
    assert {s.phase for s in monitor.system.history} == {None, "train"}


def test_the_uncertainty_covers_the_error(bench: Bench) -> None:
    board = bench.board(power=bursts)
    monitor = bench.monitor(settle_s=2.0)
    rng = np.random.default_rng(5)
    scores = []
    for _ in range(40):
        (window,) = bench.measure(monitor, float(rng.uniform(0.3, 3.0)))
        true = board.true_energy(window.end_s) - board.true_energy(window.start_s)
        scores.append((window.measurement.energy_j - true) / (window.measurement.uncertainty_j + 0.1))
        bench.run(monitor, float(rng.uniform(0.0, 0.5)))
    assert np.abs(scores).max() < 5.0
    assert 0.05 < np.sqrt(np.mean(np.square(scores))) < 2.0


def wild(t: np.ndarray) -> np.ndarray:
    """Bursts between 120 and 900 W, 30 ms to 1.5 s long."""
    rng = np.random.default_rng(11)
    watts = rng.choice([120.0, 300.0, 600.0, 900.0], 4001)
    return watts[np.searchsorted(990.0 + np.cumsum(rng.uniform(0.03, 1.5, 4000)), t)]


def _one_second_mean(board: Board) -> int:
    return int(1e3 * (board.true_energy(board.world.now) - board.true_energy(board.world.now - 1.0)))


MISSING = {
    "nothing": (),
    "limit": ("nvmlDeviceGetEnforcedPowerLimit",),
    "ring": ("nvmlDeviceGetSamples",),
    "instant": ("nvmlDeviceGetSamples", "nvmlDeviceGetFieldValues"),
}


@pytest.mark.parametrize("step_s", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("missing", MISSING)
def test_an_honest_counter_is_believed_whatever_the_load(bench: Bench, missing: str, step_s: float) -> None:
    bench.board(power=wild, step_s=step_s)
    calls = dict.fromkeys(MISSING[missing], fail("NotSupported"))
    monitor = bench.monitor(nvmlDeviceGetPowerUsage=_one_second_mean, **calls)
    rng = np.random.default_rng(3)
    for _ in range(25):
        (window,) = bench.measure(monitor, float(np.exp(rng.uniform(np.log(0.26), np.log(8.0)))))
        assert not {"counter_jump", "counter_disagrees"} & set(window.measurement.flags)
        assert window.measurement.source == "counter"
        bench.run(monitor, float(rng.uniform(0.0, 0.4)))
