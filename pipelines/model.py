"""From a trial's settings to a model: base checkpoint, experts in place of FFNs, prices on the routers."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import transformers

from hwcost import CostModel
from hwcost.ops import ModelShape
from moe import ROUTERS, MoEGPT2Config, native, upcycle
from pipelines.config import NO_REGULARIZER, ConfigError, TrialConfig
from pipelines.data import Corpus
from pipelines.hub import OFFLINE_OPTIONS, first_line, prepare_hub
from pipelines.prices import OperatingPoint, Prices, phase_prices


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
        return _compilable(transformers.GPT2LMHeadModel(shape))
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
    return _compilable(dense)


def _compilable(dense: Any) -> Any:
    """Name the loss on the model: without it GPT-2 warns inside its forward, which breaks a compiled graph."""
    dense.loss_type = "ForCausalLM"
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
    model = dense_model(config, corpus)
    prices = None
    if not config.is_dense:
        moe_config = moe_config_of(config, model.config)
        model = upcycle(model, moe_config, noise=config.upcycle_noise, seed=config.seed)
        prices = prices_of(config, moe_config, hardware)
        set_prices(model, prices["train"])
    weights = torch.bfloat16 if hardware.dtype == "pure_bf16" else torch.float32
    return model.to(device=hardware.device, dtype=weights), prices


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


def modelled_step_j(
    config: TrialConfig, model: Any, hardware: Hardware, mean_selected_width: float | None
) -> float | None:
    """Joules of one training step as the cost model of this GPU predicts them; None on a CPU."""
    if hardware.gpu_name is None:
        return None
    widths = () if config.is_dense else tuple(model.config.expert_widths)
    top_k = config.top_k
    if mean_selected_width is not None and widths:  # what was routed, not what could have been
        widths = (round(mean_selected_width / top_k),) * len(widths)
    shape = ModelShape(
        d_model=model.config.n_embd,
        num_layers=model.config.n_layer,
        num_heads=model.config.n_head,
        vocab_size=model.config.vocab_size,
        expert_widths=widths,
        top_k=top_k,
        moe_layers=None if config.moe_layers is None else len(config.moe_layers),
        dtype="fp32" if hardware.dtype == "fp32" else "bf16",
    )
    cost_model = CostModel.for_device(hardware.gpu_name, hardware.power_limit_w)
    cost = cost_model.get_cost(
        "train_step", batch_size=config.batch_size, seq_len=config.seq_len, shape=shape, extrapolate=True
    )
    return cost.energy_j


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


def set_prices(model: Any, prices: Prices) -> None:
    """Put the prices of a phase on the routers of a model."""
    model.set_prices(torch.tensor(prices.join), torch.tensor(prices.open))
