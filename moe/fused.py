"""The CUDA path: the Triton kernels of ``moe.kernels`` as two operators with a backward, opaque to torch.compile.

Nothing here reads a device value on the host: the tile schedule is computed on the device, and grids and buffers have
the size of the worst case. Shapes: see ``moe.kernels``; G groups of rows that share a partial sum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe import kernels
from moe.dispatch import Weights, loop
from moe.expert_decode import MAX_TOKENS, decode_experts, precision
from moe.kernels import TILE

CHOICES_PER_BLOCK = 1024
GROUP_ROWS = 32


class Tiles(NamedTuple):
    """Block sizes of one GEMM kernel: rows, columns, reduction, warps, pipeline stages, band of the tile walk."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


TILES: dict[str, Tiles] = {
    "up": Tiles(128, 128, 64, 4, 3),
    "up_backward": Tiles(128, 128, 32, 4, 4),
    "down": Tiles(128, 256, 64, 8, 3, 16),
    "weight": Tiles(128, 256, 64, 8, 3, 16),
}
# Half the reduction per step keeps four-byte operands within shared memory.
TILES_FP32 = {name: Tiles(64, 64, 32, 4, 2) for name in TILES}


def shapes_fit(x_TD: Tensor, gated: bool, widths: Sequence[int]) -> bool:
    """Whether these kernels serve: GELU, 16- or 32-bit floats, widths and model width in multiples of 64."""
    floats = x_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return floats and not gated and x_TD.shape[1] % 64 == 0 and all(width % 64 == 0 for width in widths)


def supported(x_TD: Tensor, weights: Weights, widths: Sequence[int]) -> bool:
    """Whether the kernels serve this input, on this device."""
    return x_TD.is_cuda and shapes_fit(x_TD, weights.gate_PD is not None, widths)


@functools.lru_cache(maxsize=64)
def _offsets(widths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(widths)], dtype=torch.int32, device=device)


def _capacity(choices: int, experts: int) -> int:
    """Tiles that suffice for any distribution of the choices over the experts."""
    return triton.cdiv(choices, TILE) + experts


def _tiles(name: str, dtype: torch.dtype) -> Tiles:
    return (TILES_FP32 if dtype == torch.float32 else TILES)[name]


class Schedule(NamedTuple):
    """Where choices go: row of each choice, choice of each row, first row of each expert, expert of each tile."""

    row_C: Tensor
    choice_R: Tensor
    start_N: Tensor
    expert_M: Tensor


def schedule(slot_TK: Tensor, experts: int) -> Schedule:
    """Sort choices by expert on the device (counting sort, stable)."""
    slot_C = slot_TK.reshape(-1)
    choices, device = slot_C.numel(), slot_TK.device
    tiles = _capacity(choices, experts)
    blocks = max(triton.cdiv(choices, CHOICES_PER_BLOCK), 1)
    count_BN = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    row_C = torch.empty(choices, dtype=torch.int32, device=device)
    choice_R = torch.full((tiles * TILE,), -1, dtype=torch.int32, device=device)
    start_N = torch.empty(experts + 1, dtype=torch.int32, device=device)
    expert_M = torch.empty(tiles, dtype=torch.int32, device=device)
    kernels.count_choices[(blocks,)](slot_C, count_BN, choices, N=experts, BLOCK=CHOICES_PER_BLOCK)
    sizes = {"BLOCK": CHOICES_PER_BLOCK, "BLOCKS": triton.next_power_of_2(blocks)}
    sizes |= {"TILES": triton.next_power_of_2(tiles), "TILE": TILE}
    pointers = (slot_C, count_BN, row_C, choice_R, start_N, expert_M)
    kernels.place_choices[(blocks,)](*pointers, choices, blocks, tiles, N=experts, **sizes)
    return Schedule(row_C, choice_R, start_N, expert_M)


