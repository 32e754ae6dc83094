"""How rows reach experts and come back: the loop reference, the sorted CPU path and torch's grouped GEMM.

Shapes: T tokens, K choices per token, R = T*K rows, N experts that compute, D model width, F neurons of one expert,
P neurons of all experts. An expert is a run of neurons: expert n owns rows [offset_n, offset_n + F_n) of ``up_PD``
and of ``down_PD``, so experts of unequal width need no padding. ``slot_TK`` names the computing expert of each choice,
or is negative where a choice computes nothing (dropped, padding, null expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """The parameters of N experts; ``gate_PD`` and ``gate_bias_P`` only for SwiGLU."""

    up_PD: Tensor
    up_bias_P: Tensor
    down_PD: Tensor
    down_bias_ND: Tensor
    gate_PD: Tensor | None = None
    gate_bias_P: Tensor | None = None


def neuron_slices(widths: Sequence[int]) -> list[slice]:
    """The rows of ``up_PD`` and ``down_PD`` that belong to each expert."""
    ends = list(accumulate(widths))
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def one_expert(x_TD: Tensor, weights: Weights, neurons: slice, n: int) -> Tensor:
    """Expert n on every row: GPT-2's feed-forward network (tanh GELU) or SwiGLU, biases included."""
    hidden = F.linear(x_TD, weights.up_PD[neurons], weights.up_bias_P[neurons])
    if weights.gate_PD is None:
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        assert weights.gate_bias_P is not None
        hidden = F.silu(F.linear(x_TD, weights.gate_PD[neurons], weights.gate_bias_P[neurons])) * hidden
    return hidden @ weights.down_PD[neurons] + weights.down_bias_ND[n]


def loop(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, weights: Weights, widths: Sequence[int]) -> Tensor:
    """The reference: every expert on every token, weighted by the sum of the choices that name it.

    Costs N times the needed FLOPs; exists to be obviously right, in any dtype and on any device.
    """
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, weight_TK.dtype))
    for n, neurons in enumerate(neuron_slices(widths)):
        share_T = torch.where(slot_TK == n, weight_TK, torch.zeros_like(weight_TK)).sum(1)
        y_TD = y_TD + share_T[:, None] * one_expert(x_TD, weights, neurons, n)
    return y_TD.to(x_TD.dtype)


def grouped(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, weights: Weights, widths: Sequence[int]) -> Tensor:
    """Sort by expert and multiply with ``F.grouped_mm``, one sort per distinct width; no host synchronisation.

    Source: the dispatch of transformers' ``grouped_mm`` experts. No float64 (a limit of ``F.grouped_mm``).
    """
    slices = neuron_slices(widths)
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, weight_TK.dtype))
    for width in sorted(set(widths)):
        members = [n for n, w in enumerate(widths) if w == width]
        index = torch.cat([torch.arange(slices[n].start, slices[n].stop, device=x_TD.device) for n in members])
        whole = len(members) == len(widths)
        rows = weights if whole else _select(weights, index)
        part = rows._replace(down_bias_ND=weights.down_bias_ND[members])
        local_TK = torch.full_like(slot_TK, len(members))
        for position, n in enumerate(members):
            local_TK = torch.where(slot_TK == n, position, local_TK)
        y_TD = y_TD + _grouped_uniform(x_TD, local_TK, weight_TK, part, (len(members), width))
    return y_TD.to(x_TD.dtype)


def _select(weights: Weights, index: Tensor) -> Weights:
    """Some of the neurons."""
    gate_PD, gate_bias_P = (None if w is None else w[index] for w in (weights.gate_PD, weights.gate_bias_P))
    up_PD, up_bias_P, down_PD = (w[index] for w in (weights.up_PD, weights.up_bias_P, weights.down_PD))
    return Weights(up_PD, up_bias_P, down_PD, weights.down_bias_ND, gate_PD, gate_bias_P)


def _grouped_uniform(
    x_TD: Tensor, local_TK: Tensor, weight_TK: Tensor, weights: Weights, shape: tuple[int, int]
) -> Tensor:
    """Experts of one width; rows whose local id equals the number of experts compute nothing."""
    members, width = shape
    sorted_R, order_R = local_TK.reshape(-1).sort(stable=True)
    token_R = order_R // local_TK.shape[1]
    live_R1 = (sorted_R < members)[:, None]
    expert_R = sorted_R.clamp(max=members - 1)
    ids = torch.arange(1, members + 1, device=x_TD.device)
    ends = torch.searchsorted(sorted_R, ids).to(torch.int32)

    def project(rows: Tensor, stacked: Tensor) -> Tensor:
        # Past the last group both the product and its gradient are uninitialised: mask either side.
        return torch.where(live_R1, F.grouped_mm(torch.where(live_R1, rows, 0.0), stacked, offs=ends), 0.0)

    x_RD = x_TD[token_R]
    hidden = project(x_RD, weights.up_PD.view(members, width, -1).transpose(1, 2))
    hidden = hidden + weights.up_bias_P.view(members, width)[expert_R]
    if weights.gate_PD is None:
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        assert weights.gate_bias_P is not None
        gate = project(x_RD, weights.gate_PD.view(members, width, -1).transpose(1, 2))
        hidden = F.silu(gate + weights.gate_bias_P.view(members, width)[expert_R]) * hidden
    out_RD = project(hidden, weights.down_PD.view(members, width, -1)) + weights.down_bias_ND[expert_R]
    scaled_RD = torch.where(live_R1, out_RD * weight_TK.reshape(-1)[order_R][:, None], 0.0)
    back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=x_TD.device))
    return scaled_RD[back_R].view(*local_TK.shape, x_TD.shape[1]).sum(1)
