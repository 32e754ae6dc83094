"""The blocks of the decoder: GPT-2's, with experts for its FFN or without.

Shapes: B sequences of S positions, T = B·S tokens, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from moe.config import GELUS, MoEGPT2Config
from moe.experts import Experts
from moe.native_ops import Attention, Dropout
from moe.plain import PlainExperts
from moe.registry import ROUTERS
from moe.routers import Router
from moe.routing import Routing, Tokens


def dense_ffn(width: int, config: MoEGPT2Config) -> GPT2MLP:
    """GPT-2's FFN. The tanh form of GELU is one kernel: spelt out, under autocast in float32, it takes longer than the
    products around it wherever nothing is compiled, and a dense model would lose to experts for that alone."""
    ffn = GPT2MLP(width, config)
    if config.activation_function in GELUS:
        ffn.act = ACT2FN["gelu_pytorch_tanh"]
    ffn.dropout = Dropout(config.resid_pdrop)
    return ffn


class MoEMLP(nn.Module):
    """Router, experts, the optional shared expert, and GPT-2's dropout, once, after they are combined."""

    def __init__(self, config: MoEGPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.router: Router = ROUTERS[config.router](config, layer_idx)
        self.experts = PlainExperts(config) if config.plain_experts else Experts(config)
        self.shared = dense_ffn(config.shared_expert_width, config) if config.shared_expert_width else None
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x_BSD: Tensor, tokens: Tokens) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.router(x_TD, tokens)
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:  # its own dropout would be a second one
            y_TD = y_TD + self.shared.c_proj(self.shared.act(self.shared.c_fc(x_TD)))
        return self.dropout(y_TD).view_as(x_BSD), routing


class MoEGPT2Block(GPT2Block):
    """GPT-2's block with experts for its FFN. Returns hidden states and the routing's tensors, flat: reentrant
    gradient checkpointing keeps gradients of a tuple's tensors and of nothing else."""

    def __init__(self, config: MoEGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.attn = Attention(config, layer_idx)
        self.mlp = MoEMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        tokens: Tokens | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        assert tokens is not None
        attended, _ = self.attn(
            self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        hidden_states = attended + hidden_states
        mixed, routing = self.mlp(self.ln_2(hidden_states), tokens)
        return (hidden_states + mixed, *routing.tensors())


class DenseGPT2Block(GPT2Block):
    """GPT-2's block with the attention and dropout that blocks with experts have, and GELU as one operator."""

    def __init__(self, config: MoEGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.attn = Attention(config, layer_idx)
        self.mlp = dense_ffn(config.dense_width, config)
