"""The example in docs/routing.md runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import ROUTERS, MoEGPT2LMHeadModel

DOCS = Path(__file__).parents[2] / "docs" / "routing.md"


@pytest.fixture
def example() -> Iterator[str]:
    section = DOCS.read_text().split("## A router of one's own")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    exec(code.group(1), {})
    yield code.group(1)
    ROUTERS.pop("within_margin", None)


def test_a_router_of_ones_own(example: str, tiny: Callable[..., MoEGPT2LMHeadModel], ids: Tensor) -> None:
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    keys: dict[str, Any] = {"router": "within_margin", "num_experts_per_tok": 1}
    model = tiny(**keys, regularizers={"load_balance": 0.01}).train()
    model.set_prices(torch.tensor([3.0, 1.0, 2.0, 4.0]))
    output = model(ids, labels=ids, output_routing=True)
    output.loss.backward()
    assert model.routers[0].gate.weight.grad.abs().max() > 0
    for routing in output.routing:
        scores_TE, chosen_T = routing.logits_TE, routing.expert_TK[:, 0]
        near_TE = scores_TE >= scores_TE.amax(1, keepdim=True) - 0.5
        assert near_TE.gather(1, chosen_T[:, None]).all()
        assert (routing.join_E[chosen_T][:, None] <= routing.join_E.expand_as(near_TE).masked_fill(~near_TE, 9)).all()
    model.eval()
    keys = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **keys), model.generate(ids, use_cache=False, **keys))
