"""The checks of benchmarks/check_cuda.py as tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from benchmarks.check_cuda import CHECKS, build, text
from moe import ROUTERS
from moe.captured import CapturedForward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # of transformers' own loop over a static cache
]


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_cuda(check: Callable[[str], None], router: str) -> None:
    check(router)


@torch.no_grad()
def test_a_captured_forward_follows_prices_biases_and_text() -> None:
    model, ids = build(router="energy").eval(), text()
    captured = CapturedForward(model, model)
    options = {"use_cache": False, "output_routing": True, "skip_logits": True}
    losses = []
    for call in range(8):
        model.set_energy_lambda(0.5 * (call % 3))
        for router in model.routers:
            router.offset_E.fill_(0.0)[call % 4] = 1.0
        chunk = ids.roll(call, 1)
        got = captured(input_ids=chunk, labels=chunk, **options)
        got_loss, got_TK = got.lm_loss.clone(), got.routing[-1].expert_TK.clone()
        want = model(input_ids=chunk, labels=chunk, **options)
        torch.testing.assert_close(got_loss, want.lm_loss, rtol=1e-3, atol=1e-3)
        assert torch.equal(got_TK, want.routing[-1].expert_TK)
        losses.append(float(got_loss))
    assert len(set(losses)) == len(losses)
    assert [kind.graph is not None for kind in captured._kinds.values()] == [True]


@torch.no_grad()
def test_a_captured_forward_serves_a_dense_model_and_weights_cast_by_autocast() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    model, ids = transformers.GPT2LMHeadModel(config).cuda().eval(), torch.randint(64, (3, 32), device="cuda")
    captured = CapturedForward(model, model)
    for call in range(5):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = captured(input_ids=ids.roll(call, 1), use_cache=False, logits_to_keep=1).logits.clone()
            want = model(input_ids=ids.roll(call, 1), use_cache=False, logits_to_keep=1).logits
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    assert [kind.graph is not None for kind in captured._kinds.values()] == [True]
