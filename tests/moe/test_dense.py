"""The dense model in the class of those with experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from moe import MoEGPT2LMHeadModel
from moe.dense import to_gpt2, without_experts


def test_there_and_back(dense: Callable[..., GPT2LMHeadModel], ids: Tensor, tmp_path: Path) -> None:
    plain = dense()
    model = without_experts(plain)
    assert isinstance(model, MoEGPT2LMHeadModel)
    assert not model.routers
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    to_gpt2(model).save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
    assert loaded.config.n_positions == plain.config.n_positions


@pytest.mark.parametrize("use_cache", [True, False])  # without a cache attention on a CPU is one operator
@pytest.mark.parametrize(
    "options", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"activation_function": "relu", "n_inner": 48}], ids=str
)
def test_the_losses_and_gradients_are_those_of_gpt2(
    dense: Callable[..., GPT2LMHeadModel], ids: Tensor, options: dict[str, Any], use_cache: bool
) -> None:
    plain = dense(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options).train()
    plain.loss_type = "ForCausalLM"
    model = without_experts(plain)
    assert model.training
    for each in (plain, model):
        each(ids, labels=ids, use_cache=use_cache).loss.backward()
    for (name, own), (_, want) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, want.grad, msg=name)


def test_a_model_with_experts_is_no_dense_one(tiny: Callable[..., MoEGPT2LMHeadModel]) -> None:
    with pytest.raises(ValueError, match="moe_layers"):
        to_gpt2(tiny())


def test_its_activation_stays_in_16_bits_under_autocast(dense: Callable[..., GPT2LMHeadModel]) -> None:
    plain = dense()
    model = without_experts(plain)
    x_TH = torch.randn(9, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for block in model.transformer.h:
            assert block.mlp.act(x_TH.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(model.transformer.h[0].mlp.act(x_TH), plain.transformer.h[0].mlp.act(x_TH))
