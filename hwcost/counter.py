"""Following an energy counter that moves in steps, at little cost.

A counter that moves every 100 ms and takes 3 ms to read is not polled all the time: the follower sleeps until shortly
before the next step is due and then reads until the value changes. That gives the time of the step to within one read.
Period and cost are learnt from the device itself.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
from collections.abc import Callable

from hwcost.readers import Clock

ACQUIRE_S = 1.5  # how long to look for the counter's first steps
FROZEN_S = 3.0  # a counter that does not move for so long ...
FROZEN_MISSES = 3  # ... and was waited for so often is not believed
INTERRUPTED_S = 0.05
RETRY_S = 0.1  # pause after a read that failed
FAST_S = 1e-3  # reads cheaper than this are spaced by this

OnStep = Callable[[float, float, float], None]


class CounterFollower:
    """Finds the moments at which a counter steps and reports (time, joules, uncertainty of the time in s).

    Args:
        read: the counter in joules; None when it cannot be read now.
        on_step: told of every step found.
        stop: set when the follower must return.
        wake: set when it must stop sleeping.
    """

    def __init__(
        self,
        read: Callable[[], float | None],
        on_step: OnStep,
        clock: Clock,
        stop: threading.Event,
        wake: threading.Event,
    ) -> None:
        self.period_s: float | None = None
        self.cost_s = 0.0
        self.frozen = False
        self._read, self._on_step, self._clock, self._stop, self._wake = read, on_step, clock, stop, wake
        self._acquired = False
        self._raw_j: float | None = None
        self._step_s = self._moved_s = clock.monotonic()
        self._margin_s = 0.01
        self._misses = 0

    def lose_phase(self) -> None:
        """After a pause of unknown length, look for the steps anew."""
        self._acquired = False

    def follow(self, spacing_s: float = 0.1) -> None:
        """Return after the next step that is `spacing_s` or more past the last, or after having waited in vain."""
        if self._acquired and self.period_s is not None:
            self._await_step(self.period_s, max(1, round(spacing_s / self.period_s)))
        else:
            self._acquire()

    def _timed(self) -> tuple[float, float, float] | None:
        """The counter, the middle of the read, and what it cost; a read that was interrupted is done again."""
        for _ in range(3):
            before = self._clock.monotonic()
            raw = self._read()
            after = self._clock.monotonic()
            if raw is None or after - before <= max(5 * self.cost_s, INTERRUPTED_S):
                break
        return None if raw is None else (raw, (before + after) / 2, after - before)

    def _acquire(self) -> None:
        """Learn period and cost: read without a pause until the counter moved three times."""
        deadline = self._clock.monotonic() + ACQUIRE_S
        steps: list[float] = []
        costs: list[float] = []
        last: tuple[float, float] | None = None
        while len(steps) < 3 and not self._stop.is_set():
            got = self._timed()
            if got is None or got[1] > deadline:
                break
            raw, middle, cost = got
            costs.append(cost)
            if last is not None and raw != last[0]:
                steps.append((last[1] + middle) / 2)
                self._found(steps[-1], raw, (middle - last[1]) / math.sqrt(12))
            last = (raw, middle)
            if cost < FAST_S:
                self._clock.wait(self._stop, FAST_S)
        if len(steps) >= 3:
            self.period_s = statistics.median(b - a for a, b in itertools.pairwise(steps))
            self.cost_s, self._acquired = statistics.median(costs), True
            self._margin_s = max(0.005, 2 * self.cost_s)
        elif last is None:
            self._clock.wait(self._stop, RETRY_S)
        else:
            self._raw_j = last[0]
            self._check_frozen(last[1])

    def _await_step(self, period: float, stride: int) -> None:
        """Sleep until shortly before the next step is due, then read until the counter moves."""
        now = self._clock.monotonic()
        expected = self._step_s + stride * period
        if expected < now:
            expected += math.ceil((now - expected) / period) * period
        if self._clock.wait(self._wake, expected - self._margin_s - now):
            return
        before: float | None = None
        while not self._stop.is_set():
            got = self._timed()
            if got is None:
                self._clock.wait(self._stop, period)
                return
            raw, middle, _ = got
            if before is None and stride > 1:
                self._raw_j = raw  # it stepped while we slept
            if raw != self._raw_j:
                self._stepped(raw, middle, before, period)
                return
            before = middle
            if middle > expected + 1.5 * period:
                self._check_frozen(middle)
                return
            if self.cost_s < FAST_S:
                self._clock.wait(self._stop, FAST_S)

    def _stepped(self, raw: float, middle: float, before: float | None, period: float) -> None:
        """The counter moved: while we watched (exact), or before we looked (its time follows from the period)."""
        if before is not None and middle - before <= max(4 * self.cost_s, 0.02):
            when = (before + middle) / 2
            count = max(1, round((when - self._step_s) / period))
            if count <= 20:
                self.period_s = 0.95 * period + 0.05 * (when - self._step_s) / count
            self._margin_s = max(0.98 * self._margin_s, 1.5 * self.cost_s + FAST_S)
            self._found(when, raw, (middle - before) / math.sqrt(12))
            return
        self._margin_s = min(1.5 * self._margin_s, period / 2)
        when = self._step_s + math.floor((middle - self._step_s) / period) * period
        earliest = max(self._step_s, before if before is not None else middle - period)
        if when <= earliest:
            when = (earliest + middle) / 2
        self._found(when, raw, min(self._margin_s, period / 4))

    def _found(self, when: float, raw: float, sigma_s: float) -> None:
        self._raw_j, self._step_s, self._moved_s, self.frozen, self._misses = raw, when, when, False, 0
        self._on_step(when, raw, sigma_s)

    def _check_frozen(self, now: float) -> None:
        """Waited in vain: once may be a process that stood still, again and again is the counter."""
        self._misses += 1
        self.frozen = self.frozen or (now - self._moved_s > FROZEN_S and self._misses >= FROZEN_MISSES)
