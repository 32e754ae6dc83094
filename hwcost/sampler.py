"""One thread per device that follows its counter and samples the rest, so that the training thread reads nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from hwcost.counter import CounterFollower
from hwcost.history import GpuSystemMonitor, PowerSample
from hwcost.integrate import SLACK_S, CounterCurve, PowerIntegral, Reading
from hwcost.processes import Occupancy, occupancy
from hwcost.readers import Clock, DeviceReader, Guard
from hwcost.windows import Span

POWER_EVERY_S = 0.1  # without a counter: spacing of the power samples
RING_EVERY_S = 0.5  # the driver's ring holds two seconds
KNOT_EVERY_S = 0.3  # with a ring that the counter agrees with, not every step is looked for
EDGE_EVERY_S = 0.02  # while an edge waits for the ring
PROCESSES_EVERY_S = 1.0
STALE_S = 10.0  # a sampler that was not heard of for so long hangs in a read
GRACE_S = 1.0  # how long an edge waits for what lies beyond it
CEILING_W = 2500.0  # no board draws more: the limit where the driver does not tell one
GAP_S = 2.0  # a pause between rounds that is worth a flag
MAX_RESTARTS = 3


class DeviceSampler:
    """Follows one device. `tick` is one round; `start` runs rounds in a daemon thread.

    Args:
        phase: name of the innermost open window and its modelled watts, for the history.
        beat: called with the time after every entry into the history.
    """

    def __init__(
        self,
        reader: DeviceReader,
        *,
        clock: Clock,
        period_s: float,
        system: GpuSystemMonitor,
        phase: Callable[[], tuple[str | None, float | None]],
        beat: Callable[[float], None],
    ) -> None:
        self.reader, self.clock, self.period_s = reader, clock, period_s
        self.system, self.phase, self.beat = system, phase, beat
        self.guard = Guard(flag=self.note, stand=self.stand)
        self.curve = CounterCurve(limit_w=reader.info.power_limit_w or (CEILING_W if reader.stepped else None))
        self.instant, self.ring = PowerIntegral(), PowerIntegral(gap_s=0.25, averages=True)
        self.restarts = 0
        self.heartbeat_s = clock.monotonic()
        self.ready = threading.Event()
        self.thread: threading.Thread | None = None
        self._stop, self._wake = threading.Event(), threading.Event()
        self.counter = CounterFollower(self._read_counter, self._add_knot, clock, self._stop, self._wake)
        self._standing: dict[str, None] = {}
        self._spans: list[Span] = []
        self._lock = threading.RLock()
        self._read_lock = threading.Lock()
        self._due: dict[str, float] = {}
        self._last: dict[str, Any] = {}
        self._last_tick_s: float | None = None
        self._ring_since_us = 0
        self._trusted = False
        self._wall_offset: float | None = None
        self._occupancy: Occupancy | None = None

    # -- the thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run rounds in a daemon thread."""
        self.thread = threading.Thread(target=self._run, name=f"hwcost-{self.reader.info.device_id}", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the thread and settle every window that was closed."""
        self._stop.set()
        self._wake.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout=2.0)
        self.settle(force=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.tick()
            except Exception as error:  # a monitor never stops training
                self.note(f"sampler_error:{type(error).__name__}")
                self.clock.wait(self._stop, self.period_s)

    def watch(self) -> None:
        """The watchdog (the monitor's thread, the ledger and the windows ask): restart the dead, flag the hanging."""
        with self._lock:  # asked by several threads: only one of them may start another
            self._watch()

    def _watch(self) -> None:
        if self.thread is None or self._stop.is_set():
            return
        if not self.thread.is_alive():
            self.note("sampler_restarted" if self.restarts < MAX_RESTARTS else "sampler_dead")
            if self.restarts < MAX_RESTARTS:
                self.restarts += 1
                self.start()
        elif self.clock.monotonic() - self.heartbeat_s > STALE_S:
            self.note("sampler_stuck")

    # -- what windows ask ----------------------------------------------------------------------------------------------

    def open_span(self, time_s: float) -> Span:
        """Begin to measure a window."""
        with self._lock:
            span = Span(time_s, (*self.reader.notes, *self._standing))
            span.see(self._occupancy)
            self._spans.append(span)
        if not self.reader.stepped:
            self._read_now(time_s)
        return span

    def close_span(self, span: Span, time_s: float) -> None:
        """The window ended; its span settles when the sampler has seen what lies beyond."""
        if not self.reader.stepped:
            self._read_now(time_s)
        with self._lock:
            span.end_s = time_s
        self._wake.set()
        if not self.reader.stepped:
            self.settle()

    def cumulative(self, time_s: float) -> Reading | None:
        """Joules since the sampler began, as well as they are known by now."""
        if not self.reader.stepped:
            self._read_now(time_s)
        with self._lock:
            return self._reading(time_s)

    def note(self, flag: str) -> None:
        """Flag every window that is being measured now."""
        with self._lock:
            for span in self._spans:
                span.flags.setdefault(flag)

    def stand(self, flag: str) -> None:
        """Flag all windows from now on."""
        with self._lock:
            self._standing.setdefault(flag)
        self.note(flag)

    @property
    def source(self) -> str | None:
        """Where this device's joules come from at present."""
        if self._counting():
            return self.reader.source
        return "integrated" if self.instant else None

    @property
    def min_window_s(self) -> float:
        """Windows shorter than this are not measured: the counter's period, or the spacing of the power samples."""
        return (self.counter.period_s or POWER_EVERY_S) if self.reader.stepped else 1e-3

    # -- one round -----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One round: the next counter step, the fields that are due, the edges that can be settled."""
        self._check_gap()
        if not self._stop.is_set():
            self._wake.clear()
        if self.guard.lost:
            self.clock.wait(self._stop, self.period_s)
        elif not self.reader.stepped:
            self.clock.wait(self._stop, self.period_s)
            self._read_now(self.clock.monotonic())
        elif "energy" in self.guard.unavailable:
            self.clock.wait(self._stop, POWER_EVERY_S)
        elif self._trusted and self._pending():
            self.clock.wait(self._stop, EDGE_EVERY_S)
        else:
            self.counter.follow(KNOT_EVERY_S if self._trusted else 0.0)
        self._sample()
        self._drain_ring()
        self._bridge()
        self._trusted = bool(self.ring) and self.curve.trusts(self.ring)
        self.settle(force=self.guard.lost)
        self.ready.set()

    def _check_gap(self) -> None:
        now = self.clock.monotonic()
        if self._last_tick_s is not None and now - self._last_tick_s > max(GAP_S, 5 * self.period_s):
            self.note("sampling_gap")
            self.counter.lose_phase()
        self._last_tick_s = self.heartbeat_s = now

    def _counting(self) -> bool:
        return "energy" not in self.guard.unavailable and not self.guard.lost and not self.counter.frozen

    def _read_counter(self) -> float | None:
        with self._read_lock:
            raw = self.guard.read("energy", self.reader.energy_j)
        self.heartbeat_s = self.clock.monotonic()
        return raw

    def _read_now(self, time_s: float) -> None:
        """A counter that can be read at the very edge."""
        raw = self._read_counter()
        if raw is None:
            return
        with self._lock:
            last = self.curve.knots[-1] if self.curve.knots else None
            self._add_knot(time_s, raw, 0.0)
            knot = self.curve.knots[-1]
            if last is not None and knot.time_s - last.time_s > 1e-3:
                self._last["power_w"] = (knot.energy_j - last.energy_j) / (knot.time_s - last.time_s)

    def _add_knot(self, time_s: float, raw_j: float, sigma_s: float) -> None:
        self._due.pop("ring", None)
        self._drain_ring()  # power up to this moment, should the counter not be believed
        with self._lock:
            last_s = self.curve.knots[-1].time_s if self.curve.knots else math.inf
            integral = self._shape().between(last_s, time_s) if time_s > last_s else None
            self.curve.slack_s = max(SLACK_S, self.counter.period_s or 0.0)
            blur_s = self.ring.unknown_s(last_s, time_s) if self._trusted and time_s > last_s else None
            flag = self.curve.add(time_s, raw_j, sigma_s=sigma_s, integral_j=integral, blur_s=blur_s)
        if flag:
            self.note(flag)

    def _bridge(self) -> None:
        """Without a moving counter, go on with power alone."""
        if not self.reader.stepped or self._counting():
            return
        if self.counter.frozen:
            self.note("counter_frozen")
        with self._lock:
            power = self._shape()
            if self.curve.knots and power:
                last, now = self.curve.knots[-1].time_s, power.times[-1]
                self.curve.bridge(now, power.between(last, now))

    # -- fields --------------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        now = self.clock.monotonic()
        if self.reader.stepped:
            self._sample_power(now)
        if now < self._due.get("history", -math.inf):
            return
        self._due["history"] = now + 0.9 * self.period_s
        if self.reader.stepped:
            self._sample_fields(now)
        self._record(now)

    def _sample_power(self, now: float) -> None:
        power = self.guard.read("power", self.reader.power_w)
        if power is not None and power <= 0:
            self.note("power_zero")
            power = None
        self._last["power_w"] = power
        if power is not None:
            with self._lock:
                self.instant.add(now, power)
                for span in self._spans:
                    span.add_power(now, power)

    def _sample_fields(self, now: float) -> None:
        reader = self.reader
        self._read_due("temperature_c", reader.temperature_c, now)
        self._read_due("memory_bytes", reader.memory_used_bytes, now)
        self._read_due("utilization", reader.utilization, now)
        self._read_due("sm_clock_mhz", reader.sm_clock_mhz, now)
        self._read_due("memory_clock_mhz", reader.memory_clock_mhz, now)
        self._read_due("throttle_reasons", reader.throttle_reasons, now)
        if self._read_due("processes", reader.processes, now, PROCESSES_EVERY_S):
            self._occupancy = occupancy(self._last["processes"])

    def _read_due(self, field: str, call: Callable[[], object], now: float, every_s: float = 0.0) -> bool:
        """Read a field when its turn has come; a dear one (more than 1 % of the time) comes less often."""
        if now < self._due.get(field, -math.inf):
            return False
        before = self.clock.monotonic()
        self._last[field] = self.guard.read(field, call)
        self._due[field] = now + max(0.9 * self.period_s, every_s, 100 * (self.clock.monotonic() - before))
        return True

    def _record(self, now: float) -> None:
        last = self._last
        sm, memory = last.get("utilization") or (None, None)
        phase, modelled_w = self.phase()
        sample = PowerSample(
            time_s=now,
            device_id=self.reader.info.device_id,
            power_w=last.get("power_w"),
            temperature_c=last.get("temperature_c"),
            memory_bytes=last.get("memory_bytes"),
            sm_utilization=sm,
            memory_utilization=memory,
            sm_clock_mhz=last.get("sm_clock_mhz"),
            memory_clock_mhz=last.get("memory_clock_mhz"),
            throttle_reasons=last.get("throttle_reasons"),
            phase=phase,
            modelled_power_w=modelled_w,
        )
        self.system.add(sample)
        with self._lock:
            for span in self._spans:
                span.add(sample)
                span.see(self._occupancy)
        self.beat(now)

    def _offset(self) -> float:
        """Wall clock minus monotonic clock, read while nobody interrupted us."""
        for _ in range(3):
            before, wall, after = self.clock.monotonic(), self.clock.wall(), self.clock.monotonic()
            if after - before < 1e-3:
                break
        return wall - (before + after) / 2

    def _drain_ring(self) -> None:
        """Take what the driver's ring of power samples gained, its stamps mapped to the monotonic clock."""
        now = self.clock.monotonic()
        if not self.reader.stepped or (now < self._due.get("ring", -math.inf) and not self._pending()):
            return
        self._due["ring"] = now + RING_EVERY_S
        offset = self._offset()
        samples = self.guard.read("ring", lambda: self.reader.power_ring(self._ring_since_us))
        jumped = self._wall_offset is not None and abs(offset - self._wall_offset) > 0.05
        self._wall_offset = offset
        if jumped:  # stamps from before the jump cannot be placed
            self.note("clock_jump")
            self._ring_since_us = int(self.clock.wall() * 1e6)
            return
        with self._lock:
            for stamp_us, watts in samples or ():
                self._ring_since_us = stamp_us
                when = stamp_us / 1e6 - offset
                if 0 < watts < math.inf and now - 10.0 < when < now + 0.05 and self.ring.add(when, watts):
                    for span in self._spans:
                        span.add_power(when, watts)

    # -- edges ---------------------------------------------------------------------------------------------------------

    def _pending(self) -> bool:
        return any(span.start is None or span.end_s is not None for span in self._spans)

    def _shape(self) -> PowerIntegral:
        return self.ring if self.ring else self.instant

    def _reading(self, time_s: float) -> Reading | None:
        if self.curve.knots:
            return self.curve.at(time_s, self._shape())
        power = self._shape().at(time_s)  # there never was a counter
        return power and Reading(power.energy_j, power.sigma_j, power.covered_s, bridged_s=power.covered_s)

    def _powers(self, time_s: float) -> tuple[Reading | None, Reading | None]:
        return self.ring.at(time_s), self.instant.at(time_s)

    def settle(self, *, force: bool = False) -> None:
        """Fix the edges of windows as soon as what lies beyond them is known, or `GRACE_S` later without it."""
        with self._lock:
            now = self.clock.monotonic()
            for span in list(self._spans):
                if span.start is None and (force or self._beyond(span.start_s, now)):
                    span.start, span.powers_start = self._reading(span.start_s), self._powers(span.start_s)
                if span.end_s is not None and (force or self._beyond(span.end_s, now)):
                    span.end, span.powers_end = self._reading(span.end_s), self._powers(span.end_s)
                    self._spans.remove(span)
                    span.settled.set()

    def _beyond(self, time_s: float, now: float) -> bool:
        if not self.reader.stepped or now > time_s + GRACE_S:
            return True
        if not self._counting():
            power = self._shape()
            return bool(power) and power.times[-1] >= time_s
        if self._trusted:
            return self.ring.surrounds(time_s)
        knots = self.curve.knots
        return bool(knots) and knots[-1].time_s >= time_s and (not self.ring or self.ring.times[-1] >= time_s)
