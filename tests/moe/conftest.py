"""Small models, and routings by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from moe import MoEGPT2Config, MoEGPT2LMHeadModel, Routing

TINY: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
}  # fmt: skip

transformers_logging.disable_progress_bar()


@pytest.fixture
def fresh_dynamo() -> None:
    """All models of a process share their code, and 8 compilations of one function are dynamo's limit."""
    torch._dynamo.reset()


@pytest.fixture
def tiny() -> Callable[..., MoEGPT2LMHeadModel]:
    """A seeded tiny model: `tiny(router="energy", seed=1)`."""

    def build(seed: int = 0, **keys: Any) -> MoEGPT2LMHeadModel:
        torch.manual_seed(seed)
        return MoEGPT2LMHeadModel(MoEGPT2Config(**(TINY | {"expert_widths": [64, 32, 48, 64]} | keys)))

    return build


@pytest.fixture
def dense() -> Callable[..., GPT2LMHeadModel]:
    def build(seed: int = 0, **keys: Any) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**(TINY | keys))).eval()

    return build


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 97, (3, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def left_padding(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :1] = 0
    return mask


@pytest.fixture
def route() -> Callable[..., Routing]:
    """A routing of given logits, float64: top-K choices, softmax weights."""

    def build(logits_TE: Tensor, k: int = 1, tau: float = 1.0, **fields: Any) -> Routing:
        score_TE = logits_TE.double() / tau
        expert_TK = score_TE.topk(k, dim=-1).indices
        weight_TK = score_TE.gather(-1, expert_TK).softmax(dim=-1)
        fields = {"join_E": torch.ones(logits_TE.shape[1], dtype=torch.float64)} | fields
        log_probs_TE = score_TE.log_softmax(dim=-1)
        return Routing(
            logits_TE=logits_TE.double(), log_probs_TE=log_probs_TE, expert_TK=expert_TK, weight_TK=weight_TK, **fields
        )

    return build
