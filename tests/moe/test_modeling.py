"""The model: saving, generation, checkpointing, padding, compilation, losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from moe import REGULARIZERS, ROUTERS, MoEGPT2Config, MoEGPT2LMHeadModel, generation
from moe.blocks import MoEGPT2Block
from tests.moe.conftest import TINY

Build = Callable[..., MoEGPT2LMHeadModel]
CAUSAL = sorted(name for name, router in ROUTERS.items() if router.causal)
ALL_REGULARIZERS = {name: 0.01 for name in REGULARIZERS if name != "entropy"}


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "activation"), [*((name, "gelu") for name in sorted(ROUTERS)), ("energy", "swiglu")])
def test_round_trip(tiny: Build, ids: Tensor, tmp_path: Path, name: str, activation: str, dtype: torch.dtype) -> None:
    model = tiny(
        router=name, energy_lambda=0.2, expert_activation=activation, shared_expert_width=16,
        expert_widths=[64, 32, 0, 48], moe_layers=[1], bias_balance_rate=0.01, dtype=dtype,
    ).to(dtype)  # fmt: skip
    model.set_prices(torch.tensor([[1 / 3, 0.1, 0.0, 1e-5]]), torch.tensor([7.0, 2.0, 0.0, 1 / 7]))
    model.set_energy_lambda(0.37)
    model.set_temperature(1.9)
    router = model.routers[0]
    router.bias_E.copy_(torch.tensor([0.001, -1 / 3, 0.5, 2.0]))
    router.offset_E.copy_(torch.tensor([0.3, -1 / 7, 0.0, 1e-4]))
    router.count_E.copy_(torch.tensor([3.0, 0.0, 16_777_215.0, 7.0]))
    assert all(value.any() for value in router.buffers())  # a buffer that is all zeros would prove nothing
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEGPT2LMHeadModel)
    for (key, old), (_, new) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert new.dtype == torch.float32, key
        assert torch.equal(old, new), key
    assert loaded.config.energy_lambda == 0.37
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(model.eval()(ids).logits, loaded.eval()(ids).logits)


def test_auto_classes(tiny: Build, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEGPT2Config)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "MoEGPT2Model"
    assert isinstance(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)), MoEGPT2LMHeadModel)


def test_what_is_asked_for_at_loading_wins(tiny: Build, tmp_path: Path) -> None:
    tiny(router="energy", energy_lambda=0.5).save_pretrained(tmp_path)
    loaded = MoEGPT2LMHeadModel.from_pretrained(tmp_path, energy_lambda=0.0, router_temperature=2.0)
    assert [float(r.energy_lambda) for r in loaded.routers] == [0.0, 0.0]
    assert [float(r.temperature) for r in loaded.routers] == [2.0, 2.0]


def test_float32_buffers_survive_a_change_of_precision(tiny: Build) -> None:
    model = tiny(router="energy", energy_lambda=0.1)
    model.set_prices(torch.tensor([1 / 3, 0.1, 0.2, 1.0]))
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.bfloat16().float()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_initialisation_is_gpt2s(tiny: Build) -> None:
    model = tiny(n_embd=128, expert_widths=[512] * 4, initializer_range=0.02)
    experts = model.transformer.moe_blocks[0].mlp.experts.expert_state(1)
    assert float(experts["up_DF"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(experts["down_FD"].std()) == pytest.approx(0.02 / 2, rel=0.05)  # / √(2·2 layers)
    assert (experts["up_bias_F"] == 0).all()


# Generation


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_equals_uncached(tiny: Build, ids: Tensor, left_padding: Tensor, name: str, cache: str | None) -> None:
    model = tiny(
        router=name, energy_lambda=0.3, expert_widths=[64, 32, 0, 48], capacity_factor=0.3, router_top_p=0.6
    ).eval()
    model.generation_config.disable_compile = True
    keys: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for mask in (torch.ones_like(ids), left_padding):
        cached = model.generate(ids, attention_mask=mask, cache_implementation=cache, **keys)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **keys))


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_on_the_left_changes_no_continuation(tiny: Build, ids: Tensor, name: str) -> None:
    model, keys = tiny(router=name).eval(), {"max_new_tokens": 8, "do_sample": False}
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **keys)
    assert torch.equal(model.generate(padded, attention_mask=mask, **keys)[:, 4:], plain)


# Padding


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_padding_is_neither_routed_nor_counted(tiny: Build, ids: Tensor, left_padding: Tensor, name: str) -> None:
    model = tiny(router=name, regularizers=ALL_REGULARIZERS, bias_balance_rate=0.1, capacity_factor=0.5).train()
    predicted = left_padding.bool() & left_padding.roll(1, dims=1).bool()  # padding predicts nothing either
    labels = ids.masked_fill(~predicted, -100)
    losses = []
    for filler in (5, 90):  # what stands in the padding makes no difference
        torch.manual_seed(0)
        padded = ids.masked_fill(left_padding == 0, filler)
        output = model(padded, attention_mask=left_padding, labels=labels, output_routing=True)
        losses.append((output.lm_loss, output.aux_loss))
        for routing in output.routing:
            assert not routing.kept()[left_padding.flatten() == 0].any()
            assert routing.valid().sum() == left_padding.sum()
    torch.testing.assert_close(*losses)
    if name != "topp":
        assert model.routers[0].count_E.sum() == 2 * model.config.num_experts_per_tok * left_padding.sum()


# Losses


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_loss_is_the_sum_of_its_parts(tiny: Build, ids: Tensor, name: str) -> None:
    model = tiny(router=name, regularizers=ALL_REGULARIZERS)
    model.train()
    output = model(ids, labels=ids, output_routing=True)
    torch.testing.assert_close(output.loss, output.lm_loss + output.aux_loss)
    expected = sum(w * REGULARIZERS[k](r) for k, w in ALL_REGULARIZERS.items() for r in output.routing) / 2
    torch.testing.assert_close(output.aux_loss, expected)
    assert (
        model.eval()(ids, labels=ids).loss == model(ids, labels=ids).lm_loss
    )  # evaluation compares across regularizers


def test_gibbs_beta_reaches_the_loss(tiny: Build, ids: Tensor) -> None:
    auxiliary = [tiny(regularizers={"kl_gibbs": 1.0}, gibbs_beta=b)(ids, labels=ids).aux_loss for b in (0.0, 3.0)]
    assert auxiliary[0] != auxiliary[1]


def test_micro_batches_of_the_model_add_up(tiny: Build, ids: Tensor) -> None:
    """With the number of targets of the whole step, as the Trainer passes it, gradients equal the full batch's."""
    model = tiny(regularizers={"z_loss": 0.1, "token_entropy": 0.1, "expected_energy": 0.1}).double().train()
    model(ids, labels=ids).loss.backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    items = torch.tensor(3 * 15)
    for part in (ids[:1], ids[1:]):
        model(part, labels=part, num_items_in_batch=items).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, full[name])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # absent on 5.17
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_checkpointing_keeps_gradients_and_counts_once(tiny: Build, ids: Tensor, name: str, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        keys = {"regularizers": ALL_REGULARIZERS, "bias_balance_rate": 0.1, "moe_layers": [0]}
        drops = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.2)  # the second forward drops the same
        model = tiny(router=name, **keys, **drops).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        output = model(ids, labels=ids, use_cache=False)  # as checkpointing does
        output.loss.backward()
        results.append(
            (output.loss, model.routers[0].count_E, [p.grad for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*results)


# Experts and layers


@pytest.mark.parametrize("layers", [[], [1], [0, 1], None])
def test_any_subset_of_blocks(tiny: Build, ids: Tensor, layers: list[int] | None) -> None:
    model = tiny(moe_layers=layers, regularizers={"z_loss": 0.1})
    output = model(ids, labels=ids, output_routing=True)
    output.loss.backward()
    assert len(output.routing) == len(model.routers) == len(range(2) if layers is None else layers)
    assert (output.aux_loss is None) == (layers == [])


def test_only_null_experts_pass_the_residual_through(tiny: Build, ids: Tensor) -> None:
    model = tiny(expert_widths=[0, 0], num_experts_per_tok=1).eval()
    block = model.transformer.h[0]
    assert isinstance(block, MoEGPT2Block)
    output = model(ids, labels=ids, output_routing=True)
    x_BSD = torch.randn(1, 4, 32)
    mixed, _ = block.mlp(x_BSD, _tokens(4))
    assert (mixed == 0).all()
    assert torch.isfinite(output.loss)


def test_a_null_choice_keeps_its_share_of_the_mixture(tiny: Build) -> None:
    """With one null and one working expert, the layer's output is the worker's times its softmax weight."""
    model = tiny(expert_widths=[0, 64], num_experts_per_tok=2)
    mlp = model.transformer.moe_blocks[0].mlp.eval()
    x_BSD = torch.randn(1, 5, 32)
    mixed, routing = mlp(x_BSD, _tokens(5))
    s = mlp.experts.expert_state(1)
    hidden = torch.nn.functional.gelu(x_BSD[0] @ s["up_DF"] + s["up_bias_F"], approximate="tanh")
    weight_T = routing.weight_TK.gather(1, (routing.expert_TK == 1).int().argmax(1, keepdim=True))
    torch.testing.assert_close(mixed[0], weight_T * (hidden @ s["down_FD"] + s["down_bias_D"]))
    mixed.sum().backward()  # and so the null expert's logit learns
    assert mlp.router.gate.weight.grad[0].abs().max() > 0


def test_one_expert_is_the_dense_network(tiny: Build) -> None:
    """E = K = 1, in float32 (the C functions, where there are any) and in float64: outputs and gradients."""
    dense = GPT2MLP(64, tiny().config)
    mlp = tiny(expert_widths=[64], num_experts_per_tok=1).transformer.moe_blocks[0].mlp
    mlp.experts.load_expert(0, dense.c_fc.weight, dense.c_fc.bias, dense.c_proj.weight, dense.c_proj.bias)
    for dtype in (torch.float32, torch.float64):
        x_BSD = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
        outputs = [mlp.to(dtype)(x_BSD, dataclasses.replace(_tokens(14), batch_size=2))[0], dense.to(dtype)(x_BSD)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x_BSD)[0] for y in outputs))


