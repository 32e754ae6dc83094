"""When a sweep has spent enough: its joules, its hours, a front of its own objectives that no longer grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import budget as budget_module
from pipelines.budget import Budget, stalls
from pipelines.epoch_ends import Ends
from pipelines.plan import plan_sweep
from pipelines.records import PointRecord, Store, TrialRecord
from tests.pipelines.synthetic import point
from tests.pipelines.synthetic import trial as synthetic
from tune_spaces import Grid, Space, Uniform


@pytest.mark.parametrize(("gains", "ends"), [((0.5, 0.4, 0.3), False), ((0.5, 3.0, 3.0), True)])
def test_a_front_that_does_not_grow_ends_the_sweep(gains: tuple[float, ...], ends: bool) -> None:
    points = [(2.3, 3.0), (3.0, 2.0), *((1.6, gain) for gain in gains)]
    trials = [np.array([point]) for point in points]
    assert stalls(trials, 2) is ends
    assert not stalls(trials[:2], 2)


def test_a_front_that_grows_longer_does_not_stall() -> None:
    """Cheap trials first, then dear ones of less loss: beyond what the first ones reached in joules."""
    trials = [np.array([[0.1 * i, 4.0 - 0.01 * i]]) for i in range(4)]
    assert not stalls([*trials, np.array([[3.0, 3.0]]), np.array([[4.0, 2.5]])], 2)
    assert stalls([*trials, np.array([[3.0, 4.5]]), np.array([[4.0, 4.1]])], 2)


def test_budgets_name_their_reason(tiny: dict[str, Any]) -> None:
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    budget = Budget(plan_sweep(space, max_joules=100), lambda: 101.0)
    assert budget.stop_all()
    assert budget.reason == "max_joules: 101 J of 100 J are spent"
    assert not Budget(plan_sweep(space, max_joules=100), lambda: None).stop_all()
    late = Budget(plan_sweep(space, max_hours=1), lambda: None, before_s=3601)
    assert late.stop_all()
    known = [synthetic(f"t{i}", train_energy_j=10.0 + i, eval_loss_nats=3.0) for i in range(6)]
    assert Budget(plan_sweep(space, stall=3), lambda: None, known).stop_all()


@pytest.mark.parametrize(
    ("objectives", "ends"),
    [
        (("train_energy_j", "eval_loss_nats"), True),
        (("train_energy_j", "tokens_per_s:max"), False),
        (("train_energy_j", "tokens_per_s"), True),
        (("train_energy_j", "eval_loss_nats", "tokens_per_s:max"), False),
    ],
)
def test_a_sweep_stalls_by_its_own_objectives(tiny: dict[str, Any], objectives: tuple[str, ...], ends: bool) -> None:
    """Trials that get dearer at one loss, and faster: a stall only for who does not ask for speed."""
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    rows = [synthetic(f"t{i}", train_energy_j=10.0 + i, tokens_per_s=1.0 + i) for i in range(6)]
    assert Budget(plan_sweep(space, stall=3, objectives=objectives), lambda: None, rows).stop_all() is ends


def test_a_stall_of_anytime_trials_counts_their_points(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The last trials' ends add nothing, their first epochs do; points of stopped trials count, modest ones not."""
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    plan, store = plan_sweep(space, stall=2, sweep_id="synthetic"), Store(tmp_path)
    rows = [
        synthetic(f"t{i}", config_json='{"anytime": true}', state="STOPPED" if i == 4 else "COMPLETED")
        for i in range(6)
    ]

    def write(row: TrialRecord, joules: float, loss: float) -> None:
        ends = [point(row.trial_id, eval_loss_nats=loss, train_energy_j=joules)]
        ends += [point(row.trial_id, epochs=2, eval_loss_nats=3.5, train_energy_j=100.0)] * (row.state == "COMPLETED")
        store.write(PointRecord, ends, sweep_id="synthetic", trial_id=row.trial_id, attempt=0)

    for row in rows[:4]:
        write(row, 50.0, 3.7)
    early = Budget(plan, lambda: None, rows[:4], ends_of=Ends(store, "synthetic", plan.objectives).of)
    assert early.stop_all()
    budget = Budget(plan, lambda: None, rows[:4][:3], ends_of=Ends(store, "synthetic", plan.objectives).of)
    write(rows[4], 20.0, 3.8)
    for row in rows[3:5]:
        budget.saw(row)
    assert not budget.stop_all()  # the stopped trial's only point is cheap
    whole = Ends(store, "synthetic", ("train_energy_j", "tokens_per_s:max"))  # points have no speed
    assert [end["tokens_per_s"] for end in whole.of(rows[0])] == [50_000.0]
    assert whole.of(rows[4]) == []


