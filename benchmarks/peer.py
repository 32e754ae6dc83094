"""The peer: what a user builds in an afternoon from transformers' parts, GPT-2 with `grouped_mm` experts.

The literal decorator below must stand in the module that defines the model, or transformers falls back to `eager`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, GPT2Config, GPT2Model
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel


class PeerConfig(GPT2Config):
    model_type = "peer_moe_gpt2"
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    loss_type: str | None = "ForCausalLM"


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True)
class PeerExperts(nn.Module):
    """Experts in GPT-2's Conv1D layout; the forward is transformers' eager loop, replaced by the decorator."""

    def __init__(self, config):
        super().__init__()
        E, D, width = config.num_local_experts, config.n_embd, config.n_inner or 4 * config.n_embd
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, D, width).normal_(std=0.02))
        self.up_proj_bias = nn.Parameter(torch.zeros(E, width))
        self.down_proj = nn.Parameter(torch.empty(E, width, D).normal_(std=0.02))
        self.down_proj_bias = nn.Parameter(torch.zeros(E, D))
        self.act_fn = ACT2FN[config.activation_function]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        with torch.no_grad():
            mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for index in hit:
            e = index[0]
            position, token = torch.where(mask[e])
            state = hidden_states[token] @ self.up_proj[e] + self.up_proj_bias[e]
            state = self.act_fn(state) @ self.down_proj[e] + self.down_proj_bias[e]
            final.index_add_(0, token, (state * top_k_weights[token, position, None]).to(final.dtype))
        return final


class PeerMoE(nn.Module):
    """Mixtral's router and block around them."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.n_embd).normal_(std=0.02))
        self.experts = PeerExperts(config)

    def forward(self, x_BSD):
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        probs = F.softmax(F.linear(x_TD, self.weight).float(), dim=-1)
        weight, index = torch.topk(probs, self.top_k, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        return self.experts(x_TD, index, weight.to(x_TD.dtype)).view_as(x_BSD)


class PeerModel(GPT2Model):
    config_class = PeerConfig
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config):
        super().__init__(config)
        for block in self.h:
            block.mlp = PeerMoE(config)


class PeerLMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    config_class = PeerConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config):
        super().__init__(config)
        self.transformer = PeerModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, past_key_values=None, logits_to_keep=0, **kwargs):
        output = self.transformer(input_ids, past_key_values=past_key_values, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)


def backend(model: nn.Module) -> str:
    """Which implementation the experts of a model run, as its configuration says after construction."""
    experts = next(m for m in model.modules() if isinstance(m, PeerExperts))
    return experts.config._experts_implementation
