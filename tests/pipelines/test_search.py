"""Searches: conditions are kept, outcomes are told as what they are, sessions continue."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
import pytest

from pipelines.config import ConfigError, TrialConfig
from pipelines.plan import SweepPlan, plan_sweep
from pipelines.search import Study, StudySearch, sampler_of, study_of
from pipelines.trial_rows import config_columns
from tests.pipelines.synthetic import trial
from tune_spaces import Choice, Grid, IntRange, LogUniform, Space

STATES = optuna.trial.TrialState


def space_of(tiny: dict[str, Any]) -> Space:
    fixed = {k: v for k, v in tiny.items() if k not in ("energy_lambda", "regularizer", "regularizer_weight")}
    domains = {
        "energy_lambda": LogUniform(1e-3, 1.0),
        "regularizer_weight": LogUniform(1e-3, 1.0),
        "regularizer": Grid(("none", "load_balance")),
    }
    conditions = {"regularizer_weight": {"regularizer": ("load_balance",)}}
    return Space(name="s", question="", fixed=fixed, domains=domains, conditions=conditions, sweep={})


def row_of(config: TrialConfig, **changes: Any) -> Any:
    values = config_columns(config) | {"train_energy_j": 10 + config.energy_lambda, "eval_loss_nats": 3.0}
    return trial(config.trial_id, **(values | changes))


@pytest.mark.parametrize("search", ["tpe", "nsga2", "gp"])
def test_a_search_draws_valid_trials_and_keeps_conditions(tiny: dict[str, Any], search: str) -> None:
    plan = plan_sweep(space_of(tiny), search=search, samples=14)
    assert plan.trials == ()
    study = study_of(plan, [])
    seen = set()
    for _ in range(14):
        config = study.ask()
        assert config.trial_id not in seen
        seen.add(config.trial_id)
        assert config.regularizer_weight == 0 or config.regularizer == "load_balance"
        study.tell(config.trial_id, row_of(config))
    drawn = [set(t.params) for t in study.study.trials]
    assert {"energy_lambda", "regularizer"} in drawn
    assert {"energy_lambda", "regularizer", "regularizer_weight"} in drawn


OUTCOMES: list[tuple[dict[str, Any], Any]] = [
    ({}, STATES.COMPLETE),
    ({"state": "FAILED"}, STATES.FAIL),
    ({"state": "STOPPED", "censored": True}, STATES.PRUNED),
    ({"eval_loss_nats": float("nan")}, STATES.FAIL),
    ({"train_energy_j": None}, STATES.FAIL),
]


@pytest.mark.parametrize("search", ["tpe", "nsga2", "gp"])
def test_outcomes_are_told_as_what_they_are(tiny: dict[str, Any], search: str) -> None:
    study = Study(space_of(tiny), ("train_energy_j", "eval_loss_nats"), sampler_of(search, 8))
    rows = []
    for change, _ in OUTCOMES:
        config = study.ask()
        rows.append(row_of(config, **change))
        study.tell(config.trial_id, rows[-1])
    for stopped in (False, True):
        study.tell(study.ask().trial_id, None, stopped=stopped)
    expected = [state for _, state in OUTCOMES]
    assert [t.state for t in study.study.trials] == [*expected, STATES.FAIL, STATES.PRUNED]
    assert [t.values is not None for t in study.study.trials] == [
        t.state == STATES.COMPLETE for t in study.study.trials
    ]
    assert len(study.study.best_trials) == 1
    again = Study(space_of(tiny), ("train_energy_j", "eval_loss_nats"), sampler_of(search, 8))
    for row in rows:
        again.remember(row)
    assert [t.state for t in again.study.trials] == expected
    for _ in range(8):  # samplers go on beside pruned trials
        study.tell(study.ask().trial_id, None, stopped=True)
    assert study.ask().trial_id not in study.known


def test_tpe_draws_away_from_what_was_stopped(tiny: dict[str, Any]) -> None:
    """A failed trial teaches Optuna nothing, a stopped one stands among the bad."""
    fixed = {key: value for key, value in tiny.items() if key != "energy_lambda"}
    space = Space(
        name="s", question="", fixed=fixed, domains={"energy_lambda": LogUniform(1e-3, 1.0)}, conditions={}, sweep={}
    )
    axes = ("train_energy_j", "eval_loss_nats")
    high = {}
    for state in ("FAILED", "STOPPED"):
        study = Study(space, axes, sampler_of("tpe", 64))
        for _ in range(64):
            config = study.ask()
            good = config.energy_lambda < 0.03
            study.tell(config.trial_id, row_of(config, **({} if good else {"state": state})))
        high[state] = sum(trial.params["energy_lambda"] >= 0.03 for trial in study.study.trials)
    assert high["STOPPED"] < 0.7 * high["FAILED"]


def test_a_session_remembers_the_earlier_ones(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space_of(tiny), search="tpe", samples=6, objectives=["train_energy_j", "tokens_per_s:max"])
    first = study_of(plan, [])
    rows = [row_of(first.ask()) for _ in range(4)]
    second = study_of(plan, rows)
    assert [t.state for t in second.study.trials] == [STATES.COMPLETE] * 4
    assert [d.name for d in second.study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert set(second.known) == {row.trial_id for row in rows}
    assert second.ask().trial_id not in second.known


def test_the_searcher_runs_what_is_unfinished_first(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space_of(tiny), search="nsga2", samples=3)
    unfinished = TrialConfig.parse(tiny)
    searcher = StudySearch(study_of(plan, []), {"out": "x"}, samples=2, count=2, unfinished=[unfinished])
    first = searcher.suggest("ray-1")
    assert first["trial"]["trial_id"] == unfinished.trial_id
    assert first["out"] == "x"
    row = row_of(unfinished)
    text = json.dumps(dataclasses.asdict(row), default=str)
    searcher.on_trial_complete("ray-1", {"trial_row": text})
    assert [trial.state for trial in searcher.study.study.trials] == [STATES.COMPLETE]
    assert searcher.suggest("ray-2") is not None
    assert searcher.suggest("ray-3") == "FINISHED"
    searcher.on_trial_complete("ray-2", {"epoch": 1, "loss": 3.0})  # the scheduler's word: no row of its own yet
    assert [trial.state for trial in searcher.study.study.trials] == [STATES.COMPLETE, STATES.PRUNED]


def searcher_of(plan: SweepPlan, ended: Sequence[TrialConfig] = (), **more: Any) -> StudySearch:
    """A session's searcher, as a sweep makes it."""
    count = plan.left(config.trial_id for config in ended)
    study = study_of(plan, [row_of(config) for config in ended])
    return StudySearch(study, {}, samples=plan.samples or 0, seeds=plan.seeds, count=count, ended=ended, **more)


