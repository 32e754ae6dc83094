"""What `joulemoe doctor` says."""

from __future__ import annotations

import json

import pytest

from hwcost.doctor import examine, render
from tests.hwcost.conftest import Bench
from tests.hwcost.fake_nvml import RealTime, fail


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
    import types

    import numpy as np

    real.board(power=lambda t: np.full_like(t, 82.0)).true_energy(real.world.now + 60)
    real.install(None, nvmlDeviceGetUtilizationRates=lambda board: types.SimpleNamespace(gpu=0, memory=0))
    report = examine(seconds=0.5)
    assert report.gpus[0].idle_w == pytest.approx(82.0, rel=1e-3)
    assert "idle at 82 W without a context" in render(report)


def test_a_host_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("hwcost.devices.gpu_host", lambda: False)
    monkeypatch.setattr("hwcost.doctor.deprecated_namesake", lambda: True)
    report = examine()
    assert report.source in ("rapl", "modelled")
    assert report.problems[0] == "the deprecated distribution `pynvml` is installed"
    text = render(report)
    assert "No NVIDIA GPU can be read." in text
    assert "pynvml cannot be imported" in text
