"""A search that counts what its trials cost: the next one is where a joule buys the most expected hypervolume.

A trial's joules are known roughly before it runs, from the cost model, and cheap trials tell much about expensive ones.
Gaussian processes believe in the loss and in the ratio of measured to modelled joules; the acquisition is expected
hypervolume improvement (Emmerich, Deutz & Klinkenberg, CEC 2011) per expected joule (cost as in Snoek, Larochelle &
Adams, NeurIPS 2012, section 3.2). The first trials are cheap ones that lie far from each other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines import fronts
from pipelines.config import ConfigError, TrialConfig, experiment_of
from pipelines.pareto import Objective
from pipelines.plan import every_point, untried
from pipelines.records import TrialRecord
from pipelines.surrogate import Belief, Floats, believe, expected_hypervolume_improvement
from tune_spaces import Choice, Domain, Grid, IntRange, LogUniform, Space, Uniform

#: What the cost model predicts up to a factor.
COST = Objective(column="train_energy_j")
_FIRST = 6  # trials before there is something to believe
_NEAR = 8  # cheap candidates among which the farthest is a first trial
_CHEAPNESS = 2.0  # a first trial is drawn with odds 1 / cost²


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What a choice rests on: features [N, F], modelled joules [N] and objectives [N, 2] of the trials that ended, and
    features and modelled joules of those that run.

    `scaled` says for each objective whether it is joules that the cost model predicts up to a factor.
    """

    x_NF: Floats
    modelled_N: Floats
    cost_N2: Floats
    running_RF: Floats
    running_R: Floats
    scaled: tuple[bool, bool]


def choose(known: Known, x_CF: Floats, modelled_C: Floats, generator: random.Random) -> int:
    """Which candidate to run next."""
    if len(known.x_NF) < _FIRST:
        return _far_and_cheap(np.concatenate([known.x_NF, known.running_RF]), x_CF, modelled_C, generator)
    asked_F, asked = np.concatenate([x_CF, known.running_RF]), np.concatenate([modelled_C, known.running_R])
    beliefs = [_believe(known, axis, asked_F, asked) for axis in (0, 1)]
    count = len(x_CF)
    running_R2 = np.stack([belief.mean_C[count:] for belief in beliefs], axis=1)
    seen_N2 = np.concatenate([known.cost_N2, running_R2])  # what runs is taken to end as believed
    here = [Belief(mean_C=b.mean_C[:count], std_C=b.std_C[:count]) for b in beliefs]
    worst_2 = np.array([(b.mean_C + b.std_C).max() for b in here])
    reference_2 = np.maximum(worst_2, known.cost_N2.max(axis=0))
    front_M2 = seen_N2[fronts.nondominated(seen_N2)]
    gain_C = expected_hypervolume_improvement(front_M2, reference_2, *here)
    spent_C = np.exp(here[known.scaled.index(True)].mean_C) if any(known.scaled) else modelled_C
    return int(np.argmax(gain_C / spent_C))


def _believe(known: Known, axis: int, x_CF: Floats, modelled_C: Floats) -> Belief:
    y_N = known.cost_N2[:, axis]
    if not known.scaled[axis]:
        return believe(known.x_NF, y_N, x_CF)
    ratio = believe(known.x_NF, y_N - np.log(known.modelled_N), x_CF)
    return Belief(mean_C=ratio.mean_C + np.log(modelled_C), std_C=ratio.std_C)


def _far_and_cheap(seen_NF: Floats, x_CF: Floats, modelled_C: Floats, generator: random.Random) -> int:
    odds_C = modelled_C**-_CHEAPNESS
    picked = sorted({generator.choices(range(len(x_CF)), weights=odds_C.tolist())[0] for _ in range(_NEAR)})
    if not len(seen_NF):
        return generator.choice(picked)
    distance = [np.abs(seen_NF - x_CF[c]).sum(axis=1).min() for c in picked]
    return picked[int(np.argmax(distance))]


