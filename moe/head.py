"""The language-model head and its cross-entropy in one operator, without logits in memory.

Shapes: T tokens, D model width, V vocabulary. GPT-2's 50 257 entries are padded to a multiple of 128 inside, because
matrix products with an odd leading dimension run on slow paths. The gradients of the loss are computed in the forward
(as Liger-Kernel does, Hsu et al. 2024, https://arxiv.org/abs/2410.10989), a chunk of tokens at a time; the backward
scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from moe import head_kernels
except ModuleNotFoundError:  # no Triton
    head_kernels = None  # type: ignore[assignment]

IGNORE = -100
VOCABULARY_MULTIPLE = 128
CHUNK_TOKENS = 4096


def _loss_and_gradient(logits_TV: Tensor, label_T: Tensor, vocabulary: int) -> Tensor:
    """Losses of the rows, nats, float32 (0 where ignored); ``logits_TV`` becomes softmax - one-hot, 0 in padding."""
    if head_kernels is not None and logits_TV.is_cuda and logits_TV.dtype != torch.float64:
        T, stride = logits_TV.shape
        loss_T = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
        head_kernels.softmax_gradient[(T,)](
            logits_TV, label_T, loss_T, vocabulary, stride, IGNORE=IGNORE, BLOCK=4096, num_warps=8
        )
        return loss_T
    logits_TV[:, vocabulary:] = -torch.inf
    valid_T1 = (label_T != IGNORE)[:, None]
    index_T1 = label_T.clamp_min(0)[:, None]
    log_p_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(1)
    loss_T1 = torch.where(valid_T1, -log_p_TV.gather(1, index_T1), 0.0)
    gradient_TV = log_p_TV.exp_().scatter_add_(1, index_T1, torch.full_like(loss_T1, -1.0))
    logits_TV.copy_(torch.where(valid_T1, gradient_TV, 0.0))
    return loss_T1[:, 0]


@torch.library.custom_op("joulemoe::head_loss", mutates_args=())
def head_loss(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss of T tokens, and (with ``gradients``) its gradients by hidden states and weights."""
    (T, D), V = hidden_TD.shape, weight_VD.shape[0]
    padded = -(-V // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    padded_VD = weight_VD.new_zeros(padded, D)
    padded_VD[:V] = weight_VD
    total = torch.zeros((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32), device=hidden_TD.device)
    dhidden_TD = hidden_TD.new_empty(hidden_TD.shape if gradients else (0, D))
    dweight_VD = weight_VD.new_zeros(padded if gradients else 0, D)
    for start in range(0, T, CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        logits_TV = hidden_TD[rows] @ padded_VD.T
        total += _loss_and_gradient(logits_TV, label_T[rows].contiguous(), V).sum()
        if gradients:
            torch.mm(logits_TV, padded_VD, out=dhidden_TD[rows])
            dweight_VD.addmm_(logits_TV.T, hidden_TD[rows], beta=1.0 if start else 0.0)
    return total, dhidden_TD, dweight_VD[:V]


@head_loss.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden_TD.new_empty((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
    D = hidden_TD.shape[1]
    dhidden = hidden_TD.new_empty(hidden_TD.shape if gradients else (0, D))
    return total, dhidden, weight_VD.new_empty(weight_VD.shape if gradients else (0, D))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, dtotal: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dhidden_TD, dweight_VD = ctx.saved_tensors
    return (dhidden_TD * dtotal).to(dhidden_TD.dtype), (dweight_VD * dtotal).to(dweight_VD.dtype), None, None


head_loss.register_autograd(_backward, setup_context=_setup_context)


def causal_lm_loss(
    hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Next-token cross-entropy, nats per target: equals transformers' ``ForCausalLMLoss`` of ``hidden @ weight.T``.

    Args:
        hidden_BSD: last hidden states, after the final norm.
        weight_VD: the head, no bias.
        labels_BS: targets, shifted inside; -100 is ignored.
        num_items_in_batch: targets to divide by, where this call is one micro-batch of a step; default: its own.
    """
    kind = hidden_BSD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_BSD.dtype
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]).to(dtype)
    label_BS = torch.nn.functional.pad(labels_BS, (0, 1), value=IGNORE)[:, 1:]
    label_T = label_BS.reshape(-1).contiguous()
    total, _, _ = head_loss(hidden_TD, weight_VD.to(dtype), label_T, torch.is_grad_enabled())
    count = (label_T != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count
