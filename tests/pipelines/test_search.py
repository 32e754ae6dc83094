"""Searches: conditions are kept, outcomes are told as what they are, sessions continue."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import optuna
import pytest

from pipelines.config import ConfigError, TrialConfig
from pipelines.plan import plan_sweep
from pipelines.search import Study, StudySearch, sampler_of, study_of
from pipelines.trial_rows import config_columns
from tests.pipelines.synthetic import trial
from tune_spaces import Grid, LogUniform, Space

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
    searcher = StudySearch(study_of(plan, []), {"out": "x"}, samples=2, unfinished=[unfinished])
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


def suggested(searcher: StudySearch, count: int) -> list[TrialConfig]:
    """The next trials, each told as complete."""
    found = []
    for number in range(count):
        entry = searcher.suggest(f"ray-{len(searcher._names)}-{number}")
        config = TrialConfig.parse({k: v for k, v in entry["trial"].items() if k != "trial_id"})
        text = json.dumps(dataclasses.asdict(row_of(config)), default=str)
        searcher.on_trial_complete(list(searcher._names)[-1], {"trial_row": text})
        found.append(config)
    return found


@pytest.mark.parametrize("search", ["tpe", "nsga2", "gp", "cost-aware"])
def test_replicates_come_after_all_first_seeds(tiny: dict[str, Any], search: str) -> None:
    """As in a grid, so that those of one experiment do not run back to back; all are told, none is told twice."""
    plan = plan_sweep(space_of(tiny), search=search, samples=4, seeds=3)
    assert plan.count == 12
    searcher = StudySearch(study_of(plan, []), {}, samples=4, seeds=3)
    trials = suggested(searcher, 12)
    assert searcher.suggest("ray-end") == "FINISHED"
    first = [config.fingerprint for config in trials[:4]]
    assert len(set(first)) == 4
    assert [config.fingerprint for config in trials] == first * 3
    assert [config.seed for config in trials] == [tiny.get("seed", 0) + n for n in range(3) for _ in range(4)]
    told = searcher.study.known if isinstance(searcher.study, Study) else searcher.study.outcomes
    assert set(told) == {config.trial_id for config in trials}


def test_a_later_session_adds_the_replicates_that_are_missing(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space_of(tiny), search="tpe", samples=4, seeds=2)
    trials = suggested(StudySearch(study_of(plan, []), {}, samples=4, seeds=2), 8)
    unfinished, ended = trials[5], [*trials[:5], trials[6]]
    searcher = StudySearch(
        study_of(plan, [row_of(config) for config in ended]),
        {},
        samples=4,
        seeds=2,
        ended=ended,
        unfinished=[unfinished],
    )
    assert [config.trial_id for config in suggested(searcher, 2)] == [unfinished.trial_id, trials[7].trial_id]
    remembered = study_of(plan, [row_of(config) for config in trials])
    more = StudySearch(remembered, {}, samples=5, seeds=2, ended=trials)
    new, again = suggested(more, 2)
    assert new.fingerprint == again.fingerprint
    assert new.fingerprint not in {config.fingerprint for config in trials}


def test_a_small_space_gets_its_replicates_too(tiny: dict[str, Any]) -> None:
    """Two points, five experiments asked for: both points get at least two seeds, and no trial comes twice."""
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    for search in ("tpe", "cost-aware"):
        plan = plan_sweep(space, search=search, samples=5, seeds=2)
        trials = suggested(StudySearch(study_of(plan, []), {}, samples=5, seeds=2), 10)
        assert len({config.trial_id for config in trials}) == 10
        assert {config.top_k for config in trials[:2]} == {1, 2}
        assert sorted(config.top_k for config in trials[:4]) == [1, 1, 2, 2]


@pytest.mark.parametrize("search", ["tpe", "cost-aware"])
def test_what_runs_already_is_not_asked_for(tiny: dict[str, Any], search: str) -> None:
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    plan = plan_sweep(space, search=search, samples=4)
    unfinished = TrialConfig.parse({**tiny, "top_k": 1})
    searcher = StudySearch(study_of(plan, []), {}, samples=4, unfinished=[unfinished])
    running = [searcher.suggest(f"ray-{n}")["trial"]["trial_id"] for n in range(4)]
    assert len(set(running)) == 4


def test_nothing_to_search_is_named(tiny: dict[str, Any]) -> None:
    space = Space(name="s", question="", fixed=tiny, domains={}, conditions={}, sweep={})
    with pytest.raises(ConfigError, match="search: expected a space with domains"):
        study_of(plan_sweep(space, search="tpe"), [])
