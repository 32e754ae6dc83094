"""Pareto-ASHA: who is never stopped, and what the order of reports may change."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import TrialConfig
from pipelines.plan import plan_sweep
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.scheduler import ParetoASHA, Report, Rule, Rungs, goes_on, is_rung, layers, rungs_of, seed_margin
from pipelines.sweep import _scheduler
from pipelines.trial_rows import config_columns
from tune_spaces import Grid, Space

RULE = Rule(margin_nats=0.0, margin_joules=0.0)
points = st.lists(
    st.tuples(st.floats(1.0, 9.0), st.floats(1.0, 1e6)), min_size=1, max_size=24, unique=True
)  # (loss, joules)


def rung_of(values: list[tuple[float, float]]) -> dict[str, Report]:
    return {f"t{i}-s0": Report(loss=loss, joules=j, experiment=f"t{i}") for i, (loss, j) in enumerate(values)}


def stopped(values: list[tuple[float, float]], order: list[int], rule: Rule = RULE) -> set[int]:
    """Who is stopped where reports arrive in an order."""
    rungs = Rungs(rule)
    trial = {"schedule": "cosine", "epochs": 4}
    return {i for i in order if not rungs.add(trial, f"t{i}-s0", 1, *values[i])}


@given(points, st.randoms(use_true_random=False), st.sampled_from([RULE, Rule(min_reports=1)]))
def test_a_trial_that_dominates_all_is_never_stopped(
    values: list[tuple[float, float]], order: random.Random, rule: Rule
) -> None:
    best = (0.5, 0.5)
    everyone = [*values, best]
    index = list(range(len(everyone)))
    order.shuffle(index)
    assert len(values) not in stopped(everyone, index, rule)


@given(points, st.randoms(use_true_random=False))
def test_the_first_layer_is_never_stopped(values: list[tuple[float, float]], order: random.Random) -> None:
    index = list(range(len(values)))
    order.shuffle(index)
    loss_N, joules_N = (np.array(column) for column in zip(*values, strict=True))
    front = set(np.flatnonzero(layers(loss_N, joules_N, 0.0, 0.0) == 0).tolist())
    assert not stopped(values, index) & front


#: (loss, joules, experiment): ties, differences within the margins, noise between seeds.
replicated = st.lists(
    st.tuples(st.sampled_from([3.0, 3.004, 3.02, 3.5]), st.sampled_from([100.0, 100.5, 200.0]), st.integers(0, 2)),
    min_size=2,
    max_size=5,
)


@given(replicated)
@settings(max_examples=30, deadline=None)
def test_in_every_order_the_final_front_goes_on(values: list[tuple[float, float, int]]) -> None:
    """Of all permutations, by a rule that stops as soon as it can."""
    names = [f"t{experiment}-s{i}" for i, (_, _, experiment) in enumerate(values)]
    loss_N, joules_N, _ = (np.array(column) for column in zip(*values, strict=True))
    front = {names[i] for i in np.flatnonzero(layers(loss_N, joules_N, 0.0, 0.0) == 0)}
    trial = {"schedule": "cosine", "epochs": 4}
    for order in itertools.permutations(range(len(values))):
        rungs = Rungs(Rule(min_reports=1))
        survivors = {names[i] for i in order if rungs.add(trial, names[i], 1, *values[i][:2])}
        assert front <= survivors


def test_asynchrony_lets_on_and_stops() -> None:
    """The third best of four is stopped, of seven it goes on; the worst goes on where it reports first."""
    values = [(float(n), float(n)) for n in range(1, 8)]
    assert 2 in stopped(values, [0, 1, 3, 2, 4, 5, 6])
    assert 2 not in stopped(values, [0, 1, 3, 4, 5, 6, 2])
    assert 6 not in stopped(values, [6, 0, 1, 2, 3, 4, 5])
    assert 6 in stopped(values, [0, 1, 2, 3, 4, 5, 6])


@given(points, st.randoms(use_true_random=False))
def test_the_last_decision_does_not_depend_on_the_order(
    values: list[tuple[float, float]], order: random.Random
) -> None:
    """The documented asynchrony: a decision depends on who reported before, not on when they did."""
    others = list(range(len(values) - 1))
    last = len(values) - 1
    decisions = set()
    for _ in range(3):
        order.shuffle(others)
        decisions.add(last in stopped(values, [*others, last]))
    assert len(decisions) == 1
    assert decisions == {not goes_on(rung_of(values), f"t{last}-s0", RULE)}


@given(points)
@settings(max_examples=50)
def test_layers_are_a_peeling(values: list[tuple[float, float]]) -> None:
    loss_N, joules_N = (np.array(column) for column in zip(*values, strict=True))
    layer_N = layers(loss_N, joules_N, 0.0, 0.0)
    for i, (loss, joules) in enumerate(values):
        above = [k for k in range(len(values)) if layer_N[k] == layer_N[i] - 1]
        if layer_N[i]:
            assert any(loss_N[k] <= loss and joules_N[k] <= joules for k in above)


def test_nobody_is_stopped_before_enough_reports() -> None:
    values = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]
    assert stopped(values[:3], [0, 1, 2]) == set()
    assert stopped(values, [0, 1, 2, 3]) == {3}


def test_a_difference_within_the_noise_between_seeds_stops_nobody() -> None:
    values = [(3.00, 100.0), (3.002, 100.5), (3.003, 100.2), (3.004, 100.9)]
    assert stopped(values, [0, 1, 2, 3], Rule()) == set()
    noisy = [Report(loss=loss, joules=1.0, experiment="a") for loss in (3.0, 3.2)]
    assert seed_margin(noisy, 0.005) > 0.2
    assert seed_margin(noisy[:1], 0.005) == 0.005


def test_only_equal_epochs_of_one_schedule_are_compared() -> None:
    rungs = Rungs(RULE)
    for i, epochs in enumerate((2, 3, 4, 5, 6)):
        assert rungs.add({"schedule": "cosine", "epochs": epochs}, f"t{i}-s0", 1, float(i), float(i))
    assert len(rungs.reports) == 5
    assert [epoch for epoch in range(1, 10) if is_rung(epoch, 9, 3)] == [1, 3]


def test_a_report_without_numbers_changes_nothing() -> None:
    rungs = Rungs(RULE)
    for value in (None, math.nan, math.inf):
        assert rungs.add({"schedule": "cosine", "epochs": 4}, "t-s0", 1, value, 1.0)
    assert not rungs.reports


def test_rungs_are_rebuilt_from_rows() -> None:
    rungs = Rungs(RULE)
    rows = []
    for i in range(6):
        for epoch in (1, 2, 3):
            rungs.add({"schedule": "cosine", "epochs": 9}, f"t{i}-s0", epoch, 5.0 - i, 10.0 * epoch)
            row = {"trial_id": f"t{i}-s0", "epoch": epoch, "eval_loss_nats": 5.0 - i, "train_energy_j": 10.0 * epoch}
            rows += [{**row, "attempt": 0}, {**row, "attempt": 1}]
    random.Random(0).shuffle(rows)
    configs = {f"t{i}-s0": '{"schedule": "cosine", "epochs": 9}' for i in range(6)}
    assert rungs_of(rows, configs, RULE).reports == rungs.reports


def test_a_resumed_sweep_knows_the_reports_of_its_tables(tiny: dict[str, Any], tmp_path: Path) -> None:
    domains = {"energy_lambda": Grid((0.1, 0.2, 0.3, 0.4, 0.5))}
    space = Space(name="s", question="", fixed=tiny | {"epochs": 9}, domains=domains, conditions={}, sweep={})
    plan, store = plan_sweep(space, scheduler="pareto-asha"), Store(tmp_path)
    *known, late = plan.trials
    for n, trial in enumerate(known):
        write_attempt(store, plan.sweep_id, trial, loss=3.0 + n, joules=10.0 - n)
    resumed = _scheduler(plan, store)
    epochs, rows = (store.read(table, plan.sweep_id).to_pylist() for table in (EpochRecord, TrialRecord))
    expected = rungs_of(epochs, {row["trial_id"]: row["config_json"] for row in rows}).reports
    assert {rung: len(reports) for rung, reports in expected.items()} == {("cosine", 9, 1): 4, ("cosine", 9, 3): 4}
    assert resumed.rungs.reports == expected
    assert (decision(resumed, late), decision(ParetoASHA(), late)) == (ParetoASHA.STOP, ParetoASHA.CONTINUE)
    assert _scheduler(dataclasses.replace(plan, scheduler="fifo"), store) is None


def write_attempt(store: Store, sweep_id: str, trial: TrialConfig, *, loss: float, joules: float) -> None:
    """What a trial leaves that was killed in its fourth epoch: three epochs, and the row that the driver makes."""
    key: dict[str, Any] = {"sweep_id": sweep_id, "trial_id": trial.trial_id, "attempt": 0}
    epochs = [
        EpochRecord(**key, epoch=n, eval_loss_nats=loss, train_energy_j=joules * n, tokens_trained=n) for n in range(4)
    ]
    store.write(EpochRecord, epochs, **key)
    row = TrialRecord(
        **key,
        state="FAILED",
        censored=False,
        ended_by="died",
        started_at=dt.datetime.now(dt.UTC),
        **config_columns(trial),
    )
    store.write(TrialRecord, [row], **key)


def decision(scheduler: ParetoASHA, trial: TrialConfig) -> str:
    """On a report after one epoch that all others dominate."""
    values = {"trial_id": trial.trial_id, **trial.model_dump(mode="json")}
    report = {"epoch_row": "", "epoch": 1, "loss": 9.0, "joules": 90.0}
    return scheduler.on_trial_result(None, SimpleNamespace(config={"trial": values}), report)
