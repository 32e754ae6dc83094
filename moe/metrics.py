"""Routing metrics, per layer and on average.

`RoutingStats` gathers sums on the device over the batches of an evaluation and reads them once, in `summary()`: no
host synchronisation in between. Definitions (n_e: kept choices of expert e in a layer; N: valid tokens):

- load_e = n_e/Σn; effective experts exp(H(load)); load CV std(n)/mean(n); max violation max(n)/mean(n) − 1
  (Wang et al. 2024, eq. 4); dead experts n_e = 0; routing diversity: share of experts with n_e > 0;
- router margin: log p of the least preferred chosen expert minus log p of the best one left out, mean over tokens (a
  price, or a shuffle, can make it negative);
- open experts: distinct experts that compute (width > 0) per batch;
- open experts of a position: the same over the B sequences at one position, mean over positions: what a decode step of
  B sequences reads. Batches of another B than the first, as the last of a split may be, are left out;
- domain specialisation: I(expert; domain)/H(domain): 0 where experts do not tell domains apart, 1 where each choice
  gives its domain away;
- co-activation: share of the tokens that take both experts; its mean over layers is a matrix too, since the mean over
  pairs is K(K − 1)/(E(E − 1)) whatever the router does.

Shapes: B sequences of S tokens, T = B·S, K choices, E experts, L MoE layers, M domains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moe.routing import Routing

Matrix = list[list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """What `RoutingStats` saw. Scalars are means over layers; None where nothing defines them."""

    tokens: int
    routing_diversity: float
    effective_experts: float
    load_cv: float
    max_violation: float
    dead_experts: float
    dropped_fraction: float
    router_margin: float | None
    open_experts: float
    position_open_experts: float | None
    mean_selected_width: float
    logit_std: float
    price_flip_fraction: float | None
    unpriced_agreement: float | None
    domain_specialisation: float | None
    load_LE: Matrix
    coactivation_EE: Matrix
    layer_effective_experts: list[float]
    layer_load_cv: list[float]
    layer_diversity: list[float]
    layer_max_violation: list[float]
    layer_dead_experts: list[float]
    layer_dropped_fraction: list[float]
    layer_margin: list[float | None]
    layer_open_experts: list[float]
    layer_position_open_experts: list[float] | None
    layer_logit_std: list[float]
    layer_flip_fraction: list[float] | None
    layer_unpriced_agreement: list[float | None] | None
    layer_domain_specialisation: list[float | None] | None
    mean_logits_LE: Matrix
    domain_load_LME: list[Matrix] | None
    coactivation_LEE: list[Matrix]


class RoutingStats:
    """Sums over the routings of one evaluation.

    Args:
        widths: inner width of each expert, neurons, 0 for null experts (`config.expert_widths`).
        domains: number of domains M, where tokens come with a domain id.
    """

    def __init__(self, widths: Sequence[int], *, domains: int = 0) -> None:
        self.widths, self.domains, self.batches = tuple(widths), domains, 0
        self.sequences: int | None = None
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(
        self, routings: Sequence[Routing], domain_T: Tensor | None = None, *, sequences: int | None = None
    ) -> None:
        """Add one batch: one routing per MoE layer, and each token's domain id in [0, M) if there are domains.

        Args:
            sequences: B, where open experts of a position are to be counted.
        """
        if (domain_T is None) != (self.domains == 0):
            raise ValueError(f"domain_T: expected {'ids' if self.domains else 'none'} for domains={self.domains}")
        if len(routings) == 0:
            raise ValueError("routings: expected one per MoE layer, got none")
        self.sequences = self.sequences or sequences
        counted = sequences if sequences == self.sequences else None
        layers = [self._layer_sums(routing, domain_T, counted) for routing in routings]
        for name in layers[0]:
            value = torch.stack([layer[name] for layer in layers]).double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.batches += 1

    def _layer_sums(self, routing: Routing, domain_T: Tensor | None, sequences: int | None) -> dict[str, Tensor]:
        valid_T, taken_TE = routing.valid(), inclusion_TE(routing.expert_TK, routing.kept(), routing.num_experts)
        asked_TE = taken_TE
        if routing.dropped_TK is not None:
            asked_TE = inclusion_TE(routing.expert_TK, routing.kept() | routing.dropped_TK, routing.num_experts)
        n_E = taken_TE.sum(dim=0)
        margin, decided = _margin(routing, asked_TE)
        logits_TE = routing.logits_TE.double() * valid_T[:, None]
        sums = {
            "tokens": valid_T.sum(),
            "n_E": n_E,
            "asked": asked_TE.sum(),
            "margin": margin,
            "decided": decided,
            "open_E": n_E > 0,
            "logits_E": logits_TE.sum(dim=0),
            "logits_squared": (logits_TE - logits_TE.mean(dim=-1, keepdim=True)).square().sum(),
            "together_EE": taken_TE.double().T @ taken_TE.double(),
            **self._price_sums(routing, taken_TE),
        }
        if domain_T is not None:
            member_TM = torch.nn.functional.one_hot(domain_T, self.domains).double()
            sums["domain_ME"] = member_TM.T @ taken_TE.double()
        if sequences is not None:
            sums["position_open_E"] = taken_TE.view(sequences, -1, routing.num_experts).any(dim=0).sum(dim=0)
            sums["positions"] = valid_T.view(sequences, -1).any(dim=0).sum()
        return sums

    def _price_sums(self, routing: Routing, taken_TE: Tensor) -> dict[str, Tensor]:
        """Choices with the price and without it, where the router knows both."""
        zero = torch.zeros((), device=taken_TE.device)
        if routing.unpriced_TK is None:
            return {"priced": zero, "overlap": zero, "unpriced_E": zero.expand(routing.num_experts)}
        valid_TK = routing.valid()[:, None].expand_as(routing.unpriced_TK)
        unpriced_TE = inclusion_TE(routing.unpriced_TK, valid_TK, routing.num_experts)
        return {"priced": zero + 1, "overlap": (unpriced_TE & taken_TE).sum(), "unpriced_E": unpriced_TE.sum(dim=0)}

    def summary(self) -> RoutingSummary:
        """Read the sums. Raises ValueError where no token was seen."""
        if not self._sums or float(self._sums["tokens"].max()) == 0:
            raise ValueError("RoutingStats: expected at least one valid token, got none")
        sums = {name: value.cpu() for name, value in self._sums.items()}
        n_LE, tokens_L = sums["n_E"], sums["tokens"]
        load_LE = n_LE / n_LE.sum(dim=1, keepdim=True).clamp_min(1)
        cv_L = n_LE.std(dim=1, correction=0) / n_LE.mean(dim=1).clamp_min(1e-12)
        effective_L = torch.special.entr(load_LE).sum(dim=1).exp()
        diversity_L = (n_LE > 0).double().mean(dim=1)
        computing_E = (torch.tensor(self.widths) > 0).double()
        open_L = sums["open_E"] @ computing_E / self.batches
        position_open_L = None
        if self.sequences is not None:
            position_open_L = (sums["position_open_E"] @ computing_E / sums["positions"].clamp_min(1)).tolist()
        margin_L = [float(m / d) if d > 0 else None for m, d in zip(sums["margin"], sums["decided"], strict=True)]
        width_L = n_LE @ torch.tensor(self.widths, dtype=torch.float64) / tokens_L
        variance_L = sums["logits_squared"] / (tokens_L * n_LE.shape[1])
        violation_L = n_LE.amax(dim=1) / n_LE.mean(dim=1).clamp_min(1e-12) - 1
        dead_L = (n_LE == 0).double().sum(dim=1)
        dropped_L = 1 - n_LE.sum(dim=1) / sums["asked"].clamp_min(1)
        agreement_L = self._unpriced_agreement(sums)
        specialisation_L = _specialisation(sums["domain_ME"]) if self.domains else None
        together_LEE = sums["together_EE"] / tokens_L[:, None, None]
        return RoutingSummary(
            tokens=int(tokens_L[0]),
            routing_diversity=float(diversity_L.mean()),
            effective_experts=float(effective_L.mean()),
            load_cv=float(cv_L.mean()),
            max_violation=float(violation_L.mean()),
            dead_experts=float(dead_L.mean()),
            dropped_fraction=float(dropped_L.mean()),
            router_margin=_mean(margin_L),
            open_experts=float(open_L.mean()),
            position_open_experts=_mean(position_open_L or []),
            mean_selected_width=float(width_L.mean()),
            logit_std=float(variance_L.sqrt().mean()),
            price_flip_fraction=_flips(sums),
            unpriced_agreement=_mean(agreement_L or []),
            domain_specialisation=_mean(specialisation_L or []),
            load_LE=load_LE.tolist(),
            coactivation_EE=together_LEE.mean(dim=0).tolist(),
            layer_effective_experts=effective_L.tolist(),
            layer_load_cv=cv_L.tolist(),
            layer_diversity=diversity_L.tolist(),
            layer_max_violation=violation_L.tolist(),
            layer_dead_experts=dead_L.tolist(),
            layer_dropped_fraction=dropped_L.tolist(),
            layer_margin=margin_L,
            layer_open_experts=open_L.tolist(),
            layer_position_open_experts=position_open_L,
            layer_logit_std=variance_L.sqrt().tolist(),
            layer_flip_fraction=_layer_flips(sums),
            layer_unpriced_agreement=agreement_L,
            layer_domain_specialisation=specialisation_L,
            mean_logits_LE=(sums["logits_E"] / tokens_L[:, None]).tolist(),
            domain_load_LME=_rows(sums["domain_ME"]).tolist() if self.domains else None,
            coactivation_LEE=together_LEE.tolist(),
        )

    def _unpriced_agreement(self, sums: dict[str, Tensor]) -> list[float | None] | None:
        """Agreement with the same layer's choices at λ = 0, on the same inputs."""
        if not sums["priced"].all():
            return None
        return [
            _above_chance(overlap, n_E, unpriced_E, tokens)
            for overlap, n_E, unpriced_E, tokens in zip(
                sums["overlap"], sums["n_E"], sums["unpriced_E"], sums["tokens"], strict=True
            )
        ]


