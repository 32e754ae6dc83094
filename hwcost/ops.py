"""What an operation asks of the hardware: FLOPs by kind, bytes by kind, kernel launches.

Counts are additive: a layer is the sum of its operations, a step the sum of its layers. Nothing here
knows watts or seconds; `CostModel` multiplies counts by calibrated coefficients.

Symbols: B sequences · S tokens per sequence (decode: tokens in the cache) · T = B·S tokens of a call
(decode: B) · D model width · W inner width of an expert · E experts · K choices · V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

COUNTERS = (
    "gemm_flops",
    "grouped_flops",
    "attention_flops",
    "decode_flops",
    "activation_bytes",
    "cache_bytes",
    "weight_bytes",
    "head_bytes",
    "optimizer_bytes",
    "launches",
)
_FIELDS = (*COUNTERS, "host_launches")
COMPUTE = ("gemm_flops", "grouped_flops", "attention_flops", "decode_flops")
MEMORY = ("activation_bytes", "cache_bytes", "weight_bytes", "head_bytes", "optimizer_bytes")
PHASES = ("train", "prefill", "decode")

_DTYPE_BYTES = {"bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp32": 4, "float32": 4}
# Fused AdamW on fp32 states: read p, g, m, v; write p, m, v.
_ADAMW_BYTES = 28
# Kernels of `moe.decoding` per block (norm and QKV, attention, projection, norm and router, three of the experts) and
# around the blocks (embedding, norm, head, choice).
_GRAPHED_PER_BLOCK, _GRAPHED_AROUND = 7.0, 4.0
_BACKWARD_ATTENTION = 2.5  # FLOPs of FlashAttention's backward over its forward (Dao 2023, §3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What is asked of the hardware. Adds, and multiplies by a number.

    `launches` are kernels that the device starts; `host_launches` those of them that a host thread dispatches one by
    one (training, prefill), which bounds time from below. Decode steps are replayed as a graph and have none.
    `decode_flops` are those of a decode step's GEMMs: one row per sequence fills a tensor core's tile badly.
    """

    gemm_flops: float = 0.0
    grouped_flops: float = 0.0
    attention_flops: float = 0.0
    decode_flops: float = 0.0
    activation_bytes: float = 0.0
    cache_bytes: float = 0.0
    weight_bytes: float = 0.0
    head_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    launches: float = 0.0
    host_launches: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in _FIELDS})

    def __mul__(self, factor: float) -> Counts:
        return Counts(**{name: getattr(self, name) * factor for name in _FIELDS})

    __rmul__ = __mul__

    def vector(self) -> np.ndarray:
        """The counts in the order of `COUNTERS`."""
        return np.array([getattr(self, name) for name in COUNTERS], dtype=float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape of a GPT-2 with experts (DistilGPT2 unless told otherwise).

    Attributes:
        d_model: D. num_layers: blocks. num_heads: attention heads. vocab_size: V.
        expert_widths: inner width of each expert; 0 is a null expert. Empty: a dense FFN of 4·D.
        top_k: K, experts per token; ignored when dense.
        moe_layers: how many blocks have experts; None: all.
        open_experts: distinct experts that receive tokens; None: as many as a balanced router opens.
        activation: `gelu` (two matrices) or `swiglu` (three).
        dtype: of the arithmetic, `bf16`, `fp16` or `fp32`.
    """

    d_model: int = 768
    num_layers: int = 6
    num_heads: int = 12
    vocab_size: int = 50257
    expert_widths: tuple[int, ...] = (3072,) * 8
    top_k: int = 2
    moe_layers: int | None = None
    open_experts: float | None = None
    activation: str = "gelu"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_widths", tuple(self.expert_widths))
        for name in ("d_model", "num_layers", "num_heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)!r}")
        if any(width < 0 for width in self.expert_widths):
            raise ValueError(f"expert_widths: expected widths >= 0, got {self.expert_widths!r}")
        if self.expert_widths and not 1 <= self.top_k <= len(self.expert_widths):
            raise ValueError(f"top_k: expected 1 to {len(self.expert_widths)} experts, got {self.top_k!r}")
        if self.dtype not in _DTYPE_BYTES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPE_BYTES)}, got {self.dtype!r}")
        if self.activation not in ("gelu", "swiglu"):
            raise ValueError(f"activation: expected gelu or swiglu, got {self.activation!r}")

    @property
    def num_experts(self) -> int:
        return len(self.expert_widths)

    @property
    def dtype_bytes(self) -> int:
        return _DTYPE_BYTES[self.dtype]

    @property
    def matrices(self) -> int:
        """Weight matrices of an expert."""
        return 3 if self.activation == "swiglu" else 2

    @property
    def mean_width(self) -> float:
        return sum(self.expert_widths) / len(self.expert_widths) if self.expert_widths else 4.0 * self.d_model

    @property
    def num_moe_layers(self) -> int:
        if not self.expert_widths:
            return 0
        return self.num_layers if self.moe_layers is None else self.moe_layers

    def opened(self, tokens: float) -> float:
        """Distinct experts that `tokens` tokens open: given, or expected of a balanced router, E·(1 − (1 − K/E)^T)."""
        if self.open_experts is not None:
            return float(self.open_experts)
        return self.num_experts * -math.expm1(tokens * _log1m(self.top_k / self.num_experts))

    @property
    def parameters(self) -> float:
        """Trainable parameters, biases left out (the LM head is the embedding)."""
        per_expert = self.matrices * self.d_model
        ffn = per_expert * sum(self.expert_widths) if self.expert_widths else 8 * self.d_model**2
        dense = 8 * self.d_model**2 * (self.num_layers - self.num_moe_layers)
        blocks = self.num_layers * 4 * self.d_model**2 + self.num_moe_layers * ffn + dense
        return blocks + self.vocab_size * self.d_model


def _log1m(share: float) -> float:
    return math.log1p(-share) if share < 1 else -math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """How an operation is called: `batch_size` counts sequences, always."""

    batch_size: float
    seq_len: float
    phase: str = "train"

    def __post_init__(self) -> None:
        if self.batch_size <= 0 or self.seq_len <= 0:
            raise ValueError(f"batch_size, seq_len: expected numbers > 0, got {self.batch_size!r}, {self.seq_len!r}")
        if self.phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {self.phase!r}")

    @property
    def tokens(self) -> float:
        """Tokens that pass through the layers: B·S, and B for one decode step."""
        return self.batch_size if self.phase == "decode" else self.batch_size * self.seq_len

    @property
    def train(self) -> bool:
        return self.phase == "train"

    @property
    def passes(self) -> float:
        """GEMMs per weight: forward, and in training the two of the backward."""
        return 3.0 if self.train else 1.0


def _gemm(flops: float, phase: str) -> Counts:
    return Counts(decode_flops=flops) if phase == "decode" else Counts(gemm_flops=flops)


def layernorm(shape: ModelShape, call: Call) -> Counts:
    """One LayerNorm over T tokens: a pass over [T, D] each way."""
    passes = 5.0 if call.train else 2.0
    return Counts(
        activation_bytes=passes * call.tokens * shape.d_model * shape.dtype_bytes, launches=3.0 if call.train else 1.0
    )


def attention(shape: ModelShape, call: Call) -> Counts:
    """Causal self-attention of one layer with its two projections (4·D² weights)."""
    tokens, width, size = call.tokens, shape.d_model, shape.dtype_bytes
    context = call.seq_len if call.phase == "decode" else call.seq_len / 2
    scores = 4.0 * tokens * context * width
    cache = 2.0 * tokens * call.seq_len * width * size if call.phase == "decode" else 0.0
    return _gemm(call.passes * 8.0 * tokens * width**2, call.phase) + Counts(
        attention_flops=scores * (1 + _BACKWARD_ATTENTION if call.train else 1.0),
        activation_bytes=call.passes * 10.0 * tokens * width * size,
        cache_bytes=cache,
        weight_bytes=call.passes * 4.0 * width**2 * size,
        launches=12.0 if call.train else 4.0,
    )


def moe_router(shape: ModelShape, call: Call) -> Counts:
    """Logits, softmax and top-k of one layer: [T, D] by [D, E], then passes over [T, E] in fp32."""
    experts = max(1, shape.num_experts)
    return _gemm(call.passes * 2.0 * call.tokens * shape.d_model * experts, call.phase) + Counts(
        activation_bytes=call.passes * call.tokens * (shape.d_model * shape.dtype_bytes + 16.0 * experts),
        weight_bytes=call.passes * shape.d_model * experts * shape.dtype_bytes,
        launches=12.0 if call.train else 6.0,
    )


def expert_join(shape: ModelShape, width: float, tokens: float, phase: str) -> Counts:
    """What `tokens` tokens ask of an open expert of inner width `width`; a null expert asks nothing."""
    if width == 0:
        return Counts()
    passes = 3.0 if phase == "train" else 1.0
    # Forward: read x, write and read the inner activations, write y; the gather and the combine beside it.
    inner = (shape.matrices - 1) * 2.0 * width
    flops = passes * 2.0 * shape.matrices * tokens * shape.d_model * width
    moved = Counts(activation_bytes=passes * tokens * (6.0 * shape.d_model + inner) * shape.dtype_bytes)
    return moved + (Counts(decode_flops=flops) if phase == "decode" else Counts(grouped_flops=flops))


def expert_open(shape: ModelShape, width: float, phase: str) -> Counts:
    """What opening an expert asks: its weights, once per pass (in training read twice and their gradient written)."""
    passes = 3.0 if phase == "train" else 1.0
    return Counts(weight_bytes=passes * shape.matrices * shape.d_model * width * shape.dtype_bytes)


def expert(shape: ModelShape, call: Call) -> Counts:
    """One open expert of the mean width that receives all T tokens of the call."""
    join = expert_join(shape, shape.mean_width, call.tokens, call.phase)
    return join + expert_open(shape, shape.mean_width, call.phase) + Counts(launches=8.0 if call.train else 3.0)


def moe_layer(shape: ModelShape, call: Call) -> Counts:
    """Router, dispatch, experts and combine of one layer; a dense FFN where there are no experts."""
    if not shape.expert_widths:
        return _dense_ffn(shape, call)
    slots = call.tokens * shape.top_k
    opened = shape.opened(call.tokens)
    return (
        moe_router(shape, call)
        + expert_join(shape, shape.mean_width, slots, call.phase)
        + opened * expert_open(shape, shape.mean_width, call.phase)
        + Counts(launches=30.0 if call.train else 12.0)
    )


def _dense_ffn(shape: ModelShape, call: Call) -> Counts:
    width = 4.0 * shape.d_model
    return _gemm(call.passes * 4.0 * call.tokens * shape.d_model * width, call.phase) + Counts(
        activation_bytes=call.passes * call.tokens * (4.0 * shape.d_model + 2.0 * width) * shape.dtype_bytes,
        weight_bytes=call.passes * 2.0 * shape.d_model * width * shape.dtype_bytes,
        launches=8.0 if call.train else 3.0,
    )


def lm_head(shape: ModelShape, call: Call) -> Counts:
    """The final projection [T, D] by [D, V]; in training with the loss, which passes over the logits."""
    logits = call.tokens * shape.vocab_size
    return _gemm(call.passes * 2.0 * logits * shape.d_model, call.phase) + Counts(
        head_bytes=logits * (14.0 if call.train else 2.0),
        weight_bytes=call.passes * shape.vocab_size * shape.d_model * shape.dtype_bytes,
        launches=8.0 if call.train else 1.0,
    )


def embedding(shape: ModelShape, call: Call) -> Counts:
    """Token and position embeddings, summed; in training their scattered gradients."""
    return Counts(
        activation_bytes=call.passes * 3.0 * call.tokens * shape.d_model * shape.dtype_bytes,
        launches=4.0 if call.train else 1.0,
    )


def optimizer(shape: ModelShape) -> Counts:
    """Fused AdamW over every parameter, whether its expert was open or not."""
    return Counts(optimizer_bytes=_ADAMW_BYTES * shape.parameters, launches=8.0)


def blocks(shape: ModelShape, call: Call) -> Counts:
    """All transformer blocks: two LayerNorms, attention, and experts or a dense FFN."""
    per_layer = attention(shape, call) + 2.0 * layernorm(shape, call)
    dense = shape.num_layers - shape.num_moe_layers
    return (
        shape.num_layers * per_layer + shape.num_moe_layers * moe_layer(shape, call) + dense * _dense_ffn(shape, call)
    )


def _model(shape: ModelShape, call: Call) -> Counts:
    return embedding(shape, call) + blocks(shape, call) + layernorm(shape, call) + lm_head(shape, call)


def train_step(shape: ModelShape, call: Call) -> Counts:
    """Forward, backward and optimizer of one step of B sequences."""
    call = dataclasses.replace(call, phase="train")
    return _model(shape, call) + optimizer(shape)


def prefill(shape: ModelShape, call: Call) -> Counts:
    """One forward pass over B prompts of S tokens, with the logits of every position: as when texts are scored. A
    forward that reads the last position's logits alone, as a trial's prefill does, takes less of the LM head."""
    return _model(shape, dataclasses.replace(call, phase="prefill"))


def decode_step(shape: ModelShape, call: Call) -> Counts:
    """One token for each of B sequences that have S tokens in the cache."""
    return _model(shape, dataclasses.replace(call, phase="decode"))


def counts_of(op_type: str, shape: ModelShape, call: Call, *, graphed_batch: float = 0.0) -> Counts:
    """Counts of a call of one of `OPS`, host launches included.

    Args:
        graphed_batch: up to this batch a decode step is the hand-made one (`moe.decoding`), which starts few kernels.

    Raises:
        KeyError: an unknown operation.
    """
    counts = OPS[op_type](shape, call)
    if call.phase != "decode":
        return dataclasses.replace(counts, host_launches=counts.launches)
    if op_type != "decode_step" or call.batch_size > graphed_batch:
        return counts
    launches = _GRAPHED_PER_BLOCK * shape.num_layers + _GRAPHED_AROUND
    return dataclasses.replace(counts, launches=min(counts.launches, launches))


OPS: dict[str, Callable[[ModelShape, Call], Counts]] = {
    "moe_router": moe_router,
    "expert": expert,
    "moe_layer": moe_layer,
    "attention": attention,
    "layernorm": layernorm,
    "lm_head": lm_head,
    "train_step": train_step,
    "prefill": prefill,
    "decode_step": decode_step,
}
STEP_PHASES = {"train_step": "train", "prefill": "prefill", "decode_step": "decode"}
