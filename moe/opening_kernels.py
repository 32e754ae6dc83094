"""Triton kernels that choose the experts to open in a decode step, beside ``decode_kernels.norm_route``.

Shapes: T sequences (one position each), E experts (at most 8), K choices, G = 2^E sets. A set is a number whose bit e
says that expert e is open.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def set_gains(
    select_TE, open_E, lambda_, gain_G, T, E, K: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr
):
    """What each set is worth: each sequence's K best priced scores within it, less λ·open_e of its experts. A block of
    BG sets per program."""
    g = tl.program_id(0) * BG + tl.arange(0, BG)
    e = tl.arange(0, BE)
    member = ((g[:, None] >> e[None, :]) & 1) == 1
    price = tl.load(lambda_) * tl.load(open_E + e, mask=e < E, other=0.0)
    gain = -tl.sum(tl.where(member, price[None, :], 0.0), 1)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        inside = (t < T)[:, None] & (e < E)[None, :]
        score = tl.load(select_TE + t[:, None] * E + e[None, :], mask=inside, other=0.0)
        left = tl.where(member[None, :, :], score[:, None, :], -float("inf"))
        for _ in tl.static_range(K):
            best = tl.max(left, 2)
            at = tl.min(tl.where(left == best[:, :, None], e[None, None, :], BE), 2)
            gain += tl.sum(tl.where((t < T)[:, None], best, 0.0), 0)
            left = tl.where(e[None, None, :] == at[:, :, None], -float("inf"), left)
    size = tl.sum(member.to(tl.int32), 1)
    tl.store(gain_G + g, tl.where(size < K, -float("inf"), gain))


@triton.jit
def first_set(select_TE, set_1, T, E, K: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """`piggyback`'s set: every sequence's best expert, and the most wanted others where these are fewer than K."""
    t, e = tl.arange(0, BT), tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    score = tl.load(select_TE + t[:, None] * E + e[None, :], mask=inside, other=0.0)
    ranked = tl.where((e < E)[None, :], score, -float("inf"))
    first = tl.min(tl.where(ranked == tl.max(ranked, 1)[:, None], e[None, :], BE), 1)
    opened = tl.max(((first[:, None] == e[None, :]) & (t < T)[:, None]).to(tl.int32), 0)
    wanted = tl.where(opened > 0, float("inf"), tl.sum(tl.where(inside, score, 0.0), 0))
    wanted = tl.where(e < E, wanted, -float("inf"))
    for _ in tl.static_range(K):
        at = tl.min(tl.where(wanted == tl.max(wanted), e, BE))
        opened = tl.where(e == at, 1, opened)
        wanted = tl.where(e == at, -float("inf"), wanted)
    tl.store(set_1, tl.sum(opened << e))


@triton.jit
def assign(
    score_TE, select_TE, gain_G, set_1, slot_E, slot_TK, weight_TK, E,
    K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, SEARCHED: tl.constexpr,
    NORMALIZED: tl.constexpr,
):  # fmt: skip
    """The K best open experts of a sequence and their mixing weights, a sequence per program. The open set is the best
    of `gain_G` (SEARCHED), the first among equals, or `set_1`."""
    t = tl.program_id(0)
    e = tl.arange(0, BE)
    real = e < E
    if SEARCHED:
        g = tl.arange(0, G)
        gain = tl.load(gain_G + g)
        chosen_set = tl.min(tl.where(gain == tl.max(gain), g, G))
    else:
        chosen_set = tl.load(set_1)
    score = tl.load(score_TE + t * E + e, mask=real, other=-float("inf"))
    select = tl.load(select_TE + t * E + e, mask=real, other=-float("inf"))
    select = tl.where(((chosen_set >> e) & 1) == 1, select, -float("inf"))
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
