"""Routers: which experts a token passes through, and with what weights.

Symbols: z_TE logits, τ temperature, s = z/τ, b_E balancing bias, c̃_E normalised price, λ its weight. A learned
router selects by s + b (− λ·c̃ where it looks at prices) and mixes by s alone: b and the price decide who computes,
never how much an expert's answer counts.

Shapes: see moe/routing.py. Routers are final classes with one method, `forward(x_TD, tokens) -> Routing`. They hold
tensors for what changes between trials of one shape (λ, τ, prices), so that such trials share compiled code.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.gate import gate_logits
from moe.hashing import hash_TE, permute_tokens
from moe.routing import Routing, Tokens

if TYPE_CHECKING:
    from moe.config import MoEGPT2Config


class Router(nn.Module, abc.ABC):
    """What all routers share: buffers, logits, the rule of mixing.

    Class attributes:
        causal: a token's choice depends on no later token of its sequence.
        priced: λ and prices enter the choice.
        learned: has a gate.
        opens: chooses which experts to open, for all sequences of a position together.
        drops: leaves choices out for want of capacity while training.

    Buffers:
        energy_lambda, temperature: λ and τ, scalars. `config` keeps them, so they are not saved twice.
        join_E, open_E: normalised prices. bias_E: balancing bias, added for selection alone.
        offset_E: added to the logits themselves; zero unless adapted at test time.
        count_E: choices since the last optimizer step, for balancing.
    """

    causal: ClassVar[bool] = True
    priced: ClassVar[bool] = False
    learned: ClassVar[bool] = True
    opens: ClassVar[bool] = False
    drops: ClassVar[bool] = False

    energy_lambda: Tensor
    temperature: Tensor
    join_E: Tensor
    open_E: Tensor
    bias_E: Tensor
    offset_E: Tensor
    count_E: Tensor

    def __init__(self, config: MoEGPT2Config, layer: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.mixing, self.jitter = config.mixing, config.router_jitter
        self.balanced = config.bias_balance_rate > 0
        self.keep_first = False  # set where routers are adapted at test time
        self.active = True  # False: `opening` chooses no sets, because that would not pay
        self.seed = config.router_seed * 1009 + layer
        if self.learned:
            self.gate = nn.Linear(config.n_embd, self.num_experts, bias=False)
        for name, value in initial_buffers(config).items():
            self.register_buffer(name, value, persistent=name not in CONFIGURED)

    @abc.abstractmethod
    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        """Route T tokens. Must not synchronise with the host, and must not change a buffer."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """z_TE in float32 whatever the model computes in. Under autocast the gate reads what the experts read."""
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        if self.jitter > 0 and self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return gate_logits(x_TD, self.gate.weight) + self.offset_E

    def biased(self, score_TE: Tensor) -> Tensor:
        """The score that selects: with the balancing bias, without the price."""
        return score_TE.detach() + self.bias_E if self.balanced else score_TE.detach()

    def price_E(self) -> Tensor:
        """λ·c̃_E, nats."""
        return self.energy_lambda * self.join_E

    def mix(self, score_TE: Tensor, log_probs_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """weight_TK. They sum to 1 in value, so that equal experts equal the dense FFN.

        K = 1: p/stopgrad(p), value 1 with the gradient of log p. K > 1: softmax over the selected.
        """
        if self.mixing == "probability":
            return log_probs_TE.gather(-1, expert_TK).exp()
        if expert_TK.shape[-1] == 1:
            p_TK = log_probs_TE.gather(-1, expert_TK).exp()
            return p_TK / p_TK.detach()
        return softmax(score_TE.gather(-1, expert_TK))

    def routing(self, logits_TE: Tensor, weight_TK: Tensor, tokens: Tokens, **choice: Tensor | None) -> Routing:
        """Put a Routing together: masks padding out of the choices and zeroes the weights of what is not kept."""
        kept_TK = choice.pop("kept_TK", None)
        expert_TK = choice.pop("expert_TK")
        assert expert_TK is not None
        if tokens.valid_T is not None:
            valid_TK = tokens.valid_T[:, None].expand_as(expert_TK)
            kept_TK = valid_TK if kept_TK is None else kept_TK & valid_TK
        if kept_TK is not None:
            weight_TK = weight_TK.masked_fill(~kept_TK, 0.0)
        log_probs_TE = choice.pop("log_probs_TE", None)
        if log_probs_TE is None:
            log_probs_TE = log_softmax(logits_TE / self.temperature)
        # Reentrant checkpointing writes a grad_fn onto whatever a block returns: never the buffer itself.
        fields: dict[str, Any] = {
            "join_E": self.join_E.detach(),
            "valid_T": tokens.valid_T,
            "kept_TK": kept_TK,
            **choice,
        }
        return Routing(
            logits_TE=logits_TE, log_probs_TE=log_probs_TE, expert_TK=expert_TK, weight_TK=weight_TK, **fields
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the model, but stay float32: λ, prices and counts lose their meaning in bfloat16."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype and not old.is_meta and not new.is_meta:
                setattr(self, name, old.to(new.device))
        return self


CONFIGURED = ("energy_lambda", "temperature")


def initial_buffers(config: MoEGPT2Config) -> dict[str, Tensor]:
    """A router's buffers at birth. The price of an expert is its width over the dense width until calibrated."""
    widths_E = torch.tensor(config.expert_widths, dtype=torch.float32)
    zeros_E = torch.zeros_like(widths_E)
    price_E = widths_E / config.dense_width
    return {
        "energy_lambda": torch.tensor(config.energy_lambda, dtype=torch.float32),
        "temperature": torch.tensor(config.router_temperature, dtype=torch.float32),
        "join_E": price_E,
        "open_E": price_E.clone(),
        "bias_E": zeros_E,
        "offset_E": zeros_E.clone(),
        "count_E": zeros_E.clone(),
    }


