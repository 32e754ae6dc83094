"""The search that counts joules: its mathematics against Monte Carlo and brute force, its thrift against chance."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from pipelines import fronts
from pipelines.config import ConfigError, TrialConfig
from pipelines.costaware import CostAwareStudy, Known, choose, features
from pipelines.plan import plan_sweep
from pipelines.search import study_of
from pipelines.surrogate import Belief, believe, expected_hypervolume_improvement, expected_improvement
from pipelines.trial_rows import config_columns
from tests.pipelines.synthetic import trial
from tune_spaces import Choice, Grid, LogUniform, Space

AXES = {
    "learning_rate": Grid((3e-4, 1e-3, 3e-3)),
    "energy_lambda": Grid((0.0, 0.1, 0.3, 1.0)),
    "top_k": Grid((1, 2, 4)),
    "epochs": Grid((1, 2, 4)),
}


def space_of(tiny: dict[str, Any], **domains: Any) -> Space:
    domains = domains or AXES
    fixed = {key: value for key, value in tiny.items() if key not in domains}
    return Space(name="s", question="", fixed=fixed, domains=domains, conditions={}, sweep={})


def row_of(config: TrialConfig, **changes: Any) -> Any:
    return trial(config.trial_id, **(config_columns(config) | changes))


def outcome(config: TrialConfig) -> dict[str, float]:
    """Loss and joules as a smooth landscape: more epochs and experts help, a learning rate is best in the middle."""
    joules = 1000.0 * config.epochs * (1 + 0.4 * config.top_k) * (1 - 0.1 * config.energy_lambda)
    loss = 4 + config.epochs**-0.5 - 0.1 * math.log2(config.top_k) + 0.2 * math.log10(config.learning_rate / 1e-3) ** 2
    return {"train_energy_j": joules, "eval_loss_nats": loss + 0.05 * config.energy_lambda}


def modelled_j(config: TrialConfig) -> float:
    return config.epochs * (1 + 0.3 * config.top_k)


def test_expected_improvement_of_a_certain_point_is_its_improvement() -> None:
    belief = Belief(mean_C=np.array([1.0, 3.0]), std_C=np.array([1e-9, 1e-9]))
    assert expected_improvement(2.0, belief) == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_expected_hypervolume_improvement_is_the_mean_over_draws(seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.uniform(size=(6, 2))
    front = points[fronts.nondominated(points)]
    reference = np.array([1.1, 0.9])
    first = Belief(mean_C=generator.uniform(size=3), std_C=generator.uniform(0.05, 0.3, size=3))
    second = Belief(mean_C=generator.uniform(size=3), std_C=generator.uniform(0.05, 0.3, size=3))
    exact = expected_hypervolume_improvement(front, reference, first, second)
    before = fronts.hypervolume(front, reference)
    for c in range(3):
        draws = np.stack([generator.normal(b.mean_C[c], b.std_C[c], size=4000) for b in (first, second)], axis=1)
        gains = [fronts.hypervolume(np.vstack([front, draw]), reference) - before for draw in draws]
        assert exact[c] == pytest.approx(np.mean(gains), abs=5 * np.std(gains) / math.sqrt(len(gains)) + 1e-6)


def test_a_belief_knows_what_it_saw_and_doubts_what_it_did_not() -> None:
    x = np.linspace(0, 1, 9)[:, None]
    y = np.sin(5 * x[:, 0]) + 2 * x[:, 0]
    inside = believe(x, y, np.array([[0.31], [0.69]]))
    assert inside.mean_C == pytest.approx([math.sin(1.55) + 0.62, math.sin(3.45) + 1.38], abs=0.1)
    beyond = believe(x[:5], y[:5], np.array([[0.25], [1.0]]))
    assert beyond.std_C[1] > 3 * beyond.std_C[0]


def test_equal_outcomes_are_believed_too() -> None:
    belief = believe(np.eye(3), np.full(3, 2.0), np.full((1, 3), 0.5))
    assert belief.mean_C == pytest.approx([2.0])
    assert np.isfinite(belief.std_C).all()


def test_of_two_equal_promises_the_cheaper_is_taken() -> None:
    x = np.array([[v, 0.5] for v in np.linspace(0, 1, 7)])
    cost = np.stack([np.log(np.linspace(1, 2, 7)), np.linspace(2, 1, 7)], axis=1)
    known = Known(
        x_NF=x, modelled_N=np.ones(7), cost_N2=cost, running_RF=np.empty((0, 2)), running_R=np.empty(0),
        scaled=(False, False),
    )  # fmt: skip
    asked = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert choose(known, asked, np.array([5.0, 1.0]), random.Random(0)) == 1
    assert choose(known, asked, np.array([1.0, 5.0]), random.Random(0)) == 0


def joules_to_the_front(tiny: dict[str, Any], seed: int, *, ours: bool) -> float:
    """Share of the grid's joules until 99 % of its hypervolume."""
    space = space_of(tiny)
    configs = [TrialConfig.parse(point) for point in space.grid_points()]
    cost = {
        c.trial_id: np.array([math.log(outcome(c)["train_energy_j"]), outcome(c)["eval_loss_nats"]]) for c in configs
    }
    reference = np.max(list(cost.values()), axis=0)
    goal = 0.99 * fronts.hypervolume(np.array(list(cost.values())), reference)
    whole = sum(outcome(c)["train_energy_j"] for c in configs)
    study = CostAwareStudy(space, ("train_energy_j", "eval_loss_nats"), modelled_j, seed=seed)
    order = random.Random(seed).sample(configs, len(configs))
    spent, done = 0.0, []
    for drawn in order:
        config = study.ask() if ours else drawn
        spent += outcome(config)["train_energy_j"]
        done.append(cost[config.trial_id])
        if ours:
            study.tell(config.trial_id, row_of(config, **outcome(config)))
        if fronts.hypervolume(np.array(done), reference) >= goal:
            break
    return spent / whole


