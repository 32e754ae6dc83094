"""Triton kernels of one decode step: few tokens, so the time is that of reading the weights once. Optional, as
``moe.kernels``.

Shapes: T tokens (one per sequence), K choices per token, E experts, D model width, H heads of width A, L positions of
the cache, V vocabulary. All tokens stand in one tile of BT rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed(token_T, position_T, wte_VD, wpe_LD, x_TD, D, COLS: tl.constexpr):
    """x = token embedding + position embedding."""
    t = tl.program_id(0)
    col = tl.arange(0, COLS)
    inside = col < D
    token = tl.load(wte_VD + tl.load(token_T + t) * D + col, mask=inside)
    position = tl.load(wpe_LD + tl.load(position_T + t) * D + col, mask=inside)
    x = token.to(tl.float32) + position.to(tl.float32)
    tl.store(x_TD + t * D + col, x.to(x_TD.dtype.element_ty), mask=inside)


@triton.jit
def _row_statistics(x_TD, token, live, D, EPS, BT: tl.constexpr, COLS: tl.constexpr):
    """Mean and 1/deviation of each row; unrolled, so that all loads are in flight at once."""
    total = tl.zeros((BT,), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for start in tl.static_range(0, COLS, 64):
        col = start + tl.arange(0, 64)
        mask = live[:, None] & (col < D)[None, :]
        x = tl.load(x_TD + token[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    mean = total / D
    return mean, tl.rsqrt(squares / D - mean * mean + EPS)


@triton.jit
def norm_qkv(
    x_TD,
    gamma_D,
    beta_D,
    weight_DQ,
    bias_Q,
    query_TD,
    key_THLA,
    value_THLA,
    length_T,
    T,
    D,
    L,
    EPS,
    A: tl.constexpr,
    COLS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """LayerNorm, then the attention's three projections; keys and values go straight into the cache."""
    token = tl.arange(0, BT)
    live = token < T
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    mean, inverse = _row_statistics(x_TD, token, live, D, EPS, BT, COLS)
    acc = tl.zeros((BT, BN), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_TD + token[:, None] * D + k[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        gamma, beta = tl.load(gamma_D + k).to(tl.float32), tl.load(beta_D + k).to(tl.float32)
        x = (x - mean[:, None]) * inverse[:, None] * gamma[None, :] + beta[None, :]
        weight = tl.load(weight_DQ + k[:, None] * (3 * D) + col[None, :])
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision=PRECISION)
    out = (acc + tl.load(bias_Q + col).to(tl.float32)[None, :]).to(query_TD.dtype.element_ty)
    part = tl.program_id(0) * BN // D  # BN divides D: a block is query, key or value
    inner = col - part * D
    if part == 0:
        tl.store(query_TD + token[:, None] * D + inner[None, :], out, mask=live[:, None])
    else:
        place = tl.load(length_T + token, mask=live, other=0)
        row = (token[:, None] * (D // A) + (inner // A)[None, :]) * L + place[:, None]
        at = row.to(tl.int64) * A + (inner % A)[None, :]
        if part == 1:
            tl.store(key_THLA + at, out, mask=live[:, None])
        else:
            tl.store(value_THLA + at, out, mask=live[:, None])


@triton.jit
def attend(query_TD, key_THLA, value_THLA, mask_TL, length_T, out_TD, H, L, scale, A: tl.constexpr, BL: tl.constexpr):
    """Attention of one new token per sequence over its cache, one head per program; masked positions are padding."""
    t, h = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, A)
    count = tl.load(length_T + t) + 1
    query = tl.load(query_TD + (t * H + h) * A + dim).to(tl.float32) * scale
    base = (t * H + h).to(tl.int64) * L * A
    peak = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((A,), tl.float32)
    for start in range(0, count, BL):
        j = start + tl.arange(0, BL)
        inside = j < count
        seen = inside & (tl.load(mask_TL + t * L + j, mask=inside, other=0) != 0)
        at = base + j[:, None] * A + dim[None, :]
        key = tl.load(key_THLA + at, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(key * query[None, :], 1), -float("inf"))
        new = tl.maximum(peak, tl.max(score))
        p = tl.exp(score - new)
        keep = tl.exp(peak - new)
        value = tl.load(value_THLA + at, mask=inside[:, None], other=0.0).to(tl.float32)
        acc = acc * keep + tl.sum(p[:, None] * value, 0)
        total = total * keep + tl.sum(p)
        peak = new
    tl.store(out_TD + (t * H + h) * A + dim, (acc / total).to(out_TD.dtype.element_ty))


@triton.jit
def project_residual(
    a_TD,
    weight_DD,
    bias_D,
    x_TD,
    T,
    D,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x += a·weight + bias."""
    token = tl.arange(0, BT)
    live = (token < T)[:, None]
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BT, BN), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_TD + token[:, None] * D + k[None, :], mask=live, other=0.0)
        weight = tl.load(weight_DD + k[:, None] * D + col[None, :])
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
    out = (acc + tl.load(bias_D + col).to(tl.float32)[None, :]).to(x_TD.dtype.element_ty).to(tl.float32)
    at = token[:, None] * D + col[None, :]
    out += tl.load(x_TD + at, mask=live, other=0.0).to(tl.float32)
    tl.store(x_TD + at, out.to(x_TD.dtype.element_ty), mask=live)


@triton.jit
def norm_rows(x_TD, gamma_D, beta_D, out_TD, D, EPS, COLS: tl.constexpr):
    """LayerNorm, one row per program."""
    t = tl.program_id(0)
    col = tl.arange(0, COLS)
    inside = col < D
    x = tl.load(x_TD + t * D + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x) / D
    centred = tl.where(inside, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / D + EPS)
    gamma = tl.load(gamma_D + col, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(beta_D + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_TD + t * D + col, (centred * inverse * gamma + beta).to(out_TD.dtype.element_ty), mask=inside)


@triton.jit
def norm_route(
    x_TD,
    gamma_D,
    beta_D,
    gate_ED,
    offset_E,
    bias_E,
    join_E,
    lambda_,
    temperature,
    slot_E,
    out_TD,
    slot_TK,
    weight_TK,
    score_TE,
    select_TE,
    D,
    E,
    EPS,
    SCORES: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    PRICED: tl.constexpr,
    BALANCED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BE: tl.constexpr,
    COLS: tl.constexpr,
    BK: tl.constexpr,
):
    """LayerNorm, router logits in float32, top-k of s (+ b - λ·c̃) and its mixing weights, one token per program.
    SCORES: also store s and what selects."""
    t = tl.program_id(0)
    e = tl.arange(0, BE)
    real = e < E
    col = tl.arange(0, COLS)
    inside = col < D
    x = tl.load(x_TD + t * D + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x) / D
    centred = tl.where(inside, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / D + EPS)
    logit = tl.load(offset_E + e, mask=real, other=0.0)
    for start in range(0, D, BK):
        col = start + tl.arange(0, BK)
        inside = col < D
        x = (tl.load(x_TD + t * D + col, mask=inside, other=0.0).to(tl.float32) - mean) * inverse
        gamma = tl.load(gamma_D + col, mask=inside, other=0.0).to(tl.float32)
        beta = tl.load(beta_D + col, mask=inside, other=0.0).to(tl.float32)
        x = x * gamma + beta
        low = x.to(out_TD.dtype.element_ty)
        tl.store(out_TD + t * D + col, low, mask=inside)
        mask = real[:, None] & inside[None, :]
        gate = tl.load(gate_ED + e[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if x_TD.dtype.element_ty != tl.float32:  # what a 16-bit model's router sees is rounded
            x = low.to(tl.float32)
        logit += tl.sum(gate * x[None, :], 1)
    score = tl.where(real, logit / tl.load(temperature), -float("inf"))
    select = score
    if BALANCED:
        select += tl.load(bias_E + e, mask=real, other=0.0)
    if PRICED:
        select -= tl.load(lambda_) * tl.load(join_E + e, mask=real, other=0.0)
    if SCORES:  # for what chooses over all sequences
        tl.store(score_TE + t * E + e, score, mask=real)
        tl.store(select_TE + t * E + e, select, mask=real)
    choice = tl.arange(0, KP)
    chosen = tl.zeros((KP,), tl.int32)
    picked = tl.full((KP,), -float("inf"), tl.float32)
    for k in tl.static_range(K):
        best = tl.min(tl.where(select == tl.max(select), e, BE))
        chosen = tl.where(choice == k, best, chosen)
        picked = tl.where(choice == k, tl.sum(tl.where(e == best, score, 0.0)), picked)
        select = tl.where(e == best, -float("inf"), select)
    if NORMALIZED:
        p = tl.exp(picked - tl.max(picked))
        weight = p / tl.sum(p)
    else:
        peak = tl.max(score)
        weight = tl.exp(picked - peak) / tl.sum(tl.exp(score - peak))
    tl.store(slot_TK + t * K + choice, tl.load(slot_E + chosen), mask=choice < K)
    tl.store(weight_TK + t * K + choice, weight, mask=choice < K)


@triton.jit
def head_scores(
    h_TD,
    weight_VD,
    logits_TV,
    best_BT,
    where_BT,
    length_T,
    least_1,
    eos_F,
    T,
    D,
    V,
    STORE: tl.constexpr,
    EOS: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of a block of the vocabulary, rounded to the model's type, and each token's best of the block, in which
    no token ends a sequence before it has its least length."""
    block = tl.program_id(0)
    token = tl.arange(0, BT)
    live = token < T
    entry = block * BV + tl.arange(0, BV)
    acc = tl.zeros((BT, BV), tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        h = tl.load(h_TD + token[:, None] * D + k[None, :], mask=live[:, None], other=0.0)
        weight = tl.load(weight_VD + entry.to(tl.int64)[:, None] * D + k[None, :], mask=(entry < V)[:, None], other=0.0)
        acc = tl.dot(h, weight.T, acc, input_precision=PRECISION)
    low = acc.to(logits_TV.dtype.element_ty)
    if STORE:
        at = token.to(tl.int64)[:, None] * V + entry[None, :]
        tl.store(logits_TV + at, low, mask=live[:, None] & (entry < V)[None, :])
    score = tl.where((entry < V)[None, :], low.to(tl.float32), -float("inf"))
    early = tl.load(length_T + token, mask=live, other=0) + 1 < tl.load(least_1)
    for i in tl.static_range(EOS):
        ends = entry == tl.load(eos_F + i)
        score = tl.where(early[:, None] & ends[None, :], -float("inf"), score)
    best = tl.max(score, 1)
    first = tl.min(tl.where(score == best[:, None], entry[None, :], V), 1)
    tl.store(best_BT + block * T + token, best, mask=live)
    tl.store(where_BT + block * T + token, first, mask=live)


@triton.jit
def pick(
    best_BT,
    where_BT,
    eos_F,
    token_T,
    position_T,
    length_T,
    finished_T,
    ids_TL,
    pad_1,
    blocks,
    T,
    L,
    V,
    EOS: tl.constexpr,
    BB: tl.constexpr,
):
    """Greedy choice (the first of equals), written behind the sequence; finished sequences get padding."""
    t = tl.program_id(0)
    block = tl.arange(0, BB)
    best = tl.load(best_BT + block * T + t, mask=block < blocks, other=-float("inf"))
    entry = tl.load(where_BT + block * T + t, mask=block < blocks, other=V)
    token = tl.minimum(tl.min(tl.where(best == tl.max(best), entry, V)), V - 1).to(tl.int64)
    finished = tl.load(finished_T + t)
    token = tl.where(finished != 0, tl.load(pad_1), token)
    for i in tl.static_range(EOS):
        finished = tl.where(token == tl.load(eos_F + i), 1, finished)
    length = tl.load(length_T + t) + 1
    tl.store(ids_TL + t * L + length, token)
    tl.store(token_T + t, token)
    tl.store(finished_T + t, finished)
    tl.store(length_T + t, length)
    tl.store(position_T + t, tl.load(position_T + t) + 1)
