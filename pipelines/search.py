"""Multi-objective search by Optuna as a Ray Tune searcher that tells the sampler the truth.

Ray's own OptunaSearch tells a trial that was stopped early as complete with its partial joules, leaves a failed one
running for ever, and forgets conditions. Here a completed trial is told with its values; one that the scheduler
stopped as pruned, without values (Optuna takes none for several objectives); one that failed, died or left no numbers
as failed.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import optuna

from pipelines.config import ConfigError, TrialConfig, experiment_of
from pipelines.costaware import CostAwareStudy
from pipelines.estimate import estimate
from pipelines.plan import SweepPlan, every_point, untried
from pipelines.records import TrialRecord
from pipelines.searcher import Stateless
from pipelines.trial_rows import parse_row
from tune_spaces import Choice, Domain, Grid, IntRange, LogUniform, Space, Uniform

COMPLETE, PRUNED, FAIL = (getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL"))
_EPOCH_TOKENS = 1_000_000  # of an epoch that is not capped: the same for all trials of a space
#: Draws of known experiments before one at random is taken: a Gaussian process takes long for each.
_TRIES = 4


def sampler_of(search: str, samples: int, seed: int = 0) -> optuna.samplers.BaseSampler:
    """Optuna's sampler; NSGA-II's population fits the number of trials, or it would only draw at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search == "tpe":
            start = max(4, min(10, samples // 4))
            return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed, n_startup_trials=start)
        if search == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, samples // 5)), seed=seed)
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=max(4, min(10, samples // 4)))


def distribution_of(domain: Domain) -> Any:
    """A domain as Optuna knows it; values of a list by their place, for they may be lists themselves."""
    match domain:
        case Grid(values) | Choice(values):
            return optuna.distributions.CategoricalDistribution(range(len(values)))
        case Uniform(low, high):
            return optuna.distributions.FloatDistribution(low, high)
        case LogUniform(low, high):
            return optuna.distributions.FloatDistribution(low, high, log=True)
        case IntRange(low, high):
            return optuna.distributions.IntDistribution(low, high)


def value_of(domain: Domain, drawn: Any) -> Any:
    """What Optuna's value stands for in the space."""
    return domain.values[drawn] if isinstance(domain, Grid | Choice) else drawn


def drawn_of(domain: Domain, value: Any) -> Any:
    """The reverse; ValueError where the value is not in the domain."""
    if isinstance(domain, Grid | Choice):
        return [_plain(v) for v in domain.values].index(_plain(value))
    if not domain.low <= value <= domain.high:
        raise ValueError(f"{value!r} is not between {domain.low} and {domain.high}")
    return value


def _plain(value: Any) -> Any:
    """A value as rows keep it: lists, and numbers equal whatever their kind (0 and 0.0), but never to a bool."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return repr(value) if isinstance(value, bool) else value


class Outcome(NamedTuple):
    """What a sampler is told of a trial: a state of Optuna's, and the objectives where it is complete."""

    state: optuna.trial.TrialState
    values: tuple[float, ...] | None = None


class Study:
    """Ask for configurations, tell outcomes. Knows nothing of Ray."""

    def __init__(self, space: Space, objectives: Iterable[str], sampler: optuna.samplers.BaseSampler) -> None:
        self.space = space
        self.axes = [axis.partition(":")[::2] for axis in objectives]
        directions = ["maximize" if direction == "max" else "minimize" for _, direction in self.axes]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self.threads: int | None = None  # what a CPU trial gets where its space does not say
        self.known: dict[str, Outcome] = {}
        self.asked: dict[str, optuna.Trial | TrialConfig] = {}
        self._points = every_point(space)
        self._generator = random.Random(f"joulemoe {space.name}")

    def reserve(self, config: TrialConfig) -> None:
        """A trial that this study did not choose begins: its outcome will be told, and it is not asked for."""
        self.asked[config.trial_id] = config

    def ask(self) -> TrialConfig | None:
        """The next experiment; None where the space seems to have no more. One that was tried is told again, and a
        sampler that insists on such gets one at random that was not.
        """
        tried = {experiment_of(trial_id) for trial_id in (*self.known, *self.asked)}
        for _ in range(_TRIES):
            trial = self.study.ask()
            config = TrialConfig.parse(self._draw(trial))
            if experiment_of(config.trial_id) not in tried:
                self.asked[config.trial_id] = trial
                return config
            self._tell(trial, self.known.get(config.trial_id, Outcome(FAIL)))
        new = untried(self.space, self._points, tried, self._generator)
        if not new:
            return None
        config = self._generator.choice(new)
        self.reserve(config)
        return config

    def tell(self, trial_id: str, row: TrialRecord | None, *, stopped: bool = False) -> None:
        """The outcome of a trial; where it has no row of its own, whether the scheduler `stopped` it."""
        outcome = self.known[trial_id] = self.outcome_of(row, stopped=stopped)
        asked = self.asked.pop(trial_id, None)
        if isinstance(asked, TrialConfig):
            self._add(asked.model_dump(mode="json"), outcome)
        elif asked is not None:
            self._tell(asked, outcome)

    def remember(self, row: TrialRecord) -> None:
        """An outcome of an earlier session."""
        outcome = self.known[row.trial_id] = self.outcome_of(row)
        self._add(json.loads(row.config_json), outcome)

    def _add(self, settings: Mapping[str, Any], outcome: Outcome) -> None:
        """Tell of a trial that the sampler did not ask for. What is not in a key's domain is left out."""
        params, distributions = {}, {}
        for key, domain in self.space.domains.items():
            if key in self.space.resolve({**{k: settings.get(k) for k in self.space.domains}}):
                try:
                    params[key] = drawn_of(domain, settings[key])
                except (KeyError, TypeError, ValueError):
                    continue
                distributions[key] = distribution_of(domain)
        told = {"state": outcome.state, "values": outcome.values}
        self.study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, **told))

    def outcome_of(self, row: TrialRecord | None, *, stopped: bool = False) -> Outcome:
        """Complete with the objectives where all are numbers; pruned where the trial was stopped; else failed."""
        if stopped if row is None else row.state == "STOPPED":
            return Outcome(PRUNED)
        values = [getattr(row, name) for name, _ in self.axes] if row is not None and row.state == "COMPLETED" else []
        whole = values and all(v is not None and math.isfinite(v) for v in values)
        return Outcome(COMPLETE, tuple(values)) if whole else Outcome(FAIL)

    def _tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        self.study.tell(trial, outcome.values, state=outcome.state)

    def _draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Only keys whose condition holds are drawn: a sampler sees the conditions."""
        point: dict[str, Any] = {}
        waiting = dict(self.space.domains)
        while waiting:
            ready = [k for k in waiting if not (set(self.space.conditions.get(k, {})) & set(waiting))] or list(waiting)
            for key in ready:
                domain = waiting.pop(key)
                when = self.space.conditions.get(key, {})
                known = {**self.space.fixed, **point}
                if all(known.get(other) in allowed for other, allowed in when.items()):
                    point[key] = value_of(domain, trial._suggest(key, distribution_of(domain)))
        return {**self.space.fixed, **point}


class StudySearch(Stateless):
    """The study as a Ray Tune searcher: whole configurations of actors go out, rows come back.

    The study chooses `samples` experiments. Where they shall have more than one seed each, the first replicates come
    after all experiments' first trials, as in a grid: those of one experiment do not run back to back (temperature).

    Args:
        common: what every actor's configuration holds.
        samples, seeds: experiments, and trials of each.
        count: trials to begin in this session.
        ended, unfinished: trials of earlier sessions; unfinished ones that still count run first.
    """

    def __init__(
        self,
        study: Study | CostAwareStudy,
        common: Mapping[str, Any],
        *,
        samples: int,
        count: int,
        seeds: int = 1,
        ended: Iterable[TrialConfig] = (),
        unfinished: Iterable[TrialConfig] = (),
    ) -> None:
        super().__init__()
        self.study, self.common, self.samples, self.seeds, self.count = study, dict(common), samples, seeds, count
        self._names: dict[str, str] = {}
        self._experiments: dict[str, list[TrialConfig]] = {}
        self._first: list[TrialConfig] = []
        self._exhausted = False
        for config in ended:
            self._begins(config)
        for config in unfinished:
            if len(self._experiments.get(config.fingerprint, ())) < seeds:
                self._begins(config)
                self._first.append(config)
                study.reserve(config)

    @property
    def exhausted(self) -> int | None:
        """How many experiments there are, once the study found no more; None before."""
        return len(self._experiments) if self._exhausted else None

    def suggest(self, trial_id: str) -> Any:
        """The configuration of Ray's next trial."""
        config = None
        if self.count > 0:
            config = self._first.pop(0) if self._first else self._next()
        if config is None:
            return self.FINISHED
        self.count -= 1
        if config.threads is None:
            config = config.model_copy(update={"threads": self.study.threads})
        self._names[trial_id] = config.trial_id
        return {**self.common, "trial": {"trial_id": config.trial_id, **config.model_dump(mode="json")}}

    def _next(self) -> TrialConfig | None:
        config = None
        if len(self._experiments) < self.samples and not self._exhausted:
            config = self.study.ask()
            self._exhausted = config is None
        if config is None and (config := self._replicate()) is not None:
            self.study.reserve(config)
        if config is not None:
            self._begins(config)
        return config

    def _begins(self, config: TrialConfig) -> None:
        self._experiments.setdefault(config.fingerprint, []).append(config)

    def _replicate(self) -> TrialConfig | None:
        """A new seed of the experiment that has fewest; None where all have enough."""
        fewest = min(self._experiments.values(), key=len, default=None)
        if fewest is None or len(fewest) >= self.seeds:
            return None
        seed, threads = max(config.seed for config in fewest) + 1, self.study.space.fixed.get("threads")
        return fewest[0].model_copy(update={"seed": seed, "threads": threads})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study. A trial that died ends in an error; one that reported, but has no row yet, was stopped."""
        text = (result or {}).get("trial_row")
        row = parse_row(text) if text and not error else None
        if trial_id in self._names:
            self.study.tell(self._names[trial_id], row, stopped=bool(result) and not text and not error)


def study_of(plan: SweepPlan, rows: Iterable[TrialRecord]) -> Study | CostAwareStudy:
    """The study of a plan, with what earlier sessions found."""
    space = plan.loaded_space()
    if not space.domains:
        raise ConfigError(f"search: expected a space with domains for {plan.search}, got fixed values only")
    study: Study | CostAwareStudy
    if plan.search == "cost-aware":
        study = CostAwareStudy(space, plan.objectives, modelled_training_j)
    else:
        study = Study(space, plan.objectives, sampler_of(plan.search, plan.samples or 1))
    for row in rows:
        study.remember(row)
    return study


def modelled_training_j(config: TrialConfig) -> float:
    """Joules of a trial's training by the analytic model, which needs no GPU: right up to a factor that is learnt."""
    return estimate([config], gpu_name=None, epoch_tokens=_EPOCH_TOKENS).energy_j


__all__ = ["Study", "StudySearch", "sampler_of", "study_of"]
