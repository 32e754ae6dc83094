"""Optimizer, schedule and one epoch of training steps.

Shape legend: B sequences per step, S tokens per sequence, N blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from pipelines.config import TrialConfig
from pipelines.data import TokenSplit
from pipelines.model import Hardware

_FINITE_CHECK_STEPS = 50
_BETAS = (0.9, 0.95)


class NonFiniteLossError(ArithmeticError):
    """Training left the numbers: the trial fails with this reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochSums:
    """What one epoch of training steps adds up to."""

    loss_nats: float
    aux_loss: float | None
    tokens: int
    steps: int
    learning_rate: float


def make_optimizer(model: Any, config: TrialConfig, hardware: Hardware) -> torch.optim.AdamW:
    """AdamW with decay on matrices only (biases, norms and one-dimensional gates are not decayed)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = hardware.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=fused)


def learning_rate(config: TrialConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to a tenth (or constant)."""
    warmup = max(1, round(config.warmup_fraction * total_steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def steps_per_epoch(split: TokenSplit, config: TrialConfig) -> int:
    """Optimizer steps of an epoch; the last partial batch is left out, a lone one is kept."""
    return max(1, len(split.blocks_NS) // config.batch_size)


def batches(split: TokenSplit, config: TrialConfig, epoch: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Blocks of an epoch as [B, S] batches, shuffled by (seed, epoch)."""
    generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    order = torch.randperm(len(split.blocks_NS), generator=generator)
    for step in range(steps_per_epoch(split, config)):
        rows = order[step * config.batch_size : (step + 1) * config.batch_size]
        block = split.blocks_NS[rows]
        if device.type == "cuda":
            block = block.pin_memory()
        yield block.to(device, non_blocking=True).long()


class Trainer:
    """Runs epochs of optimizer steps on a model. `step` counts over all epochs, for the schedule."""

    def __init__(self, model: Any, config: TrialConfig, hardware: Hardware, split: TokenSplit) -> None:
        self.model, self.config, self.hardware, self.split = model, config, hardware, split
        self.optimizer = make_optimizer(model, config, hardware)
        self.forward = torch.compile(model, fullgraph=True) if hardware.compile else model
        self.total_steps = steps_per_epoch(split, config) * config.epochs
        self.step = 0

    def warm_up(self) -> None:
        """Compile and run a few real batches; parameters, buffers and random state stay as they were."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        random_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state() if self.hardware.device.type == "cuda" else None
        self.model.train()
        for block_BS, _ in zip(batches(self.split, self.config, 0, self.hardware.device), range(3), strict=False):
            self._backward(block_BS)
            self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(state)
        torch.set_rng_state(random_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)

    def run_epoch(self, epoch: int) -> EpochSums:
        """One pass over the training split.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        self.model.train()
        totals = torch.zeros(2, device=self.hardware.device)
        rate, steps = 0.0, 0
        for block_BS in batches(self.split, self.config, epoch, self.hardware.device):
            rate = learning_rate(self.config, self.step, self.total_steps)
            totals += self._step(block_BS, rate)
            steps += 1
            if steps % _FINITE_CHECK_STEPS == 0:
                self._assert_finite(totals, epoch)
        self._assert_finite(totals, epoch)
        lm, aux = (totals / steps).tolist()
        per_block = self.split.blocks_NS.shape[1] - 1
        has_aux = not self.config.is_dense
        tokens = steps * min(self.config.batch_size, len(self.split.blocks_NS)) * per_block
        return EpochSums(
            loss_nats=lm, aux_loss=aux if has_aux else None, tokens=tokens, steps=steps, learning_rate=rate
        )

    def _step(self, block_BS: torch.Tensor, rate: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._backward(block_BS)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.config.is_dense:
            self.model.after_step()
        self.step += 1
        return losses

    def _backward(self, block_BS: torch.Tensor) -> torch.Tensor:
        """Gradients of one batch; returns [language-model loss, weighted regularizers]."""
        with self.hardware.autocast():
            output = self.forward(input_ids=block_BS, labels=block_BS, use_cache=False)
        output.loss.backward()
        if self.config.is_dense:
            return torch.stack([output.loss.detach().float(), output.loss.new_zeros(()).float()])
        return torch.stack([output.lm_loss.detach().float(), (output.loss - output.lm_loss).detach().float()])

    def _assert_finite(self, totals: torch.Tensor, epoch: int) -> None:
        if not bool(torch.isfinite(totals).all()):
            raise NonFiniteLossError(
                f"the training loss is not finite in epoch {epoch} (step {self.step}); lower learning_rate or grad_clip"
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state and position in the schedule."""
        return {"optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
