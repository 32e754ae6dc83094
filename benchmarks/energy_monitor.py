"""Accuracy and cost of `hwcost.EnergyMonitor` on a real GPU.

    python benchmarks/energy_monitor.py --out DIR [--parts fields,raw,bursts,zeus,slowdown,python,compiled]

Prints one line per bar at the end and writes `results.json` (and `raw.npz`, the driver's raw readings under a known
load) to DIR. zeus runs in a process of its own: `--zeus-python` and `--zeus-path` name an interpreter and an import
path with zeus 0.16.
"""

from __future__ import annotations

import argparse
import contextlib
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
PERIOD_S = 0.25  # the monitor's default
sys.path.insert(0, str(HERE.parent.parent))


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
    child = subprocess.Popen([sys.executable, str(HERE), "--record", str(out / "raw.npz"), "14"], env=os.environ.copy())
    time.sleep(3.5)
    marks = []
    rng = random.Random(0)
    while child.poll() is None and len(marks) < 12:
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


class Zeus:
    """zeus in a process of its own, told over pipes when a window begins and ends."""

    def __init__(self, python: str, path: str) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
        self.child = subprocess.Popen(
            [python, str(HERE), "--serve-zeus"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
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
        self._ask(f"begin {key}")

    def end(self, key: str) -> float:
        return float(self._ask(f"end {key}"))

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(10)


def serve_zeus() -> None:
    """The other end of `Zeus`."""
    import types

    try:
        import sklearn.metrics
    except ImportError:  # zeus needs scikit-learn for one trapezoid, of its power monitor only
        sklearn: Any = types.ModuleType("sklearn")
        metrics: Any = types.ModuleType("sklearn.metrics")
        metrics.auc = lambda x, y: float(np.trapezoid(y, x))
        sklearn.metrics = metrics
        sys.modules["sklearn"], sys.modules["sklearn.metrics"] = sklearn, metrics
    try:
        import httpx
    except ImportError:  # used only to talk to zeus's daemon
        httpx: Any = types.ModuleType("httpx")
        httpx.Client = httpx.HTTPTransport = httpx.Timeout = object
        sys.modules["httpx"] = httpx
    import importlib.metadata

    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(gpu_indices=[0])
    try:
        version = importlib.metadata.version("zeus")
    except importlib.metadata.PackageNotFoundError:
        import zeus

        version = zeus.__version__
    print(f"> {version}", flush=True)
    for line in sys.stdin:
        verb, key = line.split()
        if verb == "begin":
            monitor.begin_window(key, sync_execution=False)
            print("> ok", flush=True)
        else:
            joules = sum(monitor.end_window(key, sync_execution=False).gpu_energy.values())
            print(f"> {joules}", flush=True)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)


def part_zeus(out: Path, results: dict[str, Any], options: argparse.Namespace) -> None:
    """1 s windows back to back, and 10 s windows that overlap, on the same spans as zeus where it can be had."""
    from hwcost import EnergyMonitor

    zeus: Zeus | None = None
    try:
        zeus = Zeus(options.zeus_python, options.zeus_path)
        results["zeus_version"] = zeus.version
    except Exception as error:
        results["zeus_error"] = repr(error)
    gemm, counter = Gemm(), Counter()
    with EnergyMonitor.for_assigned_devices(torch_device="cuda:0") as monitor:
        gemm.run(5.0)
        ours, theirs, plain, flags = [], [], [], set()
        t_start, j_start = counter.at_step()
        windows = []
        first_s = None
        for i in range(20):
            p0 = counter.read()
            if zeus:
                zeus.begin(f"s{i}")
            with monitor.window("steady") as window:
                gemm.run(1.0)
            if zeus:
                theirs.append(zeus.end(f"s{i}"))
            plain.append(counter.read() - p0)
            first_s = first_s or window.start_s
            windows.append(window)
        gemm.run(0.1)
        t_end, j_end = counter.at_step()
        results["steady_pipes"] = "windows separated by zeus's reads"
        ours = [w.measurement.energy_j for w in windows]
        flags = {f for w in windows for f in w.measurement.flags}
        seconds = [w.measurement.duration_s for w in windows]
        watts = [j / s for j, s in zip(ours, seconds, strict=True)]
        results["steady_1s"] = {
            "spread_power": spread(watts),
            "spread_joules": spread(ours),
            "ours_j": ours,
            "sigma_j": [w.measurement.uncertainty_j for w in windows],
            "integral_j": [w.measurement.integral_j for w in windows],
            "plain_spread": spread(plain),
            "flags": sorted(flags),
            "zeus_spread": spread(theirs) if theirs else None,
            "zeus_j": theirs,
        }
        # back to back without anything in between: their sum against the counter over the whole
        t_start, j_start = counter.at_step()
        windows = []
        for _ in range(10):
            with monitor.window("steady") as window:
                gemm.run(1.0)
            windows.append(window)
        gemm.run(0.05)
        t_end, j_end = counter.at_step()
        total = sum(w.measurement.energy_j for w in windows)
        inside = windows[-1].end_s - windows[0].start_s
        watt = (j_end - j_start) / (t_end - t_start)
        results["steady_sum"] = {
            "windows_j": total,
            "counter_j": j_end - j_start,
            "counter_span_s": t_end - t_start,
            "windows_span_s": inside,
            "error": total / (j_end - j_start - watt * ((t_end - t_start) - inside)) - 1,
        }
        ledger = monitor.ledger()["steady"]
        results["ledger"] = {"energy_j": ledger.energy_j, "windows": ledger.windows}
        # 10 s windows that overlap, a new one every 1.5 s
        open_windows: list[tuple[int, Any]] = []
        pairs = []
        for i in range(27):
            if i < 20:
                if zeus:
                    zeus.begin(f"t{i}")
                window = monitor.window("ten")
                window.__enter__()
                open_windows.append((i, window))
            gemm.run(1.45 + 0.013 * (i % 8))
            if len(open_windows) == 7 or i >= 20:
                j, window = open_windows.pop(0)
                window.__exit__(None, None, None)
                pairs.append((window, zeus.end(f"t{j}") if zeus else None))
            if not open_windows:
                break
        ours = [w.measurement.energy_j for w, _ in pairs]
        theirs = [z for _, z in pairs if z is not None]
        seconds = [w.measurement.duration_s for w, _ in pairs]
        results["ten_s"] = {
            "windows": len(pairs),
            "ours_j": ours,
            "zeus_j": theirs,
            "seconds": seconds,
            "difference": statistics.mean(ours) / statistics.mean(theirs) - 1 if theirs else None,
            "spread_power": spread([j / s for j, s in zip(ours, seconds, strict=True)]),
        }
    if zeus:
        zeus.close()


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
            for _ in range(20):
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


# -- cost ------------------------------------------------------------------------------------------------------


def steps(batch: int, seq_len: int, compiled: bool) -> Callable[[], None]:
    """A training step of DistilGPT2's architecture (bf16 autocast, fused AdamW)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=6, n_head=12, n_embd=768, loss_type="ForCausalLM")
    model: Any = GPT2LMHeadModel(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randint(0, config.vocab_size, (batch, seq_len), device="cuda")
    call = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = call(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def paired(step: Callable[[], None], pairs: int, seconds: float, period_s: float) -> dict[str, Any]:
    """Seconds a step without (A) and with (B) a monitor and an open window, in turn."""
    import torch

    from hwcost import EnergyMonitor

    for _ in range(20):
        step()
    torch.cuda.synchronize()
    begin = time.monotonic()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    count = max(5, int(seconds / ((time.monotonic() - begin) / 20)))

    def timed() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    slow = []
    base = []
    for i in range(pairs):
        order = "AB" if i % 2 == 0 else "BA"
        got = {}
        for which in order:
            monitor = EnergyMonitor.for_assigned_devices(torch_device="cuda:0", period_s=period_s)
            if which == "A":
                monitor.close()  # the same pause before both: a GPU at its power limit runs faster after one
                got["A"] = timed()
                continue
            with monitor, monitor.window("train"):
                got["B"] = timed()
        slow.append(got["B"] / got["A"] - 1)
        base.append(got["A"])
    return {
        "step_ms": 1e3 * statistics.median(base),
        "steps": count,
        "pairs": pairs,
        "slowdowns": slow,
        "mean": statistics.mean(slow),
        "median": statistics.median(slow),
        "standard_error": statistics.stdev(slow) / len(slow) ** 0.5,
    }


def part_slowdown(out: Path, results: dict[str, Any]) -> None:
    results["slowdown_eager_16x1024"] = paired(steps(16, 1024, False), 10, 1.2, PERIOD_S)
    results["slowdown_launch_bound_2x128"] = paired(steps(2, 128, False), 10, 0.9, PERIOD_S)


def part_python(out: Path, results: dict[str, Any]) -> None:
    """The worst case: a thread that only holds the interpreter's lock. And the CPU time of the sampler itself."""
    import torch

    from hwcost import EnergyMonitor

    torch.zeros(1, device="cuda")

    def count(seconds: float) -> float:
        loops, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            sum(range(200))
            loops += 1
        return loops / seconds

    slow = []
    for i in range(16):
        got = {}
        for which in "AB" if i % 2 == 0 else "BA":
            if which == "A":
                got["A"] = count(0.4)
                continue
            monitor = EnergyMonitor.for_assigned_devices(torch_device="cuda:0", period_s=PERIOD_S)
            with monitor, monitor.window("train"):
                got["B"] = count(0.4)
        slow.append(got["A"] / got["B"] - 1)
    with (
        EnergyMonitor.for_assigned_devices(torch_device="cuda:0", period_s=PERIOD_S) as monitor,
        monitor.window("sleep"),
    ):
        before = time.process_time()
        time.sleep(4.0)
        cpu = (time.process_time() - before) / 4.0
    results["slowdown_python_loop"] = {
        "mean": statistics.mean(slow),
        "median": statistics.median(slow),
        "standard_error": statistics.stdev(slow) / len(slow) ** 0.5,
        "slowdowns": slow,
    }
    results["sampler_cpu_share"] = cpu


def part_compiled(out: Path, results: dict[str, Any]) -> None:
    results["slowdown_compiled_16x1024"] = paired(steps(16, 1024, True), 10, 1.0, PERIOD_S)


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


def summary(results: dict[str, Any]) -> list[tuple[str, float | None, float]]:
    """(what, measured, bar) of every bar."""

    def get(*keys: str) -> Any:
        value: Any = results
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    ten = get("ten_s", "difference")
    total = get("steady_sum", "error")
    return [
        ("1 s windows, spread of watts", get("steady_1s", "spread_power"), 0.03),
        ("  the same of zeus (joules)", get("steady_1s", "zeus_spread"), float("nan")),
        ("  the same of plain counter differences", get("steady_1s", "plain_spread"), float("nan")),
        ("sum of 1 s windows against the counter", abs(total) if total is not None else None, 0.005),
        ("1.14 s bursts, worst against own mean", get("bursts", "worst_against_own_mean"), 0.03),
        ("1.14 s bursts, worst against the long-run mean burst", get("bursts", "worst_against_long_run"), 0.03),
        ("  plain counter difference, worst", get("bursts", "plain_worst"), float("nan")),
        ("  1 s average power, mean error", get("bursts", "average_power_error"), float("nan")),
        ("10 s windows against zeus", abs(ten) if ten is not None else None, 0.005),
        ("slow-down eager 16x1024", get("slowdown_eager_16x1024", "mean"), 0.005),
        ("slow-down launch-bound 2x128", get("slowdown_launch_bound_2x128", "mean"), 0.005),
        ("slow-down of a loop that holds the interpreter's lock", get("slowdown_python_loop", "mean"), float("nan")),
        ("  CPU share of the sampler", get("sampler_cpu_share"), float("nan")),
        ("slow-down compiled 16x1024", get("slowdown_compiled_16x1024", "mean"), 0.005),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".")
    parser.add_argument("--parts", default="fields,raw,bursts,zeus,slowdown,python,compiled")
    parser.add_argument("--zeus-python", default=sys.executable)
    parser.add_argument("--zeus-path", default="")
    parser.add_argument("--record", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve-zeus", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        return record(options.record[0], float(options.record[1]))
    if options.serve_zeus:
        return serve_zeus()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    parts: dict[str, Callable[[], None]] = {
        "fields": lambda: part_fields(out, results),
        "raw": lambda: part_raw(out, results),
        "bursts": lambda: part_bursts(out, results),
        "zeus": lambda: part_zeus(out, results, options),
        "slowdown": lambda: part_slowdown(out, results),
        "python": lambda: part_python(out, results),
        "compiled": lambda: part_compiled(out, results),
    }
    for name in options.parts.split(","):
        with caught(name, results):
            parts[name]()
        (out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    print(
        json.dumps(
            {k: results.get(k) for k in ("device", "fields", "raw", "failed", "zeus_version", "zeus_error")},
            indent=1,
            default=str,
        )
    )
    print(f"{'what':56} {'measured':>10} {'bar':>8}")
    for what, value, bar in summary(results):
        print(
            f"{what:56} {'-' if value is None else format(value, '10.4%')} {'' if bar != bar else format(bar, '8.2%')}"
        )
    return None


if __name__ == "__main__":
    main()
