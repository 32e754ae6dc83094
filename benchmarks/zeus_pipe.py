"""zeus 0.16 in a process of its own, told over pipes when a window begins and ends.

    PYTHONPATH=zeus-0.16.0-py3-none-any.whl python benchmarks/zeus_pipe.py      # the other end

Of zeus's requirements pandas, pydantic, rich and nvidia-ml-py must be importable there. scikit-learn (one trapezoid of
its power monitor) and httpx (its daemon) are stood in for where they are missing; tyro and amdsmi are never imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


class Zeus:
    """This end of the pipes.

    Raises:
        RuntimeError: zeus did not come up.
    """

    def __init__(self, python: str, path: str) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
        words = [python, str(Path(__file__).resolve())]
        self.child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.version = self._answer()

    def _answer(self) -> str:
        assert self.child.stdout is not None
        while True:
            line = self.child.stdout.readline()
            if not line:
                raise RuntimeError("zeus ended")
            if line.startswith("> "):
                return line[2:].strip()

    def _ask(self, text: str) -> str:
        assert self.child.stdin is not None
        self.child.stdin.write(text + "\n")
        self.child.stdin.flush()
        return self._answer()

    def begin(self, key: str) -> None:
        """Begin a window."""
        self._ask(f"begin {key}")

    def end(self, key: str) -> float:
        """End a window; its joules."""
        return float(self._ask(f"end {key}"))

    def close(self) -> None:
        """Let the process go."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(10)


def stand_in() -> None:
    """Modules that zeus imports and does not need for its energy windows."""
    try:
        import sklearn.metrics
    except ImportError:
        sklearn: Any = types.ModuleType("sklearn")
        metrics: Any = types.ModuleType("sklearn.metrics")
        metrics.auc = lambda x, y: float(np.trapezoid(y, x))
        sklearn.metrics = metrics
        sys.modules["sklearn"], sys.modules["sklearn.metrics"] = sklearn, metrics
    try:
        import httpx  # noqa: F401
    except ImportError:
        stub: Any = types.ModuleType("httpx")
        stub.Client = stub.HTTPTransport = stub.Timeout = object
        sys.modules["httpx"] = stub


def version() -> str:
    """zeus's version; a wheel on the path has no installed metadata of its own."""
    try:
        return importlib.metadata.version("zeus")
    except importlib.metadata.PackageNotFoundError:
        import zeus

        return str(zeus.__version__)


def serve() -> None:
    """Answer `begin KEY` and `end KEY` until the pipe closes."""
    stand_in()
    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(gpu_indices=[0])
    print(f"> {version()}", flush=True)
    for line in sys.stdin:
        verb, key = line.split()
        if verb == "begin":
            monitor.begin_window(key, sync_execution=False)
            print("> ok", flush=True)
        else:
            joules = sum(monitor.end_window(key, sync_execution=False).gpu_energy.values())
            print(f"> {joules}", flush=True)


if __name__ == "__main__":
    serve()
