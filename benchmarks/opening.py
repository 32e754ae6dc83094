"""Loss against open experts: `topk` with lower K, `piggyback` and `opening`, by batch, on one trained model.

Trains a small model twice, with `topk` and with `opening` at a price, then reads each with every router, without more
training: validation loss, distinct experts open per position and layer (null experts are not counted),
and on a GPU the joules and time of decoding.

    python benchmarks/opening.py [--data corpus.parquet --tokenizer FOLDER] [--seconds 60] [--set KEY=VALUE]
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch
import yaml

from hwcost import EnergyMonitor
from moe import ROUTERS
from pipelines.config import TrialConfig
from pipelines.data import Corpus, load_corpus
from pipelines.evaluation import measure_decode
from pipelines.model import Hardware, build_model, set_prices
from pipelines.training import Trainer, batches

READINGS: tuple[tuple[str, int, tuple[float, ...]], ...] = (
    ("topk", 2, (0.0,)),
    ("topk", 1, (0.0,)),
    ("piggyback", 2, (0.0,)),
    ("opening", 2, (0.001, 0.003, 0.01, 0.03, 0.1)),
)


def trained(config: TrialConfig, corpus: Corpus, hardware: Hardware, seconds: float) -> Any:
    """A model after so many seconds of training; prices of decoding."""
    model, prices = build_model(config, corpus, hardware)
    trainer = Trainer(model, config, hardware, corpus.splits["train"])
    trainer.warm_up()
    model.train()
    start_s = time.monotonic()
    for epoch in itertools.count(1):
        for block_BS in batches(corpus.splits["train"], config, epoch, hardware.device):
            trainer._step(block_BS, config.learning_rate * min(1.0, (trainer.step + 1) / 30))
            if time.monotonic() - start_s > seconds:
                assert prices is not None
                set_prices(model, prices["decode"])
                print(f"trained with {config.router}, λ {config.energy_lambda:g}: {trainer.step} steps", flush=True)
                return model.eval()
    raise AssertionError


def with_router(model: Any, name: str, top_k: int, energy_lambda: float) -> None:
    """Replace the routers, gates and prices kept."""
    model.config.router, model.config.num_experts_per_tok = name, top_k
    for layer, block in enumerate(model.transformer.moe_blocks):
        old = block.mlp.router
        new = ROUTERS[name](model.config, layer).to(old.gate.weight.device, old.gate.weight.dtype)
        new.load_state_dict(old.state_dict())
        block.mlp.router = new.train(model.training)
    model.set_energy_lambda(energy_lambda)


@torch.no_grad()
def judge(model: Any, blocks_NS: torch.Tensor, batch: int, hardware: Hardware) -> tuple[float, float]:
    """(loss, distinct computing experts per position and layer) on as many whole batches as there are."""
    width_E = torch.tensor(model.config.expert_widths)
    losses, opened = [], []
    for start in range(0, len(blocks_NS) - batch + 1, batch):
        block_BS = blocks_NS[start : start + batch].to(hardware.device).long()
        with hardware.autocast():
            output = model(block_BS, labels=block_BS, use_cache=False, output_routing=True)
        losses.append(float(output.lm_loss))
        for routing in output.routing:
            taken_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.expert_TK, 1.0)
            any_SE = taken_TE.view(batch, -1, len(width_E)).amax(0).cpu()
            opened.append(float((any_SE[:, width_E > 0]).sum(1).mean()))
    return sum(losses) / len(losses), sum(opened) / len(opened)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--tokenizer")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each of two models")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the trial")
    args = parser.parse_args()
    values: dict[str, Any] = {
        "data": args.data, "tokenizer": args.tokenizer, "top_k": 2, "num_experts": 8, "seq_len": 128, "batch_size": 32,
        "n_layer": 2, "n_embd": 128, "n_head": 4, "regularizer": "load_balance", "regularizer_weight": 0.01,
        "learning_rate": 2e-3, "dropout": 0.0,
    }  # fmt: skip
    values |= {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in args.set)}
    with EnergyMonitor.for_assigned_devices() as monitor:
        for router, energy_lambda in (("topk", 0.0), ("opening", 0.01)):
            config = TrialConfig.parse(values | {"router": router, "energy_lambda": energy_lambda})
            hardware, corpus = Hardware.of(config), load_corpus(config)
            model = trained(config, corpus, hardware, args.seconds)
            table(model, corpus, args.batches, config, hardware, monitor)


def table(
    model: Any, corpus: Corpus, sizes: list[int], config: TrialConfig, hardware: Hardware, monitor: EnergyMonitor
) -> None:
    """One row per batch, router, K and λ."""
    split = corpus.splits["validation"]
    print(f"{'batch':>5}  {'router':10s} {'K':>2} {'λ':>6}  {'loss':>7}  {'open':>5}  decode mJ/token")
    for batch in sizes:
        for name, top_k, lambdas in READINGS:
            for energy_lambda in lambdas:
                with_router(model, name, top_k, energy_lambda)
                loss, opened = judge(model, split.blocks_NS[:256], batch, hardware)
                joules = "–"
                if hardware.device.type == "cuda":
                    found = measure_decode(model, split, batch, config, hardware, monitor).j_per_token
                    joules = "–" if found is None else f"{1e3 * found:.3f}"
                print(f"{batch:5d}  {name:10s} {top_k:2d} {energy_lambda:6.3f}  {loss:7.4f}  {opened:5.2f}  {joules}")
    with_router(model, config.router, config.top_k, config.energy_lambda)


if __name__ == "__main__":
    main()
