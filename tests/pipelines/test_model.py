"""The compiled forward: one compilation for all blocks, the same numbers, prices that act, and a model left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe import MoEGPT2Config, MoEGPT2LMHeadModel
from pipelines.model import compiled_forward


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = MoEGPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, expert_widths=[128, 64, 32, 0], router="energy", initializer_range=0.1,
    )  # fmt: skip
    return MoEGPT2LMHeadModel(config)


def test_one_compilation_serves_all_blocks_and_every_price(model: Any) -> None:
    counter = CompileCounterWithBackend("eager")
    forward, ids_BS = compiled_forward(model.eval(), backend=counter), torch.randint(0, 97, (2, 16))
    losses = set()
    for energy_lambda in (0.0, 0.5, 2.0):
        model.set_energy_lambda(energy_lambda)
        with torch.no_grad():
            keys: dict[str, Any] = {"input_ids": ids_BS, "labels": ids_BS, "use_cache": False, "output_routing": True}
            mine, plain = forward(**keys), model(**keys)
        assert torch.equal(mine.lm_loss, plain.lm_loss)
        assert all(torch.equal(a.expert_TK, b.expert_TK) for a, b in zip(mine.routing, plain.routing, strict=True))
        losses.add(float(mine.lm_loss))
    assert counter.frame_count == 1
    assert len(losses) == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at inputs
def test_it_trains_the_models_own_weights(model: Any) -> None:
    forward, ids_BS = compiled_forward(model.train(), backend="eager"), torch.randint(0, 97, (2, 16))
    forward(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_where_compiling_fails_the_model_itself_serves(model: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    forward, ids_BS = compiled_forward(model.eval(), backend=broken), torch.randint(0, 97, (2, 16))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="without compiled blocks"):
            first = forward(input_ids=ids_BS, use_cache=False).logits
        assert torch.equal(forward(input_ids=ids_BS, use_cache=False).logits, first)
