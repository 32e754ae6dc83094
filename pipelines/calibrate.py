"""`joulemoe calibrate`: probes on this GPU, a fitted profile, and its errors on shapes held out of the fit."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hwcost.cost_model import CostModel
from hwcost.judge import with_errors
from hwcost.monitor import EnergyMonitor
from hwcost.ops import STEP_PHASES, ModelShape
from hwcost.points import Calibration, Point, ProbeSpec, Trace, step_params
from pipelines.calibrate_show import table
from pipelines.calibrate_workers import Ran, Worker, WorkerError

_IDLE = "idle"
_SECONDS_AROUND = 2.2  # what a point takes beside its window: moving weights, warming up
_TRACE_STEP_S = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a calibration measures, and how long it may take.

    Attributes:
        specs: measured in random order within a tier. last: measured at the end, whatever the time.
        idle_s: of each of the two idle windows. cool_s: pause before the warm-up ramp and before the last specs.
        prepare_s: longest wait for compilation; what is not ready by then is left out.
    """

    specs: tuple[ProbeSpec, ...]
    first: tuple[ProbeSpec, ...]
    last: tuple[ProbeSpec, ...]
    idle_s: float = 4.0
    cool_s: float = 9.0
    warmup_s: float = 0.7
    prepare_s: float = 190.0
    budget_s: float = 510.0
    seed: int = 0

    @property
    def all_specs(self) -> tuple[ProbeSpec, ...]:
        return (*self.first, *self.specs, *self.last)


def full_plan(budget_s: float = 510.0) -> Plan:
    """The plan for one GPU of the H200's class: kernels, training steps, decode steps, a ramp, the anchor twice."""
    from hwcost.probes import gemm_spec, kernel_specs

    ramp = dataclasses.replace(gemm_spec(8192, 8192, 8192, window_s=20.0), name="ramp")
    return Plan(
        specs=(*kernel_specs(), *_train_specs(), *_prefill_specs(), *_decode_specs()),
        first=(_anchor("anchor-start", 5.0), ramp),
        last=(
            dataclasses.replace(_train(8, 2, 16), name="steady", window_s=22.0, held_out=True),
            _anchor("anchor-end", 5.0),
        ),
        budget_s=budget_s,
    )


def small_plan() -> Plan:
    """A plan for a host without a GPU: tiny shapes, fractions of a second; it shows that the machinery works."""
    from hwcost.probes import kernel_specs

    shape = ModelShape(d_model=32, num_layers=2, num_heads=4, vocab_size=64, expert_widths=(64,) * 4, top_k=1)
    train = [
        _step("train_step", batch, 16, dataclasses.replace(shape, top_k=k), held_out=batch == 2, window_s=0.1)
        for batch, k in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2))
    ]
    decode = [_step("decode_step", batch, 16, shape, window_s=0.1, open=2) for batch in (1, 4)]
    decode += [_step("prefill", 2, 16, shape, window_s=0.1)]
    kernels = [dataclasses.replace(spec, window_s=0.1) for spec in kernel_specs(small=True)]
    return Plan(
        specs=(*kernels, *train, *decode),
        first=(_anchor("anchor-start", 0.1),),
        last=(_anchor("anchor-end", 0.1),),
        idle_s=0.1,
        cool_s=0.0,
        warmup_s=0.0,
        budget_s=120.0,
    )


def smoke_plan() -> Plan:
    """One of each kind for a second: is everything in place on this GPU?"""
    from hwcost.probes import attention_spec, copy_spec, gemm_spec, grouped_spec, launch_spec

    kernels = [
        gemm_spec(8192, 8192, 8192),
        copy_spec(1 << 30),
        grouped_spec(16384, 8),
        attention_spec(16, 1024, train=True),
    ]
    steps = [
        _train(8, 2, 16),
        _train(4, 1, 4),
        *(spec for spec in _decode_specs() if spec.params["batch_size"] in (8, 128)),
    ]
    specs = [dataclasses.replace(spec, window_s=1.0) for spec in (*kernels, launch_spec(graph=True), *steps)]
    return Plan(
        specs=tuple(specs), first=(_anchor("anchor-start", 1.0),), last=(), idle_s=1.0, cool_s=0.0, budget_s=150.0
    )


def _anchor(name: str, seconds: float) -> ProbeSpec:
    return ProbeSpec(name=name, kind="anchor", params={}, window_s=seconds, code="anchor")


def _step(op: str, batch: int, seq_len: int, shape: ModelShape, **more: Any) -> ProbeSpec:
    spec = {key: more.pop(key) for key in ("held_out", "window_s", "tier") if key in more}
    widths = sorted(set(shape.expert_widths))
    width = "" if len(widths) == 1 and widths[0] == 4 * shape.d_model else "-w" + "/".join(map(str, widths))
    experts = f"E{shape.num_experts}K{shape.top_k}{width}" if shape.expert_widths else "dense"
    code = f"{op.split('_')[0]}-{experts}-B{batch}x{seq_len}"
    name = code + (f"-open{more['open']}" if "open" in more else "")
    params = step_params(op, batch_size=batch, seq_len=seq_len, shape=shape, **more)
    return ProbeSpec(name=name, kind=op, params=params, code=code, **spec)


def _train(
    experts: int, top_k: int, batch: int, *, widths: Sequence[int] | None = None, seq_len: int = 1024, **more: Any
) -> ProbeSpec:
    shape = ModelShape(expert_widths=tuple(widths or (3072,) * experts), top_k=top_k)
    return _step("train_step", batch, seq_len, shape, **more)


