"""Routers that choose which experts to open, for all sequences of a batch together.

Decoding reads the weights of every expert that any sequence of the batch needs, so joules follow the number of distinct
experts. A set of open experts is chosen per position, over the B sequences that stand there, in training, evaluation
and decoding alike: chosen over a whole block, it would see the future. What a sequence gets therefore depends on its
batch (not on what comes later).

Shapes: B sequences, S positions of a call, T = B·S, E experts, K choices, G = 2^E sets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.routers import Router, log_softmax, top_k
from moe.routing import Routing, Tokens

EXACT_EXPERTS = 8
"""Up to so many experts, all sets are tried."""
_NEVER = -1e9
_WORTH = 1e-6


class OpeningRouter(Router):
    """`opening`: the open set that maximises Σ_t Σ_{e∈S_t} (s_te − λ·join_e) − λ·Σ_e open_e·1(open), K per token.

    The exact optimum for E ≤ 8, greedy with swaps beyond. Mixes by softmax(s) over the selected, as `energy` does.
    With opening prices of zero this is `energy`; switched off (`active`), too.
    """

    priced = True
    opens = True

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        biased_TE = self.biased(score_TE)
        priced_TE = biased_TE - self.price_E()
        if self.active:
            priced_TE = priced_TE.masked_fill(~self._open(priced_TE, tokens), -torch.inf)
        expert_TK = top_k(priced_TE, self.top_k)
        weight_TK = self.mix(score_TE, log_probs_TE, expert_TK)
        unpriced_TK = top_k(biased_TE, self.top_k)
        return self.routing(
            logits_TE, weight_TK, tokens, log_probs_TE=log_probs_TE, expert_TK=expert_TK, unpriced_TK=unpriced_TK
        )

    def _open(self, priced_TE: Tensor, tokens: Tokens) -> Tensor:
        """bool [T, E]: the experts that are open at each token's position."""
        score_BSE, valid_BS = by_position(priced_TE, tokens)
        open_SE = open_sets(score_BSE, self.energy_lambda * self.open_E, self.top_k, valid_BS)
        return open_SE.expand(score_BSE.shape).reshape(priced_TE.shape)


class PiggybackRouter(Router):
    """`piggyback`: every token keeps its best expert, its other choices come from the experts that are open anyway.

    The heuristic of opportunistic expert activation (Oncescu et al. 2025), for comparison. λ and join prices act on
    scores; nothing is paid for opening. Where fewer than K experts are open at a position, those that its sequences
    want most are opened besides, so that K stays K.
    """

    priced = True
    opens = True

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE / self.temperature
        log_probs_TE = log_softmax(score_TE)
        biased_TE = self.biased(score_TE)
        priced_TE = biased_TE - self.price_E()
        score_BSE, valid_BS = by_position(priced_TE, tokens)
        open_SE = first_choices(score_BSE, self.top_k, valid_BS)
        open_TE = open_SE.expand(score_BSE.shape).reshape(priced_TE.shape)
        expert_TK = top_k(priced_TE.masked_fill(~open_TE, -torch.inf), self.top_k)
        weight_TK = self.mix(score_TE, log_probs_TE, expert_TK)
        unpriced_TK = top_k(biased_TE, self.top_k)
        return self.routing(
            logits_TE, weight_TK, tokens, log_probs_TE=log_probs_TE, expert_TK=expert_TK, unpriced_TK=unpriced_TK
        )


