"""Which devices this process was given, by UUID: from Ray, from CUDA itself, or from CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import sys
from collections.abc import Sequence

from hwcost.cpu import CpuTimeReader
from hwcost.nvml import Nvml
from hwcost.rapl import RaplReader
from hwcost.readers import DeviceReader, ReadError, SourceUnavailableError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """The UUIDs a process was given, who said so, and what to hold against it."""

    uuids: tuple[str, ...]
    origin: str
    flags: tuple[str, ...] = ()
    shared: bool | None = None  # a fraction of a GPU was given


def parse_visible_devices(text: str | None, boards: Sequence[str | None], migs: Sequence[str] = ()) -> tuple[str, ...]:
    """UUIDs that CUDA would show for a value of CUDA_VISIBLE_DEVICES.

    Entries are indices or (prefixes of) UUIDs; as in CUDA, an entry that names nothing ends the list. A device named
    twice is measured once.

    Args:
        text: the variable; None when it is unset.
        boards: UUIDs of all boards by index; None for one that cannot be asked.
        migs: UUIDs of all MIG instances.
    """
    if text is None:
        return tuple(uuid for uuid in boards if uuid)
    chosen: dict[str, None] = {}
    for entry in (part.strip() for part in text.split(",")):
        uuid = _resolve(entry, boards, migs)
        if uuid is None:
            break
        chosen.setdefault(uuid)
    return tuple(chosen)


def _resolve(entry: str, boards: Sequence[str | None], migs: Sequence[str]) -> str | None:
    if entry.isdecimal():
        return boards[int(entry)] if int(entry) < len(boards) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    known = [uuid for uuid in (*boards, *migs) if uuid]
    if entry in known:
        return entry
    matches = [uuid for uuid in known if uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def assigned(nvml: Nvml) -> Assignment:
    """What this process was given. Ray's word counts before the environment's: an actor without a GPU inherits the
    latter.
    """
    boards = nvml.uuids()
    migs = tuple(uuid for i in range(len(boards)) for uuid in nvml.mig_uuids(i))
    ray_ids = _ray_ids()
    if ray_ids is not None:
        ids, share = ray_ids
        uuids = parse_visible_devices(",".join(ids), boards, migs) if ids else ()
        return Assignment(uuids=uuids, origin="ray", shared=True if 0 < share < 1 else None)
    seen = _torch_uuids()
    if seen:
        return Assignment(uuids=tuple(dict.fromkeys(seen)), origin="cuda")
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    flags = (
        ("device_order_assumed",)
        if text and _order_matters(nvml, boards) and not text.startswith(("GPU-", "MIG-"))
        else ()
    )
    origin = "CUDA_VISIBLE_DEVICES" if text is not None else "all"
    return Assignment(uuids=parse_visible_devices(text, boards, migs), origin=origin, flags=flags)


def _ray_ids() -> tuple[list[str], float] | None:
    """GPU ids and the share of a GPU that Ray gave this worker; None outside a Ray worker."""
    ray = sys.modules.get("ray")
    try:
        if ray is None or not ray.is_initialized():
            return None
        context = ray.get_runtime_context()
        if context.worker.mode != ray.WORKER_MODE:
            return None
        ids = [str(i) for i in context.get_accelerator_ids().get("GPU", [])]
        return ids, float(context.get_assigned_resources().get("GPU", len(ids)))
    except Exception:  # Ray's internals move; the environment still says the same
        return None


def _torch_uuids() -> list[str]:
    """UUIDs of CUDA's devices, in CUDA's order, once this process has initialised CUDA."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return []
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    except Exception:
        return []
    return [uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in uuids]


def _order_matters(nvml: Nvml, boards: Sequence[str | None]) -> bool:
    """Whether CUDA may number the boards otherwise than NVML does: fastest first, where boards differ."""
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return False
    names = {nvml.open(uuid).info.name for uuid in boards if uuid} if len(boards) > 1 else set()
    return len(names) > 1


def gpu_host() -> bool:
    """Whether this process sits on a host with NVIDIA GPUs and was not told to see none."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = text is not None and text.split(",")[0].strip() in ("", "-1", "NoDevFiles")
    return bool(glob.glob("/dev/nvidia[0-9]*")) and not hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """Readers of the devices to measure, what is wrong with the choice, and whether only a share of a GPU was given."""

    readers: tuple[DeviceReader, ...]
    flags: tuple[str, ...] = ()
    shared: bool | None = None


def find_readers(*, torch_device: object = None, allow_cpu: bool = True, cpu_parallel: int = 1) -> Found:
    """What this process can measure of what it was given. Missing hardware never raises: it leaves flags.

    A GPU that does the work and cannot be measured gives no reader at all: the CPU's joules beside it would mislead.
    """
    wanted = str(torch_device) if torch_device is not None else None
    flags: tuple[str, ...] = ()
    if wanted is None or wanted.startswith("cuda"):
        try:
            found = _find_gpus(wanted)
        except (SourceUnavailableError, ReadError) as error:
            flags = (f"nvml_unavailable:{error}",)
            if gpu_host():
                return Found(readers=(), flags=flags)
        else:
            if found.readers or found.flags:
                return found
    if allow_cpu and wanted in (None, "cpu"):
        return Found(readers=(_cpu_reader(cpu_parallel),))
    return Found(readers=(), flags=(*flags, "no_device"))


def power_limit_w(torch_device: object = "cuda:0") -> float | None:
    """Enforced power limit of a GPU that this process was given; None where it cannot be read."""
    readers = find_readers(torch_device=torch_device, allow_cpu=False).readers
    return readers[0].info.power_limit_w if readers else None


def _find_gpus(wanted: str | None) -> Found:
    nvml = Nvml()
    given = assigned(nvml)
    uuids = given.uuids
    if wanted is not None:
        index = int(wanted.partition(":")[2] or 0)
        uuids = uuids[index : index + 1]
    readers: list[DeviceReader] = []
    flags: list[str] = []
    for uuid in uuids:
        try:
            readers.append(nvml.open(uuid))
        except ReadError as error:
            flags.append(f"gpu_unreadable:{uuid}:{error}")
    if readers:
        flags.extend(given.flags)
    return Found(readers=tuple(readers), flags=tuple(flags), shared=given.shared)


def _cpu_reader(parallel: int) -> DeviceReader:
    """RAPL counts a whole package, so it serves one trial at a time; otherwise CPU time is all there is."""
    if parallel == 1:
        with contextlib.suppress(SourceUnavailableError, ReadError):
            return RaplReader()
    return CpuTimeReader()
