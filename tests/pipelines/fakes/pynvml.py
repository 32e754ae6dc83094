# ruff: noqa: N801, N816, N818 - the names are NVML's
"""Boards whose joules are a closed formula of the machine's monotonic clock, for tests with real processes.

Put this folder on PYTHONPATH: every process then sees the boards of its node (`JOULEMOE_FAKE_NODE`), and a test knows
what they drew between any two moments. The counter moves every millisecond, so that its step is not what a test of the
ledger measures.
"""

from __future__ import annotations

import math
import os
import time
import types

BOARDS = 6
NODE = os.environ.get("JOULEMOE_FAKE_NODE", "0")
UUIDS = tuple(f"GPU-fake-{NODE}-{index}" for index in range(BOARDS))
STEP_S = 0.001
MOST_W = 600.0


def joules(uuid: str, seconds: float) -> float:
    """Exact joules of a board up to a moment: 400 W that swing by 100 W every four seconds, and more on others."""
    omega = math.pi / 2
    return _base_w(uuid) * seconds + 100 / omega * (1 - math.cos(omega * seconds))


def watts(uuid: str, seconds: float) -> float:
    """Its derivative."""
    return _base_w(uuid) + 100 * math.sin(math.pi / 2 * seconds)


def _base_w(uuid: str) -> float:
    node, index = uuid.split("-")[2:]
    return 400 + 10 * int(index) + 2 * int(node)


class NVMLError(Exception):
    """What NVML raises."""


class NVMLError_NotSupported(NVMLError):
    """A field that this board does not have."""


def _no(*_):
    raise NVMLError_NotSupported("not supported")


def nvmlInit():
    """Nothing to do."""


def nvmlSystemGetDriverVersion():
    return "fake"


def nvmlDeviceGetCount():
    return len(UUIDS)


def nvmlDeviceGetHandleByIndex(index):
    return UUIDS[index]


def nvmlDeviceGetHandleByUUID(uuid):
    return uuid.decode() if isinstance(uuid, bytes) else uuid


def nvmlDeviceGetUUID(handle):
    return handle


def nvmlDeviceGetIndex(handle):
    return UUIDS.index(handle)


def nvmlDeviceGetName(handle):
    return "Fake GPU"


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return 700_000


def nvmlDeviceGetTemperatureThreshold(handle, kind):
    return 89


def nvmlDeviceGetMemoryInfo(handle):
    return types.SimpleNamespace(total=1 << 30, used=1 << 20)


def nvmlDeviceGetTotalEnergyConsumption(handle):
    return int(1e3 * joules(handle, math.floor(time.monotonic() / STEP_S) * STEP_S))


def nvmlDeviceGetFieldValues(handle, fields):
    value = types.SimpleNamespace(uiVal=nvmlDeviceGetPowerUsage(handle))
    return [types.SimpleNamespace(nvmlReturn=0, value=value) for _ in fields]


def nvmlDeviceGetPowerUsage(handle):
    return int(1e3 * watts(handle, time.monotonic()))


def nvmlDeviceGetTemperature(handle, kind):
    return 45


nvmlDeviceGetMaxMigDeviceCount = nvmlDeviceGetSamples = nvmlDeviceGetUtilizationRates = _no
nvmlDeviceGetClockInfo = nvmlDeviceGetCurrentClocksEventReasons = nvmlDeviceGetComputeRunningProcesses = _no
