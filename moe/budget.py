"""Keeping a joule budget: what energies are reachable, the controller of λ, and prices learnt from telemetry.

Pure arithmetic on floats: no model, no device. E: joules per token of a window; B: the budget; λ: nats per c_ref.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

TOLERANCE = 0.015
"""A budget counts as kept within ±1.5 %."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """Joules per token measured at some λ, smallest λ first, of which the first is 0.

    Readings are noisy, so that E over λ is made to fall: the mean of neighbours that do not (pool adjacent violators).
    """

    lambdas: tuple[float, ...]
    energy_j: tuple[float, ...]

    def __post_init__(self) -> None:
        good = len(self.lambdas) == len(self.energy_j) >= 2 and self.lambdas[0] == 0
        if not good or list(self.lambdas) != sorted(set(self.lambdas)):
            raise ValueError(f"lambdas: expected at least two, ascending from 0, one energy each, got {self.lambdas}")
        if not all(0 < e < math.inf for e in self.energy_j):
            raise ValueError(f"energy_j: expected finite joules above 0, got {self.energy_j}")
        object.__setattr__(self, "energy_j", falling(self.energy_j))

    @property
    def most_j(self) -> float:
        """E at λ = 0."""
        return self.energy_j[0]

    @property
    def least_j(self) -> float:
        """E_min, the least that λ can reach."""
        return self.energy_j[-1]

    def at(self, share: float) -> float:
        """The budget at a share of the range: 0 is E_min, 1 is E at λ = 0."""
        return self.least_j + share * (self.most_j - self.least_j)

    def lambda_at(self, budget_j: float) -> float:
        """λ whose energy is the budget, between the measured points; an end where it lies outside."""
        points = list(zip(self.lambdas, self.energy_j, strict=True))
        if budget_j >= self.most_j:
            return 0.0
        for (low, above), (high, below) in itertools.pairwise(points):
            if above > budget_j >= below:
                return low + (high - low) * (above - budget_j) / (above - below)
        return self.lambdas[-1]

    def energy_at(self, energy_lambda: float) -> float:
        """Joules per token at λ, between the measured points."""
        at = min(max(1, sum(x <= energy_lambda for x in self.lambdas)), len(self.lambdas) - 1)
        low, high = self.lambdas[at - 1], self.lambdas[at]
        share = min(max((energy_lambda - low) / (high - low), 0.0), 1.0)
        return (1 - share) * self.energy_j[at - 1] + share * self.energy_j[at]

    def slope_at(self, budget_j: float) -> float:
        """−dE/dλ near the budget, joules per nat: of the measured points on both sides of it, never less than a fifth
        of the mean slope, so that a flat stretch does not make a wild controller."""
        here = self.lambda_at(budget_j)
        at = min(max(1, sum(x <= here for x in self.lambdas)), len(self.lambdas) - 1)
        mean = (self.most_j - self.least_j) / self.lambdas[-1]
        local = (self.energy_j[at - 1] - self.energy_j[at]) / (self.lambdas[at] - self.lambdas[at - 1])
        return max(local, mean / 5)

    def saving(self, energy_lambda: float, share: float) -> float:
        """The λ that takes a share fewer joules than this one (more, where the share is negative).

        The measured curve is followed stretch by stretch, each at its own slope and none at less than a fifth of the
        mean one; beyond its end the last goes on. It is log E that is followed: what a load changes, it changes at
        every λ in nearly the same proportion.
        """
        least = max(math.log(self.most_j / self.least_j), 1e-9) / self.lambdas[-1] / 5
        depth, points = [0.0], list(zip(self.lambdas, self.energy_j, strict=True))
        for (low, above), (high, below) in itertools.pairwise(points):
            depth.append(depth[-1] + max(math.log(above / below), least * (high - low)))
        return _along(depth, self.lambdas, _along(self.lambdas, depth, energy_lambda) + share)


def _along(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Straight lines through points of rising x; the first and the last go on beyond the ends."""
    at = min(max(1, sum(known <= x for known in xs)), len(xs) - 1)
    return ys[at - 1] + (ys[at] - ys[at - 1]) * (x - xs[at - 1]) / (xs[at] - xs[at - 1])


