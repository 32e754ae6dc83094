"""What a router says, and what it may know.

Shapes: T tokens of one call, batch and sequence flattened (t = b·S + s, padding included) · E experts
· K choices per token · D model width · L MoE layers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a router may know of the tokens of a call, beside their hidden states.

    `batch_size` is the number of sequences B, so that T = B·S. `valid_T` is False on padding; None
    says that every token is valid (the common case, and the fast one). `id_T` is None where the
    model was called with embeddings. `position_T` counts from the start of the text, cache included.
    """

    batch_size: int
    position_T: Tensor
    id_T: Tensor | None = None
    valid_T: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The decision of one router on one call.

    Attributes:
        logits_TE: router logits z, nats, float32 (float64 in a float64 model), before τ and price.
        log_probs_TE: log softmax(z/τ), of the same type.
        expert_TK: chosen experts, int64, always in [0, E), pairwise different among kept choices.
        weight_TK: mixing weights, same type as the logits; 0 where a choice is not kept.
        kept_TK: False where a choice was dropped by capacity, lies beyond top-p's set or belongs to
            padding: it is neither computed nor counted. None says that every choice is kept.
        dropped_TK: True where the router chose the expert but its capacity was used up. None: nowhere.
        valid_T: False on padding. None says that every token is valid.
        unpriced_TK: the choices had the price been zero: what balancing terms count. None says
            that the price played no part, so they are `expert_TK`.
        join_E: normalised price c̃ of each expert, units of c_ref.
    """

    logits_TE: Tensor
    log_probs_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor | None = None
    dropped_TK: Tensor | None = None
    valid_T: Tensor | None = None
    unpriced_TK: Tensor | None = None
    join_E: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

    @property
    def probs_TE(self) -> Tensor:
        """softmax(z/τ)."""
        return self.log_probs_TE.exp()

    def kept(self) -> Tensor:
        """kept_TK as a bool tensor, whatever the router left out."""
        return torch.ones_like(self.expert_TK, dtype=torch.bool) if self.kept_TK is None else self.kept_TK

    def valid(self) -> Tensor:
        """valid_T as a bool tensor."""
        if self.valid_T is not None:
            return self.valid_T
        return torch.ones(self.expert_TK.shape[0], dtype=torch.bool, device=self.expert_TK.device)

    def demand(self) -> tuple[Tensor, Tensor]:
        """(expert_TK, mask_TK): what the router asks for, price and capacity aside.

        Balancing counts this: counting priced choices would cancel λ, and counting what capacity
        let through would hide the very overload that it is to cure.
        """
        if self.unpriced_TK is not None:
            return self.unpriced_TK, self.valid()[:, None].expand_as(self.unpriced_TK)
        kept_TK = self.kept()
        return self.expert_TK, kept_TK if self.dropped_TK is None else kept_TK | self.dropped_TK

    def dropped_fraction(self) -> Tensor | None:
        """Share of the choices asked for that capacity dropped, a scalar on the device; None: this call drops none."""
        if self.dropped_TK is None:
            return None
        _, asked_TK = self.demand()
        return self.dropped_TK.sum() / asked_TK.sum().clamp_min(1)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields in order. Gradient checkpointing carries tuples of tensors faithfully, and
        nothing else: a dataclass would lose its gradients under `use_reentrant=True`."""
        return tuple(getattr(self, name) for name in _FIELDS)

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor | None, ...]) -> Routing:
        return cls(**dict(zip(_FIELDS, tensors, strict=True)))  # type: ignore[arg-type]


_FIELDS = tuple(field.name for field in dataclasses.fields(Routing))
pytree.register_dataclass(Routing)


def count_E(expert_TK: Tensor, mask_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert is chosen, int64 [E]. A compare and a sum: it fuses, and it is deterministic."""
    arange_E = torch.arange(num_experts, device=expert_TK.device)
    return ((expert_TK[..., None] == arange_E) & mask_TK[..., None]).sum(dim=(0, 1))
