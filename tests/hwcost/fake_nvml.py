"""A stand-in for the module `pynvml`: boards whose true joules are known, on a clock that moves only when told to.

The real code of hwcost/nvml.py runs against it. Behaviour follows what was seen on an H200: the counter moves in steps
of 100 ms and takes 3 ms to read, the ring holds 119 samples 20 ms apart.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

WALL_0 = 1_700_000_000.0


class World:
    """Simulated time, shared by the fake boards and the sampler (it is a `Clock`)."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self.now = start_s
        self.wall_shift = 0.0
        self.hooks: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return WALL_0 + self.now + self.wall_shift

    def wait(self, event: threading.Event, seconds: float) -> bool:
        end = self.now + max(seconds, 0.0)
        while not event.is_set() and self.now < end:
            self.advance(min([end, *(max(h[0], self.now) for h in self.hooks)]) - self.now)
        return event.is_set()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := sorted((h for h in self.hooks if h[0] <= end), key=lambda h: h[0]):
            self.hooks.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
        self.now = max(self.now, end)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Run an action when time has reached `time_s`."""
        self.hooks.append((time_s, action))


class RealTime(World):
    """The machine's own clock, for tests with real signals."""

    def __init__(self) -> None:
        self.hooks = []
        self.wall_shift = time.time() - time.monotonic() - WALL_0

    @property  # type: ignore[override]
    def now(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(max(seconds, 0.0))

    def advance(self, seconds: float) -> None:
        time.sleep(seconds)


class NVMLError(Exception):
    def __init__(self, value: int = 999) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


ERRORS = {
    name: type(f"NVMLError_{name}", (NVMLError,), {})
    for name in (
        "LibraryNotFound",
        "DriverNotLoaded",
        "LibRmVersionMismatch",
        "NotSupported",
        "NoPermission",
        "GpuIsLost",
        "NotFound",
        "Unknown",
    )
}
CODES = {"NotSupported": 3, "NoPermission": 4, "GpuIsLost": 15}


def fail(name: str) -> Callable[..., Any]:
    """A call that raises the NVML error of that name."""

    def call(*_: object) -> None:
        raise ERRORS[name](CODES.get(name, 999))

    return call


@dataclasses.dataclass
class Board:
    """One simulated GPU."""

    world: World
    uuid: str
    power: Callable[[np.ndarray], np.ndarray] = lambda t: np.full_like(t, 500.0)
    name: str = "NVIDIA H200"
    limit_w: float = 700.0
    step_s: float = 0.1
    phase_s: float = 0.037
    read_s: float = 0.003
    ring_s: float = 0.02
    temperature: float = 45.0
    throttle: int = 0
    memory: int = 2 << 30
    pids: tuple[int, ...] = ()
    offset_j: float = 1e6  # what the counter stood at
    counter: Callable[[float], float] | None = None  # true joules to counter joules, for faults
    instant: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        self.grid_s = 0.0005
        self._start = self.world.now - 5.0
        self._energy: np.ndarray = np.zeros(0)

    def true_energy(self, time_s: float) -> float:
        """Exact joules up to a time."""
        need = int((time_s - self._start) / self.grid_s) + 2
        if need > len(self._energy):
            count = max(need * 2, 4000)
            t = self._start + self.grid_s * (np.arange(count) + 0.5)
            self._energy = np.concatenate([[0.0], np.cumsum(self.power(t)) * self.grid_s])
        x = (time_s - self._start) / self.grid_s
        i = int(x)
        return float(self._energy[i] + (x - i) * (self._energy[i + 1] - self._energy[i]))

    def _tick(self, period_s: float) -> float:
        """Time of the last step of that period."""
        return np.floor((self.world.now - self.phase_s) / period_s) * period_s + self.phase_s

    def read_counter_mj(self) -> int:
        self.world.advance(self.read_s)
        joules = self.true_energy(self._tick(self.step_s)) + self.offset_j
        return int(1e3 * (self.counter(joules) if self.counter else joules))

    def read_instant_mw(self) -> int:
        if self.instant is not None:
            return int(1e3 * self.instant())
        return int(1e3 * self.power(np.array([self._tick(self.step_s)]))[0])

    def read_ring(self, since_us: int) -> list[Any]:
        last = np.floor(self.world.now / self.ring_s)
        times = self.ring_s * (last - np.arange(118, -1, -1))
        edges = np.array([self.true_energy(t) for t in [times[0] - self.ring_s, *times]])
        watts = np.diff(edges) / self.ring_s
        shift = WALL_0 + self.world.wall_shift
        stamps = [int(1e6 * (t + shift)) for t in times]
        return [
            types.SimpleNamespace(timeStamp=s, sampleValue=types.SimpleNamespace(uiVal=int(1e3 * w)))
            for s, w in zip(stamps, watts, strict=True)
            if s > since_us
        ]


def fake_pynvml(boards: list[Board], **replaced: Callable[..., Any]) -> types.ModuleType:
    """A module to put into `sys.modules["pynvml"]`; keyword arguments replace single calls."""
    module: Any = types.ModuleType("pynvml")
    module.__fake__ = True
    module.NVMLError = lambda code: ERRORS[next((n for n, c in CODES.items() if c == code), "Unknown")](code)
    for name, error in ERRORS.items():
        setattr(module, f"NVMLError_{name}", error)

    def by_uuid(uuid: str) -> Board:
        found = [board for board in boards if board.uuid == uuid]
        return found[0] if found else fail("NotFound")()

    def field_values(board: Board, fields: list[int]) -> list[Any]:
        assert fields == [186]
        value = types.SimpleNamespace(uiVal=board.read_instant_mw())
        return [types.SimpleNamespace(nvmlReturn=0, value=value)]

    calls: dict[str, Callable[..., Any]] = {
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: len(boards),
        "nvmlDeviceGetHandleByIndex": lambda i: boards[i],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda board: board.uuid,
        "nvmlDeviceGetIndex": boards.index,
        "nvmlDeviceGetName": lambda board: board.name,
        "nvmlDeviceGetMaxMigDeviceCount": fail("NotSupported"),
        "nvmlDeviceGetEnforcedPowerLimit": lambda board: int(1e3 * board.limit_w),
        "nvmlDeviceGetTemperatureThreshold": lambda board, kind: 89,
        "nvmlDeviceGetMemoryInfo": lambda board: types.SimpleNamespace(total=144 << 30, used=board.memory),
        "nvmlDeviceGetTotalEnergyConsumption": lambda board: board.read_counter_mj(),
        "nvmlDeviceGetFieldValues": field_values,
        "nvmlDeviceGetPowerUsage": lambda board: board.read_instant_mw(),
        "nvmlDeviceGetSamples": lambda board, kind, since: (1, board.read_ring(since)),
        "nvmlDeviceGetTemperature": lambda board, kind: board.temperature,
        "nvmlDeviceGetUtilizationRates": lambda board: types.SimpleNamespace(gpu=97, memory=40),
        "nvmlDeviceGetClockInfo": lambda board, kind: {1: 1980, 2: 3201}[kind],
        "nvmlDeviceGetCurrentClocksEventReasons": lambda board: board.throttle,
        "nvmlDeviceGetComputeRunningProcesses": lambda board: [
            types.SimpleNamespace(pid=pid, usedGpuMemory=1 << 30) for pid in board.pids
        ],
    }
    calls.update(replaced)
    for name, call in calls.items():
        setattr(module, name, call)
    return module