def begun(searcher: StudySearch) -> Iterator[tuple[str, TrialConfig]]:
    """Ray's trials until there are no more."""
    for number in itertools.count():
        entry = searcher.suggest(f"ray-{number}")
        if entry == "FINISHED":
            return
        yield f"ray-{number}", TrialConfig.parse({k: v for k, v in entry["trial"].items() if k != "trial_id"})


def completed(searcher: StudySearch) -> list[TrialConfig]:
    """What a searcher suggests until it ends, one after the other, each told as complete."""
    found = []
    for name, config in begun(searcher):
        text = json.dumps(dataclasses.asdict(row_of(config)), default=str)
        searcher.on_trial_complete(name, {"trial_row": text})
        found.append(config)
    return found


SMALL = {"top_k": Grid((1, 2))}


def small_space(tiny: dict[str, Any], domains: dict[str, Any] | None = None) -> Space:
    fixed = {key: value for key, value in tiny.items() if key not in (domains or SMALL)}
    return Space(name="s", question="", fixed=fixed, domains=domains or SMALL, conditions={}, sweep={})


@pytest.mark.parametrize("search", ["tpe", "nsga2", "gp", "cost-aware"])
def test_replicates_come_after_all_first_seeds(tiny: dict[str, Any], search: str) -> None:
    """As in a grid, so that those of one experiment do not run back to back; each is told once."""
    plan = plan_sweep(space_of(tiny), search=search, samples=4, seeds=3)
    assert plan.count == 12
    searcher = searcher_of(plan)
    trials = completed(searcher)
    first = [config.fingerprint for config in trials[:4]]
    assert len(set(first)) == 4
    assert [config.fingerprint for config in trials] == first * 3
    assert [config.seed for config in trials] == [tiny.get("seed", 0) + n for n in range(3) for _ in range(4)]
    if isinstance(searcher.study, Study):
        assert [trial.state for trial in searcher.study.study.trials] == [STATES.COMPLETE] * 12
    else:
        assert len(searcher.study.outcomes) == 12
    assert not searcher.study.asked


