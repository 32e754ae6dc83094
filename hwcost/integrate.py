"""Joules as a function of time, from power samples and from an energy counter that moves in steps.

A counter that steps every 100 ms says what was used up to its last step and nothing of the part of a period at the
edges of a window: over a one-second window that is up to 10 %. Here the counter gives the *knots* (time of a step,
joules up to it), and between two knots power samples give the shape, scaled so that it sums to the counter's
difference. The result is one function E(t): windows that touch sum to the whole whatever their edges are.
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
    """Cumulative joules at one instant, their standard uncertainty, the seconds known up to then, and those of them for
    which
    power had to stand in for the counter."""

    energy_j: float
    sigma_j: float
    covered_s: float
    bridged_s: float = 0.0


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

    def fraction(self, start_s: float, time_s: float, end_s: float) -> float | None:
        """Share of a span's joules that falls before `time_s`; None unless real samples lie around the span."""
        if not self.times or self.times[0] > start_s or self.times[-1] < end_s:
            return None
        part, whole = self.between(start_s, time_s), self.between(start_s, end_s)
        if part is None or whole is None or whole <= 0:
            return None
        return min(max(part / whole, 0.0), 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Knot:
    """A moment at which the cumulative joules are known."""

    time_s: float
    energy_j: float
    sigma_s: float
    covered_s: float
    bridged_s: float


class CounterCurve:
    """E(t) through the steps of an energy counter.

    Differences that cannot be true (backwards, or more than the power limit allows) are replaced by the integral of
    power over the same time, or left uncovered where there is none; the curve never falls.
    """

    def __init__(self, *, limit_w: float | None = None) -> None:
        self.limit_w = limit_w
        self.slack_s = 0.1
        self.knots: list[Knot] = []
        self._times: list[float] = []
        self._raw_j: float | None = None

    def add(self, time_s: float, raw_j: float, *, sigma_s: float = 0.0, integral_j: float | None = None) -> str | None:
        """Append what the counter said at a step. Returns the flag of a difference that was not believed."""
        if self.knots and time_s <= self.knots[-1].time_s:
            return None
        previous, self._raw_j = self._raw_j, raw_j
        if previous is None:
            self._append(time_s, integral_j, sigma_s, bridged=bool(self.knots))
            return None
        flag = self._doubt(raw_j - previous, time_s - self.knots[-1].time_s)
        self._append(time_s, integral_j if flag else raw_j - previous, sigma_s, bridged=flag is not None)
        return flag

    def bridge(self, time_s: float, integral_j: float | None) -> None:
        """Go on without the counter: its next value starts a new segment."""
        if self.knots and time_s > self.knots[-1].time_s:
            self._raw_j = None
            self._append(time_s, integral_j, 0.0, bridged=True)

    def _doubt(self, difference: float, span_s: float) -> str | None:
        if difference < 0:
            return "counter_reset"
        if self.limit_w and difference > JUMP_FACTOR * self.limit_w * (span_s + self.slack_s):
            return "counter_jump"
        return None

    def _append(self, time_s: float, difference_j: float | None, sigma_s: float, *, bridged: bool) -> None:
        last = self.knots[-1] if self.knots else Knot(time_s, 0.0, 0.0, 0.0, 0.0)
        known_s = time_s - last.time_s if difference_j is not None else 0.0
        energy = last.energy_j + max(difference_j or 0.0, 0.0)
        knot = Knot(time_s, energy, sigma_s, last.covered_s + known_s, last.bridged_s + (known_s if bridged else 0.0))
        self.knots.append(knot)
        self._times.append(time_s)
        if len(self.knots) > KEEP:
            del self.knots[: KEEP // 2], self._times[: KEEP // 2]

    def at(self, time_s: float, shape: PowerIntegral | None = None) -> Reading | None:
        """Cumulative joules at `time_s`, between knots with the shape of `shape`; None while there is no knot."""
        if not self.knots:
            return None
        i = bisect.bisect_right(self._times, time_s) - 1
        if 0 <= i < len(self.knots) - 1:
            return self._inside(self.knots[i], self.knots[i + 1], time_s, shape)
        return self._beyond(self.knots[max(i, 0)], time_s, shape)

    @staticmethod
    def _inside(a: Knot, b: Knot, time_s: float, shape: PowerIntegral | None) -> Reading:
        span, total, past = b.time_s - a.time_s, b.energy_j - a.energy_j, time_s - a.time_s
        fraction, sigma = past / span, total * math.sqrt(past / span * (1 - past / span)) / 4
        shaped = shape.fraction(a.time_s, time_s, b.time_s) if shape is not None else None
        if shaped is not None:
            fraction, sigma = shaped, abs(shaped - fraction) * total / 4
        sigma = math.hypot(sigma, total / span * max(a.sigma_s, b.sigma_s))
        covered_s = past * (b.covered_s - a.covered_s) / span
        bridged_s = past * (b.bridged_s - a.bridged_s) / span
        return Reading(a.energy_j + fraction * total, sigma, a.covered_s + covered_s, a.bridged_s + bridged_s)

    @staticmethod
    def _beyond(knot: Knot, time_s: float, shape: PowerIntegral | None) -> Reading:
        """Before the first knot or after the last: power alone (signed), with an uncertainty to match."""
        low, high = sorted((knot.time_s, time_s))
        part = shape.between(low, high) if shape is not None else None
        if part is None:
            return Reading(knot.energy_j, 0.0, knot.covered_s, knot.bridged_s)
        sign = 1.0 if time_s >= knot.time_s else -1.0
        return Reading(knot.energy_j + sign * part, 0.1 * part, knot.covered_s + sign * (high - low), knot.bridged_s)
