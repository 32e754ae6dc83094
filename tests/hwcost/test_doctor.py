"""What `joulemoe doctor` says."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import types
from pathlib import Path

import pytest

from hwcost.doctor import DeviceReport, examine, render
from hwcost.readers import DeviceInfo
from tests.hwcost.conftest import Bench
from tests.hwcost.fake_nvml import RealTime, fail
from tests.hwcost.test_cpu_host import Powercap


@pytest.fixture
def real(bench: Bench) -> Bench:
    bench.world = RealTime()
    return bench


def test_a_gpu_is_described(real: Bench) -> None:
    board = real.board(pids=(1 << 22,))
    real.board()
    board.true_energy(real.world.now + 60)
    real.boards[1].true_energy(real.world.now + 60)
    real.install("0", nvmlDeviceGetTemperature=fail("NoPermission"))
    report = examine(seconds=2.0)
    text = render(report)
    assert (report.source, report.assigned_by) == ("counter", "CUDA_VISIBLE_DEVICES")
    assert [gpu.assigned for gpu in report.gpus] == [True, False]
    energy = next(field for field in report.gpus[0].fields if field.field == "energy")
    assert energy.period_s == pytest.approx(0.1, rel=0.2)
    assert report.gpus[0].others == 1
    assert "busy" in text
    for part in ("GPU-0000", "NVIDIA H200", "limit 700 W", "used by 1 other process", "not readable: NVML error 4"):
        assert part in text
    json.dumps(report.as_dict())


def test_every_field_tells_how_often_it_changes(real: Bench) -> None:
    """Steps of 40 ms in all that a busy board changes; its memory stays as it is."""

    def step() -> int:
        return int(real.world.now / 0.04)

    real.board().true_energy(real.world.now + 60)
    real.install(
        "0",
        nvmlDeviceGetTemperature=lambda board, kind: 40 + step() % 3,
        nvmlDeviceGetUtilizationRates=lambda board: types.SimpleNamespace(gpu=step() % 100, memory=1),
        nvmlDeviceGetClockInfo=lambda board, kind: 1500 + 15 * (step() % 7),
        nvmlDeviceGetCurrentClocksEventReasons=lambda board: 4 * (step() % 2),
    )
    began = time.monotonic()
    report = examine(seconds=3.0)
    assert time.monotonic() - began < 5.0
    found = {field.field: field for field in report.gpus[0].fields}
    changing = ("temperature", "utilization", "sm_clock", "memory_clock", "throttle_reasons")
    assert [found[name].period_s for name in changing] == [pytest.approx(0.04, abs=0.02)] * len(changing)
    assert found["power_ring"].period_s == pytest.approx(0.02, rel=0.05)
    assert (found["memory"].period_s, found["memory"].value) == (None, 2 << 30)
    assert found["memory"].watched_s == pytest.approx(1.5, abs=0.3)
    text = render(report)
    assert "fewer than three new values in 1.5 s" in text
    assert text.count("a new value every") >= 7


@pytest.mark.parametrize(
    ("missing", "source"),
    [
        (("TotalEnergyConsumption",), "integrated"),
        (("TotalEnergyConsumption", "Samples"), "integrated"),
        (("TotalEnergyConsumption", "Samples", "FieldValues", "PowerUsage"), None),
    ],
)
def test_the_source_that_a_sweep_would_use(real: Bench, missing: tuple[str, ...], source: str | None) -> None:
    real.board().true_energy(real.world.now + 60)
    real.install(None, **{f"nvmlDeviceGet{name}": fail("NotSupported") for name in missing})
    report = examine(seconds=0.5)
    assert report.source == source
    assert "None" not in render(report)


def test_an_idle_gpu_tells_its_idle_watts(real: Bench) -> None:
    import numpy as np

    real.board(power=lambda t: np.full_like(t, 82.0)).true_energy(real.world.now + 60)
    real.install(None, nvmlDeviceGetUtilizationRates=lambda board: types.SimpleNamespace(gpu=0, memory=0))
    report = examine(seconds=0.5)
    assert report.gpus[0].idle_w == pytest.approx(82.0, rel=1e-3)
    assert "idle at 82 W without a context" in render(report)


def test_a_host_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("hwcost.devices.gpu_host", lambda: False)
    monkeypatch.setattr("hwcost.doctor.deprecated_namesake", lambda: True)
    report = examine()
    assert report.source in ("rapl", "modelled")
    assert report.problems[0] == "the deprecated distribution `pynvml` is installed"
    text = render(report)
    assert "No NVIDIA GPU can be read." in text
    assert "pynvml cannot be imported" in text
    assert "profile analytic (none for this host)" in text


@pytest.mark.parametrize(("slots", "source"), [(1, "rapl"), (4, "modelled")])
def test_a_rapl_host_says_what_a_sweep_of_so_many_slots_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int, source: str
) -> None:
    """Unless told, a sweep runs a trial per core; the package counters serve one."""
    Powercap(tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("hwcost.devices.gpu_host", lambda: False)
    monkeypatch.setenv("JOULEMOE_POWERCAP", str(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: slots)
    text = render(examine())
    assert f"Energy source here: {source}" in text
    assert "CPU counters (RAPL): package-0, dram, package-1" in text
    assert ("--parallel 1" in text) == (source == "modelled")
    assert "no CPU counter can be read" not in text


def test_a_gpu_without_a_name_has_no_profile_of_its_own(real: Bench) -> None:
    real.board().true_energy(real.world.now + 60)
    real.install(None, nvmlDeviceGetName=fail("NotSupported"))
    report = examine(seconds=0.5)
    text = render(report)
    assert "profile analytic (none for this host" in text
    assert "None" not in text
    unread = DeviceReport(info=DeviceInfo(device_id="GPU-1", kind="gpu", uuid="GPU-1"), assigned=True, fields=())
    text = render(dataclasses.replace(report, gpus=(unread,)))
    assert "profile analytic (none for this host" in text
    assert "None" not in text