def _prefill_specs() -> list[ProbeSpec]:
    shapes = ((8, 1, 16, False), (8, 2, 8, False), (4, 2, 16, True))
    return [
        _step("prefill", b, 1024, ModelShape(expert_widths=(3072,) * e, top_k=k), held_out=held, tier=int(held))
        for e, k, b, held in shapes
    ]


# Experts, K, batch. The held-out shapes lie between and beside the fitted ones; extra ones come if time is left.
_FITTED = ((4, 1, 4), (4, 1, 16), (4, 2, 8), (4, 4, 32), (8, 1, 8), (8, 1, 32), (8, 2, 4), (8, 2, 16), (8, 4, 4),
           (8, 4, 16), (16, 1, 16), (16, 2, 4), (16, 2, 32), (16, 4, 8))  # fmt: skip
_HELD_OUT = ((4, 2, 32), (4, 4, 8), (8, 1, 4), (8, 2, 8), (8, 2, 32), (8, 1, 16), (16, 1, 4), (16, 4, 16), (16, 2, 8))
_EXTRA = ((4, 1, 8), (4, 2, 16), (16, 4, 4), (16, 1, 32))
_HALVES = (1536,) * 8
_MIXED = (3072, 3072, 1536, 1536, 1536, 768, 768, 768)


def _train_specs() -> list[ProbeSpec]:
    fitted = [_train(e, k, b, window_s=3.5) for e, k, b in _FITTED]
    fitted += [_train(8, 2, 32, seq_len=256)]
    held = [_train(e, k, b, held_out=True) for e, k, b in _HELD_OUT]
    widths = [_train(8, 2, 16, widths=_HALVES, held_out=True), _train(8, 1, 8, widths=_HALVES, held_out=True)]
    widths += [_train(8, 2, 8, widths=_MIXED, held_out=True)]
    extra = [_train(e, k, b, held_out=True, tier=1) for e, k, b in _EXTRA]
    extra += [_train(8, 1, 16, seq_len=512, held_out=True, tier=1)]
    extra += [_train(8, 1, 16, widths=_MIXED, held_out=True, tier=1)]
    dense = dataclasses.replace(ModelShape(), expert_widths=())
    return [*fitted, *held, *widths, *extra, _step("train_step", 16, 1024, dense, tier=1)]


# K, batch, context, then numbers of open experts: in the fit, held out.
_DECODE = ((1, 1, 256, (1,), ()), (2, 1, 256, (), (2,)), (1, 8, 256, (1, 8), (3,)), (2, 16, 512, (2, 8), (4,)),
           (2, 32, 256, (4, 8), (2,)), (1, 64, 256, (1, 8), (2,)), (2, 128, 256, (2, 8), (5,)),
           (1, 256, 256, (1, 8), (4,)), (2, 256, 128, (2,), (8,)))  # fmt: skip


def _decode_specs() -> list[ProbeSpec]:
    return [
        _step("decode_step", batch, context, ModelShape(top_k=k), open=n, held_out=n in held_out)
        for k, batch, context, fitted, held_out in _DECODE
        for n in (*fitted, *held_out)
    ]


class Calibrator:
    """Runs a plan. Everything measured so far is in `points`, also after an interruption."""

    def __init__(self, plan: Plan, monitor: EnergyMonitor, *, device: str, console: Console, raw: Path | None) -> None:
        self.plan, self.monitor, self.device, self.console, self.raw = plan, monitor, device, console, raw
        self.start_s = time.monotonic()
        self.points: list[Point] = []
        self.skipped: list[str] = []
        self._owner: dict[str, Worker] = {}
        self._workers: list[Worker] = []
        self._about: dict[str, Any] = {}

    def run(self) -> Calibration:
        """All of the plan that the budget allows."""
        try:
            self._start()
            with self._progress() as progress:
                self._measure_all(progress)
        finally:
            for worker in self._workers:
                worker.stop()
        self._save()
        return self.calibration()

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
        return min(codes, max(2, (os.cpu_count() or 2) // 2) if self.device == "cuda" else 2)

    def _prepare(self, shares: list[list[ProbeSpec]]) -> None:
        """Have every worker build its share; give up on what is not built in time."""
        waiting = {id(worker): list(share) for worker, share in zip(self._workers, shares, strict=True)}
        for worker, share in zip(self._workers, shares, strict=True):
            for spec in share:
                worker.ask("prepare", spec)
        deadline = time.monotonic() + self.plan.prepare_s
        total = sum(map(len, shares))
        with self._progress() as progress:
            task = progress.add_task("compile", total=total)
            while any(waiting.values()) and time.monotonic() < deadline:
                for worker in self._workers:
                    if waiting[id(worker)] and worker.has_answer(0.05):
                        progress.advance(task)
                        self._prepared(worker, waiting[id(worker)])
        self._say(f"{len(self._owner)} workloads are ready")
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
            self._skip(spec, error)
            if not worker.process.is_alive():
                self.skipped += [f"{other.name}: its worker is gone" for other in queue]
                queue.clear()
            return
        self._owner[spec.code or spec.name] = worker

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
            found=dict(found or {}),
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

    def _save(self) -> None:
        if self.raw is not None:
            self.calibration().write(self.raw)

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
    console = console or Console()
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
