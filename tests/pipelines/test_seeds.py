"""Means over seeds, the chance of being on the front, attainment."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipelines import seeds
from pipelines.records import PointRecord, TrialRecord, to_table
from tests.pipelines import synthetic
from tests.pipelines.synthetic import point, trial

AXES = ("train_energy_j", "eval_loss_nats")
SIGN = np.ones(2)


def summary(rows: list[TrialRecord]) -> seeds.Summary:
    return seeds.summarise(to_table(TrialRecord, rows), AXES)


def replicates(name: str, joules: float, loss: float, spread: float, count: int = 4) -> list[TrialRecord]:
    offsets = np.linspace(-1, 1, count) * spread
    return [
        trial(
            f"{name}{s}",
            config_fingerprint=name,
            seed=s,
            train_energy_j=joules,
            train_energy_uncertainty_j=None,
            eval_loss_nats=loss + offsets[s],
        )
        for s in range(count)
    ]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Of 400 configurations of three seeds with known means, about 95 % of the intervals hold theirs."""
    rng = np.random.default_rng(0)
    rows = [
        trial(
            f"{c}-{s}",
            config_fingerprint=str(c),
            seed=s,
            train_energy_j=100 + rng.standard_normal(),
            train_energy_uncertainty_j=None,
            eval_loss_nats=3 + 0.01 * rng.standard_normal(),
        )
        for c in range(400)
        for s in range(3)
    ]
    found = summary(rows)
    inside = np.abs(found.mean_NM - np.array([100.0, 3.0])) <= found.half_NM
    assert inside.mean(axis=0) == pytest.approx([0.95, 0.95], abs=0.03)


def test_a_clear_front_is_certain_and_a_dominated_point_impossible() -> None:
    rows = [*replicates("a", 100, 3.0, 0.001), *replicates("b", 200, 2.5, 0.001), *replicates("c", 210, 2.9, 0.001)]
    chance = seeds.front_probability(summary(rows), SIGN, resamples=200)
    assert chance is not None
    assert chance.tolist() == [1.0, 1.0, 0.0]


def test_a_coin_toss_is_a_coin_toss() -> None:
    """Two configurations of equal joules and equal mean loss: each wins about every second resample."""
    rows = [*replicates("a", 100, 3.0, 0.01), *replicates("b", 100, 3.0, 0.01)]
    chance = seeds.front_probability(summary(rows), SIGN, resamples=2000)
    assert chance is not None
    assert chance == pytest.approx([0.5, 0.5], abs=0.08)


def test_without_a_repeated_seed_nothing_is_claimed() -> None:
    found = summary([trial("a"), trial("b", eval_loss_nats=3.0)])
    assert seeds.front_probability(found, SIGN, resamples=100) is None
    assert seeds.attainment(found, SIGN) is None
    assert seeds.front_probability(summary([]), SIGN, resamples=100) is None


def test_resampling_is_deterministic() -> None:
    found = summary(synthetic.sweep())
    a, b = (seeds.front_probability(found, SIGN, resamples=50) for _ in range(2))
    assert a is not None
    assert b is not None
    assert (a == b).all()


def test_attainment_of_two_seeds() -> None:
    """Seed 0 reaches (1, 2), seed 1 reaches (2, 1): both reach only (2, 2) and beyond."""
    rows = [
        trial("s0", config_fingerprint="a", seed=0, train_energy_j=1.0, eval_loss_nats=2.0),
        trial("s1", config_fingerprint="a", seed=1, train_energy_j=2.0, eval_loss_nats=1.0),
    ]
    found = seeds.attainment(summary(rows), SIGN)
    assert found is not None
    assert found.seeds == 2
    assert found.surfaces[100].tolist() == [[2.0, 2.0]]
    assert sorted(found.surfaces[50].tolist()) == [[1.0, 2.0], [2.0, 1.0]]
    assert found.deviation > 0


def test_attainment_takes_only_seeds_that_all_have() -> None:
    rows = [*replicates("a", 100, 3.0, 0.01, 3), *replicates("b", 200, 2.0, 0.01, 3)[:2]]
    found = seeds.attainment(summary(rows), SIGN)
    assert found is not None
    assert found.seeds == 3  # configuration b has no full set, so it stays out


def anytime_points(seeds_of: int = 4) -> list[PointRecord]:
    """Two experiments, a little apart, each of two numbers of epochs: seeds shift a whole trial, not its points."""
    shifts = np.linspace(-0.02, 0.02, seeds_of)
    return [
        point(
            f"{name}{s}",
            config_fingerprint=f"{name}-{end}",
            trial_fingerprint=name,
            seed=s,
            epochs=end,
            train_energy_j=100.0 * end,
            train_energy_uncertainty_j=None,
            eval_loss_nats=3.0 + offset - gain * (end - 1) + shift,
        )
        for name, offset, gain in (("a", 0.0, 0.01), ("b", 0.5, 0.01))
        for s, shift in enumerate(shifts)
        for end in (1, 2)
    ]


def test_points_of_one_trial_move_together_in_the_bootstrap() -> None:
    """A second epoch gains 0.01 nat in every trial; seeds spread by 0.02: drawn by point it would often look lost."""
    rows = anytime_points()
    whole = seeds.summarise(to_table(PointRecord, rows), AXES)
    chance = seeds.front_probability(whole, SIGN, resamples=400)
    assert chance is not None
    assert chance.tolist() == [1.0, 1.0, 0.0, 0.0]
    apart = seeds.summarise(to_table(PointRecord, rows).drop_columns(["trial_fingerprint"]), AXES)
    by_point = seeds.front_probability(apart, SIGN, resamples=400)
    assert by_point is not None
    assert 0.5 < by_point[1] < 0.95


def test_a_trial_with_fewer_epochs_lends_its_nearest_residual() -> None:
    rows = [row for row in anytime_points() if row.trial_fingerprint == "a" or row.epochs == 1]
    chance = seeds.front_probability(seeds.summarise(to_table(PointRecord, rows), AXES), SIGN, resamples=200)
    assert chance is not None
    assert chance.tolist() == [1.0, 1.0, 0.0]


def test_the_meters_noise_is_drawn_by_trial() -> None:
    """Joules of both ends are off together: the longer end is never cheaper than the shorter one."""
    rows = [dataclasses.replace(row, train_energy_uncertainty_j=80.0 * row.epochs) for row in anytime_points()]
    rows = [dataclasses.replace(row, eval_loss_nats=3.0) for row in rows if row.trial_fingerprint == "a"]
    chance = seeds.front_probability(seeds.summarise(to_table(PointRecord, rows), AXES), SIGN, resamples=500)
    assert chance is not None
    assert chance[1] < 0.02


def test_uncertainty_columns() -> None:
    assert seeds.uncertainty_column("train_energy_j") == "train_energy_uncertainty_j"
