"""Open sets against brute force in float64, and what the routers make of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe import ROUTERS, MoEGPT2Config, Router, Tokens
from moe.opening import every_set, first_choices, open_sets, swapped_sets


def worth(score_BE: np.ndarray, open_E: np.ndarray, price_E: np.ndarray, k: int) -> float:
    """Value of an open set, in float64: each sequence takes its k best open experts."""
    best = np.sort(np.where(open_E, score_BE, -np.inf), axis=1)[:, -k:]
    return float(best.sum() - price_E[open_E].sum())


def brute_force(score_BE: np.ndarray, price_E: np.ndarray, k: int) -> float:
    """The best of all 2^E sets."""
    num_experts = len(price_E)
    member_GE = (np.arange(2**num_experts)[:, None] >> np.arange(num_experts)) & 1 == 1
    member_GE = member_GE[member_GE.sum(axis=1) >= k]
    best = [np.full((len(member_GE), len(score_BE)), -np.inf) for _ in range(k)]
    for e in range(num_experts):
        value_GB = np.where(member_GE[:, e : e + 1], score_BE[:, e], -np.inf)
        for i in range(k):
            best[i], value_GB = np.maximum(best[i], value_GB), np.minimum(best[i], value_GB)
    return float((sum(best).sum(axis=1) - member_GE @ price_E).max())


def instance(seed: int, num_experts: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores [B, E], prices [E] and K: batches of 1 to 64, spreads of 0.1 to 3 nats, prices from nothing to half the
    batch's spread, null experts and popular ones among them."""
    rng = np.random.default_rng(seed)
    batch, k, spread = int(rng.choice([1, 2, 8, 32, 64])), int(rng.integers(1, 5)), 10 ** rng.uniform(-1, 0.5)
    popular_E = rng.normal(size=num_experts) * rng.choice([0.0, 1.0])
    score_BE = spread * (rng.normal(size=(batch, num_experts)) + popular_E)
    width_E = rng.choice([0.0, 0.25, 0.5, 1.0], size=num_experts)
    price_E = width_E * spread * batch * rng.choice([0.0, 0.02, 0.1, 0.5])
    return score_BE, price_E, k


def regrets(num_experts: int, count: int = 1000) -> np.ndarray:
    """Regret per sequence, nats, of the set that is chosen in float32."""
    found = []
    for seed in range(count):
        score_BE, price_E, k = instance(seed, num_experts)
        score_BSE, price = (
            torch.tensor(score_BE, dtype=torch.float32)[:, None],
            torch.tensor(price_E, dtype=torch.float32),
        )
        open_E = open_sets(score_BSE, price, k)[0].numpy()
        assert open_E.sum() >= k
        found.append((brute_force(score_BE, price_E, k) - worth(score_BE, open_E, price_E, k)) / len(score_BE))
    return np.array(found)


@pytest.mark.parametrize("num_experts", [5, 8])
def test_up_to_8_experts_the_set_is_the_best_of_all(num_experts: int) -> None:
    regret = regrets(num_experts, count=300)
    assert regret.min() > -1e-6
    assert regret.max() < 1e-5  # the rounding of float32


@pytest.mark.slow
def test_1000_instances_of_each_search() -> None:
    """The distributions that docs/routing.md states: the best set every time, but for the rounding of float64."""
    for num_experts in (8, 10):
        assert np.abs(regrets(num_experts)).max() < 1e-14, num_experts


def test_beyond_8_the_search_is_nearly_always_the_best() -> None:
    regret = regrets(10, count=60)
    assert (regret < 1e-5).mean() >= 0.95
    assert regret.mean() < 0.002


def test_both_searches_agree_where_both_can() -> None:
    for seed in range(20):
        score_BE, price_E, k = instance(seed, 8)
        arrays = torch.tensor(score_BE, dtype=torch.float64)[:, None], torch.tensor(price_E)
        exact, search = every_set(*arrays, k)[0].numpy(), swapped_sets(*arrays, k)[0].numpy()
        assert worth(score_BE, search, price_E, k) <= worth(score_BE, exact, price_E, k) + 1e-9


@pytest.mark.parametrize("search", [every_set, swapped_sets, lambda s, p, k, v: first_choices(s, k, v)])
def test_padding_neither_wants_nor_counts(search: Any) -> None:
    torch.manual_seed(0)
    score_BSE, price_E = torch.randn(6, 3, 8, dtype=torch.float64), torch.full((8,), 0.7, dtype=torch.float64)
    valid_BS = torch.ones(6, 3, dtype=torch.bool)
    valid_BS[4:, 1] = False
    padded = search(score_BSE, price_E, 2, valid_BS)
    short = search(score_BSE[:4], price_E, 2, None)
    full = search(score_BSE, price_E, 2, None)
    assert torch.equal(padded[1], short[1])
    assert torch.equal(padded[[0, 2]], full[[0, 2]])


