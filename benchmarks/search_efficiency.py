"""Joules that a search spends until it has 99 % of a recorded grid's hypervolume. Replay: nothing is trained.

python benchmarks/search_efficiency.py OUT [--sweep ID] [--repetitions 30]

OUT holds a finished grid sweep. Objectives are (log joules, loss); the reference point is the grid's worst corner. A
searcher draws grid members; a trial that it stops at a rung costs the joules of its epochs up to there. Strategies:
random, tpe and nsga2 without stopping, and each with pareto-asha. Joules of a modelled table are modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random

import numpy as np
import optuna

from pipelines import fronts
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.scheduler import Rungs
from pipelines.search import sampler_of

SHARE = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A recorded trial: its settings, its end, its joules and losses by epoch."""

    trial_id: str
    settings: dict[str, object]
    joules: float
    loss: float
    curve: tuple[tuple[int, float, float], ...]  # (epoch, joules so far, loss)


def load(out: str, sweep: str | None) -> tuple[list[Member], str]:
    """The completed trials of a sweep, and where their joules come from."""
    store = Store(out)
    sweep = sweep or store.sweep_ids()[-1]
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for row in store.read(EpochRecord, sweep).to_pylist():
        if row["epoch"] and row["train_energy_j"] is not None:
            point = (row["epoch"], row["train_energy_j"], row["eval_loss_nats"])
            curves.setdefault(row["trial_id"], []).append(point)
    members = [
        Member(
            trial_id=row["trial_id"],
            settings=json.loads(row["config_json"]),
            joules=row["train_energy_j"],
            loss=row["eval_loss_nats"],
            curve=tuple(sorted(curves[row["trial_id"]])),
        )
        for row in store.read(TrialRecord, sweep).to_pylist()
        if row["state"] == "COMPLETED" and row["train_energy_j"]
    ]
    return members, str(store.read(TrialRecord, sweep)["energy_source"][0])


def axes_of(members: list[Member]) -> dict[str, list[str]]:
    """The settings that the grid varies, values as JSON."""
    found: dict[str, list[str]] = {}
    for key in members[0].settings:
        values = sorted({json.dumps(member.settings[key]) for member in members})
        if len(values) > 1:
            found[key] = values
    return found


def cost_of(members: list[Member]) -> np.ndarray:
    """(log joules, loss) of each."""
    return np.array([(np.log(member.joules), member.loss) for member in members])


def spent_until(members: list[Member], search: str, stopping: bool, seed: int) -> float:
    """Joules until the share of the hypervolume is reached; those of the whole grid where it never is."""
    axes, table = axes_of(members), {}
    for member in members:
        table[tuple(json.dumps(member.settings[key]) for key in axes)] = member
    whole = cost_of(members)
    reference_M = whole.max(axis=0)
    goal = SHARE * fronts.hypervolume(whole, reference_M)
    rungs, spent, done, seen = Rungs(), 0.0, [], set()
    study = None
    if search != "random":
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=sampler_of(search, len(members), seed=seed)
        )
    order = list(table)
    random.Random(seed).shuffle(order)
    while len(seen) < len(members):
        trial = study.ask() if study is not None else None
        key = order.pop() if trial is None else tuple(trial.suggest_categorical(k, v) for k, v in axes.items())
        member = table.get(key)
        if member is None:  # a combination that the grid leaves out
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        if key in seen:
            study.tell(trial, (np.log(member.joules), member.loss))
            if len(study.trials) > 5 * len(members):
                break
            continue
        seen.add(key)
        joules, ended = replay(member, rungs if stopping else None)
        spent += joules
        if ended:
            done.append(member)
        if study is not None and ended:
            study.tell(trial, (np.log(member.joules), member.loss))
        elif study is not None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if done and fronts.hypervolume(cost_of(done), reference_M) >= goal:
            return spent
    return sum(member.joules for member in members)


def replay(member: Member, rungs: Rungs | None) -> tuple[float, bool]:
    """Joules of a trial, and whether it ran to its end."""
    for epoch, joules, loss in member.curve if rungs is not None else ():
        if not rungs.add(member.settings, member.trial_id, epoch, loss, joules):
            return joules, False
    return member.joules, True


def main() -> None:
    """Print one line per strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--sweep")
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    members, source = load(arguments.out, arguments.sweep)
    grid = sum(member.joules for member in members)
    print(
        f"{len(members)} recorded trials, {grid:.1f} J in all ({source}); joules until {SHARE:.0%} of the hypervolume"
    )
    for search in ("random", "tpe", "nsga2"):
        for stopping in (False, True):
            found = [spent_until(members, search, stopping, seed) / grid for seed in range(arguments.repetitions)]
            low, middle, high = np.percentile(found, [25, 50, 75])
            name = search + (" + pareto-asha" if stopping else "")
            print(f"{name:<22} {middle:6.1%} of the grid's joules  (quartiles {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
