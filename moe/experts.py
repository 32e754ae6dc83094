"""The experts of one MoE layer: feed-forward networks of equal or unequal width, and null experts that do nothing.

Shapes: T tokens, K choices per token, E experts, N experts that compute, D model width, F neurons of one expert, P
neurons of all experts together (see ``moe.dispatch``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe import native_ops
from moe.dispatch import Weights, grouped, loop, neuron_slices
from moe.sorted_cpu import sorted_rows

if TYPE_CHECKING:
    from moe.config import MoEGPT2Config
    from moe.routing import Routing

Dispatch = Callable[[Tensor, Tensor, Tensor, Weights, Sequence[int]], Tensor]

DISPATCHES: dict[str, Dispatch] = {
    "loop": loop,
    "sorted": sorted_rows,
    "native": native_ops.experts,
    "grouped_mm": grouped,
}


try:
    from moe import fused
except ModuleNotFoundError:  # no Triton: PyTorch's own grouped GEMM serves
    fused = None  # type: ignore[assignment]
else:
    DISPATCHES["triton"] = fused.fused


def _automatic(x_TD: Tensor, weights: Weights, widths: Sequence[int]) -> str:
    """The fastest path that serves this device, type and shape."""
    if fused is not None and fused.supported(x_TD, weights, widths):
        return "triton"
    return "grouped_mm" if x_TD.is_cuda and x_TD.dtype != torch.float64 else "native"


class Experts(nn.Module):
    """E feed-forward networks, of which each token passes through the ones its routing names.

    Neurons are stored expert after expert: ``up_PD`` holds what a neuron reads, ``down_PD`` what it writes, so one
    parameter serves experts of any widths. ``dispatch`` picks the computation: ``auto``, or a key of ``DISPATCHES``.
    """

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__()
        widths = list(config.expert_widths)
        self.dispatch: str = getattr(config, "dispatch", "auto")
        if self.dispatch != "auto" and self.dispatch not in DISPATCHES:
            raise ValueError(f"dispatch: expected auto or one of {sorted(DISPATCHES)}, got {self.dispatch!r}")
        self.computing = tuple(e for e, width in enumerate(widths) if width > 0)
        self.widths = tuple(widths[e] for e in self.computing)
        slots = iter(range(len(self.computing)))
        self.slot_of_expert = tuple(next(slots) if width > 0 else -1 for width in widths)
        self.gated: bool = getattr(config, "expert_activation", "gelu") == "swiglu"
        neurons, width = sum(self.widths), config.n_embd
        self.up_PD = nn.Parameter(torch.empty(neurons, width))
        self.up_bias_P = nn.Parameter(torch.empty(neurons))
        self.down_PD = nn.Parameter(torch.empty(neurons, width))
        self.down_bias_ND = nn.Parameter(torch.empty(len(self.widths), width))
        self.gate_PD = nn.Parameter(torch.empty(neurons, width)) if self.gated else None
        self.gate_bias_P = nn.Parameter(torch.empty(neurons)) if self.gated else None
        self.reset_parameters(getattr(config, "initializer_range", 0.02))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Weights from a normal distribution with this standard deviation, biases zero."""
        for name, parameter in self.named_parameters(recurse=False):
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sum over the kept choices k of weight_TK times expert expert_TK of x_TD.

        Args:
            x_TD: tokens, one row each.
            routing: ``expert_TK`` (ids), ``weight_TK`` (mixing weights), ``kept_TK`` (False: dropped or
                padding; None: all kept).

        Returns:
            y_TD in the dtype of the computation (that of autocast, where it is on); zero where nothing was kept.
        """
        kind = x_TD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
        x_TD = x_TD.to(dtype)
        if not self.widths:
            return torch.zeros_like(x_TD)
        weights = Weights(*(None if w is None else w.to(dtype) for w in self._weights()))  # type: ignore[arg-type]
        name = _automatic(x_TD, weights, self.widths) if self.dispatch == "auto" else self.dispatch
        return DISPATCHES[name](x_TD, self._slots(routing), routing.weight_TK, weights, self.widths)

    def _weights(self) -> Weights:
        return Weights(self.up_PD, self.up_bias_P, self.down_PD, self.down_bias_ND, self.gate_PD, self.gate_bias_P)

    def _slots(self, routing: Routing) -> Tensor:
        """Ids among the computing experts; -1 where a choice computes nothing."""
        slot_TK = routing.expert_TK
        removed = 0
        for e, slot in enumerate(self.slot_of_expert):  # unrolled: no table to keep on the device
            if slot < 0:
                slot_TK = torch.where(routing.expert_TK == e, -1, slot_TK)
                removed += 1
            elif removed:
                slot_TK = torch.where(routing.expert_TK == e, slot, slot_TK)
        return slot_TK if routing.kept_TK is None else torch.where(routing.kept_TK, slot_TK, -1)

    def _slot(self, e: int) -> tuple[int, slice]:
        if not 0 <= e < len(self.slot_of_expert):
            raise ValueError(f"expert: expected 0 to {len(self.slot_of_expert) - 1}, got {e}")
        n = self.slot_of_expert[e]
        if n < 0:
            raise ValueError(f"expert: {e} is a null expert and has no parameters")
        return n, neuron_slices(self.widths)[n]

    @torch.no_grad()
    def load_expert(
        self,
        e: int,
        up_DF: Tensor,
        up_bias_F: Tensor,
        down_FD: Tensor,
        down_bias_D: Tensor,
        gate_DF: Tensor | None = None,
        gate_bias_F: Tensor | None = None,
    ) -> None:
        """Copy an expert in, given in GPT-2's Conv1D layout (inputs by outputs).

        Raises:
            ValueError: a null expert, a shape that does not fit, or a gate without SwiGLU (and the reverse).
        """
        n, neurons = self._slot(e)
        if (gate_DF is not None) != self.gated:
            raise ValueError(f"gate_DF: expected {'one' if self.gated else 'none'} for this expert_activation")
        pairs = [(self.up_PD, neurons, up_DF.T), (self.up_bias_P, neurons, up_bias_F)]
        pairs += [(self.down_PD, neurons, down_FD), (self.down_bias_ND, slice(n, n + 1), down_bias_D[None])]
        if gate_DF is not None and self.gate_PD is not None and self.gate_bias_P is not None:
            bias_F = torch.zeros_like(up_bias_F) if gate_bias_F is None else gate_bias_F
            pairs += [(self.gate_PD, neurons, gate_DF.T), (self.gate_bias_P, neurons, bias_F)]
        for parameter, rows, value in pairs:
            if parameter[rows].shape != value.shape:
                raise ValueError(f"expert {e}: expected {tuple(parameter[rows].shape)}, got {tuple(value.shape)}")
            parameter[rows] = value.to(parameter)

    def expert_state(self, e: int) -> dict[str, Tensor]:
        """Copies of expert e's tensors under the argument names of ``load_expert``; empty for a null expert."""
        if self.slot_of_expert[e] < 0:
            return {}
        n, neurons = self._slot(e)
        state = {"up_DF": self.up_PD[neurons].T, "up_bias_F": self.up_bias_P[neurons]}
        state |= {"down_FD": self.down_PD[neurons], "down_bias_D": self.down_bias_ND[n]}
        if self.gate_PD is not None and self.gate_bias_P is not None:
            state |= {"gate_DF": self.gate_PD[neurons].T, "gate_bias_F": self.gate_bias_P[neurons]}
        return {name: value.detach().clone() for name, value in state.items()}
