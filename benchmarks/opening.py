"""Joules and loss against open experts: `topk` with lower K, `piggyback` and `opening`, by batch, in decoding.

Trains a model twice, with `topk` and with `opening` at a price, then reads each with every router, without more
training: validation loss, distinct experts open per position and layer (null experts are not counted), and on a GPU the
joules per token of decoding and the time of a step. `opening` at λ = 0 opens what `topk` opens, so that what it takes
more than that is the cost of choosing.

    python benchmarks/opening.py --data corpus.parquet --tokenizer FOLDER --seconds 200 --out opening.json \
        --set n_layer=6 --set n_embd=768 --set n_head=12 --set seq_len=256 --set batch_size=64

What was measured is written to --out after every row; what does not fit into --seconds is left out, the last first.
"""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml
from trained import Results, elapsed_s, texts, trained

from hwcost import EnergyMonitor
from moe import ROUTERS, generation
from pipelines.config import TrialConfig
from pipelines.data import TokenSplit, load_corpus
from pipelines.evaluation import PhaseEnergy, measure_decode
from pipelines.model import Hardware

READINGS: tuple[tuple[str, int, tuple[float, ...]], ...] = (
    ("topk", 2, (0.0,)),
    ("opening", 2, (0.0, 0.003, 0.01, 0.03, 0.1)),
    ("topk", 1, (0.0,)),
    ("piggyback", 2, (0.0,)),
)
STEPS = 48


def with_router(model: Any, name: str, top_k: int, energy_lambda: float) -> None:
    """Replace the routers, gates and prices kept."""
    model.config.router, model.config.num_experts_per_tok = name, top_k
    generation._decoders.pop(model, None)  # what was captured with the routers before
    for layer, block in enumerate(model.transformer.moe_blocks):
        old = block.mlp.router
        new = ROUTERS[name](model.config, layer).to(old.gate.weight.device, old.gate.weight.dtype)
        new.load_state_dict(old.state_dict())
        block.mlp.router = new.train(model.training)
    model.set_energy_lambda(energy_lambda)


@torch.no_grad()
def judge(model: Any, blocks_NS: torch.Tensor, batch: int, device: torch.device) -> tuple[float, float]:
    """(loss, distinct computing experts per position and layer) on as many whole batches as there are."""
    computing_E = torch.tensor(model.config.expert_widths, device=device) > 0
    losses, opened = [], []
    for start in range(0, len(blocks_NS) - batch + 1, batch):
        block_BS = blocks_NS[start : start + batch].to(device).long()
        output = model(block_BS, labels=block_BS, use_cache=False, output_routing=True, skip_logits=True)
        losses.append(output.lm_loss)
        for routing in output.routing:
            taken_TE = torch.zeros_like(routing.logits_TE).scatter(1, routing.expert_TK, 1.0)
            any_SE = taken_TE.view(batch, -1, len(computing_E)).amax(0)
            opened.append(any_SE[:, computing_E].sum(1).mean())
    return float(torch.stack(losses).mean()), float(torch.stack(opened).mean())


def step_ms(model: Any, batch: int, prompt: int) -> tuple[float | None, str]:
    """Milliseconds of one captured step, and whether there is one."""
    held = [d for (size, _), d in generation._decoders.get(model, {}).items() if size == batch]
    if not held or held[0].broken or False not in held[0].graphs:
        return None, "not captured" if not held else held[0].broken or "not captured"
    decoder = held[0]
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(6):
        decoder.length_T.fill_(prompt)
        decoder.position_T.fill_(prompt)
        for _ in range(STEPS):
            decoder.step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start_s) / (6 * STEPS), "captured"


