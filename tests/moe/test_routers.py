"""One conformance suite that every router passes, then what is particular to each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import ROUTERS, MoEGPT2Config, Router, Routing, Tokens
from moe.hashing import hash_TE, permute_tokens
from moe.metrics import inclusion_TE
from moe.routing import count_E

D, E, K = 16, 6, 2
PRICED = sorted(name for name, router in ROUTERS.items() if router.priced)
LEARNED = sorted(name for name, router in ROUTERS.items() if router.learned)


def make(
    name: str, *, training: bool = False, layer: int = 0, dtype: torch.dtype = torch.float32, **keys: Any
) -> Router:
    torch.manual_seed(0)
    base = {"n_embd": D, "n_head": 2, "n_layer": 2, "vocab_size": 50, "expert_widths": [64] * E}
    config = MoEGPT2Config(**(base | {"num_experts_per_tok": K} | keys), router=name)
    return ROUTERS[name](config, layer).to(dtype).train(training)


def text(
    batch: int = 3, length: int = 8, *, padded: bool = False, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = scale * torch.randn(batch * length, D, generator=generator)
    valid_T = torch.rand(batch * length, generator=generator) > 0.4 if padded else None
    id_T = torch.randint(0, 50, (batch * length,), generator=generator)
    return x_TD, Tokens(batch_size=batch, position_T=torch.arange(length).repeat(batch), id_T=id_T, valid_T=valid_T)


def taken(routing: Routing) -> Tensor:
    return inclusion_TE(routing.expert_TK, routing.kept(), routing.num_experts)


# Conformance: every member, in training and evaluation, padded and not


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_routing_is_well_formed(name: str, training: bool, padded: bool) -> None:
    router, (x_TD, tokens) = make(name, training=training, energy_lambda=0.3), text(padded=padded)
    routing = router(x_TD, tokens)
    kept_TK = routing.kept()
    assert routing.logits_TE.shape == routing.log_probs_TE.shape == (24, E)
    assert routing.expert_TK.shape == routing.weight_TK.shape == kept_TK.shape
    assert routing.expert_TK.dtype == torch.int64
    assert routing.expert_TK.min() >= 0
    assert routing.expert_TK.max() < E
    assert routing.logits_TE.dtype == routing.weight_TK.dtype == torch.float32
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(24))
    # a kept choice is an expert of its own
    assert torch.equal(taken(routing).sum(dim=1), kept_TK.sum(dim=1))
    assert (routing.weight_TK[~kept_TK] == 0).all()
    assert (routing.weight_TK >= 0).all()
    assert routing.join_E is not None
    if tokens.valid_T is not None:
        assert not kept_TK[~tokens.valid_T].any()
    if routing.dropped_TK is None:  # weights sum to 1, so that equal experts equal the dense FFN
        torch.testing.assert_close(routing.weight_TK.sum(1), routing.valid().float())


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_the_same_seed_gives_the_same_routing(name: str) -> None:
    x_TD, tokens = text()
    for training in (False, True):
        routings = []
        for _ in range(2):
            router = make(name, training=training, router_jitter=0.1)
            torch.manual_seed(5)
            routings.append(router(x_TD, tokens))
        assert torch.equal(routings[0].expert_TK, routings[1].expert_TK)
        assert torch.equal(routings[0].weight_TK, routings[1].weight_TK)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_forward_changes_no_buffer(name: str) -> None:
    router, (x_TD, tokens) = make(name, training=True, bias_balance_rate=0.1), text()
    before = {key: value.clone() for key, value in router.named_buffers()}
    router(x_TD, tokens)
    assert all(torch.equal(value, before[key]) for key, value in router.named_buffers())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(name for name, router in ROUTERS.items() if router.causal))
def test_a_causal_router_sees_no_later_token(name: str, training: bool) -> None:
    """Changing the second half of the only sequence leaves the first half's routing alone: what capacity drops too."""
    router, (x_TD, tokens) = make(name, training=training, capacity_factor=0.3), text(batch=1)
    assert tokens.id_T is not None
    changed_TD, changed_id_T = x_TD.clone(), tokens.id_T.clone()
    changed_TD[4:] += 7.0
    changed_id_T[4:] = 3
    later = Tokens(batch_size=1, position_T=tokens.position_T, id_T=changed_id_T)
    routings = []
    for call in ((x_TD, tokens), (changed_TD, later)):
        torch.manual_seed(5)  # `random` draws afresh
        routings.append(router(*call))
    first, second = routings
    assert torch.equal(first.expert_TK[:4], second.expert_TK[:4])
    assert torch.equal(first.kept()[:4], second.kept()[:4])
    torch.testing.assert_close(first.weight_TK[:4], second.weight_TK[:4])
    assert training is False or not router.drops or not first.kept()[:4].all()  # there is something to see


