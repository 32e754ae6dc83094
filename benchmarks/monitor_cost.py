"""What an open energy window costs the work inside it: paired runs without (A) and with (B) a monitor.

A GPU at its power limit runs faster after a pause, so both arms begin from the same state: every timed run starts the
same time after the work before it ended, whatever starting a monitor took, and after the same untimed steps. The order
is A B, B A, A B, ...: each arm follows each as often.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

PERIOD_S = 0.25  # the monitor's default
PAUSE_S, RUN_IN_S = 1.0, 0.25

Step = Callable[[], None]


def steps(batch: int, seq_len: int, *, compiled: bool) -> Step:
    """A training step of DistilGPT2's architecture (bf16 autocast, fused AdamW)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=6, n_head=12, n_embd=768, loss_type="ForCausalLM")
    model: Any = GPT2LMHeadModel(config).cuda()
    model.loss_type = "ForCausalLM"
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


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Step, count: int) -> float:
    """Seconds a step over `count` of them, from an empty queue to an empty queue."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - begin) / count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One timed run: seconds a step, the pause before it, when it ended."""

    step_s: float
    pause_s: float
    ended_s: float
    flags: tuple[str, ...] = ()


def arm(which: str, step: Step, count: int, *, run_in: int, after_s: float) -> Run:
    """A timed run that starts PAUSE_S after `after_s`. Both arms start a monitor in the pause; A's is closed again."""
    from hwcost import EnergyMonitor

    device = "cuda:0" if _has_cuda() else None
    monitor = EnergyMonitor.for_assigned_devices(torch_device=device, period_s=PERIOD_S)
    if which == "A":
        monitor.close()
    time.sleep(max(0.0, after_s + PAUSE_S - time.monotonic()))
    pause_s = time.monotonic() - after_s
    timed(step, run_in)
    if which == "A":
        return Run(step_s=timed(step, count), pause_s=pause_s, ended_s=time.monotonic())
    with monitor:
        with monitor.window("train") as window:
            step_s = timed(step, count)
            ended_s = time.monotonic()
        return Run(step_s=step_s, pause_s=pause_s, ended_s=ended_s, flags=window.measurement.flags)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def paired(step: Step, *, pairs: int, seconds: float) -> dict[str, Any]:
    """Slow-downs of B against A over pairs of runs of `seconds` each."""
    arm("B", step, 2, run_in=10, after_s=time.monotonic())  # compiles, imports
    each_s = timed(step, 10)
    count, run_in = max(5, round(seconds / each_s)), max(2, round(RUN_IN_S / each_s))
    ended_s, runs = time.monotonic(), []
    for i in range(pairs):
        for which in ("AB", "BA")[i % 2]:
            run = arm(which, step, count, run_in=run_in, after_s=ended_s)
            ended_s = run.ended_s
            runs.append((which, run))
    return judged(runs, count)


def judged(runs: list[tuple[str, Run]], count: int) -> dict[str, Any]:
    """Mean slow-down with its standard error; the pauses before both arms, which must be alike."""
    found = {which: [run for name, run in runs if name == which] for which in "AB"}
    slow = [b.step_s / a.step_s - 1 for a, b in zip(found["A"], found["B"], strict=True)]
    return {
        "step_ms": 1e3 * statistics.median(run.step_s for run in found["A"]),
        "steps": count,
        "pairs": len(slow),
        "slowdowns": slow,
        "mean": statistics.mean(slow),
        "median": statistics.median(slow),
        "standard_error": statistics.stdev(slow) / len(slow) ** 0.5,
        "pause_s": {which: [run.pause_s for run in part] for which, part in found.items()},
        "pause_difference_s": abs(
            statistics.mean(r.pause_s for r in found["A"]) - statistics.mean(r.pause_s for r in found["B"])
        ),
        "flags": sorted({flag for run in found["B"] for flag in run.flags}),
    }


def python_loop() -> dict[str, Any]:
    """The worst case: a thread that only holds the interpreter's lock. And the CPU time of the sampler itself."""
    from hwcost import EnergyMonitor

    found = paired(lambda: sum(range(20_000)) and None, pairs=12, seconds=0.4)
    device = "cuda:0" if _has_cuda() else None
    with EnergyMonitor.for_assigned_devices(torch_device=device, period_s=PERIOD_S) as monitor, monitor.window("sleep"):
        before = time.process_time()
        time.sleep(4.0)
        found["sampler_cpu_share"] = (time.process_time() - before) / 4.0
    return found


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "slowdown": lambda: paired(steps(16, 1024, compiled=False), pairs=10, seconds=0.6),
    "compiled": lambda: paired(steps(16, 1024, compiled=True), pairs=10, seconds=0.8),
    "launch": lambda: paired(steps(2, 128, compiled=False), pairs=10, seconds=0.8),
    "python": python_loop,
}
