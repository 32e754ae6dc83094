"""The chain from a batch's joules to a sequence's, a token's and an expert slot's, in one place."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyShares:
    """Joules of one call, and what they come to per sequence, per token and per expert slot."""

    batch_j: float
    sequence_j: float
    token_j: float
    slot_j: float


def share_energy(batch_j: float, *, batch_size: float, seq_len: float, top_k: int = 1) -> EnergyShares:
    """Divide the joules of a batch: by its sequences, by its tokens, by its expert slots (DESIGN §4).

    Args:
        batch_j: joules of one call on the whole batch.
        batch_size: sequences in it. Never tokens.
        seq_len: tokens that each sequence passes through the layers; 1 for a decode step.
        top_k: K. A token fills K slots, so a slot is a K-th of the token's joules.

    Raises:
        ValueError: a count below 1, or joules that are negative or not finite.
    """
    for name, count in (("batch_size", batch_size), ("seq_len", seq_len), ("top_k", top_k)):
        if count < 1:
            raise ValueError(f"{name}: expected a number of at least 1, got {count!r}")
    if not 0 <= batch_j < float("inf"):
        raise ValueError(f"batch_j: expected finite joules of at least 0, got {batch_j!r}")
    sequence_j = batch_j / batch_size
    token_j = sequence_j / seq_len
    return EnergyShares(batch_j=batch_j, sequence_j=sequence_j, token_j=token_j, slot_j=token_j / top_k)
