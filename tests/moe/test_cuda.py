"""The checks of benchmarks/check_cuda.py as tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.check_cuda import CHECKS
from moe import ROUTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # of transformers' own loop over a static cache
]


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_cuda(check: Callable[[str], None], router: str) -> None:
    check(router)
