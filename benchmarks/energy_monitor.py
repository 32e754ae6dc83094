"""Accuracy and cost of `hwcost.EnergyMonitor` on a real GPU: one line per bar, about four minutes on an H200.

    python benchmarks/energy_monitor.py --out DIR [--parts fields,raw,bursts,zeus,slowdown,compiled] [--zeus-path WHEEL]

Prints one line per bar at the end and writes `results.json` (after each part) and `raw.npz`, the driver's raw readings
under a known load, to DIR. zeus runs in a process of its own (`zeus_pipe.py`): `--zeus-python` and `--zeus-path` name
an interpreter and an import path with zeus 0.16 (its plain wheel will do). Further parts: `launch` (a launch-bound
step), `python` (a loop that holds the interpreter's lock).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))

from benchmarks import monitor_cost  # noqa: E402
from benchmarks.zeus_pipe import Zeus  # noqa: E402

# -- load ------------------------------------------------------------------------------------------------------


class Gemm:
    """Back-to-back bf16 matrix products of random tensors; the queue holds a few milliseconds of work."""

    def __init__(self, n: int = 8192) -> None:
        import torch

        self.torch = torch
        self.a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
        self.b = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
        self.c = torch.empty_like(self.a)
        self.count = 0
        self._each_s: float | None = None

    def ahead(self, seconds: float) -> None:
        """Leave about so much work in the queue, and do not wait for it."""
        for _ in range(max(1, round(seconds / self.each_s()))):
            self.torch.matmul(self.a, self.b, out=self.c)
            self.count += 1

    def each_s(self) -> float:
        """Seconds of one product under load."""
        if self._each_s is None:
            before = self.count
            start_s = time.monotonic()
            self.run(0.3)
            self._each_s = (time.monotonic() - start_s) / (self.count - before)
        return self._each_s

    def run(self, seconds: float) -> None:
        """Keep the GPU busy until `seconds` from now; returns with an empty queue."""
        end = time.monotonic() + seconds
        fence = self.torch.cuda.Event()
        fence.record()
        while time.monotonic() < end:
            for _ in range(2):
                self.torch.matmul(self.a, self.b, out=self.c)
            self.count += 2
            after = self.torch.cuda.Event()
            after.record()
            fence.synchronize()
            fence = after
        self.torch.cuda.synchronize()


# -- raw readings (a process of its own) -----------------------------------------------------------------------


def record(path: str, seconds: float) -> None:
    """Poll counter, instant power, average power and the ring as fast as they answer, and store all of it."""
    import pynvml

    from hwcost.nvml import Nvml

    nvml = Nvml()
    from hwcost.devices import assigned

    handle = nvml.handle_of(assigned(nvml).uuids[0])
    rows, ring, fields = [], [], []
    since, next_ring, end = 0, 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        t0 = time.monotonic()
        counter = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        t1 = time.monotonic()
        values = pynvml.nvmlDeviceGetFieldValues(handle, [186, 185])
        t2 = time.monotonic()
        fields.append([values[0].timestamp, values[0].latencyUsec, time.time()])
        usage = pynvml.nvmlDeviceGetPowerUsage(handle)
        rows.append([t0, t1, counter, t2, values[0].value.uiVal, values[1].value.uiVal, usage, time.monotonic()])
        if t2 > next_ring:
            next_ring = t2 + 0.4
            r0 = time.monotonic()
            with contextlib.suppress(Exception):
                _, samples = pynvml.nvmlDeviceGetSamples(handle, 0, since)
                offset = time.time() - time.monotonic()
                cost = time.monotonic() - r0
                ring += [[s.timeStamp, s.sampleValue.uiVal, offset, time.monotonic(), cost] for s in samples]
                since = max((s.timeStamp for s in samples), default=since)
    np.savez_compressed(
        path, rows=np.array(rows), ring=np.array(ring, dtype=float), fields=np.array(fields, dtype=float)
    )


def part_raw(out: Path, results: dict[str, Any]) -> None:
    """The driver's readings under bursts whose edges are known."""
    gemm = Gemm()
    gemm.run(0.5)
    child = subprocess.Popen([sys.executable, str(HERE), "--record", str(out / "raw.npz"), "11"], env=os.environ.copy())
    time.sleep(3.5)
    marks = []
    rng = random.Random(0)
    while child.poll() is None and len(marks) < 10:
        length = rng.choice([0.05, 0.15, 0.3, 0.6, 1.0])
        start = time.monotonic()
        gemm.run(length)
        marks.append((start, time.monotonic()))
        time.sleep(rng.choice([0.1, 0.25, 0.5]))
    child.wait(30)
    raw = dict(np.load(out / "raw.npz"))
    np.savez_compressed(out / "raw.npz", marks=np.array(marks), **raw)
    rows = raw["rows"]
    changes = np.flatnonzero(np.diff(rows[:, 2]))
    steps = (rows[changes, 0] + rows[changes + 1, 1]) / 2
    power_changes = rows[np.flatnonzero(np.diff(rows[:, 4])) + 1, 3]
    ring = raw["ring"]
    results["raw"] = {
        "counter_read_ms": 1e3 * float(np.median(rows[:, 1] - rows[:, 0])),
        "counter_period_ms": 1e3 * float(np.median(np.diff(steps))),
        "counter_period_spread_ms": 1e3 * float(np.std(np.diff(steps))),
        "instant_and_average_read_us": 1e6 * float(np.median(rows[:, 3] - rows[:, 1])),
        "instant_period_ms": 1e3 * float(np.median(np.diff(power_changes))),
        "ring_samples": len(ring),
        "ring_spacing_ms": 1e-3 * float(np.median(np.diff(ring[:, 0]))) if len(ring) > 1 else None,
        "ring_read_ms": 1e3 * float(np.median(ring[:, 4])) if len(ring) else None,
        "ring_lag_ms": 1e3 * float(np.median(ring[:, 3] + ring[:, 2] - ring[:, 0] / 1e6)) if len(ring) else None,
    }


