"""What can be measured here, and why: the data behind `joulemoe doctor`, and their text."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from typing import Any

from hwcost.cost_model import CostModel
from hwcost.cpu import CpuTimeReader
from hwcost.devices import assigned, find_readers
from hwcost.nvml import Nvml, deprecated_namesake
from hwcost.probe import FieldProbe, probe_fields
from hwcost.processes import Occupancy, occupancy, own_process_uses_cuda
from hwcost.rapl import find_zones
from hwcost.readers import DeviceInfo, DeviceReader, ReadError, SourceUnavailableError

PACKAGES = ("joulemoe", "torch", "transformers", "ray", "mlflow", "nvidia-ml-py")
REASONS = {
    "counter": "the energy counter can be read; power samples correct the edges of a window",
    "integrated": "no energy counter can be read: power is integrated instead",
    "rapl": "no GPU was given to this process; the CPU package counters can be read (one trial at a time)",
    "modelled": "no GPU was given to this process and no CPU counter can be read: CPU time times stated watts",
}
_BESIDE = (
    "no GPU was given to this process, and the CPU package counters serve one trial at a time, but a sweep runs {slots}"
    " here: CPU time times stated watts (`--parallel 1` reads the counters)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """One GPU: who it is, what it tells, who else is on it. `assigned`: this process was given it."""

    info: DeviceInfo
    assigned: bool
    fields: tuple[FieldProbe, ...]
    power_w: float | None = None
    idle_w: float | None = None
    context: bool | None = None
    others: int | None = None
    profile: str = "analytic"
    profile_analytic: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that `joulemoe doctor` says of measuring here."""

    source: str | None
    reason: str
    assigned_by: str | None
    gpus: tuple[DeviceReport, ...]
    rapl: tuple[str, ...]
    watts_per_core: float
    driver_version: str | None
    problems: tuple[str, ...]
    versions: dict[str, str | None]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def examine(*, seconds: float = 3.0, slots: int | None = None) -> Report:
    """Probe every GPU of this host for `seconds` in total (at least 1 s each); measures nothing else and changes
    nothing.

    Args:
        slots: trials that a sweep runs at once on this host's CPU; None: one per core, as it does unless told.

    Raises:
        SettingError: an environment variable that cannot be what it says.
    """
    problems = ["the deprecated distribution `pynvml` is installed"] if deprecated_namesake() else []
    gpus: tuple[DeviceReport, ...] = ()
    origin = driver = None
    try:
        nvml = Nvml()
        driver = nvml.driver_version()
        given = assigned(nvml)
        origin = given.origin
        problems.extend(given.flags)
        uuids = [uuid for uuid in dict.fromkeys((*nvml.uuids(), *given.uuids)) if uuid]
        each = max(seconds / max(len(uuids), 1), 1.0) if len(uuids) < 5 else 0.6
        gpus = tuple(_examine_gpu(nvml, uuid, uuid in given.uuids, each, problems) for uuid in uuids)
    except (SourceUnavailableError, ReadError) as error:
        problems.append(str(error))
    zones = tuple(zone.name for zone in find_zones())
    source, reason = _choose(gpus, zones, slots or os.cpu_count() or 1)
    return Report(
        source=source,
        reason=reason,
        assigned_by=origin,
        gpus=gpus,
        rapl=zones,
        watts_per_core=CpuTimeReader().watts_per_core,
        driver_version=driver,
        problems=tuple(problems),
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    )


def _choose(gpus: tuple[DeviceReport, ...], zones: tuple[str, ...], slots: int) -> tuple[str | None, str]:
    """The energy source that a sweep would use here, and why."""
    given = [gpu for gpu in gpus if gpu.assigned]
    if given:
        for field, source in (("energy", "counter"), ("power_ring", "integrated"), ("power", "integrated")):
            if all(_readable(gpu, field) for gpu in given):
                return source, REASONS[source]
        return None, "neither energy nor power of the GPU can be read"
    readers = find_readers(cpu_parallel=slots).readers
    if not readers:
        return None, "a GPU is here but NVML cannot be used"
    source = readers[0].source
    if source == "modelled" and slots > 1 and any(name.startswith("package") for name in zones):
        return source, _BESIDE.format(slots=slots)
    return source, REASONS[source]


def _readable(gpu: DeviceReport, field: str) -> bool:
    return any(probe.field == field and probe.reason is None for probe in gpu.fields)