def test_permuted_says_that_it_is_not_causal() -> None:
    assert [name for name, router in ROUTERS.items() if not router.causal] == ["permuted"]


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_uniform_price_changes_no_decision(name: str) -> None:
    x_TD, tokens = text()
    router = make(name, energy_lambda=0.0)
    free = router(x_TD, tokens)
    router.energy_lambda.fill_(5.0)
    router.join_E.fill_(0.7)
    router.open_E.zero_()  # opening an expert has a price of its own, even where all cost the same
    priced = router(x_TD, tokens)
    assert torch.equal(free.expert_TK, priced.expert_TK)
    assert torch.equal(free.weight_TK, priced.weight_TK)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_prices_of_opening_act_on_opening_alone(name: str, training: bool) -> None:
    x_TD, tokens = text(padded=True)
    router = make(name, training=training, energy_lambda=2.0, expert_widths=[128, 64, 32, 64, 16, 0])
    routings = []
    for seed in range(4):
        router.open_E.copy_(50 * seed * torch.rand(E, generator=torch.Generator().manual_seed(seed)))
        torch.manual_seed(5)
        routings.append(router(x_TD, tokens))
    free, *priced = routings
    for routing in priced:
        assert torch.equal(free.expert_TK, routing.expert_TK) is (name != "opening")
        assert torch.equal(free.weight_TK, routing.weight_TK) is (name != "opening")


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_unequal_prices_act_on_priced_routers_alone(name: str) -> None:
    x_TD, tokens = text(batch=20)
    router = make(name, energy_lambda=0.0)
    router.join_E.copy_(torch.linspace(0, 2, E))
    free = count_E((a := router(x_TD, tokens)).expert_TK, a.kept(), E)
    router.energy_lambda.fill_(2.0)
    priced = count_E((b := router(x_TD, tokens)).expert_TK, b.kept(), E)
    if not router.priced:
        assert torch.equal(free, priced)
        return
    price_E = router.join_E.double()
    assert (priced * price_E).sum() < 0.8 * (free * price_E).sum()
    assert priced[0] > free[0]
    assert priced[-1] < free[-1]


@pytest.mark.parametrize("name", sorted(set(LEARNED) - {"topp"}))
def test_temperature_alone_changes_no_top_k(name: str) -> None:
    x_TD, tokens = text()
    router = make(name)
    plain = router(x_TD, tokens)
    router.temperature.fill_(0.25)
    sharp = router(x_TD, tokens)
    assert torch.equal(plain.expert_TK, sharp.expert_TK)
    assert not torch.allclose(plain.weight_TK, sharp.weight_TK)


@pytest.mark.parametrize("name", LEARNED)
def test_balancing_bias_selects_and_does_not_mix(name: str) -> None:
    x_TD, tokens = text()
    router = make(name, bias_balance_rate=0.1, num_experts_per_tok=E)  # K = E: only the mixture can differ
    plain = router(x_TD, tokens)
    router.bias_E.copy_(torch.randn(E))
    biased = router(x_TD, tokens)
    dense = [torch.zeros(24, E).scatter(1, r.expert_TK, r.weight_TK) for r in (plain, biased)]
    if name != "topp":  # its set depends on the bias, and so does what it is normalised over
        torch.testing.assert_close(*dense)
    router = make(name, bias_balance_rate=0.1)
    router.bias_E[3] = 100.0
    assert taken(router(x_TD, tokens))[:, 3].all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LEARNED)
def test_the_gate_learns_from_the_mixture(name: str, k: int) -> None:
    router, (x_TD, tokens) = make(name, training=True, num_experts_per_tok=k, router_top_p=0.4), text()
    routing = router(x_TD, tokens)
    value_TK = torch.randn(routing.weight_TK.shape, generator=torch.Generator().manual_seed(1))
    (routing.weight_TK * value_TK).sum().backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.abs().max() > 1e-4