class Bench:
    """Models, their text, and the rows so far."""

    def __init__(
        self,
        models: dict[str, Any],
        split: TokenSplit,
        config: TrialConfig,
        hardware: Hardware,
        monitor: EnergyMonitor,
        results: Results,
    ) -> None:
        self.models, self.split, self.config, self.hardware = models, split, config, hardware
        self.monitor, self.results, self.rows = monitor, results, list[dict[str, Any]]()

    def read(self, label: str, batch: int, name: str, top_k: int, energy_lambda: float) -> None:
        """One row."""
        model = self.models[label]
        with_router(model, name, top_k, energy_lambda)
        loss, opened = judge(model, self.split.blocks_NS[:256], batch, self.hardware.device)
        row: dict[str, Any] = {
            "trained": label, "batch": batch, "router": name, "top_k": top_k, "energy_lambda": energy_lambda,
            "loss_nats": loss, "open": opened,
        }  # fmt: skip
        if self.hardware.device.type == "cuda":
            phase = measure_decode(model, self.split, batch, self.config, self.hardware, self.monitor)
            row |= self._measured(model, batch, phase)
        self.rows.append(row)
        self.results.keep("rows", self.rows)
        told = {key: row.get(key) for key in ("mj_per_token", "step_ms", "step")}
        self.results.say(
            f"{label:8s} {batch:5d}  {name:10s} K {top_k} λ {energy_lambda:6.3f}  loss {loss:7.4f}  open {opened:5.2f}"
            f"  {told}"
        )

    def _measured(self, model: Any, batch: int, phase: PhaseEnergy) -> dict[str, Any]:
        milliseconds, how = step_ms(model, batch, self.config.decode_prompt_tokens)
        measured, energy = phase.measurement, phase.j_per_token
        return {
            "mj_per_token": None if energy is None else 1e3 * energy,
            "uncertainty_mj": measured.uncertainty_j and 1e3 * measured.uncertainty_j / phase.tokens,
            "generate_ms": 1e3 * measured.duration_s * batch / phase.tokens,
            "mean_power_w": measured.mean_power_w, "step_ms": milliseconds, "step": how,
        }  # fmt: skip

    def overhead(self) -> None:
        """What choosing sets takes: `opening` at λ = 0 against `topk`, which opens the same experts."""
        found = []
        for label in self.models:
            for batch in sorted({row["batch"] for row in self.rows}):
                pick = {r["router"]: r for r in self.rows if self._is(r, label, batch)}
                if set(pick) != {"topk", "opening"} or None in (r.get("step_ms") for r in pick.values()):
                    continue
                mine, plain = pick["opening"], pick["topk"]
                entry = {
                    "trained": label, "batch": batch, "share_of_step": mine["step_ms"] / plain["step_ms"] - 1,
                    "share_of_joules": mine["mj_per_token"] / plain["mj_per_token"] - 1,
                }  # fmt: skip
                found.append(entry)
                self.results.say(f"choosing sets: {entry}")
        self.results.keep("overhead", found)

    @staticmethod
    def _is(row: dict[str, Any], label: str, batch: int) -> bool:
        plain = row["energy_lambda"] == 0 and row["top_k"] == 2 and row["router"] in ("topk", "opening")
        return plain and row["trained"] == label and row["batch"] == batch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--tokenizer")
    parser.add_argument("--seconds", type=float, default=200.0, help="what does not fit is left out, the last first")
    parser.add_argument("--train", type=float, default=12.0, help="seconds, each of two models")
    parser.add_argument("--measure", type=float, default=1.2, help="seconds of each decoding window")
    parser.add_argument("--price", type=float, default=0.01, help="λ with which the second model is trained")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8, 128])
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the trial")
    return parser.parse_args()


def main() -> None:
    args = parse()
    values: dict[str, Any] = {
        "data": args.data, "tokenizer": args.tokenizer, "top_k": 2, "num_experts": 8, "seq_len": 128, "batch_size": 32,
        "n_layer": 2, "n_embd": 128, "n_head": 4, "regularizer": "load_balance", "regularizer_weight": 0.01,
        "learning_rate": 1e-3, "dropout": 0.0, "measure_seconds": args.measure,
    }  # fmt: skip
    values |= {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in args.set)}
    results, models = Results(args.out), dict[str, Any]()
    with EnergyMonitor.for_assigned_devices() as monitor:
        device = monitor.devices[0] if monitor.devices else None
        name, limit_w = (device.name, device.power_limit_w) if device else (None, None)
        results.keep("device", {"name": name, "power_limit_w": limit_w, "source": monitor.source, "set": values})
        for router, energy_lambda in (("topk", 0.0), ("opening", args.price)):
            config = TrialConfig.parse(values | {"router": router, "energy_lambda": energy_lambda})
            hardware, corpus = Hardware.of(config, gpu_name=name, power_limit_w=limit_w), load_corpus(config)
            learnt, held = texts(corpus, config.base)
            models[router] = trained(config, corpus, learnt, hardware, args.train, results, phase="decode")
        bench = Bench(models, held, config, hardware, monitor, results)
        read_all(bench, args, results)


def read_all(bench: Bench, args: argparse.Namespace, results: Results) -> None:
    """Rows by weight, as far as there is time."""
    slowest = 0.0
    for batch in args.batches:
        for label in bench.models:
            for name, top_k, lambdas in READINGS:
                for energy_lambda in lambdas:
                    if elapsed_s() + slowest > args.seconds:
                        results.say("the rest is left out, no time")
                        bench.overhead()
                        return
                    start_s = elapsed_s()
                    try:
                        bench.read(label, batch, name, top_k, energy_lambda)
                    except Exception:
                        traceback.print_exc()
                        results.keep(f"failed {label} {batch} {name} {energy_lambda}", traceback.format_exc())
                    slowest = max(0.9 * slowest, elapsed_s() - start_s)
    bench.overhead()
    results.keep("done", True)
    results.say("done")


if __name__ == "__main__":
    main()
