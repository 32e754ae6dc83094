"""Router regularizers: pure functions of one layer's routing.

Symbols, per layer, over the N valid tokens of the call: z_TE logits, p = softmax(z/τ), P_e = mean_t p_te,
f_e = share of the choices that go to e (price and capacity aside), c̃_E normalised prices. The model
averages each over its layers: pooling layers before the product would hide collapse.

Values at perfect balance (P = f = 1/E) and at full collapse (every token certain of one expert, K = 1):

    load_balance   1         E            cv2             0         E − 1
    kl_uniform     0         log E        entropy         −log E    0
    token_entropy  log E     0            kl_gibbs (β=0)  0         ∞
    z_loss         (log E)²  (z of the expert)², at z = 0 and at one large logit
    expected_energy  mean c̃   c̃ of the expert
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moe.routing import Routing, count_E


def load_balance(routing: Routing) -> Tensor:
    """E·Σ f_e·P_e (Switch, Fedus et al. 2021, eq. 4, without its α). Gradient through P alone."""
    f_E = count_E(*routing.demand(), routing.num_experts).to(routing.log_probs_TE.dtype)
    f_E = f_E / f_E.sum().clamp_min(1)
    return routing.num_experts * (f_E * _log_mean_probs(routing).exp()).sum()


def cv2(routing: Routing) -> Tensor:
    """Var(P)/Mean(P)² = E·ΣP_e² − 1 (importance loss, Shazeer et al. 2017, eq. 6–7)."""
    return routing.num_experts * (2 * _log_mean_probs(routing)).exp().sum() - 1


def kl_uniform(routing: Routing) -> Tensor:
    """KL(P‖u) = log E − H(P)."""
    return math.log(routing.num_experts) + entropy(routing)


def entropy(routing: Routing) -> Tensor:
    """−H(P), of the mean distribution: minimising it spreads the load."""
    log_P_E = _log_mean_probs(routing)
    return (log_P_E.exp() * log_P_E).sum()


def token_entropy(routing: Routing) -> Tensor:
    """mean_t H(p_t), minimised: sharpens every token's choice; a negative weight softens it."""
    entropy_T = -(routing.probs_TE * routing.log_probs_TE).sum(dim=-1)
    return _mean_over_valid(entropy_T, routing)


def kl_gibbs(routing: Routing, beta: float = 1.0) -> Tensor:
    """KL(q‖P), q_e ∝ exp(−β·c̃_e): pulls towards cheap experts and revives dead ones.

    The other direction, KL(P‖q), has no gradient where P_e = 0, so a dead expert would stay dead.
    """
    log_P_E = _log_mean_probs(routing)
    log_q_E = torch.log_softmax(-beta * _join_E(routing).to(log_P_E.dtype), dim=-1)
    return (log_q_E.exp() * (log_q_E - log_P_E)).sum()


def z_loss(routing: Routing) -> Tensor:
    """mean_t (logsumexp z_t)² (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return _mean_over_valid(routing.logits_TE.logsumexp(dim=-1).square(), routing)


def expected_energy(routing: Routing) -> Tensor:
    """Σ_e P_e·c̃_e: the price trained into the logits, in units of c_ref per choice."""
    P_E = _log_mean_probs(routing).exp()
    return (P_E * _join_E(routing).to(P_E.dtype)).sum()


Regularizer = Callable[[Routing], Tensor]
REGULARIZERS: dict[str, Regularizer] = {
    "load_balance": load_balance,
    "cv2": cv2,
    "kl_uniform": kl_uniform,
    "entropy": entropy,
    "token_entropy": token_entropy,
    "kl_gibbs": kl_gibbs,
    "z_loss": z_loss,
    "expected_energy": expected_energy,
}


def _log_mean_probs(routing: Routing) -> Tensor:
    """log P_E. By logsumexp, so that an expert whose probability underflows keeps a gradient."""
    log_probs_TE, valid_T = routing.log_probs_TE, routing.valid_T
    if valid_T is None:
        return log_probs_TE.logsumexp(dim=0) - math.log(max(log_probs_TE.shape[0], 1))
    masked_TE = log_probs_TE.masked_fill(~valid_T[:, None], torch.finfo(log_probs_TE.dtype).min)
    return masked_TE.logsumexp(dim=0) - valid_T.sum().clamp_min(1).to(log_probs_TE.dtype).log()


def _mean_over_valid(value_T: Tensor, routing: Routing) -> Tensor:
    if routing.valid_T is None:
        return value_T.mean()
    return value_T.masked_fill(~routing.valid_T, 0.0).sum() / routing.valid_T.sum().clamp_min(1)


def _join_E(routing: Routing) -> Tensor:
    assert routing.join_E is not None, "this regularizer needs prices; every router of ROUTERS fills join_E"
    return routing.join_E
