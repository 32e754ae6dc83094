"""What a sweep will run: the trials of a space, each checked and each experiment once."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import os
import random
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from glob import glob
from typing import Any

from pipelines.config import ConfigError, TrialConfig, experiment_of
from pipelines.journal import Journal
from pipelines.plan_checks import WHOLE, check_objectives, check_search, check_values
from tune_spaces import CASE, Choice, Domain, Grid, IntRange, LogUniform, Space, Uniform, dump_space, parse_space

_DEFAULT_SAMPLES = 16
_DRAWS = 400  # candidates where a space is continuous, or too large to list


SEARCHES = ("grid", "random", "tpe", "nsga2", "gp", "cost-aware")
#: Searches whose later trials depend on the outcome of earlier ones.
ADAPTIVE = ("tpe", "nsga2", "gp", "cost-aware")
SCHEDULERS = ("fifo", "pareto-asha")
OBJECTIVES = ("train_energy_j", "eval_loss_nats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The trials of a sweep in the order in which one worker would run them (several: `lanes`), and how it searches and
    ends.

    Attributes:
        dropped: how many points of the space repeat an experiment that is already in (for example λ > 0
            where no price can act).
        document: the space as it was read, overrides included; an adaptive search draws from it.
        samples: experiments to draw, for searches that draw; each gets `seeds` trials. An adaptive search draws none
            twice, and ends where there are no more.
        objectives: columns to search by, `COLUMN` or `COLUMN:max`.
        max_joules, max_hours, stall: budgets; None: no limit.
        anchor: measure the anchor workload on every board that is measured, at the start and the end.
    """

    sweep_id: str
    space: str
    question: str
    trials: tuple[TrialConfig, ...]
    dropped: int
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: str = "grid"
    scheduler: str = "fifo"
    samples: int | None = None
    seeds: int = 1
    objectives: tuple[str, ...] = OBJECTIVES
    max_joules: float | None = None
    max_hours: float | None = None
    stall: int | None = None
    anchor: bool = True

    @property
    def is_adaptive(self) -> bool:
        """True where trials are chosen while the sweep runs."""
        return self.search in ADAPTIVE

    @property
    def count(self) -> int:
        """Trials in all."""
        return (self.samples or 0) * self.seeds if self.is_adaptive else len(self.trials)

    def left(self, trial_ids: Iterable[str]) -> int:
        """How many trials are still to run beside these. Of an adaptive search: all seeds of the experiments that it
        has not chosen yet, and those that chosen ones lack.
        """
        have = set(trial_ids)
        if not self.is_adaptive:
            return sum(trial.trial_id not in have for trial in self.trials)
        seeds = Counter(map(experiment_of, have))
        new = max(0, (self.samples or 0) - len(seeds))
        return new * self.seeds + sum(max(0, self.seeds - count) for count in seeds.values())

    def examples(self) -> tuple[TrialConfig, ...]:
        """A few draws of the space, to check what trials need before any runs."""
        return tuple(TrialConfig.parse(point) for point in _draws(self.loaded_space(), 4))

    def loaded_space(self) -> Space:
        """The space to draw from."""
        return parse_space(self.space, self.document)

    def to_document(self) -> dict[str, Any]:
        """JSON values from which `from_document` makes this plan."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "version": 1, "trials": [trial.model_dump(mode="json") for trial in self.trials]}

    @classmethod
    def from_document(cls, values: Mapping[str, Any]) -> SweepPlan:
        """Read what `to_document` wrote."""
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        trials = tuple(TrialConfig.parse(trial) for trial in values["trials"])
        return cls(**{**kept, "trials": trials, "objectives": tuple(values["objectives"])})

    def extended(self, more: SweepPlan) -> SweepPlan:
        """This sweep with the trials of another plan added; what was planned before stays and comes first."""
        trials = {trial.trial_id: trial for trial in (*self.trials, *more.trials)}
        return dataclasses.replace(
            more, sweep_id=self.sweep_id, space=self.space, question=self.question, trials=tuple(trials.values())
        )


def plan_sweep(
    space: Space,
    *,
    overrides: Mapping[str, Any] | None = None,
    search: str | None = None,
    samples: int | None = None,
    seeds: int | None = None,
    sweep_id: str | None = None,
    fresh: bool = True,
    **more: Any,
) -> SweepPlan:
    """Turn a space into checked trials.

    `overrides` replace keys of the space. Replicates of an experiment differ in their seed and run
    interleaved: every experiment's first seed before any experiment's second (temperature drifts). `fresh`: the plan
    adds to no earlier sweep, so an adaptive search of a few points cannot have more samples than there are points.
    `more` replaces scheduler, objectives, max_joules, max_hours, stall and anchor of the space's `sweep` section.

    Raises:
        ConfigError: a trial that cannot be, a value that would make one, a space without trials, or a search that
            cannot do what it is asked for.
    """
    chosen = dataclasses.replace(space, **_overridden(space, overrides or {}))
    search = search or str(space.sweep.get("search") or ("grid" if chosen.is_grid else "random"))
    seeds = seeds or int(space.sweep.get("seeds") or 1)
    if search not in SEARCHES:
        raise ConfigError(f"search: expected one of {', '.join(SEARCHES)}, got {search!r}")
    adaptive, rules = search in ADAPTIVE, _rules(space, more)
    check_search(chosen, search, adaptive=adaptive, objectives=rules["objectives"])
    samples = samples or int(space.sweep.get("samples") or _DEFAULT_SAMPLES)
    points = list(chosen.grid_points()) if search == "grid" else _draws(chosen, samples)
    configs = [TrialConfig.parse(_located(point)) for point in points]
    unique = {config.trial_id: config for config in reversed(configs)}
    for config in configs:
        _same_files(config, unique[config.trial_id])
    kept = [config for config in configs if unique[config.trial_id] is config]
    trials = [c.model_copy(update={"seed": c.seed + replicate}) for replicate in range(seeds) for c in kept]
    if not trials:
        raise ConfigError(f"trial: expected at least one trial in the space {space.name}, got none")
    if search != "grid":
        check_values(chosen, adaptive=adaptive)
    if adaptive and fresh and (every := every_point(chosen)):
        samples = min(samples, len(every))
    return SweepPlan(
        sweep_id=sweep_id or new_sweep_id(space.name),
        space=space.name,
        question=space.question,
        trials=() if adaptive else tuple({trial.trial_id: trial for trial in trials}.values()),
        dropped=0 if adaptive else len(configs) - len(kept),
        document=_absolute(dump_space(chosen)),
        search=search,
        samples=None if search == "grid" else samples,
        seeds=seeds,
        **rules,
    )


def _rules(space: Space, more: Mapping[str, Any]) -> dict[str, Any]:
    """Scheduler, objectives and budgets: what was asked for, else what the space says."""
    said = {**space.sweep, "stall": space.sweep.get("stop_when_hypervolume_stalls")}
    rules: dict[str, Any] = {key: more[key] if more.get(key) is not None else said.get(key) for key in _RULES}
    rules["scheduler"] = rules["scheduler"] or SCHEDULERS[0]
    rules["anchor"] = rules["anchor"] is not False
    if rules["scheduler"] not in SCHEDULERS:
        raise ConfigError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {rules['scheduler']!r}")
    rules["objectives"] = tuple(rules["objectives"] or OBJECTIVES)
    check_objectives(rules["objectives"])
    for key in ("max_joules", "max_hours", "stall"):
        if rules[key] is not None and not float(rules[key]) > 0:
            raise ConfigError(f"{key}: expected a number above 0, got {rules[key]!r}")
    return rules


_RULES = ("scheduler", "objectives", "max_joules", "max_hours", "stall", "anchor")


def _absolute(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "trial": _located(document["trial"])}


def _same_files(one: TrialConfig, other: TrialConfig) -> None:
    """Raises ConfigError where two experiments differ in nothing but the folder of a file: their id is the same."""
    for key in ("base", "tokenizer", "data"):
        if getattr(one, key) != getattr(other, key):
            raise ConfigError(
                f"{key}: expected files with different names, got {getattr(one, key)!r} and {getattr(other, key)!r},"
                " which an experiment's id cannot tell apart"
            )


def _located(point: Mapping[str, Any]) -> dict[str, Any]:
    """Paths made absolute: a trial's process has a working folder of its own."""
    paths = {k: v for k, v in point.items() if k in ("base", "tokenizer", "data") and isinstance(v, str) and glob(v)}
    return {**point, **{key: os.path.abspath(value) for key, value in paths.items()}}


