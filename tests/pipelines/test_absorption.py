"""The audit finds drift along the price, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe import ROUTERS, MoEGPT2Config, RoutingStats, RoutingSummary, Tokens
from pipelines.absorption import absorption, slope

PRICE = [1.0, 0.5, 0.25, 0.0]


def summary(offsets_LE: torch.Tensor, scale: float = 1.0, energy_lambda: float = 1.0) -> RoutingSummary:
    """Routings of fixed inputs, logits moved by `offsets_LE` after being scaled."""
    stats = RoutingStats([64, 32, 16, 0])
    routings = []
    for layer, offset_E in enumerate(offsets_LE):
        torch.manual_seed(layer)
        config = MoEGPT2Config(n_embd=16, n_head=2, n_layer=2, expert_widths=[64, 32, 16, 0], router="energy")
        router = ROUTERS["energy"](config, layer).eval()
        router.join_E.copy_(torch.tensor(PRICE))
        router.energy_lambda.fill_(energy_lambda)
        router.offset_E.copy_(offset_E)
        x_TD = scale * torch.randn(256, 16, generator=torch.Generator().manual_seed(7))
        routings.append(router(x_TD, Tokens(batch_size=1, position_T=torch.arange(256))))
    with torch.no_grad():
        stats.update(routings)
    return stats.summary()


def test_a_gate_that_learns_the_price_away_is_found_out() -> None:
    price_E = torch.tensor(PRICE)
    start = summary(torch.zeros(2, 4))
    now = summary(torch.stack([0.8 * price_E + 3.0, torch.zeros(4)]))
    found = absorption(start, now, PRICE, temperature=0.5)
    assert found.drift_L == pytest.approx([0.8, 0.0], abs=1e-5)  # a shift of all logits is no drift
    assert found.undone_L == pytest.approx([1.6, 0.0], abs=1e-5)
    assert found.drift == pytest.approx(0.4, abs=1e-5)
    assert found.undone == pytest.approx(0.8, abs=1e-5)
    assert found.logit_std_L == now.layer_logit_std


def test_drift_across_the_price_is_none() -> None:
    across = np.array([1.0, -2.0, -1.0, 1.0])
    across -= across.mean() + slope(np.array(PRICE), across) * (np.array(PRICE) - np.mean(PRICE))
    start, now = summary(torch.zeros(2, 4)), summary(torch.tensor(np.stack([across, across]), dtype=torch.float32))
    assert absorption(start, now, [PRICE, PRICE], temperature=1.0).drift_L == pytest.approx([0.0, 0.0], abs=1e-5)


def test_equal_prices_have_no_direction() -> None:
    start, now = summary(torch.zeros(1, 4)), summary(torch.ones(1, 4))
    assert absorption(start, now, [0.7] * 4, temperature=1.0).drift_L == [0.0]


def test_larger_logits_shrink_the_share_that_the_price_decides() -> None:
    small, large = summary(torch.zeros(2, 4)), summary(torch.zeros(2, 4), scale=20.0)
    found = absorption(small, large, PRICE, temperature=1.0)
    assert small.layer_flip_fraction is not None
    assert found.flip_L is not None
    for before, after in zip(small.layer_flip_fraction, found.flip_L, strict=True):
        assert after < 0.3 * before
    assert min(found.logit_std_L) > 10 * max(small.layer_logit_std)


def test_without_lambda_nothing_flips() -> None:
    free = summary(torch.zeros(2, 4), energy_lambda=0.0)
    assert free.layer_flip_fraction == [0.0, 0.0]
