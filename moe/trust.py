"""What bounds a step of test-time training: KL of routings, Fisher matrices, the factor with which a step is allowed.

Shapes: T tokens, E experts, L MoE layers, N factors that are tried at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routing import Routing


def read(*values: Tensor) -> list[float]:
    """Numbers from the device, all at once: what waits for it, waits once."""
    found: list[float] = torch.stack([value.double() for value in values]).tolist()
    return found


def largest_within(scale_N: Tensor, kl_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The largest of some factors whose KL is within the cap, and that KL; 0 and 0 where none is."""
    beyond_N = ~(kl_N <= cap)  # what is not a number is not within it
    scale = scale_N.masked_fill(beyond_N, 0.0).max()
    return scale, kl_N.masked_fill(beyond_N | (scale_N != scale), 0.0).max()


def expected_price(routings: tuple[Routing, ...]) -> Tensor:
    """Σ_e P_e·c̃_e over its own value: 1, with the gradient of log Ê; mean over layers."""
    terms = []
    for routing in routings:
        assert routing.join_E is not None
        price = (routing.log_probs_TE.exp() @ routing.join_E.to(routing.log_probs_TE.dtype)).mean()
        terms.append(price / price.detach().clamp_min(1e-9))
    return torch.stack(terms).mean()


def fisher(logits_TE: Tensor, tau: float) -> Tensor:
    """Mean Fisher matrix of softmax(z/τ) in a bias on z, [E, E]."""
    p_TE = (logits_TE.double() / tau).softmax(-1)
    return (torch.diag(p_TE.mean(0)) - p_TE.T @ p_TE / len(p_TE)) / tau**2


def kl_L(step_LE: Tensor, logits: list[Tensor], tau: float) -> Tensor:
    """KL(softmax(z/τ) ‖ softmax((z + step)/τ)) of every layer, mean over tokens, nats."""
    found = []
    for step_E, z_TE in zip(step_LE, logits, strict=True):
        old_TE = (z_TE.double() / tau).log_softmax(-1)
        new_TE = ((z_TE.double() + step_E.double()) / tau).log_softmax(-1)
        found.append((old_TE.exp() * (old_TE - new_TE)).sum(-1).mean())
    return torch.stack(found)


def kl_of_factors(scale_N: Tensor, step_LE: Tensor, logits: list[Tensor], tau: float) -> Tensor:
    """The largest KL of any layer at each of many factors of a step, [N]; not a number where it cannot be told.

    KL(p ‖ p·e^d/Σ p·e^d) = log Σ p·e^d − Σ p·d: a product of matrices for all factors at once. Every d is taken off
    its largest, so that no power overflows.
    """
    found = []
    for step_E, z_TE in zip(step_LE, logits, strict=True):
        p_TE = (z_TE.double() / tau).softmax(-1)
        d_EN = (step_E.double() - step_E.double().max())[:, None] / tau * scale_N
        kl_N = (p_TE @ d_EN.exp()).log().mean(0) - p_TE.mean(0) @ d_EN
        found.append(kl_N.masked_fill(~torch.isfinite(kl_N), torch.nan))
    return torch.stack(found).max(dim=0).values  # nan wins
