"""Streaming text through a model under a joule budget: windows, telemetry, and what the controller makes of them.

Shapes: B sequences, S positions of a chunk, E experts.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hwcost import CostModel, EnergyMonitor, EnergyWindow, Measurement, share_energy
from hwcost.cost_model import Conditions
from hwcost.ops import ModelShape
from moe import EnergyAwareTTTRouter, HardwareFeedback, PriceLearner, Reach, TTTReport
from moe.budget import LearntPrice
from moe.captured import WARM_UP_CALLS
from moe.routing import count_E
from pipelines.modelled import at_width
from pipelines.prices import Prices

SETTLE_S = 0.2
"""How long into a window the one before it is read: the counter has stepped by then."""
_ANYWHERE = Conditions(extrapolate=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """One span of streaming: what it cost, what it predicted, and what was done about it.

    `update_s` are the seconds of the updates, canary included; `modelled_j` the cost model's joules of the chunks at
    the width that was selected, updates not in it (None without a GPU and its profile); `memory_fraction` the largest
    share of the device's memory in use, 0 to 1.
    """

    index: int
    energy_lambda: float
    tokens: int
    loss_nats: float
    batch_size: int
    measurement: Measurement
    updates: int
    update_s: float
    modelled_j: float | None = None
    memory_fraction: float | None = None
    report: TTTReport | None = None
    events: tuple[str, ...] = ()

    @property
    def j_per_token(self) -> float | None:
        """All joules of the span, adapting included, per token."""
        energy = self.measurement.energy_j
        return None if energy is None else energy / self.tokens

    @property
    def update_energy_j(self) -> float | None:
        """Joules of the updates: the window's, by their share of its time. A counter that steps every 0.1 s cannot
        tell one update from the chunks beside it."""
        return _update_energy_j(self.measurement, self.update_s)


def _update_energy_j(measured: Measurement, update_s: float) -> float | None:
    energy, duration_s = measured.energy_j, measured.duration_s
    return None if energy is None or duration_s <= 0 else energy * min(1.0, update_s / duration_s)


@dataclasses.dataclass
class Counts:
    """What the cost of a span is made of, summed on the device until a window ends. `open_E` counts openings."""

    tokens: int = 0
    chosen_E: torch.Tensor | None = None
    open_E: torch.Tensor | None = None

    def mean_width(self, shape: ModelShape) -> float:
        """Inner width that a token passed through a layer on average, its K experts together, neurons."""
        assert self.chosen_E is not None, "nothing was counted"
        widths_E = torch.tensor(shape.expert_widths, dtype=torch.float64)
        return float(self.chosen_E.cpu().double() @ widths_E) / (self.tokens * shape.num_moe_layers)

    def add(self, routings: Sequence[Any], tokens: int) -> None:
        """One chunk."""
        chosen = torch.stack([count_E(r.expert_TK, r.kept(), r.num_experts) for r in routings])
        self.tokens += tokens
        total_E, open_E = chosen.sum(dim=0), (chosen > 0).sum(dim=0)
        self.chosen_E = total_E if self.chosen_E is None else self.chosen_E + total_E
        self.open_E = open_E if self.open_E is None else self.open_E + open_E


class Pace:
    """Keeps the host one chunk ahead of a CUDA device, so that it waits neither for a chunk's end before the next is
    launched nor runs away from the clock. On a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.flying = device.type == "cuda", collections.deque[Any]()

    def wait(self) -> None:
        """A chunk was launched: until the one before it is done."""
        if not self.on_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        self.flying.append(event)
        if len(self.flying) > 1:
            self.flying.popleft().synchronize()