def by_position(score_TE: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """[T, E] as [B, S, E], and which of the B·S tokens are no padding (None: all)."""
    length = score_TE.shape[0] // max(tokens.batch_size, 1)
    shape = (tokens.batch_size, length)
    valid_BS = None if tokens.valid_T is None else tokens.valid_T.view(shape)
    return score_TE.view(*shape, score_TE.shape[-1]), valid_BS


def open_sets(score_BSE: Tensor, price_E: Tensor, k: int, valid_BS: Tensor | None = None) -> Tensor:
    """The sets to open: bool [S, E], each with at least k experts.

    Args:
        score_BSE: priced scores, nats.
        price_E: λ·open_e, nats.
        k: experts per token.
        valid_BS: False on padding, which neither wants nor counts.
    """
    if score_BSE.shape[-1] == k:
        return torch.ones(score_BSE.shape[1:], dtype=torch.bool, device=score_BSE.device)
    search = every_set if score_BSE.shape[-1] <= EXACT_EXPERTS else swapped_sets
    return search(score_BSE, price_E, k, valid_BS)


def every_set(score_BSE: Tensor, price_E: Tensor, k: int, valid_BS: Tensor | None = None) -> Tensor:
    """The best of all 2^E sets. Among equals the first, which opens no expert that nobody takes."""
    num_experts = score_BSE.shape[-1]
    arange_E = torch.arange(num_experts, device=score_BSE.device)
    member_GE = (torch.arange(2**num_experts, device=score_BSE.device)[:, None] >> arange_E) & 1
    never = score_BSE.new_full((), -torch.inf)
    best: list[Tensor] = []  # the k best scores within each set so far: an insertion sort over experts
    for e in range(num_experts):
        value_BSG = torch.where(member_GE[:, e].bool(), score_BSE[..., e, None], never)
        for i, at_i in enumerate(best):
            best[i], value_BSG = torch.maximum(at_i, value_BSG), torch.minimum(at_i, value_BSG)
        if len(best) < k:
            best.append(value_BSG)
    gain_BSG = torch.stack(best).sum(dim=0)
    if valid_BS is not None:
        gain_BSG = gain_BSG.masked_fill(~valid_BS[..., None], 0.0)
    gain_SG = gain_BSG.sum(dim=0) - (member_GE * price_E).sum(dim=1)
    chosen_S = gain_SG.masked_fill(member_GE.sum(dim=1) < k, -torch.inf).argmax(dim=-1)
    return ((chosen_S[:, None] >> arange_E) & 1).bool()


def swapped_sets(score_BSE: Tensor, price_E: Tensor, k: int, valid_BS: Tensor | None = None) -> Tensor:
    """Local search: the best addition, removal or exchange, E + 4 times, from all experts and from the k most wanted;
    the better end of the two. The number of rounds is fixed: asking whether anything changed would wait for the GPU."""
    num_experts, positions = score_BSE.shape[-1], score_BSE.shape[1]
    counted_BSE = score_BSE if valid_BS is None else score_BSE * valid_BS[..., None]
    wanted_SK = (counted_BSE.sum(dim=0) - price_E).topk(k, dim=-1).indices
    few_SE = torch.zeros(score_BSE.shape[1:], dtype=torch.bool, device=score_BSE.device).scatter(1, wanted_SK, True)
    open_SE = torch.cat([torch.ones_like(few_SE), few_SE])
    twice_BSE = torch.cat([score_BSE, score_BSE], dim=1)
    valid_twice = None if valid_BS is None else torch.cat([valid_BS, valid_BS], dim=1)
    for _ in range(num_experts + 4):
        open_SE = _improved(open_SE, twice_BSE, price_E, k, valid_twice)
    gain_S = _gain(open_SE, twice_BSE, price_E, k, valid_twice)
    first_S = gain_S[:positions] >= gain_S[positions:]
    return torch.where(first_S[:, None], open_SE[:positions], open_SE[positions:])


def _gain(open_SE: Tensor, score_BSE: Tensor, price_E: Tensor, k: int, valid_BS: Tensor | None) -> Tensor:
    """What a set is worth at each position, nats."""
    taken_BS = score_BSE.masked_fill(~open_SE, _NEVER).topk(k, dim=-1).values.sum(dim=-1)
    if valid_BS is not None:
        taken_BS = taken_BS * valid_BS
    return taken_BS.sum(dim=0) - (open_SE * price_E).sum(dim=-1)


def _improved(open_SE: Tensor, score_BSE: Tensor, price_E: Tensor, k: int, valid_BS: Tensor | None) -> Tensor:
    """Each set after its best change by one addition, removal or exchange; unchanged where none is worth it.

    If a leaves and c comes: a token that took a takes the better of c and its next best; another swaps its worst
    choice for c where c is better. All pairs are two products over the sequences.
    """
    best = score_BSE.masked_fill(~open_SE, _NEVER).topk(k + 1, dim=-1)
    worst_BS1, next_BS1 = best.values[..., k - 1 : k], best.values[..., k:]
    takes_BSE = torch.zeros_like(score_BSE).scatter(-1, best.indices[..., :k], 1.0)
    better_BSE = (score_BSE - worst_BS1).relu()
    if valid_BS is not None:
        takes_BSE, better_BSE = takes_BSE * valid_BS[..., None], better_BSE * valid_BS[..., None]
    lost_SE = (takes_BSE * score_BSE).sum(dim=0)
    come_SE = better_BSE.sum(dim=0) - price_E
    leave_SE = (takes_BSE * next_BS1).sum(dim=0) - lost_SE + price_E
    takes_SEB, other_SBE = takes_BSE.permute(1, 2, 0), (torch.maximum(next_BS1, score_BSE) - better_BSE).transpose(0, 1)
    swap_SEE = takes_SEB @ other_SBE + (price_E - lost_SE)[..., None] + come_SE[:, None, :]
    swap_SEE = swap_SEE.masked_fill(~open_SE[..., None] | open_SE[:, None, :], _NEVER)
    come_SE, leave_SE = come_SE.masked_fill(open_SE, _NEVER), leave_SE.masked_fill(~open_SE, _NEVER)
    return _apply_best(open_SE, swap_SEE, come_SE, leave_SE)


def _apply_best(open_SE: Tensor, swap_SEE: Tensor, come_SE: Tensor, leave_SE: Tensor) -> Tensor:
    num_experts = open_SE.shape[-1]
    gain_SN = torch.cat([swap_SEE.flatten(1), come_SE, leave_SE], dim=-1)
    best_S1, at_S1 = gain_SN.max(dim=-1, keepdim=True)
    arange_E, pairs = torch.arange(num_experts, device=open_SE.device), num_experts**2
    swaps_S1 = at_S1 < pairs
    comes_SE = torch.where(swaps_S1, at_S1 % num_experts, at_S1 - pairs) == arange_E
    leaves_SE = torch.where(swaps_S1, at_S1 // num_experts, at_S1 - pairs - num_experts) == arange_E
    return torch.where(best_S1 > _WORTH, (open_SE & ~leaves_SE) | comes_SE, open_SE)


def first_choices(score_BSE: Tensor, k: int, valid_BS: Tensor | None = None) -> Tensor:
    """bool [S, E]: the best expert of every sequence, and the most wanted others where these are fewer than k."""
    num_experts = score_BSE.shape[-1]
    arange_E = torch.arange(num_experts, device=score_BSE.device)
    first_BSE = score_BSE.argmax(dim=-1, keepdim=True) == arange_E
    wanted_BSE = score_BSE
    if valid_BS is not None:
        first_BSE, wanted_BSE = first_BSE & valid_BS[..., None], score_BSE * valid_BS[..., None]
    open_SE = first_BSE.any(dim=0)
    wanted_SE = wanted_BSE.sum(dim=0).masked_fill(open_SE, torch.inf)
    return open_SE | torch.zeros_like(open_SE).scatter(-1, wanted_SE.topk(k, dim=-1).indices, True)


KERNELS = 2
"""What a captured decode step launches per layer to choose sets of up to EXACT_EXPERTS (``moe.opening_kernels``)."""


class _Launches(TorchDispatchMode):
    """Counts operations that compute something, each of which is a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def choosing_launches(num_experts: int, k: int, batch: int) -> int:
    """Kernels that choosing the set of one layer adds to a decode step: those of the captured step where it has its
    own, else one for each operation, counted."""
    if num_experts <= EXACT_EXPERTS:
        return KERNELS
    with _Launches() as launches:
        open_sets(torch.zeros(batch, 1, num_experts), torch.zeros(num_experts), k)
    return launches.count