def objectives_of(out: str | os.PathLike[str], sweep_id: str) -> tuple[str, ...]:
    """The columns (with direction) by which a sweep under `out` searches; the usual two where its plan is not there."""
    document = Journal(os.fspath(out), sweep_id).get("plan.json") or {}
    return tuple(document.get("objectives") or OBJECTIVES)


def new_sweep_id(name: str) -> str:
    """A readable id: the space's name, the UTC time, and four random hex digits."""
    now = dt.datetime.now(dt.UTC)
    return f"{name}-{now:%Y%m%d-%H%M%S}-{random.SystemRandom().randrange(1 << 16):04x}"


def _overridden(space: Space, overrides: Mapping[str, Any]) -> dict[str, Any]:
    domains = {key: domain for key, domain in space.domains.items() if key not in overrides}
    cases = domains.get(CASE)
    if isinstance(cases, Grid | Choice):
        kept = ({key: value for key, value in case.items() if key not in overrides} for case in cases.values)
        domains[CASE] = dataclasses.replace(cases, values=tuple(kept))
    return {
        "fixed": {**space.fixed, **overrides},
        "domains": domains,
        "conditions": {key: when for key, when in space.conditions.items() if key not in overrides},
    }


def _draws(space: Space, samples: int) -> list[dict[str, Any]]:
    generator = random.Random(f"joulemoe {space.name}")
    return [draw_point(space, generator) for _ in range(samples)]