def test_replicates_neither_stall_nor_are_stalled(tiny: dict[str, Any]) -> None:
    """Second seeds say nothing new of the front; once every experiment has had a trial, they run to their end."""
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    one = [synthetic(f"t{i}-s0", train_energy_j=10.0 + i, eval_loss_nats=5.0 - i) for i in range(4)]
    more = [synthetic(f"t{i}-s1", train_energy_j=10.0 + i, eval_loss_nats=5.0 - i) for i in range(4)]
    last = synthetic("t4-s0", train_energy_j=20.0, eval_loss_nats=4.0)
    plan = plan_sweep(Space(name="s", question="", fixed=tiny, domains={"energy_lambda": Uniform(0.1, 1.0)},
                            conditions={}, sweep={}), search="tpe", samples=8, seeds=2, stall=2)  # fmt: skip
    assert not Budget(plan, lambda: None, [*one, *more]).stop_all()
    assert Budget(
        plan, lambda: None, [*one, last, synthetic("t5-s0", train_energy_j=21.0, eval_loss_nats=4.0)]
    ).stop_all()
    dull = [synthetic(f"t{i}-s0", train_energy_j=10.0 + i, eval_loss_nats=3.0) for i in range(8)]
    assert Budget(plan, lambda: None, dull[:7]).stop_all()
    assert not Budget(plan, lambda: None, dull).stop_all()
    assert Budget(plan_sweep(space, stall=2), lambda: None, dull).stop_all()


def test_a_later_attempt_takes_the_place_of_the_one_that_died(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Anytime trials that died after a poor point; their next attempts are good."""
    space = Space(name="s", question="", fixed=tiny, domains={"top_k": Grid((1, 2))}, conditions={}, sweep={})
    plan, store = plan_sweep(space, stall=2, sweep_id="synthetic"), Store(tmp_path)
    budget = Budget(plan, lambda: None, ends_of=Ends(store, "synthetic", plan.objectives).of)

    def ended(trial: str, attempt: int, loss: float, **more: Any) -> None:
        row = synthetic(f"{trial}-s0", attempt=attempt, config_json='{"anytime": true}', **more)
        end = point(row.trial_id, attempt=attempt, eval_loss_nats=loss, train_energy_j=10.0)
        store.write(PointRecord, [end], sweep_id="synthetic", trial_id=row.trial_id, attempt=attempt)
        budget.saw(row)

    ended("a", 0, 3.5)
    ended("b", 0, 3.2)
    for trial in ("c", "d"):
        ended(trial, 0, 4.0, state="FAILED", ended_by="died")
    for trial, loss in (("c", 2.0), ("d", 1.5)):
        ended(trial, 1, loss)
    assert not budget.stop_all()


def test_a_budget_that_cannot_be_read_ends_the_sweep_after_a_while(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space(name="s", question="", fixed=tiny, domains={}, conditions={}, sweep={})
    clock, answers = [0.0], iter([OSError("away"), OSError("away"), 5.0, OSError("away"), OSError("gone"), 7.0])

    def read_j() -> float:
        found = next(answers)
        if isinstance(found, OSError):
            raise found
        return found

    def away() -> float:
        raise OSError("anchors")

    monkeypatch.setattr(budget_module.time, "monotonic", lambda: clock[0])
    budget = Budget(plan_sweep(space, max_joules=100), read_j)
    for clock[0] in (10.0, 200.0, 320.0, 330.0):
        assert not budget.stop_all()
    clock[0] = 631.0
    assert budget.stop_all()
    assert budget.reason == "max_joules: joules could not be read for 5 minutes (gone)"
    assert not Budget(plan_sweep(space, max_joules=100), lambda: 99.0, reserve_j=away).stop_all()
