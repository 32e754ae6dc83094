"""The dense GPT-2 in the class of the models with experts, and back.

A baseline must not lose for reasons that have nothing to do with routing: in this class a dense model has the same
head, the same attention without a written-out mask and the same captured decode step.
"""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from moe.config import MoEGPT2Config
from moe.modeling import MoEGPT2LMHeadModel

_NAMES = ("model_type", "architectures", "transformers_version")


def without_experts(dense: GPT2LMHeadModel) -> MoEGPT2LMHeadModel:
    """The same function, no block of which has experts; its parameters are those of ``dense``, copied."""
    config = MoEGPT2Config(**(_values(dense.config) | {"moe_layers": []}))
    return _filled(MoEGPT2LMHeadModel(config), dense)


def to_gpt2(model: MoEGPT2LMHeadModel) -> GPT2LMHeadModel:
    """What ``without_experts`` was made from, with the weights that it has now.

    Raises:
        ValueError: some block has experts.
    """
    if model.config.moe_layer_indices:
        raise ValueError(f"moe_layers: expected none, got {list(model.config.moe_layer_indices)}")
    known = GPT2Config().to_dict()
    config = GPT2Config(**{key: value for key, value in _values(model.config).items() if key in known})
    return _filled(GPT2LMHeadModel(config), model)


def _values(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _NAMES}


def _filled(model: Any, source: Any) -> Any:
    weight = source.transformer.wte.weight
    model = model.to(device=weight.device, dtype=weight.dtype).train(source.training)
    model.load_state_dict(source.state_dict())
    return model
