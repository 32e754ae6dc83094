"""Plans: every experiment once, replicates interleaved, draws repeatable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import ConfigError, TrialConfig
from pipelines.estimate import epochs_trained, estimate
from pipelines.plan import SweepPlan, plan_sweep
from tune_spaces import Choice, Grid, IntRange, LogUniform, Space, SpaceError, Uniform, load_space, shipped_spaces


def space(fixed: dict[str, Any], domains: dict[str, Any], **sweep: Any) -> Space:
    return Space(name="s", question="q", fixed=fixed, domains=domains, conditions={}, sweep=sweep)


def test_lambda_where_it_cannot_act_is_dropped(tiny: dict[str, Any]) -> None:
    uniform = tiny | {"expert_width_factors": [1.0, 1.0]}
    del uniform["energy_lambda"]
    plan = plan_sweep(space(uniform, {"energy_lambda": Grid((0.0, 0.5, 1.0))}))
    assert [t.energy_lambda for t in plan.trials] == [0.0]
    assert plan.dropped == 2


def test_seeds_run_interleaved(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space(tiny, {"top_k": Grid((1, 2))}), seeds=2)
    assert [(t.top_k, t.seed) for t in plan.trials] == [(1, 0), (2, 0), (1, 1), (2, 1)]


def test_draws_repeat(tiny: dict[str, Any]) -> None:
    domains = {"energy_lambda": LogUniform(1e-3, 1), "temperature": Uniform(0.5, 2)}
    one, two = (plan_sweep(space(tiny, domains), samples=5) for _ in range(2))
    assert one.trials == two.trials
    assert len(one.trials) == 5


def test_overrides_replace_domains(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space(tiny, {"top_k": Grid((1, 2))}), overrides={"top_k": 2})
    assert [t.top_k for t in plan.trials] == [2]


def test_a_wrong_trial_is_refused_before_anything_runs(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="top_k: expected at most 4"):
        plan_sweep(space(tiny, {"top_k": Grid((1, 7))}))


def test_a_sampled_space_has_no_grid(tiny: dict[str, Any]) -> None:
    with pytest.raises(SpaceError, match="temperature: expected grid values"):
        plan_sweep(space(tiny, {"temperature": Uniform(0.5, 2)}), search="grid")


def test_files_that_differ_in_their_folder_only_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    for folder in "xy":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.txt").write_text(folder)
    files = Grid(tuple(str(tmp_path / folder / "c.txt") for folder in "xy"))
    with pytest.raises(ConfigError, match="data: expected files with different names"):
        plan_sweep(space(tiny, {"data": files}))


def test_an_unknown_search_is_named(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="search: expected one of grid, random, tpe, nsga2, gp, cost-aware, got"):
        plan_sweep(space(tiny, {}), search="magic")


def test_paths_are_absolute_because_a_trial_has_its_own_folder(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").touch()
    monkeypatch.chdir(tmp_path)
    (trial,) = plan_sweep(space(tiny | {"data": "a.txt", "tokenizer": "embedded"}, {})).trials
    assert trial.data == str(tmp_path / "a.txt")
    assert trial.tokenizer == "embedded"
    assert trial.fingerprint == trial.model_copy(update={"data": "/elsewhere/a.txt"}).fingerprint


def test_a_setting_replaces_that_of_every_case(tiny: dict[str, Any]) -> None:
    cases = {"case": Grid(({"top_k": 1, "temperature": 2.0}, {"top_k": 2}))}
    plan = plan_sweep(space(tiny, cases))
    assert [(t.top_k, t.temperature) for t in plan.trials] == [(1, 2.0), (2, 1.0)]
    plan = plan_sweep(space(tiny, cases), overrides={"top_k": 2})
    assert [(t.top_k, t.temperature) for t in plan.trials] == [(2, 2.0), (2, 1.0)]
    assert SweepPlan.from_document(json.loads(json.dumps(plan.to_document()))).loaded_space().domains
    with pytest.raises(ConfigError, match="search: expected grid or random for a space with 'case', got 'tpe'"):
        plan_sweep(space(tiny, cases), search="tpe")


def test_a_plan_survives_json(tiny: dict[str, Any]) -> None:
    domains = {"top_k": Grid((1, 2)), "energy_lambda": LogUniform(1e-3, 1)}
    for search in ("random", "tpe"):
        plan = plan_sweep(space(tiny, domains), search=search, samples=6, scheduler="pareto-asha", max_joules=5)
        again = SweepPlan.from_document(json.loads(json.dumps(plan.to_document())))
        assert again == plan
        assert again.loaded_space().domains == plan.loaded_space().domains


def test_more_seeds_and_samples_only_add(tiny: dict[str, Any]) -> None:
    plan = plan_sweep(space(tiny, {"energy_lambda": LogUniform(1e-3, 1)}), samples=3)
    more = plan_sweep(plan.loaded_space(), samples=5, seeds=2, sweep_id=plan.sweep_id)
    both = plan.extended(more)
    assert both.trials[:3] == plan.trials
    assert len(both.trials) == 10
    assert both.sweep_id == plan.sweep_id


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scheduler": "hyperband"}, "scheduler: expected one of fifo, pareto-asha"),
        ({"objectives": ["eval_loss_nats"]}, "objectives: expected two or three"),
        ({"objectives": ["joy", "eval_loss_nats"]}, "objectives: expected a column of trials"),
        ({"objectives": ["router", "eval_loss_nats"]}, "objectives: expected a column of numbers, got 'router'"),
        ({"objectives": ["throttled", "eval_loss_nats"]}, "objectives: expected a column of numbers, got 'throttled'"),
        ({"max_joules": -1}, "max_joules: expected a number above 0"),
    ],
)
def test_rules_that_cannot_be_are_named(tiny: dict[str, Any], more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_sweep(space(tiny, {}), **more)


ADAPTIVE = [
    ({}, {}, {}, "search: expected a space with domains for tpe, got fixed values only"),
    ({}, {"top_k": Choice((1, 1, 1, 99))}, {}, "top_k: expected at most 4, the number of experts, got 99"),
    ({}, {"top_k": IntRange(1, 9)}, {}, "top_k: expected at most 4, the number of experts"),
    ({}, {"n_head": Choice((2, 4)), "n_embd": Choice((32, 30))}, {}, "n_embd: expected a multiple of n_head"),
]


@pytest.mark.parametrize(("sweep", "domains", "options", "said"), ADAPTIVE, ids=[case[-1][:30] for case in ADAPTIVE])
def test_what_would_end_an_adaptive_search_half_way_is_refused(
    tiny: dict[str, Any], sweep: dict[str, Any], domains: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    fixed = {key: value for key, value in tiny.items() if key not in domains}
    with pytest.raises(ConfigError, match=said):
        plan_sweep(space(fixed, domains, **sweep), search="tpe", **options)


def test_cost_aware_takes_two_objectives(tiny: dict[str, Any]) -> None:
    three = ["train_energy_j", "eval_loss_nats", "train_duration_s"]
    with pytest.raises(ConfigError, match="objectives: expected two for search cost-aware, got 3"):
        plan_sweep(space(tiny, {"top_k": Grid((1, 2))}), search="cost-aware", objectives=three)


def test_seeds_of_one_are_no_replicates(tiny: dict[str, Any]) -> None:
    assert plan_sweep(space(tiny, {"top_k": Grid((1, 2))}, seeds=2), search="tpe", seeds=1).seeds == 1
    assert plan_sweep(space(tiny, {"top_k": Grid((1, 2))}, seeds=2), search="tpe", samples=6).count == 4


def test_every_value_of_a_random_search_is_checked_where_it_applies(tiny: dict[str, Any]) -> None:
    domains = {"router": Choice(("topk",) * 40 + ("energy",)), "energy_lambda": Choice((0.1,) * 40 + (-1.0,))}
    fixed = {key: value for key, value in tiny.items() if key not in domains}
    conditional = Space(
        name="s",
        question="q",
        fixed=fixed,
        domains=domains,
        conditions={"energy_lambda": {"router": ("energy",)}},
        sweep={},
    )
    with pytest.raises(ConfigError, match="energy_lambda: expected greater than or equal to 0, got -1"):
        plan_sweep(conditional, samples=2)


def test_anytime_with_another_schedule_is_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"schedule: expected wsd \(or none\) with epochs: anytime:3, got 'cosine'"):
        TrialConfig.parse(tiny | {"epochs": "anytime:3", "schedule": "cosine"})
    assert TrialConfig.parse(tiny | {"epochs": "anytime:3", "schedule": "wsd"}).anytime


def test_anytime_is_every_number_of_epochs_up_to_one(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny | {"epochs": "anytime:3"})
    assert (config.epochs, config.schedule, config.anytime) == (3, "wsd", True)
    assert config.fingerprint == TrialConfig.parse(tiny | {"epochs": 3, "schedule": "wsd"}).fingerprint
    with pytest.raises(ConfigError, match="epochs: expected anytime or anytime:COUNT"):
        TrialConfig.parse(tiny | {"epochs": "anytimes"})


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_every_shipped_space_is_a_plan_with_an_estimate(name: str) -> None:
    plan = plan_sweep(load_space(shipped_spaces()[name]))
    trials = plan.trials or plan.examples()
    assert plan.question
    found = estimate(trials, gpu_name="NVIDIA H200", epoch_tokens=1_000_000)
    assert found.energy_j > 0
    assert found.duration_s > 0
    assert not found.analytic


def test_an_estimate_goes_by_the_power_limit(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny)
    for limit_w, analytic in ((700.0, False), (350.0, True), (None, False)):
        found = estimate([config], gpu_name="NVIDIA H200", power_limit_w=limit_w, epoch_tokens=1_000_000)
        assert (found.analytic, "analytic" in found.flags) == (analytic, analytic)


def test_an_anytime_trial_costs_its_trunk_once(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny | {"epochs": "anytime:3", "decay_fraction": 0.2})
    assert epochs_trained(config) == pytest.approx(3 + 0.2 * (1 + 2))
    assert epochs_trained(TrialConfig.parse(tiny | {"epochs": 3})) == 3
