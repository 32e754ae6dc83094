"""One thread per device that follows its energy counter and samples the rest, so that the training thread reads nothing.

A counter that moves every 100 ms and takes 3 ms to read is not polled all the time: the sampler sleeps until shortly before
the next step is due and then reads until the value changes. That gives the time of the step to within one read. Period and cost are
learnt from the device itself.
"""

from __future__ import annotations

import math
import statistics
import sys
import threading
from collections.abc import Callable

from hwcost.history import GpuSystemMonitor, PowerSample
from hwcost.integrate import CounterCurve, PowerIntegral, Reading
from hwcost.processes import Occupancy, occupancy, own_process_uses_cuda
from hwcost.readers import Clock, DeviceReader, Guard
from hwcost.windows import Span

ACQUIRE_S = 1.5  # how long to look for the counter's first steps
FROZEN_S = 3.0  # a counter that does not move for so long is not believed
STALE_S = 10.0  # a sampler that was not heard of for so long hangs in a read
GRACE_S = 1.0  # how long an edge waits for samples beyond it
MAX_RESTARTS = 3
RING_EVERY_S = 0.5


class DeviceSampler:
    """Follows one device. `tick` is one round; `start` runs rounds in a daemon thread."""

    def __init__(
        self,
        reader: DeviceReader,
        *,
        clock: Clock,
        period_s: float,
        system: GpuSystemMonitor,
        phase: Callable[[], tuple[str | None, float | None]],
    ) -> None:
        self.reader, self.clock, self.period_s, self.system, self.phase = reader, clock, period_s, system, phase
        self.guard = Guard(self.note)
        limit_w = reader.info.power_limit_w
        self.curve = CounterCurve(limit_w=limit_w, wrap_j=reader.wrap_j)
        self.instant, self.ring = PowerIntegral(), PowerIntegral(gap_s=0.25)
        self.counter_period_s: float | None = None
        self.counter_cost_s = 0.0
        self.frozen = False
        self.restarts = 0
        self.heartbeat_s = clock.monotonic()
        self.ready = threading.Event()
        self._standing: dict[str, None] = dict.fromkeys(reader.notes)
        self._spans: list[Span] = []
        self._lock = threading.RLock()
        self._read_lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._acquired = False
        self._raw_j: float | None = None
        self._step_s: float | None = None
        self._moved_s = self.heartbeat_s
        self._margin_s = 0.01
        self._due: dict[str, float] = {}
        self._last_tick_s: float | None = None
        self._ring_since_us = 0
        self._wall_offset: float | None = None
        self._ring_misses = 0
        self._occupancy: Occupancy | None = None
        self._last: dict[str, object] = {}

    # -- the thread -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"hwcost-{self.reader.info.device_id}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)
        self.settle(force=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.tick()
            except Exception as error:  # a monitor never stops training
                self.note(f"sampler_error:{type(error).__name__}")
                self.clock.wait(self._stop, self.period_s)

    def watch(self) -> None:
        """The watchdog, run from the windows: a dead thread is started again, a hanging one is flagged."""
        thread = self._thread
        if thread is None or self._stop.is_set():
            return
        if not thread.is_alive() and self.restarts < MAX_RESTARTS:
            self.restarts += 1
            self.note("sampler_restarted")
            self.start()
        elif not thread.is_alive():
            self.note("sampler_dead")
        elif self.clock.monotonic() - self.heartbeat_s > STALE_S:
            self.note("sampler_stuck")

    # -- what windows ask -----------------------------------------------------------------------------------------------

    def open_span(self, time_s: float) -> Span:
        with self._lock:
            span = Span(time_s, tuple(self._standing))
            self._count(span, self._occupancy)
            self._spans.append(span)
        if not self.reader.stepped:
            self._read_now(time_s)
        return span

    def close_span(self, span: Span, time_s: float) -> None:
        if not self.reader.stepped:
            self._read_now(time_s)
        with self._lock:
            span.end_s = time_s
        if not self.reader.stepped or self._thread is None:
            self.settle()

    def cumulative(self, time_s: float) -> Reading | None:
        """Joules since the sampler began, as well as they are known by now."""
        if not self.reader.stepped:
            self._read_now(time_s)
        with self._lock:
            return self._reading(time_s)

    def note(self, flag: str) -> None:
        """Flag every window that is open now."""
        with self._lock:
            for span in self._spans:
                span.flags.setdefault(flag)

    @property
    def source(self) -> str | None:
        """Where this device's joules come from at present."""
        if self._counter_usable() or (self.curve.knots and not self.instant):
            return self.reader.source
        return "integrated" if self.instant else None

    @property
    def min_window_s(self) -> float:
        """Windows shorter than this are not measured."""
        if not self.reader.stepped:
            return 1e-3
        return self.counter_period_s or 0.1

    def _stand(self, flag: str) -> None:
        """Flag all windows from now on."""
        with self._lock:
            self._standing.setdefault(flag)
        self.note(flag)

    # -- one round --------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One round: the next counter step, the fields that are due, the edges that can be settled."""
        self._check_gap()
        if self.guard.lost:
            self._stand("gpu_lost")
            self.settle(force=True)
            self.clock.wait(self._stop, self.period_s)
            return
        if not self.reader.stepped:
            self.clock.wait(self._stop, self.period_s)
            self._read_now(self.clock.monotonic())
        elif not self._counter_usable():
            self.clock.wait(self._stop, min(self.period_s, 0.1))
        elif not self._acquired:
            self._acquire()
        else:
            self._await_step()
        self._sample()
        self._drain_ring()
        self._bridge()
        self.settle()
        self.ready.set()

    def _check_gap(self) -> None:
        now = self.clock.monotonic()
        if self._last_tick_s is not None and now - self._last_tick_s > max(2.0, 5 * self.period_s):
            self.note("sampling_gap")
            self._acquired = False
        self._last_tick_s = self.heartbeat_s = now

    def _counter_usable(self) -> bool:
        return "energy" not in self.guard.unavailable and not self.guard.lost

    def _read_counter(self) -> tuple[float, float] | None:
        """The counter and the middle of the read."""
        with self._read_lock:
            before = self.clock.monotonic()
            raw = self.guard.read("energy", self.reader.energy_j)
            after = self.clock.monotonic()
        self.heartbeat_s = after
        if raw is None:
            if "energy" in self.guard.unavailable:
                self._stand("counter_unavailable")
            return None
        return raw, (before + after) / 2

    def _read_now(self, time_s: float) -> None:
        """A counter that can be read at an edge."""
        got = self._read_counter()
        if got is None:
            return
        with self._lock:
            last = self.curve.knots[-1] if self.curve.knots else None
            self._knot(time_s, got[0], 0.0)
            knot = self.curve.knots[-1]
            if last is not None and knot.time_s - last.time_s > 1e-3:
                self._last["power_w"] = (knot.energy_j - last.energy_j) / (knot.time_s - last.time_s)

    def _acquire(self) -> None:
        """Learn the counter's period and cost: read without a pause until it moved three times."""
        deadline = self.clock.monotonic() + ACQUIRE_S
        steps: list[float] = []
        costs: list[float] = []
        previous: tuple[float, float] | None = None
        while len(steps) < 3 and not self._stop.is_set():
            began = self.clock.monotonic()
            got = self._read_counter()
            if got is None or began > deadline:
                break
            costs.append(self.clock.monotonic() - began)
            if previous is not None and got[0] != previous[0]:
                steps.append((previous[1] + got[1]) / 2)
                self._found_step(steps[-1], got[0], (got[1] - previous[1]) / math.sqrt(12))
            previous = got
            if costs[-1] < 1e-3:
                self.clock.wait(self._stop, 1e-3)
        if len(steps) >= 3:
            period = statistics.median(b - a for a, b in zip(steps, steps[1:], strict=False))
            self.counter_period_s, self.counter_cost_s, self._acquired = period, statistics.median(costs), True
            self.curve.slack_s = period
            self._margin_s = max(0.005, 2 * self.counter_cost_s)
            self._thaw()
        elif previous is not None:
            self._raw_j = previous[0]
            self._check_frozen()

    def _await_step(self) -> None:
        """Sleep until shortly before the next step is due, then read until the counter moves."""
        assert self.counter_period_s is not None
        assert self._step_s is not None
        period = self.counter_period_s
        now = self.clock.monotonic()
        stride = 1 if self._pending() else max(1, round(self.period_s / period))
        expected = self._step_s + stride * period
        if expected < now:
            expected += math.ceil((now - expected) / period) * period
        if self.clock.wait(self._stop, expected - self._margin_s - now):
            return
        before: float | None = None
        while not self._stop.is_set():
            got = self._read_counter()
            if got is None:
                self.clock.wait(self._stop, period)
                return
            raw, middle = got
            if raw != self._raw_j:
                self._stepped(raw, middle, before, period)
                return
            before = middle
            if middle > expected + 1.5 * period:
                self._check_frozen()
                return
            if self.counter_cost_s < 1e-3:
                self.clock.wait(self._stop, 1e-3)

    def _stepped(self, raw: float, middle: float, before: float | None, period: float) -> None:
        """The counter moved: seen happening (exact), or before we looked (its time follows from the period)."""
        assert self._step_s is not None
        tight = max(4 * self.counter_cost_s, 0.02)
        if before is not None and middle - before <= tight:
            when = (before + middle) / 2
            count = max(1, round((when - self._step_s) / period))
            if count <= 20:
                self.counter_period_s = 0.95 * period + 0.05 * (when - self._step_s) / count
            self._margin_s = max(0.98 * self._margin_s, 1.5 * self.counter_cost_s + 0.001)
            self._found_step(when, raw, (middle - before) / math.sqrt(12))
            return
        when = self._step_s + math.floor((middle - self._step_s) / period) * period
        self._margin_s = min(1.5 * self._margin_s, period / 2)
        late = before if before is not None else middle - period
        if when <= late or when <= self._step_s:
            when = (late + middle) / 2
        self._found_step(when, raw, min(self._margin_s, period / 4))

    def _found_step(self, when: float, raw: float, sigma_s: float) -> None:
        with self._lock:
            self._knot(when, raw, sigma_s)
            self._raw_j, self._step_s, self._moved_s = raw, when, when
        self._thaw()

    def _knot(self, when: float, raw: float, sigma_s: float) -> None:
        last = self.curve.knots[-1].time_s if self.curve.knots else None
        integral = self._shape().between(last, when) if last is not None and when > last else None
        flag = self.curve.add(when, raw, sigma_s=sigma_s, integral_j=integral)
        if flag:
            self.note(flag)

    def _check_frozen(self) -> None:
        if self.clock.monotonic() - self._moved_s > FROZEN_S and not self.frozen:
            self.frozen = True
            self._stand("counter_frozen")

    def _thaw(self) -> None:
        if self.frozen:
            self.frozen = False
            self._standing.pop("counter_frozen", None)

    def _bridge(self) -> None:
        """Without a moving counter, go on with power alone."""
        if not self.reader.stepped or (self._counter_usable() and not self.frozen):
            return
        with self._lock:
            if self.curve.knots and self.instant:
                last, now = self.curve.knots[-1].time_s, self.instant.times[-1]
                self.curve.bridge(now, self.instant.between(last, now))

    # -- fields -----------------------------------------------------------------------------------------------------------

    def _read_due(self, field: str, call: Callable[[], object], now: float) -> None:
        """Read a field when its turn has come; a dear one (more than 1 % of the time) comes less often."""
        if now < self._due.get(field, -math.inf):
            return
        before = self.clock.monotonic()
        self._last[field] = self.guard.read(field, call)
        self._due[field] = now + max(0.9 * self.period_s, 100 * (self.clock.monotonic() - before))

    def _sample(self) -> None:
        reader, now = self.reader, self.clock.monotonic()
        if reader.stepped:
            power = self.guard.read("power", reader.power_w)
            if power is not None and power <= 0:
                self.note("power_zero")
                power = None
            self._last["power_w"] = power
            if power is not None:
                with self._lock:
                    self.instant.add(now, power)
                    for span in self._spans:
                        span.add_power(now, power)
        if now < self._due.get("history", -math.inf):
            return
        self._due["history"] = now + 0.9 * self.period_s
        for field, call in (
            ("temperature_c", reader.temperature_c),
            ("memory_bytes", reader.memory_used_bytes),
            ("utilization", reader.utilization),
            ("sm_clock_mhz", reader.sm_clock_mhz),
            ("throttle_reasons", reader.throttle_reasons),
        ):
            self._read_due(field, call, now)
        if now >= self._due.get("processes", -math.inf):
            self._read_due("processes", reader.processes, now)
            self._due["processes"] = max(self._due["processes"], now + 1.0)
            self._occupancy = occupancy(self._last["processes"])
        self._record(now)

    def _record(self, now: float) -> None:
        last = self._last
        sm, memory = last.get("utilization") or (None, None)  # type: ignore[misc]
        phase, modelled_w = self.phase()
        sample = PowerSample(
            time_s=now,
            device_id=self.reader.info.device_id,
            power_w=last.get("power_w"),  # type: ignore[arg-type]
            temperature_c=last.get("temperature_c"),  # type: ignore[arg-type]
            memory_bytes=last.get("memory_bytes"),  # type: ignore[arg-type]
            sm_utilization=sm,
            memory_utilization=memory,
            sm_clock_mhz=last.get("sm_clock_mhz"),  # type: ignore[arg-type]
            throttle_reasons=last.get("throttle_reasons"),  # type: ignore[arg-type]
            phase=phase,
            modelled_power_w=modelled_w,
        )
        self.system.add(sample)
        with self._lock:
            for span in self._spans:
                span.add(sample)
                self._count(span, self._occupancy)

    @staticmethod
    def _count(span: Span, seen: Occupancy | None) -> None:
        if seen is None:
            return
        span.shared = bool(span.shared) or seen.others > 0
        span.context = span.context or seen.total > 0
        for flag in seen.flags:
            span.flags.setdefault(flag)

    def _drain_ring(self) -> None:
        """Take what the driver's ring of power samples gained, its stamps mapped to the monotonic clock."""
        now = self.clock.monotonic()
        if not self.reader.stepped or "ring" in self.guard.unavailable:
            return
        if now < self._due.get("ring", -math.inf) and not self._pending():
            return
        self._due["ring"] = now + RING_EVERY_S
        samples = self.guard.read("ring", lambda: self.reader.power_ring(self._ring_since_us))
        offset = self.clock.wall() - self.clock.monotonic()
        jumped = self._wall_offset is not None and abs(offset - self._wall_offset) > 0.02
        self._wall_offset = offset
        if jumped:
            self.note("clock_jump")
            self._ring_since_us = int(self.clock.wall() * 1e6)
            return
        if not samples:
            return
        self._ring_since_us = samples[-1][0]
        with self._lock:
            for stamp_us, watts in samples:
                when = stamp_us / 1e6 - offset
                if 0 < watts < math.inf and now - 10.0 < when < now + 0.05 and self.ring.add(when, watts):
                    for span in self._spans:
                        span.add_power(when, watts)

    # -- edges ------------------------------------------------------------------------------------------------------------

    def _pending(self) -> bool:
        return any(span.start is None or span.end_s is not None for span in self._spans)

    def _shape(self) -> PowerIntegral:
        return self.ring if self.ring else self.instant

    def _reading(self, time_s: float) -> Reading | None:
        if not self.curve.knots:
            return self.instant.at(time_s)
        return self.curve.at(time_s, self._shape())

    def settle(self, *, force: bool = False) -> None:
        """Fix the edges of windows as soon as what lies beyond them is known, or `GRACE_S` later without it."""
        with self._lock:
            now = self.clock.monotonic()
            for span in list(self._spans):
                if span.start is None and (force or self._beyond(span.start_s, now)):
                    span.start, span.integral_start = self._reading(span.start_s), self.instant.at(span.start_s)
                if span.end_s is None or not (force or self._beyond(span.end_s, now)):
                    continue
                span.end, span.integral_end = self._reading(span.end_s), self.instant.at(span.end_s)
                span.source = self.source if not self.frozen else "integrated"
                self._spans.remove(span)
                span.settled.set()

    def _beyond(self, time_s: float, now: float) -> bool:
        if now > time_s + GRACE_S:
            return True
        if not self.reader.stepped:
            return True
        if not self._counter_usable() or self.frozen:
            return bool(self.instant) and self.instant.times[-1] >= time_s
        knots = self.curve.knots
        if not knots or knots[-1].time_s < time_s:
            return False
        return not self.ring or self.ring.times[-1] >= time_s


def synchronize() -> str | None:
    """Wait for the work this process gave to its GPUs; a failure is returned as a flag. Without a CUDA context: nothing."""
    if not own_process_uses_cuda():
        return None
    torch = sys.modules["torch"]
    try:
        current = torch.cuda.current_device()
        for index in range(torch.cuda.device_count()):
            if index == current or torch.cuda.memory_reserved(index) > 0:
                torch.cuda.synchronize(index)
    except Exception as error:
        return f"synchronize_failed:{type(error).__name__}"
    return None
