"""NVIDIA's management library: the only file that imports pynvml, and where its errors are translated."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from hwcost.readers import (
    DeviceInfo,
    DeviceLostError,
    FieldUnavailableError,
    ProcessUse,
    ReadError,
    SourceUnavailableError,
)

POWER_INSTANT_FIELD = 186  # NVML_FI_DEV_POWER_INSTANT
TOTAL_POWER_SAMPLES = 0  # NVML_TOTAL_POWER_SAMPLES
TEMPERATURE_GPU = 0
CLOCK_SM, CLOCK_MEMORY = 1, 2
THRESHOLD_SLOWDOWN = 1

THROTTLE_REASONS = {
    0x04: "power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
}
"""Bits of the clock event reasons by which heat or power held the clocks down."""

_UNAVAILABLE = ("NotSupported", "NoPermission", "FunctionNotFound", "InvalidArgument", "NotFound", "Deprecated")
_LOST = ("GpuIsLost", "ResetRequired", "Uninitialized")
_init_lock = threading.Lock()
_init_pid: int | None = None


def _load() -> types.ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the deprecated distribution warns on import
            return importlib.import_module("pynvml")
    except Exception as error:  # an import hook or a broken namesake may raise anything
        raise SourceUnavailableError(f"pynvml cannot be imported ({type(error).__name__}: {error})") from error


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def deprecated_namesake() -> bool:
    """Whether the deprecated distribution `pynvml` is installed, whose module shadows that of `nvidia-ml-py`."""
    try:
        importlib.metadata.version("pynvml")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Nvml:
    """An initialised NVML with the functions we need; opening it again in one process is cheap.

    Raises:
        SourceUnavailableError: no library, no driver, or versions of the two that do not match.
    """

    def __init__(self) -> None:
        self.module: Any = _load()
        self.notes: tuple[str, ...] = ("deprecated_pynvml",) if deprecated_namesake() else ()
        global _init_pid
        with _init_lock:
            try:
                if _init_pid != os.getpid() or getattr(self.module, "__fake__", False):
                    self.module.nvmlInit()
                    _init_pid = os.getpid()
            except Exception as error:
                raise SourceUnavailableError(f"NVML cannot be initialised ({error})") from error

    @contextlib.contextmanager
    def translate(self) -> Iterator[None]:
        """NVML's errors as ours; anything else that breaks inside the binding is a `ReadError`."""
        try:
            yield
        except ReadError:
            raise
        except Exception as error:
            name = type(error).__name__.removeprefix("NVMLError_")
            if isinstance(error, AttributeError):
                raise FieldUnavailableError(f"the installed pynvml has no such call: {error}") from error
            if name in _LOST:
                raise DeviceLostError(str(error)) from error
            if name in _UNAVAILABLE:
                raise FieldUnavailableError(str(error)) from error
            raise ReadError(f"{name}: {error}") from error

    def driver_version(self) -> str | None:
        return self.maybe(lambda: _text(self.module.nvmlSystemGetDriverVersion()))

    def count(self) -> int:
        with self.translate():
            return int(self.module.nvmlDeviceGetCount())

    def uuids(self) -> tuple[str | None, ...]:
        """UUIDs of the boards in NVML's (PCI bus) order; None for a board that cannot be asked."""
        return tuple(self.maybe(partial(self._uuid_at, i)) for i in range(self.count()))

    def _uuid_at(self, index: int) -> str:
        return self.uuid(self.handle(index))

    def handle(self, index: int) -> Any:
        with self.translate():
            return self.module.nvmlDeviceGetHandleByIndex(index)

    def handle_of(self, uuid: str) -> Any:
        with self.translate():
            return self.module.nvmlDeviceGetHandleByUUID(uuid)

    def uuid(self, handle: Any) -> str:
        with self.translate():
            return _text(self.module.nvmlDeviceGetUUID(handle))

    def mig_uuids(self, index: int) -> tuple[str, ...]:
        """UUIDs of a board's MIG instances; empty where MIG is off."""
        board = self.maybe(partial(self.handle, index))
        count = self.maybe(lambda: int(self.module.nvmlDeviceGetMaxMigDeviceCount(board))) if board is not None else 0
        return tuple(filter(None, (self.maybe(partial(self._mig_uuid, board, i)) for i in range(count or 0))))

    def _mig_uuid(self, board: Any, index: int) -> str:
        return self.uuid(self.module.nvmlDeviceGetMigDeviceHandleByIndex(board, index))

    def open(self, uuid: str) -> NvmlReader:
        """A reader of the board or MIG instance of that UUID."""
        return NvmlReader(self, uuid)

    def maybe(self, call: Callable[[], Any]) -> Any:
        """What a call gives, or None where it fails."""
        try:
            with self.translate():
                return call()
        except ReadError:
            return None


