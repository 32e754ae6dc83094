"""A joule budget at test time on a real GPU: reachable range, budgets inside it, a load that changes, learnt prices.

Trains a small model for a while (there is nothing to download), then:

1. measures joules per token over λ: the reachable range [E_min, E at λ = 0];
2. keeps budgets at 25 % and 75 % of it, the mean of 20 windows after settling, and compares the loss with that of the
   best static λ at the same joules on the same text;
3. changes the load half-way (a smaller batch): the controller returns to the budget, the replay of telemetry recorded
   without that change does not;
4. learns prices from windows with dithered shares and holds them against the table.

    python benchmarks/adapt.py --data corpus.parquet --tokenizer FOLDER --seconds 230
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from hwcost import CostModel, EnergyMonitor
from hwcost.ops import ModelShape
from moe import BudgetController, EnergyAwareTTTRouter, HardwareFeedback, Reach, TTTSettings
from pipelines.adapting import Stream, Window, dithered, measure_reach, price_learner
from pipelines.config import TrialConfig
from pipelines.data import Corpus, load_corpus
from pipelines.model import Hardware, build_model, set_prices
from pipelines.training import Trainer, batches

START_S = time.monotonic()
LAMBDAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.5, 4.0, 8.0)


def elapsed_s() -> float:
    return time.monotonic() - START_S


def say(text: str) -> None:
    print(f"[{elapsed_s():6.1f} s] {text}", flush=True)


def train(config: TrialConfig, corpus: Corpus, hardware: Hardware, seconds: float) -> Any:
    """A model trained for so many seconds, compiling not counted, with prefill prices, in the weights' own type."""
    model, prices = build_model(config, corpus, hardware)
    trainer = Trainer(model, config, hardware, corpus.splits["train"])
    trainer.warm_up()
    say("compiled")
    model.train()
    start_s, loss, epoch = time.monotonic(), math.nan, 0
    while (spent_s := time.monotonic() - start_s) < seconds:
        epoch += 1
        for block_BS in batches(corpus.splits["train"], config, epoch, hardware.device):
            spent_s = time.monotonic() - start_s
            decay = min(1.0, max(0.05, 4 * (1 - spent_s / seconds)))
            losses = trainer._step(block_BS, config.learning_rate * decay * min(1.0, (trainer.step + 1) / 30))
            if trainer.step % 20 == 0:
                loss = float(losses[0])
            if spent_s >= seconds:
                break
    say(f"trained {trainer.step} steps, {trainer.tokens / 1e6:.1f} M tokens, loss {loss:.3f}")
    assert prices is not None
    set_prices(model, prices["prefill"])
    if hardware.device.type == "cuda":
        model = model.to(torch.bfloat16)
    return model.eval()


def spread(values: list[float]) -> str:
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.5f} ± {half:.5f}"


def joules(windows: list[Window]) -> float:
    """Joules per token over windows, None-free."""
    known = [w for w in windows if w.measurement.energy_j is not None]
    return sum(w.measurement.energy_j or 0.0 for w in known) / sum(w.tokens for w in known)