def inclusion_TE(expert_TK: Tensor, mask_TK: Tensor, num_experts: int) -> Tensor:
    """bool [T, E]: the token takes the expert."""
    arange_E = torch.arange(num_experts, device=expert_TK.device)
    return ((expert_TK[..., None] == arange_E) & mask_TK[..., None]).any(dim=1)


@torch.no_grad()
def agreement(
    expert_A_TK: Tensor, kept_A_TK: Tensor | None, expert_B_TK: Tensor, kept_B_TK: Tensor | None, num_experts: int
) -> float | None:
    """How far two routers agree on the same tokens, chance taken off: (a − c)/(1 − c).

    a = mean_t |S_A ∩ S_B|/K, where K varies Dice's 2|S_A ∩ S_B|/(|S_A| + |S_B|) over all tokens; c is what two routers
    with these inclusion rates would reach if they chose independently: Σ_e q_A·q_B/K. (Not K/E: two routers that both
    favour one expert agree by that alone.) 1 is identity, 0 is chance.

    Returns:
        None where c = 1: with K = E, or both routers constant, there is nothing to agree about.
    """
    taken = []
    for expert_TK, kept_TK in ((expert_A_TK, kept_A_TK), (expert_B_TK, kept_B_TK)):
        mask_TK = torch.ones_like(expert_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        taken.append(inclusion_TE(expert_TK, mask_TK, num_experts))
    if taken[0].shape != taken[1].shape:
        raise ValueError(f"expected choices of the same tokens, got {len(taken[0])} and {len(taken[1])}")
    a_TE, b_TE = taken
    tokens = torch.tensor(float(a_TE.shape[0]), dtype=torch.float64)
    return _above_chance((a_TE & b_TE).sum().cpu(), a_TE.sum(dim=0).cpu(), b_TE.sum(dim=0).cpu(), tokens)


def _above_chance(overlap: Tensor, n_A_E: Tensor, n_B_E: Tensor, tokens: Tensor) -> float | None:
    """Counts over `tokens` tokens: choices in common, choices of A and of B by expert."""
    total = float(n_A_E.sum() + n_B_E.sum())
    if total == 0:
        return None
    observed = 2 * float(overlap) / total
    chance = 2 * float((n_A_E.double() * n_B_E.double()).sum() / tokens) / total
    return None if 1 - chance < 1e-9 else (observed - chance) / (1 - chance)


def _margin(routing: Routing, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the gap in log p between chosen and left out, and how many tokens have one."""
    inf = torch.inf
    least_T = routing.log_probs_TE.masked_fill(~chosen_TE, inf).amin(dim=1)
    best_T = routing.log_probs_TE.masked_fill(chosen_TE, -inf).amax(dim=1)
    decided_T = chosen_TE.any(dim=1) & ~chosen_TE.all(dim=1)
    return torch.where(decided_T, least_T - best_T, 0.0).double().sum(), decided_T.sum()


def _flips(sums: dict[str, Tensor]) -> float | None:
    """Share of the choices that differ from those at λ = 0."""
    if not sums["priced"].all():
        return None
    return float(1 - sums["overlap"].sum() / sums["n_E"].sum().clamp_min(1))


def _layer_flips(sums: dict[str, Tensor]) -> list[float] | None:
    if not sums["priced"].all():
        return None
    return (1 - sums["overlap"] / sums["n_E"].sum(dim=1).clamp_min(1)).tolist()


def _specialisation(count_LME: Tensor) -> list[float | None]:
    """I(expert; domain)/H(domain) of each layer; None where all choices are of one domain."""
    joint_LME = count_LME / count_LME.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    domain_LM, expert_LE = joint_LME.sum(dim=2), joint_LME.sum(dim=1)
    entropy = torch.special.entr
    domain_L = entropy(domain_LM).sum(dim=1)
    information_L = domain_L + entropy(expert_LE).sum(dim=1) - entropy(joint_LME).sum(dim=(1, 2))
    return [float(i / h) if h > 1e-12 else None for i, h in zip(information_L, domain_L, strict=True)]


def _rows(count: Tensor) -> Tensor:
    return count / count.sum(dim=-1, keepdim=True).clamp_min(1)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
