"""The budget controller and the price learner on a simulated plant: every case, with fixed seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import BudgetController, Gains, PriceLearner, Reach
from moe.budget import TOLERANCE, falling

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


class Plant:
    """Joules per token over λ as a priced router gives them: they fall from `most` to `least`, steeply at first.

    Readings may be noisy (`noise`, relative) and quantised as by a counter of 100 ms in windows of `window_s`.
    """

    def __init__(
        self, most: float = 1.0, least: float = 0.6, *, noise: float = 0.0, window_s: float | None = None
    ) -> None:
        self.most, self.least, self.noise, self.window_s = most, least, noise, window_s
        self.rng, self.phase = np.random.default_rng(0), 0.0

    def true(self, energy_lambda: float) -> float:
        return self.least + (self.most - self.least) * math.exp(-1.2 * energy_lambda)

    def read(self, energy_lambda: float) -> float:
        energy = self.true(energy_lambda) * (1 + self.noise * self.rng.standard_normal())
        if self.window_s is None:
            return energy
        steps = self.window_s / 0.1  # the counter moves every 100 ms: a whole number of its steps falls into a window
        counted = math.floor(self.phase + steps)
        self.phase += steps - counted
        return energy * counted / steps

    def reach(self) -> Reach:
        return Reach(lambdas=LAMBDAS, energy_j=tuple(self.true(x) for x in LAMBDAS))


def run(controller: BudgetController, plant: Plant, windows: int) -> list[float]:
    """True joules per token of each window."""
    found = []
    for _ in range(windows):
        found.append(plant.true(controller.energy_lambda))
        controller.step(plant.read(controller.energy_lambda))
    return found


def off(energies: list[float], budget_j: float) -> float:
    return abs(sum(energies) / len(energies) / budget_j - 1)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_the_budget_is_reached_from_both_sides(share: float, start: float) -> None:
    plant = Plant()
    budget = plant.reach().at(share)
    controller = BudgetController(budget, Gains.of(plant.reach(), budget), start=start)
    energies = run(controller, plant, 60)
    assert off(energies[-20:], budget) < 0.002
    assert not controller.infeasible


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_noisy_quantised_readings(share: float) -> None:
    plant = Plant(noise=0.02, window_s=1.03)
    budget = plant.reach().at(share)
    energies = run(BudgetController.for_reach(budget, plant.reach()), plant, 60)
    assert off(energies[10:30], budget) < TOLERANCE
    assert off(energies[-20:], budget) < TOLERANCE


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_step_of_the_plant_is_made_good(factor: float) -> None:
    plant = Plant()
    budget = plant.reach().at(0.5)
    controller = BudgetController.for_reach(budget, plant.reach())
    run(controller, plant, 20)
    plant.most, plant.least = factor * plant.most, factor * plant.least
    jump = plant.true(controller.energy_lambda)
    energies = run(controller, plant, 50)
    assert abs(jump / budget - 1) > 0.08
    assert off(energies[-20:], budget) < 0.003


def test_replayed_telemetry_does_not_return_to_the_budget() -> None:
    """Feedback brings the plant back: the telemetry of an undisturbed run, played to a disturbed plant, does not."""
    plant = Plant()
    budget = plant.reach().at(0.5)
    recorder, recorded = BudgetController.for_reach(budget, plant.reach()), []
    for _ in range(60):
        recorded.append(plant.read(recorder.energy_lambda))
        recorder.step(recorded[-1])
    controller, energies = BudgetController.for_reach(budget, plant.reach()), []
    for window, reading in enumerate(recorded):
        factor = 1.1 if window >= 30 else 1.0
        energies.append(factor * plant.true(controller.energy_lambda))
        controller.step(reading)
    assert off(energies[-20:], budget) > 0.08


@pytest.mark.parametrize("below", [0.95, 0.9, 0.7])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_budget_out_of_reach_is_flagged_does_not_wind_up_and_recovers(below: float, noise: float) -> None:
    plant = Plant(noise=noise)
    reach = plant.reach()
    budget = reach.at(0.3)
    controller = BudgetController.for_reach(budget, reach)
    run(controller, plant, 20)
    assert not controller.infeasible
    grown = budget / below / reach.least_j  # all joules grow until even the least exceeds the budget
    plant.most, plant.least = grown * plant.most, grown * plant.least
    flagged = []
    for _ in range(300):
        controller.step(plant.read(controller.energy_lambda))
        flagged.append(controller.infeasible)
    assert True in flagged[:20]
    assert all(flagged[40:])
    assert controller.energy_lambda == controller.gains.lambda_max
    plant.most, plant.least = plant.most / grown, plant.least / grown
    energies = run(controller, plant, 60)
    assert not controller.infeasible
    assert off(energies[-20:], budget) < TOLERANCE
    assert min(i for i, e in enumerate(energies) if abs(e / budget - 1) < 0.05) < 20  # nothing to unwind


@pytest.mark.parametrize("below", [0.97, 0.7])
def test_a_budget_that_never_was_in_reach_is_flagged(below: float) -> None:
    plant = Plant()
    controller = BudgetController.for_reach(below * plant.reach().least_j, plant.reach())
    run(controller, plant, 20)
    assert controller.infeasible


def test_lambda_that_does_nothing_is_infeasible_too() -> None:
    """The plant ignores λ: flagged by the absence of an effect, long before λ is at its end."""
    gains = Gains(integral=0.1, proportional=0.05, memory=0.5, lambda_max=100.0)
    controller, flags = BudgetController(0.9, gains), []
    for _ in range(20):
        controller.step(1.0)
        flags.append(controller.infeasible)
    assert flags[-1]
    assert controller.energy_lambda < 1.0


def test_a_budget_above_the_free_energy_leaves_lambda_at_zero() -> None:
    plant = Plant()
    controller = BudgetController(1.2, Gains.of(plant.reach(), 0.9), start=1.0)
    run(controller, plant, 50)
    assert controller.energy_lambda == 0.0
    assert not controller.infeasible


@pytest.mark.parametrize("reading", [float("nan"), float("inf"), 0.0, -3.0])
def test_bad_readings_leave_lambda_alone(reading: float) -> None:
    plant = Plant()
    controller = BudgetController.for_reach(0.8, plant.reach())
    run(controller, plant, 5)
    before = (controller.energy_lambda, controller.xi)
    with pytest.raises(ValueError, match="energy_j"):
        controller.step(reading)
    assert (controller.energy_lambda, controller.xi) == before


@given(readings=st.lists(st.floats(1e-6, 1e6), max_size=60))
def test_lambda_stays_in_its_bounds(readings: list[float]) -> None:
    controller = BudgetController(1.0, Gains(integral=0.3, proportional=0.2, memory=0.5, lambda_max=2.0))
    for reading in readings:
        assert 0 <= controller.step(reading) <= 2.0


def test_reset_is_as_new() -> None:
    plant = Plant()
    controller, twin = (BudgetController.for_reach(0.8, plant.reach()) for _ in range(2))
    run(controller, plant, 7)
    controller.reset()
    assert run(controller, plant, 7) == run(twin, plant, 7)


# The measured range


def test_a_range_interpolates_and_never_rises() -> None:
    reach = Reach(lambdas=(0.0, 1.0, 2.0, 4.0), energy_j=(1.0, 0.7, 0.72, 0.5))
    assert reach.energy_j == pytest.approx((1.0, 0.71, 0.71, 0.5))
    assert reach.at(0.5) == pytest.approx(0.75)
    assert reach.lambda_at(1.5) == 0.0
    assert reach.lambda_at(0.1) == 4.0
    assert reach.lambda_at(0.855) == pytest.approx(0.5)
    assert reach.slope_at(0.855) == pytest.approx(0.29)
    assert reach.slope_at(0.71) >= 0.5 / 4 / 5


@given(values=st.lists(st.floats(0.1, 10), min_size=1, max_size=20))
def test_falling_keeps_the_mean_and_never_rises(values: list[float]) -> None:
    fitted = falling(values)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reach(lambdas=(0.0,), energy_j=(1.0,)), "lambdas"),
        (lambda: Reach(lambdas=(0.5, 1.0), energy_j=(1.0, 0.5)), "lambdas"),
        (lambda: Reach(lambdas=(0.0, 1.0), energy_j=(1.0, math.nan)), "energy_j"),
        (lambda: BudgetController(-1.0, Gains(integral=1, proportional=1, memory=0.5, lambda_max=1)), "budget_j"),
        (lambda: PriceLearner({"a": 0.0}), "table_j"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Prices from telemetry

TABLE = {"tokens": 2e-3, "width 3072": 4e-3, "width 1536": 2e-3, "open": 0.5, "degree seconds": 0.3}


def learn(*, dither: float, noise: float, windows: int = 200, factor: float = 1.3, seed: int = 0) -> PriceLearner:
    """A plant whose true prices are the table's times `factor`, and shares of experts that move by `dither`."""
    rng, learner = np.random.default_rng(seed), PriceLearner(TABLE)
    for _ in range(windows):
        tokens = 1000.0 * (1 + dither * rng.uniform(-1, 1))
        share, second = 0.5 + dither * rng.uniform(-0.5, 0.5), 0.5 + dither * rng.uniform(-0.5, 0.5)
        counts = {
            "tokens": tokens,
            "width 3072": tokens * share,
            "width 1536": tokens * second,
            "open": 6 + dither * rng.uniform(-5, 5),
            "degree seconds": 5 + dither * rng.uniform(-5, 5),
        }
        energy = factor * sum(TABLE[name] * counts[name] for name in TABLE)
        learner.update(counts, energy * (1 + noise * rng.standard_normal()))
    return learner