def falling(values: Sequence[float]) -> tuple[float, ...]:
    """The closest sequence that never rises (least squares, pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return tuple(value for value, count in blocks for _ in range(count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """κ_i, κ_p in nats per relative error, ν, and the highest λ."""

    integral: float
    proportional: float
    memory: float
    lambda_max: float

    @classmethod
    def of(cls, reach: Reach, budget_j: float, *, speed: float = 0.35) -> Gains:
        """Gains from the measured slope: an error is made good at `speed` of itself per window."""
        integral = speed * budget_j / max(reach.slope_at(budget_j), 1e-12)
        return cls(integral=integral, proportional=0.5 * integral, memory=0.5, lambda_max=reach.lambdas[-1])


class BudgetController:
    """νPI control of λ (Sohrabi et al. 2024, algorithm 1): e = E/B − 1, ξ_t = ν·ξ_{t−1} + (1 − ν)·e_t,
    λ ← clip(λ + κ_i·e_t + κ_p·(ξ_t − ξ_{t−1}), 0, λ_max).

    Increments of a clipped λ cannot wind up. λ belongs to this object alone.

    With the measured range the gains follow λ: an increment is what it would be at the budget, in joules, and λ moves
    by as much as the measured curve asks for that from where λ is now. An error that is beyond the tolerance in two
    windows running, on one side, is a disturbance and no noise: what of it exceeds the tolerance is made good at once.

    Args:
        budget_j: B, joules per token, adapting included.
        gains: see `Gains.of`.
        start: the first λ.
        reach: the measured range; None: gains as they are, everywhere. By it a budget out of reach is known before λ
            has got to its end, too.
    """

    PATIENCE = 16

    def __init__(self, budget_j: float, gains: Gains, *, start: float = 0.0, reach: Reach | None = None) -> None:
        if not 0 < budget_j < math.inf:
            raise ValueError(f"budget_j: expected finite joules per token above 0, got {budget_j}")
        self.budget_j, self.gains, self.start, self.reach = budget_j, gains, start, reach
        self.reset()

    @classmethod
    def for_reach(cls, budget_j: float, reach: Reach) -> BudgetController:
        """A controller with gains from the measured range, starting where the range says that the budget lies."""
        return cls(budget_j, Gains.of(reach, budget_j), start=reach.lambda_at(budget_j), reach=reach)

    def reset(self) -> None:
        """As new."""
        self.energy_lambda = min(max(self.start, 0.0), self.gains.lambda_max)
        self.xi = 0.0
        self.infeasible = False
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=self.PATIENCE)

    def step(self, energy_j: float) -> float:
        """Take the joules per token of one window; returns the next λ.

        Raises:
            ValueError: joules that are not finite or not above 0; λ stays as it was.
        """
        if not 0 < energy_j < math.inf:
            raise ValueError(f"energy_j: expected finite joules per token above 0, got {energy_j}")
        error = energy_j / self.budget_j - 1
        before, gains = self.xi, self.gains
        self.xi = gains.memory * before + (1 - gains.memory) * error
        self._recent.append((error, self.energy_lambda))
        moved = self._moved(gains.integral * error + gains.proportional * (self.xi - before))
        self.energy_lambda = min(max(moved, 0.0), gains.lambda_max)
        self.infeasible = self._is_infeasible()
        return self.energy_lambda

    def _moved(self, nats: float) -> float:
        """λ after an increment that is meant for the slope at the budget."""
        if self.reach is None:
            return self.energy_lambda + nats
        per_nat = max(self.reach.slope_at(self.budget_j), 1e-12) / self.budget_j
        speed = min(self.gains.integral * per_nat, 1.0)
        return self.reach.saving(self.energy_lambda, nats * per_nat + (1 - speed) * self._disturbance())

    def _disturbance(self) -> float:
        """What the last two errors agree to be beyond the tolerance; 0 where they do not."""
        last = [error for error, _ in self._recent][-2:]
        size = min(map(abs, last)) - TOLERANCE
        return math.copysign(size, last[-1]) if len(last) == 2 and last[0] * last[1] > 0 and size > 0 else 0.0

    def _is_infeasible(self) -> bool:
        """Over the budget where no λ keeps it, although λ is as high as it goes, or rose for long without effect."""
        errors = [error for error, _ in self._recent]
        lambdas = [energy_lambda for _, energy_lambda in self._recent]
        last = errors[-4:]
        if len(last) < 4 or sum(last) / 4 <= TOLERANCE:
            return False
        if self.reach is not None and self._least_now(self.reach) > self.budget_j * (1 + TOLERANCE):
            return True
        if min(lambdas[-4:]) >= self.gains.lambda_max * (1 - 1e-9):
            return True
        if len(errors) < self.PATIENCE or min(errors) <= TOLERANCE or lambdas[-1] <= lambdas[0]:
            return False
        return sum(errors[:4]) / 4 - sum(last) / 4 < TOLERANCE

    def _least_now(self, reach: Reach) -> float:
        """E_min as the last windows scale it."""
        recent = list(self._recent)[-8:]
        scale = sum(self.budget_j * (1 + e) / reach.energy_at(x) for e, x in recent) / len(recent)
        return scale * reach.least_j


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amortised:
    """Joules of updates, charged evenly over the work until the next one: a controller that heard them in lumps would
    move λ after every update and back again.

    A window is charged its part of what the next update is expected to cost; what an update really cost is made up for
    in the interval after it, at three times the usual charge at most. Never more than one update is charged in advance,
    so that the mean of the charges is that of the joules.

    Attributes:
        balance_j: charged so far, less what updates took.
        begun_j: the same after the window of the last update.
    """

    balance_j: float = 0.0
    begun_j: float = 0.0

    def window(self, update_j: float, *, expected_j: float, part: float) -> tuple[Amortised, float]:
        """Take one window; returns what comes after it, and the joules that it is charged.

        Args:
            update_j: joules of its updates.
            expected_j: joules of the next update.
            part: the window's work over that from one update to the next.
        """
        even = min(max(expected_j - self.begun_j, 0.0), 3 * expected_j) * part
        charged = min(even, max(expected_j - self.balance_j + update_j, 0.0))
        balance = self.balance_j + charged - update_j
        return Amortised(balance_j=balance, begun_j=balance if update_j > 0 else self.begun_j), charged


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearntPrice:
    """A price in joules: the calibrated table's, the learnt one with its 95 % interval, and which of them holds."""

    name: str
    table_j: float
    learnt_j: float
    low_j: float
    high_j: float
    trusted: bool

    @property
    def value_j(self) -> float:
        """The learnt price where its interval is narrow, else the table's."""
        return self.learnt_j if self.trusted else self.table_j