def test_k_1_mixes_with_the_gradient_of_log_p() -> None:
    router, (x_TD, tokens) = make("topk", num_experts_per_tok=1, dtype=torch.float64), text()
    routing = router(x_TD.double(), tokens)
    assert (routing.weight_TK == 1).all()
    straight = torch.autograd.grad(routing.weight_TK.sum(), router.gate.weight, retain_graph=True)[0]
    log_p = routing.log_probs_TE.gather(-1, routing.expert_TK).sum()
    torch.testing.assert_close(straight, torch.autograd.grad(log_p, router.gate.weight)[0])


@pytest.mark.parametrize("name", LEARNED)
def test_logits_are_float32_in_a_bfloat16_model(name: str) -> None:
    router, (x_TD, tokens) = make(name), text()
    router.to(torch.bfloat16)
    assert router.join_E.dtype == router.energy_lambda.dtype == torch.float32
    assert router(x_TD.bfloat16(), tokens).logits_TE.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(name)(x_TD, tokens).logits_TE.dtype == torch.float32


@pytest.mark.parametrize("name", LEARNED)
def test_jitter_acts_in_training_alone(name: str) -> None:
    router, (x_TD, tokens) = make(name, router_jitter=0.3), text()
    still = make(name)(x_TD, tokens).logits_TE
    assert torch.equal(router(x_TD, tokens).logits_TE, still)
    assert not torch.equal(router.train()(x_TD, tokens).logits_TE, still)


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("experts", [1, 3])
def test_k_equal_to_e_takes_every_expert(name: str, experts: int) -> None:
    router = make(name, expert_widths=[64] * experts, num_experts_per_tok=experts, router_top_p=1.0)
    x_TD, tokens = text()
    assert taken(router(x_TD, tokens)).all()


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_no_token_at_all(name: str) -> None:
    router, (x_TD, tokens) = make(name, training=True), text()
    assert tokens.id_T is not None
    none = Tokens(batch_size=0, position_T=tokens.position_T[:0], id_T=tokens.id_T[:0])
    assert router(x_TD[:0], none).expert_TK.shape[0] == 0


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_routers_compile_without_a_graph_break(name: str) -> None:
    router, (x_TD, tokens) = make(name, energy_lambda=0.3, bias_balance_rate=0.1), text(padded=True)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    eager, graph = router(x_TD, tokens), compiled(x_TD, tokens)
    assert torch.equal(eager.expert_TK, graph.expert_TK)
    torch.testing.assert_close(eager.weight_TK, graph.weight_TK)


# capacity


@given(
    seed=st.integers(0, 10**6),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.25, 4.0]),
    k=st.integers(1, E),
    padded=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_capacity_drops_late_comers_and_nobody_else(seed: int, factor: float, k: int, padded: bool) -> None:
    router = make("capacity", training=True, capacity_factor=factor, num_experts_per_tok=k)
    x_TD, tokens = text(seed=seed, padded=padded)
    routing = router(x_TD, tokens)
    valid_T = routing.valid()
    capacity = math.ceil(round(factor * k * int(valid_T.sum()) / E, 6))
    places, kept_TK = dict.fromkeys(range(E), 0), routing.kept()
    for t, e_K in enumerate(routing.expert_TK.tolist()):  # first come, first served
        for slot, e in enumerate(e_K):
            expected = bool(valid_T[t]) and places[e] < capacity
            places[e] += bool(valid_T[t])
            assert bool(kept_TK[t, slot]) == expected
    assert routing.dropped_TK is not None
    assert torch.equal(kept_TK | routing.dropped_TK, valid_T[:, None].expand_as(kept_TK))


def test_capacity_drops_nothing_in_evaluation() -> None:
    router, (x_TD, tokens) = make("capacity", capacity_factor=0.1), text()
    assert router(x_TD, tokens).kept().all()


# topp


@given(seed=st.integers(0, 10**6), p=st.floats(0.05, 0.99))
@settings(max_examples=25, deadline=None)
def test_topp_takes_the_smallest_set_above_the_threshold(seed: int, p: float) -> None:
    router = make("topp", router_top_p=p, dtype=torch.float64)
    x_TD, tokens = text(seed=seed, scale=0.5)
    routing = router(x_TD.double(), tokens)
    probs_TE, set_TE = routing.probs_TE, taken(routing)
    mass_T = (probs_TE * set_TE).sum(1)
    assert (mass_T > p - 1e-12).all()
    least_T = probs_TE.masked_fill(~set_TE, 2.0).amin(1)
    assert (mass_T - least_T <= p + 1e-12).all()  # without its least member it would fall short
    assert (least_T >= probs_TE.masked_fill(set_TE, 0.0).amax(1)).all()


