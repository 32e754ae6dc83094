"""Routing accuracy: a router's decisions compared with others' on the same inputs of the same layer.

- `agreement_between`: with another model's routers, fed the hidden states that the first model's routers see;
- `oracle_choices`: with an oracle, the expert that lowers a token's loss most when the layer is made to use it.
- With the same checkpoint at λ = 0: `RoutingStats` has it (`unpriced_agreement`), from one forward.

Shapes: B sequences, S positions, T = B·S, E experts, K choices, L MoE layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.metrics import agreement
from moe.modeling import MoEGPT2LMHeadModel
from moe.routers import Router
from moe.routing import Routing, Tokens


class Forced(nn.Module):
    """A router that asks another, then sends the marked tokens to one expert with weight 1."""

    def __init__(self, router: Router, forced_T: Tensor) -> None:
        super().__init__()
        self.router, self.forced_T, self.expert = router, forced_T, 0

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        routing = self.router(x_TD, tokens)
        first_K = torch.arange(routing.expert_TK.shape[1], device=x_TD.device) == 0
        forced_T1, only_TK = self.forced_T[:, None], self.forced_T[:, None] & ~first_K
        return Routing(
            logits_TE=routing.logits_TE,
            log_probs_TE=routing.log_probs_TE,
            expert_TK=torch.where(forced_T1, self.expert, routing.expert_TK),
            weight_TK=torch.where(forced_T1, first_K.to(routing.weight_TK), routing.weight_TK),
            kept_TK=routing.kept() & ~only_TK,
            valid_T=routing.valid_T,
            join_E=routing.join_E,
        )


@contextlib.contextmanager
def forcing(model: MoEGPT2LMHeadModel, layer: int, forced_T: Tensor) -> Iterator[Forced]:
    """Put `Forced` in front of the router of MoE layer `layer`, and take it away again."""
    mlp = model.transformer.moe_blocks[layer].mlp
    router = mlp.router
    mlp.router = forced = Forced(router, forced_T)  # type: ignore[assignment]
    try:
        yield forced
    finally:
        mlp.router = router


@torch.no_grad()
def oracle_losses(model: MoEGPT2LMHeadModel, input_ids: Tensor, layer: int) -> Tensor:
    """Each token's loss, nats, with each expert of one MoE layer forced for that token alone: [B, S − 1, E].

    All else is as trained, for earlier tokens too. Forcing a whole sequence at once would feed every token a context
    computed by experts it did not choose; so the sequence is run twice side by side in one call: S tokens routed as
    trained, and S forced ones, each of which attends to the trained ones before it and to itself.

    Args:
        model: is put in evaluation.
        input_ids: [B, S] without padding; 2·S must not exceed what the routers and positions take (positions repeat).
        layer: index among the MoE layers.
    """
    training, _ = model.training, model.eval()
    batch, length = input_ids.shape
    device = input_ids.device
    earlier_SS = torch.ones(length, length, dtype=torch.bool, device=device).tril(-1)
    self_SS = torch.eye(length, dtype=torch.bool, device=device)
    nothing_SS = torch.zeros_like(self_SS)
    allowed = torch.cat([torch.cat([earlier_SS | self_SS, nothing_SS], 1), torch.cat([earlier_SS, self_SS], 1)], 0)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=device)
    mask = mask.masked_fill(~allowed, torch.finfo(model.dtype).min).expand(batch, 1, -1, -1)
    position_ids = torch.arange(length, device=device).repeat(2).expand(batch, -1)
    forced_T = (torch.arange(2 * length, device=device) >= length).repeat(batch)
    losses = []
    with forcing(model, layer, forced_T) as forced:
        for forced.expert in range(model.config.num_experts):
            twice = torch.cat([input_ids, input_ids], dim=1)
            logits = model(twice, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
            logits = logits[:, length:-1].float()
            losses.append(F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none"))
    model.train(training)
    return torch.stack(losses, dim=-1)


@torch.no_grad()
def oracle_agreement(model: MoEGPT2LMHeadModel, batches: Sequence[Tensor], layer: int) -> float | None:
    """Agreement of a layer's first choice with the oracle's, chance taken off.

    Args:
        batches: token ids [B, S] without padding, together at least 2,048 predicted tokens, or the estimate is noise.
        layer: index among the MoE layers.

    Raises:
        ValueError: fewer tokens.
    """
    predicted = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)
    if predicted < 2048:
        raise ValueError(f"batches: expected at least 2048 predicted tokens, got {predicted}")
    own, oracle = [], []
    for ids in batches:
        oracle.append(oracle_losses(model, ids, layer).argmin(dim=-1).flatten())
        own.append(_first_choice(model, ids, layer)[:, :-1].flatten())
    a_TK, b_TK = torch.cat(own)[:, None], torch.cat(oracle)[:, None]
    return agreement(a_TK, None, b_TK, None, model.config.num_experts)


def _first_choice(model: MoEGPT2LMHeadModel, input_ids: Tensor, layer: int) -> Tensor:
    training, _ = model.training, model.eval()
    routing: Routing = model(input_ids, output_routing=True, use_cache=False).routing[layer]
    model.train(training)
    heaviest_T1 = routing.weight_TK.argmax(dim=1, keepdim=True)
    return routing.expert_TK.gather(1, heaviest_T1).view(input_ids.shape)


@torch.no_grad()
def agreement_between(
    model: MoEGPT2LMHeadModel, other: MoEGPT2LMHeadModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> list[float | None]:
    """Agreement of two models' routers, per MoE layer, on the hidden states of the first.

    Feeding each its own hidden states would compare the models, not the decisions.
    """
    if model.config.num_experts != other.config.num_experts or len(model.routers) != len(other.routers):
        raise ValueError("other: expected as many experts and MoE layers as the model has")
    if model.config.n_embd != other.config.n_embd:
        raise ValueError(f"other: expected a model of width {model.config.n_embd}, got {other.config.n_embd}")
    seen: list[tuple[Router, Tensor, Tokens, Routing]] = []
    hooks = [
        router.register_forward_hook(lambda _m, args, out, twin=twin: seen.append((twin, *args, out)))
        for router, twin in zip(model.routers, other.routers, strict=True)
    ]
    training, _, _ = model.training, model.eval(), other.eval()
    try:
        model(input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    model.train(training)
    values = []
    for twin, x_TD, tokens, mine in seen:
        theirs = twin(x_TD, tokens)
        valid_T = mine.valid()
        values.append(
            agreement(
                mine.expert_TK[valid_T],
                mine.kept()[valid_T],
                theirs.expert_TK[valid_T],
                theirs.kept()[valid_T],
                mine.num_experts,
            )
        )
    return values