def part_fields(out: Path, results: dict[str, Any]) -> None:
    """What each field costs and how often it changes, as the package's own probe says."""
    from hwcost.devices import assigned
    from hwcost.nvml import Nvml
    from hwcost.probe import probe_fields

    nvml = Nvml()
    reader = nvml.open(assigned(nvml).uuids[0])
    results["device"] = reader.info.__dict__ if hasattr(reader.info, "__dict__") else str(reader.info)
    results["fields"] = [
        {
            "field": f.field,
            "value": str(f.value),
            "cost_us": 1e6 * f.cost_s if f.cost_s is not None else None,
            "period_s": f.period_s,
            "reason": f.reason,
        }
        for f in probe_fields(reader, seconds=1.5)
    ]


# -- accuracy --------------------------------------------------------------------------------------------------


class Counter:
    """The bare counter, read at its own steps: a reference that owes nothing to the monitor."""

    def __init__(self) -> None:
        from hwcost.devices import assigned
        from hwcost.nvml import Nvml

        nvml = Nvml()
        self.reader = nvml.open(assigned(nvml).uuids[0])

    def read(self) -> float:
        return self.reader.energy_j()

    def at_step(self) -> tuple[float, float]:
        """Wait for the next step: its time and the joules then."""
        before = self.reader.energy_j()
        while True:
            t0 = time.monotonic()
            now = self.reader.energy_j()
            if now != before:
                return t0, now


BURSTS = 18


def spread(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)


def part_zeus(out: Path, results: dict[str, Any], options: argparse.Namespace) -> None:
    """1 s windows, and 10 s windows that overlap, on the same spans as zeus where it can be had."""
    from hwcost import EnergyMonitor

    zeus: Zeus | None = None
    try:
        zeus = Zeus(options.zeus_python, options.zeus_path)
        results["zeus_version"] = zeus.version
    except Exception as error:
        results["zeus_error"] = repr(error)
    gemm, counter = Gemm(), Counter()
    with EnergyMonitor.for_assigned_devices(torch_device="cuda:0") as monitor:
        gemm.run(3.0)
        results["steady_1s"] = _steady(gemm, counter, monitor, zeus)
        results["steady_sum"] = _sum(gemm, counter, monitor)
        results["ten_s"] = _ten(gemm, monitor, zeus)
    if zeus:
        zeus.close()


def _steady(gemm: Gemm, counter: Counter, monitor: Any, zeus: Zeus | None) -> dict[str, Any]:
    """1 s windows of a steady load: ours, zeus's, and bare counter differences."""
    theirs, plain, windows = [], [], []
    for i in range(20):
        p0 = counter.read()
        if zeus:
            zeus.begin(f"s{i}")
        with monitor.window("steady") as window:
            gemm.run(1.0)
        if zeus:
            theirs.append(zeus.end(f"s{i}"))
        plain.append(counter.read() - p0)
        windows.append(window)
    found = [w.measurement for w in windows]
    return {
        "spread_power": spread([m.energy_j / m.duration_s for m in found]),
        "spread_joules": spread([m.energy_j for m in found]),
        "ours_j": [m.energy_j for m in found],
        "sigma_j": [m.uncertainty_j for m in found],
        "integral_j": [m.integral_j for m in found],
        "plain_spread": spread(plain),
        "flags": sorted({f for m in found for f in m.flags}),
        "zeus_spread": spread(theirs) if theirs else None,
        "zeus_j": theirs,
        "spread_over_zeus": spread([m.energy_j for m in found]) / spread(theirs) if theirs else None,
    }


