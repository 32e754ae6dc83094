"""Named points at which a test may end or stop this process with a real signal, or raise a real exception.

`JOULEMOE_FAULT=POINT:ACTION[:MARKER][:WORDS]` (several with `;` between, or `@FILE` that holds them, one a line) does
ACTION when a process passes POINT: a name of a signal is sent to the process itself, anything else is the dotted name
of an exception, which is raised (`torch.OutOfMemoryError`). With a MARKER (a path) it happens once over all processes:
whoever creates the file first is hit. With WORDS (joined by `&`) it happens only where the point's detail contains them
all. Without the variable a point costs one dictionary lookup. `docs/reliability.md` lists the points.
"""

from __future__ import annotations

import importlib
import os
import signal
import time

VARIABLE = "JOULEMOE_FAULT"
POINTS = (
    "trial.begin",  # before the first report
    "train.step",  # in the middle of an epoch
    "checkpoint.write",  # files of a checkpoint are written, it is not in place yet
    "parquet.rename",  # the temporary file is whole, its name is not in place yet
    "trial.end",  # all tables are written, the driver does not know yet
    "driver.report",  # the driver has a report, MLflow does not
    "driver.end",  # the driver has a trial's row, MLflow does not
    "mlflow.write",  # a trial's run holds its parameters, not yet its metrics, tags and end
)


def passing(point: str, detail: str = "") -> None:
    """Say that this process passes a named point; a test may have asked for a fault here."""
    wanted = os.environ.get(VARIABLE)
    if wanted:
        for one in _listed(wanted):
            _strike(one, point, detail)


def _listed(wanted: str) -> list[str]:
    if not wanted.startswith("@"):
        return wanted.split(";")
    try:
        with open(wanted[1:], encoding="utf-8") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def _strike(wanted: str, point: str, detail: str) -> None:
    name, action, marker, words = [*wanted.split(":"), "", "", ""][:4]
    if name != point or not all(word in detail for word in words.split("&")):
        return
    if marker:
        try:
            handle = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(handle, f"{time.monotonic()} {os.getpid()}".encode())
        os.close(handle)
    if action in signal.Signals.__members__:
        os.kill(os.getpid(), signal.Signals[action])
    else:
        module, _, kind = action.rpartition(".")
        raise getattr(importlib.import_module(module), kind)(f"asked for at {point}")
