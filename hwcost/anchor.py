"""The anchor: one fixed compiled training step, measured at the start and the end of a sweep.

Boards of one kind differ by 3-8 %, and a board drifts with its inlet air. The anchor's joules per
step, stored beside a sweep, tell the two apart from what a trial changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from hwcost.probes import dtype_of, repeat_for
from hwcost.shares import share_energy

# Readings of different days are compared, so a change is a new version. Version 1 had 16 rows: at 8 ms a step a busy
# host could hold it up (+18 % time, +12 % joules beside another job); with 64 rows the host has four times as long.
# Version 3: the input has a gradient too, so that all four blocks run one compiled graph.
ANCHOR_VERSION = 3
_ROWS, _LENGTH, _WIDTH, _HEADS, _REPEATS = 64, 1024, 768, 12, 4


class _Window(Protocol):
    @property
    def measurement(self) -> Any: ...


class Monitor(Protocol):
    """The part of `EnergyMonitor` that is needed here."""

    def window(self, name: str) -> AbstractContextManager[_Window]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorReading:
    """Joules and seconds of one anchor step; None where they could not be measured.

    `energy_j` is what the whole reading took: build, warm-up and window. `workload` is equal where readings compare.
    """

    version: int
    workload: str
    energy_j: float | None
    j_per_step: float | None
    j_per_token: float | None
    j_per_token_uncertainty: float | None
    s_per_step: float
    mean_power_w: float | None
    mean_temperature_c: float | None
    steps: int
    shared: bool | None = None
    flags: tuple[str, ...] = ()


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BSD.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x_BSD)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x_BSD = x_BSD + self.out(mixed)
        return x_BSD + self.down(F.gelu(self.up(self.norm_2(x_BSD)), approximate="tanh"))


class AnchorStep:
    """The workload: a transformer block applied four times, forward and backward, bf16, compiled on a GPU."""

    def __init__(self, params: Mapping[str, Any], device: torch.device) -> None:
        shrink = 1 if device.type == "cuda" else 16
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            width = _WIDTH // shrink
            self.block = _Block(width, max(1, _HEADS // shrink)).to(device=device, dtype=dtype_of(device))
            x_BSD = torch.randn(_ROWS // shrink, _LENGTH // shrink, width)
        self.x_BSD = x_BSD.to(device=device, dtype=dtype_of(device)).requires_grad_()
        self._forward = torch.compile(self.block, fullgraph=True) if device.type == "cuda" else self.block
        self.run()

    @property
    def tokens(self) -> int:
        return self.x_BSD.shape[0] * self.x_BSD.shape[1]

    def configure(self, params: Mapping[str, Any]) -> dict[str, float]:
        return {}

    def run(self) -> int:
        x_BSD = self.x_BSD
        for _ in range(_REPEATS):
            x_BSD = self._forward(x_BSD)
        x_BSD.square().mean().backward()  # type: ignore[no-untyped-call]
        self.block.zero_grad(set_to_none=True)
        self.x_BSD.grad = None
        return 1

    def park(self) -> None:
        """The anchor is small and stays."""

    def unpark(self) -> None:
        """The anchor is small and never left."""


def measure_anchor(
    monitor: Monitor, device: torch.device, *, seconds: float = 10.0, warmup_s: float = 4.0
) -> AnchorReading:
    """Run the anchor for `seconds` in a window named `anchor`, after a warm-up.

    A board that stood idle draws 1-2 % less in its first seconds of load, which the warm-up keeps from looking like
    drift.
    """
    with monitor.window("anchor_whole") as whole:
        step = AnchorStep({}, device)
        repeat_for(step.run, warmup_s, device)
        with monitor.window("anchor") as window:
            steps, duration_s = repeat_for(step.run, seconds, device)
    got, (batch_size, seq_len, _) = window.measurement, step.x_BSD.shape

    def per_token(joules: float | None) -> float | None:
        shares = None if joules is None else share_energy(joules / steps, batch_size=batch_size, seq_len=seq_len)
        return None if shares is None else shares.token_j

    return AnchorReading(
        version=ANCHOR_VERSION,
        workload=f"anchor {ANCHOR_VERSION}, torch {torch.__version__.partition('+')[0]}, {device.type}",
        energy_j=whole.measurement.energy_j,
        j_per_step=None if got.energy_j is None else got.energy_j / steps,
        j_per_token=per_token(got.energy_j),
        j_per_token_uncertainty=per_token(got.uncertainty_j),
        s_per_step=duration_s / steps,
        mean_power_w=got.mean_power_w,
        mean_temperature_c=got.mean_temperature_c,
        steps=steps,
        shared=got.shared,
        flags=got.flags,
    )