def test_shared_expert_adds_to_the_mixture(tiny: Build) -> None:
    mlp = tiny(shared_expert_width=16, expert_widths=[0, 0], num_experts_per_tok=1).transformer.moe_blocks[0].mlp.eval()
    x_BSD = torch.randn(1, 5, 32)
    torch.testing.assert_close(mlp(x_BSD, _tokens(5))[0], mlp.shared(x_BSD))


def test_dropout_once_after_the_combine(tiny: Build) -> None:
    mlp = tiny(resid_pdrop=0.5, shared_expert_width=16).transformer.moe_blocks[0].mlp.train()
    x_BSD = torch.randn(1, 2000, 32)
    torch.manual_seed(0)
    dropped, _ = mlp(x_BSD, _tokens(2000))
    whole, _ = mlp.eval()(x_BSD, _tokens(2000))
    zero = dropped == 0
    assert 0.48 < float(zero.float().mean()) < 0.52
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


def _tokens(length: int) -> Any:
    from moe import Tokens

    return Tokens(batch_size=1, position_T=torch.arange(length))


# Knobs


def test_prices_by_layer_and_bad_ones(tiny: Build) -> None:
    model = tiny(router="energy")
    model.set_prices(torch.arange(8.0).view(2, 4))
    assert model.routers[1].join_E.tolist() == [4, 5, 6, 7]
    for bad, message in (
        (torch.ones(3), r"join_E: expected shape \[4\] or \[2, 4\], got \[3\]"),
        (torch.tensor([1.0, float("nan"), 1, 1]), "join_E: expected finite prices"),
        (-torch.ones(4), "join_E: expected finite prices"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_prices(bad)
    with pytest.raises(ValueError, match="energy_lambda: expected a finite number ≥ 0, got -1"):
        model.set_energy_lambda(-1)
    assert model.config.energy_lambda == 0
    with pytest.raises(ValueError, match="router_temperature"):
        model.set_temperature(0)


@pytest.mark.usefixtures("fresh_dynamo")
def test_knobs_recompile_nothing(tiny: Build, ids: Tensor) -> None:
    model = tiny(router="energy", n_layer=1).eval()
    model.set_prices(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    free = compiled(ids, output_routing=True).routing[0].expert_TK
    model.set_energy_lambda(3.0)
    model.set_temperature(2.0)
    model.set_prices(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert not torch.equal(free, compiled(ids, output_routing=True).routing[0].expert_TK)
    assert counter.frame_count == 1


BACKENDS = [("energy", "eager")] + [pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in sorted(ROUTERS)]


@pytest.fixture
def right_padding(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    mask[2, -1:] = 0
    return mask


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_padding_on_the_right_needs_the_tokens_mask_alone(
    tiny: Build, ids: Tensor, right_padding: Tensor, name: str
) -> None:
    """Attention is causal, so that no attention mask, whose values transformers looks at, is needed."""
    model = tiny(router=name, regularizers=ALL_REGULARIZERS).train()
    labels = ids.masked_fill(right_padding == 0, -100)
    losses = []
    for mask in ("attention_mask", "token_mask"):
        torch.manual_seed(0)
        output = model(ids, labels=labels, output_routing=True, **{mask: right_padding})
        losses.append((output.lm_loss, output.aux_loss))
        assert all(torch.equal(routing.valid_T, right_padding.flatten().bool()) for routing in output.routing)
    torch.testing.assert_close(*losses)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mask", ["attention_mask", "token_mask"])
def test_compiles_with_padding(tiny: Build, ids: Tensor, right_padding: Tensor, mask: str) -> None:
    model = tiny(router="energy", regularizers=ALL_REGULARIZERS, dispatch="loop", n_layer=1).train()
    keys = {mask: right_padding, "labels": ids.masked_fill(right_padding == 0, -100)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, **keys).loss, model(ids, **keys).loss)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_compiles_without_a_graph_break(tiny: Build, ids: Tensor, name: str, backend: str) -> None:
    keys: dict[str, Any] = {
        "regularizers": ALL_REGULARIZERS,
        "bias_balance_rate": 0.1,
        "dispatch": "loop",
        "n_layer": 1,
    }
    model = tiny(router=name, **keys).train()
    losses = []
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        losses.append(call(ids, labels=ids).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_dense_and_an_expert_block_compile_into_one_graph(tiny: Build, ids: Tensor) -> None:
    model = tiny(router="energy", energy_lambda=0.3, n_layer=2, moe_layers=[1]).train()
    counter, results = CompileCounterWithBackend("eager"), []
    for call in (model, torch.compile(model, fullgraph=True, backend=counter)):
        model.zero_grad()
        output = call(ids, labels=ids, output_routing=True, use_cache=False)
        output.loss.backward()
        results.append((output.loss, output.routing[0].expert_TK, [p.grad for p in model.parameters()]))
    assert len(output.routing) == counter.frame_count == 1
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("fresh_dynamo")
def test_drops_are_returned_compiled_too(tiny: Build, ids: Tensor) -> None:
    model = tiny(router="capacity", capacity_factor=0.5, dispatch="loop").train()
    output = model(ids, labels=ids, output_routing=True)
    expected = [float(r.dropped_TK.sum()) / r.dropped_TK.numel() for r in output.routing]
    assert output.dropped_L.tolist() == pytest.approx(expected)
    assert min(expected) >= 0.45
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, labels=ids).dropped_L, output.dropped_L)
    assert model.eval()(ids, labels=ids).dropped_L is None
    assert tiny().train()(ids, labels=ids).dropped_L is None


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_compiles_training(tiny: Build, ids: Tensor) -> None:
    model = tiny(router="energy", regularizers=ALL_REGULARIZERS, bias_balance_rate=0.1).train()
    results = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = call(ids, labels=ids).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions(tiny: Build, ids: Tensor, dtype: torch.dtype) -> None:
    model = tiny(regularizers=ALL_REGULARIZERS).to(dtype)
    output = model(ids, labels=ids, output_routing=True, skip_logits=False)
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert output.routing[0].logits_TE.dtype == torch.promote_types(dtype, torch.float32)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_autocast(tiny: Build, ids: Tensor) -> None:
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert abs(float((output.loss - model(ids, labels=ids).loss).detach())) < 0.05


def test_the_same_seed_gives_the_same_gradients(ids: Tensor, tiny: Build) -> None:
    gradients = []
    for _ in range(2):
        model = tiny(router="random", resid_pdrop=0.1).train()
        torch.manual_seed(4)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["topk", "energy", "capacity", "random"])
def test_dropped_attention_gives_the_same_gradients_too(tiny: Build, name: str) -> None:
    """Without a cache attention on a CPU is one operator, which drops by itself; enough tokens for several threads."""
    ids_BS, gradients = torch.randint(2, 97, (8, 64), generator=torch.Generator().manual_seed(3)), []
    for seed in (4, 4, 5):
        model = tiny(router=name, attn_pdrop=0.1, energy_lambda=0.3, capacity_factor=0.5).train()
        torch.manual_seed(seed)
        model(ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    first, second, other = gradients
    assert any("attn" in key for key in first)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_active_parameters(tiny: Build) -> None:
    model = tiny(expert_widths=[64, 64, 64, 64], num_experts_per_tok=1)
    total = sum(p.numel() for p in model.parameters())
    expert = 64 * 32 * 2 + 64 + 32
    assert model.num_active_parameters() == total - 2 * 3 * expert
    assert model.num_active_parameters(mean_selected_width=256.0) == total


# Configuration


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"router": "switch"}, "router: expected one of capacity, energy, hash, .*got .switch."),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected an integer from 1 to the 4 experts, got 5"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"expert_widths": []}, "expert_widths"),
        ({"expert_widths": [64, -1]}, "expert_widths"),
        ({"moe_layers": [2]}, "moe_layers: expected ascending block indices from 0 to 1, got"),
        ({"energy_lambda": -0.1}, "energy_lambda: expected a finite number ≥ 0, got -0.1"),
        ({"energy_lambda": float("nan")}, "energy_lambda"),
        ({"router_temperature": 0.0}, "router_temperature"),
        ({"regularizers": {"balance": 1.0}}, r"regularizers: expected names among cv2, .*\(unknown: balance\)"),
        (
            {"regularizers": {"kl_uniform": 1.0, "entropy": 1.0}},
            "regularizers: expected kl_uniform or entropy, not both",
        ),
        ({"router_top_p": 0.0}, "router_top_p"),
        ({"router_jitter": 1.0}, "router_jitter"),
        ({"mixing": "sum"}, "mixing: expected one of normalized, probability, got 'sum'"),
        ({"expert_activation": "relu"}, "expert_activation"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_bad_keys_are_named_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        MoEGPT2Config(**(TINY | {"expert_widths": [64] * 4} | keys))
    assert "\n" not in str(caught.value)


def test_inputs_are_checked(tiny: Build, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        tiny()()
    model = tiny().eval()
    embedded = model.transformer.wte(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"cache_implementation": "static", "disable_compile": True}, True),
        ({"min_new_tokens": 2}, True),
        ({"do_sample": True}, True),
        ({"return_dict_in_generate": True}, False),
        ({"use_cache": False}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_an_ordinary_generate_call_is_one_for_the_graph(
    tiny: Build, options: dict[str, Any], plain: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on CPU, where no graph runs: which calls `generate` hands over as it hands them over."""
    model = tiny().eval()
    ids_BS = torch.randint(2, 60, (3, 5))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :2] = 1 - int(padded)
    seen: list[bool] = []
    monkeypatch.setattr(generation, "_serves", lambda model, *rest: seen.append(generation._plain(*rest)))
    model.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=3, pad_token_id=0, **options)
    assert seen == [plain]
