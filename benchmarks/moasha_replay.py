"""Syne Tune's MOASHA on a recorded table; run by `search_efficiency.py` with an interpreter that has syne-tune.

Reads a table from standard input and writes, per repetition, the members that MOASHA ran and the epochs it let each
run, until those that ran to their end have the hypervolume that is asked for, or it has suggested four times as many
trials as there are (by then 98 % of them were tried, and most were stopped). The scheduler is used as published:
defaults, its own sampling, (log joules, loss) to be minimised, one bracket, an epoch as its resource.
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice
from syne_tune.optimizer.scheduler import SchedulerDecision
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA


def repetition(table: dict[str, Any], seed: int) -> list[tuple[int, int]]:
    """(member, epochs) in the order they ran."""
    random.seed(seed)
    np.random.seed(seed)
    axes = list(table["axes"])
    index = {tuple(json.dumps(m["settings"][a]) for a in axes): i for i, m in enumerate(table["members"])}
    space = {axis: choice([json.dumps(value) for value in values]) for axis, values in table["axes"].items()}
    longest = max(len(member["curve"]) for member in table["members"])
    scheduler = MOASHA(space, metrics=["log_joules", "loss"], time_attr="epoch", max_t=longest, random_seed=seed)
    steps: list[tuple[int, int]] = []
    whole: set[int] = set()
    for number in range(4 * len(table["members"])):
        config = scheduler.suggest().config
        member = index.get(tuple(config[axis] for axis in axes))
        if member is None:
            continue
        ran = run(scheduler, Trial(trial_id=number, config=config, creation_time=None), table["members"][member])
        steps.append((member, ran))
        if ran == len(table["members"][member]["curve"]):
            whole.add(member)
            if hypervolume([cost_of(table["members"][m]) for m in whole], table["reference"]) >= table["goal"]:
                break
    return steps


def cost_of(member: dict[str, Any]) -> tuple[float, float]:
    """(log joules, loss) at a member's end."""
    _, joules, loss = member["curve"][-1]
    return math.log(joules), loss


def hypervolume(costs: list[tuple[float, float]], reference: list[float]) -> float:
    """Area that points dominate up to the reference, strip by strip."""
    area, top = 0.0, reference[1]
    for first, second in sorted(costs):
        if first < reference[0] and second < top:
            area += (reference[0] - first) * (top - second)
            top = second
    return area


def run(scheduler: MOASHA, trial: Trial, member: dict[str, Any]) -> int:
    """Report a member's epochs until it ends or is stopped; returns the epochs that ran."""
    scheduler.on_trial_add(trial)
    last = len(member["curve"])
    for epoch, joules, loss in member["curve"]:
        result = {"epoch": epoch, "log_joules": math.log(joules), "loss": loss}
        if epoch == last:
            scheduler.on_trial_complete(trial, result)
            break
        if scheduler.on_trial_result(trial, result) == SchedulerDecision.STOP:
            scheduler.on_trial_remove(trial)
            return int(epoch)
    return int(last)


if __name__ == "__main__":
    document = json.load(sys.stdin)
    print(json.dumps([repetition(document, seed) for seed in document["seeds"]]))
