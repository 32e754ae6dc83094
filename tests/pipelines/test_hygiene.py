"""What may stand on one front: every row that may not is counted with a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import hygiene
from pipelines.records import TrialRecord, to_table
from tests.pipelines.synthetic import trial

AXES = ("train_energy_j", "eval_loss_nats")


def clean(*rows: TrialRecord, **options: Any) -> hygiene.Clean:
    return hygiene.clean(to_table(TrialRecord, rows), AXES, **options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "FAILED", "eval_loss_nats": None}, "FAILED"),
        ({"state": "STOPPED", "censored": True}, "censored (ended early)"),
        ({"censored": True}, "censored (ended early)"),
        ({"train_energy_j": None}, "train_energy_j is null"),
        ({"eval_loss_nats": None}, "eval_loss_nats is null"),
        ({"eval_loss_nats": math.nan}, "eval_loss_nats is NaN"),
        ({"eval_loss_nats": math.inf}, "eval_loss_nats is infinite"),
        ({"train_energy_j": 0.0}, "train_energy_j is not positive"),
        ({"train_energy_j": -3.0}, "train_energy_j is not positive"),
        ({"shared_gpu": True}, "shared GPU"),
        ({"energy_source": "modelled"}, "other context: energy_source=modelled"),
        ({"energy_source": None}, "other context: energy_source=None"),
        ({"gpu_name": "Other GPU"}, "other context: gpu_name=Other GPU"),
        ({"power_limit_w": 500.0}, "other context: power_limit_w=500.0"),
        ({"corpus_fingerprint": "other"}, "other context: corpus_fingerprint=other"),
        ({"config_fingerprint": "config-good"}, "duplicate of a configuration and seed"),
    ],
)
def test_a_row_is_left_out_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    found = clean(trial("good"), trial("good2"), trial("bad", **changes))
    assert found.table["trial_id"].to_pylist() == ["good", "good2"]
    assert [(left.reason, left.count, left.trial_ids) for left in found.left_out] == [(reason, 1, ("bad",))]


def test_an_unknown_share_of_the_gpu_is_not_held_against_a_row() -> None:
    assert clean(trial(shared_gpu=None)).left_out == ()


def test_only_the_last_attempt_of_a_trial_counts() -> None:
    rows = [trial("t", state="FAILED"), trial("t", attempt=1), trial("u")]
    found = clean(*rows)
    assert found.table["trial_id"].to_pylist() == ["t", "u"]
    assert found.left_out[0].reason == "superseded by a later attempt"


def test_stopped_and_censored_are_one_line() -> None:
    found = clean(trial("a"), trial("b", state="STOPPED"), trial("c", censored=True))
    assert [(left.reason, left.count) for left in found.left_out] == [("censored (ended early)", 2)]


def test_contexts_are_separated_and_the_largest_is_taken() -> None:
    rows = [trial(f"m{i}", energy_source="modelled") for i in range(3)] + [trial("c", energy_source="counter")]
    found = clean(*rows)
    assert found.context.modelled
    assert [(context.energy_source, count) for context, count in found.others] == [("counter", 1)]
    other = clean(*rows, context=found.others[0][0])
    assert other.context.energy_source == "counter"
    assert other.table.num_rows == 1


def test_of_equally_many_the_measured_rows_are_taken() -> None:
    assert clean(trial("m", energy_source="modelled"), trial("c")).context.energy_source == "counter"


def test_mixing_on_demand_keeps_all_and_says_what_is_shared() -> None:
    found = clean(trial("a"), trial("b", energy_source="modelled"), mix=True)
    assert found.table.num_rows == 2
    assert found.context.energy_source is None
    assert found.context.gpu_name == "Synthetic GPU"


def test_axes_without_joules_or_seconds_do_not_separate_devices() -> None:
    table = to_table(TrialRecord, [trial("a"), trial("b", energy_source="modelled", gpu_name=None, shared_gpu=True)])
    assert hygiene.clean(table, ["effective_experts", "eval_loss_nats"]).table.num_rows == 2


def test_points_of_failed_trials_are_whole() -> None:
    assert clean(trial("a", state="FAILED"), whole_rows=True).left_out == ()


def test_nothing_at_all() -> None:
    found = clean()
    assert found.table.num_rows == 0
    assert found.left_out == ()
    assert clean(trial(state="FAILED")).table.num_rows == 0


VARIANTS: list[dict[str, Any]] = [
    {},
    {"state": "FAILED"},
    {"censored": True},
    {"eval_loss_nats": math.nan},
    {"shared_gpu": True},
    {"energy_source": "modelled"},
    {"gpu_name": None},
    {"config_fingerprint": "twin"},
    {"attempt": 2, "trial_id": "retried"},
]


@given(st.lists(st.sampled_from(VARIANTS), max_size=25))
def test_counts_and_rows_kept_add_up(picks: list[dict[str, Any]]) -> None:
    rows = [trial(**{"trial_id": f"t{i}", "config_fingerprint": f"c{i}", **pick}) for i, pick in enumerate(picks)]
    found = clean(*rows)
    assert found.table.num_rows + sum(left.count for left in found.left_out) == len(rows)
