"""The CPU path: rows sorted by expert, one pair of GEMMs per open expert, gradients written in place.

Autograd of a sliced, stacked parameter allocates the whole stack once per expert; the hand-written backward writes each
expert's gradient into its rows once. The operator is opaque to torch.compile, so a graph stays whole around it.
Shapes: see ``moe.dispatch``; W is the width of the widest expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.dispatch import Weights, neuron_slices


class _Group(NamedTuple):
    n: int  # expert
    rows: slice  # of the sorted rows
    neurons: slice


def _order(slot_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Positions of the T*K choices sorted by expert, the idle ones last, and the number of rows of each expert."""
    slot_R = slot_TK.reshape(-1).long()
    slot_R = torch.where(slot_R < 0, experts, slot_R)
    return slot_R.argsort(stable=True), torch.bincount(slot_R, minlength=experts + 1)[:experts]


def _groups(count_N: Tensor, widths: Sequence[int]) -> Iterator[_Group]:
    start = 0
    for n, (count, neurons) in enumerate(zip(count_N.tolist(), neuron_slices(widths), strict=True)):
        yield _Group(n, slice(start, start + count), neurons)
        start += count


@torch.library.custom_op("joulemoe::sorted_experts", mutates_args=())
def sorted_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    up_PD: Tensor,
    up_bias_P: Tensor,
    down_PD: Tensor,
    down_bias_ND: Tensor,
    gate_PD: Tensor | None,
    gate_bias_P: Tensor | None,
    widths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y_TD, then what the backward needs: pre-activations, hidden values, outputs, order, counts."""
    T, K = slot_TK.shape
    gated = gate_PD is not None
    order_R, count_N = _order(slot_TK, len(widths))
    token_R = order_R // K
    x_RD = x_TD.index_select(0, token_R)
    pre_RW = x_TD.new_empty(T * K, max(widths) * (2 if gated else 1))
    hidden_RW = x_TD.new_empty(T * K, max(widths))
    out_RD = torch.empty_like(x_RD)
    out_RD[int(count_N.sum()) :] = 0  # what computes nothing
    for n, rows, neurons in _groups(count_N, widths):
        width = neurons.stop - neurons.start
        pre, hidden = pre_RW[rows, :width], hidden_RW[rows, :width]
        torch.addmm(up_bias_P[neurons], x_RD[rows], up_PD[neurons].T, out=pre)
        if gate_PD is None or gate_bias_P is None:
            torch.ops.aten.gelu.out(pre, approximate="tanh", out=hidden)
        else:
            gate = pre_RW[rows, width : 2 * width]
            torch.addmm(gate_bias_P[neurons], x_RD[rows], gate_PD[neurons].T, out=gate)
            torch.mul(F.silu(gate), pre, out=hidden)
        torch.addmm(down_bias_ND[n], hidden, down_PD[neurons], out=out_RD[rows])
    scaled_RD = out_RD * weight_TK.reshape(-1)[order_R].to(x_TD.dtype)[:, None]
    return _per_token(scaled_RD, order_R, K), pre_RW, hidden_RW, out_RD, order_R, count_N


def _per_token(rows_RD: Tensor, order_R: Tensor, choices: int) -> Tensor:
    """The sum of each token's rows, y_TD."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel())
    rows_RD = rows_RD.index_select(0, place_R)
    return rows_RD if choices == 1 else rows_RD.view(-1, choices, rows_RD.shape[1]).sum(1)


