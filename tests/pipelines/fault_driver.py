"""Starts drivers for the fault tests: `joulemoe` in processes of their own, forked from one that has imported it all.

Reads JSON lines: {"run": [words of the command line], "log": path} is answered by the process's id; {"wait": id,
"timeout_s": seconds} by its exit code (negative: the signal that ended it, null: it has not ended).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import matplotlib.pyplot  # noqa: F401 - what a driver needs is imported before the fork
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

import pipelines.actor
import pipelines.figures
import pipelines.report
import pipelines.sweep  # noqa: F401
from pipelines import cli


def main() -> None:
    """Answer until the pipe closes."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = _run(request) if "run" in request else _wait(request)
        print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(os.path.dirname(request["log"]))  # where the report of a sweep on an object store goes
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["joulemoe", *request["run"]]
    cli.main()
    sys.exit(0)


def _wait(request: dict[str, Any]) -> int | None:
    deadline = time.monotonic() + request["timeout_s"]
    while time.monotonic() < deadline:
        pid, status = os.waitpid(request["wait"], os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    main()
