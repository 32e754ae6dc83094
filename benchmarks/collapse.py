"""Routing collapse, and what cures it.

Trains one small dense GPT-2 (byte level, on the Python documentation that ships with Python), upcycles it to 8 experts
a layer, K = 1, mixed as Switch mixes (weight p), and trains on: once without any balancing, and once for every
regularizer (`entropy` has the gradient of `kl_uniform`), for the temperature and for bias balancing. Everything else
stays equal: start, batches, learning rates. Writes a figure and prints a Markdown table. Runs on a CPU in a few
minutes, and repeats on one machine:

    python benchmarks/collapse.py --out docs/img/collapse.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from moe import MoEGPT2Config, MoEGPT2LMHeadModel, RoutingStats, upcycle

EXPERTS, LENGTH, BATCH, WIDTH = 8, 64, 16, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One run: its name and what it changes."""

    name: str
    changes: dict[str, Any]

    @property
    def group(self) -> str:
        return "none" if not self.changes else next(iter(self.changes.get("regularizers") or self.changes))


def variants() -> list[Variant]:
    regularizers = {
        "load_balance": 0.1,
        "cv2": 0.1,
        "kl_uniform": 0.1,
        "kl_gibbs": 0.1,
        "z_loss": 0.01,
        "expected_energy": 0.1,
        "token_entropy": 0.1,
    }
    runs = [Variant(name="none", changes={})]
    runs += [Variant(name=f"{name} {w:g}", changes={"regularizers": {name: w}}) for name, w in regularizers.items()]
    runs.append(Variant(name="token_entropy −0.1", changes={"regularizers": {"token_entropy": -0.1}}))
    runs.append(Variant(name="temperature 4", changes={"router_temperature": 4.0}))
    runs += [Variant(name=f"bias balancing {u:g}", changes={"bias_balance_rate": u}) for u in (0.02, 0.2)]
    return runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one variant. `effective` has one (step, mean, least layer) per evaluation."""

    name: str
    loss: float
    effective_experts: float
    least_layer: float
    busiest_share: float
    effective: list[tuple[int, float, float]]
    seconds: float


def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes: every tenth topic is held out."""
    from pydoc_data.topics import topics

    texts = [topics[key].encode() for key in sorted(topics)]
    train = b"".join(text for i, text in enumerate(texts) if i % 10)
    held_out = b"".join(texts[::10])
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, held_out))  # type: ignore[return-value]


def batch_of(tokens: Tensor, generator: torch.Generator) -> Tensor:
    start_B = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
    return tokens[start_B[:, None] + torch.arange(LENGTH)]


@torch.no_grad()
def evaluate(model: MoEGPT2LMHeadModel, held_out: Tensor, batches: int) -> tuple[float, Any]:
    model.eval()
    stats, total = RoutingStats(model.config.expert_widths), 0.0
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        x_BS = batch_of(held_out, generator)
        output = model(input_ids=x_BS, labels=x_BS, output_routing=True)
        stats.update(output.routing)
        total += float(output.lm_loss)
    model.train()
    return total / batches, stats.summary()