class PriceLearner:
    """Recursive least squares with forgetting of window joules on counts: tokens, n_e per width, opens, degree-seconds.

    Counts are scaled by the table, so that every coefficient is near 1. Shares must be dithered, or the columns are
    collinear; then intervals are wide, and the table holds.

    Args:
        table_j: name → joules per unit, above 0.
        forgetting: weight of a window after the next, 0.98 remembers about 50 windows.
        widest: half-width of an interval over its value from which on the table holds.
    """

    def __init__(self, table_j: dict[str, float], *, forgetting: float = 0.98, widest: float = 0.25) -> None:
        bad = {name: value for name, value in table_j.items() if not 0 < value < math.inf}
        if bad:
            raise ValueError(f"table_j: expected finite joules above 0, got {bad}")
        self.table_j, self.forgetting, self.widest = dict(table_j), forgetting, widest
        size = len(table_j)
        self.theta_F = torch.ones(size, dtype=torch.float64)
        self.P_FF = 1e6 * torch.eye(size, dtype=torch.float64)
        self.windows, self._error, self._weight, self._scale = 0, 0.0, 0.0, 0.0

    def update(self, counts: dict[str, float], energy_j: float) -> None:
        """Learn from one window: its counts, and its joules idle watts taken off. What is not finite is skipped."""
        values = [counts[name] for name in self.table_j]
        if not all(map(math.isfinite, [*values, energy_j])) or energy_j <= 0:
            return
        self._scale = self._scale or energy_j
        table_F = torch.tensor(list(self.table_j.values()), dtype=torch.float64)
        x_F = torch.tensor(values, dtype=torch.float64) * table_F / self._scale
        spread = float(x_F @ self.P_FF @ x_F)
        error = energy_j / self._scale - float(x_F @ self.theta_F)
        gain_F = self.P_FF @ x_F / (self.forgetting + spread)
        self.theta_F = self.theta_F + gain_F * error
        P_FF = (self.P_FF - torch.outer(gain_F, x_F @ self.P_FF)) / self.forgetting
        self.P_FF = (P_FF + P_FF.T) / 2
        self.windows += 1
        if self.windows > len(values):  # the first windows are fitted, not predicted
            self._error = self.forgetting * self._error + error**2 * self.forgetting / (self.forgetting + spread)
            self._weight = self.forgetting * self._weight + 1

    def prices(self) -> tuple[LearntPrice, ...]:
        """What is known of every price."""
        variance = self._error / self._weight if self._weight else math.inf
        enough = self.windows >= 3 * len(self.table_j)
        found = []
        for i, (name, table) in enumerate(self.table_j.items()):
            value, half = float(self.theta_F[i]), 1.96 * math.sqrt(max(0.0, variance * float(self.P_FF[i, i])))
            trusted = enough and value > 0 and half <= self.widest * value
            low, high = table * (value - half), table * (value + half)
            found.append(
                LearntPrice(name=name, table_j=table, learnt_j=table * value, low_j=low, high_j=high, trusted=trusted)
            )
        return tuple(found)
