"""Who else is on a device: NVML's process list against our own family of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hwcost.readers import ProcessUse

PROC = Path("/proc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occupancy:
    """Processes with a context on a device, and how many of them are not ours."""

    total: int
    others: int
    flags: tuple[str, ...] = ()


def own_process_uses_cuda() -> bool:
    """Whether this process holds a CUDA context through torch."""
    torch = sys.modules.get("torch")
    with contextlib.suppress(Exception):
        return torch is not None and bool(torch.cuda.is_initialized())
    return False


def occupancy(processes: object, *, uses_cuda: bool | None = None) -> Occupancy | None:
    """Count the processes that are not ours; None when the list could not be read.

    Inside a container NVML may list the ids of the host. A process that holds a context but does not find itself in the
    list takes one entry to be itself.
    """
    if processes is None:
        return None
    pids = [use.pid for use in cast(Sequence[ProcessUse], processes)]
    ours = [pid for pid in pids if _is_ours(pid)]
    hidden = not ours and bool(pids) and (own_process_uses_cuda() if uses_cuda is None else uses_cuda)
    others = len(pids) - len(ours) - int(hidden)
    flags: tuple[str, ...] = ()
    if others > 0:
        foreign = not hidden and any(not _same_user(pid) for pid in pids if pid not in ours)
        flags = ("shared", "foreign_process") if foreign else ("shared",)
    return Occupancy(total=len(pids), others=others, flags=flags)


def _is_ours(pid: int) -> bool:
    """Whether a process is this one or descends from it."""
    me = os.getpid()
    for _ in range(64):
        if pid == me:
            return True
        parent = _parent(pid)
        if parent is None or parent <= 1:
            return False
        pid = parent
    return False


def _parent(pid: int) -> int | None:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _same_user(pid: int) -> bool:
    try:
        return (PROC / str(pid)).stat().st_uid == os.getuid()
    except (OSError, AttributeError):
        return False


def synchronize() -> str | None:
    """Wait for the work this process gave to its GPUs; a failure is returned as a flag. Without a CUDA context:
    nothing.
    """
    torch = sys.modules.get("torch")
    if torch is None or not own_process_uses_cuda():
        return None
    try:
        current = torch.cuda.current_device()
        for index in range(torch.cuda.device_count()):
            if (
                index == current or torch.cuda.memory_reserved(index) > 0
            ):  # synchronising makes a context where there is none
                torch.cuda.synchronize(index)
    except Exception as error:
        return f"synchronize_failed:{type(error).__name__}"
    return None