def _sum(gemm: Gemm, counter: Counter, monitor: Any) -> dict[str, Any]:
    """1 s windows that touch: their sum against the counter over the whole, read at its own steps while work is queued
    (an idle wait for a step would be charged at the load's watts)."""
    gemm.ahead(0.15)
    t_start, j_start = counter.at_step()
    windows = []
    for _ in range(8):
        with monitor.window("sum") as window:
            gemm.run(1.0)
        windows.append(window)
    gemm.ahead(0.15)
    t_end, j_end = counter.at_step()
    total = sum(w.measurement.energy_j for w in windows)
    outside_s = (t_end - t_start) - (windows[-1].end_s - windows[0].start_s)
    watts = (j_end - j_start) / (t_end - t_start)
    return {
        "windows_j": total,
        "counter_j": j_end - j_start,
        "counter_span_s": t_end - t_start,
        "outside_s": outside_s,
        "error": total / (j_end - j_start - watts * outside_s) - 1,
    }


def _ten(gemm: Gemm, monitor: Any, zeus: Zeus | None) -> dict[str, Any]:
    """20 windows of 10 s on the same spans as zeus; they overlap, a new one begins every 0.75 s."""
    waiting: list[tuple[int, Any]] = []
    pairs = []
    for i in range(34):
        if i < 20:
            if zeus:
                zeus.begin(f"t{i}")
            window = monitor.window("ten")
            window.__enter__()
            waiting.append((i, window))
        gemm.run(0.73 + 0.009 * (i % 8))
        if len(waiting) == 14 or i >= 20:
            j, window = waiting.pop(0)
            window.__exit__(None, None, None)
            pairs.append((window, zeus.end(f"t{j}") if zeus else None))
        if not waiting:
            break
    ours = [w.measurement.energy_j for w, _ in pairs]
    theirs = [z for _, z in pairs if z is not None]
    seconds = [w.measurement.duration_s for w, _ in pairs]
    return {
        "windows": len(pairs),
        "ours_j": ours,
        "zeus_j": theirs,
        "seconds": seconds,
        "difference": statistics.mean(ours) / statistics.mean(theirs) - 1 if theirs else None,
        "spread_power": spread([j / s for j, s in zip(ours, seconds, strict=True)]),
    }


def part_bursts(out: Path, results: dict[str, Any]) -> None:
    """1.14 s bursts with pauses of 0.5 s (jittered, so that the counter's phase is random)."""
    import threading

    import pynvml

    from hwcost import EnergyMonitor

    gemm, counter = Gemm(), Counter()
    rng = random.Random(1)
    usage: list[tuple[float, float]] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.05):
            usage.append((time.monotonic(), pynvml.nvmlDeviceGetPowerUsage(counter.reader.handle) / 1e3))

    with EnergyMonitor.for_assigned_devices(torch_device="cuda:0") as monitor:
        gemm.run(3.0)
        thread = threading.Thread(target=poll)
        thread.start()
        time.sleep(0.5)
        t0, j0 = counter.at_step()
        windows, plain, pauses = [], [], []
        with monitor.window("whole") as whole:
            for _ in range(BURSTS):
                p = counter.read()
                with monitor.window("burst") as window:
                    gemm.run(1.14)
                plain.append(counter.read() - p)
                windows.append(window)
                with monitor.window("pause") as pause:
                    time.sleep(0.45 + 0.1 * rng.random())
                pauses.append(pause)
        t1, j1 = counter.at_step()
        stop.set()
        thread.join()
        time.sleep(1.0)
        q0, i0 = counter.at_step()
        time.sleep(3.0)
        q1, i1 = counter.at_step()
        idle_w = (i1 - i0) / (q1 - q0)
        ours = [w.measurement.energy_j for w in windows]
        t, p = np.array(usage).T
        average = []
        for w in windows:
            grid = np.linspace(w.start_s, w.end_s, 500)
            average.append(float(np.trapezoid(np.interp(grid, t, p), grid)))
        ring = [w.measurement.integral_j for w in windows]
        busy_s = sum(w.end_s - w.start_s for w in windows)
        long_run = (j1 - j0 - idle_w * (t1 - t0 - busy_s)) / len(windows)
        mean = statistics.mean(ours)
        results["bursts"] = {
            "ours_j": ours,
            "plain_j": plain,
            "average_power_j": average,
            "integral_j": ring,
            "pause_j": [w.measurement.energy_j for w in pauses],
            "seconds": [w.end_s - w.start_s for w in windows],
            "whole_j": whole.measurement.energy_j,
            "counter_whole_j": j1 - j0,
            "counter_span_s": t1 - t0,
            "sigma_j": [w.measurement.uncertainty_j for w in windows],
            "worst_against_own_mean": max(abs(x / mean - 1) for x in ours),
            "idle_w": idle_w,
            "long_run_j": long_run,
            "worst_against_long_run": max(abs(x / long_run - 1) for x in ours),
            "spread": spread(ours),
            "plain_worst": max(abs(x / long_run - 1) for x in plain),
            "average_power_error": statistics.mean(average) / long_run - 1,
            "flags": sorted({f for w in windows for f in w.measurement.flags}),
        }