class Stream:
    """Windows of work on an endless stream of chunks.

    Args:
        ttt: the adapting router (with or without a controller).
        blocks_NS: text; chunks of `batch_size` blocks are taken in order, again and again.
        monitor: reads joules.
        synchronize: waits for the device.
        thermal: largest batch that keeps the device cool, given its temperature; None: not asked.
        modelled: joules of a window's chunks by the cost model, see `modelled_chunks`; None: not modelled.
    """

    def __init__(
        self,
        ttt: EnergyAwareTTTRouter,
        blocks_NS: torch.Tensor,
        monitor: EnergyMonitor,
        *,
        batch_size: int,
        window_s: float,
        synchronize: Callable[[], None] = lambda: None,
        thermal: Callable[[float, int], int] | None = None,
        modelled: Callable[[Counts, int, float | None], float | None] | None = None,
    ) -> None:
        self.ttt, self.monitor, self.window_s, self.synchronize = ttt, monitor, window_s, synchronize
        self.blocks_NS, self.batch_size, self.most_batch, self.thermal = blocks_NS, batch_size, batch_size, thermal
        self.modelled, self.memory_bytes = modelled, _memory_bytes(monitor.devices)
        self.at, self.index = 0, 0
        self.device = ttt.canary_BS.device
        self.counts, self.pace = Counts(), Pace(self.device)
        self.learner: PriceLearner | None = None
        self.read_counts: Callable[[Counts, Measurement], tuple[dict[str, float], float] | None] | None = None

    def chunk(self) -> torch.Tensor:
        """The next chunk, [B, S]; at the end of the text from its start again."""
        rows = torch.arange(self.at, self.at + self.batch_size) % len(self.blocks_NS)
        self.at = (self.at + self.batch_size) % len(self.blocks_NS)
        block_BS = self.blocks_NS[rows]
        if self.device.type == "cuda":
            block_BS = block_BS.pin_memory()  # a copy from other memory would wait for the chunk in flight
        return block_BS.to(self.device, non_blocking=True).long()

    def warm_up(self) -> None:
        """Build the code of predicting and learning, and find out what learning costs. Router and λ stay."""
        state, ratio = self.ttt.state(), math.nan
        for _ in range(WARM_UP_CALLS + 2):  # one call captures
            took_s = []
            for work in (lambda: self.ttt.predict(self.chunk()), lambda: self.ttt.ttt_update(update=True)):
                start_s = time.monotonic()
                work()
                self.synchronize()
                took_s.append(time.monotonic() - start_s)
            ratio = took_s[1] / took_s[0]
        self.ttt.restore(state)
        self.ttt.note_cost(ratio)

    def run(self, windows: int, *, tell: bool = True, learn: bool = True) -> Iterator[Window]:
        """So many windows, each yielded once its joules are known, which is a moment into the next one.

        Args:
            tell: let the controller hear of them; else λ stays.
            learn: update the biases when it is time to; else they stay.
        """
        waiting: tuple[EnergyWindow, dict[str, Any], float] | None = None
        for _ in range(windows):
            done = None
            with self.monitor.window("adapt") as window:
                start_s = time.monotonic()
                fields = self._begin()
                while (elapsed_s := time.monotonic() - start_s) < self.window_s or not fields["tokens"]:
                    if waiting is not None and elapsed_s >= min(SETTLE_S, self.window_s / 2):
                        done, waiting = self._end(*waiting, tell=tell), None
                    self._step(fields, learn)
                if waiting is not None:
                    done, waiting = self._end(*waiting, tell=tell), None
            if done is not None:
                yield done
            waiting = (window, fields, time.monotonic())
        if waiting is not None:
            yield self._end(*waiting, tell=tell)

    def _begin(self) -> dict[str, Any]:
        self.index += 1
        self.counts = Counts()
        return {
            "index": self.index,
            "energy_lambda": float(self.ttt.model.config.energy_lambda),
            "batch_size": self.batch_size,
            "tokens": 0,
            "loss": 0.0,
            "updates": 0,
            "update_s": 0.0,
            "chunk_s": [],
            "events": [],
            "counts": self.counts,
        }

    def _step(self, fields: dict[str, Any], learn: bool) -> None:
        """Predict a chunk; learn from it if it is time to, and measure what learning takes beside predicting."""
        start_s = time.monotonic()
        chunk_BS = self.chunk()
        loss = self.ttt.predict(chunk_BS)
        fields["counts"].add(self.ttt.seen_routing, chunk_BS.numel())
        fields["loss"] += loss.double() * chunk_BS.numel()  # on the device: nothing waits for it before the window ends
        fields["tokens"] += chunk_BS.numel()
        self.pace.wait()
        if learn and self.ttt.update_due:
            self.synchronize()
        predicted_s = time.monotonic()
        fields["chunk_s"].append(predicted_s - start_s)
        report = self.ttt.ttt_update(update=None if learn else False)
        fields["events"] += report.events
        if report.updated or report.canary_delta is not None:
            self.synchronize()
            took_s = time.monotonic() - predicted_s
            fields["updates"] += 1
            fields["update_s"] += took_s
            typical = sorted(fields["chunk_s"])[len(fields["chunk_s"]) // 2]
            self.ttt.note_cost(took_s / typical)

    def _end(self, window: EnergyWindow, fields: dict[str, Any], end_s: float, *, tell: bool) -> Window:
        """Read the joules of a window that is over, and tell the controller."""
        measured = window.measurement
        report, events = None, list(fields["events"])
        known: dict[str, Any] = {
            "modelled_j": self._modelled_j(fields, measured),
            "memory_fraction": self._memory_fraction(measured),
        }
        feedback = HardwareFeedback(
            energy_j=measured.energy_j,
            tokens=fields["tokens"],
            duration_s=measured.duration_s,
            power_w=measured.mean_power_w,
            temperature_c=measured.mean_temperature_c,
            update_j=_update_energy_j(measured, fields["update_s"]),
            age_s=max(0.0, time.monotonic() - end_s),
            **known,
        )
        if tell:
            report = self.ttt.ttt_update(feedback, update=False)
            events += report.events
        events += self._cool(measured.max_temperature_c)
        if self.learner is not None and self.read_counts is not None:
            counts = self.read_counts(fields["counts"], measured)
            if counts is not None:
                self.learner.update(*counts)
        kept = {
            name: fields[name] for name in ("index", "energy_lambda", "batch_size", "tokens", "updates", "update_s")
        }
        loss = float(fields["loss"]) / fields["tokens"]
        return Window(loss_nats=loss, measurement=measured, report=report, events=tuple(events), **known, **kept)

    def _modelled_j(self, fields: dict[str, Any], measured: Measurement) -> float | None:
        if self.modelled is None:
            return None
        return self.modelled(fields["counts"], fields["batch_size"], measured.mean_temperature_c)

    def _memory_fraction(self, measured: Measurement) -> float | None:
        if self.memory_bytes is None or measured.max_memory_bytes is None:
            return None
        return measured.max_memory_bytes / self.memory_bytes

    def _cool(self, temperature_c: float | None) -> list[str]:
        """The next chunk's batch: smaller where the device would get too hot, and back when it would not."""
        if self.thermal is None or temperature_c is None:
            return []
        before = self.batch_size
        self.batch_size = max(1, min(self.most_batch, self.thermal(temperature_c, self.most_batch)))
        return [] if self.batch_size == before else [f"batch {before} to {self.batch_size}: {temperature_c:.0f} °C"]


def measure_reach(stream: Stream, lambdas: Sequence[float], *, windows: int = 2) -> tuple[Reach, list[Window]]:
    """Joules per token at each λ, the first of which is 0; the controller hears nothing of it.

    Every λ runs one window to warm up and then `windows` more. Nothing learns meanwhile: an update falls into the
    windows of one λ and not of another. What adapting is expected to add, by the measured cost of an update
    (`cost_share`, at the watts of predicting), is added to all: a budget holds with adapting in it.

    Returns:
        The range, adapting included, and the windows as they were measured.

    Raises:
        ValueError: joules cannot be measured here.
    """
    model = stream.ttt.model
    before, found, energies = float(model.config.energy_lambda), [], []
    stream.warm_up()
    try:
        for energy_lambda in lambdas:
            model.set_energy_lambda(energy_lambda)
            here = list(stream.run(windows + 1, tell=False, learn=False))[1:]
            joules = [w.measurement.energy_j for w in here]
            if any(j is None for j in joules):
                raise ValueError("energy: expected joules of every window, got none: nothing can be measured here")
            energies.append(sum(j for j in joules if j is not None) / sum(w.tokens for w in here))
            found += here
    finally:
        model.set_energy_lambda(before)
    adapting = 1 + stream.ttt.cost_share
    return Reach(lambdas=tuple(lambdas), energy_j=tuple(adapting * energy for energy in energies)), found


def _memory_bytes(devices: Sequence[Any]) -> int | None:
    """Memory of the device that runs the stream; None where there is none, or several whose joules are summed."""
    total: int | None = devices[0].memory_bytes if len(devices) == 1 else None
    return total or None


def thermal_guard(cost_model: CostModel, shape: ModelShape, seq_len: int) -> Callable[[float, int], int]:
    """Largest safe batch of a prefill at a temperature, from the calibrated thermal model."""

    def largest(temperature_c: float, most: int) -> int:
        return cost_model.get_thermal_safe_batch_size(
            "prefill", temperature_c, seq_len=seq_len, shape=shape, max_batch=most
        )

    return largest


def modelled_chunks(
    cost_model: CostModel, shape: ModelShape, seq_len: int
) -> Callable[[Counts, int, float | None], float | None]:
    """What gives the modelled joules of a window's chunks, from its counts, sequences per chunk and mean °C.

    Experts are taken to be as wide as those selected were on average, as for a trial's training joules.
    """

    def joules(counts: Counts, batch_size: int, temperature_c: float | None) -> float | None:
        if counts.chosen_E is None or not counts.tokens:
            return None
        at = at_width(shape, counts.mean_width(shape))
        cost = cost_model.get_cost(
            "prefill", batch_size, seq_len, shape=at, current_temp=temperature_c, extrapolate=True
        )
        return cost.j_per_token * counts.tokens

    return joules


def price_learner(
    cost_model: CostModel, shape: ModelShape, seq_len: int
) -> tuple[PriceLearner, Callable[[Counts, Measurement], tuple[dict[str, float], float] | None]]:
    """A learner whose table is the calibrated one, and what turns a window into its counts and joules.

    Columns: tokens (all that is not an expert), choices of every non-null width, openings, degree-seconds. Static watts
    are taken off the joules.
    """
    prices = cost_model.expert_price(
        d_model=shape.d_model, widths=shape.expert_widths, top_k=shape.top_k, tokens=seq_len, dtype=shape.dtype,
        phase="prefill",
    )  # fmt: skip
    by_width = {w: j for w, j in zip(shape.expert_widths, prices.join_j, strict=True) if w > 0}
    cost = cost_model.get_cost_breakdown("prefill", batch_size=1, seq_len=seq_len, shape=shape, conditions=_ANYWHERE)
    experts_j = shape.num_moe_layers * shape.top_k * shape.mean_width / max(by_width) * by_width[max(by_width)]
    dynamic_j = share_energy(cost.energy_j - cost.static_j - cost.thermal_j, batch_size=1, seq_len=seq_len).token_j
    table = {"token": max(dynamic_j - experts_j, 0.2 * dynamic_j)}
    table |= {f"join {width}": j for width, j in sorted(by_width.items())}
    table["open"] = sum(prices.open_j) / sum(w > 0 for w in shape.expert_widths)
    if cost_model.profile.leak_w_per_c > 0:
        table["degree second"] = cost_model.profile.leak_w_per_c

    def read(counts: Counts, measured: Measurement) -> tuple[dict[str, float], float] | None:
        if measured.energy_j is None or counts.chosen_E is None or counts.open_E is None:
            return None
        opened = sum(n for w, n in zip(shape.expert_widths, counts.open_E.tolist(), strict=True) if w > 0)
        values = {"token": float(counts.tokens), "open": float(opened)}
        for width, chosen in zip(shape.expert_widths, counts.chosen_E.tolist(), strict=True):
            if width > 0:
                values[f"join {width}"] = values.get(f"join {width}", 0.0) + chosen
        degrees = (measured.mean_temperature_c or cost_model.profile.reference_c) - cost_model.profile.leak_from_c
        values["degree second"] = degrees * measured.duration_s
        return values, measured.energy_j - cost_model.static_w * measured.duration_s

    return PriceLearner(table), read


def with_learnt(table: Prices, learnt: Sequence[LearntPrice], widths: Sequence[int]) -> tuple[Prices, tuple[str, ...]]:
    """The table's prices with the learnt join prices that can be trusted, and the names of these.

    Args:
        table: of the phase that was learnt in; its c_ref is the unit, so that λ means what it did.
        learnt: named as `price_learner` names them, joules.
        widths: of each expert, neurons.
    """
    joins = {p.name: p.learnt_j for p in learnt if p.trusted and p.name.startswith("join ")}
    join = tuple(
        joins[f"join {width}"] / table.c_ref_j if f"join {width}" in joins else price
        for width, price in zip(widths, table.join, strict=True)
    )
    return dataclasses.replace(table, join=join), tuple(joins)


def dithered(stream: Stream, windows: int, *, spread: float = 2.0, seed: int = 0) -> Iterator[Window]:
    """Windows with biases drawn anew for each, so that the shares of the experts move: what prices are learnt from.
    Meanwhile no token is held to the trained router's choice, and nothing learns from such routing."""
    ttt, generator = stream.ttt, torch.Generator().manual_seed(seed)
    learnt_LE, held, suspended = ttt.offsets(), [router.keep_first for router in ttt.routers], ttt.suspended
    ttt.suspended = True
    for router in ttt.routers:
        router.keep_first = False
    try:
        for _ in range(windows):
            bias_E = spread * torch.randn(learnt_LE.shape[1], generator=generator)
            ttt.apply(bias_E.to(learnt_LE).expand_as(learnt_LE))
            yield from stream.run(1, tell=False)
    finally:
        ttt.apply(learnt_LE)
        ttt.suspended = suspended
        for router, keep_first in zip(ttt.routers, held, strict=True):
            router.keep_first = keep_first
