"""GPT-2 whose feed-forward networks are experts. Attention, embeddings and generation are transformers' own.

Shapes: B sequences of S positions, T = B·S tokens, D model width, E experts, K choices, L MoE layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from moe.blocks import DenseGPT2Block, MoEGPT2Block
from moe.config import MoEGPT2Config
from moe.experts import Experts
from moe.generation import GraphedGeneration
from moe.native_ops import Dropout, head_loss
from moe.regularizers import REGULARIZERS, Regularizer, kl_gibbs
from moe.routers import Router, initial_buffers
from moe.routing import Routing, Tokens, count_E


@dataclasses.dataclass
class MoEGPT2ModelOutput(MoeModelOutputWithPast):
    """Hidden states, and one `Routing` per MoE layer."""

    routing: tuple[Routing, ...] | None = None


@dataclasses.dataclass
class MoEGPT2Output(MoeCausalLMOutputWithPast):
    """What the language model returns.

    `loss` is `lm_loss + aux_loss` in training and `lm_loss` in evaluation, so that evaluation losses compare across
    regularizers. `routing` and `router_logits` are filled on `output_routing=True`, one entry per MoE layer.
    `dropped_L` is the share of choices that each layer dropped in this call; None where the router drops none.
    """

    lm_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    dropped_L: Tensor | None = None


class MoEGPT2PreTrainedModel(GPT2PreTrainedModel):
    """Loading, saving and initialisation."""

    config: MoEGPT2Config
    config_class = MoEGPT2Config
    _no_split_modules = ["DenseGPT2Block", "MoEGPT2Block"]  # noqa: RUF012
    _supports_static_cache = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Router):
            for name, value in initial_buffers(self.config).items():
                init.copy_(module.get_buffer(name), value)
        elif isinstance(module, Experts):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    init.zeros_(parameter)
                else:  # GPT-2 scales what writes to the residual by 1/√(number of writers)
                    scale = 1 / math.sqrt(2 * self.config.n_layer) if name.startswith("down") else 1.0
                    init.normal_(parameter, mean=0.0, std=std * scale)


class MoEGPT2Model(MoEGPT2PreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__(config)
        config.check()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        blocks = (MoEGPT2Block if i in config.moe_layer_indices else DenseGPT2Block for i in range(config.n_layer))
        self.h = nn.ModuleList(block(config, layer_idx=i) for i, block in enumerate(blocks))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.wte = new_embeddings

    @property
    def moe_blocks(self) -> list[MoEGPT2Block]:
        return [block for block in self.h if isinstance(block, MoEGPT2Block)]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MoEGPT2ModelOutput:
        """As `GPT2Model.forward`. `token_mask` [B, S], 0 on padding, is needed only where `attention_mask` is 4-D."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected input_ids or inputs_embeds, got both or neither")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        whole = position_ids is None and attention_mask is None and past_key_values is None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        if whole and self.config._attn_implementation == "sdpa":
            # transformers writes a mask out whenever it is being compiled (before torch 2.14), and with a mask the
            # attention kernels compute both triangles; without one they take `is_causal`.
            causal_mask = None
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        tokens = describe_tokens(inputs_embeds, input_ids, position_ids, attention_mask, token_mask)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        routings = []
        for block in self.h:
            if isinstance(block, MoEGPT2Block):
                hidden_states, *parts = block(hidden_states, past_key_values, causal_mask, tokens, **kwargs)
                routings.append(Routing.from_tensors(tuple(parts)))
            else:
                hidden_states = block(hidden_states, past_key_values, causal_mask, **kwargs)
        return MoEGPT2ModelOutput(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            routing=tuple(routings),
        )


def describe_tokens(
    embeds_BSD: Tensor,
    id_BS: Tensor | None,
    position_BS: Tensor,
    attention_mask: Tensor | None,
    token_mask: Tensor | None,
) -> Tokens:
    """The router's view of a call. Blocks hand no mask to their FFN, so padding would be routed and counted."""
    batch, length = embeds_BSD.shape[:2]
    if token_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        token_mask = attention_mask[:, -length:]
    return Tokens(
        batch_size=batch,
        position_T=position_BS.expand(batch, length).reshape(-1),
        id_T=None if id_BS is None else id_BS.reshape(-1),
        valid_T=None if token_mask is None else token_mask.reshape(-1).bool(),
    )


def _dropped_L(routing: tuple[Routing, ...]) -> Tensor | None:
    parts = [layer.dropped_fraction() for layer in routing]
    known = [part for part in parts if part is not None]
    return torch.stack(known) if known else None


