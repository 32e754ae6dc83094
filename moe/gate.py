"""A router's gate: float32 logits of 16-bit hidden states, without a float32 copy of them.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton

    from moe import gate_kernels
except ModuleNotFoundError:  # no Triton
    gate_kernels = None  # type: ignore[assignment]

MAX_EXPERTS = 64  # of the kernels; beyond that cuBLAS is as good
UNROLLED_EXPERTS = 32  # terms of a sum that inductor writes into one kernel with what follows
ROWS, GROUP_ROWS = 32, 256


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """z_TE = x·weight^T, computed and returned in float32 (float64 for float64 input), whatever autocast says.

    bfloat16 has too few digits to rank experts.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        if gate_kernels is not None and x_TD.is_cuda and _fits(x_TD, weight_ED):
            return _gate(x_TD.contiguous(), weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


def _fits(x_TD: Tensor, weight_ED: Tensor) -> bool:
    small = (torch.float32, torch.bfloat16, torch.float16)
    return x_TD.dtype in small and weight_ED.dtype in small and weight_ED.shape[0] <= MAX_EXPERTS and len(x_TD) > 0


def _precision() -> str:
    """Three products of 10-bit halves are as exact as float32; where tf32 is allowed, one is what PyTorch would do."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@torch.library.custom_op("joulemoe::gate", mutates_args=())
def _gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    logits_TE = torch.empty(T, E, dtype=torch.float32, device=x_TD.device)
    gate_kernels.gate_logits[(triton.cdiv(T, ROWS),)](
        x_TD, weight_ED.contiguous(), logits_TE, T, D, E,
        ROWS=ROWS, EP=_padded(E), BK=128, PRECISION=_precision(), num_warps=4, num_stages=4,
    )  # fmt: skip
    return logits_TE


@_gate.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@torch.library.custom_op("joulemoe::gate_weight_gradient", mutates_args=())
def _gate_weight_gradient(dlogits_TE: Tensor, x_TD: Tensor) -> Tensor:
    """[G, E, D]: the gradient of each group of rows."""
    (T, D), E = x_TD.shape, dlogits_TE.shape[1]
    groups = triton.cdiv(T, GROUP_ROWS)
    partial_GED = torch.empty(groups, E, D, dtype=torch.float32, device=x_TD.device)
    gate_kernels.gate_weight_gradient[(groups, triton.cdiv(D, 128))](
        dlogits_TE.contiguous(), x_TD, partial_GED, T, D, E,
        ROWS=GROUP_ROWS, STEP=64, EP=_padded(E), COLS=128, PRECISION=_precision(), num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial_GED


@_gate_weight_gradient.register_fake
def _(dlogits_TE: Tensor, x_TD: Tensor) -> Tensor:
    groups = (x_TD.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    return x_TD.new_empty(groups, dlogits_TE.shape[1], x_TD.shape[1], dtype=torch.float32)


def _padded(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor]:
    x_TD, weight_ED = ctx.saved_tensors
    dweight_ED = _gate_weight_gradient(dlogits_TE, x_TD).sum(0)
    return _by_tokens(dlogits_TE, weight_ED.float()).to(x_TD.dtype), dweight_ED.to(weight_ED.dtype)


def _by_tokens(dlogits_TE: Tensor, weight_ED: Tensor) -> Tensor:
    """dlogits·weight. Compiled, a written-out sum joins the addition that follows; as a product it would be a kernel
    of its own, which writes and reads float32."""
    traced = torch.compiler.is_compiling() or type(dlogits_TE) is not Tensor
    if not traced or weight_ED.shape[0] > UNROLLED_EXPERTS:
        return dlogits_TE @ weight_ED
    total_TD = dlogits_TE[:, :1] * weight_ED[0]
    for e in range(1, weight_ED.shape[0]):
        total_TD = total_TD + dlogits_TE[:, e : e + 1] * weight_ED[e]
    return total_TD


if gate_kernels is not None:
    _gate.register_autograd(_backward, setup_context=_setup_context)
