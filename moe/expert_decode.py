"""The experts where tokens are few, as in decoding, on CUDA: every open expert's weights are read once, without a sort.

Shapes: see ``moe.expert_decode_kernels``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from moe import expert_decode_kernels as kernels

MAX_TOKENS = 128  # in one tile; beyond that the sorted path computes less
NEURONS = 32  # of decode_up, per program
COLUMNS = 64  # of decode_down
SPLIT = 1024  # neurons of one partial sum


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies float32: exactly, unless PyTorch may use tf32."""
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"


@functools.lru_cache(maxsize=64)
def _expert_of_block(widths: tuple[int, ...], per_block: int, device: torch.device) -> Tensor:
    blocks = [n for n, width in enumerate(widths) for _ in range(width // per_block)]
    return torch.tensor(blocks, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _splits(widths: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of at most ``size`` neurons, each of one expert: first neuron, end, expert."""
    ends = list(accumulate(widths))
    runs = [
        (first, min(first + size, end), n)
        for n, (end, width) in enumerate(zip(ends, widths, strict=True))
        for first in range(end - width, end, size)
    ]
    first, last, expert = (torch.tensor(column, dtype=torch.int32, device=device) for column in zip(*runs, strict=True))
    return first, last, expert


@torch.library.custom_op("joulemoe::decode_experts", mutates_args=())
def decode_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    up_PD: Tensor,
    up_bias_P: Tensor,
    down_PD: Tensor,
    down_bias_ND: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """Few tokens: a product with all neurons of the open experts, whose weights are read once. No sort, no backward."""
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    routed = (slot_TK.contiguous(), weight_TK.contiguous())
    decode_into(y_TD, x_TD.contiguous(), routed, (up_PD, up_bias_P, down_PD, down_bias_ND), widths, residual=False)
    return y_TD


def decode_into(
    y_TD: Tensor,
    x_TD: Tensor,
    routed: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    widths: Sequence[int],
    *,
    residual: bool = True,
) -> None:
    """Write the experts' sum into ``y_TD``, or add it (residual). ``routed``: slots and mixing weights [T, K]."""
    slot_TK, weight_TK = routed
    up_PD, up_bias_P, down_PD, down_bias_ND = weights
    (T, D), P, K = x_TD.shape, up_PD.shape[0], slot_TK.shape[1]
    blocks = _expert_of_block(tuple(widths), NEURONS, x_TD.device)
    hidden_TP = x_TD.new_empty(T, P)
    exact, tokens = precision(x_TD.dtype), max(16, triton.next_power_of_2(T))
    kernels.decode_up[(P // NEURONS,)](
        x_TD, slot_TK, weight_TK, up_PD, up_bias_P, hidden_TP, blocks, T, D, P,
        K=K, BT=tokens, BP=NEURONS, BK=64, PRECISION=exact, num_warps=4, num_stages=4,
    )  # fmt: skip
    first_S, last_S, expert_S = _splits(tuple(widths), SPLIT, x_TD.device)
    splits = expert_S.numel()
    partial_STD = x_TD.new_empty(splits, T, D, dtype=torch.float32)
    kernels.decode_down[(triton.cdiv(D, COLUMNS), splits)](
        hidden_TP, slot_TK, down_PD, partial_STD, first_S, last_S, expert_S, T, D, P, T * K,
        BT=tokens, BC=triton.next_power_of_2(T * K), BN=COLUMNS, BK=64,
        PRECISION=exact, num_warps=4, num_stages=4,
    )  # fmt: skip
    kernels.decode_sum[(T, triton.cdiv(D, 256))](
        partial_STD, slot_TK, weight_TK, down_bias_ND, y_TD, T, D,
        K=K, SPLITS=splits, RESIDUAL=residual, BN=256, num_warps=2,
    )  # fmt: skip


@decode_experts.register_fake
def _(x_TD: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format)
