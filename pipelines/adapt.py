"""`joulemoe adapt`: stream text through a checkpoint under a joule budget, and write what happened."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hwcost import CostModel, EnergyMonitor
from moe import BudgetController, EnergyAwareTTTRouter, Reach, TTTSettings
from moe.captured import CapturedForward
from pipelines.adapting import (
    Stream,
    Window,
    dithered,
    measure_reach,
    modelled_chunks,
    price_learner,
    thermal_guard,
    with_learnt,
)
from pipelines.checkpoint import Loaded
from pipelines.config import ConfigError, TrialConfig
from pipelines.model import compiled_forward, model_shape, set_prices, switch_opening, weigh_opening
from pipelines.provenance import device_columns, host_columns
from pipelines.records import AdaptRecord, PowerRecord, Store, TrialRecord
from pipelines.trial_rows import TrialKey, config_columns, price_columns

REACH_LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
CANARY_BLOCKS = 8


class BudgetError(ConfigError):
    """A budget outside the range that was measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptPlan:
    """What to do: the budget, or its share of the measured range; windows, and how long each is.

    `force` runs a budget below the range too; it is flagged infeasible as long as it is. `use_learnt` puts the join
    prices on the routers that the windows with dithered shares taught, where intervals are narrow; the rest is the
    table's.
    """

    budget_j_per_token: float | None = None
    budget_share: float | None = None
    windows: int = 30
    window_s: float = 1.0
    reach_windows: int = 2
    dither_windows: int = 0
    use_learnt: bool = False
    force: bool = False
    settings: TTTSettings = dataclasses.field(default_factory=TTTSettings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """What came of it."""

    record: TrialRecord
    reach: Reach
    budget_j_per_token: float
    windows: tuple[Window, ...]


class Adaptation:
    """One run of `adapt` on a loaded checkpoint."""

    def __init__(self, loaded: Loaded, monitor: EnergyMonitor, plan: AdaptPlan, say: Callable[[str], None]) -> None:
        if not loaded.config.is_priced:
            raise ConfigError(f"router: expected one on which λ acts under a budget, got {loaded.config.router}")
        if plan.use_learnt and not plan.dither_windows:
            raise ConfigError("use_learnt: expected windows with dithered shares to learn from (--dither), got none")
        if plan.use_learnt and loaded.config.price != "joules":
            raise ConfigError(f"price: expected joules where learnt prices are used, got {loaded.config.price}")
        self.loaded, self.monitor, self.plan, self.say = loaded, monitor, plan, say
        self.origin_s, self.started_at = monitor.clock.monotonic(), dt.datetime.now(dt.UTC)
        assert loaded.prices is not None
        self.prices = dict(loaded.prices)
        set_prices(loaded.model, self.prices["prefill"])
        self._weigh_opening()
        if loaded.hardware.dtype == "bf16":  # nothing is trained but biases, which stay float32
            loaded.model.to(torch.bfloat16)
        self.forward = self.canary_forward = None
        if loaded.hardware.compile:
            self.forward = CapturedForward(loaded.model, compiled_forward(loaded.model))
            self.canary_forward = CapturedForward(loaded.model, loaded.model)  # of one shape: not worth compiling
        self.cost_ratio: float | None = None  # of an update, once the range has been measured
        self.cost_model = CostModel.for_device(loaded.hardware.gpu_name, loaded.hardware.power_limit_w)
        self.shape = model_shape(loaded.model.config, loaded.hardware)
        known = loaded.hardware.compile and loaded.hardware.gpu_name is not None and not self.cost_model.analytic
        self.modelled = modelled_chunks(self.cost_model, self.shape, loaded.config.seq_len) if known else None

    def _weigh_opening(self) -> None:
        """λ moves: router `opening` runs if it pays anywhere in the range that λ may have."""
        loaded = self.loaded
        found = weigh_opening(loaded.config, loaded.model.config, loaded.hardware, energy_lambda=REACH_LAMBDAS[-1])
        switch_opening(loaded.model, found)

    def stream(self, controller: BudgetController | None) -> Stream:
        """A stream over the train split; the canary is from the validation split, which is never learnt from."""
        loaded, plan = self.loaded, self.plan
        device = loaded.hardware.device
        canary_BS = loaded.corpus.splits["validation"].blocks_NS[:CANARY_BLOCKS].to(device).long()
        settings = dataclasses.replace(plan.settings, min_window_s=min(plan.settings.min_window_s, plan.window_s))
        ttt = EnergyAwareTTTRouter(
            loaded.model, canary_BS=canary_BS, controller=controller, settings=settings, forward=self.forward,
            canary_forward=self.canary_forward,
        )  # fmt: skip
        if self.cost_ratio is not None:
            ttt.note_cost(self.cost_ratio)
        on_gpu = device.type == "cuda"
        return Stream(
            ttt,
            loaded.corpus.splits["train"].first(loaded.config.max_train_tokens).blocks_NS,
            self.monitor,
            batch_size=loaded.config.batch_size,
            window_s=plan.window_s,
            synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
            thermal=thermal_guard(self.cost_model, self.shape, loaded.config.seq_len) if on_gpu else None,
            modelled=self.modelled,
        )

    def reach(self) -> Reach:
        """Measure and show the reachable range."""
        stream = self.stream(None)
        with stream.ttt:
            list(stream.run(2, tell=False))
            reach, _ = measure_reach(stream, REACH_LAMBDAS, windows=self.plan.reach_windows)
            adapting, self.cost_ratio = stream.ttt.cost_share, stream.ttt.cost_ratio
        word = "modelled " if self.monitor.source == "modelled" else ""
        self.say(f"{word}joules per token over λ, as measured (made to fall), with {adapting:.1%} more for adapting:")
        for energy_lambda, energy in zip(reach.lambdas, reach.energy_j, strict=True):
            self.say(f"  λ {energy_lambda:6.3g}   {1e3 * energy:.4g} mJ/token")
        self.say(f"reachable: {1e3 * reach.least_j:.4g} to {1e3 * reach.most_j:.4g} mJ/token")
        return reach

    def budget(self, reach: Reach) -> float:
        """The budget in joules per token.

        Raises:
            BudgetError: below the measured range, and not told to try all the same.
        """
        plan = self.plan
        budget = reach.at(plan.budget_share) if plan.budget_share is not None else plan.budget_j_per_token
        if budget is None or not 0 < budget < math.inf:
            raise BudgetError(f"budget: expected joules per token above 0, or a share of the range, got {budget}")
        if budget < reach.least_j and not plan.force:
            raise BudgetError(
                f"budget: expected {reach.least_j:.4g} to {reach.most_j:.4g} J/token, which λ can reach here, got"
                f" {budget:.4g}; --force runs it all the same, flagged infeasible"
            )
        if budget > reach.most_j:
            self.say(f"The budget is above {1e3 * reach.most_j:.4g} mJ/token, what λ = 0 takes: the price stays at 0.")
        return budget

    def run(self, on_window: Callable[[Window, float], None]) -> tuple[Reach, float, list[Window]]:
        """Measure the range, then stream under the budget. `on_window` is told of each window and the budget. The
        routers come back as they were."""
        reach = self.reach()
        budget = self.budget(reach)
        stream = self.stream(BudgetController.for_reach(budget, reach))
        assert self.loaded.prices is not None
        try:
            with stream.ttt:
                windows = self._under_budget(stream, budget, on_window)
        finally:
            set_prices(self.loaded.model, self.loaded.prices["prefill"])
        return reach, budget, windows

    def _under_budget(self, stream: Stream, budget: float, on_window: Callable[[Window, float], None]) -> list[Window]:
        notes: tuple[str, ...] = ()
        if self.plan.dither_windows:
            stream.learner, stream.read_counts = price_learner(self.cost_model, self.shape, self.loaded.config.seq_len)
            list(dithered(stream, self.plan.dither_windows))
            self._show_prices(stream)
            if self.plan.use_learnt:
                notes = (self._use_learnt(stream),)
        windows = []
        for window in stream.run(self.plan.windows):
            window, notes = dataclasses.replace(window, events=(*notes, *window.events)), ()
            on_window(window, budget)
            windows.append(window)
        return windows

    def _show_prices(self, stream: Stream) -> None:
        assert stream.learner is not None
        kept = "join prices to believe go on the routers" if self.plan.use_learnt else "routers keep the table's"
        self.say(f"prices, µJ: table, learnt [95 % interval], which to believe ({kept})")
        for p in stream.learner.prices():
            held = "learnt" if p.trusted else "table"
            self.say(
                f"  {p.name:14s} {1e6 * p.table_j:9.4g}  {1e6 * p.learnt_j:9.4g}"
                f" [{1e6 * p.low_j:.4g}, {1e6 * p.high_j:.4g}]  {held}"
            )

    def _use_learnt(self, stream: Stream) -> str:
        """Put what was learnt and can be trusted on the routers; returns the event that says so."""
        assert stream.learner is not None
        prices, names = with_learnt(self.prices["prefill"], stream.learner.prices(), self.shape.expert_widths)
        if not names:
            self.say("No learnt join price has a narrow interval: the routers keep the table's.")
            return "no learnt price to trust"
        self.prices["prefill"] = prices
        set_prices(self.loaded.model, prices)
        joins = ", ".join(f"{price:.3g}" for price in prices.join)
        self.say(f"On the routers: learnt {', '.join(names)}; the rest and opening from the table. In c_ref: {joins}.")
        return "learnt prices: " + ", ".join(names)


def adapt(
    loaded: Loaded,
    monitor: EnergyMonitor,
    plan: AdaptPlan,
    *,
    out: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
    on_window: Callable[[Window, float], None] = lambda window, budget: None,
) -> Adapted:
    """Keep a joule budget while streaming text, and write the tables `trials`, `adapt` and `power` under `out`.

    Raises:
        BudgetError: a budget below what λ can reach here.
        ConfigError: a router on which λ does not act.
        ValueError: joules cannot be measured here.
    """
    run = Adaptation(loaded, monitor, plan, say)
    reach, budget, windows = run.run(on_window)
    key = TrialKey(sweep_id="adapt", trial_id=f"adapt-{run.started_at:%Y%m%dT%H%M%S%f}"[:-3])
    store, where = Store(out), dataclasses.asdict(key)
    store.write(AdaptRecord, [_row(key, w, budget) for w in windows], **where)
    power = list(_power(key, monitor, run.origin_s))
    if power:
        store.write(PowerRecord, power, **where)
    record = _trial(key, run, windows)
    store.write(TrialRecord, [record], **where)
    return Adapted(record=record, reach=reach, budget_j_per_token=budget, windows=tuple(windows))


def _row(key: TrialKey, window: Window, budget: float) -> AdaptRecord:
    measured = window.measurement
    return AdaptRecord(
        **dataclasses.asdict(key),
        window=window.index,
        energy_lambda=window.energy_lambda,
        budget_j_per_token=budget,
        j_per_token=window.j_per_token,
        energy_j=measured.energy_j,
        energy_uncertainty_j=measured.uncertainty_j,
        energy_source=measured.source,
        modelled_j=window.modelled_j,
        tokens=window.tokens,
        loss_nats=window.loss_nats,
        batch_size=window.batch_size,
        duration_s=measured.duration_s,
        updates=window.updates,
        update_duration_s=window.update_s,
        update_energy_j=window.update_energy_j,
        infeasible=window.report.infeasible if window.report is not None else None,
        mean_power_w=measured.mean_power_w,
        max_temperature_c=measured.max_temperature_c,
        memory_fraction=window.memory_fraction,
        events=list(window.events),
    )


def _power(key: TrialKey, monitor: EnergyMonitor, origin_s: float) -> Iterator[PowerRecord]:
    names = {field.name for field in dataclasses.fields(PowerRecord)}
    for sample in monitor.system.history:
        time_s = sample.time_s - origin_s
        if time_s >= 0:
            values = {k: v for k, v in dataclasses.asdict(sample).items() if k in names}
            yield PowerRecord(**dataclasses.asdict(key), **(values | {"time_s": time_s}))


def _trial(key: TrialKey, run: Adaptation, windows: list[Window]) -> TrialRecord:
    """The run as a row of `trials`: nothing was trained, so that it stands on no front of training joules."""
    config: TrialConfig = run.loaded.config
    tokens = sum(w.tokens for w in windows)
    energies = [w.measurement.energy_j for w in windows]
    energy = None if None in energies else sum(e for e in energies if e is not None)
    loss = sum(w.loss_nats * w.tokens for w in windows) / tokens
    columns: dict[str, Any] = config_columns(config) | {"epochs": 0}
    return TrialRecord(
        **dataclasses.asdict(key),
        state="COMPLETED",
        censored=False,
        started_at=run.started_at,
        **columns,
        **host_columns(),
        **device_columns(run.monitor, run.loaded.hardware),
        **price_columns(config, run.prices),
        energy_source=run.monitor.source,
        eval_loss_nats=loss,
        eval_energy_j=energy,
        prefill_j_per_token=None if energy is None else energy / tokens,
        corpus_fingerprint=run.loaded.corpus.fingerprint,
        duration_s=run.monitor.clock.monotonic() - run.origin_s,
    )
