"""Joules as a function of time, from power samples and from an energy counter that moves in steps.

A counter that steps every 100 ms says what was used up to its last step and nothing of the part of a period at the edges of a
window: over a one-second window that is up to 10 %. Here the counter gives the *knots* (time of a step, joules up to it), and
between two knots power samples give the shape, scaled so that it sums to the counter's difference. The result is one function
E(t): windows that touch sum to the whole whatever their edges are.
"""

from __future__ import annotations

import bisect
import dataclasses
import math

GAP_S = 1.0  # power samples further apart than this say nothing about the time between them
JUMP_FACTOR = 1.25  # a board may exceed its limit for moments, never by a quarter over a counter period
KEEP = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """Cumulative joules at one instant, their standard uncertainty, and the seconds known up to then."""

    energy_j: float
    sigma_j: float
    covered_s: float


class PowerIntegral:
    """The running integral of power samples (trapezoids); spans longer than `gap_s` stay uncovered."""

    def __init__(self, gap_s: float = GAP_S) -> None:
        self.gap_s = gap_s
        self.times: list[float] = []
        self.watts: list[float] = []
        self._energy: list[float] = []
        self._covered: list[float] = []

    def __len__(self) -> int:
        return len(self.times)

    def add(self, time_s: float, watts: float) -> bool:
        """Append a sample; one that is not newer than the last is ignored (False)."""
        if self.times and time_s <= self.times[-1]:
            return False
        energy, covered = (self._energy[-1], self._covered[-1]) if self.times else (0.0, 0.0)
        if self.times and time_s - self.times[-1] <= self.gap_s:
            span = time_s - self.times[-1]
            energy += span * (watts + self.watts[-1]) / 2
            covered += span
        self.times.append(time_s)
        self.watts.append(watts)
        self._energy.append(energy)
        self._covered.append(covered)
        if len(self.times) > KEEP:
            for column in (self.times, self.watts, self._energy, self._covered):
                del column[: KEEP // 2]
        return True

    def at(self, time_s: float) -> Reading | None:
        """Joules from the first sample to `time_s`; outside the samples the nearest one is held for up to `gap_s`."""
        if not self.times:
            return None
        i = bisect.bisect_right(self.times, time_s) - 1
        if i < 0:
            held = min(self.times[0] - time_s, self.gap_s)
            return Reading(self._energy[0] - held * self.watts[0], held * self.watts[0] / 2, self._covered[0] - held)
        held = time_s - self.times[i]
        if i + 1 == len(self.times):
            held = min(held, self.gap_s)
            return Reading(self._energy[i] + held * self.watts[i], held * self.watts[i] / 4, self._covered[i] + held)
        span = self.times[i + 1] - self.times[i]
        if span > self.gap_s:
            return Reading(self._energy[i], 0.0, self._covered[i])
        slope = (self.watts[i + 1] - self.watts[i]) / span
        step = held * (self.watts[i] + slope * held / 2)
        sigma = abs(self.watts[i + 1] - self.watts[i]) * span / 4  # where between the two samples the change fell
        return Reading(self._energy[i] + step, sigma, self._covered[i] + held)

    def between(self, start_s: float, end_s: float) -> float | None:
        """Joules of a span, None unless samples cover at least 90 % of it."""
        first, last = self.at(start_s), self.at(end_s)
        if first is None or last is None or last.covered_s - first.covered_s < 0.9 * (end_s - start_s):
            return None
        return last.energy_j - first.energy_j

    def spans(self, start_s: float, end_s: float) -> bool:
        """Whether real samples, not held ones, lie on both sides of the span."""
        return bool(self.times) and self.times[0] <= start_s and self.times[-1] >= end_s


@dataclasses.dataclass(frozen=True, slots=True)
class Knot:
    """A moment at which the cumulative joules are known."""

    time_s: float
    energy_j: float
    sigma_s: float
    covered_s: float


class CounterCurve:
    """E(t) through the steps of an energy counter.

    Differences that cannot be true (backwards, or more than the power limit allows) are replaced by the integral of power over
    the same time, or left uncovered where there is none; the curve never falls.
    """

    def __init__(self, *, limit_w: float | None = None, wrap_j: float | None = None, slack_s: float = 0.1) -> None:
        self.limit_w = limit_w
        self.wrap_j = wrap_j
        self.slack_s = slack_s
        self.knots: list[Knot] = []
        self._times: list[float] = []
        self._raw_j: float | None = None

    def add(self, time_s: float, raw_j: float, *, sigma_s: float = 0.0, integral_j: float | None = None) -> str | None:
        """Append what the counter said at a step. Returns the flag of a difference that was not believed."""
        if self.knots and time_s <= self.knots[-1].time_s:
            return None
        previous, self._raw_j = self._raw_j, raw_j
        if previous is None:
            self._append(time_s, 0.0 if not self.knots else integral_j, sigma_s)
            return None
        difference, flag = self._believe(raw_j - previous, time_s - self.knots[-1].time_s)
        self._append(time_s, integral_j if flag else difference, sigma_s)
        return flag

    def bridge(self, time_s: float, integral_j: float | None) -> None:
        """Go on without the counter: the next counter value starts a new segment."""
        if self.knots and time_s > self.knots[-1].time_s:
            self._raw_j = None
            self._append(time_s, integral_j, 0.0)

    def _believe(self, difference: float, span_s: float) -> tuple[float, str | None]:
        if difference < 0 and self.wrap_j is not None:
            difference += self.wrap_j
        if difference < 0:
            return 0.0, "counter_reset"
        if self.limit_w and difference > JUMP_FACTOR * self.limit_w * (span_s + self.slack_s):
            return 0.0, "counter_jump"
        return difference, None

    def _append(self, time_s: float, difference_j: float | None, sigma_s: float) -> None:
        last = self.knots[-1] if self.knots else Knot(time_s, 0.0, 0.0, 0.0)
        covered = last.covered_s + (time_s - last.time_s if difference_j is not None else 0.0)
        self.knots.append(Knot(time_s, last.energy_j + max(difference_j or 0.0, 0.0), sigma_s, covered))
        self._times.append(time_s)
        if len(self.knots) > KEEP:
            del self.knots[: KEEP // 2], self._times[: KEEP // 2]

    def at(self, time_s: float, shape: PowerIntegral | None = None) -> Reading | None:
        """Cumulative joules at `time_s`, interpolated between knots with the shape of `shape`; None before there is a knot."""
        if not self.knots:
            return None
        i = bisect.bisect_right(self._times, time_s) - 1
        if i < 0:
            return self._beyond(self.knots[0], time_s, shape)
        if i + 1 == len(self.knots):
            return self._beyond(self.knots[i], time_s, shape)
        return self._inside(self.knots[i], self.knots[i + 1], time_s, shape)

    def _inside(self, a: Knot, b: Knot, time_s: float, shape: PowerIntegral | None) -> Reading:
        span, total = b.time_s - a.time_s, b.energy_j - a.energy_j
        linear = (time_s - a.time_s) / span
        fraction, sigma = linear, total * math.sqrt(linear * (1 - linear)) / 4
        part = shape.between(a.time_s, time_s) if shape is not None and shape.spans(a.time_s, b.time_s) else None
        whole = shape.between(a.time_s, b.time_s) if shape is not None and part is not None else None
        if part is not None and whole is not None and whole > 0:
            fraction = min(max(part / whole, 0.0), 1.0)
            sigma = abs(fraction - linear) * total / 4
        sigma = math.hypot(sigma, total / span * max(a.sigma_s, b.sigma_s))
        known = b.covered_s - a.covered_s > 0.5 * span
        return Reading(a.energy_j + fraction * total, sigma, a.covered_s + (time_s - a.time_s if known else 0.0))

    def _beyond(self, knot: Knot, time_s: float, shape: PowerIntegral | None) -> Reading:
        """Before the first knot or after the last: power alone (signed), with an uncertainty to match."""
        low, high = sorted((knot.time_s, time_s))
        part = shape.between(low, high) if shape is not None else None
        sign = 1.0 if time_s >= knot.time_s else -1.0
        if part is None:
            return Reading(knot.energy_j, 0.0, knot.covered_s)
        return Reading(knot.energy_j + sign * part, 0.1 * part, knot.covered_s + sign * (high - low))
