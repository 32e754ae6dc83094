"""From a trial's settings to a model: base checkpoint, experts in place of FFNs, prices on the routers."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from hwcost import CostModel
from hwcost.ops import ModelShape
from moe import ROUTERS, MoEGPT2Config, native, upcycle
from moe.dense import without_experts
from moe.generation import drop_decoders
from moe.opening import choosing_launches
from pipelines.config import NO_REGULARIZER, ConfigError, TrialConfig
from pipelines.data import Corpus
from pipelines.hub import OFFLINE_OPTIONS, first_line, prepare_hub
from pipelines.opening import OpeningCase, opening_case
from pipelines.prices import OperatingPoint, Prices, phase_prices

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where a trial runs: device, precision, whether code is compiled, and what the device is called."""

    device: torch.device
    dtype: str
    compile: bool
    gpu_name: str | None = None
    power_limit_w: float | None = None

    @classmethod
    def of(cls, config: TrialConfig, *, gpu_name: str | None = None, power_limit_w: float | None = None) -> Hardware:
        """What `auto` stands for on this host.

        Raises:
            ConfigError: a GPU was asked for where there is none.
        """
        has_cuda = torch.cuda.is_available()
        if config.device == "cuda" and not has_cuda:
            raise ConfigError("device: expected a CUDA GPU, got a host without one; use device: auto or cpu")
        cuda = has_cuda and config.device != "cpu"
        dtype = config.dtype if config.dtype != "auto" else ("bf16" if cuda else "fp32")
        return cls(
            device=torch.device("cuda" if cuda else "cpu"),
            dtype=dtype,
            compile=cuda if config.compile is None else config.compile,
            gpu_name=gpu_name if cuda else None,
            power_limit_w=power_limit_w if cuda else None,
        )

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic over fp32 parameters where the trial asks for it, else nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16")


def dense_model(config: TrialConfig, corpus: Corpus) -> Any:
    """The dense GPT-2 that a trial starts from: a checkpoint, or fresh weights of DistilGPT2's shape.

    Raises:
        ConfigError: the checkpoint cannot be had, or does not fit the data.
    """
    if config.base == "random":
        shape = transformers.GPT2Config(
            vocab_size=corpus.vocab_size,
            n_positions=max(config.seq_len, 2),
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=corpus.end_id,
            eos_token_id=corpus.end_id,
            **_dropouts(config),
        )
        return transformers.GPT2LMHeadModel(shape)
    if not os.path.isdir(config.base):
        if config.base.startswith((".", "/", "~")):
            raise ConfigError(f"base: expected a checkpoint folder, got {config.base!r}, which does not exist")
        prepare_hub()
    try:
        dense, found = transformers.GPT2LMHeadModel.from_pretrained(
            config.base, dtype=torch.float32, output_loading_info=True, **_dropouts(config)
        )
    except Exception as error:
        reason = first_line(error)
        if os.path.isdir(config.base):
            raise ConfigError(f"base: expected a GPT-2 checkpoint in {config.base}, got {reason}") from None
        raise ConfigError(f"base: {config.base!r} cannot be had ({reason}); {OFFLINE_OPTIONS}") from None
    missing = sorted(set(found["missing_keys"]) - {"lm_head.weight"})
    if missing:
        raise ConfigError(
            f"base: expected a dense GPT-2 checkpoint in {config.base}, got one without {missing[0]}"
            f" ({len(missing)} weights are missing; a model with experts cannot be a base)"
        )
    positions, vocabulary = dense.config.n_positions, dense.config.vocab_size
    if config.seq_len > positions:
        raise ConfigError(
            f"seq_len: expected at most {positions}, as {config.base} has positions, got {config.seq_len}"
        )
    if corpus.vocab_size > vocabulary:
        raise ConfigError(
            f"tokenizer: expected at most {vocabulary} tokens, as {config.base} has, got {corpus.vocab_size}"
        )
    return dense


