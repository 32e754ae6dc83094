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
        probs_TE: softmax(z/τ), of the same type.
        expert_TK: chosen experts, int64, always in [0, E), pairwise different among kept choices.
        weight_TK: mixing weights, same type as the logits; 0 where a choice is not kept.
        kept_TK: False where a choice was dropped by capacity, lies beyond top-p's set or belongs to
            padding: it is neither computed nor counted. None says that every choice is kept.
        valid_T: False on padding. None says that every token is valid.
        unpriced_TK: the choices had the price been zero: what balancing terms count. None says
            that the price played no part, so they are `expert_TK`.
        join_E: normalised price c̃ of each expert, units of c_ref.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    kept_TK: Tensor | None = None
    valid_T: Tensor | None = None
    unpriced_TK: Tensor | None = None
    join_E: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

    def kept(self) -> Tensor:
        """kept_TK as a bool tensor, whatever the router left out."""
        return torch.ones_like(self.expert_TK, dtype=torch.bool) if self.kept_TK is None else self.kept_TK

    def valid(self) -> Tensor:
        """valid_T as a bool tensor."""
        if self.valid_T is not None:
            return self.valid_T
        return torch.ones(self.expert_TK.shape[0], dtype=torch.bool, device=self.expert_TK.device)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields in order. Gradient checkpointing carries tuples of tensors faithfully, and
        nothing else: a dataclass would lose its gradients under `use_reentrant=True`."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def from_tensors(cls, tensors: tuple[Tensor | None, ...]) -> Routing:
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]


pytree.register_dataclass(Routing)
