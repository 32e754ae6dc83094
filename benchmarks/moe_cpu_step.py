"""A training step of the quickstart's model on CPU: ours against transformers' eager experts, everything else equal.

    python benchmarks/moe_cpu_step.py [--repetitions 7] [--threads 2]

2 layers, width 64, 6 experts of 256 neurons, 8 x 128 tokens, fp32, AdamW; one table per K. "layers only" leaves out the
embedding, head and optimizer, which both share.
"""

from __future__ import annotations

import argparse

import torch
from measure import Case, interleave, print_table
from peer import PeerConfig, PeerLMHeadModel, backend

from moe import MoEGPT2Config
from moe.modeling import MoEGPT2LMHeadModel

BATCH, LENGTH, E, WIDTH, VOCABULARY = 8, 128, 6, 256, 4096
SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": LENGTH, "use_cache": False}


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
        cases = {name: training_step(build(name, k), ids_BS) for name in ("transformers' eager experts", "ours")}
        runs = interleave(cases, repetitions=args.repetitions, seconds=args.seconds)
        print_table(f"CPU training step, {args.threads} threads, K={k}", runs, "transformers' eager experts")


if __name__ == "__main__":
    main()