def every_point(space: Space) -> list[TrialConfig]:
    """Every experiment of a space, each once; none where it is continuous or has more than a few thousand points."""
    values: dict[str, Sequence[Any]] = {}
    for key, domain in space.domains.items():
        if isinstance(domain, IntRange):
            values[key] = range(domain.low, domain.high + 1)
        elif isinstance(domain, Grid | Choice):
            values[key] = domain.values
        else:
            return []
    if math.prod(map(len, values.values())) > WHOLE:
        return []
    points = dataclasses.replace(space, domains={key: Grid(tuple(v)) for key, v in values.items()}).grid_points()
    return list({config.trial_id: config for config in map(TrialConfig.parse, points)}.values())


def untried(
    space: Space, points: Sequence[TrialConfig], tried: Container[str], generator: random.Random
) -> list[TrialConfig]:
    """Experiments that were not tried: of all `points`, where they can be listed, else of some draws."""
    points = points or [TrialConfig.parse(draw_point(space, generator)) for _ in range(_DRAWS)]
    configs = {config.trial_id: config for config in points}.values()
    return [config for config in configs if experiment_of(config.trial_id) not in tried]


def draw_point(space: Space, generator: random.Random) -> dict[str, Any]:
    """The keys of one trial, each drawn from its domain."""
    return space.resolve({key: draw(domain, generator) for key, domain in space.domains.items()})


def draw(domain: Domain, generator: random.Random) -> Any:
    """One value of a domain."""
    match domain:
        case Grid(values) | Choice(values):
            return generator.choice(values)
        case Uniform(low, high):
            return generator.uniform(low, high)
        case LogUniform(low, high):
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        case IntRange(low, high):
            return generator.randint(low, high)