# -- together --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def caught(name: str, results: dict[str, Any]) -> Iterator[None]:
    begin = time.monotonic()
    try:
        yield
    except Exception:
        traceback.print_exc()
        results.setdefault("failed", {})[name] = traceback.format_exc().splitlines()[-1]
    print(f"[{name}: {time.monotonic() - begin:.1f} s]", flush=True)


def part_cost(name: str, results: dict[str, Any]) -> None:
    """A paired slow-down."""
    results[name] = monitor_cost.CASES[name]()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the summary: what was measured, and the bar; None: no bar, only shown beside one."""

    what: str
    value: float | None
    bar: float | None = None
    error: float | None = None

    def __str__(self) -> str:
        shown = "-" if self.value is None else f"{self.value:.3%}"
        shown += f" ± {self.error:.3%}" if self.error is not None else ""
        if self.bar is None:
            return f"{self.what:56} {shown:>20}"
        return f"{self.what:56} {shown:>20}   bar {self.bar:.1%}   {self.verdict}"

    @property
    def verdict(self) -> str:
        """What the bar says; with a standard error the whole 95 % interval has to say it."""
        if self.value is None or self.bar is None:
            return "not measured"
        reach = 1.96 * (self.error or 0.0)
        if self.value - reach > self.bar:
            return "MISSED"
        if self.error is not None and self.value + reach < -self.bar:
            return "BIASED: faster with a monitor than without"
        return "met" if self.value + reach <= self.bar else "no answer: the interval spans the bar"


def summary(results: dict[str, Any]) -> list[Line]:
    """Every bar, and what stands beside it."""

    def get(*keys: str) -> Any:
        value: Any = results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def size(*keys: str) -> float | None:
        value = get(*keys)
        return None if value is None else abs(value)

    def slower(part: str, what: str, bar: float | None = 0.005) -> Line:
        return Line(what=what, value=get(part, "mean"), bar=bar, error=get(part, "standard_error"))

    return [
        Line(what="1 s windows, spread of watts", value=get("steady_1s", "spread_power"), bar=0.03),
        Line(what="  plain counter differences", value=get("steady_1s", "plain_spread")),
        Line(what="  zeus (joules)", value=get("steady_1s", "zeus_spread")),
        Line(what="  ours over zeus's (joules)", value=get("steady_1s", "spread_over_zeus"), bar=1.0),
        Line(what="sum of 1 s windows against the counter", value=size("steady_sum", "error"), bar=0.005),
        Line(
            what="1.14 s bursts, worst against the long-run mean burst",
            value=get("bursts", "worst_against_long_run"),
            bar=0.03,
        ),
        Line(what="  worst against their own mean", value=get("bursts", "worst_against_own_mean")),
        Line(what="  plain counter difference, worst", value=get("bursts", "plain_worst")),
        Line(what="  1 s average power, mean error", value=get("bursts", "average_power_error")),
        Line(what="10 s windows against zeus, means of 20", value=size("ten_s", "difference"), bar=0.005),
        slower("slowdown", "slow-down, eager 16 x 1024"),
        slower("compiled", "slow-down, compiled 16 x 1024"),
        slower("launch", "  launch-bound 2 x 128", None),
        slower("python", "  a loop that holds the interpreter's lock", None),
        Line(what="  CPU share of the sampler", value=get("python", "sampler_cpu_share")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".")
    parser.add_argument("--parts", default="fields,raw,bursts,zeus,slowdown,compiled")
    parser.add_argument("--zeus-python", default=sys.executable)
    parser.add_argument("--zeus-path", default="")
    parser.add_argument("--record", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        return record(options.record[0], float(options.record[1]))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    parts: dict[str, Callable[[], None]] = {
        "fields": lambda: part_fields(out, results),
        "raw": lambda: part_raw(out, results),
        "bursts": lambda: part_bursts(out, results),
        "zeus": lambda: part_zeus(out, results, options),
    }
    parts |= {name: functools.partial(part_cost, name, results) for name in monitor_cost.CASES}
    for name in options.parts.split(","):
        with caught(name, results):
            parts[name]()
        (out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    shown = ("device", "fields", "raw", "failed", "zeus_version", "zeus_error")
    print(json.dumps({name: results.get(name) for name in shown}, indent=1, default=str))
    for line in summary(results):
        print(line)
    return None


if __name__ == "__main__":
    main()
