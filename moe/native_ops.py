"""Differentiable operators on the C functions of `moe.native`: experts, attention, dropout, the head's loss.

Each has PyTorch's operator as its fallback and its test. Shapes: T tokens, K choices per token, R = T·K rows sorted by
expert, N experts that compute, D model width, W neurons of the widest expert, B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from moe import native
from moe.dispatch import Weights, neuron_slices
from moe.head import IGNORE, causal_lm_loss
from moe.sorted_cpu import sorted_rows

HEAD_ROWS = 512  # their logits stay in a core's cache at a small vocabulary


def _groups(counts: Sequence[int], widths: Sequence[int]) -> Iterator[tuple[int, slice, slice, int]]:
    """Expert, its rows, its neurons and their number, for each expert that has a row."""
    start = 0
    for n, (count, neurons) in enumerate(zip(counts, neuron_slices(widths), strict=True)):
        yield n, slice(start, start + count), neurons, widths[n]
        start += count


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x_TD, slot_TK, weight_TK, up_PD, up_bias_P, down_PD, down_bias_ND, widths = arguments
        (T, K), widest = slot_TK.shape, max(widths, default=0)
        order_R, count_N = native.sort_rows(slot_TK.reshape(-1), len(widths))
        counts = count_N.tolist()
        live = sum(counts)
        x_RD = x_TD.index_select(0, order_R[:live] // K)
        slope_RW, hidden_RW = x_TD.new_empty(live, widest), x_TD.new_empty(live, widest)
        out_RD = torch.empty_like(x_RD)
        for n, rows, neurons, width in _groups(counts, widths):
            slope, hidden = slope_RW[rows, :width], hidden_RW[rows, :width]
            torch.mm(x_RD[rows], up_PD[neurons].T, out=slope)
            native.gelu(slope, up_bias_P[neurons], hidden)
            torch.addmm(down_bias_ND[n], hidden, down_PD[neurons], out=out_RD[rows])
        ctx.counts, ctx.widths = counts, widths
        ctx.save_for_backward(weight_TK, up_PD, down_PD, x_RD, slope_RW, hidden_RW, out_RD, order_R)
        return native.combine(out_RD, order_R, weight_TK.contiguous(), T, K, live)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        weight_TK, up_PD, down_PD, x_RD, slope_RW, hidden_RW, out_RD, order_R = ctx.saved_tensors
        (T, K), live = weight_TK.shape, x_RD.shape[0]
        dout_RD, dweight_R = native.spread(
            dy_TD.contiguous(), out_RD, order_R, weight_TK.contiguous().view(-1), K, live
        )
        dx_RD, dup_PD, ddown_PD = torch.empty_like(x_RD), torch.empty_like(up_PD), torch.empty_like(down_PD)
        dup_bias_P, ddown_bias_ND = up_PD.new_empty(up_PD.shape[0]), up_PD.new_empty(len(ctx.widths), x_RD.shape[1])
        for n, rows, neurons, width in _groups(ctx.counts, ctx.widths):
            dout, x = dout_RD[rows], x_RD[rows]
            torch.mm(hidden_RW[rows, :width].T, dout, out=ddown_PD[neurons])
            torch.sum(dout, 0, out=ddown_bias_ND[n])
            dpre = dout @ down_PD[neurons].T
            native.scale_by_slope(dpre, slope_RW[rows, :width], dup_bias_P[neurons])
            torch.mm(dpre.T, x, out=dup_PD[neurons])
            torch.mm(dpre, up_PD[neurons], out=dx_RD[rows])
        dx_TD = native.combine(dx_RD, order_R, None, T, K, live)
        return dx_TD, None, dweight_R.view_as(weight_TK), dup_PD, dup_bias_P, ddown_PD, ddown_bias_ND, None


def experts(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, weights: Weights, widths: Sequence[int]) -> Tensor:
    """Rows sorted by expert, two products per expert with a fused GELU between them, gradients written in place.

    SwiGLU, other types and a machine without a compiler take `moe.sorted_cpu`.
    """
    if weights.gate_PD is not None or not native.serves(x_TD, weight_TK, weights.up_PD):
        return sorted_rows(x_TD, slot_TK, weight_TK, weights, widths)
    return _Experts.apply(x_TD.contiguous(), slot_TK, weight_TK, *weights[:4], tuple(widths))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BSC: Tensor, heads: int, scale: float, p: float) -> Tensor:
        ctx.scale, ctx.p, ctx.seed = scale, p, native.draw_seed(p)
        out_BSD, lse_BHS = native.attention_forward(qkv_BSC, heads, scale, p, ctx.seed)
        ctx.save_for_backward(qkv_BSC, out_BSD, lse_BHS)
        return out_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BSD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BSC, out_BSD, lse_BHS = ctx.saved_tensors
        dout_BSD = dout_BSD.contiguous()
        dqkv = native.attention_backward(qkv_BSC, out_BSD, dout_BSD, lse_BHS, ctx.scale, ctx.p, ctx.seed)
        return dqkv, None, None, None


class Attention(GPT2Attention):
    """GPT-2's attention; unmasked and uncached on a CPU it runs as one operator, dropout included."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        plain = past_key_values is None and attention_mask is None and self.config._attn_implementation == "sdpa"
        if not plain or self.head_dim % 8 or kwargs.get("output_attentions") or not native.serves(hidden_states):
            return super().forward(
                hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
            )
        p = self.attn_dropout.p if self.training else 0.0
        out = _CausalAttention.apply(self.c_attn(hidden_states).contiguous(), self.num_heads, self.scaling, float(p))
        return self.resid_dropout(self.c_proj(out)), None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, ctx.seed = p, native.draw_seed(p)
        return native.dropout(x, p, ctx.seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return native.dropout(dy.contiguous(), ctx.p, ctx.seed), None


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on a CPU: the mask is a hash of seed and position and is never stored."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0.0, 1.0) or not native.serves(x):
            return super().forward(x)
        return _Dropout.apply(x.contiguous(), float(self.p))


class _HeadLoss(torch.autograd.Function):
    """The summed loss; its gradients are computed in the forward, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> Tensor:
        total, needed = hidden_TD.new_zeros(()), any(ctx.needs_input_grad)
        dhidden_TD, dweight_VD = (torch.empty_like(t) if needed else None for t in (hidden_TD, weight_VD))
        for start in range(0, len(hidden_TD), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = hidden_TD[rows] @ weight_VD.T
            total += native.softmax_gradient(logits, label_T[rows], IGNORE).sum()
            if dhidden_TD is not None and dweight_VD is not None:
                torch.mm(logits, weight_VD, out=dhidden_TD[rows])
                torch.addmm(dweight_VD, logits.T, hidden_TD[rows], beta=1.0 if start else 0.0, out=dweight_VD)
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD * dtotal, dweight_VD * dtotal, None


def head_loss(
    hidden_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """`moe.head.causal_lm_loss`, by the C functions where they serve."""
    if not native.serves(hidden_BSD, weight_VD) or not hidden_BSD.numel():
        return causal_lm_loss(hidden_BSD, weight_VD, labels_BS, num_items_in_batch)
    label_T = nn.functional.pad(labels_BS, (0, 1), value=IGNORE)[:, 1:].reshape(-1)
    total = _HeadLoss.apply(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), weight_VD.contiguous(), label_T)
    count = (label_T != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count
