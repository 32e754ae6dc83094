"""The monitor on a real NVIDIA GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from hwcost import EnergyMonitor
from hwcost.anchor import measure_anchor
from hwcost.devices import assigned
from hwcost.doctor import examine, render
from hwcost.nvml import Nvml

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def multiply(seconds: float) -> None:
    """Keep the GPU busy."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            torch.matmul(a, a)
        torch.cuda.synchronize()


def test_a_window_agrees_with_the_bare_counter() -> None:
    with EnergyMonitor.for_assigned_devices(torch_device="cuda:0") as monitor:
        reader: Any = monitor.samplers[0].reader
        multiply(1.0)
        before = reader.energy_j()
        with monitor.window("load") as window:
            multiply(4.0)
        after = reader.energy_j()
        with monitor.window("idle") as idle:
            time.sleep(2.0)
    load = window.measurement
    assert load.source == "counter"
    assert load.energy_j == pytest.approx(after - before, rel=0.05)
    assert load.integral_j == pytest.approx(load.energy_j, rel=0.02)
    assert idle.measurement.mean_power_w < load.mean_power_w
    assert "counter_disagrees" not in load.flags
    assert load.max_temperature_c is not None
    assert load.max_memory_bytes is not None


def test_the_device_found_is_the_one_that_cuda_uses() -> None:
    torch.zeros(1, device="cuda")
    given = assigned(Nvml())
    assert given.origin == "cuda"
    assert given.uuids[0].removeprefix("GPU-") == str(torch.cuda.get_device_properties(0).uuid)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_no_gpu_given_means_none_measured(visible: str) -> None:
    code = "from hwcost import EnergyMonitor as M; m = M.for_assigned_devices(); print([d.kind for d in m.devices])"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['cpu']"


def test_doctor_reads_this_gpu() -> None:
    report = examine()
    assert report.source == "counter"
    text = render(report)
    assert report.gpus[0].info.uuid in text
    assert "a new value every" in text


def test_the_anchor_repeats_on_one_board() -> None:
    """Boards differ by 3-8 %, so one board read twice within half a minute must agree better than that."""
    with EnergyMonitor.for_assigned_devices(torch_device="cuda:0") as monitor:
        first, second = (measure_anchor(monitor, torch.device("cuda"), seconds=3.0, warmup_s=2.0) for _ in range(2))
    assert first.workload == second.workload
    assert second.j_per_token == pytest.approx(first.j_per_token, rel=0.03)
    assert first.energy_j > first.j_per_step * first.steps > 0
    assert first.j_per_token_uncertainty < 0.01 * first.j_per_token