def test_dithered_shares_teach_the_prices() -> None:
    for price in learn(dither=1.0, noise=0.01).prices():
        assert price.trusted, price
        assert price.value_j == pytest.approx(1.3 * price.table_j, rel=0.1)
        assert price.low_j < price.learnt_j < price.high_j


def test_intervals_cover_the_truth() -> None:
    covered = [
        price.low_j <= 1.3 * price.table_j <= price.high_j
        for seed in range(40)
        for price in learn(dither=1.0, noise=0.02, windows=80, seed=seed).prices()
    ]
    assert sum(covered) / len(covered) > 0.85


def test_collinear_counts_fall_back_to_the_table() -> None:
    for price in learn(dither=0.0, noise=0.01).prices():
        assert not price.trusted
        assert price.value_j == price.table_j


def test_few_windows_are_not_trusted() -> None:
    assert not any(price.trusted for price in learn(dither=1.0, noise=0.0, windows=8).prices())


def test_forgetting_follows_a_change() -> None:
    learner, rng = PriceLearner({"a": 1.0, "b": 1.0}, forgetting=0.95), np.random.default_rng(1)
    for window in range(300):
        a, b = rng.uniform(1, 10, size=2)
        learner.update({"a": a, "b": b}, a + (1.0 if window < 150 else 2.0) * b)
    assert learner.prices()[1].value_j == pytest.approx(2.0, rel=0.02)


def test_windows_that_are_not_numbers_teach_nothing() -> None:
    learner = learn(dither=1.0, noise=0.01)
    before = learner.prices()
    for energy in (math.nan, math.inf, -1.0):
        learner.update(dict.fromkeys(TABLE, 1.0), energy)
    learner.update(dict.fromkeys(TABLE, math.nan), 1.0)
    assert learner.prices() == before
