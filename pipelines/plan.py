"""What a sweep will run: the trials of a space, each checked and each experiment once."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import os
import random
from collections.abc import Mapping
from glob import glob
from typing import Any

from pipelines.config import ConfigError, TrialConfig
from tune_spaces import Choice, Domain, Grid, IntRange, LogUniform, Space, Uniform

_DEFAULT_SAMPLES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The trials of a sweep in the order they start.

    Attributes:
        dropped: how many points of the space repeat an experiment that is already in (for example λ > 0
            where no price can act).
    """

    sweep_id: str
    space: str
    question: str
    trials: tuple[TrialConfig, ...]
    dropped: int


def plan_sweep(
    space: Space,
    *,
    overrides: Mapping[str, Any] | None = None,
    search: str | None = None,
    samples: int | None = None,
    seeds: int | None = None,
    sweep_id: str | None = None,
) -> SweepPlan:
    """Turn a space into checked trials.

    `overrides` replace keys of the space. Replicates of an experiment differ in their seed and run
    interleaved: every experiment's first seed before any experiment's second (temperature drifts).

    Raises:
        ConfigError: a trial that cannot be, or a space without trials.
    """
    chosen = dataclasses.replace(space, **_overridden(space, overrides or {}))
    search = search or str(space.sweep.get("search") or ("grid" if chosen.is_grid else "random"))
    seeds = seeds or int(space.sweep.get("seeds") or 1)
    if search == "grid":
        points = list(chosen.grid_points())
    elif search == "random":
        points = _draws(chosen, samples or int(space.sweep.get("samples") or _DEFAULT_SAMPLES))
    else:
        raise ConfigError(f"search: expected one of grid, random, got {search!r}")
    configs = [TrialConfig.parse(_located(point)) for point in points]
    unique = {config.trial_id: config for config in reversed(configs)}
    kept = [config for config in configs if unique[config.trial_id] is config]
    trials = [c.model_copy(update={"seed": c.seed + replicate}) for replicate in range(seeds) for c in kept]
    if not trials:
        raise ConfigError(f"trial: expected at least one trial in the space {space.name}, got none")
    return SweepPlan(
        sweep_id=sweep_id or new_sweep_id(space.name),
        space=space.name,
        question=space.question,
        trials=tuple({trial.trial_id: trial for trial in trials}.values()),
        dropped=len(configs) - len(kept),
    )


def _located(point: Mapping[str, Any]) -> dict[str, Any]:
    """Paths made absolute: a trial's process has a working folder of its own."""
    paths = {k: v for k, v in point.items() if k in ("base", "tokenizer", "data") and isinstance(v, str) and glob(v)}
    return {**point, **{key: os.path.abspath(value) for key, value in paths.items()}}


def new_sweep_id(name: str) -> str:
    """A readable id: the space's name, the UTC time, and four random hex digits."""
    now = dt.datetime.now(dt.UTC)
    return f"{name}-{now:%Y%m%d-%H%M%S}-{random.SystemRandom().randrange(1 << 16):04x}"


def _overridden(space: Space, overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "fixed": {**space.fixed, **overrides},
        "domains": {key: domain for key, domain in space.domains.items() if key not in overrides},
        "conditions": {key: when for key, when in space.conditions.items() if key not in overrides},
    }


def _draws(space: Space, samples: int) -> list[dict[str, Any]]:
    generator = random.Random(f"joulemoe {space.name}")
    return [space.resolve({k: draw(d, generator) for k, d in space.domains.items()}) for _ in range(samples)]


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
