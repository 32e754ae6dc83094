"""Agreement with another router and with the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe import MoEGPT2LMHeadModel
from moe.probes import agreement_between, forcing, oracle_agreement, oracle_losses

Build = Callable[..., MoEGPT2LMHeadModel]


def token_losses(model: MoEGPT2LMHeadModel, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def test_the_oracle_forces_one_token_at_a_time(tiny: Build, ids: Tensor) -> None:
    """Equals the plain way: for every position and expert, one forward in which that token alone is forced."""
    model = tiny(n_layer=2, expert_widths=[64, 32, 0]).double().eval()
    ids = ids[:2, :7]
    losses = oracle_losses(model, ids, 0)
    assert losses.shape == (2, 6, 3)
    for position in range(6):
        forced_T = (torch.arange(7) == position).repeat(2)
        with forcing(model, 0, forced_T) as forced:
            for forced.expert in range(3):
                expected = token_losses(model, ids)[:, position]
                torch.testing.assert_close(losses[:, position, forced.expert].double(), expected, atol=2e-6, rtol=1e-6)


@torch.no_grad()
def test_k_1_as_trained_is_among_the_forced(tiny: Build, ids: Tensor) -> None:
    model = tiny(num_experts_per_tok=1).eval()
    chosen_BS = model(ids, output_routing=True).routing[1].expert_TK.view(ids.shape)
    losses = oracle_losses(model, ids, 1).gather(-1, chosen_BS[:, :-1, None]).squeeze(-1)
    torch.testing.assert_close(losses, token_losses(model, ids), atol=1e-5, rtol=1e-5)


def test_oracle_agreement(tiny: Build) -> None:
    model = tiny(num_experts_per_tok=1)
    batches = list(torch.randint(2, 97, (4, 18, 30), generator=torch.Generator().manual_seed(0)))
    value = oracle_agreement(model, batches, 0)
    assert value is not None
    assert -0.2 < value < 0.2  # an untrained router knows nothing of what would help
    with pytest.raises(ValueError, match="at least 2048 predicted tokens, got 522"):
        oracle_agreement(model, batches[:1], 0)


def test_a_perfect_router_agrees_with_the_oracle(tiny: Build) -> None:
    """Give the layer the oracle's own choices: agreement is 1."""
    model = tiny(num_experts_per_tok=1, n_layer=1).eval()
    batches = [torch.randint(2, 97, (80, 30), generator=torch.Generator().manual_seed(0))]
    best = oracle_losses(model, batches[0], 0).argmin(-1)
    best_T = F.pad(best, (0, 1)).flatten()
    router = model.routers[0]

    def answer(_m: object, _args: object, routing: object) -> object:
        if routing.expert_TK.shape[0] == len(best_T):  # type: ignore[attr-defined]
            routing.expert_TK.copy_(best_T[:, None])  # type: ignore[attr-defined]
        return routing

    handle = router.register_forward_hook(answer)
    assert oracle_agreement(model, batches, 0) == pytest.approx(1.0)
    handle.remove()


def test_agreement_between_models(tiny: Build, ids: Tensor, left_padding: Tensor) -> None:
    model, same, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert agreement_between(model, same, ids, left_padding) == pytest.approx([1.0, 1.0])
    values = agreement_between(model, other, ids, left_padding)
    assert all(value is not None and value < 0.7 for value in values)
    permuted = tiny(seed=1, router="permuted")
    assert all(value is not None and value < 0.5 for value in agreement_between(tiny(seed=1), permuted, ids))
    with pytest.raises(ValueError, match="as many experts"):
        agreement_between(model, tiny(expert_widths=[64, 64]), ids)
