"""Where a row comes from: host, versions, commit, device."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from hwcost import EnergyMonitor
from pipelines.model import Hardware

_PACKAGES = ("joulemoe", "torch", "transformers", "ray", "mlflow", "pyarrow")


@functools.cache
def git_sha() -> str | None:
    """Commit of the checkout that this code runs from; None where it is not one."""
    folder = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def host_columns() -> dict[str, Any]:
    """Host, versions and commit, as columns of a `trials` row."""
    return {"host": platform.node(), "versions_json": json.dumps(versions(), sort_keys=True), "git_sha": git_sha()}


def device_columns(monitor: EnergyMonitor, hardware: Hardware | None) -> dict[str, Any]:
    """The measured device and the precision, as columns of a `trials` row."""
    gpu = next((device for device in monitor.devices if device.uuid), None)
    return {
        "gpu_name": gpu.name if gpu else None,
        "gpu_uuid": gpu.uuid if gpu else None,
        "driver_version": gpu.driver_version if gpu else None,
        "power_limit_w": gpu.power_limit_w if gpu else None,
        "device": hardware.device.type if hardware else None,
        "dtype": hardware.dtype if hardware else None,
    }