@sorted_experts.register_fake
def _(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, widths = slot_TK.numel(), rest[-1]
    wide = max(widths) * (1 if rest[-3] is None else 2)
    return (
        torch.empty_like(x_TD),
        x_TD.new_empty(rows, wide),
        x_TD.new_empty(rows, max(widths)),
        x_TD.new_empty(rows, x_TD.shape[1]),
        slot_TK.new_empty(rows, dtype=torch.int64),
        slot_TK.new_empty(len(widths), dtype=torch.int64),
    )


@torch.library.custom_op("joulemoe::sorted_experts_backward", mutates_args=())
def sorted_experts_backward(
    dy_TD: Tensor, saved: Sequence[Tensor], gate_PD: Tensor | None, widths: Sequence[int]
) -> list[Tensor]:
    """Gradients of x, the mixing weights and each parameter, in the order of the forward's arguments."""
    x_TD, weight_TK, up_PD, down_PD, pre_RW, hidden_RW, out_RD, order_R, count_N = saved
    K = weight_TK.shape[1]
    token_R = order_R // K
    x_RD, dy_RD = x_TD.index_select(0, token_R), dy_TD.index_select(0, token_R)
    dweight_R = torch.empty_like(weight_TK).reshape(-1)
    dweight_R[order_R] = (dy_RD * out_RD).sum(1).to(weight_TK.dtype)
    dout_RD = dy_RD * weight_TK.reshape(-1)[order_R].to(dy_TD.dtype)[:, None]
    dx_RD = torch.empty_like(x_RD)
    dx_RD[int(count_N.sum()) :] = 0
    d_up, d_down, d_up_bias = torch.empty_like(up_PD), torch.empty_like(down_PD), up_PD.new_empty(up_PD.shape[0])
    d_down_bias = up_PD.new_empty(len(widths), x_TD.shape[1])
    d_gate = [] if gate_PD is None else [torch.empty_like(gate_PD), torch.empty_like(d_up_bias)]
    for n, rows, neurons in _groups(count_N, widths):
        width = neurons.stop - neurons.start
        pre, hidden, dout = pre_RW[rows, :width], hidden_RW[rows, :width], dout_RD[rows]
        torch.mm(hidden.T, dout, out=d_down[neurons])
        torch.sum(dout, 0, out=d_down_bias[n])
        d_hidden = dout @ down_PD[neurons].T
        if gate_PD is None:
            d_pre = torch.ops.aten.gelu_backward(d_hidden, pre, approximate="tanh")
            torch.mm(d_pre, up_PD[neurons], out=dx_RD[rows])
        else:
            gate = pre_RW[rows, width : 2 * width]
            d_pre = d_hidden * F.silu(gate)
            dg = torch.ops.aten.silu_backward(d_hidden * pre, gate)
            torch.mm(dg.T, x_RD[rows], out=d_gate[0][neurons])
            torch.sum(dg, 0, out=d_gate[1][neurons])
            torch.mm(dg, gate_PD[neurons], out=dx_RD[rows])
            dx_RD[rows].addmm_(d_pre, up_PD[neurons])
        torch.mm(d_pre.T, x_RD[rows], out=d_up[neurons])
        torch.sum(d_pre, 0, out=d_up_bias[neurons])
    dx_TD = _per_token(dx_RD, order_R, K)
    return [dx_TD, dweight_R.view_as(weight_TK), d_up, d_up_bias, d_down, d_down_bias, *d_gate]


@sorted_experts_backward.register_fake
def _(dy_TD: Tensor, saved: Sequence[Tensor], gate_PD: Tensor | None, widths: Sequence[int]) -> list[Tensor]:
    x_TD, weight_TK, up_PD, down_PD = saved[:4]
    bias = up_PD.new_empty(up_PD.shape[0])
    gates = [] if gate_PD is None else [torch.empty_like(gate_PD), torch.empty_like(bias)]
    down_bias = up_PD.new_empty(len(widths), x_TD.shape[1])
    plain = [torch.empty_like(t) for t in (x_TD, weight_TK, up_PD)]
    return [*plain, bias, torch.empty_like(down_PD), down_bias, *gates]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weight_TK, up_PD, _, down_PD, _, gate_PD, _, widths = inputs
    ctx.widths = widths
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x_TD, weight_TK, up_PD, down_PD, *output[1:], gate_PD)


def _backward(ctx: Any, dy_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *saved, gate_PD = ctx.saved_tensors
    dx, dweight, *params = sorted_experts_backward(dy_TD.contiguous(), saved, gate_PD, ctx.widths)
    return (dx, None, dweight, *params, *([None] * (6 - len(params))), None)


sorted_experts.register_autograd(_backward, setup_context=_setup_context)


def sorted_rows(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, weights: Weights, widths: Sequence[int]) -> Tensor:
    """Sort by expert, then two GEMMs (SwiGLU: three) per expert that has a token."""
    return sorted_experts(x_TD, slot_TK, weight_TK, *weights, list(widths))[0]
