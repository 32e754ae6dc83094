"""A trial small enough for a test: the same code as a large one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipelines.object_store import ObjectStore, object_store

pytest.register_assert_rewrite("tests.pipelines.fault_tools")

TINY: dict[str, Any] = {
    "base": "random",
    "data": "embedded",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "seq_len": 64,
    "batch_size": 4,
    "max_train_tokens": 2048,
    "max_eval_tokens": 1024,
    "router": "energy",
    "expert_width_factors": [1.0, 0.5, 0.5, 0.0],
    "top_k": 2,
    "energy_lambda": 0.5,
    "regularizer": "load_balance",
    "regularizer_weight": 0.01,
    "decode_prompt_tokens": 8,
    "decode_new_tokens": 4,
    "decode_batches": [2],
    "measure_seconds": 0.05,
    "threads": 1,
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Keys of a tiny trial; change what the test is about."""
    return dict(TINY)


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """The same, for fixtures that live longer than a test."""
    return dict(TINY)


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectStore]:
    """An S3 server with an empty bucket."""
    with object_store() as store:
        yield store
