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
        """Let time pass with the samplers at work."""
        end = self.world.now + seconds
        while self.world.now < end:
            for sampler in monitor.samplers:
                sampler.tick()
            if not monitor.samplers:
                self.world.advance(0.1)

    def measure(self, monitor: EnergyMonitor, seconds: float, name: str = "w", count: int = 1) -> list[EnergyWindow]:
        """Windows that touch, their edges wherever the sampler happens to be."""
        windows = [monitor.window(name) for _ in range(count)]
        start = self.world.now + 0.0137
        for i, window in enumerate(windows):
            self.world.at(start + i * seconds, window.__enter__)
            self.world.at(start + (i + 1) * seconds, lambda w=window: w.__exit__(None, None, None))
        self.run(monitor, 0.0137 + count * seconds + 0.3)
        return windows


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)
