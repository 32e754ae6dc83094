"""E(t) from a counter and from samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwcost.integrate import CounterCurve, PowerIntegral

TIMES = st.lists(st.floats(0.01, 0.5), min_size=4, max_size=60)


@given(TIMES, st.data())
def test_windows_that_touch_sum_to_the_whole(gaps: list[float], data: st.DataObject) -> None:
    times = np.cumsum(gaps)
    watts = data.draw(st.lists(st.floats(50, 700), min_size=len(gaps), max_size=len(gaps)))
    ring, curve = PowerIntegral(averages=True), CounterCurve()
    for t, p, j in zip(times, watts, np.cumsum(np.array(watts) * gaps), strict=True):
        ring.add(t, p)
        curve.add(t, j)
    a, b, c = sorted(data.draw(st.lists(st.floats(times[0], times[-1]), min_size=3, max_size=3)))
    for shape in (None, ring):
        e = [curve.at(t, shape).energy_j for t in (a, b, c)]
        assert (e[1] - e[0]) + (e[2] - e[1]) == pytest.approx(e[2] - e[0], abs=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50), st.booleans())
def test_the_curve_never_falls(raw: list[float], power: bool) -> None:
    curve = CounterCurve(limit_w=700.0)
    for i, value in enumerate(raw):
        curve.add(0.1 * i, value, integral_j=50.0 if power else None)
    joules = [curve.at(t).energy_j for t in np.linspace(0, 0.1 * (len(raw) - 1), 40)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(joules))
    assert joules[-1] <= 1.25 * 700 * 0.2 * len(raw)


def test_a_reset_is_covered_by_power_or_not_at_all() -> None:
    for integral, covered in ((50.0, 0.3), (None, 0.2)):
        curve = CounterCurve()
        flags = [curve.add(0.1 * i, j, integral_j=integral) for i, j in enumerate((100.0, 150.0, 20.0, 70.0))]
        assert flags == [None, None, "counter_reset", None]
        last = curve.at(0.3)
        assert last.covered_s == pytest.approx(covered)
        assert last.energy_j == pytest.approx(100.0 + (integral or 0.0))


def test_trapezoids_and_averages() -> None:
    instants, averages = PowerIntegral(), PowerIntegral(averages=True)
    for integral in (instants, averages):
        for t, p in ((0.0, 100.0), (1.0, 300.0)):
            integral.add(t, p)
        assert integral.add(0.5, 1e6) is False
    assert instants.at(1.0).energy_j == 200.0
    assert instants.at(0.5).energy_j == 75.0
    assert averages.at(1.0).energy_j == 300.0
    assert averages.at(0.5).energy_j == 150.0


def test_holes_stay_uncovered() -> None:
    power = PowerIntegral(gap_s=1.0)
    for t in (0.0, 0.5, 5.0, 5.5):
        power.add(t, 100.0)
    assert power.at(5.5).energy_j == 100.0
    assert power.at(5.5).covered_s == 1.0
    assert power.between(0.0, 5.5) is None
    assert power.between(5.0, 5.5) == 50.0
    assert not power.surrounds(3.0)
    assert power.surrounds(0.3)


def test_memory_is_bounded() -> None:
    power, curve = PowerIntegral(), CounterCurve()
    for i in range(20_000):
        power.add(0.02 * i, 100.0)
        curve.add(0.1 * i, 10.0 * i)
    assert len(power) <= 4096
    assert len(curve.knots) <= 4096
    assert power.at(0.02 * 19_999).energy_j == pytest.approx(100.0 * 0.02 * 19_999)
    assert curve.at(1999.9).energy_j == pytest.approx(199_990.0)


def test_a_ring_that_contradicts_the_counter_is_not_used() -> None:
    """A driver whose samples are a one-second mean: under bursts they do not follow the counter."""
    ring, curve = PowerIntegral(averages=True), CounterCurve()
    energy, mean = 0.0, 0.0
    for i in range(500):
        t = 0.02 * i
        watts = 600.0 if t % 1.64 < 1.14 else 120.0
        energy += 0.02 * watts
        mean += (watts - mean) * 0.02
        ring.add(t, mean)
        if i % 5 == 0:
            curve.add(t, energy)
    assert not curve.trusts(ring)
    start, end = curve.at(3.28, ring), curve.at(4.42, ring)
    assert end.energy_j - start.energy_j == pytest.approx(684.0, rel=0.05)


def test_a_difference_that_power_does_not_explain_is_a_jump() -> None:
    for excess, blur, sigma, flag in (
        (20.0, 0.0, 0.001, None),
        (60.0, 0.0, 0.001, "counter_jump"),
        (60.0, 0.05, 0.001, None),  # the ring had not come that far
        (60.0, None, 0.001, None),  # no ring that could say so
        (60.0, 0.0, 0.02, None),  # a step whose time is loose
        (160.0, 0.0, 0.02, "counter_jump"),
    ):
        curve = CounterCurve(limit_w=700.0)
        curve.add(0.0, 100.0)
        assert curve.add(0.3, 250.0 + excess, sigma_s=sigma, integral_j=150.0, blur_s=blur) == flag
        assert curve.at(0.3).energy_j == pytest.approx(150.0 + (0.0 if flag else excess))


def test_a_counter_may_catch_up() -> None:
    curve = CounterCurve(limit_w=700.0)
    flags = [curve.add(0.3 * i, j, integral_j=150.0, blur_s=0.0) for i, j in enumerate((0.0, 150.0, 220.0, 450.0))]
    assert flags == [None] * 4
    assert curve.at(0.9).energy_j == 450.0
