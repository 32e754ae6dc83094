"""Named points at which a test may end this process with a real signal.

`JOULEMOE_FAULT=POINT:SIGNAL[:MARKER][:WORD]` (several with `;` between) sends SIGNAL to this process when it passes
POINT. With a MARKER (a path) it happens once over all processes: whoever creates the file first is hit. With a WORD
it happens only where the point's detail contains it. Without the variable a point costs one dictionary lookup.
`docs/reliability.md` lists the points.
"""

from __future__ import annotations

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
)


def passing(point: str, detail: str = "") -> None:
    """Say that this process passes a named point; a test may have asked for a signal here."""
    wanted = os.environ.get(VARIABLE)
    for one in wanted.split(";") if wanted else ():
        _strike(one, point, detail)


def _strike(wanted: str, point: str, detail: str) -> None:
    name, name_of_signal, marker, word = [*wanted.split(":"), "", "", ""][:4]
    if name != point or word not in detail:
        return
    if marker:
        try:
            handle = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(handle, f"{time.monotonic()} {os.getpid()}".encode())
        os.close(handle)
    os.kill(os.getpid(), signal.Signals[name_of_signal])