class CostAwareStudy:
    """Ask for configurations, tell outcomes. Knows nothing of Ray.

    Args:
        objectives: two columns, `COLUMN` or `COLUMN:max`.
        modelled_j: modelled joules of a trial's training, up to a factor.
        seed: of the draws.

    Raises:
        ConfigError: not two objectives.
    """

    def __init__(
        self,
        space: Space,
        objectives: Iterable[str],
        modelled_j: Callable[[TrialConfig], float],
        seed: int = 0,
    ) -> None:
        self.space, self.modelled_j = space, modelled_j
        self.axes = [Objective.parse(axis) for axis in objectives]
        if len(self.axes) != 2:
            raise ConfigError(f"objectives: expected two for search cost-aware, got {len(self.axes)}")
        self.threads: int | None = None
        self.outcomes: dict[str, tuple[TrialConfig, tuple[float, float] | None]] = {}
        self.asked: dict[str, TrialConfig] = {}
        self._generator = random.Random(f"joulemoe {space.name} {seed}")
        self._points = every_point(space)
        self._rows: dict[str, tuple[list[float], float]] = {}

    def reserve(self, config: TrialConfig) -> None:
        """A trial that this study did not choose begins: its outcome will be told, and it is not asked for."""
        self.asked[config.trial_id] = config

    def ask(self) -> TrialConfig | None:
        """The next experiment; None where the space seems to have no more."""
        candidates = self._candidates()
        if not candidates:
            return None
        config = candidates[choose(self._known(), *self._described(candidates), self._generator)]
        self.asked[config.trial_id] = config
        return config

    def tell(self, trial_id: str, row: TrialRecord | None, *, stopped: bool = False) -> None:
        """The outcome of a trial; None: it left no row. One that was `stopped` or failed has no objectives: it is not
        asked for again, and nothing is believed from it.
        """
        config = self.asked.pop(trial_id, None)
        if config is not None:
            self.outcomes[trial_id] = config, self.values_of(row)
        elif row is not None:
            self.remember(row)

    def remember(self, row: TrialRecord) -> None:
        """An outcome of an earlier session."""
        self.outcomes[row.trial_id] = TrialConfig.parse(json.loads(row.config_json)), self.values_of(row)

    def values_of(self, row: TrialRecord | None) -> tuple[float, float] | None:
        """The objectives to be minimised, joules as logarithms; None where one is missing or not a number."""
        if row is None or row.state != "COMPLETED":
            return None
        found = [axis.cost(getattr(row, axis.column)) for axis in self.axes]
        return (found[0], found[1]) if all(math.isfinite(v) for v in found) else None

    def _candidates(self) -> list[TrialConfig]:
        tried = {experiment_of(trial_id) for trial_id in (*self.outcomes, *self.asked)}
        return untried(self.space, self._points, tried, self._generator)

    def _known(self) -> Known:
        done = [(config, values) for config, values in self.outcomes.values() if values is not None]
        x_NF, modelled_N = self._described([config for config, _ in done])
        running_RF, running_R = self._described(list(self.asked.values()))
        cost_N2 = np.array([values for _, values in done], dtype=np.float64).reshape(-1, 2)
        scaled = (self.axes[0] == COST, self.axes[1] == COST)
        return Known(
            x_NF=x_NF,
            modelled_N=modelled_N,
            cost_N2=cost_N2,
            running_RF=running_RF,
            running_R=running_R,
            scaled=scaled,
        )

    def _described(self, configs: Sequence[TrialConfig]) -> tuple[Floats, Floats]:
        rows = [self._row(config) for config in configs]
        x_NF = np.array([x_F for x_F, _ in rows]).reshape(-1, len(features(self.space, {})))
        return x_NF, np.array([modelled for _, modelled in rows])

    def _row(self, config: TrialConfig) -> tuple[list[float], float]:
        if config.trial_id not in self._rows:
            self._rows[config.trial_id] = features(self.space, config.model_dump(mode="json")), self.modelled_j(config)
        return self._rows[config.trial_id]


# --- features ----------------------------------------------------------------------------------------


def features(space: Space, settings: Mapping[str, Any]) -> list[float]:
    """What varies in a space as numbers in [0, 1]; a key that does not apply stands in the middle."""
    found: list[float] = []
    for key, domain in space.domains.items():
        conditions = space.conditions.get(key, {})
        applies = key in settings and all(settings.get(other) in allowed for other, allowed in conditions.items())
        found += _coordinates(domain, settings[key] if applies else None)
    return found


def _coordinates(domain: Domain, value: Any) -> list[float]:
    match domain:
        case Grid(values) | Choice(values):
            return _listed(values, value)
        case LogUniform(low, high):
            return [0.5 if value is None else math.log(value / low) / math.log(high / low)]
        case Uniform(low, high) | IntRange(low, high):
            return [0.5 if value is None else (value - low) / (high - low)]


def _listed(values: Sequence[Any], value: Any) -> list[float]:
    """Numbers by their rank, anything else as one coordinate per value."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        ordered = sorted(set(values))
        return [0.5 if value is None or len(ordered) < 2 else ordered.index(value) / (len(ordered) - 1)]
    texts = [json.dumps(v) for v in values]
    return [float(json.dumps(value) == text) for text in texts]


__all__ = ["CostAwareStudy", "Known", "choose", "features"]
