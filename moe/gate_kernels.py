"""Triton kernels of a router's gate: hidden states are read once, in the type they have. Optional, as ``moe.kernels``.

Shapes: T tokens, E experts (EP: at least 16, as a product needs), D model width, G groups of rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_logits(
    x_TD, weight_ED, logits_TE, T, D, E, ROWS: tl.constexpr, EP: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """logits = x·weight^T in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EP)
    acc = tl.zeros((ROWS, EP), tl.float32)
    for start in range(0, D, BK):
        col = start + tl.arange(0, BK)
        inside = (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        x = tl.load(x_TD + at, mask=(row < T)[:, None] & inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ED + expert[:, None] * D + col[None, :], mask=(expert < E)[:, None] & inside, other=0.0)
        acc = tl.dot(x, weight.to(tl.float32).T, acc, input_precision=PRECISION)
    tl.store(logits_TE + row[:, None] * E + expert[None, :], acc, mask=(row < T)[:, None] & (expert < E)[None, :])


@triton.jit
def gate_weight_gradient(
    dlogits_TE, x_TD, partial_GED, T, D, E, ROWS: tl.constexpr, STEP: tl.constexpr, EP: tl.constexpr,
    COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dlogits^T·x over a group of rows; the groups are summed afterwards, so the same input gives the same bits."""
    group = tl.program_id(0)
    expert = tl.arange(0, EP)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((EP, COLS), tl.float32)
    for start in range(0, ROWS, STEP):
        row = group * ROWS + start + tl.arange(0, STEP)
        live = (row < T)[:, None]
        dlogits = tl.load(dlogits_TE + row[:, None] * E + expert[None, :], mask=live & (expert < E)[None, :], other=0.0)
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        x = tl.load(x_TD + at, mask=live & (col < D)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(dlogits.T, x, acc, input_precision=PRECISION)
    at = (group * E + expert)[:, None] * D + col[None, :]
    tl.store(partial_GED + at, acc, mask=(expert < E)[:, None] & (col < D)[None, :])
