"""Time and joules of alternatives, interleaved: each repetition measures every alternative once, so drift cancels."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from hwcost import EnergyMonitor

Case = Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One window of one alternative: per call."""

    duration_ms: float
    energy_mj: float | None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def calls_in(case: Case, seconds: float) -> int:
    """How often a warm case can be called in this time."""
    case()
    synchronize()
    start = time.perf_counter()
    for _ in range(3):
        case()
    synchronize()
    return max(1, round(3 * seconds / (time.perf_counter() - start)))


def interleave(
    cases: Mapping[str, Case], *, repetitions: int, seconds: float, monitor: EnergyMonitor | None = None
) -> dict[str, list[Sample]]:
    """Windows of about ``seconds`` each, the cases in turn, ``repetitions`` times over.

    Joules come from the board's energy counter through the monitor (None: not measured) and include idle power.
    """
    counts = {name: calls_in(case, seconds) for name, case in cases.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, case in cases.items():
            samples[name].append(_window(case, counts[name], monitor))
    return samples


def _window(case: Case, count: int, monitor: EnergyMonitor | None) -> Sample:
    for _ in range(max(1, count // 20)):
        case()
    synchronize()
    if monitor is None:
        start = time.perf_counter()
        _repeat(case, count)
        return Sample(duration_ms=(time.perf_counter() - start) / count * 1e3, energy_mj=None)
    with monitor.window("benchmark") as window:
        start = time.perf_counter()
        _repeat(case, count)
        duration_s = time.perf_counter() - start
    energy_j = window.measurement.energy_j
    return Sample(duration_ms=duration_s / count * 1e3, energy_mj=None if energy_j is None else energy_j / count * 1e3)


def _repeat(case: Case, count: int) -> None:
    for _ in range(count):
        case()
    synchronize()


def difference(long: list[Sample], short: list[Sample], steps: int) -> list[Sample]:
    """One of the ``steps`` by which a long call goes further than a short one, repetition by repetition."""
    return [
        Sample(
            duration_ms=(a.duration_ms - b.duration_ms) / steps,
            energy_mj=None if a.energy_mj is None or b.energy_mj is None else (a.energy_mj - b.energy_mj) / steps,
        )
        for a, b in zip(long, short, strict=True)
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def print_table(title: str, samples: Mapping[str, list[Sample]], baseline: str, *, divide: float = 1.0) -> None:
    """Median ms and mJ per call (mJ over ``divide``), and ratios to the baseline with their range over repetitions.

    Where the baseline could not be built, the first case stands in for it.
    """
    if not samples:
        return
    baseline = baseline if baseline in samples else next(iter(samples))
    print(f"\n{title}\n{'':34s} {'ms':>9s} {'mJ':>10s}  {'time / ' + baseline:28s} joules / {baseline}")
    for name, runs in samples.items():
        times = [r.duration_ms for r in runs]
        base = samples[baseline]
        ratios = [r.duration_ms / b.duration_ms for r, b in zip(runs, base, strict=True)]
        joules = [r.energy_mj / divide for r in runs if r.energy_mj is not None]
        pairs = [(r.energy_mj, b.energy_mj) for r, b in zip(runs, base, strict=True)]
        energy = [a / b for a, b in pairs if a is not None and b is not None and b > 0]
        mj = f"{statistics.median(joules):10.3f}" if joules else f"{'-':>10s}"
        print(
            f"{name:34s} {statistics.median(times):9.3f} {mj}  {spread(ratios):28s} {spread(energy) if energy else '-'}"
        )


def profile(case: Case, rows: int = 28) -> None:
    """Print the device time of a call by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(3):
            case()
        synchronize()
    kernels: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.device_time_total)
    ranked = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    print(f"device time of one call: {sum(sum(v) for v in kernels.values()) / 3e3:.3f} ms")
    for name, times in ranked[:rows]:
        print(f"  {sum(times) / 3e3:8.3f} ms  x{len(times) // 3:4d}  {name[:110]}")