@pytest.mark.slow
def test_it_finds_a_front_for_far_fewer_joules_than_chance(tiny: dict[str, Any]) -> None:
    ours = np.median([joules_to_the_front(tiny, seed, ours=True) for seed in range(3)])
    chance = np.median([joules_to_the_front(tiny, seed, ours=False) for seed in range(9)])
    assert ours < 0.6 * chance


def test_it_asks_each_point_once(tiny: dict[str, Any]) -> None:
    study = CostAwareStudy(space_of(tiny, top_k=Choice((1, 2))), ("train_energy_j", "eval_loss_nats"), modelled_j)
    asked = [study.ask() for _ in range(2)]
    assert {config.top_k for config in asked if config is not None} == {1, 2}
    assert study.ask() is None


def test_failed_and_stopped_trials_are_not_asked_again_and_not_believed(tiny: dict[str, Any]) -> None:
    study = CostAwareStudy(space_of(tiny), ("train_energy_j", "eval_loss_nats"), modelled_j)
    seen = set()
    for changes in ({"state": "FAILED"}, {"state": "STOPPED", "censored": True}, {"eval_loss_nats": math.nan}):
        config = study.ask()
        study.tell(config.trial_id, row_of(config, **(outcome(config) | changes)))
        seen.add(config.trial_id)
    assert len(study._known().x_NF) == 0
    assert study.ask().trial_id not in seen


def test_it_goes_on_from_what_earlier_sessions_found(tiny: dict[str, Any]) -> None:
    first = CostAwareStudy(space_of(tiny), ("train_energy_j", "eval_loss_nats"), modelled_j)
    rows = []
    for _ in range(8):
        config = first.ask()
        rows.append(row_of(config, **outcome(config)))
        first.tell(config.trial_id, rows[-1])
    plan = plan_sweep(space_of(tiny), search="cost-aware", samples=20)
    assert plan.is_adaptive
    again = study_of(plan, rows)
    assert isinstance(again, CostAwareStudy)
    assert len(again._known().x_NF) == 8
    assert again.ask().trial_id not in {row.trial_id for row in rows}


def test_a_continuous_space_is_searched_by_draws(tiny: dict[str, Any]) -> None:
    space = space_of(tiny, energy_lambda=LogUniform(1e-3, 1.0), regularizer=Choice(("none", "load_balance")))
    study = CostAwareStudy(space, ("train_energy_j:min", "eval_loss_nats"), modelled_j)
    for _ in range(8):
        config = study.ask()
        assert 1e-3 <= config.energy_lambda <= 1.0
        study.tell(config.trial_id, row_of(config, **outcome(config)))


def test_three_objectives_are_refused_in_one_line(tiny: dict[str, Any]) -> None:
    axes = ("train_energy_j", "eval_loss_nats", "decode_j_per_token")
    with pytest.raises(ConfigError, match="objectives: expected two for search cost-aware, got 3"):
        CostAwareStudy(space_of(tiny), axes, modelled_j)


def test_features_are_ranks_and_indicators() -> None:
    space = Space(
        name="s", question="", fixed={}, sweep={},
        domains={"a": Grid((1, 4, 2)), "b": Choice(("x", "y")), "c": LogUniform(0.01, 1.0)},
        conditions={"c": {"b": ("y",)}},
    )  # fmt: skip
    assert features(space, {"a": 2, "b": "y", "c": 0.1}) == pytest.approx([0.5, 0, 1, 0.5])
    assert features(space, {"a": 4, "b": "x", "c": 0.9}) == [1.0, 1.0, 0.0, 0.5]  # c does not apply