class Bench:
    """The model, its text, and how long there is."""

    def __init__(self, model: Any, corpus: Corpus, monitor: EnergyMonitor, args: argparse.Namespace) -> None:
        self.model, self.monitor, self.args = model, monitor, args
        device = next(model.parameters()).device
        blocks = corpus.splits["validation"].blocks_NS
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(args.seed))
        self.canary_BS = blocks[order[:8]].to(device).long()
        self.blocks_NS = blocks[order[8:]]
        self.device = device

    def stream(self, controller: BudgetController | None, *, settings: TTTSettings | None = None) -> Stream:
        ttt = EnergyAwareTTTRouter(
            self.model,
            canary_BS=self.canary_BS,
            controller=controller,
            settings=settings or TTTSettings(min_window_s=0.5),
        )
        ttt.apply(torch.zeros_like(ttt.offsets()))
        sync = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        return Stream(
            ttt, self.blocks_NS, self.monitor, batch_size=self.args.batch, window_s=self.args.window, synchronize=sync
        )

    def reach(self) -> Reach:
        self.model.set_energy_lambda(0.0)
        stream = self.stream(None)
        list(stream.run(3, tell=False))
        reach, windows = measure_reach(stream, LAMBDAS, windows=2)
        for i, (energy_lambda, energy) in enumerate(zip(reach.lambdas, reach.energy_j, strict=True)):
            here = windows[2 * i : 2 * i + 2]
            loss = statistics.mean(w.loss_nats for w in here)
            raw = ", ".join(f"{1e3 * (w.j_per_token or math.nan):.4f}" for w in here)
            say(f"λ {energy_lambda:5.2f}: {1e3 * energy:.4f} mJ/token (windows {raw}), loss {loss:.4f}")
        low, high = 1e3 * reach.least_j, 1e3 * reach.most_j
        say(f"range {low:.4f} to {high:.4f} mJ/token: {1 - low / high:.1%}")
        return reach

    def budget(self, reach: Reach, share: float, settle: int = 6, windows: int = 20) -> list[Window]:
        budget = reach.at(share)
        controller = BudgetController.for_reach(budget, reach)
        controller.start = controller.energy_lambda = 0.0  # from the side of λ = 0: it has to find its way
        stream = self.stream(controller)
        found = list(stream.run(settle + windows))
        kept = found[settle:]
        events = sorted({event for w in found for event in w.events})
        updates, update_s = sum(w.updates for w in found), sum(w.update_s for w in found)
        say(
            f"budget at {share:.0%}: {1e3 * budget:.4f} mJ/token; mean of {windows} windows {1e3 * joules(kept):.4f}"
            f" ({joules(kept) / budget - 1:+.2%}), first {1e3 * joules(found[:1]):.4f},"
            f" λ {kept[0].energy_lambda:.3f} to {kept[-1].energy_lambda:.3f},"
            f" loss {spread([w.loss_nats for w in kept])}, {updates} updates taking {update_s:.2f} s of"
            f" {sum(w.measurement.duration_s for w in found):.1f} s, {events}"
        )
        return kept

    def static(self, reach: Reach, adapted: list[Window]) -> None:
        """The static λ of the same joules, on the same text, routers as trained."""
        mean = statistics.mean(w.energy_lambda for w in adapted)
        self.model.set_energy_lambda(mean)
        stream = self.stream(None, settings=TTTSettings(update_share=1e-9))
        stream.ttt.model.set_energy_lambda(mean)
        list(stream.run(1, tell=False))
        kept = list(stream.run(8, tell=False))
        more = statistics.mean(w.loss_nats for w in adapted) - statistics.mean(w.loss_nats for w in kept)
        say(
            f"static λ {mean:.3f}: {1e3 * joules(kept):.4f} mJ/token, loss {spread([w.loss_nats for w in kept])};"
            f" adapted minus static {more:+.5f}"
        )

    def disturbed(self, reach: Reach, *, replay: list[float] | None = None, half: int = 9) -> list[float]:
        """A smaller batch from half-way on. With `replay` the controller hears recorded joules instead."""
        budget = reach.at(0.75)
        stream = self.stream(BudgetController.for_reach(budget, reach))
        first = list(self._heard(stream, half, replay and replay[:half]))
        stream.batch_size = self.args.small
        second = list(self._heard(stream, half + 3, replay and replay[half:]))
        jump, settled = joules(second[:1]) / budget - 1, joules(second[-6:]) / budget - 1
        say(
            f"{'replay' if replay else 'feedback'}: off the budget: before {joules(first[3:]) / budget - 1:+.2%},"
            f" right after {jump:+.2%}, at the end {settled:+.2%}; λ {first[-1].energy_lambda:.3f} to"
            f" {second[-1].energy_lambda:.3f}, infeasible {stream.ttt.controller.infeasible}"  # type: ignore[union-attr]
        )
        return [w.j_per_token or math.nan for w in first + second]

    @staticmethod
    def _heard(stream: Stream, windows: int, replay: list[float] | None) -> Iterator[Window]:
        if not replay:
            yield from stream.run(windows)
            return
        for reading in replay[:windows]:
            yield from stream.run(1, tell=False)
            stream.ttt.ttt_update(HardwareFeedback(energy_j=1e6 * reading, tokens=10**6, duration_s=1.0), update=False)

    def prices(self, gpu_name: str | None, power_limit_w: float | None, windows: int) -> None:
        config = self.model.config
        shape = ModelShape(
            d_model=config.n_embd, num_layers=config.n_layer, num_heads=config.n_head, vocab_size=config.vocab_size,
            expert_widths=tuple(config.expert_widths), top_k=config.num_experts_per_tok,
        )  # fmt: skip
        cost_model = CostModel.for_device(gpu_name, power_limit_w)
        self.model.set_energy_lambda(0.5)
        stream = self.stream(None, settings=TTTSettings(keep_first=False))
        stream.window_s = 0.6
        stream.learner, stream.read_counts = price_learner(cost_model, shape, self.blocks_NS.shape[1])
        count = len(list(dithered(stream, windows)))
        table = f"{cost_model.profile.name}{', analytic' if cost_model.analytic else ''}"
        say(f"prices learnt from {count} dithered windows; table: {table}")
        for price in stream.learner.prices():
            print(
                f"    {price.name:14s} table {1e6 * price.table_j:10.3f} µJ, learnt {1e6 * price.learnt_j:10.3f}"
                f" [{1e6 * price.low_j:.3f}, {1e6 * price.high_j:.3f}], trusted {price.trusted}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--tokenizer")
    parser.add_argument("--seconds", type=float, default=230.0)
    parser.add_argument("--train", type=float, default=32.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--small", type=int, default=6)
    parser.add_argument("--window", type=float, default=1.05)
    parser.add_argument("--settle", type=int, default=6)
    parser.add_argument("--dither", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the trial")
    args = parser.parse_args()
    values: dict[str, Any] = {
        "data": args.data, "tokenizer": args.tokenizer, "router": "energy", "top_k": 2, "seq_len": 1024,
        "expert_width_factors": [1, 1, 0.5, 0.5, 0.25, 0.25, 0, 0], "regularizer": "load_balance",
        "regularizer_weight": 0.01, "learning_rate": 1e-3, "batch_size": args.batch, "dropout": 0.0,
    }  # fmt: skip
    import yaml

    values |= {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in args.set)}
    config = TrialConfig.parse(values)
    with EnergyMonitor.for_assigned_devices() as monitor:
        device = monitor.devices[0] if monitor.devices else None
        name, limit_w = (device.name, device.power_limit_w) if device else (None, None)
        hardware = Hardware.of(config, gpu_name=name, power_limit_w=limit_w)
        say(f"{name}, source {monitor.source}")
        corpus = load_corpus(config)
        say("text tokenised")
        model = train(config, corpus, hardware, args.train)
        bench = Bench(model, corpus, monitor, args)

        def attempt(label: str, need_s: float, work: Any) -> Any:
            if elapsed_s() + need_s > args.seconds:
                say(f"{label}: left out, no time")
                return None
            try:
                return work()
            except Exception:
                traceback.print_exc()
                return None

        reach = attempt("range", 10, bench.reach)
        if reach is None:
            return
        for share in (0.25, 0.75):
            kept = attempt(f"budget {share}", 20, lambda s=share: bench.budget(reach, s, args.settle))
            if kept:
                attempt("static", 8, lambda k=kept: bench.static(reach, k))
        record = attempt("recording", 20, lambda: recorded(bench, reach))
        attempt("feedback", 20, lambda: bench.disturbed(reach))
        if record:
            attempt("replay", 20, lambda: bench.disturbed(reach, replay=record))
        attempt("prices", 0.7 * args.dither, lambda: bench.prices(name, limit_w, args.dither))
        say("done")


def recorded(bench: Bench, reach: Reach, windows: int = 21) -> list[float]:
    """Telemetry of a run in which nothing changes."""
    stream = bench.stream(BudgetController.for_reach(reach.at(0.75), reach))
    return [w.j_per_token or math.nan for w in stream.run(windows)]


if __name__ == "__main__":
    main()
