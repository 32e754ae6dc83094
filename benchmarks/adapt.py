"""A joule budget at test time on a real GPU: reachable range, budgets inside it, loads and texts that change, prices.

Trains a model for a while, then, on text that it was not trained on:

1. measures joules per token and loss over λ, routers frozen: the reachable range [E_min, E at λ = 0], with what
   adapting is expected to add;
2. keeps budgets at 25 % and 75 % of it from the side of λ = 0: the mean of 20 windows after settling, 4 of each of 5
   seeds. A seed is an order of the text and a canary; biases start from zero, λ goes on. Beside each, on the same text,
   frozen routers at three λ: the mean of that seed's windows, and two that bracket its joules by 1 % on each side.
   Loss at equal joules is paired over the seeds, by the slope of loss over joules from the range, and by a curve
   through those three. Joules of the curve are by width, which is known without noise: a line fitted to all windows
   of frozen routers;
3. changes the load half-way (products of matrices beside each chunk, as of another tenant), then the text (from the
   domain that selects the widest experts to that which selects the narrowest): the controller returns to the budget,
   within so many windows; the replay of what it heard before the change does not;
4. learns prices from windows with dithered shares and λ, and holds them against the table.

    python benchmarks/adapt.py --data corpus.parquet --tokenizer FOLDER --seconds 300 --out adapt.json

`--set base=FOLDER` starts from a dense checkpoint, upcycled; what is unseen are then the corpus's validation and test
splits, as the checkpoint may have read the whole of its training split. `--set learning_rate=3.0e-4` suits it.

What was measured is written to --out after every step, so that a run that is cut off keeps it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from trained import Results, Tenant, elapsed_s, interval, texts, trained

from hwcost import CostModel, EnergyMonitor
from hwcost.ops import ModelShape
from moe import BudgetController, EnergyAwareTTTRouter, HardwareFeedback, PriceLearner, Reach, TTTSettings
from moe.budget import TOLERANCE
from moe.captured import CapturedForward
from pipelines.adapting import Stream, Window, dithered, measure_reach, modelled_chunks, price_learner
from pipelines.config import TrialConfig
from pipelines.data import TokenSplit, load_corpus
from pipelines.model import Hardware, compiled_forward

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)  # loss rises steeply at the end: points are close there
TENANT_SHARE = 0.06  # of a chunk's time: well within the range that λ can make good
BRACKET = 0.01  # of the joules, on each side
STATIC_WINDOWS = 2  # at the mean λ; one at each side
REPLAY = (4, 8)  # windows before and after a change


def joules(windows: Sequence[Window]) -> float:
    """Joules per token over windows; NaN where one was not measured."""
    energies = [w.measurement.energy_j for w in windows]
    if None in energies:
        return math.nan
    return sum(e for e in energies if e is not None) / sum(w.tokens for w in windows)


def loss_of(windows: Sequence[Window]) -> float:
    return sum(w.loss_nats * w.tokens for w in windows) / sum(w.tokens for w in windows)


def settled_after(windows: Sequence[Window], budget_j: float, *, mean_of: int = 4) -> int | None:
    """Windows gone by when, from then on, the mean of any so many in a row is within the tolerance, and the next window
    within twice that; None: never."""
    means = [joules(windows[i : i + mean_of]) / budget_j - 1 for i in range(len(windows) - mean_of + 1)]
    for i, window in enumerate(windows[: len(means)]):
        if max(map(abs, means[i:])) <= TOLERANCE and abs(joules([window]) / budget_j - 1) <= 2 * TOLERANCE:
            return i
    return None


def parabola(points: Sequence[tuple[float, float]], x: float) -> float:
    """Through three points, at x; NaN where two of them (nearly) coincide, or x lies far outside."""
    (a, p), (b, q), (c, r) = points
    near, slack = min(abs(a - b), abs(a - c), abs(b - c)), BRACKET * x
    if near < 1e-3 * x or not min(a, b, c) - slack <= x <= max(a, b, c) + slack:
        return math.nan
    left, middle = p * (x - b) * (x - c) / ((a - b) * (a - c)), q * (x - a) * (x - c) / ((b - a) * (b - c))
    return left + middle + r * (x - a) * (x - b) / ((c - a) * (c - b))


def rows(windows: Sequence[Window]) -> list[dict[str, Any]]:
    """Windows as JSON."""
    return [
        {
            "energy_lambda": w.energy_lambda, "j_per_token": w.j_per_token, "loss_nats": w.loss_nats,
            "tokens": w.tokens, "duration_s": w.measurement.duration_s, "energy_j": w.measurement.energy_j,
            "uncertainty_j": w.measurement.uncertainty_j, "temperature_c": w.measurement.mean_temperature_c,
            "updates": w.updates, "update_s": w.update_s, "update_energy_j": w.update_energy_j,
            "heard_j_per_token": w.report.heard_j_per_token if w.report else None, "modelled_j": w.modelled_j,
            "memory_fraction": w.memory_fraction, "events": list(w.events),
        }
        for w in windows
    ]  # fmt: skip


class Bench:
    """The model, its text, and how long there is."""

    def __init__(
        self, model: Any, text: TokenSplit, monitor: EnergyMonitor, args: argparse.Namespace, results: Results,
        cost_model: CostModel, hardware: Hardware,
    ) -> None:  # fmt: skip
        self.model, self.monitor, self.args, self.results = model, monitor, args, results
        self.device = next(model.parameters()).device
        self.pool_NS, self.blocks_NS = text.blocks_NS[::10], text.blocks_NS[torch.arange(len(text.blocks_NS)) % 10 > 0]
        self.domain_N = text.domain_N[torch.arange(len(text.blocks_NS)) % 10 > 0]
        own = CapturedForward(model, compiled_forward(model)) if hardware.compile else model
        self.forward = Tenant(own, self.device)
        self.canary_forward = CapturedForward(model, model) if hardware.compile else None
        self.cost_ratio: float | None = None  # of an update, in chunks
        config = model.config
        self.shape = ModelShape(
            d_model=config.n_embd, num_layers=config.n_layer, num_heads=config.n_head, vocab_size=config.vocab_size,
            expert_widths=tuple(config.expert_widths), top_k=config.num_experts_per_tok,
        )  # fmt: skip
        self.cost_model = cost_model
        known = hardware.compile and not cost_model.analytic
        self.modelled = modelled_chunks(cost_model, self.shape, self.blocks_NS.shape[1]) if known else None
        self.learner, self.read = price_learner(cost_model, self.shape, self.blocks_NS.shape[1])
        self.widths: list[float] = []  # mean width selected per token and layer, window by window
        self.frozen: list[tuple[float, float]] = []  # (width, joules per token) of windows without updates or tenant

    def stream(
        self,
        controller: BudgetController | None,
        *,
        seed: int = 0,
        blocks_NS: torch.Tensor | None = None,
        **settings: Any,
    ) -> Stream:
        """Text in the order of a seed, with its canary; biases at zero."""
        generator = torch.Generator().manual_seed(1000 + seed)
        blocks_NS = self.blocks_NS if blocks_NS is None else blocks_NS
        canary = torch.randperm(len(self.pool_NS), generator=generator)[:8]
        ttt = EnergyAwareTTTRouter(
            self.model,
            canary_BS=self.pool_NS[canary].to(self.device).long(),
            controller=controller,
            settings=TTTSettings(**({"min_window_s": 0.5, "update_share": self.args.update_share} | settings)),
            forward=self.forward,
            canary_forward=self.canary_forward,
        )
        if self.cost_ratio is not None:
            ttt.note_cost(self.cost_ratio)
        ttt.apply(torch.zeros_like(ttt.offsets()))
        sync = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        order = torch.randperm(len(blocks_NS), generator=generator)
        stream = Stream(
            ttt,
            blocks_NS[order],
            self.monitor,
            batch_size=self.args.batch,
            window_s=self.args.window,
            synchronize=sync,
            modelled=self.modelled,
        )
        stream.learner, stream.read_counts = self.learner, self._read
        return stream

    def _read(self, counts: Any, measured: Any) -> tuple[dict[str, float], float] | None:
        """What the learner learns from; remembers the width that was selected, which is work without noise."""
        self.widths.append(counts.mean_width(self.shape))
        return self.read(counts, measured) if self.forward.repeats == 0 else None

    def reach(self) -> Reach:
        """Joules and loss over λ."""
        self.model.set_energy_lambda(0.0)
        stream = self.stream(None)
        stream.warm_up()
        list(stream.run(3, tell=False, learn=False))
        self.results.say("warm")
        self.chunk_s = stream.window_s * self.args.batch * stream.blocks_NS.shape[1] / next(
            stream.run(1, tell=False, learn=False)
        ).tokens  # fmt: skip
        reach, windows = measure_reach(stream, LAMBDAS, windows=2)
        self.cost_ratio, share = stream.ttt.cost_ratio, stream.ttt.cost_share
        self._freeze(windows, [w for i, w in enumerate(self.widths[-3 * len(LAMBDAS) :]) if i % 3])
        table = []
        for i, (energy_lambda, energy) in enumerate(zip(reach.lambdas, reach.energy_j, strict=True)):
            here, width = windows[2 * i : 2 * i + 2], self.widths[-3 * len(LAMBDAS) :][3 * i + 2]
            row = {"energy_lambda": energy_lambda, "j_per_token": energy, "loss_nats": loss_of(here), "width": width}
            table.append(row | {"windows": rows(here)})
            raw = ", ".join(f"{1e3 * (w.j_per_token or math.nan):.4f}" for w in here)
            self.results.say(
                f"λ {energy_lambda:5.2f}: {1e3 * energy:.4f} mJ/token (windows {raw}), loss {row['loss_nats']:.4f},"
                f" width {width:.0f}"
            )
        low, high = 1e3 * reach.least_j, 1e3 * reach.most_j
        self.results.say(
            f"range {low:.4f} to {high:.4f} mJ/token: {1 - low / high:.1%}; adapting in it: {share:.2%}; a chunk"
            f" {1e3 * self.chunk_s:.1f} ms, an update {self.cost_ratio:.2f} chunks"
        )
        cost = {"update_chunks": self.cost_ratio, "adapting_share": share, "update_share": self.args.update_share}
        self.results.keep("reach", {"points": table, "chunk_s": self.chunk_s, **cost})
        self.curve = [(row["j_per_token"], row["loss_nats"]) for row in table]
        return reach

    def _freeze(self, windows: Sequence[Window], widths: Sequence[float]) -> None:
        """Windows of frozen routers, from which joules are told by width."""
        self.frozen += [(width, w.j_per_token) for width, w in zip(widths, windows, strict=True) if w.j_per_token]

    def joules_at(self, width: float) -> float:
        """Joules per token of a mean selected width, by all windows of frozen routers."""
        line = statistics.linear_regression(*zip(*self.frozen, strict=True))
        return line.intercept + line.slope * width

    def slope(self, energy_j: float) -> float:
        """dloss/dE between the measured points around an energy, nats per joule; 0 where the range is flat."""
        for (above, low), (below, high) in zip(self.curve, self.curve[1:], strict=False):
            if above >= energy_j >= below and above > below:
                return (high - low) / (below - above)
        return 0.0

    def budget(self, reach: Reach, share: float) -> None:
        """The budget kept over the seeds, and the static λ beside each."""
        args, budget = self.args, reach.at(share)
        controller = BudgetController.for_reach(budget, reach)
        controller.start = controller.energy_lambda = 0.0  # from the side of λ = 0: it has to find its way
        kept, every, pairs = list[Window](), list[Window](), list[dict[str, Any]]()
        for seed in range(args.seeds):
            settle = args.settle if seed == 0 else 1
            stream = self.stream(controller, seed=seed)
            found = list(stream.run(settle + args.windows))
            here, at = found[settle:], sum(w.tokens for w in found[:settle]) // stream.blocks_NS.shape[1]
            pairs.append(self._pair(here, seed, at, reach, budget))
            kept, every = kept + here, every + found
            name = f"budget {share:g}"
            self.results.keep(
                name, self._kept(name, budget, kept, every, pairs, controller, last=seed + 1 == args.seeds)
            )
        controller.start = controller.energy_lambda

    def _pair(self, adapted: list[Window], seed: int, at: int, reach: Reach, budget: float) -> dict[str, Any]:
        """Adapted against frozen routers at the same mean λ, and at equal joules, on the same text."""
        mean = statistics.mean(w.energy_lambda for w in adapted)
        width = statistics.mean(self.widths[-len(adapted) :])
        update_j = sum(w.update_energy_j or 0.0 for w in adapted) / sum(w.tokens for w in adapted)
        share = update_j / (joules(adapted) - update_j)
        static, static_width = self._static(mean, seed, at, STATIC_WINDOWS)
        points = [(self.joules_at(static_width[0]), 0.0)]
        for side in (-BRACKET, BRACKET):
            energy_lambda = min(max(reach.saving(mean, side - share), 0.0), LAMBDAS[-1])
            (there,), widths = self._static(energy_lambda, seed, at, 1)
            points.append((self.joules_at(widths[0]), there.loss_nats - static[0].loss_nats))
        target_j = self.joules_at(width) + update_j
        gap_j, raw = joules(adapted) - joules(static), loss_of(adapted) - loss_of(static)
        return {
            "seed": seed, "static_lambda": mean, "adapted_j": joules(adapted), "static_j": joules(static),
            "adapted_loss": loss_of(adapted), "static_loss": loss_of(static), "raw": raw,
            "at_equal_joules": raw - self.slope(budget) * gap_j,
            "at_equal_joules_static": raw - parabola(points, target_j), "update_j": update_j,
            "curve": points, "target_j": target_j,  # joules per token by width, loss less that at the mean λ
            "adapted_width": width, "static_width": statistics.mean(static_width),
        }  # fmt: skip

    def _static(self, energy_lambda: float, seed: int, at: int, windows: int) -> tuple[list[Window], list[float]]:
        """Windows, and their widths, of frozen routers on the text of a seed from a place on."""
        stream = self.stream(None, seed=seed)
        self.model.set_energy_lambda(energy_lambda)
        stream.at = at % len(stream.blocks_NS)
        found = list(stream.run(windows, tell=False, learn=False))
        widths = self.widths[-windows:]
        self._freeze(found, widths)
        return found, widths

    def _kept(
        self, name: str, budget: float, kept: list[Window], every: list[Window], pairs: list[dict[str, Any]],
        controller: BudgetController, *, last: bool,
    ) -> dict[str, Any]:  # fmt: skip
        off, spread = joules(kept) / budget - 1, [w.j_per_token or math.nan for w in kept]
        keys = ("raw", "at_equal_joules", "at_equal_joules_static")
        raw, equal, curve = (interval([p[key] for p in pairs if math.isfinite(p[key])] or [math.nan]) for key in keys)
        updates, update_s = sum(w.updates for w in every), sum(w.update_s for w in every)
        span_s = sum(w.measurement.duration_s for w in every)
        events = sorted({event for w in every for event in w.events})
        if last:
            self.results.say(
                f"{name}: {1e3 * budget:.4f} mJ/token; mean of {len(kept)} windows {1e3 * joules(kept):.4f}"
                f" ({off:+.2%}), first {1e3 * joules(every[:1]):.4f}, λ {kept[0].energy_lambda:.3f} to"
                f" {kept[-1].energy_lambda:.3f},"
                f" infeasible {controller.infeasible}; loss minus static's, {len(pairs)} seeds: raw {raw[0]:+.5f} ±"
                f" {raw[1]:.5f}, at equal joules by slope {equal[0]:+.5f} ± {equal[1]:.5f}, by static λ's around it"
                f" {curve[0]:+.5f} ± {curve[1]:.5f}; settled after {settled_after(every, budget)} windows;"
                f" {updates} updates took {update_s:.2f} of {span_s:.1f} s, {events}"
            )
        return {
            "budget_j": budget, "mean_j": joules(kept), "off": off, "spread": spread, "pairs": pairs, "raw": raw,
            "at_equal_joules": equal, "at_equal_joules_static": curve,
            "settled_after": settled_after(every, budget), "slope_nats_per_j": self.slope(budget),
            "updates": updates, "update_s": update_s, "span_s": span_s, "events": events, "windows": rows(every),
        }  # fmt: skip

    def load_changes(self, reach: Reach) -> None:
        """Another tenant from half-way on."""
        repeats = self.forward.repeats_for(TENANT_SHARE * self.chunk_s)

        def change(stream: Stream) -> None:
            self.forward.repeats = repeats

        self._disturbed("load", reach, change)

    def text_changes(self, reach: Reach) -> None:
        """Another domain from half-way on: from the widest to the narrowest."""
        widths = {d: self._width_of(d, reach) for d in self.domain_N.unique().tolist() if self._blocks(d) is not None}
        wide, narrow = max(widths, key=lambda d: widths[d]), min(widths, key=lambda d: widths[d])
        self.results.say(f"width by domain {widths}")
        blocks_NS = self._blocks(narrow)

        def change(stream: Stream) -> None:
            stream.blocks_NS, stream.at = blocks_NS, 0

        self._disturbed("text", reach, change, self._blocks(wide))

    def _blocks(self, domain: int) -> torch.Tensor | None:
        found_NS = self.blocks_NS[self.domain_N == domain]
        return found_NS if len(found_NS) >= self.args.batch else None

    def _width_of(self, domain: int, reach: Reach) -> float:
        stream = self.stream(None, blocks_NS=self._blocks(domain))
        self.model.set_energy_lambda(reach.lambda_at(reach.at(0.75)))
        stream.window_s = 0.15
        next(stream.run(1, tell=False))
        return self.widths[-1]

    def _disturbed(
        self, name: str, reach: Reach, change: Callable[[Stream], None], blocks_NS: torch.Tensor | None = None
    ) -> None:
        """A budget at 75 % with a change half-way: by feedback, then by a replay of what was heard before it."""
        heard, found = list[float](), dict[str, Any]()
        for mode, before, after in (("feedback", self.args.half, self.args.half + 2), ("replay", *REPLAY)):
            stream = self.stream(BudgetController.for_reach(reach.at(0.75), reach), blocks_NS=blocks_NS)
            first = list(self._heard(stream, before, heard))
            change(stream)
            second = list(self._heard(stream, after, heard))
            self.forward.repeats = 0
            found[mode] = self._told(name, mode, reach.at(0.75), first, second, stream)
            heard = [w.report.heard_j_per_token or math.nan for w in first[2:] if w.report]
            self.results.keep(f"{name} changes", found)

    def _told(
        self, name: str, mode: str, budget: float, first: list[Window], second: list[Window], stream: Stream
    ) -> dict[str, Any]:
        before, jump = joules(first[2:]) / budget - 1, joules(second[:1]) / budget - 1
        settled, infeasible = joules(second[-5:]) / budget - 1, stream.ttt.controller.infeasible  # type: ignore[union-attr]
        taken = settled_after(second, budget)
        self.results.say(
            f"{name} changes, {mode}: off the budget before {before:+.2%}, right after {jump:+.2%}, at the end"
            f" {settled:+.2%}, settled after {taken} of {len(second)} windows;"
            f" λ {first[-1].energy_lambda:.3f} to {second[-1].energy_lambda:.3f}, infeasible {infeasible}"
        )
        return {
            "budget_j": budget, "before": before, "jump": jump, "settled": settled, "settled_after": taken,
            "infeasible": infeasible, "first": rows(first), "second": rows(second),
        }  # fmt: skip

    @staticmethod
    def _heard(stream: Stream, windows: int, replay: Sequence[float]) -> Iterator[Window]:
        if not replay:
            yield from stream.run(windows)
            return
        for window in range(windows):
            yield from stream.run(1, tell=False)
            reading = replay[window % len(replay)]
            stream.ttt.ttt_update(HardwareFeedback(energy_j=1e6 * reading, tokens=10**6, duration_s=1.0), update=False)

    def prices(self, windows: int) -> None:
        """Prices from windows whose shares and λ are drawn anew, and from those of the range before."""
        stream = self.stream(None, keep_first=False)
        generator = torch.Generator().manual_seed(0)
        for window in range(windows):
            self.model.set_energy_lambda(2.0 * float(torch.rand((), generator=generator)) ** 2)
            list(dithered(stream, 1, seed=window))
            self.results.keep("prices", self._prices(self.learner))
        table = f"{self.cost_model.profile.name}{', analytic' if self.cost_model.analytic else ''}"
        self.results.say(f"prices learnt from {self.learner.windows} windows; table: {table}")
        for price in self.learner.prices():
            print(
                f"    {price.name:14s} table {1e6 * price.table_j:10.3f} µJ, learnt {1e6 * price.learnt_j:10.3f}"
                f" [{1e6 * price.low_j:.3f}, {1e6 * price.high_j:.3f}], trusted {price.trusted}"
            )

    def _prices(self, learner: PriceLearner) -> dict[str, Any]:
        return {
            "profile": self.cost_model.profile.name, "analytic": self.cost_model.analytic, "windows": learner.windows,
            "prices": [dataclasses.asdict(price) for price in learner.prices()],
        }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--tokenizer")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--seconds", type=float, default=300.0, help="what does not fit is left out, the last first")
    parser.add_argument("--train", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=48, help="chunks that keep the GPU, not the host, busy")
    parser.add_argument("--window", type=float, default=1.05)
    parser.add_argument("--settle", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=4, help="of each seed")
    parser.add_argument("--half", type=int, default=12, help="windows before a change")
    parser.add_argument(
        "--update-share", type=float, default=0.006, help="of the work: an update in each seed's windows"
    )
    parser.add_argument("--dither", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the trial")
    return parser.parse_args()


def main() -> None:
    args = parse()
    values: dict[str, Any] = {
        "data": args.data, "tokenizer": args.tokenizer, "router": "energy", "top_k": 2, "seq_len": 1024,
        "expert_width_factors": [1, 1, 0.5, 0.5, 0.25, 0.25, 0, 0], "regularizer": "load_balance",
        "regularizer_weight": 0.01, "learning_rate": 1e-3, "batch_size": 16, "dropout": 0.0,
    }  # fmt: skip
    values |= {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in args.set)}
    config, results = TrialConfig.parse(values), Results(args.out)
    with EnergyMonitor.for_assigned_devices() as monitor:
        device = monitor.devices[0] if monitor.devices else None
        name, limit_w = (device.name, device.power_limit_w) if device else (None, None)
        hardware = Hardware.of(config, gpu_name=name, power_limit_w=limit_w)
        results.keep("device", {"name": name, "power_limit_w": limit_w, "source": monitor.source, "set": values})
        results.say(f"{name}, source {monitor.source}")
        corpus = load_corpus(config)
        results.say("text tokenised")
        learnt, held = texts(corpus, config.base)
        model = trained(config, corpus, learnt, hardware, args.train, results)
        bench = Bench(model, held, monitor, args, results, CostModel.for_device(name, limit_w), hardware)
        run(bench, args, results)


def run(bench: Bench, args: argparse.Namespace, results: Results) -> None:
    """The steps in order of weight, each as far as its time is there and nothing breaks."""

    def attempt(label: str, windows: int, work: Callable[[], Any]) -> Any:
        if elapsed_s() + windows * args.window > args.seconds:
            results.say(f"{label}: left out, no time")
            return None
        try:
            return work()
        except Exception:
            traceback.print_exc()
            results.keep(f"{label} failed", traceback.format_exc())
            return None

    reach = attempt("range", 25, bench.reach)
    if reach is None:
        return
    budget = args.settle + args.seeds * (args.windows + 1 + STATIC_WINDOWS + 2)
    for share in (0.25, 0.75):
        attempt(f"budget {share}", budget, lambda s=share: bench.budget(reach, s))
    change = 2 * args.half + 2 + sum(REPLAY)
    attempt("load", change, lambda: bench.load_changes(reach))
    attempt("text", change + 1, lambda: bench.text_changes(reach))
    attempt("prices", args.dither + 6, lambda: bench.prices(args.dither))
    results.keep("done", True)
    results.say("done")


if __name__ == "__main__":
    main()