def _dropouts(config: TrialConfig) -> dict[str, float]:
    """Dropout in GPT-2's three places; None keeps what the base has."""
    names = () if config.dropout is None else ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return {name: float(config.dropout or 0.0) for name in names}


def build_model(config: TrialConfig, corpus: Corpus, hardware: Hardware) -> tuple[Any, dict[str, Prices] | None]:
    """The model of a trial on its device, and the prices of each phase (None for the dense model). Those of training
    are on its routers."""
    torch.manual_seed(config.seed)
    if hardware.device.type == "cpu":
        native.library()  # a first compilation belongs to the set-up, not to the training window
    with hardware.device:  # built where it runs
        return _build(config, corpus, hardware)


def _build(config: TrialConfig, corpus: Corpus, hardware: Hardware) -> tuple[Any, dict[str, Prices] | None]:
    model = dense_model(config, corpus)
    prices = None
    if config.is_dense:
        model = without_experts(model)
    else:
        moe_config = moe_config_of(config, model.config)
        model = upcycle(model, moe_config, noise=config.upcycle_noise, seed=config.seed)
        prices = prices_of(config, moe_config, hardware)
        set_prices(model, prices["train"])
    weights = torch.bfloat16 if hardware.dtype == "pure_bf16" else torch.float32
    return model.to(device=hardware.device, dtype=weights), prices


def compiled_forward(model: Any, **options: Any) -> Callable[..., Any]:
    """The model's forward with its blocks compiled, and everything else as it is: one compilation serves all blocks of
    a kind, which takes seconds where compiling the whole takes a minute. Weights, buffers and prices are the model's
    own; the model itself stays eager. Where compiling fails, the model's own forward serves, with a warning.

    Args:
        options: of `torch.compile`.
    """
    twin = _shallow(model)
    twin.transformer = _shallow(model.transformer)
    blocks = [_shallow(block) for block in model.transformer.h]
    for block in blocks:
        block.compile(fullgraph=True, **options)
    twin.transformer.h = torch.nn.ModuleList(blocks)
    broken = False

    def forward(**kwargs: Any) -> Any:
        nonlocal broken
        if not broken:
            twin.training = model.training
            try:
                return twin(**kwargs)
            except Exception as error:
                if model.lm_head.weight.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise  # what cannot be captured may still be compiled
                broken = True
                warnings.warn(f"the forward runs without compiled blocks: {first_line(error)}", stacklevel=2)
        return model(**kwargs)

    return forward


def _shallow(module: Any) -> Any:
    """A module of its own with the same parameters, buffers and children."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    return new


def moe_config_of(config: TrialConfig, dense: Any) -> MoEGPT2Config:
    """The model configuration of a trial; expert widths in neurons, never 0 for an expert that is not null."""
    inner = dense.n_inner or 4 * dense.n_embd
    values = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    has_regularizer = config.regularizer != NO_REGULARIZER and config.regularizer_weight != 0
    values |= {
        "expert_widths": [expert_width(factor, inner) for factor in config.width_factors],
        "num_experts_per_tok": config.top_k,
        "moe_layers": list(config.moe_layers) if config.moe_layers is not None else None,
        "router": config.router,
        "energy_lambda": config.energy_lambda,
        "router_temperature": config.temperature,
        "regularizers": {config.regularizer: config.regularizer_weight} if has_regularizer else None,
        "capacity_factor": config.capacity_factor,
        "router_top_p": config.top_p,
        "router_jitter": config.router_jitter,
        "bias_balance_rate": config.bias_balance_rate,
        "router_seed": config.seed,
    }
    return MoEGPT2Config(**values)


def expert_width(factor: float, inner: int) -> int:
    """Neurons of an expert, a multiple of 8 (grouped GEMM rows are multiples of 16 bytes); 0 stays 0."""
    return 0 if factor == 0 else max(8, round(factor * inner / 8) * 8)


def prices_of(config: TrialConfig, moe_config: MoEGPT2Config, hardware: Hardware) -> dict[str, Prices]:
    """Prices of a trial's experts in training, prefill and decode, at its operating point."""
    tokens = config.batch_size * config.seq_len
    point = OperatingPoint(
        d_model=moe_config.n_embd,
        widths=tuple(moe_config.expert_widths),
        top_k=config.top_k,
        dtype="bf16" if hardware.dtype != "fp32" else "fp32",
        tokens={"train": tokens, "prefill": tokens, "decode": config.decode_batches[0] if config.decode_batches else 1},
    )
    cost_model = CostModel.for_device(hardware.gpu_name, hardware.power_limit_w)
    return phase_prices(cost_model, point, kind=config.price, seed=config.seed, opens=ROUTERS[config.router].opens)


