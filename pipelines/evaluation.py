"""What a trained model is worth: loss, routing, and the joules of prefill and decode.

Shape legend: B sequences, S tokens per sequence, T = B·S tokens, E experts, K choices, L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hwcost import EnergyMonitor, Measurement, share_energy
from moe import RoutingStats, RoutingSummary
from moe.captured import CapturedForward
from moe.probes import agreement_between, oracle_agreement
from pipelines.config import MEASURE_S, WARMUP_S, NonFiniteLossError, TrialConfig
from pipelines.data import Corpus, TokenSplit
from pipelines.model import Hardware

PROBE_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of a split in nats per token, and what the routers did on it."""

    loss_nats: float
    bits_per_byte: float
    routing: RoutingSummary | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseEnergy:
    """Joules per token of one inference phase, and the window they come from."""

    j_per_token: float | None
    tokens: int
    measurement: Measurement

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens over the window's time; None where no time went by."""
        return self.tokens / self.measurement.duration_s if self.measurement.duration_s else None


@torch.no_grad()
def evaluate(model: Any, split: TokenSplit, config: TrialConfig, hardware: Hardware) -> Evaluation:
    """Mean next-token cross-entropy over the split, and routing metrics (none for the dense model)."""
    model.eval()
    stats = None
    if not config.is_dense:
        stats = RoutingStats(model.config.expert_widths, domains=int(split.domain_N.max()) + 1)
    total = torch.zeros((), dtype=torch.float64, device=hardware.device)
    targets = 0
    for block_BS, domain_B in _batches(split, config.batch_size, hardware.device):
        output = _forward(model, block_BS, hardware, dense=config.is_dense)
        loss = output.loss if config.is_dense else output.lm_loss
        total += loss.double() * block_BS[:, 1:].numel()
        targets += block_BS[:, 1:].numel()
        if stats is not None:
            batch_size, seq_len = block_BS.shape
            stats.update(output.routing, domain_B.repeat_interleave(seq_len), sequences=batch_size)
    loss_nats = float(total) / targets
    if not math.isfinite(loss_nats):
        raise NonFiniteLossError("the evaluation loss is not finite; lower learning_rate or grad_clip")
    return Evaluation(
        loss_nats=loss_nats,
        bits_per_byte=loss_nats / math.log(2) / split.bytes_per_token,
        routing=None if stats is None else stats.summary(),
    )


def _batches(split: TokenSplit, batch_size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(split.blocks_NS), batch_size):
        rows = slice(start, start + batch_size)
        yield split.blocks_NS[rows].to(device).long(), split.domain_N[rows].to(device)


def _forward(model: Any, block_BS: torch.Tensor, hardware: Hardware, *, dense: bool) -> Any:
    with hardware.autocast():
        if dense:
            return model(input_ids=block_BS, labels=block_BS, use_cache=False)
        return model(input_ids=block_BS, labels=block_BS, use_cache=False, output_routing=True)


def oracle_by_layer(model: Any, split: TokenSplit, config: TrialConfig, hardware: Hardware) -> list[float | None]:
    """Agreement of each MoE layer's first choice with the oracle's, on the split's first 2,048 predicted tokens.

    Raises:
        ValueError: the split is shorter.
    """
    batches = _probe(split, hardware).split(config.batch_size)
    return [oracle_agreement(model, batches, layer) for layer in range(len(model.routers))]


def agreement_by_layer(model: Any, other: Any, split: TokenSplit, hardware: Hardware) -> list[float | None]:
    """Agreement of each MoE layer's router with another model's, on the same tokens as the oracle's.

    Raises:
        ValueError: the models have not the same experts, MoE layers and width.
    """
    return agreement_between(model, other, _probe(split, hardware))


def _probe(split: TokenSplit, hardware: Hardware) -> torch.Tensor:
    blocks = math.ceil(PROBE_TOKENS / (split.blocks_NS.shape[1] - 1))
    return split.blocks_NS[:blocks].to(hardware.device).long()