@pytest.mark.parametrize("num_experts", [6, 12])
def test_a_higher_price_opens_fewer(num_experts: int) -> None:
    torch.manual_seed(1)
    score_BSE, sizes = torch.randn(32, 20, num_experts), []
    for price in (0.0, 1.0, 4.0, 16.0, 1000.0):
        sizes.append(float(open_sets(score_BSE, torch.full((num_experts,), price), 2).sum(dim=1).float().mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= num_experts - 1  # an expert that nobody takes may be closed
    assert sizes[-1] == 2.0


def make(name: str, **keys: Any) -> Router:
    torch.manual_seed(0)
    base = {"n_embd": 16, "n_head": 2, "n_layer": 1, "expert_widths": [64] * 6, "num_experts_per_tok": 2}
    return ROUTERS[name](MoEGPT2Config(**(base | keys), router=name), 0).eval()


def tokens_of(batch: int, length: int) -> Tokens:
    return Tokens(batch_size=batch, position_T=torch.arange(length).repeat(batch))


def distinct_S(expert_TK: Tensor, batch: int) -> list[int]:
    """Experts open at each position."""
    per_position = expert_TK.view(batch, -1, expert_TK.shape[-1]).transpose(0, 1).flatten(1)
    return [len(set(row)) for row in per_position.tolist()]


@pytest.mark.parametrize("name", ["opening", "piggyback"])
def test_a_position_sees_no_other_position(name: str) -> None:
    """The set of each position is that of the call cut down to it: nothing sees the future, or the past."""
    router, x_BSD = make(name, energy_lambda=0.5), 3 * torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2))
    whole = router(x_BSD.flatten(0, 1), tokens_of(4, 5)).expert_TK.view(4, 5, 2)
    for s in range(5):
        alone = router(x_BSD[:, s], tokens_of(4, 1)).expert_TK
        assert torch.equal(whole[:, s], alone)


def test_opening_without_a_price_of_opening_is_energy() -> None:
    x_TD = 3 * torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    routings = []
    for name in ("energy", "opening"):
        router = make(name, energy_lambda=0.4)
        router.join_E.copy_(torch.linspace(0, 2, 6))
        router.open_E.zero_()
        routings.append(router(x_TD, tokens_of(8, 5)))
    assert torch.equal(routings[0].expert_TK, routings[1].expert_TK)
    assert torch.equal(routings[0].weight_TK, routings[1].weight_TK)


def test_opening_opens_fewer_experts_the_dearer_they_are() -> None:
    x_TD = 3 * torch.randn(32 * 4, 16, generator=torch.Generator().manual_seed(2))
    router, counts = make("opening"), []
    for energy_lambda in (0.0, 5.0, 20.0, 80.0, 1e4):
        router.energy_lambda.fill_(energy_lambda)
        counts.append(sum(distinct_S(router(x_TD, tokens_of(32, 4)).expert_TK, 32)))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2 * 4
    assert counts[0] > 20


def test_piggyback_keeps_the_first_choice_and_opens_nothing_for_the_others() -> None:
    x_TD = 3 * torch.randn(12 * 4, 16, generator=torch.Generator().manual_seed(2))
    piggyback, plain = make("piggyback")(x_TD, tokens_of(12, 4)), make("topk")(x_TD, tokens_of(12, 4))
    first_TK = plain.expert_TK[:, :1]
    assert torch.equal(piggyback.expert_TK[:, :1], first_TK)
    for mine, first in zip(distinct_S(piggyback.expert_TK, 12), distinct_S(first_TK, 12), strict=True):
        assert mine == max(first, 2)


def test_decoding_with_a_cache_agrees_with_one_pass() -> None:
    """Sets are chosen per position, so that a batch decoded step by step gets the sets of one teacher-forced pass."""
    from moe import MoEGPT2LMHeadModel

    for name in ("opening", "piggyback"):
        torch.manual_seed(0)
        config = MoEGPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=32, bos_token_id=0, eos_token_id=1,
            expert_widths=[64] * 6, router=name, energy_lambda=0.3, initializer_range=0.2,
        )  # fmt: skip
        model = MoEGPT2LMHeadModel(config).eval()
        ids_BS = torch.randint(2, 97, (5, 8))
        with torch.no_grad():
            whole = model(ids_BS).logits
            cache, steps = None, []
            for s in range(8):
                output = model(ids_BS[:, s : s + 1], past_key_values=cache, use_cache=True)
                cache, steps = output.past_key_values, [*steps, output.logits]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_every_pair_of_experts_can_be_reached() -> None:
    """With K = 2 and one sequence the set is that sequence's own top 2, whatever opening costs alike."""
    torch.manual_seed(3)
    score_BSE = torch.randn(1, 200, 6)
    open_SE = open_sets(score_BSE, torch.full((6,), 3.0), 2)
    top_SK = score_BSE[0].topk(2).indices
    assert torch.equal(open_SE.int().topk(2).values, torch.ones(200, 2, dtype=torch.int32))
    assert open_SE.gather(1, top_SK).all()
    assert {tuple(sorted(pair)) for pair in top_SK.tolist()} == set(itertools.combinations(range(6), 2))
