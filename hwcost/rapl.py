"""CPU energy that the Linux kernel exposes (RAPL through powercap): packages and the DRAM beside them.

The counters cover the whole package with everything that runs on it, so they serve one trial at a time.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from hwcost.cpu import UnreadableFields
from hwcost.readers import DeviceInfo, ReadError, SourceUnavailableError

POWERCAP = Path("/sys/class/powercap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zone:
    """One RAPL counter: its file and the value at which it starts anew, in µJ."""

    name: str
    path: Path
    wrap_uj: int


def find_zones(root: Path | None = None) -> tuple[Zone, ...]:
    """The package zones and their DRAM children that this user can read; empty where there are none.

    Args:
        root: of the tree; None: where `JOULEMOE_POWERCAP` says, else where Linux has it.
    """
    root = root or Path(os.environ.get("JOULEMOE_POWERCAP") or POWERCAP)
    zones = []
    for folder in sorted(root.glob("*-rapl:*")) if root.is_dir() else []:
        try:
            name = (folder / "name").read_text().strip()
            if not (name.startswith("package") or name == "dram"):
                continue
            int((folder / "energy_uj").read_text())
            wrap_uj = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        zones.append(Zone(name=name, path=folder / "energy_uj", wrap_uj=wrap_uj))
    # intel-rapl and intel-rapl-mmio show the same packages twice.
    msr = [zone for zone in zones if not zone.path.parent.name.startswith("intel-rapl-mmio")]
    return tuple(msr or zones)


class RaplReader(UnreadableFields):
    """The sum of all zones, each unwrapped on its own."""

    source = "rapl"
    stepped = False

    def __init__(self, root: Path | str | None = None) -> None:
        self.zones = find_zones(None if root is None else Path(root))
        if not any(zone.name.startswith("package") for zone in self.zones):
            raise SourceUnavailableError("no readable RAPL package counter under /sys/class/powercap")
        self.info = DeviceInfo(device_id="cpu", kind="cpu", name=platform.processor() or platform.machine() or None)
        dram = any(zone.name == "dram" for zone in self.zones)
        self.notes: tuple[str, ...] = () if dram else ("rapl_without_dram",)
        self._last_uj = [self._read_uj(zone) for zone in self.zones]
        self._total_uj = 0

    def energy_j(self) -> float:
        for i, zone in enumerate(self.zones):
            value = self._read_uj(zone)
            step = value - self._last_uj[i]
            self._total_uj += step if step >= 0 else step + zone.wrap_uj
            self._last_uj[i] = value
        return self._total_uj / 1e6

    @staticmethod
    def _read_uj(zone: Zone) -> int:
        try:
            return int(zone.path.read_text())
        except (OSError, ValueError) as error:
            raise ReadError(f"{zone.path}: {error}") from error
