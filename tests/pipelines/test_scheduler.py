"""Pareto-ASHA: who is never stopped, and what the order of reports may change."""

from __future__ import annotations

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.scheduler import Report, Rule, Rungs, goes_on, is_rung, layers, rungs_of, seed_margin

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


@given(points, st.randoms(use_true_random=False))
def test_a_trial_that_dominates_all_is_never_stopped(values: list[tuple[float, float]], order: random.Random) -> None:
    best = (0.5, 0.5)
    everyone = [*values, best]
    index = list(range(len(everyone)))
    order.shuffle(index)
    assert len(values) not in stopped(everyone, index)


@given(points, st.randoms(use_true_random=False))
def test_the_first_layer_is_never_stopped(values: list[tuple[float, float]], order: random.Random) -> None:
    index = list(range(len(values)))
    order.shuffle(index)
    loss_N, joules_N = (np.array(column) for column in zip(*values, strict=True))
    front = set(np.flatnonzero(layers(loss_N, joules_N, 0.0, 0.0) == 0).tolist())
    assert not stopped(values, index) & front


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
