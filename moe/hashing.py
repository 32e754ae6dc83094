"""Pseudo-random numbers that depend on what they are drawn for, not on when: they compile, and they repeat.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.routing import Tokens

_MASK = (1 << 31) - 1


def _mix(key: Tensor) -> Tensor:
    """Scramble 31-bit integers (multiply, xor-shift; products stay below 2^62, so nothing overflows)."""
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 14), (0x7FEB352D, 16)):
        key = ((key ^ (key >> shift)) * factor) & _MASK
    return key ^ (key >> 15)


def hash_TE(num_experts: int, seed: int, *key_T: Tensor | None) -> Tensor:
    """One number in [0, 2^31) for every token and expert, fixed by the seed and the keys given (None is skipped)."""
    keys = [key for key in key_T if key is not None]
    state_T = torch.full_like(keys[0], (seed * 2654435761 + 97) & _MASK)
    for key in keys:
        state_T = _mix(state_T ^ _mix(key & _MASK))
    expert_E = torch.arange(1, num_experts + 1, device=state_T.device) * 0x3C6EF372 & _MASK
    return _mix(state_T[:, None] ^ expert_E)


def permute_tokens(tokens: Tokens, seed: int, *, fresh: bool) -> Tensor:
    """source_T: a random permutation of the valid tokens among themselves; padding stays where it is.

    `fresh` draws anew at every call; otherwise the permutation is fixed by seed, token and position.
    """
    row_T = torch.arange(tokens.position_T.shape[0], device=tokens.position_T.device)
    if fresh:
        draw_T = torch.rand(row_T.shape[0], device=row_T.device)
    else:
        draw_T = hash_TE(1, seed, tokens.id_T, tokens.position_T, row_T)[:, 0]
    valid_T = torch.ones_like(row_T, dtype=torch.bool) if tokens.valid_T is None else tokens.valid_T
    shuffled_T = torch.where(valid_T, draw_T.double() / (1 << 31), 2.0).argsort(stable=True)  # valid first, shuffled
    in_order_T = torch.where(valid_T, 0, 1).argsort(stable=True)  # valid first, in order
    return torch.empty_like(row_T).index_copy(0, in_order_T, shuffled_T)