def log_softmax(score_TE: Tensor) -> Tensor:
    """Over the experts. A CPU takes rows of a few experts one by one; laid the other way they fill its vectors."""
    if score_TE.is_cuda or torch.compiler.is_compiling():
        return score_TE.log_softmax(dim=-1)
    return score_TE.T.contiguous().log_softmax(dim=0).T


def softmax(score_TK: Tensor) -> Tensor:
    """Over the choices, laid out as in `log_softmax`."""
    if score_TK.is_cuda or torch.compiler.is_compiling():
        return score_TK.softmax(dim=-1)
    return score_TK.T.contiguous().softmax(dim=0).T


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, best first.

    Compiled, k rounds of argmax fuse with the softmax around them into one kernel, where `topk` is a call of its own.
    """
    if not torch.compiler.is_compiling() or k > 8:
        return score_TE.topk(k, dim=-1).indices
    arange_E = torch.arange(score_TE.shape[-1], device=score_TE.device)
    chosen = []
    for _ in range(k):
        chosen.append(score_TE.argmax(dim=-1, keepdim=True))
        score_TE = score_TE.masked_fill(arange_E == chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=-1)


class TopKRouter(Router):
    """`topk`: the K best logits, nothing dropped (Shazeer et al. 2017; mixture as in Mixtral, Jiang et al. 2024)."""

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        expert_TK = top_k(self.biased(score_TE), self.top_k)
        weight_TK = self.mix(score_TE, log_probs_TE, expert_TK)
        return self.routing(logits_TE, weight_TK, tokens, log_probs_TE=log_probs_TE, expert_TK=expert_TK)


class EnergyRouter(Router):
    """`energy`: selects by s − λ·c̃, mixes by softmax(s) over the selected.

    With equal prices this is `topk`: a number taken off every score changes no order. Prices act where they differ.
    """

    priced = True

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        biased_TE = self.biased(score_TE)
        priced_TE = biased_TE - self.price_E()
        if self.keep_first:
            priced_TE = self.with_first_kept(priced_TE)
        expert_TK = top_k(priced_TE, self.top_k)
        weight_TK = self.mix(score_TE, log_probs_TE, expert_TK)
        unpriced_TK = top_k(biased_TE, self.top_k)
        return self.routing(
            logits_TE, weight_TK, tokens, log_probs_TE=log_probs_TE, expert_TK=expert_TK, unpriced_TK=unpriced_TK
        )

    def with_first_kept(self, priced_TE: Tensor) -> Tensor:
        """Scores by which each token takes the expert that is its best without `offset_E`, whatever was adapted."""
        trained_TE = priced_TE - self.offset_E / self.temperature
        arange_E = torch.arange(self.num_experts, device=priced_TE.device)
        return priced_TE.masked_fill(trained_TE.argmax(dim=-1, keepdim=True) == arange_E, torch.inf)


class CapacityRouter(Router):
    """`capacity`: an expert takes at most ⌈factor·K·T/E⌉ choices (Switch, GShard).

    First come, first served in token order, which keeps it causal; GShard's order (all first choices before any second)
    would let a later token push out an earlier one. Evaluation drops nothing, or the cached and the uncached decoding
    of one text would differ: the capacity depends on the tokens in the call.
    """

    drops = True

    def __init__(self, config: MoEGPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.capacity_factor = config.capacity_factor

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        expert_TK = top_k(self.biased(score_TE), self.top_k)
        weight_TK = self.mix(score_TE, log_probs_TE, expert_TK)
        if not self.training:
            return self.routing(logits_TE, weight_TK, tokens, log_probs_TE=log_probs_TE, expert_TK=expert_TK)
        kept_TK, dropped_TK = self._first_come(expert_TK, tokens.valid_T)
        return self.routing(
            logits_TE,
            weight_TK,
            tokens,
            log_probs_TE=log_probs_TE,
            expert_TK=expert_TK,
            kept_TK=kept_TK,
            dropped_TK=dropped_TK,
        )

    def _first_come(self, expert_TK: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
        asked_TKE = F.one_hot(expert_TK, self.num_experts)
        if valid_T is not None:
            asked_TKE = asked_TKE * valid_T[:, None, None]
        total = expert_TK.numel() if valid_T is None else valid_T.sum() * self.top_k
        capacity = torch.as_tensor(total * (self.capacity_factor / self.num_experts), device=expert_TK.device).ceil()
        place_TKE = asked_TKE.flatten(0, 1).cumsum(dim=0).view_as(asked_TKE)
        asked_TK = asked_TKE.sum(dim=-1).bool()
        place_TK = place_TKE.gather(-1, expert_TK[..., None]).squeeze(-1)
        return asked_TK & (place_TK <= capacity), asked_TK & (place_TK > capacity)


class TopPRouter(Router):
    """`topp`: the smallest set whose probability exceeds a threshold, so K varies (Huang et al. 2024, eq. 4).

    K slots are E slots, of which `kept_TK` marks the set. Mixes by p_e/stopgrad(Σ_set p), which sums to 1 and still
    teaches the gate where the set has one member.
    """

    def __init__(self, config: MoEGPT2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.top_p = config.router_top_p

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        expert_TK = top_k(self.biased(score_TE), self.num_experts)
        mass_TK = self.biased(score_TE).softmax(dim=-1).gather(-1, expert_TK)
        kept_TK = mass_TK.cumsum(dim=-1) - mass_TK <= self.top_p
        p_TK = log_probs_TE.gather(-1, expert_TK).exp()
        if self.mixing == "normalized":
            p_TK = p_TK / (p_TK.detach() * kept_TK).sum(dim=-1, keepdim=True)
        return self.routing(logits_TE, p_TK, tokens, log_probs_TE=log_probs_TE, expert_TK=expert_TK, kept_TK=kept_TK)


class PermutedRouter(Router):
    """`permuted`, a control: the choices and weights of `energy`, dealt out to other tokens at random.

    The load is that of the router it shuffles, to the last count; the skill is gone. Not causal.
    """

    causal = False
    priced = True

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        biased_TE = self.biased(score_TE)
        expert_TK = top_k(biased_TE - self.price_E(), self.top_k)
        weight_TK = self.mix(score_TE, log_probs_TE, expert_TK)
        source_T = permute_tokens(tokens, self.seed, fresh=self.training)
        return self.routing(
            logits_TE,
            weight_TK[source_T],
            tokens,
            log_probs_TE=log_probs_TE,
            expert_TK=expert_TK[source_T],
            unpriced_TK=top_k(biased_TE, self.top_k)[source_T],
        )


class _Drawn(Router):
    """Routers that draw K experts without looking at the token's hidden state, and mix them equally."""

    learned = False

    def draw(self, x_TD: Tensor, tokens: Tokens, draw_TE: Tensor) -> Routing:
        expert_TK = top_k(draw_TE.float(), self.top_k)
        logits_TE = x_TD.new_zeros(
            x_TD.shape[0], self.num_experts, dtype=torch.promote_types(x_TD.dtype, torch.float32)
        )
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=logits_TE.dtype)
        return self.routing(logits_TE, weight_TK, tokens, expert_TK=expert_TK)


class RandomRouter(_Drawn):
    """`random`, a control: K distinct experts drawn uniformly (THOR, Zuo et al. 2021).

    Fresh at every training step; in evaluation drawn from seed, layer, token and position, so that cached and
    uncached decoding agree.
    """

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        if self.training:
            draw_TE = torch.rand(x_TD.shape[0], self.num_experts, device=x_TD.device)
        else:
            draw_TE = hash_TE(self.num_experts, self.seed, tokens.id_T, tokens.position_T)
        return self.draw(x_TD, tokens, draw_TE)


class HashRouter(_Drawn):
    """`hash`, a control: K distinct experts fixed for each vocabulary entry (Hash Layers, Roller et al. 2021)."""

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        if tokens.id_T is None:
            raise ValueError("router hash: expected input_ids, got inputs_embeds: it routes by vocabulary entry")
        return self.draw(x_TD, tokens, hash_TE(self.num_experts, self.seed, tokens.id_T))
