"""Hosts without a GPU: RAPL where it can be read, CPU time otherwise, anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hwcost import EnergyMonitor
from hwcost.cpu import CpuTimeReader, watts_per_core
from hwcost.rapl import RaplReader
from hwcost.readers import ReadError, SourceUnavailableError
from tests.hwcost.fake_nvml import World


class Powercap:
    """A powercap tree: two packages, one with DRAM, as Linux shows it."""

    def __init__(self, root: Path, *, dram: bool = True, mmio: bool = False) -> None:
        self.root = root
        self.zone("intel-rapl:0", "package-0", 262_143_328_850)
        self.zone("intel-rapl:0:0", "core", 262_143_328_850)
        if dram:
            self.zone("intel-rapl:0:1", "dram", 65_712_999_613)
        self.zone("intel-rapl:1", "package-1", 262_143_328_850)
        if mmio:
            self.zone("intel-rapl-mmio:0", "package-0", 262_143_328_850)

    def zone(self, folder: str, name: str, wrap: int) -> None:
        path = self.root / folder
        path.mkdir(parents=True)
        (path / "name").write_text(name + "\n")
        (path / "max_energy_range_uj").write_text(f"{wrap}\n")
        self.set(folder, 1_000_000)

    def set(self, folder: str, microjoules: int) -> None:
        (self.root / folder / "energy_uj").write_text(f"{microjoules}\n")


@pytest.mark.parametrize("mmio", [False, True])
def test_rapl_sums_packages_and_dram_but_not_their_parts(tmp_path: Path, mmio: bool) -> None:
    tree = Powercap(tmp_path, mmio=mmio)
    reader = RaplReader(tmp_path)
    assert [zone.name for zone in reader.zones] == ["package-0", "dram", "package-1"]
    tree.set("intel-rapl:0", 3_000_000)
    tree.set("intel-rapl:0:0", 9_000_000)
    tree.set("intel-rapl:0:1", 1_500_000)
    assert reader.energy_j() == pytest.approx(2.5)
    assert reader.notes == ()


def test_rapl_wraps(tmp_path: Path) -> None:
    tree = Powercap(tmp_path)
    tree.set("intel-rapl:0", 262_143_328_850 - 2_000_000)
    reader = RaplReader(tmp_path)
    tree.set("intel-rapl:0", 1_000_000)
    assert reader.energy_j() == pytest.approx(3.0)
    assert reader.energy_j() == pytest.approx(3.0)


def test_rapl_without_dram_says_so(tmp_path: Path) -> None:
    Powercap(tmp_path, dram=False)
    assert RaplReader(tmp_path).notes == ("rapl_without_dram",)


def test_rapl_not_readable(tmp_path: Path) -> None:
    tree = Powercap(tmp_path)
    reader = RaplReader(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(ReadError, match="energy_uj"):
        reader.energy_j()
    for folder in tree.root.iterdir():
        (folder / "energy_uj").unlink(missing_ok=True)
    with pytest.raises(SourceUnavailableError, match="RAPL"):
        RaplReader(tmp_path)
    with pytest.raises(SourceUnavailableError, match="RAPL"):
        RaplReader(tmp_path / "missing")


@pytest.mark.parametrize(("parallel", "source"), [(1, "rapl"), (2, "modelled")])
def test_rapl_serves_one_trial_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: int, source: str
) -> None:
    Powercap(tmp_path)
    monkeypatch.setenv("JOULEMOE_POWERCAP", str(tmp_path))
    with EnergyMonitor.for_assigned_devices(torch_device="cpu", cpu_parallel=parallel) as monitor:
        assert monitor.source == source


def test_rapl_windows_end_where_they_end(tmp_path: Path) -> None:
    tree = Powercap(tmp_path)
    world = World()
    monitor = EnergyMonitor([RaplReader(tmp_path)], clock=world, threads=False)
    with monitor.window("outer") as outer:
        tree.set("intel-rapl:0", 6_000_000)
        world.advance(1.0)
        with monitor.window("inner") as inner:
            tree.set("intel-rapl:0", 13_000_000)
            world.advance(2.0)
        tree.set("intel-rapl:0", 16_000_000)
        world.advance(0.5)
        assert monitor.ledger()["outer"].energy_j == pytest.approx(15.0)
    assert outer.measurement.energy_j == pytest.approx(15.0)
    assert inner.measurement.energy_j == pytest.approx(7.0)
    assert inner.measurement.mean_power_w == pytest.approx(3.5)
    assert (inner.measurement.source, inner.measurement.shared) == ("rapl", None)


def test_a_modelled_window_is_cpu_time_times_watts() -> None:
    with EnergyMonitor([CpuTimeReader(7.0)]) as monitor:
        reader = monitor.samplers[0].reader
        before = reader.energy_j()
        with monitor.window("w") as window:
            sum(i * i for i in range(300_000))
        after = reader.energy_j()
    assert 0 < window.measurement.energy_j <= after - before
    assert window.measurement.source == "modelled"
    assert window.measurement.flags == ("modelled:7_w_per_core",)
    assert window.measurement.max_temperature_c is None


@pytest.mark.parametrize("text", ["", "many", "-3", "nan", "0", "1e9"])
def test_bad_watts_per_core_name_the_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("JOULEMOE_WATTS_PER_CORE", text)
    with pytest.raises(ValueError, match="JOULEMOE_WATTS_PER_CORE"):
        watts_per_core()


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_import_and_model(system: str) -> None:
    """No /proc, no /sys, no getuid, no fork: as on macOS and Windows."""
    code = f"""
import os, pathlib, platform, sys
platform.system = lambda: {system!r}
for name in ("getuid", "register_at_fork", "fork"):
    if hasattr(os, name):
        delattr(os, name)
real = pathlib.Path.exists
pathlib.Path.is_dir = lambda self: False
sys.modules["pynvml"] = None
from hwcost import EnergyMonitor
with EnergyMonitor.for_assigned_devices() as monitor:
    with monitor.window("w") as window:
        sum(i * i for i in range(100_000))
    print(window.measurement.source)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "modelled"