def measure_prefill(
    model: Any,
    split: TokenSplit,
    config: TrialConfig,
    hardware: Hardware,
    monitor: EnergyMonitor,
    *,
    modelled_power_w: float | None = None,
) -> PhaseEnergy:
    """Joules per prompt token of a forward pass over full blocks: one CUDA graph where code is compiled for a GPU, or
    launching its kernels would take longer than running them."""
    block_BS, _ = next(_batches(split, config.batch_size, hardware.device))
    forward = CapturedForward(model, model) if hardware.compile else model

    def once() -> None:
        with torch.no_grad(), hardware.autocast():
            forward(input_ids=block_BS, use_cache=False, logits_to_keep=1)

    return _repeat(once, block_BS.shape, "prefill", config, hardware, monitor, modelled_power_w)


def measure_decode(
    model: Any,
    split: TokenSplit,
    batch: int,
    config: TrialConfig,
    hardware: Hardware,
    monitor: EnergyMonitor,
    *,
    modelled_power_w: float | None = None,
) -> PhaseEnergy:
    """Joules per generated token of greedy decoding at a batch, prompts included as a generation must."""
    rows = torch.arange(batch) % len(split.blocks_NS)
    prompt_BS = split.blocks_NS[rows, : config.decode_prompt_tokens].to(hardware.device).long()
    mask_BS = torch.ones_like(prompt_BS)

    def once() -> None:
        with torch.no_grad(), hardware.autocast():
            model.generate(
                prompt_BS,
                attention_mask=mask_BS,
                max_new_tokens=config.decode_new_tokens,
                min_new_tokens=config.decode_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    shape = (batch, config.decode_new_tokens)
    return _repeat(once, shape, f"decode_b{batch}", config, hardware, monitor, modelled_power_w)


def _repeat(
    once: Callable[[], None],
    shape: Sequence[int],
    name: str,
    config: TrialConfig,
    hardware: Hardware,
    monitor: EnergyMonitor,
    modelled_power_w: float | None,
) -> PhaseEnergy:
    """Warm up, then repeat for the measuring time inside one window; `shape` [B, S] are the tokens of one call."""
    device = hardware.device.type
    with monitor.window(f"{name}_warmup", modelled_power_w=modelled_power_w):
        _for_seconds(once, WARMUP_S[device], hardware)
    with monitor.window(name, modelled_power_w=modelled_power_w) as window:
        repeats = _for_seconds(once, config.measure_seconds or MEASURE_S[device], hardware)
    energy, (batch_size, seq_len) = window.measurement.energy_j, shape
    shares = None if energy is None else share_energy(energy / repeats, batch_size=batch_size, seq_len=seq_len)
    return PhaseEnergy(
        j_per_token=None if shares is None else shares.token_j,
        tokens=batch_size * seq_len * repeats,
        measurement=window.measurement,
    )


def _for_seconds(once: Callable[[], None], seconds: float, hardware: Hardware) -> int:
    start, repeats = time.monotonic(), 0
    while repeats == 0 or time.monotonic() - start < seconds:
        once()
        if hardware.device.type == "cuda":
            torch.cuda.synchronize()
        repeats += 1
    return repeats


def converged_at(losses: Sequence[float | None]) -> int | None:
    """First epoch (1-based) after which validation loss improves by less than 0.5 %, None if not yet."""
    for epoch, (now, then) in enumerate(itertools.pairwise(losses), start=1):
        if now is not None and then is not None and now - then < 0.005 * now:
            return epoch
    return None


def evaluation_splits(corpus: Corpus, config: TrialConfig) -> tuple[TokenSplit, TokenSplit | None]:
    """The validation split and, where the trial asks for it, the test split, cut to `max_eval_tokens`."""
    test = corpus.splits.get("test") if config.test else None
    return corpus.splits["validation"].first(config.max_eval_tokens), test and test.first(config.max_eval_tokens)
