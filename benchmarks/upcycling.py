"""How far from exact upcycling is where it is not exact: experts narrower than the dense FFN, null experts, SwiGLU.

Trains the small dense model of benchmarks/collapse.py, upcycles it without noise, and compares validation losses and
logits before any further step. Runs on a CPU in under a minute:

    python benchmarks/upcycling.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from benchmarks.collapse import SHAPE, batch_of, corpus, pretrained
from moe import MoEGPT2Config, upcycle
from moe.upcycling import FFN, ffn_of, narrow_or_widen, upcycling_error

CASES: dict[str, dict[str, Any]] = {
    "copies, K = 2": {"expert_widths": [128] * 8},
    "split into 2 narrower experts, K = 2": {"expert_widths": [64] * 8},
    "widths 2, 1 (wider and equal)": {"expert_widths": [256, 256, 128, 128]},
    "widths 1, ½": {"expert_widths": [128, 128, 64, 64]},
    "widths ½": {"expert_widths": [64] * 4, "num_experts_per_tok": 1},
    "widths ¼": {"expert_widths": [32] * 4, "num_experts_per_tok": 1},
    "copies and one null expert of 4, K = 2": {"expert_widths": [128, 128, 128, 0]},
    "SwiGLU copies, K = 2": {"expert_widths": [128] * 8, "expert_activation": "swiglu"},
}


@torch.no_grad()
def loss_of(model: Any, held_out: Tensor) -> float:
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(40):
        x_BS = batch_of(held_out, generator)
        total += float(model.eval()(input_ids=x_BS, labels=x_BS).loss)
    return total / 40


def relative_error(whole: FFN, part: FFN, dense: GPT2LMHeadModel, layer: int) -> float:
    """Root mean square error of the FFN's output over that output's spread, on normalised normal inputs."""
    block, generator = dense.transformer.h[layer], torch.Generator().manual_seed(0)
    x_TD = torch.nn.functional.layer_norm(torch.randn(8192, whole.up_DH.shape[0], generator=generator), (64,))
    x_TD = x_TD * block.ln_2.weight + block.ln_2.bias
    outputs = [block.mlp.act(x_TD @ f.up_DH + f.up_bias_H) @ f.down_HD + f.down_bias_D for f in (whole, part)]
    return float((outputs[1] - outputs[0]).norm() / (outputs[0] - outputs[0].mean(0)).norm())


@torch.no_grad()
def main() -> None:
    train, held_out = corpus()
    with torch.enable_grad():
        dense = pretrained(train, 400, 0)
    x_BS, base = batch_of(held_out, torch.Generator().manual_seed(2)), loss_of(dense, held_out)
    print(f"dense: {base:.4f} nat/byte\n")
    print("| experts | loss, nat/byte | over the dense | largest logit error over largest logit |")
    print("| --- | --- | --- | --- |")
    for name, keys in CASES.items():
        model = upcycle(dense, MoEGPT2Config(**(SHAPE | {"num_experts_per_tok": 2} | keys)))
        loss = loss_of(model, held_out)
        print(f"| {name} | {loss:.4f} | {loss - base:+.4f} | {upcycling_error(dense, model, x_BS):.1e} |")
    print("\n| neurons kept of 128 | by importance, mean in the bias | first neurons, nothing in the bias |")
    print("| --- | --- | --- |")
    for width in (96, 64, 32, 16):
        by_rule, truncated = [], []
        for layer in range(3):
            whole = ffn_of(dense.transformer.h[layer])
            by_rule.append(relative_error(whole, narrow_or_widen(whole, width), dense, layer))
            truncated.append(relative_error(whole, whole.neurons(torch.arange(width)), dense, layer))
        print(f"| {width} | {sum(by_rule) / 3:.2f} | {sum(truncated) / 3:.2f} |")


if __name__ == "__main__":
    main()
