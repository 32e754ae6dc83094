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
from moe.budget import TOLERANCE, Amortised, falling

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


# Gains that follow the measured curve


MEASURED = Reach(  # one H200, joules per token over λ; noise of a percent makes it flat between 0.1 and 0.5
    lambdas=(0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0),
    energy_j=(3.206e-4, 3.173e-4, 3.168e-4, 3.172e-4, 3.05e-4, 2.944e-4, 2.753e-4),
)


class LoadedGPU:
    """Joules over λ as measured, times a load; a reading has noise, and λ acts 20 % of a window late."""

    def __init__(self, seed: int, noise: float = 0.005, steeper: float = 1.0) -> None:
        self.rng, self.noise, self.load, self.steeper = np.random.default_rng(seed), noise, 1.0, steeper
        self.before: float | None = None

    def window(self, controller: BudgetController) -> tuple[float, float]:
        """(true, read) joules per token at the controller's λ."""
        now = MEASURED.energy_at(controller.energy_lambda)
        energy = 0.2 * (self.before or now) + 0.8 * now
        self.before = now
        true = self.load * MEASURED.most_j * (energy / MEASURED.most_j) ** self.steeper
        return true, true * (1 + self.noise * self.rng.standard_normal())


def settled_after(errors: list[float]) -> int:
    """Windows until ten in a row are within the tolerance."""
    return next(i for i in range(len(errors)) if max(map(abs, errors[i : i + 10])) <= TOLERANCE)


@pytest.mark.parametrize("load", [1.05, 1.1])
def test_a_load_is_made_good_within_four_windows(load: float) -> None:
    """With constant gains, those of the steep stretch at the budget, it took 8 and 13 at most, 6 and 11 typically."""
    taken = []
    for seed in range(40):
        plant, budget = LoadedGPU(seed), MEASURED.at(0.75)
        controller, errors = BudgetController.for_reach(budget, MEASURED), list[float]()
        for window in range(50):
            plant.load = load if window >= 12 else 1.0
            true, read = plant.window(controller)
            errors.append(true / budget - 1)
            controller.step(read)
        taken.append(settled_after(errors[12:]))
        assert abs(sum(errors[-20:])) / 20 < 0.005
        assert not controller.infeasible
    assert max(taken) <= 4
    assert sorted(taken)[20] <= 2


@pytest.mark.parametrize("steeper", [0.6, 1.7])
def test_a_curve_that_is_not_the_measured_one_is_followed_all_the_same(steeper: float) -> None:
    """λ saves 40 % less or 70 % more than it did when the range was measured."""
    plant, budget = LoadedGPU(0, steeper=steeper), MEASURED.at(0.75)
    controller, errors = BudgetController.for_reach(budget, MEASURED), list[float]()
    for window in range(60):
        plant.load = 1.04 if window >= 30 else 1.0
        true, read = plant.window(controller)
        errors.append(true / budget - 1)
        controller.step(read)
    assert abs(sum(errors[10:30])) / 20 < 0.005
    assert settled_after(errors[30:]) <= 6
    assert abs(sum(errors[-20:])) / 20 < 0.005


def test_one_window_that_is_off_moves_lambda_no_more_than_the_plain_gains_do() -> None:
    reach = Plant().reach()
    budget = reach.at(0.5)
    controller, plain = BudgetController.for_reach(budget, reach), Gains.of(reach, budget)
    before = controller.energy_lambda
    controller.step(1.1 * budget)
    asked = (plain.integral * 0.1 + plain.proportional * 0.05) * reach.slope_at(budget) / budget
    assert controller.energy_lambda == pytest.approx(reach.saving(before, asked))
    moved = controller.energy_lambda
    controller.step(1.1 * budget)  # twice is no accident
    assert controller.energy_lambda - moved > 1.5 * (moved - before)


@given(start=st.floats(0, 3), share=st.floats(-0.5, 0.5))
def test_saving_goes_there_and_back(start: float, share: float) -> None:
    reach = Plant().reach()
    there = reach.saving(start, share)
    assert (there > start) == (share > 0) or abs(there - start) < 1e-9
    assert reach.saving(there, -share) == pytest.approx(start, abs=1e-6)
    if 0 <= there <= 3:
        assert reach.energy_at(there) <= reach.energy_at(start) * math.exp(-share) * 1.02 or share < 0


def test_saving_crosses_a_flat_stretch_and_stands_where_nothing_saves() -> None:
    reach = Reach(lambdas=(0.0, 1.0, 2.0, 3.0), energy_j=(1.0, 0.8, 0.8, 0.6))
    assert reach.saving(0.5, math.log(0.9 / 0.7)) == pytest.approx(2.4, abs=0.05)  # 2.5 on the curve itself
    flat = Reach(lambdas=(0.0, 1.0), energy_j=(1.0, 1.0))
    controller = BudgetController.for_reach(0.9, flat)
    for _ in range(6):
        controller.step(1.0)
    assert controller.energy_lambda == 1.0
    assert controller.infeasible


# Updates are lumps


def lumpy(*, even: bool, seed: int, every: int = 6, update: float = 0.11) -> tuple[list[float], list[float]]:
    """(errors with the updates in, λ) of windows of which each sixth holds an update that takes 11 % of its joules."""
    plant, budget = LoadedGPU(seed), 1.018 * MEASURED.at(0.5)
    controller, account = BudgetController.for_reach(budget, MEASURED), Amortised()
    errors, lambdas = list[float](), list[float]()
    for window in range(12 + 30 * every):
        work, _ = plant.window(controller)
        spent = update * work if window % every == every - 1 else 0.0
        account, charged = account.window(spent, expected_j=update * work, part=1 / every)
        errors.append((work + spent) / budget - 1)
        lambdas.append(controller.energy_lambda)
        noise = 1 + plant.noise * plant.rng.standard_normal()
        controller.step((work + (charged if even else spent)) * noise)
    return errors[12:], lambdas[12:]


def test_a_controller_that_hears_updates_evenly_keeps_the_budget_with_less_ado() -> None:
    for seed in range(5):
        (raw, jumps), (even, calm) = lumpy(even=False, seed=seed), lumpy(even=True, seed=seed)
        assert abs(sum(even) / len(even)) < 0.005  # updates included
        assert abs(sum(raw) / len(raw)) < TOLERANCE
        assert np.var(calm) < 0.1 * np.var(jumps)


def test_what_is_charged_is_what_updates_took() -> None:
    """Within one update in advance, whatever they take and whenever they come; one that takes long is not charged at
    once; and none are charged where none come."""
    rng, account, paid, charged = np.random.default_rng(0), Amortised(), 0.0, list[float]()
    for window in range(3000):
        update = 10.0 * rng.uniform(0.5, 1.5) if rng.uniform() < 1 / 6 else 0.0
        update = 300.0 if window == 1000 else update
        account, here = account.window(update, expected_j=10.0, part=1 / 6)
        paid, charged = paid + update, [*charged, here]
        assert 0 <= here <= 3 * 10.0 / 6 + 1e-9
        assert sum(charged) <= paid + 10.0 + 1e-6
    assert sum(charged[:1000]) == pytest.approx(sum(charged[2000:]), rel=0.1)
    assert sum(charged) == pytest.approx(paid, rel=0.02)
    idle = [Amortised()]
    for _ in range(100):
        idle.append(idle[-1].window(0.0, expected_j=10.0, part=0.2)[0])
    assert idle[-1].balance_j == pytest.approx(10.0)
    account, here = Amortised().window(48.0, expected_j=2.0, part=24.0)  # many updates in a window
    assert here == pytest.approx(48.0)
