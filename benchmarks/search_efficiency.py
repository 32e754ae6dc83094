"""Joules that a search spends until it has 99 % of a recorded grid's hypervolume. Replay: nothing is trained.

    python benchmarks/search_efficiency.py OUT [--sweep ID] [--repetitions 30] [--moasha-python PYTHON]

OUT holds a finished grid sweep (`tune_spaces/study/search_grid.yaml` was made for this). Objectives are (log joules,
loss); the reference point is the grid's worst corner. A searcher draws grid members; a trial that is stopped at a rung
costs the joules of its epochs up to there. Rivals: random search, Optuna's TPE and NSGA-II as they come and as our
sweeps set them up, all without stopping, and Syne Tune's MOASHA, run as published by an interpreter that has it
(`pip install syne-tune` in an environment of its own, then `--moasha-python ENV/bin/python`). Joules of a modelled
table are modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from pipelines import fronts
from pipelines.config import TrialConfig
from pipelines.costaware import CostAwareStudy
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.scheduler import Rungs
from pipelines.search import modelled_training_j, sampler_of
from pipelines.trial_rows import config_columns
from tune_spaces import Grid, Space

SHARE = 0.99
BAR_OF_RIVAL, BAR_OF_GRID = 0.60, 0.25
MOASHA = "Syne Tune MOASHA"
#: Share of a repetition that never reached the goal.
NEVER = math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A recorded trial: its settings, its end, its joules and losses by epoch."""

    trial_id: str
    settings: dict[str, Any]
    joules: float
    loss: float
    curve: tuple[tuple[int, float, float], ...]  # (epoch, joules so far, loss)


@dataclasses.dataclass(frozen=True)
class Table:
    """All trials of a grid, found by the values of the settings that it varies."""

    members: tuple[Member, ...]

    @cached_property
    def axes(self) -> dict[str, list[Any]]:
        """The settings that the grid varies, with their values."""
        found: dict[str, list[Any]] = {}
        for key in self.members[0].settings:
            values = {json.dumps(member.settings[key]): member.settings[key] for member in self.members}
            if len(values) > 1:
                found[key] = [values[text] for text in sorted(values)]
        return found

    @cached_property
    def by_key(self) -> dict[tuple[str, ...], Member]:
        """Members by the values of their axes, as JSON."""
        return {self.key(member.settings): member for member in self.members}

    def key(self, settings: dict[str, Any]) -> tuple[str, ...]:
        """What tells members apart."""
        return tuple(json.dumps(settings[axis]) for axis in self.axes)

    @cached_property
    def joules(self) -> float:
        """Joules of the whole grid."""
        return sum(member.joules for member in self.members)

    @cached_property
    def reference_M(self) -> np.ndarray:
        """The grid's worst corner."""
        return cost_of(self.members).max(axis=0)

    @cached_property
    def goal(self) -> float:
        """The hypervolume to reach."""
        return SHARE * fronts.hypervolume(cost_of(self.members), self.reference_M)

    def reached(self, done: Sequence[Member]) -> bool:
        """Whether these trials have it."""
        return bool(done) and fronts.hypervolume(cost_of(done), self.reference_M) >= self.goal

    def space(self) -> Space:
        """The grid as a space to search."""
        fixed = {key: value for key, value in self.members[0].settings.items() if key not in self.axes}
        domains = {key: Grid(tuple(values)) for key, values in self.axes.items()}
        return Space(name="replay", question="", fixed=fixed, domains=domains, conditions={}, sweep={})


def load(out: str, sweep: str | None) -> tuple[Table, str]:
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
    return Table(tuple(members)), str(store.read(TrialRecord, sweep)["energy_source"][0])


def cost_of(members: Sequence[Member]) -> np.ndarray:
    """(log joules, loss) of each."""
    return np.array([(np.log(member.joules), member.loss) for member in members])


# --- searches: generators that yield a member and are sent whether it ran to its end ----------------

Proposals = Generator[Member, bool, None]


def at_random(table: Table, seed: int) -> Proposals:
    """Members in random order."""
    order = list(table.members)
    random.Random(seed).shuffle(order)
    for member in order:  # noqa: UP028 - a list's iterator cannot be sent to
        yield member


