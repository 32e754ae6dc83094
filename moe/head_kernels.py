"""Triton kernel of the language-model head's loss. Optional, as ``moe.kernels``."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_gradient(logits_TV, label_T, loss_T, V, stride, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """Cross-entropy of one row, whose logits are overwritten with softmax - one-hot (0 where ignored or padded)."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_T + row)
    logits = logits_TV + row * stride
    if label == IGNORE:
        for start in range(0, stride, BLOCK):
            col = start + tl.arange(0, BLOCK)
            tl.store(logits + col, tl.zeros((BLOCK,), logits_TV.dtype.element_ty), mask=col < stride)
        tl.store(loss_T + row, 0.0)
    else:
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(logits + col, mask=col < V, other=float("-inf")).to(tl.float32)
            # A lane that has seen nothing yet holds -inf; the finite stand-in avoids inf - inf.
            new = tl.maximum(tl.maximum(largest, z), -1e30)
            total = total * tl.exp(largest - new) + tl.exp(z - new)
            largest = new
        peak = tl.max(largest)
        sum_exp = tl.sum(total * tl.exp(largest - peak))
        own = tl.load(logits + label).to(tl.float32)
        tl.store(loss_T + row, tl.log(sum_exp) + peak - own)
        tl.debug_barrier()  # the label's logit is read before it is overwritten
        scale = 1.0 / sum_exp
        for start in range(0, stride, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(logits + col, mask=col < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(z - peak) * scale - tl.where(col == label, 1.0, 0.0)
            tl.store(logits + col, p.to(logits_TV.dtype.element_ty), mask=col < stride)