def model_shape(model_config: MoEGPT2Config, hardware: Hardware) -> ModelShape:
    """What the cost model needs to know of a model with experts."""
    return ModelShape(
        d_model=model_config.n_embd,
        num_layers=model_config.n_layer,
        num_heads=model_config.n_head,
        vocab_size=model_config.vocab_size,
        expert_widths=tuple(model_config.expert_widths),
        top_k=model_config.num_experts_per_tok,
        moe_layers=len(model_config.moe_layer_indices),
        dtype="fp32" if hardware.dtype == "fp32" else "bf16",
    )


def weigh_opening(
    config: TrialConfig,
    moe_config: MoEGPT2Config,
    hardware: Hardware,
    *,
    energy_lambda: float | None = None,
    batch: int | None = None,
) -> OpeningCase | None:
    """Whether router `opening` pays in this trial's decoding at λ and the trial's prices; None where it is not the
    router, or without a GPU, whose joules per step nobody knows.

    Args:
        energy_lambda: λ, nats per c_ref; None: the model's.
        batch: sequences that decode together; None: the trial's first decode batch, whose prices hold at any batch.
    """
    if config.router != "opening" or hardware.gpu_name is None:
        return None
    prices = prices_of(config, moe_config, hardware)["decode"]
    if batch is None:
        batch = config.decode_batches[0] if config.decode_batches else 1
    return opening_case(
        CostModel.for_device(hardware.gpu_name, hardware.power_limit_w),
        model_shape(moe_config, hardware),
        batch=batch,
        cached=config.decode_prompt_tokens + config.decode_new_tokens // 2,
        launches=choosing_launches(moe_config.num_experts, config.top_k, batch),
        energy_lambda=float(moe_config.energy_lambda if energy_lambda is None else energy_lambda),
        join=prices.join,
        open_=prices.open,
    )


def switch_opening(model: Any, case: OpeningCase | None) -> None:
    """Turn choosing off where it does not pay, and back on where it does; say so."""
    _activate(model, [case is None or case.pays] * len(_routers(model)))
    if case is not None:
        _LOG.log(logging.INFO if case.pays else logging.WARNING, "%s", case)


@contextmanager
def opening_at(model: Any, config: TrialConfig, hardware: Hardware, batch: int) -> Iterator[None]:
    """Router `opening` on or off as it pays where `batch` sequences decode together; afterwards as it was."""
    before = [router.active for router in _routers(model)]
    case = weigh_opening(config, model.config, hardware, batch=batch)
    if case is not None and [case.pays] * len(before) != before:
        switch_opening(model, case)
    try:
        yield
    finally:
        _activate(model, before)


def _activate(model: Any, active: Sequence[bool]) -> None:
    """Switch each router's choosing on or off."""
    routers = _routers(model)
    if any(router.active != on for router, on in zip(routers, active, strict=True)):
        drop_decoders(model)  # a captured step has choosing in it or has not
    for router, on in zip(routers, active, strict=True):
        router.active = on


def _routers(model: Any) -> tuple[Any, ...]:
    """None in a dense model."""
    return tuple(getattr(model, "routers", ()))


def set_prices(model: Any, prices: Prices) -> None:
    """Put the prices of a phase on the routers of a model."""
    model.set_prices(torch.tensor(prices.join), torch.tensor(prices.open))