def _describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def gather(x_TD: Tensor, plan: Schedule, choices_per_token: int) -> Tensor:
    """x_RD: the token of each row; zeros in padding."""
    rows, D = plan.choice_R.numel(), x_TD.shape[1]
    x_RD = x_TD.new_empty(rows, D)
    cols = triton.next_power_of_2(D)
    grid = (rows // 16,)
    kernels.gather_rows[grid](
        x_TD, plan.choice_R, plan.expert_M, x_RD, D, choices_per_token, TILE=TILE, ROWS=16, COLS=cols
    )
    return x_RD


def combine(rows_RD: Tensor, plan: Schedule, weight_TK: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """y_TD: the (weighted) sum of each token's rows."""
    (T, K), D = shape, rows_RD.shape[1]
    y_TD = rows_RD.new_empty(T, D)
    weighted = weight_TK is not None
    weight = rows_RD if weight_TK is None else weight_TK
    cols = triton.next_power_of_2(D)
    grid = (triton.cdiv(T, 4),)
    kernels.combine_rows[grid](rows_RD, plan.row_C, weight, y_TD, T, D, K=K, WEIGHTED=weighted, TOKENS=4, COLS=cols)
    return y_TD


def to_neurons(
    rows_RD: Tensor, weight_PD: Tensor, bias_P: Tensor, plan: Schedule, widths: Sequence[int], pre_RW: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Up-projection with GELU (``pre_RW`` None), or the gradient of the pre-activation; and partial column sums."""
    (rows, D), W = rows_RD.shape, max(widths)
    backward = pre_RW is not None
    pre_RW = rows_RD.new_empty(rows, W) if pre_RW is None else pre_RW
    out_RW = rows_RD.new_empty(rows, W)
    t = _tiles("up_backward" if backward else "up", rows_RD.dtype)
    tiles = rows // t.m
    partial_MW = rows_RD.new_empty((tiles, W) if backward else (1, 1), dtype=torch.float32)
    grid = (tiles * triton.cdiv(W, t.n),)
    kernels.rows_to_neurons[grid](
        _describe(rows_RD, t.m, t.k),
        _describe(weight_PD, t.n, t.k),
        _describe(pre_RW, t.m, t.n),
        _describe(out_RW, t.m, t.n),
        bias_P,
        partial_MW,
        plan.expert_M,
        _offsets(tuple(widths), rows_RD.device),
        D,
        W,
        tiles,
        BACKWARD=backward,
        EXACT=rows_RD.dtype == torch.float32,
        TILE=TILE,
        BM=t.m,
        BN=t.n,
        BK=t.k,
        GROUP=t.group,
        PRECISION=precision(rows_RD.dtype),
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return pre_RW, out_RW, partial_MW


def to_rows(
    hidden_RW: Tensor, weight_PD: Tensor, bias_ND: Tensor | None, plan: Schedule, widths: Sequence[int]
) -> Tensor:
    """Down-projection with bias, or (bias None) the gradient of the rows."""
    rows, D = hidden_RW.shape[0], weight_PD.shape[1]
    out_RD = hidden_RW.new_empty(rows, D)
    t = _tiles("down", hidden_RW.dtype)
    tiles = rows // t.m
    grid = (tiles * triton.cdiv(D, t.n),)
    kernels.neurons_to_rows[grid](
        _describe(hidden_RW, t.m, t.k),
        _describe(weight_PD, t.k, t.n),
        _describe(out_RD, t.m, t.n),
        weight_PD if bias_ND is None else bias_ND,
        plan.expert_M,
        _offsets(tuple(widths), hidden_RW.device),
        D,
        tiles,
        BIAS=bias_ND is not None,
        TILE=TILE,
        BM=t.m,
        BN=t.n,
        BK=t.k,
        GROUP=t.group,
        PRECISION=precision(hidden_RW.dtype),
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return out_RD


def weight_gradient(hidden_RW: Tensor, rows_RD: Tensor, plan: Schedule, widths: Sequence[int]) -> Tensor:
    """Per expert, hidden transposed times rows: the gradient of ``up_PD`` or ``down_PD``."""
    D, W = rows_RD.shape[1], max(widths)
    out_PD = rows_RD.new_empty(sum(widths), D)
    t = _tiles("weight", rows_RD.dtype)
    grid = (triton.cdiv(W, t.m) * triton.cdiv(D, t.n), len(widths))
    kernels.weight_gradient[grid](
        _describe(hidden_RW, t.k, t.m),
        _describe(rows_RD, t.k, t.n),
        out_PD,
        plan.start_N,
        _offsets(tuple(widths), rows_RD.device),
        D,
        W,
        BM=t.m,
        BN=t.n,
        BK=t.k,
        GROUP=t.group,
        PRECISION=precision(rows_RD.dtype),
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return out_PD


def bias_gradient(partial: Tensor, plan: Schedule, widths: Sequence[int], ragged: bool) -> Tensor:
    """Sums partial column sums (one per group of rows) over the rows of each expert."""
    rows = plan.choice_R.numel() // partial.shape[0]
    N, columns = len(widths), partial.shape[1]
    total = partial.new_empty(sum(widths) if ragged else (N, columns))
    offsets = _offsets(tuple(widths), partial.device)
    grid = (N, triton.cdiv(columns, 64))
    kernels.sum_partials[grid](
        partial, plan.start_N, offsets, total, columns, ROWS=rows, RAGGED=ragged, AT_ONCE=16, COLS=64
    )
    return total


def spread(dy_TD: Tensor, out_RD: Tensor, weight_TK: Tensor, plan: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the weighted combine: gradients of rows and of weights, partial sums for the bias."""
    rows, D = out_RD.shape
    dout_RD, dweight_TK = torch.empty_like(out_RD), torch.zeros_like(weight_TK)
    partial_GD = out_RD.new_empty(rows // GROUP_ROWS, D, dtype=torch.float32)
    sizes = {"TILE": TILE, "ROWS": GROUP_ROWS, "STEP": 8, "COLS": triton.next_power_of_2(D)}
    pointers = (dy_TD, out_RD, weight_TK, plan.choice_R, plan.expert_M, dout_RD, dweight_TK, partial_GD)
    kernels.spread_gradient[(rows // GROUP_ROWS,)](*pointers, D, weight_TK.shape[1], **sizes)
    return dout_RD, dweight_TK, partial_GD


@torch.library.custom_op("joulemoe::fused_experts", mutates_args=())
def fused_experts(
    x_TD: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    up_PD: Tensor,
    up_bias_P: Tensor,
    down_PD: Tensor,
    down_bias_ND: Tensor,
    widths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y_TD, then what the backward needs: rows, pre-activations, hidden values, outputs and the schedule."""
    plan = schedule(slot_TK.contiguous(), len(widths))
    x_RD = gather(x_TD.contiguous(), plan, slot_TK.shape[1])
    pre_RW, hidden_RW, _ = to_neurons(x_RD, up_PD, up_bias_P, plan, widths, None)
    out_RD = to_rows(hidden_RW, down_PD, down_bias_ND, plan, widths)
    y_TD = combine(out_RD, plan, weight_TK.contiguous(), (slot_TK.shape[0], slot_TK.shape[1]))
    return y_TD, x_RD, pre_RW, hidden_RW, out_RD, *plan


@fused_experts.register_fake
def _(x_TD: Tensor, slot_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    widths = rest[-1]
    choices, D = slot_TK.numel(), x_TD.shape[1]
    tiles = (choices + TILE - 1) // TILE + len(widths)
    rows = tiles * TILE
    shapes = [(rows, D), (rows, max(widths)), (rows, max(widths)), (rows, D)]
    plan = [(choices,), (rows,), (len(widths) + 1,), (tiles,)]
    ints = [slot_TK.new_empty(shape, dtype=torch.int32) for shape in plan]
    return torch.empty_like(x_TD), *(x_TD.new_empty(shape) for shape in shapes), *ints


@torch.library.custom_op("joulemoe::fused_experts_backward", mutates_args=())
def fused_experts_backward(dy_TD: Tensor, saved: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    """Gradients of x, the mixing weights, up, up bias, down, down bias."""
    weight_TK, up_PD, down_PD, x_RD, pre_RW, hidden_RW, out_RD = saved[:7]
    plan = Schedule(*saved[7:])
    dout_RD, dweight_TK, partial_GD = spread(dy_TD.contiguous(), out_RD, weight_TK.contiguous(), plan)
    _, dpre_RW, partial_MW = to_neurons(dout_RD, down_PD, down_PD, plan, widths, pre_RW)
    d_down = weight_gradient(hidden_RW, dout_RD, plan, widths)
    dx_RD = to_rows(dpre_RW, up_PD, None, plan, widths)
    d_up = weight_gradient(dpre_RW, x_RD, plan, widths)
    dx_TD = combine(dx_RD, plan, None, (weight_TK.shape[0], weight_TK.shape[1]))
    d_up_bias = bias_gradient(partial_MW, plan, widths, True).to(up_PD.dtype)
    d_down_bias = bias_gradient(partial_GD, plan, widths, False).to(up_PD.dtype)
    return [dx_TD, dweight_TK, d_up, d_up_bias, d_down, d_down_bias]


@fused_experts_backward.register_fake
def _(dy_TD: Tensor, saved: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    weight_TK, up_PD, down_PD = saved[:3]
    up_bias, down_bias = up_PD.new_empty(up_PD.shape[0]), up_PD.new_empty(len(widths), up_PD.shape[1])
    dense = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dy_TD, weight_TK, up_PD)]
    return [*dense, up_bias, torch.empty_like(down_PD), down_bias]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight_TK, up_PD, _, down_PD, _, widths = inputs
    ctx.widths = widths
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight_TK, up_PD, down_PD, *output[1:])


def _backward(ctx: Any, dy_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dweight, *params = fused_experts_backward(dy_TD, ctx.saved_tensors, ctx.widths)
    return (dx, None, dweight, *params, None)


fused_experts.register_autograd(_backward, setup_context=_setup_context)


def fused(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, weights: Weights, widths: Sequence[int]) -> Tensor:
    """The experts in Triton: training and prefill, or decode where gradients are off and tokens are few."""
    arguments = (x_TD, slot_TK, weight_TK, *weights[:4], list(widths))
    if x_TD.shape[0] == 0:
        return loop(x_TD, slot_TK, weight_TK, weights, widths)
    if x_TD.shape[0] <= MAX_TOKENS and not torch.is_grad_enabled():
        return decode_experts(*arguments)
    return fused_experts(*arguments)[0]