def test_a_stopped_replicate_is_told_as_pruned(tiny: dict[str, Any]) -> None:
    searcher = searcher_of(plan_sweep(space_of(tiny), search="tpe", samples=3, seeds=2))
    for name, _ in begun(searcher):
        searcher.on_trial_complete(name, {"epoch": 1})
    assert [trial.state for trial in searcher.study.study.trials] == [STATES.PRUNED] * 6


def test_a_later_session_adds_the_replicates_that_are_missing(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space_of(tiny), search="tpe", samples=4, seeds=2)
    trials = completed(searcher_of(plan))
    unfinished, ended = trials[5], [*trials[:5], trials[6]]
    assert plan.left(config.trial_id for config in ended) == 2
    again = completed(searcher_of(plan, ended, unfinished=[unfinished]))
    assert [config.trial_id for config in again] == [unfinished.trial_id, trials[7].trial_id]
    new, replicate = completed(searcher_of(dataclasses.replace(plan, samples=5), trials))
    assert new.fingerprint == replicate.fingerprint
    assert new.fingerprint not in {config.fingerprint for config in trials}


@pytest.mark.parametrize(
    ("samples", "seeds", "new", "more"), [(8, 1, 4, 0), (6, 2, 4, 0), (4, 4, 0, 4), (4, 1, 0, 0), (2, 3, 0, 0)]
)
def test_samples_and_seeds_count_by_experiment(
    tiny: dict[str, Any], samples: int, seeds: int, new: int, more: int
) -> None:
    """Fewer seeds and more samples, or the reverse, after a sweep of four experiments with three seeds each."""
    plan = plan_sweep(space_of(tiny), search="tpe", samples=4, seeds=3)
    trials = completed(searcher_of(plan))
    changed = dataclasses.replace(plan, samples=samples, seeds=seeds)
    assert changed.left(config.trial_id for config in trials) == new + more
    found = completed(searcher_of(changed, trials))
    known = {config.fingerprint for config in trials}
    assert sum(config.fingerprint not in known for config in found) == new
    assert sum(config.fingerprint in known for config in found) == more
    assert not changed.left(config.trial_id for config in (*trials, *found))


@pytest.mark.parametrize("search", ["tpe", "nsga2", "gp", "cost-aware"])
@pytest.mark.parametrize("domains", [SMALL, {"top_k": IntRange(1, 2), "energy_lambda": Choice((0.1, 0.2, 0.2))}])
def test_a_small_space_is_drawn_whole_and_then_replicated(
    tiny: dict[str, Any], search: str, domains: dict[str, Any]
) -> None:
    plan = plan_sweep(small_space(tiny, domains), search=search, samples=16, seeds=3)
    points = 2 if domains is SMALL else 4
    assert plan.samples == points
    trials = completed(searcher_of(plan))
    assert len({config.trial_id for config in trials}) == len(trials) == 3 * points
    assert len({config.fingerprint for config in trials[:points]}) == points


def test_a_sampler_that_insists_gets_an_untried_point(tiny: dict[str, Any]) -> None:
    """Optuna's Gaussian process asks for its favourite again and again."""
    space = small_space(tiny, {"top_k": Grid((1, 2, 3)), "energy_lambda": Grid((0.1, 0.2, 0.3, 0.4))})
    trials = completed(searcher_of(plan_sweep(space, search="gp", samples=11, seeds=2)))
    assert len({config.fingerprint for config in trials[:11]}) == 11
    assert [config.fingerprint for config in trials[:11]] == [config.fingerprint for config in trials[11:]]