SHAPE: dict[str, Any] = {
    "vocab_size": 256, "n_positions": LENGTH, "n_embd": WIDTH, "n_inner": 128, "n_layer": 3, "n_head": 4,
    "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def pretrained(train: Tensor, steps: int, seed: int) -> GPT2LMHeadModel:
    """The dense model from which every variant starts."""
    torch.manual_seed(seed)
    dense = GPT2LMHeadModel(GPT2Config(**SHAPE)).train()
    dense.loss_type = "ForCausalLM"
    optimizer = torch.optim.AdamW(dense.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        x_BS = batch_of(train, generator)
        dense(input_ids=x_BS, labels=x_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dense


def run(variant: Variant, dense: GPT2LMHeadModel, texts: tuple[Tensor, Tensor], steps: int, seed: int) -> Outcome:
    train, held_out = texts
    config = MoEGPT2Config(
        **SHAPE, expert_widths=[128] * EXPERTS, num_experts_per_tok=1, mixing="probability", **variant.changes
    )
    model = upcycle(dense, config, noise=0.02, seed=seed).train()
    model.set_prices(torch.linspace(0.5, 2.0, EXPERTS))  # as unequal as widths of ½ to 2 would make them
    gates = [router.gate.weight for router in model.routers]
    others = [p for name, p in model.named_parameters() if "router" not in name]
    optimizer = torch.optim.AdamW([{"params": gates, "lr": 1e-2}, {"params": others, "lr": 1e-3}], betas=(0.9, 0.95))
    generator, start, curve = torch.Generator().manual_seed(seed + 2), time.perf_counter(), []
    for step in range(steps + 1):
        if step % max(steps // 10, 1) == 0:
            _, summary = evaluate(model, held_out, 4)
            curve.append((step, summary.effective_experts, min(summary.layer_effective_experts)))
        x_BS = batch_of(train, generator)
        model(input_ids=x_BS, labels=x_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    loss, summary = evaluate(model, held_out, 30)
    return Outcome(
        name=variant.name,
        loss=loss,
        effective_experts=summary.effective_experts,
        least_layer=min(summary.layer_effective_experts),
        busiest_share=max(max(row) for row in summary.load_LE),
        effective=curve,
        seconds=time.perf_counter() - start,
    )


def table(outcomes: list[Outcome]) -> str:
    best = min(o.loss for o in outcomes)
    lines = ["| run | loss, nat/byte | over the best | effective experts | least layer | busiest expert | cured |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for o in outcomes:
        cured = o.least_layer >= 0.9 * EXPERTS and o.loss <= 1.02 * best
        lines.append(
            f"| {o.name} | {o.loss:.4f} | {100 * (o.loss / best - 1):+.2f} % | {o.effective_experts:.2f} | "
            f"{o.least_layer:.2f} | {o.busiest_share:.2f} | {'yes' if cured else ''} |"
        )
    return "\n".join(lines)


def draw(outcomes: list[Outcome], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2))
    colours = plt.get_cmap("tab20")
    for i, o in enumerate(outcomes):
        steps, mean, _ = zip(*o.effective, strict=True)
        style = {"color": "black", "linewidth": 2.5} if o.name == "none" else {"color": colours(i)}
        left.plot(steps, mean, label=o.name, **style)
        right.scatter(o.effective_experts, o.loss, color=style["color"], s=36, zorder=3)
        right.annotate(o.name, (o.effective_experts, o.loss), fontsize=7, xytext=(4, 3), textcoords="offset points")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.set(xlabel="step", ylabel="effective experts, mean of 3 layers", ylim=(0.5, EXPERTS + 0.3))
    left.axhline(0.9 * EXPERTS, color="grey", linestyle=":", linewidth=1)
    left.legend(fontsize=7, ncol=5, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    right.set(xlabel="effective experts at the end", ylabel="validation loss, nat/byte", xlim=(0.5, EXPERTS + 1.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/img/collapse.png"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dense-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of runs, by their first word")
    parser.add_argument("--json", type=pathlib.Path, help="write the outcomes here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    texts = corpus()
    dense = pretrained(texts[0], arguments.dense_steps, arguments.seed)
    outcomes = []
    for variant in variants():
        if arguments.only and variant.name.split()[0] not in arguments.only:
            continue
        outcomes.append(run(variant, dense, texts, arguments.steps, arguments.seed))
        o = outcomes[-1]
        print(f"{o.name}: loss {o.loss:.4f}, effective {o.effective_experts:.2f}, {o.seconds:.0f} s", flush=True)
        assert math.isfinite(o.loss)
    print("\n" + table(outcomes))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes]))
    draw(outcomes, arguments.out)


if __name__ == "__main__":
    main()
