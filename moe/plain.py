"""Experts of any activation: right, not fast.

GPT-2-family checkpoints may have an activation other than the tanh form of GELU, for which the fast paths are written.
These experts compute every expert on every token and weigh what was not chosen by zero: E/K times the work, no sorting,
no host synchronisation, and any activation that transformers knows.

Shapes: T tokens, K choices, D model width, F neurons of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moe.experts import Experts

if TYPE_CHECKING:
    from moe.config import MoEGPT2Config
    from moe.routing import Routing


class PlainExperts(Experts):
    """`Experts` with `config.activation_function`."""

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__(config)
        self.act = ACT2FN[config.activation_function]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e in range(len(self.slot_of_expert)):
            if self.slot_of_expert[e] < 0:
                continue
            n, neurons = self._slot(e)
            h_TF = self.act(F.linear(x_TD, self.up_PD[neurons], self.up_bias_P[neurons]))
            out_TD = F.linear(h_TF, self.down_PD[neurons].T, self.down_bias_ND[n])
            weight_T = (routing.weight_TK * ((routing.expert_TK == e) & routing.kept())).sum(dim=1)
            y_TD = y_TD + weight_T[:, None].to(out_TD.dtype) * out_TD
        return y_TD