@pytest.mark.parametrize("search", ["tpe", "gp", "cost-aware"])
@pytest.mark.parametrize(
    "domains",
    [
        {"router": Grid(("dense",)), "energy_lambda": LogUniform(0.1, 1.0)},  # λ does nothing there
        {"top_k": Grid((1, 2))},
    ],
)
def test_a_space_without_more_experiments_ends_the_search(
    tiny: dict[str, Any], search: str, domains: dict[str, Any]
) -> None:
    """It seemed to have as many as were asked for; the replicates are made all the same."""
    plan = dataclasses.replace(plan_sweep(small_space(tiny, domains), search=search, seeds=2), samples=5)
    searcher = searcher_of(plan)
    assert searcher.exhausted is None
    trials = completed(searcher)
    points = len({config.fingerprint for config in trials})
    assert searcher.exhausted == points == (2 if "top_k" in domains else 1)
    assert len(trials) == 2 * points
    assert not dataclasses.replace(plan, samples=points).left(config.trial_id for config in trials)
    resumed = searcher_of(plan, trials)
    assert completed(resumed) == []
    assert resumed.exhausted == points


def test_one_experiment_is_drawn_once_though_the_sampler_likes_it(tiny: dict[str, Any]) -> None:
    """The dense model is the cheapest, and one experiment whatever λ."""
    space = small_space(tiny, {"router": Grid(("dense", "energy")), "energy_lambda": LogUniform(0.1, 1.0)})
    plan = plan_sweep(space, search="gp", samples=6)
    searcher = searcher_of(plan)
    found = []
    for name, config in begun(searcher):
        row = row_of(config, train_energy_j=1.0 if config.router == "dense" else 9.0)
        searcher.on_trial_complete(name, {"trial_row": json.dumps(dataclasses.asdict(row), default=str)})
        found.append(config)
    assert len({config.fingerprint for config in found}) == len(found) == 6
    assert sum(config.router == "dense" for config in found) == 1
    assert not plan.left(config.trial_id for config in found)


def test_a_range_of_many_integers_is_not_listed(tiny: dict[str, Any]) -> None:
    domains = {"max_train_tokens": IntRange(1000, 10**12), "energy_lambda": LogUniform(0.1, 1.0)}
    assert plan_sweep(small_space(tiny, domains), search="tpe", samples=3).samples == 3


def test_numbers_of_a_row_are_found_in_its_list_whatever_their_kind(tiny: dict[str, Any]) -> None:
    domains = {"energy_lambda": Grid((0, 0.5)), "expert_width_factors": Grid(([1, 1, 1, 1], [1, 1, 0.5, 0.5]))}
    space = small_space(tiny, domains)
    row = row_of(TrialConfig.parse({**tiny, "energy_lambda": 0.0, "expert_width_factors": [1.0, 1.0, 0.5, 0.5]}))
    (told,) = study_of(plan_sweep(space, search="tpe"), [row]).study.trials
    assert told.params == {"energy_lambda": 0, "expert_width_factors": 1}


@pytest.mark.parametrize("search", ["tpe", "cost-aware"])
def test_what_runs_already_is_not_asked_for(tiny: dict[str, Any], search: str) -> None:
    plan = plan_sweep(small_space(tiny), search=search, samples=2, seeds=2)
    running = list(begun(searcher_of(plan, unfinished=[TrialConfig.parse({**tiny, "top_k": 1})])))
    assert len({config.trial_id for _, config in running}) == 4


def test_a_row_outside_the_space_is_told_without_that_key(tiny: dict[str, Any]) -> None:
    study = study_of(
        plan_sweep(space_of(tiny), search="tpe"), [row_of(TrialConfig.parse({**tiny, "energy_lambda": 5}))]
    )
    (told,) = study.study.trials
    assert told.state == STATES.COMPLETE
    assert "energy_lambda" not in told.params


def test_nothing_to_search_is_named(tiny: dict[str, Any]) -> None:
    space = Space(name="s", question="", fixed=tiny, domains={}, conditions={}, sweep={})
    with pytest.raises(ConfigError, match="search: expected a space with domains"):
        study_of(plan_sweep(space, search="tpe"), [])
