"""Triton kernels of the expert computation on CUDA. Optional: nothing imports this file where Triton is missing.

Shapes: T tokens, K choices per token, C = T*K choices, N experts that compute, D model width, P neurons of all experts,
W neurons of the widest expert. Rows are choices sorted by expert, each expert's run padded to whole tiles of ``TILE``
rows, so that a tile belongs to one expert; R counts rows with padding. Padding rows hold zeros where a product could
see them. No kernel uses atomics: the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

TILE = 128  # rows of one expert's run are padded to a multiple of this


@triton.jit
def count_choices(slot_C, count_BN, C, N: tl.constexpr, BLOCK: tl.constexpr):
    """Choices per expert in each block of choices."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_C + index, mask=index < C, other=-1).to(tl.int32)
    for n in range(N):
        tl.store(count_BN + block * N + n, tl.sum((slot == n).to(tl.int32)))


@triton.jit
def place_choices(
    slot_C,
    count_BN,
    row_C,
    choice_R,
    start_N,
    expert_M,
    C,
    blocks,
    tiles,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counting sort, stable: the row of each choice, the choice of each row, the expert of each tile.

    ``start_N`` has N + 1 entries: where each expert's run starts, and the end of the last. ``choice_R`` comes in
    filled with -1, which padding rows keep.
    """
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < C
    slot = tl.load(slot_C + index, mask=inside, other=-1).to(tl.int32)
    all_blocks = tl.arange(0, BLOCKS)
    tile = tl.arange(0, TILES)
    tile_expert = tl.full((TILES,), -1, tl.int32)
    row = tl.full((BLOCK,), -1, tl.int32)
    start = tl.zeros((), tl.int32)
    for n in range(N):
        count_B = tl.load(count_BN + all_blocks * N + n, mask=all_blocks < blocks, other=0)
        before = tl.sum(tl.where(all_blocks < block, count_B, 0))
        end = start + tl.cdiv(tl.sum(count_B), TILE) * TILE
        mine = slot == n
        row = tl.where(mine, start + before + tl.cumsum(mine.to(tl.int32), 0) - 1, row)
        tile_expert = tl.where((tile * TILE >= start) & (tile * TILE < end), n, tile_expert)
        if block == 0:
            tl.store(start_N + n, start)
        start = end
    tl.store(row_C + index, row, mask=inside)
    tl.store(choice_R + row, index, mask=row >= 0)
    if block == 0:
        tl.store(start_N + N, start)
        tl.store(expert_M + tile, tile_expert, mask=tile < tiles)


@triton.jit
def gather_rows(x_TD, choice_R, expert_M, x_RD, D, K, TILE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Copy each row's token; zeros into padding rows of used tiles."""
    first = tl.program_id(0) * ROWS
    if tl.load(expert_M + first // TILE) >= 0:
        row = first + tl.arange(0, ROWS)
        col = tl.arange(0, COLS)
        choice = tl.load(choice_R + row)
        token = (choice // K).to(tl.int64)
        mask = (choice >= 0)[:, None] & (col < D)[None, :]
        values = tl.load(x_TD + token[:, None] * D + col[None, :], mask=mask, other=0.0)
        tl.store(x_RD + row.to(tl.int64)[:, None] * D + col[None, :], values, mask=(col < D)[None, :])


@triton.jit
def combine_rows(
    rows_RD,
    row_C,
    weight_C,
    y_TD,
    T,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y_t = sum over k of weight_tk (or 1) times the row of choice (t, k); a choice without a row adds nothing."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    col = tl.arange(0, COLS)
    total = tl.zeros((TOKENS, COLS), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_C + token * K + k, mask=token < T, other=-1)
        mask = (row >= 0)[:, None] & (col < D)[None, :]
        values = tl.load(rows_RD + row.to(tl.int64)[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weight_C + token * K + k, mask=token < T, other=0.0).to(tl.float32)[:, None]
        total += values
    out = total.to(y_TD.dtype.element_ty)
    mask = (token < T)[:, None] & (col < D)[None, :]
    tl.store(y_TD + token.to(tl.int64)[:, None] * D + col[None, :], out, mask=mask)


@triton.jit
def spread_gradient(
    dy_TD,
    out_RD,
    weight_C,
    choice_R,
    expert_M,
    dout_RD,
    dweight_C,
    partial_GD,
    D,
    K,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLS: tl.constexpr,
):
    """Backward of the weighted combine, in row order: the rows' gradients, the weights', and partial bias sums."""
    first = tl.program_id(0) * ROWS
    if tl.load(expert_M + first // TILE) >= 0:
        col = tl.arange(0, COLS)
        total = tl.zeros((COLS,), tl.float32)
        for step in range(0, ROWS, STEP):
            row = first + step + tl.arange(0, STEP)
            choice = tl.load(choice_R + row)
            live = choice >= 0
            mask = live[:, None] & (col < D)[None, :]
            token = (choice // K).to(tl.int64)
            at = row.to(tl.int64)[:, None] * D + col[None, :]
            dy = tl.load(dy_TD + token[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
            out = tl.load(out_RD + at, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_C + choice, mask=live, other=0.0).to(tl.float32)
            dweight = tl.sum(dy * out, 1).to(dweight_C.dtype.element_ty)
            tl.store(dweight_C + choice, dweight, mask=live)
            dout = dy * weight[:, None]
            total += tl.sum(dout, 0)
            tl.store(dout_RD + at, dout.to(dout_RD.dtype.element_ty), mask=(col < D)[None, :])
        tl.store(partial_GD + tl.program_id(0) * D + col, total, mask=col < D)


@triton.jit
def sum_partials(
    partial_GW, start_N, offset_N, total, W, ROWS: tl.constexpr, RAGGED: tl.constexpr, AT_ONCE: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Per expert, the sum over its row groups: total[n] of D columns, or of the expert's own neurons (RAGGED)."""
    n = tl.program_id(0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin, end = tl.load(start_N + n) // ROWS, tl.load(start_N + n + 1) // ROWS
    place = n * W
    width = W
    if RAGGED:
        place = tl.load(offset_N + n)
        width = tl.load(offset_N + n + 1) - place
    value = tl.zeros((AT_ONCE, COLS), tl.float32)
    for first in range(begin, end, AT_ONCE):
        group = first + tl.arange(0, AT_ONCE)
        mask = (group < end)[:, None] & (col < width)[None, :]
        value += tl.load(partial_GW + group[:, None] * W + col[None, :], mask=mask, other=0.0)
    tl.store(total + place + col, tl.sum(value, 0).to(total.dtype.element_ty), mask=col < width)


@triton.jit
def _gelu_parts(u, EXACT: tl.constexpr):
    """sigmoid(2v) and 2 dv/du of GPT-2's tanh GELU, which is u * sigmoid(2v), v = sqrt(2/pi) (u + 0.044715 u^3).

    Without EXACT the reciprocal is the hardware's (1 ulp), which shortens the epilogue of a 16-bit product.
    """
    square = u * u
    exponential = tl.exp2(-u * (2.302208198 + 0.1029432397 * square))  # factors of log2(e) folded in
    if EXACT:
        s = 1.0 / (1.0 + exponential)
    else:
        s = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + exponential], dtype=tl.float32, is_pure=True, pack=1
        )
    return s, 1.5957691216057308 + 0.2140644488 * square


@triton.jit
def _swizzle(pid, rows, columns, GROUP: tl.constexpr):
    """Walk tiles in bands of GROUP rows, so that neighbours share operands in L2."""
    band = GROUP * columns
    first = (pid // band) * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + (pid % band) % height, (pid % band) // height


@triton.jit
def rows_to_neurons(
    a_desc,
    b_desc,
    pre_desc,
    out_desc,
    bias_P,
    partial_MW,
    expert_M,
    offset_N,
    D,
    W,
    tiles,
    BACKWARD: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[rows, D] times [neurons, D] transposed, per expert.

    Forward: pre = x·up^T + bias is stored, and out = gelu(pre). Backward: out = (dy·down^T) * gelu'(pre), pre is read,
    and the column sums of out go to ``partial_MW`` (one row per tile) for the bias gradient.
    """
    m, f = _swizzle(tl.program_id(0), tiles, tl.cdiv(W, BN), GROUP)
    n = tl.load(expert_M + m * BM // TILE)
    if n >= 0:
        offset = tl.load(offset_N + n)
        width = tl.load(offset_N + n + 1) - offset
        if f * BN < width:
            acc = tl.zeros((BM, BN), tl.float32)
            for k in range(0, D, BK):
                a = a_desc.load([m * BM, k])
                b = b_desc.load([offset + f * BN, k])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            col = f * BN + tl.arange(0, BN)
            if BACKWARD:
                pre = pre_desc.load([m * BM, f * BN]).to(tl.float32)
                s, slope = _gelu_parts(pre, EXACT)
                out = (acc * (s + pre * s * (1.0 - s) * slope)).to(out_desc.dtype)  # 16 bits: half the registers
                out_desc.store([m * BM, f * BN], out)
                tl.store(partial_MW + m * W + col, tl.sum(out.to(tl.float32), 0), mask=col < width)
            else:
                bias = tl.load(bias_P + offset + col, mask=col < width, other=0.0)
                pre = acc + bias.to(tl.float32)[None, :]
                pre_desc.store([m * BM, f * BN], pre.to(pre_desc.dtype))
                s, _ = _gelu_parts(pre, EXACT)
                out_desc.store([m * BM, f * BN], (pre * s).to(out_desc.dtype))


@triton.jit
def neurons_to_rows(
    a_desc,
    b_desc,
    out_desc,
    bias_ND,
    expert_M,
    offset_N,
    D,
    tiles,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[rows, neurons of the row's expert] times [those neurons, D] (+ the expert's bias)."""
    m, d = _swizzle(tl.program_id(0), tiles, tl.cdiv(D, BN), GROUP)
    n = tl.load(expert_M + m * BM // TILE)
    if n >= 0:
        offset = tl.load(offset_N + n)
        width = tl.load(offset_N + n + 1) - offset
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, width, BK):
            a = a_desc.load([m * BM, k])
            b = b_desc.load([offset + k, d * BN])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if BIAS:
            col = d * BN + tl.arange(0, BN)
            acc += tl.load(bias_ND + n * D + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
        out_desc.store([m * BM, d * BN], acc.to(out_desc.dtype))


@triton.jit
def weight_gradient(
    a_desc,
    b_desc,
    out_PD,
    start_N,
    offset_N,
    D,
    W,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[rows, neurons] transposed times [rows, D] over the rows of each expert; zero where it has none."""
    n = tl.program_id(1)
    f, d = _swizzle(tl.program_id(0), tl.cdiv(W, BM), tl.cdiv(D, BN), GROUP)
    offset = tl.load(offset_N + n)
    width = tl.load(offset_N + n + 1) - offset
    if f * BM < width:
        begin, end = tl.load(start_N + n), tl.load(start_N + n + 1)
        acc = tl.zeros((BM, BN), tl.float32)
        for r in range(begin, end, BK):
            a = a_desc.load([r, f * BM])
            b = b_desc.load([r, d * BN])
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        neuron = f * BM + tl.arange(0, BM)
        col = d * BN + tl.arange(0, BN)
        mask = (neuron < width)[:, None] & (col < D)[None, :]
        at = (offset + neuron).to(tl.int64)[:, None] * D + col[None, :]
        tl.store(out_PD + at, acc.to(out_PD.dtype.element_ty), mask=mask)
