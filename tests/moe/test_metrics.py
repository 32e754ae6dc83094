"""Metrics by hand, and against a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import MoEGPT2LMHeadModel, Routing, RoutingStats, agreement

Route = Callable[..., Routing]
Build = Callable[..., MoEGPT2LMHeadModel]


def chosen(route: Route, expert_TK: list[list[int]], num_experts: int = 4, **fields: Tensor) -> Routing:
    """A routing of these choices; logits 1 for the chosen, 0 for the others."""
    ids = torch.tensor(expert_TK)
    logits_TE = torch.zeros(len(ids), num_experts).scatter(1, ids, 1.0)
    routing = route(logits_TE, k=ids.shape[1], **fields)
    object.__setattr__(routing, "expert_TK", ids)
    return routing


def test_by_hand(route: Route) -> None:
    """8 choices over 4 experts, one of them null: 4, 2, 2, 0."""
    stats = RoutingStats([10, 20, 0, 40])
    stats.update([chosen(route, [[0], [0], [1], [2]])])
    stats.update([chosen(route, [[0], [0], [1], [2]])])
    s = stats.summary()
    assert s.tokens == 8
    assert s.load_LE == [[0.5, 0.25, 0.25, 0.0]]
    assert s.routing_diversity == 0.75
    assert s.dead_experts == 1
    assert s.effective_experts == pytest.approx(math.exp(1.5 * math.log(2)))
    assert s.load_cv == pytest.approx(math.sqrt(2) / 2)
    assert s.max_violation == 1.0
    assert s.open_experts == 2  # the null expert opens nothing
    assert s.mean_selected_width == pytest.approx((4 * 10 + 2 * 20) / 8)
    assert s.dropped_fraction == 0
    assert s.router_margin == pytest.approx(1.0)  # chosen logit 1, the others 0
    assert s.logit_std == pytest.approx(math.sqrt(3) / 4)
    assert s.price_flip_fraction is None
    assert s.unpriced_agreement is None
    assert s.domain_specialisation is None
    assert s.mean_logits_LE[0][0] == 0.5


def test_layers_are_kept_apart(route: Route) -> None:
    stats = RoutingStats([1] * 4)
    stats.update([chosen(route, [[0]] * 4), chosen(route, [[0], [1], [2], [3]])])
    s = stats.summary()
    assert s.layer_effective_experts == pytest.approx([1.0, 4.0])
    assert s.effective_experts == pytest.approx(2.5)
    assert s.layer_diversity == [0.25, 1.0]
    assert s.layer_open_experts == [1.0, 4.0]
    assert s.layer_load_cv == pytest.approx([math.sqrt(3), 0.0])
    assert (s.layer_max_violation, s.max_violation) == ([3.0, 0.0], 1.5)
    assert (s.layer_dead_experts, s.dead_experts) == ([3.0, 0.0], 1.5)
    assert s.layer_dropped_fraction == [0.0, 0.0]
    assert s.layer_unpriced_agreement is None
    assert s.layer_domain_specialisation is None
    quarter = 0.125 * torch.eye(4)
    quarter[0, 0] += 0.5
    assert s.coactivation_EE == quarter.tolist()


def test_open_experts_of_a_position_are_those_of_its_sequences(route: Route) -> None:
    """Two sequences of two tokens, t = b·S + s: {0, 3} and {1, null} in one layer, {0} and {0} in the other."""
    stats = RoutingStats([10, 20, 0, 40])
    stats.update([chosen(route, [[0], [1], [3], [2]]), chosen(route, [[0]] * 4)], sequences=2)
    stats.update([chosen(route, [[2], [2]]), chosen(route, [[2], [2]])], sequences=1)  # the rest of a split
    s = stats.summary()
    assert s.layer_position_open_experts == [1.5, 1.0]
    assert s.position_open_experts == 1.25
    assert s.layer_open_experts == [1.5, 0.5]  # over whole batches


def test_a_position_opens_nothing_for_padding_and_drops(route: Route) -> None:
    """Sequences of three tokens, the first of both padding; one choice of the last is dropped."""
    valid_T = torch.tensor([False, True, True] * 2)
    kept_TK = valid_T[:, None] & torch.tensor([[True]] * 5 + [[False]])
    stats = RoutingStats([1] * 4)
    stats.update(
        [chosen(route, [[3], [0], [0], [3], [1], [2]], kept_TK=kept_TK, valid_T=valid_T)],
        sequences=2,
    )
    assert stats.summary().position_open_experts == 1.5
    stats = RoutingStats([1] * 4)
    stats.update([chosen(route, [[0]])])
    assert stats.summary().position_open_experts is None


def test_drops_agreement_and_domains_by_layer(route: Route) -> None:
    """The second layer drops half, decides against the price alone, and tells the domains apart."""
    kept_TK = torch.tensor([[True], [True], [False], [False]])
    first = chosen(route, [[0], [1], [0], [1]], 2, unpriced_TK=torch.tensor([[0], [1], [0], [1]]))
    second = chosen(
        route, [[0], [1], [0], [1]], 2, kept_TK=kept_TK, dropped_TK=~kept_TK, unpriced_TK=1 - first.expert_TK
    )
    stats = RoutingStats([1, 1], domains=2)
    stats.update([first, second], torch.tensor([0, 1, 1, 0]))
    s = stats.summary()
    assert (s.layer_dropped_fraction, s.dropped_fraction) == ([0.0, 0.5], 0.25)
    assert s.layer_domain_specialisation == pytest.approx([0.0, 1.0])
    assert s.domain_specialisation == pytest.approx(0.5)
    assert s.layer_unpriced_agreement is not None
    own, other = s.layer_unpriced_agreement
    assert own == pytest.approx(1.0)
    assert other is not None
    assert other < 0
    assert s.unpriced_agreement == pytest.approx((1 + other) / 2)


def test_one_domain_specialises_nobody(route: Route) -> None:
    stats = RoutingStats([1] * 4, domains=1)
    stats.update([chosen(route, [[0], [1]])], torch.tensor([0, 0]))
    assert stats.summary().domain_specialisation is None
    assert stats.summary().layer_domain_specialisation == [None]


def test_padding_and_drops(route: Route) -> None:
    kept_TK = torch.tensor([[True, True], [True, False], [False, False]])
    dropped_TK = torch.tensor([[False, False], [False, True], [False, False]])
    routing = chosen(
        route,
        [[0, 1], [0, 1], [2, 3]],
        kept_TK=kept_TK,
        dropped_TK=dropped_TK,
        valid_T=torch.tensor([True, True, False]),
    )
    stats = RoutingStats([1] * 4)
    stats.update([routing])
    s = stats.summary()
    assert s.tokens == 2
    assert s.load_LE == [pytest.approx([2 / 3, 1 / 3, 0, 0])]
    assert s.dropped_fraction == pytest.approx(0.25)


def test_domains(route: Route) -> None:
    told, blind = RoutingStats([1] * 4, domains=2), RoutingStats([1] * 4, domains=2)
    domain_T = torch.tensor([0, 0, 1, 1])
    told.update([chosen(route, [[0], [1], [2], [3]])], domain_T)
    blind.update([chosen(route, [[0], [1], [0], [1]])], domain_T)
    assert told.summary().domain_specialisation == pytest.approx(1.0)
    assert blind.summary().domain_specialisation == pytest.approx(0.0, abs=1e-12)
    assert told.summary().domain_load_LME == [[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]]


def test_coactivation(route: Route) -> None:
    stats = RoutingStats([1] * 3)
    stats.update([chosen(route, [[0, 1], [0, 1], [0, 2], [1, 2]], 3)])
    together = stats.summary().coactivation_LEE[0]
    assert together == [[0.75, 0.5, 0.25], [0.5, 0.75, 0.25], [0.25, 0.25, 0.5]]


def test_price_flips(route: Route) -> None:
    routing = chosen(route, [[0], [0], [1], [1]], 2, unpriced_TK=torch.tensor([[0], [1], [1], [0]]))
    stats = RoutingStats([1, 1])
    stats.update([routing])
    s = stats.summary()
    assert s.price_flip_fraction == 0.5
    assert s.unpriced_agreement == pytest.approx(0.0)


def test_every_k_margin_is_undefined_where_all_are_chosen(route: Route) -> None:
    stats = RoutingStats([1, 1])
    stats.update([chosen(route, [[0, 1], [1, 0]], 2)])
    assert stats.summary().router_margin is None


def test_misuse_is_named(route: Route) -> None:
    with pytest.raises(ValueError, match="at least one valid token"):
        RoutingStats([1]).summary()
    with pytest.raises(ValueError, match="one per MoE layer, got none"):
        RoutingStats([1]).update([])
    with pytest.raises(ValueError, match="domain_T: expected ids for domains=2"):
        RoutingStats([1] * 4, domains=2).update([chosen(route, [[0]])])


def test_batches_add_up(tiny: Build, ids: Tensor) -> None:
    model = tiny(router="energy", energy_lambda=0.5).eval()
    whole, parts = RoutingStats(model.config.expert_widths), RoutingStats(model.config.expert_widths)
    with torch.no_grad():
        whole.update(model(ids, output_routing=True).routing)
        for row in ids:
            parts.update(model(row[None], output_routing=True).routing)
    a, b = whole.summary(), parts.summary()
    assert a.load_LE == b.load_LE
    assert a.effective_experts == b.effective_experts
    assert a.logit_std == pytest.approx(b.logit_std, rel=1e-5)
    assert a.open_experts >= b.open_experts


# Agreement


def test_agreement_of_a_router_with_itself_is_1() -> None:
    expert_TK = torch.rand(50, 6).topk(2).indices
    assert agreement(expert_TK, None, expert_TK.flip(1), None, 6) == pytest.approx(1.0)


def test_independent_routers_agree_by_chance_however_skewed() -> None:
    """K/E as chance would call the skewed pair alike."""
    generator = torch.Generator().manual_seed(0)
    for skew in (0.0, 3.0):
        bias_E = torch.tensor([skew, 0.0, 0.0, 0.0])
        a, b = ((torch.randn(20_000, 4, generator=generator) + bias_E).topk(2).indices for _ in range(2))
        value = agreement(a, None, b, None, 4)
        assert value is not None
        assert abs(value) < 0.02


def test_agreement_is_undefined_where_chance_is_certain() -> None:
    every = torch.tensor([[0, 1], [1, 0]])
    assert agreement(every, None, every, None, 2) is None
    constant = torch.zeros(5, 1, dtype=torch.int64)
    assert agreement(constant, None, constant, None, 4) is None


def test_opposite_routers_disagree_below_chance() -> None:
    a = torch.tensor([[0], [1], [0], [1]])
    assert agreement(a, None, 1 - a, None, 2) == pytest.approx(-1.0)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_agreement_equals_a_plain_loop(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = 40, 5
    ids = [torch.rand(tokens, experts, generator=generator).topk(k).indices for _ in range(2)]
    kept = [torch.rand(tokens, k, generator=generator) > 0.3 for _ in range(2)]
    sets = []
    for expert_TK, kept_TK in zip(ids, kept, strict=True):
        rows = zip(expert_TK.tolist(), kept_TK.tolist(), strict=True)
        sets.append([{e for e, keep in zip(row, mask, strict=True) if keep} for row, mask in rows])
    size = sum(len(s) for side in sets for s in side)
    observed = 2 * sum(len(a & b) for a, b in zip(*sets, strict=True)) / size
    rates = [[sum(e in s for s in side) / tokens for e in range(experts)] for side in sets]
    chance = 2 * tokens * sum(a * b for a, b in zip(*rates, strict=True)) / size
    assert agreement(ids[0], kept[0], ids[1], kept[1], experts) == pytest.approx((observed - chance) / (1 - chance))
