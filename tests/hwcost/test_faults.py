"""Everything that can go wrong with a GPU, through a fake `pynvml` so that the real code runs. docs/energy.md lists
the outcomes.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hwcost import EnergyMonitor, Measurement
from hwcost.nvml import Nvml
from hwcost.readers import SourceUnavailableError
from tests.hwcost.conftest import Bench
from tests.hwcost.fake_nvml import ERRORS, Board, fail


def measured(bench: Bench, monitor: EnergyMonitor, seconds: float = 3.0) -> Measurement:
    return bench.measure(monitor, seconds)[0].measurement


def after(bench: Bench, seconds: float, action: Callable[[], None]) -> None:
    bench.world.at(bench.world.now + seconds, action)


# -- the library


@pytest.mark.parametrize("error", ["LibraryNotFound", "LibRmVersionMismatch", "DriverNotLoaded"])
def test_library_missing_or_mismatched(bench: Bench, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    bench.board()
    monkeypatch.setattr("hwcost.devices.gpu_host", lambda: True)
    monitor = bench.monitor(nvmlInit=fail(error))
    result = measured(bench, monitor)
    assert (result.energy_j, result.source, result.devices) == (None, None, ())
    assert result.flags[0].startswith("nvml_unavailable:")


def test_no_library_on_a_host_without_gpus_means_the_cpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwcost.devices.gpu_host", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with EnergyMonitor.for_assigned_devices(cpu_parallel=2) as monitor:
        assert monitor.source == "modelled"
        assert [device.kind for device in monitor.devices] == ["cpu"]


def test_a_library_that_breaks_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SourceUnavailableError, match="pynvml cannot be imported"):
        Nvml()


def test_the_deprecated_distribution_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "11.5" if name == "pynvml" else real(name))
    bench.board()
    result = measured(bench, bench.monitor())
    assert result.energy_j == pytest.approx(1500, rel=0.01)
    assert result.flags == ("deprecated_pynvml",)


def test_an_old_binding_that_lacks_calls_and_answers_bytes(bench: Bench) -> None:
    board = bench.board()
    bench.install()
    module: Any = sys.modules["pynvml"]
    for call in ("nvmlDeviceGetSamples", "nvmlDeviceGetFieldValues", "nvmlDeviceGetCurrentClocksEventReasons"):
        delattr(module, call)
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda board: board.throttle
    module.nvmlDeviceGetUUID = lambda board: board.uuid.encode()
    bench.install = lambda *_, **__: None  # type: ignore[method-assign]
    monitor = bench.monitor()
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert result.devices[0].device_id == board.uuid
    assert {"averaged_power", "unreadable:ring"} <= set(result.flags)
    assert result.throttled is False


# -- fields


FIELDS = {
    "nvmlDeviceGetTemperature": ("max_temperature_c", "temperature_c"),
    "nvmlDeviceGetMemoryInfo": ("max_memory_bytes", "memory_bytes"),
    "nvmlDeviceGetCurrentClocksEventReasons": ("throttled", "throttle_reasons"),
    "nvmlDeviceGetComputeRunningProcesses": ("shared", "processes"),
}


@pytest.mark.parametrize("call", FIELDS)
@pytest.mark.parametrize("error", ["NoPermission", "NotSupported", "Unknown"])
def test_a_field_that_cannot_be_read_is_null_and_the_rest_stands(bench: Bench, call: str, error: str) -> None:
    bench.board()
    result = measured(bench, bench.monitor(**{call: fail(error)}))
    attribute, field = FIELDS[call]
    assert getattr(result, attribute) is None
    assert result.energy_j == pytest.approx(1500, rel=0.01)
    assert any(field in flag for flag in result.flags)
    assert sum(getattr(result, other) is None for other, _ in FIELDS.values()) == 1


@pytest.mark.parametrize("error", ["NoPermission", "NotSupported"])
def test_without_a_counter_power_is_integrated(bench: Bench, error: str) -> None:
    bench.board(power=lambda t: np.where(t % 1.64 < 1.14, 600.0, 120.0))
    monitor = bench.monitor(nvmlDeviceGetTotalEnergyConsumption=fail(error))
    (window,) = bench.measure(monitor, 3.0)
    true = bench.boards[0].true_energy(window.end_s) - bench.boards[0].true_energy(window.start_s)
    assert monitor.source == window.measurement.source == "integrated"
    assert window.measurement.energy_j == pytest.approx(true, rel=0.02)
    assert "unreadable:energy" in window.measurement.flags


def test_without_counter_and_ring_instant_power_is_integrated(bench: Bench) -> None:
    bench.board()
    calls = dict.fromkeys(["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetSamples"], fail("NotSupported"))
    result = measured(bench, bench.monitor(**calls))
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert (result.source, result.coverage) == ("integrated", pytest.approx(1.0))


def test_without_any_energy_field_joules_are_null(bench: Bench) -> None:
    bench.board()
    names = ["TotalEnergyConsumption", "Samples", "FieldValues", "PowerUsage"]
    monitor = bench.monitor(**{f"nvmlDeviceGet{name}": fail("NotSupported") for name in names})
    result = measured(bench, monitor)
    assert (result.energy_j, result.source, result.coverage) == (None, None, 0.0)
    assert result.max_temperature_c == 45.0


def test_nan_and_zero_power_are_not_power(bench: Bench) -> None:
    board = bench.board()
    values = iter([math.nan, 0.0] * 10_000)
    board.instant = lambda: next(values)
    monitor = bench.monitor(
        nvmlDeviceGetFieldValues=lambda board, _: [
            types.SimpleNamespace(nvmlReturn=0, value=types.SimpleNamespace(uiVal=1e3 * next(values)))
        ]
    )
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.01)
    assert {"power_zero", "power_not_finite"} <= set(result.flags)
    assert all(sample.power_w is None for sample in monitor.system.history)


def test_a_nan_counter_is_no_counter(bench: Bench) -> None:
    bench.board()
    result = measured(bench, bench.monitor(nvmlDeviceGetTotalEnergyConsumption=lambda board: math.nan))
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert result.source == "integrated"


# -- the counter


def test_a_counter_reset_is_bridged_and_never_negative(bench: Bench) -> None:
    board = bench.board()
    monitor = bench.monitor()
    zero = board.true_energy(bench.world.now + 1.5) + board.offset_j
    after(bench, 1.5, lambda: setattr(board, "counter", lambda joules: joules - zero))
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert "counter_reset" in result.flags
    assert result.source == "integrated"


def test_a_counter_that_goes_backwards_a_little(bench: Bench) -> None:
    board = bench.board()
    monitor = bench.monitor()
    after(bench, 1.5, lambda: setattr(board, "counter", lambda joules: joules - 400.0))
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert "counter_reset" in result.flags


@pytest.mark.parametrize("jump_j", [60.0, 120.0, 200.0, 1e6])
def test_a_jump_that_power_does_not_explain_is_bridged(bench: Bench, jump_j: float) -> None:
    board = bench.board()
    monitor = bench.monitor()
    after(bench, 1.5, lambda: setattr(board, "counter", lambda joules: joules + jump_j))
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.01)
    assert result.flags == ("counter_jump",)
    assert measured(bench, monitor).flags == ()


@pytest.mark.parametrize("missing", ["nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetSamples"])
@pytest.mark.parametrize("jump_j", [200.0, 1e6])
def test_a_jump_without_the_limit_or_without_the_ring(bench: Bench, missing: str, jump_j: float) -> None:
    board = bench.board()
    monitor = bench.monitor(**{missing: fail("NoPermission")})
    after(bench, 1.5, lambda: setattr(board, "counter", lambda joules: joules + jump_j))
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert "counter_jump" in result.flags


def test_with_neither_limit_nor_ring_no_board_draws_more_than_the_ceiling(bench: Bench) -> None:
    board = bench.board()
    calls = dict.fromkeys(["nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetSamples"], fail("NoPermission"))
    monitor = bench.monitor(**calls)
    after(bench, 1.5, lambda: setattr(board, "counter", lambda joules: joules + 1e6))
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.02)
    assert "counter_jump" in result.flags


def test_a_frozen_counter_is_bridged_until_it_moves_again(bench: Bench) -> None:
    board = bench.board()
    monitor = bench.monitor()
    stuck = board.true_energy(bench.world.now + 2.0) + board.offset_j
    after(bench, 2.0, lambda: setattr(board, "counter", lambda joules: stuck))
    after(bench, 8.0, lambda: setattr(board, "counter", None))
    result = measured(bench, monitor, 12.0)
    assert result.energy_j == pytest.approx(6000, rel=0.02)
    assert "counter_frozen" in result.flags
    assert result.source == "integrated"
    again = measured(bench, monitor, 3.0)
    assert again.energy_j == pytest.approx(1500, rel=0.01)
    assert (again.source, again.flags) == ("counter", ())


@pytest.mark.parametrize("factor", [0.8, 1.2])
@pytest.mark.parametrize("seconds", [1.5, 3.0, 10.0])
def test_a_counter_that_lies_is_found_out(bench: Bench, factor: float, seconds: float) -> None:
    board = bench.board()
    board.counter = lambda joules: factor * joules
    result = measured(bench, bench.monitor(), seconds)
    assert result.flags == ("counter_disagrees",)
    assert result.energy_j == pytest.approx(500 * factor * seconds, rel=0.02)
    assert result.integral_j == pytest.approx(500 * seconds, rel=0.02)


# -- the device


@pytest.mark.parametrize(("missing", "seconds"), [(["Samples"], 4.0), (["Samples", "FieldValues"], 15.0)])
def test_a_counter_that_lies_is_found_out_without_the_ring(bench: Bench, missing: list[str], seconds: float) -> None:
    board = bench.board()
    board.counter = lambda joules: 0.8 * joules
    monitor = bench.monitor(**{f"nvmlDeviceGet{name}": fail("NotSupported") for name in missing})
    assert "counter_disagrees" in measured(bench, monitor, seconds).flags


def test_gpu_lost_leaves_partial_joules(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()
    module: Any = sys.modules["pynvml"]

    def lose() -> None:
        for call in [name for name in vars(module) if name.startswith("nvmlDeviceGet")]:
            setattr(module, call, fail("GpuIsLost"))

    after(bench, 2.0, lose)
    result = measured(bench, monitor, 4.0)
    assert 800 < result.energy_j < 1100
    assert result.coverage == pytest.approx(0.5, abs=0.1)
    assert {"gpu_lost", "partial"} <= set(result.flags)
    later = measured(bench, monitor, 1.0)
    assert later.energy_j is None
    assert "gpu_lost" in later.flags


def test_a_gpu_lost_before_it_could_be_opened(bench: Bench) -> None:
    bench.board()
    bench.board()

    def by_uuid(uuid: str) -> Board:
        return bench.boards[0] if uuid.endswith("0") else fail("GpuIsLost")()

    monitor = bench.monitor(nvmlDeviceGetHandleByUUID=by_uuid)
    result = measured(bench, monitor)
    assert [part.device_id for part in result.devices] == ["GPU-0000"]
    assert any(flag.startswith("gpu_unreadable:GPU-0001") for flag in result.flags)


@pytest.mark.parametrize(
    ("bits", "word"), [(0x4, "power_cap"), (0x20, "sw_thermal"), (0x40, "hw_thermal"), (0x1, None)]
)
def test_throttling(bench: Bench, bits: int, word: str | None) -> None:
    board = bench.board()
    monitor = bench.monitor()
    after(bench, 1.0, lambda: setattr(board, "throttle", bits))
    after(bench, 1.6, lambda: setattr(board, "throttle", 0))
    result = measured(bench, monitor)
    assert result.throttled is (word is not None)
    assert result.flags == ((f"throttled:{word}",) if word else ())


@pytest.mark.parametrize(
    ("pids", "ours", "shared", "flags"),
    [
        ((), False, False, ()),
        (("me",), True, False, ()),
        (("me", "parent"), True, True, ("shared",)),
        (("me", 1 << 22), True, True, ("shared", "foreign_process")),
        ((1 << 22,), False, True, ("shared", "foreign_process")),
        ((1 << 22,), True, False, ()),  # in a container we do not find ourselves
        ((1 << 22, 1 << 23), True, True, ("shared",)),
    ],
)
def test_others_on_the_gpu(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    pids: tuple[Any, ...],
    ours: bool,
    shared: bool,
    flags: tuple[str, ...],
) -> None:
    import os

    names = {"me": os.getpid(), "parent": os.getppid()}
    monkeypatch.setattr("hwcost.processes.own_process_uses_cuda", lambda: ours)
    monkeypatch.setattr("hwcost.monitor.synchronize", lambda: None)
    bench.board(pids=tuple(names.get(pid, pid) for pid in pids))
    result = measured(bench, bench.monitor())
    assert result.shared is shared
    assert result.flags == flags


# -- time and windows


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.05])
def test_windows_shorter_than_the_counters_period_are_null(bench: Bench, seconds: float) -> None:
    bench.board()
    result = measured(bench, bench.monitor(), seconds)
    assert (result.energy_j, result.uncertainty_j, result.source) == (None, None, None)
    assert result.flags == ("too_short",)


def test_an_exception_inside_a_window_is_not_swallowed(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()

    def run() -> None:
        with monitor.window("train") as window:
            windows.append(window)
            bench.run(monitor, 2.0)
            raise KeyError("lost batch")

    windows: list[Any] = []
    with pytest.raises(KeyError, match="lost batch"):
        run()
    result = windows[0].measurement
    assert result.energy_j == pytest.approx(500 * result.duration_s, rel=0.01)
    assert result.flags == ("exception:KeyError",)


@pytest.mark.parametrize("jump_s", [-3600.0, 7200.0, 0.5])
def test_a_jump_of_the_wall_clock_changes_no_joule(bench: Bench, jump_s: float) -> None:
    board = bench.board(power=lambda t: np.where(t % 1.64 < 1.14, 600.0, 120.0))
    monitor = bench.monitor()
    after(bench, 1.5, lambda: setattr(bench.world, "wall_shift", jump_s))
    (window,) = bench.measure(monitor, 4.0)
    true = board.true_energy(window.end_s) - board.true_energy(window.start_s)
    assert window.measurement.energy_j == pytest.approx(true, rel=0.02)
    assert window.measurement.flags == ("clock_jump",)
    bench.run(monitor, 5.0)
    (window,) = bench.measure(monitor, 1.2)
    true = board.true_energy(window.end_s) - board.true_energy(window.start_s)
    assert window.measurement.energy_j == pytest.approx(true, rel=0.02)


def test_a_process_that_stood_still_keeps_the_counters_joules(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()
    window = monitor.window("w")
    window.__enter__()
    bench.run(monitor, 1.0)
    bench.world.advance(30.0)
    bench.run(monitor, 1.0)
    window.__exit__(None, None, None)
    result = window.measurement
    assert result.energy_j == pytest.approx(500 * result.duration_s, rel=0.01)
    assert "sampling_gap" in result.flags
    assert result.source == "counter"


def test_a_process_that_stood_still_without_a_counter_says_what_it_missed(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor(nvmlDeviceGetTotalEnergyConsumption=fail("NotSupported"))
    window = monitor.window("w")
    window.__enter__()
    bench.run(monitor, 2.0)
    bench.world.advance(30.0)
    bench.run(monitor, 2.0)
    window.__exit__(None, None, None)
    result = window.measurement
    assert result.coverage < 0.3
    assert result.energy_j == pytest.approx(500 * result.coverage * result.duration_s, rel=0.05)
    assert {"sampling_gap", "partial"} <= set(result.flags)


def test_a_synchronisation_that_fails_is_a_flag(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.board()
    monkeypatch.setattr("hwcost.monitor.synchronize", lambda: "synchronize_failed:AcceleratorError")
    assert "synchronize_failed:AcceleratorError" in measured(bench, bench.monitor()).flags


def test_a_closed_monitor_gives_nulls(bench: Bench) -> None:
    bench.board()
    monitor = bench.monitor()
    monitor.close()
    monitor.close()
    with monitor.window("late") as window:
        bench.world.advance(1.0)
    assert window.measurement.energy_j is None
    assert window.measurement.flags == ("monitor_closed",)


def test_an_error_of_the_monitor_itself_is_a_flag(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.board()
    monitor = bench.monitor()
    monkeypatch.setattr(monitor.samplers[0], "open_span", lambda *_: 1 / 0)
    with monitor.window("w") as window:
        bench.run(monitor, 1.0)
    assert window.measurement.energy_j is None
    assert "monitor_error:ZeroDivisionError" in window.measurement.flags


# -- one process, several trials


def test_a_reused_actor_measures_each_trial_alone(bench: Bench) -> None:
    board = bench.board(power=lambda t: np.where(t < 1010.0, 300.0, 600.0))
    monitor = bench.monitor()
    first = measured(bench, monitor, 4.0)
    monitor.system.clear()
    bench.run(monitor, 1012.0 - bench.world.now)
    board.memory = 1 << 30
    bench.run(monitor, 1.0)
    second = measured(bench, monitor, 4.0)
    assert (first.energy_j, second.energy_j) == (pytest.approx(1200, rel=0.01), pytest.approx(2400, rel=0.01))
    assert (first.peak_power_w, second.peak_power_w) == (pytest.approx(300, rel=0.01), pytest.approx(600, rel=0.01))
    assert second.max_memory_bytes == 1 << 30


def test_an_unwritable_history_path_is_a_flag(bench: Bench, tmp_path: Any) -> None:
    from hwcost import GpuSystemMonitor

    bench.board()
    monitor = bench.monitor(system=GpuSystemMonitor(path=tmp_path / "missing" / "history.jsonl"))
    result = measured(bench, monitor)
    assert result.energy_j == pytest.approx(1500, rel=0.01)
    assert result.flags == ("history_unwritable",)
    assert monitor.system.history


def test_mig_instances_read_their_board(bench: Bench) -> None:
    board = bench.board()
    mig = "MIG-11111111-2222-3333-4444-555555555555"

    def by_uuid(uuid: str) -> Any:
        return "instance" if uuid == mig else board

    monitor = bench.monitor(
        mig,
        nvmlDeviceGetMaxMigDeviceCount=lambda board: 1,
        nvmlDeviceGetMigDeviceHandleByIndex=lambda board, i: "instance",
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda instance: board,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda handle: mig if handle == "instance" else board.uuid,
    )
    result = measured(bench, monitor)
    assert result.devices[0].device_id == mig
    assert result.energy_j == pytest.approx(1500, rel=0.01)
    assert result.flags == ("mig_board_energy",)
    assert result.shared is True


def test_every_nvml_error_has_a_translation(bench: Bench) -> None:
    """Whatever NVML raises from every call at once, nothing escapes from a window."""
    for error in ERRORS:
        bench.boards.clear()
        bench.board()
        bench.install()
        calls = [name for name in vars(sys.modules["pynvml"]) if name.startswith("nvmlDeviceGet")]
        keep = {"nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetHandleByUUID"}
        monitor = bench.monitor(**{name: fail(error) for name in calls if name not in keep})
        assert measured(bench, monitor, 1.0).energy_j is None
