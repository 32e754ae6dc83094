"""A training step of the quickstart's model on CPU: ours against transformers' eager experts, everything else equal.

    python benchmarks/moe_cpu_step.py [--repetitions 7] [--threads 2]

2 layers, width 64, 6 experts of 256 neurons, 512 vocabulary entries, 8 x 128 tokens, fp32, AdamW, no dropout. The MoE
layer alone (forward and backward) is measured beside the whole step, of which attention, head and optimizer are shared.
"""

from __future__ import annotations

import argparse

import torch
from measure import Case, interleave, print_table
from peer import PeerConfig, PeerLMHeadModel, backend

from moe import MoEGPT2Config
from moe.modeling import MoEGPT2LMHeadModel
from moe.routing import Tokens

BATCH, LENGTH, E, WIDTH, VOCABULARY = 8, 128, 6, 256, 512
SHAPE = {
    "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": LENGTH, "use_cache": False,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def build(name: str, k: int) -> torch.nn.Module:
    if name.startswith("ours"):
        return MoEGPT2LMHeadModel(MoEGPT2Config(**SHAPE, num_experts_per_tok=k, expert_widths=[WIDTH] * E))
    config = PeerConfig(**SHAPE, num_local_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    model = PeerLMHeadModel(config)
    assert backend(model) == "eager", backend(model)
    return model


def training_step(model: torch.nn.Module, ids_BS: torch.Tensor) -> Case:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def case() -> None:
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return case


def layer_step(model: torch.nn.Module) -> Case:
    """Forward and backward of one MoE layer: router, experts, combine."""
    block = model.transformer.h[0]
    x_BSD = torch.randn(BATCH, LENGTH, SHAPE["n_embd"], requires_grad=True)
    dy_BSD = torch.randn_like(x_BSD)
    tokens = (Tokens(batch_size=BATCH, position_T=torch.arange(LENGTH).repeat(BATCH)),)
    extra = tokens if isinstance(model, MoEGPT2LMHeadModel) else ()
    inputs = [x_BSD, *block.mlp.parameters()]

    def case() -> None:
        y = block.mlp(x_BSD, *extra)
        torch.autograd.grad(y[0] if isinstance(y, tuple) else y, inputs, dy_BSD, allow_unused=True)

    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids_BS = torch.randint(VOCABULARY, (BATCH, LENGTH))
    for k in (1, 2):
        models = {name: build(name, k) for name in ("eager", "ours")}
        steps = {name: training_step(model, ids_BS) for name, model in models.items()}
        layers = {name: layer_step(model) for name, model in models.items()}
        for what, cases in (("training step", steps), ("MoE layer", layers)):
            runs = interleave(cases, repetitions=args.repetitions, seconds=args.seconds)
            print_table(f"CPU, {args.threads} threads, {what}, K={k}", runs, "eager")


if __name__ == "__main__":
    main()
