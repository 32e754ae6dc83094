"""Mixture-of-Experts GPT-2: routers, regularizers, upcycling, metrics."""

from moe.config import MoEGPT2Config
from moe.routing import Routing, Tokens

__all__ = ["MoEGPT2Config", "Routing", "Tokens"]
