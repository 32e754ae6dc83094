"""E(t) from what an H200 really said: 12 bursts of matrix products (`benchmarks/energy_monitor.py --parts raw`).

`steps` holds the counter's steps (s, J, standard uncertainty of the time in s), `ring` the driver's power samples (s,
W), `marks` start and end of each burst as the training thread saw them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hwcost.integrate import CounterCurve, PowerIntegral

DATA = np.load(Path(__file__).with_name("data") / "h200_bursts.npz")
STEPS, RING, MARKS = DATA["steps"], DATA["ring"], DATA["marks"]


def replay(every: int) -> tuple[CounterCurve, PowerIntegral]:
    """The curve from every n-th step and the whole ring."""
    curve, ring = CounterCurve(limit_w=700.0), PowerIntegral(gap_s=0.25, averages=True)
    for time_s, watts in RING:
        ring.add(time_s, watts)
    flags = {curve.add(t, j, sigma_s=s) for t, j, s in STEPS[::every]}
    assert flags == {None}
    return curve, ring


def test_the_ring_sums_to_the_counter() -> None:
    _, ring = replay(1)
    inside = [step for step in STEPS if RING[0, 0] < step[0] < RING[-1, 0]]
    counted = inside[-1][1] - inside[0][1]
    assert ring.between(inside[0][0], inside[-1][0]) == pytest.approx(counted, rel=0.003)


@pytest.mark.parametrize("every", [1, 3])
def test_the_ring_is_trusted_all_along(every: int) -> None:
    curve, ring = replay(every)
    for time_s in np.linspace(MARKS[0, 0], MARKS[-1, 1], 200):
        edge = curve.at(time_s, ring)
        plain = curve.at(time_s)
        assert edge.sigma_j < 10.0
        assert abs(edge.energy_j - plain.energy_j) < 60.0  # within a period's joules of the plain steps


def test_bursts_of_one_length_cost_the_same() -> None:
    curve, ring = replay(3)
    for length, bar in ((1.0, 0.01), (0.6, 0.02)):
        joules = [
            curve.at(end, ring).energy_j - curve.at(start, ring).energy_j
            for start, end in MARKS
            if abs(end - start - length) < 0.02
        ]
        assert len(joules) >= 3
        assert max(joules) / min(joules) - 1 < bar


def test_what_the_steps_alone_would_say_spreads_more() -> None:
    curve, ring = replay(1)
    long = [(a, b) for a, b in MARKS if abs(b - a - 1.0) < 0.02]

    def counted(time_s: float) -> float:
        return STEPS[np.searchsorted(STEPS[:, 0], time_s) - 1, 1]

    plain = [counted(b) - counted(a) for a, b in long]
    ours = [curve.at(b, ring).energy_j - curve.at(a, ring).energy_j for a, b in long]
    assert np.std(ours) < np.std(plain) / 3


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("late_s", [0.0, 0.04, 0.1])
def test_no_step_of_the_bursts_surprises_the_ring(every: int, late_s: float) -> None:
    """The ring as it stood when a step was read: its last sample is `late_s` old and held."""
    curve, ring, fed = CounterCurve(limit_w=700.0), PowerIntegral(gap_s=0.25, averages=True), 0
    last_s, compared = STEPS[0, 0], 0
    for time_s, joules, sigma_s in STEPS[::every]:
        while fed < len(RING) and RING[fed, 0] <= time_s - late_s:
            ring.add(*RING[fed])
            fed += 1
        integral, blur_s = ring.between(last_s, time_s), ring.unknown_s(last_s, time_s)
        assert curve.add(time_s, joules, sigma_s=sigma_s, integral_j=integral, blur_s=blur_s) is None
        compared += integral is not None
        last_s = time_s
    assert compared > 100 / every
