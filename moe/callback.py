"""What the Hugging Face Trainer must call after an optimizer step."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from moe.modeling import MoEGPT2LMHeadModel


class BalanceCallback(TrainerCallback):
    """Calls `model.after_step()`: `Trainer(model, ..., callbacks=[BalanceCallback()])`."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        while model is not None and not isinstance(model, MoEGPT2LMHeadModel):
            # DistributedDataParallel and compile each wrap the model once
            model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if model is None:
            raise ValueError("BalanceCallback: expected a MoEGPT2LMHeadModel in the Trainer, got none")
        model.after_step()
