"""A saved model as `eval`, `scan` and `adapt` need it: its settings as a trial's, the model on its device, its text."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from hwcost import EnergyMonitor
from moe import MoEGPT2LMHeadModel
from moe.dense import without_experts
from pipelines.config import DENSE, ConfigError, TrialConfig
from pipelines.data import Corpus, load_corpus
from pipelines.hub import first_line
from pipelines.model import Hardware, prices_of, switch_opening, weigh_opening
from pipelines.prices import Prices

GPT2_DROPOUT = 0.1  # what a fresh GPT-2 has where nothing else is said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint ready to work. `prices` are None for a dense model."""

    model: Any
    config: TrialConfig
    corpus: Corpus
    hardware: Hardware
    prices: Mapping[str, Prices] | None


def load_checkpoint(path: str, values: Mapping[str, Any], monitor: EnergyMonitor) -> Loaded:
    """Load a checkpoint and the text to judge it by.

    Args:
        path: folder that `save_pretrained` wrote, of `MoEGPT2LMHeadModel` or `GPT2LMHeadModel`.
        values: keys of a trial that do not stand in the checkpoint: data, tokenizer, batch_size, seq_len, ...

    Raises:
        ConfigError: the folder, the data or a key cannot be what was said.
    """
    config = checkpoint_config(path, values)
    device = monitor.devices[0] if monitor.devices else None
    hardware = Hardware.of(
        config, gpu_name=device.name if device else None, power_limit_w=device.power_limit_w if device else None
    )
    if config.threads and hardware.device.type == "cpu":
        torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.GPT2LMHeadModel if config.is_dense else MoEGPT2LMHeadModel
    try:
        model = kind.from_pretrained(path, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(f"checkpoint: expected a model in {path}, got {first_line(error)}") from None
    if config.is_dense:
        model = without_experts(model)
    corpus = load_corpus(config)
    if corpus.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer: expected at most {model.config.vocab_size} tokens, as {path} has, got {corpus.vocab_size}"
        )
    weights = torch.bfloat16 if hardware.dtype == "pure_bf16" else torch.float32
    model = model.to(device=hardware.device, dtype=weights).eval()
    prices = None if config.is_dense else prices_of(config, model.config, hardware)
    if not config.is_dense:
        switch_opening(model, weigh_opening(config, model.config, hardware))
    return Loaded(model=model, config=config, corpus=corpus, hardware=hardware, prices=prices)


def load_routers(path: str, like: Loaded) -> MoEGPT2LMHeadModel:
    """Another checkpoint with experts, to compare its routers: on the device and in the type of the loaded one.

    Raises:
        ConfigError: there is none.
    """
    try:
        kind = transformers.AutoConfig.from_pretrained(path).model_type
        model = MoEGPT2LMHeadModel.from_pretrained(path, dtype=like.model.dtype) if kind == "moe_gpt2" else None
    except Exception as error:
        raise ConfigError(f"against: expected a model in {path}, got {first_line(error)}") from None
    if model is None:
        raise ConfigError(f"against: expected a model with experts in {path}, got one of model_type {kind}")
    return model.to(like.hardware.device).eval()


def checkpoint_config(path: str, values: Mapping[str, Any]) -> TrialConfig:
    """The trial that a checkpoint could have come from."""
    file = Path(path) / "config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise ConfigError(f"checkpoint: expected a folder with a config.json, got {path} ({reason})") from None
    known: dict[str, Any] = {
        "base": path,
        "n_layer": saved["n_layer"],
        "n_head": saved["n_head"],
        "n_embd": saved["n_embd"],
        "seq_len": min(saved["n_positions"], 1024),
    }
    known["decode_prompt_tokens"] = min(64, known["seq_len"] // 2)
    known["decode_new_tokens"] = min(64, known["seq_len"] - known["decode_prompt_tokens"])
    if values.get("data", "embedded") != "embedded" and (Path(path) / "tokenizer.json").exists():
        known["tokenizer"] = path
    dropouts = {saved.get(name, GPT2_DROPOUT) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(dropouts) == 1 and dropouts != {GPT2_DROPOUT}:
        (known["dropout"],) = dropouts
    if saved.get("model_type") == "moe_gpt2":
        inner = saved.get("n_inner") or 4 * saved["n_embd"]
        known |= {
            "router": saved["router"],
            "expert_width_factors": [width / inner for width in saved["expert_widths"]],
            "top_k": saved["num_experts_per_tok"],
            "moe_layers": saved["moe_layers"],
            "energy_lambda": saved["energy_lambda"],
            "temperature": saved["router_temperature"],
            "top_p": saved["router_top_p"],
            "router_jitter": saved.get("router_jitter", 0.0),
            "bias_balance_rate": saved.get("bias_balance_rate", 0.0),
            "capacity_factor": saved.get("capacity_factor", 1.25),
        }
        regularizers = saved.get("regularizers") or {}
        if len(regularizers) == 1:  # a trial has one
            ((known["regularizer"], known["regularizer_weight"]),) = regularizers.items()
    else:
        known["router"] = DENSE
    return TrialConfig.parse(known | {key: value for key, value in values.items() if value is not None})


def check_new_folder(path: str) -> None:
    """Raise a ConfigError where something stands at `path` already."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ConfigError(f"out: expected a new or an empty folder, got {path}, which holds something")
