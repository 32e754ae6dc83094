"""Triton kernels of the experts where tokens are few, as in decoding: the weights of open experts are read once.

Shapes: T tokens, K choices per token, C = T*K, D model width, P neurons of all experts, S runs of neurons. All tokens
stand in one tile of BT rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from moe.kernels import _gelu_parts


@triton.jit
def decode_up(
    x_TD,
    slot_C,
    weight_C,
    up_PD,
    up_bias_P,
    hidden_TP,
    expert_B,
    T,
    D,
    P,
    K: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden = weight of the token's choice * gelu(x·up^T + bias), a block of one expert's neurons per program.

    All tokens pass through every open expert (weights bound the time, the extra products are free); a closed expert is
    neither read nor written. ``expert_B`` names the expert of each block of BP neurons.
    """
    block = tl.program_id(0)
    n = tl.load(expert_B + block)
    token = tl.arange(0, BT)
    share = tl.zeros((BT,), tl.float32)
    chosen = tl.zeros((BT,), tl.int32)
    for k in tl.static_range(K):
        mine = tl.load(slot_C + token * K + k, mask=token < T, other=-1).to(tl.int32) == n
        share += tl.where(mine, tl.load(weight_C + token * K + k, mask=token < T, other=0.0).to(tl.float32), 0.0)
        chosen += mine.to(tl.int32)
    if tl.sum(chosen) > 0:
        neuron = block * BP + tl.arange(0, BP)
        acc = tl.zeros((BT, BP), tl.float32)
        for start in range(0, D, BK):
            col = start + tl.arange(0, BK)
            x = tl.load(x_TD + token[:, None] * D + col[None, :], mask=(token < T)[:, None], other=0.0)
            up = tl.load(up_PD + neuron.to(tl.int64)[:, None] * D + col[None, :])
            acc = tl.dot(x, up.T, acc, input_precision=PRECISION)
        pre = acc + tl.load(up_bias_P + neuron).to(tl.float32)[None, :]
        s, _ = _gelu_parts(pre, True)
        hidden = (pre * s * share[:, None]).to(hidden_TP.dtype.element_ty)
        tl.store(hidden_TP + token[:, None] * P + neuron[None, :], hidden, mask=(token < T)[:, None])


@triton.jit
def decode_down(
    hidden_TP,
    slot_C,
    down_PD,
    partial_STD,
    first_S,
    last_S,
    expert_S,
    T,
    D,
    P,
    C,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial products hidden·down over a run of one expert's neurons; zero where the expert is closed."""
    d, split = tl.program_id(0), tl.program_id(1)
    token, choice = tl.arange(0, BT), tl.arange(0, BC)
    col = d * BN + tl.arange(0, BN)
    n, first, last = tl.load(expert_S + split), tl.load(first_S + split), tl.load(last_S + split)
    slot = tl.load(slot_C + choice, mask=choice < C, other=-1).to(tl.int32)
    last = tl.where(tl.sum((slot == n).to(tl.int32)) > 0, last, first)
    acc = tl.zeros((BT, BN), tl.float32)
    for start in range(first, last, BK):
        neuron = start + tl.arange(0, BK)
        h = tl.load(hidden_TP + token[:, None] * P + neuron[None, :], mask=(token < T)[:, None], other=0.0)
        down = tl.load(down_PD + neuron.to(tl.int64)[:, None] * D + col[None, :], mask=(col < D)[None, :], other=0.0)
        acc = tl.dot(h, down, acc, input_precision=PRECISION)
    at = (split * T + token)[:, None] * D + col[None, :]
    tl.store(partial_STD + at, acc, mask=(token < T)[:, None] & (col < D)[None, :])


@triton.jit
def decode_sum(
    partial_STD,
    slot_C,
    weight_C,
    down_bias_ND,
    y_TD,
    T,
    D,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum of the partial products plus the weighted biases of the chosen experts; RESIDUAL adds it to y."""
    token = tl.program_id(0)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = col < D
    total = tl.zeros((BN,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_STD + (split * T + token) * D + col, mask=inside, other=0.0)
    for k in tl.static_range(K):
        n = tl.load(slot_C + token * K + k).to(tl.int32)
        weight = tl.load(weight_C + token * K + k).to(tl.float32)
        bias = tl.load(down_bias_ND + n * D + col, mask=inside & (n >= 0), other=0.0).to(tl.float32)
        total += tl.where(n >= 0, weight, 0.0) * bias
    if RESIDUAL:
        total = total.to(y_TD.dtype.element_ty).to(tl.float32)
        total += tl.load(y_TD + token * D + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_TD + token * D + col, total.to(y_TD.dtype.element_ty), mask=inside)
