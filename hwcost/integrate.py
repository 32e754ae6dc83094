"""Joules as a function of time, from an energy counter that moves in steps and from power samples.

A counter that steps every 100 ms says what was used up to its last step and nothing of the part of a period at the
edges of a window: over a one-second window that is up to 10 %. The driver's ring of power samples is five times finer
but may drift or have holes. So the ring gives the fast part of E(t) and the counter the slow part: E(t) is the ring's
integral plus the median, over the steps around t, of what the counter said more than the ring. The step times (known to
a few ms) thus average out, and windows that touch sum to the whole. Where there is no ring, or it contradicts the
counter, E(t) is interpolated between the counter's steps.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics

GAP_S = 1.0  # power samples further apart than this say nothing about the time between them
JUMP_FACTOR = 1.25  # a board may exceed its limit for moments, never by a quarter over a counter period
SLACK_S = 0.1  # a counter period, unless it is longer: how far the time of a step may be off
KEEP = 4096
ANCHORS = 12  # counter steps on either side that anchor the ring
ANCHOR_S = 3.0  # and how far away they may be
TIGHT_S = 0.004  # standard uncertainty of a step's time that still anchors
SURPRISE_S = 0.03  # a counter step and a trusted ring may differ by one ring sample and the sensor's lag ...
SURPRISE = 0.03  # ... and by this share of the joules (on an H200: 2 J rms, 9.5 J at worst, over three steps)
DISTRUST = 0.25  # of a counter period's joules: more disagreement than that, and the ring is not used


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
    """The running integral of power samples; spans longer than `gap_s` between two of them stay uncovered.

    Args:
        gap_s: longest believable distance of two samples.
        averages: each sample is the mean power since the one before (the driver's ring: measured on an H200, this
        reading
            agrees with the counter to 2 % of a 100 ms step, the trapezoid rule to 2.6 %); otherwise samples are
            instants, joined by trapezoids.
    """

    def __init__(self, *, gap_s: float = GAP_S, averages: bool = False) -> None:
        self.gap_s, self.averages = gap_s, averages
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
            energy += span * (watts if self.averages else (watts + self.watts[-1]) / 2)
            covered += span
        for column, value in zip(self._columns(), (time_s, watts, energy, covered), strict=True):
            column.append(value)
        if len(self.times) > KEEP:
            for column in self._columns():
                del column[: KEEP // 2]
        return True

    def _columns(self) -> tuple[list[float], ...]:
        return self.times, self.watts, self._energy, self._covered

    def at(self, time_s: float) -> Reading | None:
        """Joules from the first sample to `time_s`; outside the samples the nearest one is held for up to `gap_s`."""
        if not self.times:
            return None
        i = bisect.bisect_right(self.times, time_s) - 1
        if i < 0 or i + 1 == len(self.times):
            end = max(i, 0)
            held = min(max(time_s - self.times[end], -self.gap_s), self.gap_s)
            part = held * self.watts[end]
            return Reading(self._energy[end] + part, abs(part) / 4, self._covered[end] + held)
        past, span = time_s - self.times[i], self.times[i + 1] - self.times[i]
        if span > self.gap_s:
            return Reading(self._energy[i], 0.0, self._covered[i])
        change = self.watts[i + 1] - self.watts[i]
        mean_w = self.watts[i + 1] if self.averages else self.watts[i] + change * past / span / 2
        sigma = abs(change) * past * (1 - past / span)  # where within the interval the change fell
        return Reading(self._energy[i] + past * mean_w, sigma, self._covered[i] + past)

    def between(self, start_s: float, end_s: float) -> float | None:
        """Joules of a span, None unless samples cover at least 90 % of it."""
        first, last = self.at(start_s), self.at(end_s)
        if first is None or last is None or last.covered_s - first.covered_s < 0.9 * (end_s - start_s):
            return None
        return last.energy_j - first.energy_j

    def unknown_s(self, start_s: float, end_s: float) -> float:
        """Seconds of a span without samples: holes in it, and the time since the last sample."""
        first, last = self.at(start_s), self.at(end_s)
        if first is None or last is None:
            return end_s - start_s
        held_s = min(max(end_s - self.times[-1], 0.0), self.gap_s)
        return max(end_s - start_s - (last.covered_s - first.covered_s), 0.0) + held_s

    def surrounds(self, time_s: float) -> bool:
        """Whether there are samples before and after a moment, with no hole there."""
        i = bisect.bisect_right(self.times, time_s)
        return 0 < i < len(self.times) and self.times[i] - self.times[i - 1] <= self.gap_s

    def fraction(self, start_s: float, time_s: float, end_s: float) -> float | None:
        """Share of a span's joules that falls before `time_s`; None unless real samples lie around the span."""
        if not (self.surrounds(start_s) and self.surrounds(end_s)):
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

    Differences that cannot be true (backwards, more than the power limit allows, or more than a ring that has agreed so
    far accounts for) are replaced by the integral of power over the same time, or left uncovered where there is none;
    the curve never falls.
    """

    def __init__(self, *, limit_w: float | None = None) -> None:
        self.limit_w = limit_w
        self.slack_s = SLACK_S
        self.knots: list[Knot] = []
        self._times: list[float] = []
        self._raw_j: float | None = None
        self._excess_j = 0.0

    def add(
        self,
        time_s: float,
        raw_j: float,
        *,
        sigma_s: float = 0.0,
        integral_j: float | None = None,
        blur_s: float | None = None,
    ) -> str | None:
        """Append what the counter said at a step. Returns the flag of a difference that was not believed.

        Args:
            time_s, sigma_s: when it stepped, and the standard uncertainty of that.
            raw_j: what it said.
            integral_j: joules since the last step from power.
            blur_s: seconds for which that integral had no samples; None: power is too coarse to judge the counter.
        """
        if self.knots and time_s <= self.knots[-1].time_s:
            return None
        previous, self._raw_j = self._raw_j, raw_j
        if previous is None:
            self._append(time_s, integral_j if self.knots else 0.0, sigma_s, bridged=bool(self.knots))
            return None
        flag = self._doubt(raw_j - previous, time_s - self.knots[-1].time_s)
        if integral_j is not None and blur_s is not None:
            flag = flag or self._surprise(raw_j - previous - integral_j, integral_j, blur_s, sigma_s)
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

    def _surprise(self, excess_j: float, integral_j: float, blur_s: float, sigma_s: float) -> str | None:
        """Whether the counter rose by more than the ring and the edges account for.

        A step whose time is loose may be told a whole period early or late; what the counter lacked at the last step it
        may catch up on.
        """
        owed_j, self._excess_j = -min(self._excess_j, 0.0), excess_j
        edges_s = sum(self.slack_s if s > TIGHT_S else 3 * s for s in (self.knots[-1].sigma_s, sigma_s))
        allowed_j = JUMP_FACTOR * (self.limit_w or math.inf) * (SURPRISE_S + blur_s + edges_s) + SURPRISE * integral_j
        return "counter_jump" if excess_j - owed_j > allowed_j else None

    def _append(self, time_s: float, difference_j: float | None, sigma_s: float, *, bridged: bool) -> None:
        last = self.knots[-1] if self.knots else Knot(time_s, 0.0, 0.0, 0.0, 0.0)
        known_s = time_s - last.time_s if difference_j is not None else 0.0
        energy = last.energy_j + max(difference_j or 0.0, 0.0)
        knot = Knot(time_s, energy, sigma_s, last.covered_s + known_s, last.bridged_s + (known_s if bridged else 0.0))
        self.knots.append(knot)
        self._times.append(time_s)
        if len(self.knots) > KEEP:
            del self.knots[: KEEP // 2], self._times[: KEEP // 2]

    def at(self, time_s: float, ring: PowerIntegral | None = None) -> Reading | None:
        """Cumulative joules at `time_s`; None while there is no knot. `ring` is finer, where there is one."""
        if not self.knots:
            return None
        i = bisect.bisect_right(self._times, time_s) - 1
        if 0 <= i < len(self.knots) - 1:
            coarse = self._inside(self.knots[i], self.knots[i + 1], time_s, ring)
        else:
            coarse = self._beyond(self.knots[max(i, 0)], time_s, ring)
        fine = self._anchored(i, time_s, ring) if ring is not None and ring.surrounds(time_s) else None
        return coarse if fine is None else dataclasses.replace(coarse, energy_j=fine[0], sigma_j=fine[1])

    def trusts(self, ring: PowerIntegral) -> bool:
        """Whether the ring agrees with the counter's last steps."""
        return (
            bool(self.knots) and len(ring) > 1 and self._anchored(len(self.knots) - 1, ring.times[-2], ring) is not None
        )

    def _anchored(self, i: int, time_s: float, ring: PowerIntegral) -> tuple[float, float] | None:
        """The ring's integral, anchored to the counter at the steps around; None where the two do not go together."""
        here = ring.at(time_s)
        assert here is not None
        excess, powers = [], []
        for knot in self.knots[max(i - ANCHORS, 0) : i + ANCHORS]:
            there = ring.at(knot.time_s) if ring.surrounds(knot.time_s) and knot.sigma_s <= TIGHT_S else None
            near = abs(knot.time_s - time_s) <= ANCHOR_S
            if there is None or not near:
                continue
            hole_s = abs((here.covered_s - there.covered_s) - (time_s - knot.time_s))
            if hole_s < 1e-3:
                excess.append(knot.energy_j - there.energy_j)
                powers.append(
                    (here.energy_j - there.energy_j) / (time_s - knot.time_s) if time_s != knot.time_s else 0.0
                )
        if len(excess) < 3:
            return None
        spread = statistics.pstdev(excess)
        if spread > DISTRUST * self.slack_s * max(powers):
            return None
        sigma = math.hypot(here.sigma_j, spread / math.sqrt(len(excess)))
        return here.energy_j + statistics.median(excess), sigma

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
