"""Mixture-of-Experts GPT-2: routers, regularizers, upcycling, metrics."""

from moe.config import MoEGPT2Config
from moe.modeling import MoEGPT2LMHeadModel, MoEGPT2Model, MoEGPT2Output
from moe.regularizers import REGULARIZERS
from moe.routers import ROUTERS, Router
from moe.routing import Routing, Tokens

__all__ = [
    "REGULARIZERS",
    "ROUTERS",
    "MoEGPT2Config",
    "MoEGPT2LMHeadModel",
    "MoEGPT2Model",
    "MoEGPT2Output",
    "Router",
    "Routing",
    "Tokens",
]