def _examine_gpu(nvml: Nvml, uuid: str, given: bool, seconds: float, problems: list[str]) -> DeviceReport:
    try:
        reader = nvml.open(uuid)
    except ReadError as error:
        problems.append(f"{uuid}: {error}")
        unnamed = DeviceInfo(device_id=uuid, kind="gpu", uuid=uuid)
        return DeviceReport(info=unnamed, assigned=given, fields=())
    fields = probe_fields(reader, seconds=seconds)
    seen = _occupancy(reader)
    power_w, busy = _mean_power(reader)  # last, so that the GPU has had time to calm down
    model = CostModel.for_device(reader.info.name, reader.info.power_limit_w)
    return DeviceReport(
        info=reader.info,
        assigned=given,
        fields=fields,
        power_w=power_w,
        idle_w=None if busy is not False else power_w,
        context=None if seen is None else seen.total > 0 or (given and own_process_uses_cuda()),
        others=None if seen is None else seen.others,
        profile=model.profile.name,
        profile_analytic=model.analytic,
    )


def _occupancy(reader: DeviceReader) -> Occupancy | None:
    try:
        return occupancy(reader.processes())
    except ReadError:
        return None


def _mean_power(reader: DeviceReader) -> tuple[float | None, bool | None]:
    """Mean watts of the last half second (the ring) or of now, and whether the GPU was busy meanwhile."""
    try:
        busy: bool | None = reader.utilization()[0] > 0
    except ReadError:
        busy = None
    try:
        newest = [watts for _, watts in reader.power_ring(0)][-25:]
    except ReadError:
        newest = []
    try:
        return statistics.mean(newest or [reader.power_w()]), busy
    except ReadError:
        return None, busy


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(report: Report) -> str:
    """The report as text for a person."""
    lines = [f"Energy source here: {report.source or 'none'}", f"  because {report.reason}"]
    for gpu in report.gpus:
        lines += ["", *_render_gpu(gpu)]
    if not report.gpus:
        lines += ["", "No NVIDIA GPU can be read.", "  profile analytic (none for this host)"]
    zones = ", ".join(report.rapl) or "not readable"
    lines += ["", f"CPU counters (RAPL): {zones}; modelled otherwise with {report.watts_per_core:g} W per busy core"]
    if report.driver_version:
        lines.append(f"Driver {report.driver_version}; devices assigned by {report.assigned_by}")
    lines += [f"Problem: {problem}" for problem in report.problems]
    found = ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
    return "\n".join([*lines, f"Versions: {found}"])


def _render_gpu(gpu: DeviceReport) -> list[str]:
    info = gpu.info
    owner = "given to this process" if gpu.assigned else "not given to this process"
    limit = "unknown power limit" if info.power_limit_w is None else f"limit {info.power_limit_w:.0f} W"
    index = "?" if info.index is None else info.index
    lines = [f"GPU {index}  {info.name or 'of unknown name'}  {info.uuid}  ({owner}; {limit})"]
    for field in gpu.fields:
        if field.reason is not None:
            lines.append(f"  {field.field:18} not readable: {field.reason}")
            continue
        cost = f"{1e6 * (field.cost_s or 0.0):.0f} µs a read"
        lines.append(f"  {field.field:18} {cost}, {_changes(field)}")
    if gpu.idle_w is not None:
        lines.append(f"  idle at {gpu.idle_w:.0f} W {'with' if gpu.context else 'without'} a context")
    elif gpu.power_w is not None:
        lines.append(f"  busy at {gpu.power_w:.0f} W: idle watts not known")
    if gpu.others is not None:
        plural = "" if gpu.others == 1 else "es"
        lines.append(f"  used by {gpu.others} other process{plural}" if gpu.others else "  nobody else uses it")
    return [*lines, f"  profile {gpu.profile} ({_kind(gpu)})"]


def _changes(field: FieldProbe) -> str:
    if field.period_s:
        return f"a new value every {1e3 * field.period_s:.0f} ms"
    return f"fewer than three new values in {field.watched_s:.1f} s"


def _kind(gpu: DeviceReport) -> str:
    if gpu.info.name is None:
        return "none for this host: the GPU does not tell its name"
    return "an analytic guess: run `joulemoe calibrate`" if gpu.profile_analytic else "calibrated"


if __name__ == "__main__":
    began = time.monotonic()
    print(render(examine()))
    print(f"({time.monotonic() - began:.1f} s)")
