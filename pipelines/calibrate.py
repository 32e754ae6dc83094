"""`joulemoe calibrate`: probes on this GPU, a fitted profile, and its errors on shapes held out of the fit."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hwcost.cost_model import CostModel
from hwcost.judge import with_errors
from hwcost.monitor import EnergyMonitor
from hwcost.ops import STEP_PHASES
from hwcost.points import Calibration, Point, ProbeSpec, Trace
from pipelines.calibrate_plan import Plan, full_plan, small_plan
from pipelines.calibrate_show import table
from pipelines.calibrate_workers import Ran, Worker, WorkerError, lacks_memory
from pipelines.console import standard_output

_IDLE = "idle"
_SECONDS_AROUND = 2.2  # what a point takes beside its window: moving weights, warming up
_TRACE_STEP_S = 0.3
_REBUILD_S = 20.0  # what that takes
_REBUILD_SHARE = 4  # of the workers may still be building then: one in so many
_BYTES_OF_A_BUILD = 6 << 30  # a training step of 16 x 1024 tokens while its backward pass compiles


class Calibrator:
    """Runs a plan. Everything measured so far is in `points`, also after an interruption."""

    def __init__(self, plan: Plan, monitor: EnergyMonitor, *, device: str, console: Console, raw: Path | None) -> None:
        self.plan, self.monitor, self.device, self.console, self.raw = plan, monitor, device, console, raw
        self.start_s = time.monotonic()
        self.points: list[Point] = []
        self.skipped: list[str] = []
        self._owner: dict[str, Worker] = {}
        self._workers: list[Worker] = []
        self._again: list[tuple[Worker, ProbeSpec]] = []
        self._tried: set[str] = set()  # built a second time, or about to be
        self._about: dict[str, Any] = {}

    def run(self) -> Calibration:
        """All of the plan that the budget allows; as it was saved, so that the points can be fitted again."""
        try:
            self._start()
            with self._progress() as progress:
                self._measure_all(progress)
        finally:
            measured = self._save()
            for worker in self._workers:
                worker.dismiss()
            for worker in self._workers:
                worker.stop()
        return measured

    def calibration(self) -> Calibration:
        """What was measured so far."""
        return Calibration(
            device=self._device(), points=tuple(self.points), trace=self._trace(), skipped=tuple(self.skipped)
        )

    # -- workers -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Idle without a context, idle with one, then all the code."""
        codes: dict[str, ProbeSpec] = {}
        for spec in self.plan.all_specs:
            codes.setdefault(spec.code or spec.name, spec)
        shares = _share(list(codes.values()), self._parallel(len(codes)))
        threads = 1 + (os.cpu_count() or 1) // len(shares) if self.device == "cuda" else 1
        self._workers = [Worker(self.device, threads=threads) for _ in shares]
        self._say(f"{len(codes)} workloads to build in {len(shares)} processes")
        self._say("[bold]idle[/] without a context")
        self._window(ProbeSpec(name="idle-bare", kind=_IDLE, params={}, window_s=self.plan.idle_s), None)
        for worker in self._workers:
            worker.answer(180.0)
        self._about = self._workers[0].call("describe")
        self._window(ProbeSpec(name="idle-context", kind=_IDLE, params={}, window_s=self.plan.idle_s), None)
        self._say("building and compiling")
        self._prepare(shares)

    def _parallel(self, codes: int) -> int:
        """Processes: two cores and room for a training step's activations each."""
        if self.device != "cuda":
            return min(codes, 2)
        sizes = [info.memory_bytes for info in self.monitor.devices if info.memory_bytes is not None]
        room = [size // _BYTES_OF_A_BUILD for size in sizes]
        return min(codes, max(2, min([(os.cpu_count() or 2) // 2, *room])))

    def _prepare(self, shares: list[list[ProbeSpec]]) -> None:
        """Have every worker build its share; give up on what is not built in time."""
        waiting = {id(worker): list(share) for worker, share in zip(self._workers, shares, strict=True)}
        for worker, share in zip(self._workers, shares, strict=True):
            for spec in share:
                worker.ask("prepare", spec)
        deadline = time.monotonic() + self.plan.prepare_s
        grace_s = self.plan.prepare_s / 6  # once, for workers whose finished code would go with them
        total = sum(map(len, shares))
        with self._progress() as progress:
            task = progress.add_task("compile", total=total)
            while (any(waiting.values()) or self._worth_it(deadline)) and time.monotonic() < deadline:
                self._ask_again(waiting, deadline)
                for worker in self._workers:
                    if waiting[id(worker)] and worker.has_answer(0.05):
                        progress.advance(task)
                        self._prepared(worker, waiting[id(worker)])
                if time.monotonic() >= deadline - 1 and any(
                    waiting[id(worker)] for worker in set(self._owner.values())
                ):
                    deadline, grace_s = deadline + grace_s, 0.0
        self._say(f"{len(self._owner)} workloads are ready")
        self.skipped += [f"{spec.name}: no room on the device beside the others" for _, spec in self._again]
        for worker in list(self._workers):
            late = waiting[id(worker)]
            self.skipped += [f"{spec.name}: not compiled in {self.plan.prepare_s:.0f} s" for spec in late]
            if late:
                self._drop(worker)

    def _prepared(self, worker: Worker, queue: list[ProbeSpec]) -> None:
        spec = queue.pop(0)
        try:
            worker.answer()
        except WorkerError as error:
            if lacks_memory(str(error)) and spec.name not in self._tried:
                self._tried.add(spec.name)
                self._again.append((worker, spec))
                return
            self._skip(spec, error)
            if not worker.process.is_alive():
                self.skipped += [f"{other.name}: its worker is gone" for other in queue]
                queue.clear()
            return
        self._owner[spec.code or spec.name] = worker

    def _worth_it(self, deadline: float) -> bool:
        """Whether something is to be built once more, and there is time for it."""
        return bool(self._again) and deadline - time.monotonic() > _REBUILD_S

    def _ask_again(self, waiting: dict[int, list[ProbeSpec]], deadline: float) -> None:
        """Build what found no room beside the others once more, as they end; its code is on the disk by now."""
        left = []
        for worker, spec in self._again:
            busy = sum(1 for queue in waiting.values() if queue)
            if self._worth_it(deadline) and not waiting[id(worker)] and busy <= len(self._workers) // _REBUILD_SHARE:
                worker.ask("prepare", spec)
                waiting[id(worker)].append(spec)
            else:
                left.append((worker, spec))
        self._again = left

    def _drop(self, worker: Worker) -> None:
        worker.process.kill()
        self._owner = {code: owner for code, owner in self._owner.items() if owner is not worker}

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _measure_all(self, progress: Progress) -> None:
        order = list(self._order())
        task = progress.add_task("measure", total=len(order))
        reserve = sum(self._cost_s(spec) for spec in self.plan.last) + self.plan.cool_s
        for spec in order:
            late = self._elapsed() + self._cost_s(spec) + reserve > self.plan.budget_s
            if late and spec not in self.plan.last:
                self.skipped.append(f"{spec.name}: out of time")
            else:
                self._measure(spec)
            progress.advance(task)
            if len(self.points) % 8 == 0:
                self._save()

    def _order(self) -> Iterator[ProbeSpec]:
        """A cool start, the first specs, the rest in random order within its tier, a pause, the last specs."""
        generator = random.Random(self.plan.seed)
        pause = ProbeSpec(name="cool", kind=_IDLE, params={}, window_s=self.plan.cool_s)
        if self.plan.cool_s:
            yield dataclasses.replace(pause, name="cool-1")
        yield from self.plan.first
        for tier in sorted({spec.tier for spec in self.plan.specs}):
            group = [spec for spec in self.plan.specs if spec.tier == tier]
            generator.shuffle(group)
            yield from group
        if self.plan.cool_s:
            yield dataclasses.replace(pause, name="cool-2")
        yield from self.plan.last

    def _cost_s(self, spec: ProbeSpec) -> float:
        return spec.window_s + _SECONDS_AROUND

    def _measure(self, spec: ProbeSpec) -> None:
        if spec.kind == _IDLE:
            self._window(spec, None)
            return
        worker = self._owner.get(spec.code or spec.name)
        if worker is None:
            self.skipped.append(f"{spec.name}: not built")
            return
        try:
            found = worker.call("ready", spec, 0.0 if spec.name == "ramp" else self.plan.warmup_s)
            self._window(spec, worker, found)
        except WorkerError as error:
            self._skip(spec, error)

    def _window(self, spec: ProbeSpec, worker: Worker | None, found: dict[str, float] | None = None) -> None:
        start_s = self._elapsed()
        with self.monitor.window(spec.name) as window:
            ran = _sleep(spec.window_s) if worker is None else worker.call("run", spec.window_s)
        if worker is not None:
            worker.ask("park")
        got = window.measurement
        if worker is not None:
            worker.answer(120.0)
        if got.energy_j is None:
            self.skipped.append(f"{spec.name}: no joules ({', '.join(got.flags) or 'unknown'})")
            return
        point = Point(
            name=spec.name,
            kind=spec.kind,
            params=dict(spec.params),
            held_out=spec.held_out,
            found={**(found or {}), **self._clock(start_s)},
            calls=ran.calls,
            duration_s=ran.duration_s,
            energy_j=got.energy_j,
            uncertainty_j=got.uncertainty_j,
            mean_temperature_c=got.mean_temperature_c,
            max_temperature_c=got.max_temperature_c,
            throttled=got.throttled,
            source=got.source,
            flags=tuple(got.flags),
            start_s=start_s,
        )
        self.points.append(point)
        self._say(_line(point))

    def _clock(self, start_s: float) -> dict[str, float]:
        """Mean SM clock since `start_s`, where it is known: it falls where the power limit binds."""
        since = self.start_s + start_s
        seen = [s.sm_clock_mhz for s in self.monitor.system.history if s.time_s >= since and s.sm_clock_mhz is not None]
        return {"sm_clock_mhz": sum(seen) / len(seen)} if seen else {}

    # -- saying and keeping ------------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.monotonic() - self.start_s

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{self._elapsed():5.0f} s[/]  {text}", highlight=False)

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def _skip(self, spec: ProbeSpec, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        self.skipped.append(f"{spec.name}: {lines[-1] if lines else type(error).__name__}")
        self._say(f"[yellow]{spec.name} left out[/]: " + "\n".join(lines[-12:]))

    def _save(self) -> Calibration:
        measured = self.calibration()
        if self.raw is not None:
            measured.write(self.raw)
        return measured

    def _device(self) -> dict[str, Any]:
        devices = self.monitor.devices
        first = devices[0] if devices else None
        return {
            "name": first.name if first else None,
            "driver_version": first.driver_version if first else None,
            "power_limit_w": first.power_limit_w if first else None,
            "slowdown_c": first.slowdown_temperature_c if first else None,
            "board": hashlib.sha256((first.uuid or "").encode()).hexdigest()[:12] if first and first.uuid else None,
            "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
            "seconds": round(self._elapsed(), 1),
            "seed": self.plan.seed,
            **self._about,
        }

    def _trace(self) -> Trace:
        kept: list[tuple[float, float, float]] = []
        for sample in self.monitor.system.history:
            at = sample.time_s - self.start_s
            if sample.power_w is None or sample.temperature_c is None or (kept and at - kept[-1][0] < _TRACE_STEP_S):
                continue
            kept.append((round(at, 3), round(sample.power_w, 1), sample.temperature_c))
        time_s, power_w, temperature_c = zip(*kept, strict=True) if kept else ((), (), ())
        return Trace(time_s=time_s, power_w=power_w, temperature_c=temperature_c)


def _sleep(seconds: float) -> Ran:
    time.sleep(seconds)
    return Ran(calls=1, duration_s=seconds)


def _share(specs: list[ProbeSpec], workers: int) -> list[list[ProbeSpec]]:
    """Specs per worker, the slowest to compile first; the first worker has the kernels and the anchor."""
    light = [spec for spec in specs if spec.kind not in STEP_PHASES]
    heavy = sorted(
        (spec for spec in specs if spec not in light), key=lambda spec: (spec.tier, spec.kind != "train_step")
    )
    shares: list[list[ProbeSpec]] = [light, *([] for _ in range(max(1, workers - 1)))]
    for i, spec in enumerate(heavy):
        shares[1 + i % (len(shares) - 1)].append(spec)
    return [share for share in shares if share]


def _line(point: Point) -> str:
    millijoules, milliseconds = 1e3 * point.energy_per_call_j, 1e3 * point.seconds_per_call
    heat = "" if point.mean_temperature_c is None else f" {point.mean_temperature_c:4.1f} °C"
    return f"{point.name:34} {millijoules:10.3f} mJ {milliseconds:9.4f} ms {point.power_w:5.0f} W{heat}"


def measure(plan: Plan, *, device: str, console: Console, raw: Path | None) -> Calibration:
    """Run a plan on the device this process was given.

    Raises:
        ValueError: a GPU was asked for and none can be measured.
    """
    with EnergyMonitor.for_assigned_devices() as monitor:
        if device == "cuda" and not any(info.kind == "gpu" for info in monitor.devices):
            raise ValueError(
                f"device: expected a GPU that can be measured, got none ({', '.join(monitor.flags) or 'no GPU'})"
            )
        return Calibrator(plan, monitor, device=device, console=console, raw=raw).run()


def calibrate(
    out: Path,
    *,
    device: str = "auto",
    raw: Path | None = None,
    points: Path | None = None,
    budget_s: float = 510.0,
    console: Console | None = None,
) -> CostModel:
    """Measure (or read `points`), fit, write the profile to `out` and print its held-out errors.

    Args:
        raw: where the points are kept; None: beside `out`, as NAME.points.json.
        points: fit these instead of measuring.

    Raises:
        ValueError: no GPU where one was asked for, or points that cannot be fitted.
    """
    console = console or standard_output()
    if points is not None:
        measured = Calibration.read(points)
    else:
        kind = _device(device)
        plan = full_plan(budget_s) if kind == "cuda" else small_plan()
        measured = measure(plan, device=kind, console=console, raw=raw or out.with_suffix(".points.json"))
    model = with_errors(CostModel.fit(measured, name=out.stem), measured)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(model.profile.to_json(), encoding="utf-8")
    console.print(table(model))
    return model


def _device(device: str) -> str:
    import torch

    has_gpu = torch.cuda.device_count() > 0
    if device == "cuda" and not has_gpu:
        raise ValueError("device: expected a CUDA GPU, got a host without one; use device cpu")
    return ("cuda" if has_gpu else "cpu") if device == "auto" else device