def test_topp_k_varies() -> None:
    x_TD, tokens = text()
    sizes = make("topp", router_top_p=0.5)(x_TD, tokens).kept().sum(1)
    assert sizes.min() < sizes.max()


# energy


def test_energy_mixes_without_the_price_and_counts_what_it_would_have_chosen() -> None:
    router, (x_TD, tokens) = make("energy", energy_lambda=1.0), text()
    router.join_E.copy_(torch.linspace(0, 2, E))
    routing = router(x_TD, tokens)
    torch.testing.assert_close(routing.weight_TK, routing.logits_TE.gather(1, routing.expert_TK).softmax(-1))
    expected_TK = (routing.logits_TE - torch.linspace(0, 2, E)).topk(K).indices
    assert torch.equal(routing.expert_TK, expected_TK)
    assert routing.unpriced_TK is not None
    assert torch.equal(routing.unpriced_TK, routing.logits_TE.topk(K).indices)
    assert torch.equal(routing.demand()[0], routing.unpriced_TK)


# controls


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_permuted_has_the_load_of_the_router_it_shuffles(training: bool, padded: bool) -> None:
    x_TD, tokens = text(batch=20, padded=padded)
    keys: dict[str, Any] = {"training": training, "energy_lambda": 0.5, "expert_widths": [16, 32, 64, 64, 128, 0]}
    energy, shuffled = make("energy", **keys)(x_TD, tokens), make("permuted", **keys)(x_TD, tokens)
    assert torch.equal(count_E(energy.expert_TK, energy.kept(), E), count_E(shuffled.expert_TK, shuffled.kept(), E))
    assert not torch.equal(energy.expert_TK, shuffled.expert_TK)


def test_a_permutation_moves_valid_tokens_among_themselves() -> None:
    valid_T = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    tokens = Tokens(batch_size=1, position_T=torch.arange(8), id_T=torch.arange(8), valid_T=valid_T)
    for fresh in (False, True):
        source_T = permute_tokens(tokens, 3, fresh=fresh)
        assert torch.equal(source_T.sort().values, torch.arange(8))
        assert torch.equal(valid_T[source_T], valid_T)


def test_random_is_uniform_and_differs_between_layers_and_positions() -> None:
    length = 4000
    tokens = Tokens(batch_size=1, position_T=torch.arange(length), id_T=torch.zeros(length, dtype=torch.int64))
    x_TD = torch.zeros(length, D)
    first, second = (make("random", layer=layer)(x_TD, tokens) for layer in (0, 1))
    for routing in (first, second, make("random", training=True)(x_TD, tokens)):
        n_E = count_E(routing.expert_TK, routing.kept(), E).double()
        expected = K * length / E  # K draws without replacement vary less than multinomial ones
        assert ((n_E - expected).square().sum() / expected) < 20.5  # χ², 5 degrees of freedom, p = 0.001
    overlap = (taken(first) & taken(second)).sum() / (K * length)
    assert abs(float(overlap) - K / E) < 0.03


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(set(ROUTERS) - set(LEARNED)))
def test_temperature_jitter_and_balancing_do_nothing_without_a_gate(name: str, training: bool) -> None:
    x_TD, tokens = text()
    routings = []
    for keys in ({}, {"router_temperature": 0.1, "router_jitter": 0.5, "bias_balance_rate": 0.5}):
        router = make(name, training=training, **keys)
        router.bias_E[3] = 100.0
        torch.manual_seed(5)
        routings.append(router(x_TD, tokens))
    for before, after in zip(*(routing.tensors() for routing in routings), strict=True):
        assert before is after is None or torch.equal(before, after)


def test_hash_depends_on_the_vocabulary_entry_alone() -> None:
    router = make("hash")
    x_TD, tokens = text(batch=10)
    assert tokens.id_T is not None
    expert_TK = router(x_TD, tokens).expert_TK
    for entry in tokens.id_T.unique():
        rows = expert_TK[tokens.id_T == entry]
        assert (rows == rows[0]).all()
    without = Tokens(batch_size=10, position_T=tokens.position_T)
    with pytest.raises(ValueError, match="router hash: expected input_ids"):
        router(x_TD, without)


def test_hash_spreads_keys_evenly() -> None:
    draw_TE = hash_TE(8, 1, torch.arange(40_000))
    share_E = torch.bincount(draw_TE.argmax(1), minlength=8) / 40_000
    assert (share_E - 1 / 8).abs().max() < 0.006
    assert len(draw_TE.flatten().unique()) > 0.999 * draw_TE.numel()
