"""The project's own steps as calibration workloads: a training step as trials run it, and a decode step.

Shape legend: B sequences, S tokens per sequence, V vocabulary, E experts, K choices.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

from hwcost.anchor import AnchorStep
from hwcost.ops import ModelShape
from hwcost.points import step_shape
from hwcost.probes import BUILDERS, Builder, Workload
from moe import MoEGPT2Config, MoEGPT2LMHeadModel, generation
from moe.dense import without_experts
from pipelines.config import TrialConfig
from pipelines.data import TokenSplit
from pipelines.model import Hardware, moe_config_of
from pipelines.training import Trainer, batches

_SEQUENCES_PER_EPOCH = 192  # half a second or so between two waits for the device
_LEAST_STEPS = 8
_LEARNING_RATE = 1e-6  # the weights stay where they are, so that a shape's routing does not drift while it is measured
_CLOSED = -1e4  # added to the logits of an expert that must not open


def zipf_tokens(rows: int, length: int, vocab_size: int) -> torch.Tensor:
    """Token ids as text has them, int32 [rows, length]: frequency falls with rank (Mandelbrot's law)."""
    weight_V = 1.0 / (torch.arange(vocab_size, dtype=torch.float64) + 2.7)
    flat = torch.multinomial(weight_V, rows * length, replacement=True, generator=torch.Generator().manual_seed(0))
    return flat.view(rows, length).int()


def gpt2_config(shape: ModelShape, positions: int) -> transformers.GPT2Config:
    """GPT-2 of a shape, DistilGPT2's settings otherwise."""
    return transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=positions,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        bos_token_id=0,
        eos_token_id=0,
    )


class _Weights:
    """Lets a model's parameters go while another workload runs, and draws them again: random ones are all alike."""

    def __init__(self, model: Any) -> None:
        self._params = list(model.parameters())  # each once, tied or not
        drawn = ((p.detach().mean(), p.detach().std(correction=0)) for p in self._params)
        self._drawn = [(float(mean), float(std)) for mean, std in drawn]
        self._sizes = [p.untyped_storage().nbytes() for p in self._params]

    @torch.no_grad()
    def release(self) -> None:
        for param in self._params:
            param.grad = None
            param.untyped_storage().resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        for param, size, (mean, std) in zip(self._params, self._sizes, self._drawn, strict=True):
            if param.untyped_storage().nbytes() == 0:
                param.untyped_storage().resize_(size)
                param.normal_(mean, std)


