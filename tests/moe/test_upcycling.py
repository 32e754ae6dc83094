"""Upcycling: exact where it says so, by its rule elsewhere, and a start from which the router learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from moe import MoEGPT2Config, MoEGPT2LMHeadModel, upcycle, upcycle_checkpoint
from moe.plain import PlainExperts
from moe.upcycling import ffn_of, narrow_or_widen, split_factor, upcycling_error
from tests.moe.conftest import TINY

Dense = Callable[..., GPT2LMHeadModel]
COPIES: list[dict[str, Any]] = [{"num_experts_per_tok": k} for k in range(1, 5)]
COPIES += [{"router": name} for name in ("energy", "capacity", "random", "permuted", "hash")]
COPIES += [{"router": "topp", "router_top_p": 0.5}, {"moe_layers": [1]}, {"energy_lambda": 0.5, "router": "energy"}]
WIDER: list[dict[str, Any]] = [
    {"expert_widths": [128, 256, 300, 129]},
    {"expert_widths": [96] * 4, "shared_expert_width": 32},
    {"expert_widths": [64, 32, 16], "shared_expert_width": 128},
]
SPLITS: list[dict[str, Any]] = [
    {"expert_widths": [64] * 8, "num_experts_per_tok": 2},
    {"expert_widths": [64] * 8, "num_experts_per_tok": 4},
    {"expert_widths": [32] * 8, "num_experts_per_tok": 4},
    {"expert_widths": [32] * 8, "num_experts_per_tok": 8},
]


def moe(**keys: Any) -> MoEGPT2Config:
    return MoEGPT2Config(**(TINY | {"expert_widths": [128] * 4} | keys))


@pytest.mark.parametrize("keys", COPIES + WIDER + SPLITS, ids=str)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_exact_at_step_0(dense: Dense, ids: Tensor, keys: dict[str, Any], dtype: torch.dtype, bar: float) -> None:
    base = dense().to(dtype)
    assert upcycling_error(base, upcycle(base, moe(**keys)), ids) <= bar


def test_a_split_is_one_only_where_whole_groups_are_taken() -> None:
    assert [split_factor(moe(**keys)) for keys in SPLITS] == [2, 2, 4, 4]
    for keys in ({"num_experts_per_tok": 3}, {"expert_widths": [64] * 7}, {"expert_widths": [48] * 8}, {}):
        assert split_factor(moe(**({"expert_widths": [64] * 8, "num_experts_per_tok": 1} | keys))) == 1


def test_a_token_takes_whole_groups(dense: Dense, ids: Tensor) -> None:
    model = upcycle(dense().double(), moe(expert_widths=[32] * 8, num_experts_per_tok=4), noise=0.1)
    for routing in model(ids, output_routing=True).routing:
        groups_TK = (routing.expert_TK // 4).sort(dim=1).values
        assert (groups_TK[:, 0] == groups_TK[:, 3]).all()


def test_what_is_not_claimed_is_not_exact(dense: Dense, ids: Tensor) -> None:
    base = dense().double()
    for keys in ({"expert_widths": [128, 128, 0]}, {"expert_widths": [64, 128]}, {"mixing": "probability"}):
        assert upcycling_error(base, upcycle(base, moe(**keys)), ids) > 1e-4
    # SwiGLU experts are near, not equal
    assert 1e-6 < upcycling_error(base, upcycle(base, moe(expert_activation="swiglu")), ids) < 0.05


def test_narrow_experts_keep_what_varies_most_and_the_mean_of_the_rest(dense: Dense) -> None:
    """On inputs as the layer norm makes them, the rule beats plain truncation, and its bias is that of the mean."""
    block = dense(n_embd=64).double().transformer.h[0]
    torch.manual_seed(1)
    for parameter in block.mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        x_TD = torch.randn(20_000, 64, dtype=torch.float64)
        x_TD = torch.nn.functional.layer_norm(x_TD, (64,))
        ffn = ffn_of(block)
        whole_TD = block.mlp(x_TD * block.ln_2.weight + block.ln_2.bias)
        h_TH = block.mlp.act(x_TD @ ffn.up_DH + ffn.up_bias_H)
        torch.testing.assert_close(h_TH.mean(0), ffn.mean_H, atol=0.03, rtol=0.02)
        torch.testing.assert_close(h_TH.std(0), ffn.spread_H, atol=0.03, rtol=0.03)
        part = narrow_or_widen(ffn, 128)
        error_TD = block.mlp.act(x_TD @ part.up_DH + part.up_bias_H) @ part.down_HD + part.down_bias_D - whole_TD
        first = ffn.neurons(torch.arange(128))
        naive_TD = block.mlp.act(x_TD @ first.up_DH + first.up_bias_H) @ first.down_HD + first.down_bias_D - whole_TD
    assert error_TD.mean(0).norm() < 0.05 * naive_TD.mean(0).norm()
    assert error_TD.norm() < 0.8 * naive_TD.norm()


def test_widened_experts_share_out_what_a_neuron_writes(dense: Dense) -> None:
    ffn = ffn_of(dense().transformer.h[0])
    wide = narrow_or_widen(ffn, 300)
    assert wide.width == 300
    torch.testing.assert_close(wide.down_HD[:44] * 3, ffn.down_HD[:44])  # 300 = 2·128 + 44
    torch.testing.assert_close(wide.down_HD[44:128] * 2, ffn.down_HD[44:])


def test_noise_breaks_symmetry_reproducibly(dense: Dense, ids: Tensor) -> None:
    base = dense()
    models = [upcycle(base, moe(), noise=0.01, seed=s) for s in (1, 1, 2)]
    states = [m.transformer.h[0].mlp.experts.expert_state(0)["up_DF"] for m in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert not torch.equal(states[0], models[0].transformer.h[0].mlp.experts.expert_state(1)["up_DF"])
    assert 1e-5 < upcycling_error(base, models[0], ids) < 0.05


def test_the_generator_of_the_caller_is_left_alone(dense: Dense) -> None:
    base = dense()
    torch.manual_seed(0)
    upcycle(base, moe(), noise=0.1, seed=7)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(("k", "noise"), [(1, 0.0), (1, 0.01), (2, 0.01)])
def test_the_router_learns_within_100_steps(dense: Dense, ids: Tensor, k: int, noise: float) -> None:
    """From an upcycled start, the loss alone moves the gates, and the choices with them."""
    model = upcycle(dense(), moe(num_experts_per_tok=k), noise=noise).train()
    gates = [router.gate.weight for router in model.routers]
    before, first = [gate.detach().clone() for gate in gates], _choices(model, ids)
    _train(model, ids, list(model.parameters()))
    for gate, old in zip(gates, before, strict=True):
        assert float((gate.detach() - old).norm() / old.norm()) > 0.05
    assert float((_choices(model, ids) != first).float().mean()) > 0.05


@pytest.mark.parametrize(("k", "bar"), [(1, 0.4), (2, 0.65)])
def test_the_router_learns_which_experts_are_worth_it(dense: Dense, ids: Tensor, k: int, bar: float) -> None:
    """The dense model learns a text by heart; then the outputs of half the experts are negated, and the gates alone
    learn for 100 steps. They turn away from the spoiled experts, and the loss follows."""
    base = dense().train()
    base.loss_type = "ForCausalLM"
    _train(base, ids, list(base.parameters()), steps=60)
    model = upcycle(base, moe(num_experts_per_tok=k), noise=0.01).train()
    for block in model.transformer.moe_blocks:
        for e in (1, 2):
            spoiled = block.mlp.experts.expert_state(e)
            block.mlp.experts.load_expert(e, **(spoiled | {"down_FD": -spoiled["down_FD"]}))
    before, loss = _share_of(model, ids, (1, 2)), _loss(model, ids)
    _train(model, ids, [router.gate.weight for router in model.routers], lr=3e-2)
    assert _share_of(model, ids, (1, 2)) < bar * before
    assert _loss(model, ids) < 0.7 * loss


def _train(model: Any, text: Tensor, parameters: list[Tensor], steps: int = 100, lr: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        optimizer.step()


def _loss(model: MoEGPT2LMHeadModel, text: Tensor) -> float:
    with torch.no_grad():
        return float(model(text, labels=text).lm_loss)


def _share_of(model: MoEGPT2LMHeadModel, text: Tensor, experts: tuple[int, ...]) -> float:
    return float(torch.isin(_choices(model, text), torch.tensor(experts)).float().mean())


def _choices(model: MoEGPT2LMHeadModel, text: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([r.expert_TK.sort(dim=1).values for r in model(text, output_routing=True).routing])


def test_k_2_without_noise_has_no_gradient_at_the_router(dense: Dense, ids: Tensor) -> None:
    """Why noise is needed: equal experts make every mixture equal. K = 1 learns without."""
    gradients = {}
    for k in (1, 2):
        model = upcycle(dense().double(), moe(num_experts_per_tok=k))
        model(ids, labels=ids).loss.backward()
        gradients[k] = float(model.routers[0].gate.weight.grad.abs().max())
    assert gradients[2] < 1e-12
    assert gradients[1] > 1e-4


def test_other_architectures_are_refused(dense: Dense) -> None:
    with pytest.raises(ValueError, match="n_embd: expected 32 as in the dense model, got 64"):
        upcycle(dense(), moe(n_embd=64))
    with pytest.raises(ValueError, match="dense_width: expected 128 as in the dense model, got 64"):
        upcycle(dense(), moe(n_inner=64))
    with pytest.raises(ValueError, match="tie_word_embeddings: expected False as in the dense model, got True"):
        upcycle(dense(tie_word_embeddings=False), moe())


@pytest.mark.parametrize(
    "variation",
    [
        {"n_inner": 80},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"n_layer": 3, "layer_norm_epsilon": 1e-3},
    ],
    ids=str,
)
def test_the_gpt2_family(dense: Dense, ids: Tensor, variation: dict[str, Any]) -> None:
    base = dense(**variation).double()
    model = upcycle(base, moe(**variation, expert_widths=[variation.get("n_inner", 128)] * 3))
    assert upcycling_error(base, model, ids) < 1e-10


def test_checkpoint_to_checkpoint(dense: Dense, ids: Tensor, tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(
        tmp_path / "dense", tmp_path / "moe", expert_widths=[128] * 4, num_experts_per_tok=2, router="energy"
    )
    loaded = MoEGPT2LMHeadModel.from_pretrained(tmp_path / "moe")
    assert loaded.config.router == "energy"
    with pytest.raises(ValueError, match="base: expected a dense checkpoint of model_type gpt2, got moe_gpt2"):
        upcycle_checkpoint(tmp_path / "moe", tmp_path / "again")
    assert upcycling_error(dense(), loaded, ids) < 1e-5


def test_plain_experts_equal_the_fast_ones(dense: Dense, ids: Tensor) -> None:
    """On an activation that both compute, outputs and gradients are equal: mixed widths, nulls and drops included."""
    keys = {"expert_widths": [64, 0, 128, 32], "router": "capacity", "capacity_factor": 0.5}
    results = []
    for plain in (False, True):
        model = upcycle(dense().double(), moe(**keys), noise=0.1).train()
        for block in model.transformer.moe_blocks:
            if plain:
                experts = PlainExperts(model.config).double()
                experts.load_state_dict(block.mlp.experts.state_dict())
                block.mlp.experts = experts
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results)
