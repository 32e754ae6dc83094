"""One decode step of the whole model as a handful of Triton kernels in one CUDA graph.

The step reads every weight once and keeps what changes (tokens, positions, lengths, cache) in fixed buffers, so that
the host has nothing to do between steps but to launch the graph. Blocks or routers that have no kernel of their own run
their modules inside the same graph. Shapes: see ``moe.decode_kernels``; B sequences, S positions of the prompt.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import torch
import triton
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from moe import decode_kernels as kernels
from moe import expert_decode, fused, opening_kernels
from moe.captured import pointers
from moe.experts import Experts
from moe.opening import EXACT_EXPERTS, OpeningRouter, PiggybackRouter
from moe.routers import CapacityRouter, EnergyRouter, Router, TopKRouter
from moe.routing import Tokens

MAX_BATCH = expert_decode.MAX_TOKENS
COLUMNS = 32  # of a projection, per program
BLOCK_K = 64
HEAD_ENTRIES = 64
CACHE_MULTIPLE = 256
SPARE = 4  # positions at the end of the cache that no sequence reaches
FUSED_ROUTERS = (TopKRouter, EnergyRouter, CapacityRouter)  # capacity drops nothing in evaluation
OPENING_ROUTERS = (OpeningRouter, PiggybackRouter)  # up to EXACT_EXPERTS
SETS = 16  # of set_gains, per program


def unsupported(model: Any) -> str | None:
    """Why this model's step has no graph; None if it has one."""
    config = model.config
    if compute_type(model) not in (torch.bfloat16, torch.float16):
        return "the computation is not in 16 bits"
    if config.plain_experts:
        return "experts have an activation that the kernels do not compute"
    if config.n_embd % BLOCK_K or (config.n_embd // config.n_head) & (config.n_embd // config.n_head - 1):
        return "model width is not a multiple of 64 or head width not a power of two"
    if config.reorder_and_upcast_attn or len({p.dtype for p in model.parameters()}) > 1:
        return "attention is upcast, or weights have several types"
    return None


def compute_type(model: Any) -> torch.dtype:
    """What products compute in: autocast's type where it is on over float32 weights, else that of the weights."""
    stored: torch.dtype = model.lm_head.weight.dtype
    cast = stored == torch.float32 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if cast else stored


class Decoder:
    """Buffers, and the graph of a step, for one model, batch size and cache length.

    Args:
        model: `MoEGPT2LMHeadModel` in evaluation mode; its weights are read where they lie, so loading new values in
            place is seen, and moving the model is not (see ``fits``). Where `dtype` is another type than theirs (under
            autocast) they are read from a copy that ``start`` renews, and the residual stays in theirs.
        length: positions of the cache, at least SPARE more than a sequence can have.
        dtype: of products and cache.
        stop: token ids that end a sequence.
        graph: capture a CUDA graph; without, each step launches its kernels (for tests without a GPU).
    """

    def __init__(
        self, model: Any, batch: int, length: int, stop: tuple[int, ...], dtype: torch.dtype, *, graph: bool = True
    ) -> None:
        self._source = weakref.ref(model)  # decoders are kept by model, and must not keep it alive
        self.config, self.dtype = model.config, dtype
        self.batch, self.length, self.stop, self.graphed = batch, length, stop, graph
        self.pointers = pointers(model)
        weight, width = model.lm_head.weight, model.config.n_embd
        self._copy = None if weight.dtype == dtype else copy.deepcopy(model).requires_grad_(False).to(dtype)
        new = functools.partial(torch.zeros, device=weight.device)
        half = functools.partial(new, dtype=dtype)
        heads, K = self.config.n_head, self.config.num_experts_per_tok
        shape = (batch, heads, length, width // heads)
        self.keys = [half(shape) for _ in range(self.config.n_layer)]
        self.values = [half(shape) for _ in range(self.config.n_layer)]
        self.x_TD = new(batch, width, dtype=weight.dtype)
        self.normed_TD, self.query_TD, self.mixed_TD = (half(batch, width) for _ in range(3))
        self.slot_TK, self.weight_TK = new(batch, K, dtype=torch.int32), new(batch, K, dtype=torch.float32)
        E = self.config.num_experts if any(router.opens for router in model.routers) else 1
        self.score_TE, self.select_TE = new(batch, E), new(batch, E)
        self.gain_G, self.set_1 = new(2 ** min(E, EXACT_EXPERTS)), new(1, dtype=torch.int32)
        self.logits_TV = half(batch, weight.shape[0])
        blocks = triton.cdiv(weight.shape[0], HEAD_ENTRIES)
        self.best_BT, self.where_BT = new(blocks, batch), new(blocks, batch, dtype=torch.int32)
        self.ids_TL, self.mask_TL = new(batch, length, dtype=torch.long), new(batch, length, dtype=torch.int8)
        self.token_T, self.position_T = new(batch, dtype=torch.long), new(batch, dtype=torch.long)
        self.length_T, self.finished_T = new(batch, dtype=torch.int32), new(batch, dtype=torch.int32)
        self.stop_F = torch.tensor(stop or (0,), dtype=torch.long, device=weight.device)
        self.pad, self.least = new(1, dtype=torch.long), new(1, dtype=torch.int32)
        self.rows, self.columns = max(16, triton.next_power_of_2(batch)), triton.next_power_of_2(width)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.proven = False  # whether its logits were compared with the model's own
        self.broken: str | None = None  # why it is not to be used

    @property
    def source(self) -> Any:
        """The model itself."""
        return self._source()

    @property
    def model(self) -> Any:
        """Where the step reads its weights: the model, or the copy in the type of the computation."""
        return self.source if self._copy is None else self._copy

    def fits(self, model: Any, length: int, dtype: torch.dtype) -> bool:
        """Whether this decoder serves such a call: long enough, same type, and weights still where they were."""
        return self.length >= length + SPARE and self.dtype == dtype and self.pointers == pointers(model)

    def prepare(self, sampled: bool) -> None:
        """Compile the kernels and capture the graph, unless that is done."""
        if not self.graphed or sampled in self.graphs:
            return
        # The steps before the capture must leave no trace: they write into the cache's spare end, and the rest is kept.
        changed = [self.ids_TL, self.token_T, self.position_T, self.length_T, self.finished_T]
        kept = [t.clone() for t in changed]
        self.length_T.fill_(self.length - SPARE)
        self.position_T.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(sampled)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(sampled)
        self.graphs[sampled] = graph
        torch._foreach_copy_(changed, kept)

    def start(self, cache: Any, ids_BS: Tensor, mask_BS: Tensor, pad: int, least: int = 0) -> None:
        """Take over a prompt: its ids, its mask and the cache that its forward filled. No greedy sequence ends before
        it has ``least`` tokens, prompt included."""
        S = ids_BS.shape[1]
        if self._copy is not None:
            torch._foreach_copy_(list(self._copy.parameters()), list(self.source.parameters()))
            if buffers := list(self._copy.buffers()):  # a dense model has none
                torch._foreach_copy_(buffers, list(self.source.buffers()))
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            keys[:, :, :S].copy_(layer.keys[:, :, :S])
            values[:, :, :S].copy_(layer.values[:, :, :S])
        self.ids_TL[:, :S].copy_(ids_BS)
        self.mask_TL.fill_(1)
        self.mask_TL[:, :S].copy_(mask_BS)
        self.length_T.fill_(S - 1)
        self.position_T.copy_(mask_BS.sum(1) - 1)
        self.finished_T.zero_()
        self.pad.fill_(pad)
        self.least.fill_(least)

    def append(self, token_T: Tensor) -> None:
        """Write a chosen token behind each sequence (padding behind finished ones) and make it the next input."""
        token_T = torch.where(self.finished_T.bool(), self.pad, token_T)
        for stop in self.stop:
            self.finished_T |= token_T == stop
        self.length_T += 1
        self.position_T += 1
        self.token_T.copy_(token_T)
        self.ids_TL.scatter_(1, self.length_T.long()[:, None], token_T[:, None])

    def step(self, sampled: bool = False) -> None:
        """Run the tokens that were chosen last. Greedy: choose and append the next ones. Sampled: leave the logits
        of the next ones in ``logits_TV``, for the caller to choose and ``append``."""
        if self.graphed:
            self.graphs[sampled].replay()
        else:
            self._step(sampled)

    # The step

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    def _step(self, sampled: bool) -> None:
        body, D = self.model.transformer, self.config.n_embd
        kernels.embed[(self.batch,)](
            self.token_T, self.position_T, body.wte.weight, body.wpe.weight, self.x_TD, D, COLS=self.columns
        )
        for index, block in enumerate(body.h):
            self._attention(block, index)
            self._feed_forward(block, self.source.transformer.h[index])
        self._norm(body.ln_f)
        self._head(sampled)

    def _gemm(self) -> dict[str, Any]:
        precision = "ieee" if self.dtype == torch.float32 else "tf32"
        return {"BT": self.rows, "BK": BLOCK_K, "PRECISION": precision, "num_warps": 4, "num_stages": 4}

    def _norm(self, norm: nn.LayerNorm) -> None:
        D = self.config.n_embd
        kernels.norm_rows[(self.batch,)](
            self.x_TD, norm.weight, norm.bias, self.normed_TD, D, norm.eps, COLS=self.columns
        )

    def _attention(self, block: GPT2Block, index: int) -> None:
        D, heads, attention = self.config.n_embd, self.config.n_head, block.attn
        norm, qkv, out = block.ln_1, attention.c_attn, attention.c_proj
        keys, values = self.keys[index], self.values[index]
        width = D // heads
        kernels.norm_qkv[(3 * D // COLUMNS,)](
            self.x_TD, norm.weight, norm.bias, qkv.weight, qkv.bias, self.query_TD, keys, values, self.length_T,
            self.batch, D, self.length, norm.eps, A=width, COLS=self.columns, BN=COLUMNS, **self._gemm(),
        )  # fmt: skip
        kernels.attend[(self.batch, heads)](
            self.query_TD, keys, values, self.mask_TL, self.length_T, self.mixed_TD, heads, self.length,
            attention.scaling, A=width, BL=128,
        )  # fmt: skip
        kernels.project_residual[(D // COLUMNS,)](
            self.mixed_TD, out.weight, out.bias, self.x_TD, self.batch, D, BN=COLUMNS, **self._gemm()
        )

    def _feed_forward(self, block: Any, source: Any) -> None:
        experts = getattr(block.mlp, "experts", None)
        if not isinstance(experts, Experts):  # a dense block
            self._norm(block.ln_2)
            self.x_TD += block.mlp(self.normed_TD)
            return
        router = block.mlp.router
        fused_router = _has_kernel(router)
        if fused_router:
            self._route(block.ln_2, source.mlp.router, experts)  # the gate in the type it is stored in
        else:
            self._norm(block.ln_2)
        if (
            fused_router
            and block.mlp.shared is None
            and fused.shapes_fit(self.normed_TD, experts.gated, experts.widths)
        ):
            weights = (experts.up_PD, experts.up_bias_P, experts.down_PD, experts.down_bias_ND)
            expert_decode.decode_into(
                self.x_TD, self.normed_TD, (self.slot_TK, self.weight_TK), weights, experts.widths
            )
        else:
            tokens = Tokens(batch_size=self.batch, position_T=self.position_T, id_T=self.token_T)
            self.x_TD += block.mlp(self.normed_TD[:, None], tokens)[0][:, 0]

    def _route(self, norm: nn.LayerNorm, router: Router, experts: Experts) -> None:
        E = router.num_experts
        BE = max(2, triton.next_power_of_2(E))
        at_once = max(BLOCK_K, min(self.columns, 16384 // BE))
        kernels.norm_route[(self.batch,)](
            self.x_TD, norm.weight, norm.bias, router.gate.weight, router.offset_E, router.bias_E, router.join_E,
            router.energy_lambda, router.temperature, _slots(experts.slot_of_expert, self.x_TD.device),
            self.normed_TD, self.slot_TK, self.weight_TK, self.score_TE, self.select_TE, self.config.n_embd, E,
            norm.eps, SCORES=_chooses_sets(router), K=router.top_k, KP=triton.next_power_of_2(router.top_k),
            PRICED=router.priced, BALANCED=router.balanced, NORMALIZED=router.mixing == "normalized",
            BE=BE, COLS=self.columns, BK=at_once,
        )  # fmt: skip
        if _chooses_sets(router):
            self._open(router, experts, BE)

    def _open(self, router: Router, experts: Experts, BE: int) -> None:
        """Choose the experts to open for all sequences, then each sequence's own among them."""
        E, K, searched = router.num_experts, router.top_k, type(router) is OpeningRouter
        if searched:
            opening_kernels.set_gains[(triton.cdiv(2**E, SETS),)](
                self.select_TE, router.open_E, router.energy_lambda, self.gain_G, self.batch, E,
                K=K, BE=BE, BG=min(SETS, 2**E), BT=min(32, self.rows), num_warps=4,
            )  # fmt: skip
        else:
            opening_kernels.first_set[(1,)](self.select_TE, self.set_1, self.batch, E, K=K, BE=BE, BT=self.rows)
        opening_kernels.assign[(self.batch,)](
            self.score_TE, self.select_TE, self.gain_G, self.set_1, _slots(experts.slot_of_expert, self.x_TD.device),
            self.slot_TK, self.weight_TK, E, K=K, KP=triton.next_power_of_2(K), BE=BE, G=2**E, SEARCHED=searched,
            NORMALIZED=router.mixing == "normalized", num_warps=1,
        )  # fmt: skip

    def _head(self, sampled: bool) -> None:
        weight = self.model.lm_head.weight
        V, D = weight.shape
        blocks = self.best_BT.shape[0]
        kernels.head_scores[(blocks,)](
            self.normed_TD, weight, self.logits_TV, self.best_BT, self.where_BT, self.length_T, self.least, self.stop_F,
            self.batch, D, V, STORE=sampled, EOS=len(self.stop), BV=HEAD_ENTRIES, **self._gemm(),
        )  # fmt: skip
        if not sampled:
            kernels.pick[(self.batch,)](
                self.best_BT, self.where_BT, self.stop_F, self.token_T, self.position_T, self.length_T,
                self.finished_T, self.ids_TL, self.pad, blocks, self.batch, self.length, V,
                EOS=len(self.stop), BB=triton.next_power_of_2(blocks),
            )  # fmt: skip


def _has_kernel(router: Router) -> bool:
    """Whether the router's choice is computed by kernels of its own."""
    if router.keep_first:
        return False
    if type(router) in OPENING_ROUTERS:
        return router.num_experts <= EXACT_EXPERTS or not _chooses_sets(router)
    return type(router) in FUSED_ROUTERS


def _chooses_sets(router: Router) -> bool:
    return type(router) is PiggybackRouter or (type(router) is OpeningRouter and router.active)


@functools.lru_cache(maxsize=64)
def _slots(slot_of_expert: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(slot_of_expert, dtype=torch.int32, device=device)