class TrainStep:
    """Epochs of a trial's own training loop over made-up text; fresh weights of the real shape."""

    def __init__(self, params: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        shape = step_shape(params, {})
        batch, length = int(params["batch_size"]), int(params["seq_len"])
        hardware = Hardware(
            device=device, dtype="bf16" if device.type == "cuda" else "fp32", compile=device.type == "cuda"
        )
        config = _trial_config(shape, batch, length)
        with torch.device(device):
            self.model: Any = _model(config, gpt2_config(shape, length))
        self._weights = _Weights(self.model)
        self.trainer = Trainer(self.model.to(device), config, hardware, _text(2 * batch, length, shape.vocab_size))
        self._epoch = 0
        self.run()  # compiles
        steps = max(_LEAST_STEPS, _SEQUENCES_PER_EPOCH // batch) if device.type == "cuda" else 2
        self.trainer.split = _text(steps * batch, length, shape.vocab_size)

    def configure(self, params: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def run(self) -> int:
        sums = self.trainer.run_epoch(self._epoch)
        self._epoch += 1
        return sums.steps

    def park(self) -> None:
        """Nothing stays on the device but buffers: dozens of parked steps would leave no room for one that compiles."""
        self.trainer.optimizer.state.clear()
        self.trainer.drop_capture()
        self._weights.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def unpark(self) -> None:
        """The optimizer makes its state anew in the first step; the graph is captured again."""
        self._weights.restore()
        self.trainer.capture(next(batches(self.trainer.split, self.trainer.config, 0, self.device)))


def _text(rows: int, length: int, vocab_size: int) -> TokenSplit:
    blocks_NS = zipf_tokens(rows, length, vocab_size)
    return TokenSplit(blocks_NS=blocks_NS, domain_N=torch.zeros(rows, dtype=torch.int64), bytes_per_token=4.0)


def _trial_config(shape: ModelShape, batch: int, length: int) -> TrialConfig:
    common = {
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "n_embd": shape.d_model,
        "batch_size": batch,
        "seq_len": length,
        "decode_prompt_tokens": 4,
        "decode_new_tokens": 4,
        "learning_rate": _LEARNING_RATE,
        "epochs": 10_000,
    }
    if not shape.expert_widths:
        return TrialConfig.parse({**common, "router": "dense"})
    factors = [width / (4 * shape.d_model) for width in shape.expert_widths]
    return TrialConfig.parse(
        {**common, "num_experts": len(factors), "expert_width_factors": factors, "top_k": shape.top_k}
    )


def _model(config: TrialConfig, dense: transformers.GPT2Config) -> Any:
    if config.is_dense:
        return without_experts(transformers.GPT2LMHeadModel(dense))
    return MoEGPT2LMHeadModel(moe_config_of(config, dense))


class PrefillStep:
    """One forward pass over B prompts without a cache, bf16 weights; compiled on a GPU."""

    def __init__(self, params: Mapping[str, Any], device: torch.device) -> None:
        shape = step_shape(params, {})
        batch, length = int(params["batch_size"]), int(params["seq_len"])
        self.model = _inference_model(shape, batch, length, device)
        self._weights = _Weights(self.model)
        self.ids_BS = zipf_tokens(batch, length, shape.vocab_size).long().to(device)
        forward = torch.compile(self.model, fullgraph=True) if device.type == "cuda" else self.model
        self._forward: Callable[..., Any] = forward
        self.run()

    def configure(self, params: Mapping[str, Any]) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def run(self) -> int:
        self._forward(input_ids=self.ids_BS, use_cache=False, logits_to_keep=1)
        return 1

    def park(self) -> None:
        self._weights.release()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def unpark(self) -> None:
        self._weights.restore()


def _inference_model(shape: ModelShape, batch: int, length: int, device: torch.device) -> Any:
    config = moe_config_of(_trial_config(shape, batch, max(8, length)), gpt2_config(shape, length))
    with torch.device(device):
        model: Any = MoEGPT2LMHeadModel(MoEGPT2Config(**_values(config)))
    return model.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


class DecodeStep:
    """One token for B sequences over a full cache, bf16 weights. On a GPU it is the graph that `generate` replays, and
    for batches that it does not serve the model's own forward over a static cache, compiled and captured.

    `open` experts per layer receive tokens, the others are barred by their logit offset, so that one compiled
    step serves every number of open experts.
    """

    def __init__(self, params: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.shape = step_shape(params, {})
        self.batch, self.context = int(params["batch_size"]), int(params["seq_len"])
        self.model = _inference_model(self.shape, self.batch, self.context, device)
        generator = torch.Generator().manual_seed(0)
        self.ids_B1 = torch.randperm(self.shape.vocab_size, generator=generator)[: self.batch, None].to(device)
        self.position_11 = torch.full((1, 1), self.context - 1, device=device)
        self.cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.context)
        self._fill_cache()
        self.own_step = False
        self._replay = self._captured()

    def configure(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Bar all but the first `open` experts; tells how many were open, on average over the layers, and whether the
        step is `generate`'s own.
        """
        offset_E = torch.zeros(self.shape.num_experts)
        offset_E[int(params["open"]) :] = _CLOSED
        for router in self.model.routers:
            router.offset_E.copy_(offset_E)
        return {"open_experts": self._open_experts(), "own_step": float(self.own_step)}

    @torch.no_grad()
    def run(self) -> int:
        self._replay()
        return 1

    def park(self) -> None:
        """A decode step is small, and its graph holds addresses: it stays."""

    def unpark(self) -> None:
        """It never left."""

    def _forward(self, **more: Any) -> Any:
        self._rewind()
        return self.model(
            input_ids=self.ids_B1, past_key_values=self.cache, position_ids=self.position_11, use_cache=True, **more
        )

    def _next(self) -> torch.Tensor:
        output = self.model(
            input_ids=self.ids_B1, past_key_values=self.cache, position_ids=self.position_11, use_cache=True
        )
        return output.logits[:, -1].argmax(-1)

    def _rewind(self) -> None:
        """The step always writes the last place of the cache."""
        for layer in self.cache.layers:
            length = getattr(layer, "cumulative_length", None)
            if isinstance(length, torch.Tensor):
                length.fill_(self.context - 1)
            elif length is not None:
                layer.cumulative_length = self.context - 1

    @torch.no_grad()
    def _fill_cache(self) -> None:
        self._forward()
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

    @torch.no_grad()
    def _open_experts(self) -> float:
        routings = self._forward(output_routing=True).routing
        return sum(routing.expert_TK.unique().numel() for routing in routings) / len(routings)

    def _captured(self) -> Callable[[], object]:
        if self.device.type != "cuda":
            return self._forward
        own = None
        try:
            own = self._graphed(torch.bfloat16)
        except Exception as error:
            warnings.warn(f"the captured decode step is not used: {type(error).__name__}: {error}", stacklevel=2)
        return own or self._compiled()

    @torch.no_grad()
    def _graphed(self, dtype: torch.dtype, *, graph: bool = True) -> Callable[[], object] | None:
        """The step of `moe.decoding`, held at the last place of the cache: it stores its logits and chooses nothing.
        None where `generate` would not use it, here or at all.
        """
        decoding: Any = getattr(generation, "decoding", None)  # None without Triton
        if decoding is None or self.batch > decoding.MAX_BATCH or (graph and decoding.unsupported(self.model)):
            return None
        places = -(-(self.context + decoding.SPARE) // decoding.CACHE_MULTIPLE) * decoding.CACHE_MULTIPLE
        decoder = decoding.Decoder(self.model, self.batch, places, (), dtype, graph=graph)
        for layer, keys, values in zip(self.cache.layers, decoder.keys, decoder.values, strict=True):
            keys[:, :, : self.context].copy_(layer.keys)
            values[:, :, : self.context].copy_(layer.values)
        decoder.mask_TL.fill_(1)
        decoder.token_T.copy_(self.ids_B1[:, 0])
        for place_T in (decoder.position_T, decoder.length_T):
            place_T.fill_(self.context - 1)
        decoder.prepare(True)
        decoder.step(sampled=True)
        error = float(generation._distance(decoder.logits_TV.float(), self._forward().logits[:, -1].float()))
        self.own_step = error < generation.TOLERANCE
        if not self.own_step:
            warnings.warn(f"the captured decode step is not used: its logits are {error:.3f} off", stacklevel=2)
        return functools.partial(decoder.step, True) if self.own_step else None

    @torch.no_grad()
    def _compiled(self) -> Callable[[], object]:
        step = torch.compile(self._next, fullgraph=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._rewind()
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._rewind()
            self._out = step()
        return graph.replay


def _values(config: MoEGPT2Config) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    return values


STEP_BUILDERS: dict[str, Builder] = {
    **BUILDERS,
    "anchor": AnchorStep,
    "train_step": TrainStep,
    "prefill": PrefillStep,
    "decode_step": DecodeStep,
}


def build(kind: str, params: Mapping[str, Any], device: torch.device) -> Workload:
    """A workload of any kind, ready to run."""
    return STEP_BUILDERS[kind](params, device)


@contextlib.contextmanager
def many_shapes() -> Any:
    """Let one process compile many static shapes: no dynamic dimensions, no early end of recompilation."""
    import torch._dynamo

    with torch._dynamo.config.patch(
        automatic_dynamic_shapes=False, recompile_limit=256, accumulated_recompile_limit=1024
    ):
        yield
