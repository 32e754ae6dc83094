"""Processes that build calibration workloads side by side and run them one at a time.

Compiling a model takes half a minute and measuring it three seconds: so many processes compile at once,
hold their compiled code, and give the device's memory back until it is their turn. Only one runs at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from hwcost.points import ProbeSpec

_ATTEMPTS = 3
_STOP_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a worker says after running: calls and seconds by its own clock."""

    calls: int
    duration_s: float


class Bench:
    """Workloads of one process, by code."""

    def __init__(self, device: str) -> None:
        import torch

        from pipelines import calibrate_steps

        self._steps = calibrate_steps
        self.device = torch.device(device)
        self._workloads: dict[str, Any] = {}
        self._current: Any = None

    def prepare(self, spec: ProbeSpec) -> None:
        """Build (and compile) the workload of a spec, then free the device's memory."""
        workload = self._steps.build(spec.kind, spec.params, self.device)
        workload.park()
        self._workloads[spec.code or spec.name] = workload

    def ready(self, spec: ProbeSpec, warmup_s: float) -> dict[str, float]:
        """Put a workload on the device and warm it up; returns what it found out about itself."""
        from hwcost.probes import repeat_for

        self._current = self._workloads[spec.code or spec.name]
        self._current.unpark()
        found: dict[str, float] = self._current.configure(spec.params)
        if warmup_s > 0:
            repeat_for(self._current.run, warmup_s, self.device)
        return found

    def run(self, seconds: float) -> Ran:
        """Repeat the workload that is ready."""
        from hwcost.probes import repeat_for

        calls, duration_s = repeat_for(self._current.run, seconds, self.device)
        return Ran(calls=calls, duration_s=duration_s)

    def park(self) -> None:
        """Take the current workload off the device."""
        if self._current is not None:
            self._current.park()
            self._current = None

    def describe(self) -> dict[str, Any]:
        """The device as torch sees it; on a GPU this makes the context."""
        import torch

        if self.device.type != "cuda":
            return {"torch": torch.__version__}
        torch.zeros(1, device=self.device)
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return {"torch": torch.__version__, "memory_bytes": memory, "retry_s": _allocator_retry_s(memory // 16)}


def _allocator_retry_s(size: int) -> float:
    """Seconds of what the caching allocator does when it finds no room: wait, return cached blocks, allocate anew."""
    import torch

    took = []
    for _ in range(5):
        block = torch.empty(size, dtype=torch.uint8, device="cuda")
        del block
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda.empty_cache()
        block = torch.empty(size, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        del block
    torch.cuda.empty_cache()
    return sorted(took)[2]


def _serve(connection: Connection, device: str, threads: int) -> None:
    import torch
    import torch._inductor.config as inductor

    from pipelines.calibrate_steps import many_shapes

    inductor.compile_threads = threads
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    bench = Bench(device)
    connection.send(("ok", None))
    with many_shapes():
        while True:
            name, args = connection.recv()
            if name == "stop":
                return
            connection.send(_answer(bench, name, args))


def _answer(bench: Bench, name: str, args: Sequence[Any]) -> tuple[str, Any]:
    for attempt in range(_ATTEMPTS):
        try:
            return "ok", getattr(bench, name)(*args)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            if not lacks_memory(text) or attempt + 1 == _ATTEMPTS:
                return "error", text
            _breathe(attempt)
    raise AssertionError("unreachable")


def lacks_memory(text: str) -> bool:
    """Whether a traceback says that the device had no room (cuBLAS has words of its own for that)."""
    return "out of memory" in text.lower() or "ALLOC_FAILED" in text


def _breathe(attempt: int) -> None:
    """Another process had the memory: drop what is cached and try again a little later."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    time.sleep(3.0 * (attempt + 1))


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message ends with its traceback."""


class Worker:
    """A `Bench` in a process of its own. `ask` sends, `answer` waits, `call` does both."""

    def __init__(self, device: str, *, threads: int) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device, threads), daemon=False)
        self.process.start()
        theirs.close()
        self.waiting = 1  # the greeting

    def ask(self, name: str, *args: Any) -> None:
        self._connection.send((name, args))
        self.waiting += 1

    def has_answer(self, timeout_s: float = 0.0) -> bool:
        return self._connection.poll(timeout_s)

    def answer(self, timeout_s: float | None = None) -> Any:
        """The oldest outstanding answer.

        Raises:
            WorkerError: the worker failed, died or took longer than `timeout_s`.
        """
        try:
            if timeout_s is not None and not self._connection.poll(timeout_s):
                raise WorkerError(f"no answer within {timeout_s:.0f} s")
            state, value = self._connection.recv()
        except (EOFError, ConnectionError, OSError) as error:
            raise WorkerError(f"the worker process is gone (exit code {self.process.exitcode}): {error}") from None
        self.waiting -= 1
        if state == "error":
            raise WorkerError(value)
        return value

    def call(self, name: str, *args: Any, timeout_s: float | None = 120.0) -> Any:
        """Ask and wait for the answer; answers to earlier questions must have been taken."""
        self.ask(name, *args)
        return self.answer(timeout_s)

    def dismiss(self) -> None:
        """Tell the process to end, without waiting for it."""
        with contextlib.suppress(OSError, ValueError):
            self._connection.send(("stop", ()))

    def stop(self) -> None:
        """End the process; safe to call twice."""
        self.dismiss()
        self.process.join(_STOP_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_STOP_S)
        self._connection.close()
