"""Which trial a worker takes next: shapes, seeds, boards; then by real Ray Tune."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import lanes as simulated
from benchmarks.driver_overhead import TabulatedActor
from pipelines.config import TrialConfig
from pipelines.lanes import Card, Lanes, Worker, cards
from pipelines.plan import plan_sweep
from pipelines.records import EpochRecord
from pipelines.sweep import run_sweep
from tune_spaces import Grid, Space

A, B = Worker("host", 1), Worker("host", 2)
DOMINATED = 0.9


def deck(*names: str, rounds: int = 1) -> list[Card]:
    """Cards by name: the first letter is the shape."""
    return [
        Card(trial_id=f"{name}{number}", experiment=name, round=number, code=name[0])
        for number in range(rounds)
        for name in names
    ]


def dealt(lanes: Lanes, worker: Worker | None) -> str:
    card = lanes.deal(worker)
    assert card is not None
    return card.trial_id


def test_workers_begin_with_shapes_of_their_own_and_go_on_with_them() -> None:
    waiting = deck("a1", "a2", "b1", "b2")
    lanes = Lanes(waiting, most=24)
    assert [dealt(lanes, None), dealt(lanes, None)] == ["a10", "b10"]
    for card, worker in ((waiting[0], A), (waiting[2], B)):
        lanes.built(card, worker)
        lanes.ran(card, worker)
    assert [dealt(lanes, B), dealt(lanes, A)] == ["b20", "a20"]
    assert lanes.deal(A) is None


def test_what_is_compiled_comes_before_what_another_worker_compiles() -> None:
    waiting = deck("a1", "a2", "b1", "b2", "c1")
    lanes = Lanes(waiting, most=24)
    for _ in range(3):
        lanes.deal(None)
    lanes.built(waiting[2], B)  # a is still being compiled
    lanes.built(waiting[4], A)
    assert dealt(lanes, A) == "b20"


def test_more_shapes_than_a_process_keeps_are_dropped_as_it_drops_them() -> None:
    waiting = deck("a1", "a2", "b1", "b2")
    lanes = Lanes(waiting, most=1)
    assert dealt(lanes, None) == "a10"
    lanes.built(waiting[0], A)
    lanes.built(waiting[2], A)
    assert dealt(lanes, A) == "b10"


def test_replicates_stay_interleaved_and_go_to_another_board() -> None:
    waiting = deck("a1", "b1", rounds=2)
    lanes = Lanes(waiting, most=24)
    lanes.deal(None), lanes.deal(None)
    for card, worker in ((waiting[0], A), (waiting[1], B)):
        lanes.built(card, worker)
        lanes.ran(card, worker)
    assert [dealt(lanes, A), dealt(lanes, B)] == ["b11", "a11"]


def test_without_compiled_code_the_order_is_the_plans(tiny: dict[str, Any]) -> None:
    domains = {"top_k": Grid((1, 2)), "energy_lambda": Grid((0.1, 0.2))}
    plan = plan_sweep(Space(name="s", question="", fixed=tiny, domains=domains, conditions={}, sweep={}), seeds=2)
    waiting = cards(plan.trials, {})
    assert [card.round for card in waiting] == [0] * 4 + [1] * 4
    lanes = Lanes(waiting, most=24)
    order = []
    for worker in itertools.cycle((A, B)):
        card = lanes.deal(worker)
        if card is None:
            break
        lanes.built(card, worker)
        lanes.ran(card, worker)
        order.append(card.trial_id)
    assert order == [trial.trial_id for trial in plan.trials]


@pytest.mark.parametrize("path", sorted(simulated.SPACES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("workers", [2, 4])
def test_the_studys_spaces_take_no_longer_and_all_trials_run(path: Path, workers: int) -> None:
    waiting = simulated.cards_of(path)
    seconds, host = simulated.after(waiting, workers)
    assert seconds <= 1.02 * simulated.before_s(waiting, workers)
    assert sorted(card.trial_id for _, _, card, _ in host.log) == sorted(card.trial_id for card in waiting)
    rounds = [card.round for _, _, card, _ in host.log]
    assert rounds == sorted(rounds)


def test_a_front_of_many_shapes_takes_two_thirds_of_the_time() -> None:
    waiting = simulated.cards_of(simulated.SPACES / "front.yaml")
    seconds, host = simulated.after(waiting, 4)
    assert seconds <= 0.65 * simulated.before_s(waiting, 4)
    compiled = Counter(card.code for _, _, card, wait_s in host.log if wait_s >= simulated.COMPILE_S)
    assert set(compiled.values()) == {1}


def test_replicates_of_the_controls_see_all_boards() -> None:
    _, host = simulated.after(simulated.cards_of(simulated.SPACES / "controls.yaml"), 4)
    boards = defaultdict(set)
    for _, worker, card, _ in host.log:
        boards[card.experiment].add(worker)
    assert min(map(len, boards.values())) >= 3


class CompilingActor(TabulatedActor):
    """Reports an epoch, then writes the rows of a trial; the first of a shape in a process takes longer, and is noted.
    A trial at λ = DOMINATED is worse than all others in loss and in joules.
    """

    kept: ClassVar[set[int]] = set()
    reported: list[EpochRecord] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.reported = None
        return super().reset_config(new_config)

    def outcome(self, trial: TrialConfig) -> tuple[float, float]:
        return (9.0, 900.0) if trial.energy_lambda == DOMINATED else super().outcome(trial)

    def step(self) -> dict[str, Any]:
        if self.reported is not None:
            return self.end(self.reported)
        self.compile()
        self.reported = self.epochs()
        first = self.reported[1]
        report = {"loss": first.eval_loss_nats, "joules": first.train_energy_j}
        return {"epoch": 1, "epoch_row": json.dumps(dataclasses.asdict(first)), **report}

    def compile(self) -> None:
        shape = self.config["trial"]["top_k"]
        first = shape not in self.kept
        self.kept.add(shape)
        time.sleep(2.0 if first else 0.2)
        with open(f"{self.config['out']}/shapes.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps([os.getpid(), shape, first]) + "\n")


@pytest.mark.slow
def test_ray_gives_a_worker_the_shape_it_has_and_stops_what_is_dominated(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dominated trial of a shape comes after the four others of it, so enough is known to stop it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a process that asked for a token once asks every cluster for it
    domains = {"top_k": Grid((1, 2)), "energy_lambda": Grid((0.1, 0.2, 0.3, 0.4, DOMINATED))}
    fixed, rules = tiny | {"compile": True, "device": "cpu", "epochs": 2}, {"anchor": False, "scheduler": "pareto-asha"}
    plan = plan_sweep(Space(name="s", question="", fixed=fixed, domains=domains, conditions={}, sweep=rules))
    result = run_sweep(plan, out=tmp_path, parallel=2, actor=CompilingActor)
    ended = Counter((r.energy_lambda == DOMINATED, r.state, r.censored, r.ended_by) for r in result.records)
    assert ended == {(False, "COMPLETED", False, "itself"): 8, (True, "STOPPED", True, "scheduler"): 2}
    rows = [json.loads(line) for line in (tmp_path / "shapes.jsonl").read_text().splitlines()]
    begun = [(pid, shape) for pid, shape, first in rows if first]
    assert len({pid for pid, _ in begun[:2]}) == len({shape for _, shape in begun[:2]}) == 2
    assert len(begun) <= 3  # who is done with a shape may help with the other
