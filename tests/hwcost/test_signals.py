"""Real signals to a real process that measures: stopped, continued, killed, forked; and threads that die."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hwcost import EnergyMonitor
from hwcost.cpu import CpuTimeReader
from hwcost.readers import DeviceInfo

LIVING = Path(__file__).with_name("living.py")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def live(*arguments: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, str(LIVING), *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    return child


@posix
@pytest.mark.slow
def test_stopped_and_continued() -> None:
    child = live("1.0")
    time.sleep(0.3)
    child.send_signal(signal.SIGSTOP)
    time.sleep(3.0)
    child.send_signal(signal.SIGCONT)
    output, _ = child.communicate(timeout=60)
    result = json.loads(output)
    assert result["energy_j"] == pytest.approx(result["true_j"], rel=0.05)
    assert "sampling_gap" in result["flags"]
    assert result["source"] == "counter"


@posix
def test_a_killed_process_leaves_its_last_heartbeat(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    child = live("600", str(history))
    while not any("train" in record.get("ledger", {}) for record in _records(history)):
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    child.communicate()
    last = [record for record in _records(history) if "ledger" in record][-1]
    entry = last["ledger"]["train"]
    assert (entry["open"], entry["windows"]) == (1, 0)
    assert entry["energy_j"] == pytest.approx(500.0 * entry["duration_s"], rel=0.25)
    assert any(record.get("sample", {}).get("phase") == "train" for record in _records(history))


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a history; the last may be cut off by a kill."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _in_child(monitor: EnergyMonitor, queue: Any) -> None:
    with monitor.window("child") as window:
        sum(range(100_000))
    result = window.measurement
    monitor.close()
    queue.put((result.energy_j, result.flags, monitor.ledger()))


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_the_start_measures_nothing_and_does_not_hang() -> None:
    with EnergyMonitor.for_assigned_devices(cpu_parallel=2) as monitor, monitor.window("parent") as window:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        with monitor._lock, monitor.samplers[0]._lock:  # the worst moment: locks that nobody in the child will release
            child = context.Process(target=_in_child, args=(monitor, queue))
            child.start()
        energy_j, flags, ledger = queue.get(timeout=60)
        child.join(timeout=60)
    assert (energy_j, ledger) == (None, {})
    assert "forked" in flags
    assert window.measurement.energy_j is not None
    assert "forked" not in window.measurement.flags


class Mortal(CpuTimeReader):
    """A reader whose next read in the sampler's thread ends that thread, or hangs."""

    def __init__(self) -> None:
        super().__init__(5.0)
        self.info = DeviceInfo(device_id="mortal", kind="cpu")
        self.kill = threading.Event()

    def energy_j(self) -> float:
        if self.kill.is_set() and threading.current_thread().name == "hwcost-mortal":
            self.kill.clear()
            raise SystemExit
        return super().energy_j()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_sampler_is_started_again() -> None:
    reader = Mortal()
    with EnergyMonitor([reader], period_s=0.01) as monitor:
        thread = monitor.samplers[0].thread
        assert thread is not None
        with monitor.window("w") as window:
            reader.kill.set()
            thread.join(timeout=30)
        assert not thread.is_alive()
        assert monitor.samplers[0].thread is not thread
        assert window.measurement.energy_j is not None
        assert "sampler_restarted" in window.measurement.flags
        with monitor.window("after") as after:
            sum(range(100_000))
        assert after.measurement.flags == ("modelled:5_w_per_core",)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("who", ["ledger", "watchdog"])
def test_a_sampler_that_dies_inside_a_window_is_started_again_inside_it(
    monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr("hwcost.monitor.WATCH_S", 60.0 if who == "ledger" else 0.2)
    monkeypatch.setattr("hwcost.sampler.GAP_S", 0.1)
    reader = Mortal()
    with EnergyMonitor([reader], period_s=0.01) as monitor:
        thread = monitor.samplers[0].thread
        assert thread is not None
        with monitor.window("w") as window:
            reader.kill.set()
            thread.join(timeout=30)
            dead = len(monitor.system.history)
            if who == "ledger":
                time.sleep(0.2)
                assert len(monitor.system.history) == dead
                assert monitor.ledger()["w"].open == 1
            deadline = time.monotonic() + 30
            while len(monitor.system.history) < dead + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(monitor.system.history) >= dead + 3
        assert {"sampler_restarted", "sampling_gap"} <= set(window.measurement.flags)
        assert monitor.samplers[0].restarts == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_several_threads_start_one_sampler() -> None:
    reader = Mortal()
    with EnergyMonitor([reader], period_s=0.01) as monitor:
        (sampler,) = monitor.samplers
        assert sampler.thread is not None
        reader.kill.set()
        sampler.thread.join(timeout=30)
        callers = [threading.Thread(target=monitor.ledger) for _ in range(16)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=30)
        assert sampler.restarts == 1
        assert sum(thread.name == "hwcost-mortal" for thread in threading.enumerate()) == 1


class Hanging(CpuTimeReader):
    """A stepped counter whose reads do not return, as of a driver that hangs."""

    stepped = True

    def __init__(self) -> None:
        super().__init__(5.0)
        self.release = threading.Event()

    def energy_j(self) -> float:
        self.release.wait(60)
        return super().energy_j()


def test_a_hanging_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwcost.monitor.READY_S", 0.1)
    monkeypatch.setattr("hwcost.monitor.SETTLE_S", 0.2)
    monkeypatch.setattr("hwcost.sampler.STALE_S", 0.1)
    reader = Hanging()
    monitor = EnergyMonitor([reader])
    with monitor.window("w") as window:
        time.sleep(0.3)
    assert window.measurement.energy_j is None
    assert {"sampler_stuck", "unsettled"} <= set(window.measurement.flags)
    reader.release.set()
    monitor.close()