class NvmlReader:
    """One NVIDIA GPU, named by UUID. A MIG instance reads the board it is part of: power is known per board only."""

    source = "counter"
    stepped = True

    def __init__(self, nvml: Nvml, uuid: str) -> None:
        self.nvml = nvml
        self.mig = uuid.startswith("MIG-")
        handle = nvml.handle_of(uuid)
        if self.mig:
            with nvml.translate():
                handle = nvml.module.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        self.handle = handle
        self.notes: tuple[str, ...] = (*nvml.notes, *(("mig_board_energy",) if self.mig else ()))
        self.info = self._describe(uuid)
        self._averaged_power = False

    def _describe(self, uuid: str) -> DeviceInfo:
        module, handle, maybe = self.nvml.module, self.handle, self.nvml.maybe
        limit_mw = maybe(lambda: module.nvmlDeviceGetEnforcedPowerLimit(handle))
        return DeviceInfo(
            device_id=uuid,
            kind="gpu",
            uuid=uuid,
            name=maybe(lambda: _text(module.nvmlDeviceGetName(handle))),
            index=maybe(lambda: int(module.nvmlDeviceGetIndex(handle))),
            driver_version=self.nvml.driver_version(),
            power_limit_w=limit_mw / 1e3 if limit_mw else None,
            slowdown_temperature_c=maybe(
                lambda: float(module.nvmlDeviceGetTemperatureThreshold(handle, THRESHOLD_SLOWDOWN))
            ),
            memory_bytes=maybe(lambda: int(module.nvmlDeviceGetMemoryInfo(handle).total)),
            mig=self.mig,
        )

    def energy_j(self) -> float:
        with self.nvml.translate():
            return self.nvml.module.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3

    def power_w(self) -> float:
        """Instant power; where the driver does not have it, the (one-second average) power usage."""
        if not self._averaged_power:
            try:
                return self._instant_power_w()
            except FieldUnavailableError:
                self._averaged_power = True
                self.notes = (*self.notes, "averaged_power")
        with self.nvml.translate():
            return self.nvml.module.nvmlDeviceGetPowerUsage(self.handle) / 1e3

    def _instant_power_w(self) -> float:
        module = self.nvml.module
        with self.nvml.translate():
            value = module.nvmlDeviceGetFieldValues(self.handle, [POWER_INSTANT_FIELD])[0]
            if value.nvmlReturn != 0:
                raise module.NVMLError(value.nvmlReturn)
            return value.value.uiVal / 1e3

    def power_ring(self, since_us: int) -> Sequence[tuple[int, float]]:
        with self.nvml.translate():
            try:
                _, samples = self.nvml.module.nvmlDeviceGetSamples(self.handle, TOTAL_POWER_SAMPLES, since_us)
            except Exception as error:
                if type(error).__name__ == "NVMLError_NotFound":  # nothing newer than since_us
                    return ()
                raise
        return sorted((int(s.timeStamp), s.sampleValue.uiVal / 1e3) for s in samples if s.timeStamp > since_us)

    def temperature_c(self) -> float:
        with self.nvml.translate():
            return float(self.nvml.module.nvmlDeviceGetTemperature(self.handle, TEMPERATURE_GPU))

    def memory_used_bytes(self) -> int:
        with self.nvml.translate():
            return int(self.nvml.module.nvmlDeviceGetMemoryInfo(self.handle).used)

    def utilization(self) -> tuple[float, float]:
        """Shares of time (0 to 1) in which the multiprocessors and the memory were busy."""
        with self.nvml.translate():
            rates = self.nvml.module.nvmlDeviceGetUtilizationRates(self.handle)
            return rates.gpu / 100, rates.memory / 100

    def sm_clock_mhz(self) -> float:
        with self.nvml.translate():
            return float(self.nvml.module.nvmlDeviceGetClockInfo(self.handle, CLOCK_SM))

    def memory_clock_mhz(self) -> float:
        with self.nvml.translate():
            return float(self.nvml.module.nvmlDeviceGetClockInfo(self.handle, CLOCK_MEMORY))

    def throttle_reasons(self) -> int:
        module = self.nvml.module
        with self.nvml.translate():
            call = getattr(module, "nvmlDeviceGetCurrentClocksEventReasons", None)
            return int((call or module.nvmlDeviceGetCurrentClocksThrottleReasons)(self.handle))

    def processes(self) -> Sequence[ProcessUse]:
        """Processes with a compute context. Inside a container their ids may be those of the host."""
        module = self.nvml.module
        with self.nvml.translate():
            found = module.nvmlDeviceGetComputeRunningProcesses(self.handle)
        return tuple(ProcessUse(pid=int(p.pid), memory_bytes=p.usedGpuMemory) for p in found)