class MoEGPT2LMHeadModel(MoEGPT2PreTrainedModel, GraphedGeneration, GenerationMixin):
    """The language model: tied head, cross-entropy, and the weighted regularizers of its routers."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__(config)
        self.transformer = MoEGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoEGPT2Output:
        """Next-token logits, and the loss where labels are given.

        Args:
            input_ids: [B, S]; or `inputs_embeds` [B, S, D].
            attention_mask: [B, S (cache included)], 0 on padding, which is neither routed nor counted.
            labels: [B, S], −100 where nothing is to be predicted; shifted inside, so `labels = input_ids` does.
            output_routing: return `routing` and `router_logits`.
            num_items_in_batch: targets of the whole optimizer step, where this call is one micro-batch of it. Both
                losses are then this call's share, and micro-batches add up.
            skip_logits: compute the loss without logits in memory and return none. Default: in training with labels.
        """
        output = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        routing: tuple[Routing, ...] = output.routing
        self._count(routing)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        skip_logits = labels is not None and (self.training if skip_logits is None else skip_logits)
        logits = None if skip_logits else self.lm_head(output.last_hidden_state[:, kept])
        loss = lm_loss = aux_loss = None
        if labels is not None:
            if logits is None:
                lm_loss = head_loss(output.last_hidden_state, self.lm_head.weight, labels, num_items_in_batch)
            else:
                lm_loss = ForCausalLMLoss(logits, labels, self.config.vocab_size, num_items_in_batch)
            loss = lm_loss
            aux_loss = self.aux_loss(routing)
            if aux_loss is not None and num_items_in_batch is not None:
                aux_loss = aux_loss * ((labels[..., 1:] != -100).sum() / num_items_in_batch)
            if aux_loss is not None and self.training:
                loss = lm_loss + aux_loss
        return MoEGPT2Output(
            loss=loss,
            lm_loss=lm_loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            router_logits=tuple(r.logits_TE for r in routing) if output_routing else None,
            routing=routing if output_routing else None,
            dropped_L=_dropped_L(routing),
        )

    def aux_loss(self, routing: tuple[Routing, ...]) -> Tensor | None:
        """Σ weight · (mean over layers of the regularizer), nats; None without regularizers or MoE layers."""
        if not self.config.regularizers or not routing:
            return None
        special: dict[str, Regularizer] = {"kl_gibbs": functools.partial(kl_gibbs, beta=self.config.gibbs_beta)}
        call = REGULARIZERS | special
        terms = [w * call[name](layer) for name, w in self.config.regularizers.items() for layer in routing]
        return torch.stack(terms).sum() / len(routing)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Generation may turn the mask into a 4-D one; keep what it says of the prompt's padding. A token that is
        being generated is never padding, so decode steps carry no mask and fewer kernels."""
        mask = kwargs.get("attention_mask")
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("input_ids")
        length = ids.shape[1] if ids is not None else inputs["inputs_embeds"].shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2 and length > 1:
            inputs["token_mask"] = mask[:, -length:]
        return inputs

    # Knobs. All write tensors in place, so compiled code stays valid.

    @property
    def routers(self) -> list[Router]:
        """The routers, one per MoE layer, first layer first."""
        return [block.mlp.router for block in self.transformer.moe_blocks]

    def set_energy_lambda(self, value: float) -> None:
        """λ of all layers, nats per c_ref."""
        self._configure("energy_lambda", "energy_lambda", value)

    def set_temperature(self, value: float) -> None:
        """τ of all layers."""
        self._configure("router_temperature", "temperature", value)

    def _configure(self, key: str, buffer: str, value: float) -> None:
        before = getattr(self.config, key)
        setattr(self.config, key, float(value))
        try:
            self.config.check()
        except ValueError:
            setattr(self.config, key, before)
            raise
        for router in self.routers:
            router.get_buffer(buffer).fill_(value)

    @torch.no_grad()
    def set_prices(self, join: Tensor, open: Tensor | None = None) -> None:
        """Normalised prices, units of c_ref: [E], or [L, E] for each MoE layer its own. Saved with the model.

        Raises:
            ValueError: another shape, a price that is not finite, or one below 0.
        """
        for name, price in (("join_E", join), ("open_E", open)):
            if price is None:
                continue
            price_LE = torch.as_tensor(price, dtype=torch.float32)
            shape = (len(self.routers), self.config.num_experts)
            if price_LE.shape not in (shape, shape[1:]):
                raise ValueError(
                    f"{name}: expected shape {list(shape[1:])} or {list(shape)}, got {list(price_LE.shape)}"
                )
            if not bool(torch.isfinite(price_LE).all()) or bool((price_LE < 0).any()):
                raise ValueError(f"{name}: expected finite prices ≥ 0, got {price_LE.tolist()}")
            for router, price_E in zip(self.routers, price_LE.expand(shape), strict=True):
                router.get_buffer(name).copy_(price_E)

    # Balancing without a loss (Wang et al. 2024): counts gather in forward, the bias moves after the step.

    @torch.no_grad()
    def _count(self, routing: tuple[Routing, ...]) -> None:
        """Outside the blocks, so that gradient checkpointing, which runs them twice, counts once."""
        if self.training and self.config.bias_balance_rate > 0:
            for router, layer in zip(self.routers, routing, strict=True):
                router.count_E += count_E(*layer.demand(), layer.num_experts)

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called after each optimizer step: b_e += u·sign(n̄ − n_e), and the counts start anew.

        A no-op unless `bias_balance_rate` is set. Sums counts over processes where training is distributed.
        """
        if self.config.bias_balance_rate == 0:
            return
        for router in self.routers:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(router.count_E)
            router.bias_E += self.config.bias_balance_rate * (router.count_E.mean() - router.count_E).sign()
            router.count_E.zero_()

    def num_active_parameters(self, mean_selected_width: float | None = None) -> int:
        """Parameters that a token passes through, on average; embeddings count once, null experts nothing.

        Args:
            mean_selected_width: neurons per token and layer, as `RoutingStats` measured them; by default K experts
                of mean width.
        """
        total = sum(p.numel() for p in self.parameters())
        widths = self.config.expert_widths
        if mean_selected_width is None:
            mean_selected_width = self.config.num_experts_per_tok * sum(widths) / len(widths)
        idle = 1 - mean_selected_width / max(sum(widths), 1)
        for block in self.transformer.moe_blocks:
            total -= round(idle * sum(p.numel() for p in block.mlp.experts.parameters()))
        return total


AutoConfig.register(MoEGPT2Config.model_type, MoEGPT2Config)
AutoModel.register(MoEGPT2Config, MoEGPT2Model)
AutoModelForCausalLM.register(MoEGPT2Config, MoEGPT2LMHeadModel)
