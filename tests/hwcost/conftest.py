"""Fixtures: a simulated world of GPUs behind a fake `pynvml`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from hwcost import EnergyMonitor, EnergyWindow
from hwcost.devices import find_readers
from tests.hwcost.fake_nvml import Board, World, fake_pynvml


class Bench:
    """Boards, and a monitor that runs in simulated time in the test's own thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.world = World()
        self.boards: list[Board] = []

    def board(self, **kwargs: Any) -> Board:
        board = Board(self.world, uuid=kwargs.pop("uuid", f"GPU-{len(self.boards):04d}"), **kwargs)
        self.boards.append(board)
        return board

    def install(self, visible: str | None = None, **replaced: Callable[..., Any]) -> None:
        self.monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(self.boards, **replaced))
        self.monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            self.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def monitor(self, visible: str | None = None, *, settle_s: float = 1.0, **kwargs: Any) -> EnergyMonitor:
        """A monitor that has had time to learn the counter's period. NVML calls to replace start with `nvml`."""
        replaced = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("nvml")}
        self.install(visible, **replaced)
        found = find_readers()
        monitor = EnergyMonitor(
            found.readers, clock=self.world, threads=False, flags=found.flags, shared=found.shared, **kwargs
        )
        self.run(monitor, settle_s)
        return monitor

    def run(self, monitor: EnergyMonitor, seconds: float) -> None:
        """Let time pass with the samplers at work; ends exactly at the right time."""
        end = self.world.now + seconds
        while self.world.now < end - 0.25:
            for sampler in monitor.samplers:
                sampler.tick()
        self.world.advance(max(end - self.world.now, 0.0))

    def measure(self, monitor: EnergyMonitor, seconds: float, name: str = "w") -> EnergyWindow:
        with monitor.window(name) as window:
            self.run(monitor, seconds)
        return window


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)
