"""Optimizer, schedule and one epoch of training steps.

Shape legend: B sequences per step, S tokens per sequence, N blocks.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe.captured import CapturedBackward
from pipelines.config import NonFiniteLossError, TrialConfig
from pipelines.data import TokenSplit
from pipelines.faults import passing
from pipelines.model import Hardware

_FINITE_CHECK_STEPS = 50
_BETAS = (0.9, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochSums:
    """What one epoch of training steps adds up to.

    `dropped_L` is the share of each MoE layer's choices that capacity dropped: zeros where the router drops none, None
    for the dense model.
    """

    loss_nats: float
    aux_loss: float | None
    dropped_L: list[float] | None
    tokens: int
    steps: int
    learning_rate: float


def make_optimizer(model: Any, config: TrialConfig, hardware: Hardware) -> torch.optim.AdamW:
    """AdamW with decay on matrices only (biases, norms and one-dimensional gates are not decayed)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = hardware.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=fused)


def learning_rate(config: TrialConfig, step: int, total_steps: int, per_epoch: int | None = None) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to a tenth, constant, or stable and decayed at the end.

    With `wsd` the warm-up is a share of the first epoch (`per_epoch` steps) and the decay is 1 − √progress over the
    last `decay_fraction`, so that runs of any length share their stable part (Hägele et al. 2024, section 3).
    """
    is_wsd = config.schedule == "wsd"
    warmup = max(1, round(config.warmup_fraction * (per_epoch or total_steps if is_wsd else total_steps)))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if is_wsd:
        start = decay_start(config, total_steps)
        done = (step - start + 1) / (total_steps - start + 1)
        return config.learning_rate * (1 - math.sqrt(done)) if step >= start else config.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def decay_start(config: TrialConfig, total_steps: int) -> int:
    """Step at which the decay of a `wsd` run of that length begins: the stable part ends at n·(1 − d)."""
    return round(total_steps * (1 - config.decay_fraction))


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
    """Runs epochs of optimizer steps on a model. `step` counts over all epochs, for the schedule; `forward` is the
    model's compiled forward where there is one already; `name` tells trials apart in `faults`.
    """

    def __init__(
        self,
        model: Any,
        config: TrialConfig,
        hardware: Hardware,
        split: TokenSplit,
        *,
        forward: Any = None,
        name: str = "",
    ) -> None:
        self.model, self.config, self.hardware, self.split = model, config, hardware, split
        self.name = name
        self.optimizer = make_optimizer(model, config, hardware)
        compiled = torch.compile(model, fullgraph=True) if hardware.compile and forward is None else model
        self.forward = compiled if forward is None else forward
        self.total_steps = self.per_epoch * config.epochs
        self.step = 0
        self.captured: CapturedBackward | None = None

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_per_epoch(self.split, self.config)

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of an optimizer step."""
        rows, block = self.split.blocks_NS.shape
        return min(self.config.batch_size, rows) * (block - 1)

    @property
    def tokens(self) -> int:
        """Target tokens that the weights have seen."""
        return self.step * self.tokens_per_step

    def warm_up(self) -> None:
        """Compile, run a few real batches, capture the step; parameters, buffers and random state stay as they were."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        random_state = torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state() if self.hardware.device.type == "cuda" else None
        self.model.train()
        for block_BS, _ in zip(batches(self.split, self.config, 0, self.hardware.device), range(3), strict=False):
            self._backward(block_BS)
            self.optimizer.zero_grad(set_to_none=True)
        self.capture(block_BS)
        self.model.load_state_dict(state)
        torch.set_rng_state(random_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)

    def capture(self, block_BS: torch.Tensor) -> None:
        """Put forward and backward into a CUDA graph, where code is compiled for a GPU. A step that cannot be captured
        runs as before, with a warning.

        Raises:
            torch.OutOfMemoryError: the device has no room for the step.
        """
        if not (self.hardware.compile and self.hardware.device.type == "cuda"):
            return
        try:
            self.captured = CapturedBackward(self._backward, self.model.parameters(), block_BS)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            self.drop_capture()
            warnings.warn(f"training runs without a captured step: {str(problem).splitlines()[0]}", stacklevel=2)

    def drop_capture(self) -> None:
        """Let go of the graph and of the memory that it holds."""
        self.captured = None
        self.optimizer.zero_grad(set_to_none=True)

    def run_epoch(self, epoch: int) -> EpochSums:
        """One pass over the training split.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        return self._run(batches(self.split, self.config, epoch, self.hardware.device), self.total_steps)

    def run_to(self, end_step: int, total_steps: int) -> EpochSums:
        """Train up to a step of a run of `total_steps`.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        return self._run(self._blocks(end_step), total_steps)

    def _run(self, blocks: Iterable[torch.Tensor], total_steps: int) -> EpochSums:
        self.model.train()
        layers = [router.drops for router in getattr(self.model, "routers", ())]
        totals = torch.zeros(2 + sum(layers), device=self.hardware.device)
        rate, first, per_epoch = 0.0, self.step, self.per_epoch
        for block_BS in blocks:
            rate = learning_rate(self.config, self.step, total_steps, per_epoch)
            totals += self._step(block_BS, rate)
            passing("train.step", f"{self.name}.step{self.step}.")
            if (self.step - first) % _FINITE_CHECK_STEPS == 0:
                self._assert_finite(totals)
        self._assert_finite(totals)
        steps = self.step - first
        lm, aux, *dropped_L = (totals / max(steps, 1)).tolist()
        return EpochSums(
            loss_nats=lm,
            aux_loss=None if self.config.is_dense else aux,
            dropped_L=None if self.config.is_dense else dropped_L or [0.0] * len(layers),
            tokens=steps * self.tokens_per_step,
            steps=steps,
            learning_rate=rate,
        )

    def _blocks(self, end_step: int) -> Iterator[torch.Tensor]:
        """The batches from the present step to `end_step`, each epoch in its own order."""
        while self.step < end_step:
            epoch, skip = divmod(self.step, self.per_epoch)
            count = min(end_step, (epoch + 1) * self.per_epoch) - self.step
            whole = batches(self.split, self.config, epoch + 1, self.hardware.device)
            yield from itertools.islice(whole, skip, skip + count)

    def _step(self, block_BS: torch.Tensor, rate: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.captured(block_BS) if self.captured else self._backward(block_BS)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        if self.captured is None:  # a graph writes its gradients where it wrote them before
            self.optimizer.zero_grad(set_to_none=True)
        if not self.config.is_dense:
            self.model.after_step()
        self.step += 1
        return losses

    def _backward(self, block_BS: torch.Tensor) -> torch.Tensor:
        """Gradients of one batch; returns [language-model loss, weighted regularizers, dropped share of each layer]."""
        with self.hardware.autocast():
            output = self.forward(input_ids=block_BS, labels=block_BS, use_cache=False)
        output.loss.backward()
        if self.config.is_dense:
            return torch.stack([output.loss.detach().float(), output.loss.new_zeros(()).float()])
        losses = torch.stack([output.lm_loss.detach().float(), (output.loss - output.lm_loss).detach().float()])
        return losses if output.dropped_L is None else torch.cat([losses, output.dropped_L])

    def _assert_finite(self, totals: torch.Tensor) -> None:
        if not bool(torch.isfinite(totals).all()):
            epoch = 1 + (self.step - 1) // self.per_epoch
            raise NonFiniteLossError(
                f"the training loss is not finite in epoch {epoch} (step {self.step}); lower learning_rate or grad_clip"
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state, position in the schedule, random state."""
        cuda = self.hardware.device.type == "cuda"
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu())

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Train on the side: afterwards weights, optimizer, position and random state are as they were."""
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        state = copy.deepcopy(self.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(weights)
            self.load_state_dict(state)