def by_optuna(table: Table, seed: int, sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Proposals:
    """Members as a sampler of Optuna asks for them; one that it asks for again is told again and costs nothing."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler(seed))
    seen: dict[str, bool] = {}  # whether a member ran to its end
    while len(seen) < len(table.members) and len(study.trials) < 20 * len(table.members):
        trial = study.ask()
        texts = {axis: [json.dumps(value) for value in values] for axis, values in table.axes.items()}
        member = table.by_key.get(tuple(trial.suggest_categorical(axis, texts[axis]) for axis in table.axes))
        if member is None:  # a combination that the grid leaves out
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        if member.trial_id not in seen:
            seen[member.trial_id] = yield member
        if seen[member.trial_id]:
            study.tell(trial, (np.log(member.joules), member.loss))
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)


def cost_aware(table: Table, seed: int) -> Proposals:
    """Our search, as a sweep runs it."""
    study = CostAwareStudy(table.space(), ("train_energy_j", "eval_loss_nats"), modelled_training_j, seed=seed)
    left = len(table.members)
    while left:
        config = study.ask()
        member = table.by_key.get(table.key(config.model_dump(mode="json")))
        ended = False
        if member is not None:
            left -= 1
            ended = yield member
        study.tell(config.trial_id, row_of(config, member) if member is not None and ended else None)


def row_of(config: TrialConfig, member: Member) -> TrialRecord:
    """The row that a trial of this configuration left."""
    values = {"train_energy_j": member.joules, "eval_loss_nats": member.loss, "state": "COMPLETED", "censored": False}
    return TrialRecord(
        sweep_id="replay", trial_id=config.trial_id, attempt=0, started_at=None, **config_columns(config), **values
    )  # type: ignore[arg-type]


SEARCHES: dict[str, tuple[Callable[[Table, int], Proposals], bool]] = {
    "random": (at_random, False),
    "Optuna TPE": (partial(by_optuna, sampler=lambda seed: optuna.samplers.TPESampler(seed=seed)), False),
    "Optuna NSGA-II": (partial(by_optuna, sampler=lambda seed: optuna.samplers.NSGAIISampler(seed=seed)), False),
    "tpe": (partial(by_optuna, sampler=lambda seed: sampler_of("tpe", 100, seed)), False),
    "nsga2": (partial(by_optuna, sampler=lambda seed: sampler_of("nsga2", 100, seed)), False),
    "random + pareto-asha": (at_random, True),
    "tpe + pareto-asha": (partial(by_optuna, sampler=lambda seed: sampler_of("tpe", 100, seed)), True),
    "cost-aware": (cost_aware, False),
    "cost-aware + pareto-asha": (cost_aware, True),
}
RIVALS = ("random", "Optuna TPE", "Optuna NSGA-II", "tpe", "nsga2", MOASHA)
OURS = ("cost-aware", "cost-aware + pareto-asha")


def spent_until(table: Table, search: str, seed: int) -> float:
    """Joules until the share of the hypervolume is reached, over the whole grid's; NEVER where it is not."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    propose, stopping = SEARCHES[search]
    proposals = propose(table, seed)
    rungs, spent, done = Rungs() if stopping else None, 0.0, []
    try:
        member = next(proposals)
        while True:
            joules, ended = replay(member, rungs)
            spent += joules
            if ended:
                done.append(member)
                if table.reached(done):
                    return spent / table.joules
            member = proposals.send(ended)
    except StopIteration:
        return NEVER


def replay(member: Member, rungs: Rungs | None) -> tuple[float, bool]:
    """Joules of a trial, and whether it ran to its end."""
    for epoch, joules, loss in member.curve if rungs is not None else ():
        if not rungs.add(member.settings, member.trial_id, epoch, loss, joules):
            return joules, False
    return member.joules, True


def moasha(table: Table, python: str, seeds: Sequence[int]) -> list[float]:
    """Syne Tune's MOASHA by another interpreter: it says which members it ran and how far, we count."""
    document = {
        "axes": table.axes,
        "members": [{"settings": m.settings, "curve": m.curve} for m in table.members],
        "seeds": list(seeds),
        "reference": table.reference_M.tolist(),
        "goal": table.goal * (1 - 1e-9),
    }
    script = Path(__file__).with_name("moasha_replay.py")
    answer = subprocess.run(
        [python, str(script)], input=json.dumps(document), capture_output=True, text=True, check=True, timeout=3600
    )
    return [_counted(table, steps) for steps in json.loads(answer.stdout.splitlines()[-1])]


def _counted(table: Table, steps: Sequence[tuple[int, int]]) -> float:
    """Joules of (member, epochs it ran), in order; a member that ran before costs nothing again."""
    spent, done, ran = 0.0, [], {}
    for index, epochs in steps:
        member = table.members[index]
        before = ran.get(index, 0)
        if epochs > before:
            spent += member.curve[epochs - 1][1] - (member.curve[before - 1][1] if before else 0.0)
            ran[index] = epochs
        if epochs == len(member.curve) and before < epochs:
            done.append(member)
            if table.reached(done):
                return spent / table.joules
    return NEVER


def main() -> None:
    """Print one line per strategy, then the bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--sweep")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--moasha-python", help="interpreter of an environment that has syne-tune")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write every repetition here")
    arguments = parser.parse_args()
    table, source = load(arguments.out, arguments.sweep)
    front = int(fronts.nondominated(cost_of(table.members)).sum())
    print(
        f"{len(table.members)} recorded trials, {table.joules:,.0f} J in all ({source}), {front} on the front;"
        f" joules until {SHARE:.0%} of the hypervolume, {arguments.repetitions} repetitions",
        flush=True,
    )
    found: dict[str, list[float]] = {}
    with ProcessPoolExecutor(arguments.processes) as pool:
        for search in SEARCHES:
            seeds = range(arguments.repetitions)
            found[search] = list(pool.map(partial(spent_until, table, search), seeds))
            show(search, found[search])
    if arguments.moasha_python:
        lots = [range(n, arguments.repetitions, arguments.processes) for n in range(arguments.processes)]
        with ThreadPoolExecutor(arguments.processes) as threads:
            parts = threads.map(partial(moasha, table, arguments.moasha_python), [lot for lot in lots if lot])
            found[MOASHA] = [share for part in parts for share in part]
        show(MOASHA, found[MOASHA])
    judge(found)
    if arguments.json:
        known = {name: [None if share == NEVER else share for share in shares] for name, shares in found.items()}
        arguments.json.write_text(json.dumps(known, indent=1), encoding="utf-8")


def show(name: str, shares: Sequence[float]) -> None:
    """Median and quartiles of a strategy, and how often it reached the goal where that was not always."""
    low, middle, high = (words(quantile(shares, q)) for q in (25, 50, 75))
    reached = sum(share < NEVER for share in shares)
    often = "" if reached == len(shares) else f", reached in {reached} of {len(shares)}"
    of_grid = "" if middle == words(NEVER) else " of the grid's joules"
    print(f"{name:<26} {middle:>6}{of_grid}  (quartiles {low} to {high}{often})", flush=True)


def quantile(shares: Sequence[float], percent: float) -> float:
    """A percentile; NEVER where it lies among repetitions that did not reach the goal."""
    at, ordered = (len(shares) - 1) * percent / 100, sorted(shares)
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    return NEVER if above == NEVER else below + (above - below) * (at % 1)


def words(share: float) -> str:
    """A share of the grid's joules."""
    return "not reached" if share == NEVER else f"{share:.1%}"


def judge(found: dict[str, list[float]]) -> None:
    """Our medians against the bars."""
    rivals = {name: quantile(found[name], 50) for name in RIVALS if name in found}
    best = min(rivals, key=lambda name: rivals[name])
    for name in OURS:
        own = quantile(found[name], 50)
        met = own <= BAR_OF_RIVAL * rivals[best] and own <= BAR_OF_GRID
        against = words(NEVER) if NEVER in (own, rivals[best]) else f"{own / rivals[best]:.0%}"
        print(
            f"{name}: {against} of the best rival, {best} (bar {BAR_OF_RIVAL:.0%});"
            f" {words(own)} of the grid (bar {BAR_OF_GRID:.0%}): {'met' if met else 'missed'}"
        )
    if MOASHA not in found:
        print(
            "MOASHA was not among the rivals: name an interpreter that has syne-tune with --moasha-python",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
