"""Pareto-ASHA: stop trials that others dominate at equal epochs. The decision is a pure function of a rung.

A rung is an epoch (1, η, η², ...) of trials that train for the same number of epochs on the same schedule: a loss in
the middle of a cosine says nothing about one at its end. At a rung trials are sorted into non-dominated layers over
(loss, joules). The first layer always goes on; of the others those go on that stand among the best 1/η. Whoever
reports when fewer than `min_reports` are known goes on.

A decision is taken once, with the reports known then. That is the asynchrony, and it goes both ways. An early report
may let a trial on that a late one would have stopped: what dominates it was not known yet. And it may stop one that a
late one would have let on: ceil(n/η) grows with n (at η = 3 the third best of four is stopped, the third best of seven
goes on). In every order those go on that no report dominates, margins aside.

Source of the rule without Pareto: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ray import tune

from pipelines.config import experiment_of

Rung = tuple[str, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A trial at a rung. Replicates share their `experiment`."""

    loss: float
    joules: float
    experiment: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How hard to stop.

    Attributes:
        eta: the best 1/eta of a rung go on, and rungs are powers of it.
        min_reports: reports that a rung needs before anyone is stopped.
        margin_nats, margin_joules: what is equal for sure: a difference of loss, a share of the joules. The loss
            margin grows to twice the standard deviation between seeds where a rung has replicates.
    """

    eta: int = 3
    min_reports: int = 4
    margin_nats: float = 0.005
    margin_joules: float = 0.01


def layers(loss_N: np.ndarray, joules_N: np.ndarray, margin_nats: float, margin_joules: float) -> np.ndarray:
    """Non-dominated layer of each point, 0 first.

    a dominates b where a is not worse in either objective and better in one by more than the margin.
    """
    not_worse_NN = (loss_N[:, None] <= loss_N[None, :]) & (joules_N[:, None] <= joules_N[None, :])
    better_NN = (loss_N[:, None] + margin_nats < loss_N[None, :]) | (
        joules_N[:, None] * (1 + margin_joules) < joules_N[None, :]
    )
    dominates_NN = not_worse_NN & better_NN
    layer_N = np.full(len(loss_N), -1)
    level = 0
    while (layer_N < 0).any():
        left_N = layer_N < 0
        beaten_N = (dominates_NN & left_N[:, None]).any(axis=0)
        layer_N[left_N & ~beaten_N] = level
        level += 1
    return layer_N


def goes_on(rung: Mapping[str, Report], trial_id: str, rule: Rule) -> bool:
    """Whether a trial goes on, given what its rung knows (its own report included)."""
    if len(rung) < rule.min_reports:
        return True
    names = sorted(rung)
    loss_N = np.array([rung[name].loss for name in names])
    joules_N = np.array([rung[name].joules for name in names])
    layer_N = layers(loss_N, joules_N, seed_margin(rung.values(), rule.margin_nats), rule.margin_joules)
    own = layer_N[names.index(trial_id)]
    return bool(own == 0 or (layer_N < own).sum() < math.ceil(len(names) / rule.eta))


def seed_margin(reports: Iterable[Report], least: float) -> float:
    """Twice the pooled standard deviation of loss between replicates, at least `least`."""
    groups: dict[str, list[float]] = {}
    for report in reports:
        groups.setdefault(report.experiment, []).append(report.loss)
    squares = [np.var(losses, ddof=1) * (len(losses) - 1) for losses in groups.values() if len(losses) > 1]
    freedom = sum(len(losses) - 1 for losses in groups.values())
    return max(least, 2 * math.sqrt(sum(squares) / freedom)) if freedom else least


def is_rung(epoch: int, epochs: int, eta: int) -> bool:
    """Rungs are the powers of eta below the last epoch."""
    rung = 1
    while rung < epoch:
        rung *= eta
    return epoch == rung and 1 <= epoch < epochs


class Rungs:
    """Every report at every rung. What it decides depends on nothing else, so it is rebuilt from the epochs table."""

    def __init__(self, rule: Rule | None = None) -> None:
        self.rule = rule or Rule()
        self.reports: dict[Rung, dict[str, Report]] = {}

    def add(
        self, trial: Mapping[str, Any], trial_id: str, epoch: int, loss: float | None, joules: float | None
    ) -> bool:
        """Enter a report; returns whether the trial goes on. A report that is not a rung's, or not whole, changes
        nothing.
        """
        known = loss is not None and joules is not None and math.isfinite(loss) and math.isfinite(joules)
        if not known or not is_rung(epoch, trial["epochs"], self.rule.eta):
            return True
        assert loss is not None
        assert joules is not None
        rung = self.reports.setdefault((trial["schedule"], trial["epochs"], epoch), {})
        rung[trial_id] = Report(loss=loss, joules=joules, experiment=experiment_of(trial_id))
        return goes_on(rung, trial_id, self.rule)


class ParetoASHA(tune.schedulers.FIFOScheduler):  # type: ignore[misc,unused-ignore]
    """The rule as a Ray Tune scheduler. Ray does not restore schedulers: the sweep seeds it from the epochs table."""

    def __init__(self, rungs: Rungs | None = None) -> None:
        super().__init__()
        self.rungs = rungs or Rungs()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Stop or go on."""
        if "epoch_row" not in result:
            return str(self.CONTINUE)
        config = trial.config["trial"]
        on = self.rungs.add(config, config["trial_id"], result["epoch"], result.get("loss"), result.get("joules"))
        return str(self.CONTINUE if on else self.STOP)


def rungs_of(rows: Iterable[Mapping[str, Any]], configs: Mapping[str, str], rule: Rule | None = None) -> Rungs:
    """The rungs as rows of `epochs` tell them; `configs` are the trials' configurations as JSON, by trial."""
    rungs = Rungs(rule)
    parsed = {trial_id: json.loads(text) for trial_id, text in configs.items()}
    for row in sorted(rows, key=lambda row: (row["trial_id"], row["epoch"], row["attempt"])):
        if row["trial_id"] in parsed:
            rungs.add(
                parsed[row["trial_id"]], row["trial_id"], row["epoch"], row["eval_loss_nats"], row["train_energy_j"]
            )
    return rungs
