"""Mixture-of-Experts GPT-2: routers, regularizers, upcycling, metrics."""

from moe.adaptation import EnergyAwareTTTRouter
from moe.budget import BudgetController, Gains, PriceLearner, Reach
from moe.callback import BalanceCallback
from moe.config import MoEGPT2Config
from moe.feedback import HardwareFeedback, TTTReport, TTTSettings
from moe.metrics import RoutingStats, RoutingSummary, agreement
from moe.modeling import MoEGPT2LMHeadModel, MoEGPT2Model, MoEGPT2Output
from moe.registry import ROUTERS
from moe.regularizers import REGULARIZERS
from moe.routers import Router
from moe.routing import Routing, Tokens
from moe.upcycling import upcycle, upcycle_checkpoint

__all__ = [
    "REGULARIZERS",
    "ROUTERS",
    "BalanceCallback",
    "BudgetController",
    "EnergyAwareTTTRouter",
    "Gains",
    "HardwareFeedback",
    "MoEGPT2Config",
    "MoEGPT2LMHeadModel",
    "MoEGPT2Model",
    "MoEGPT2Output",
    "PriceLearner",
    "Reach",
    "Router",
    "Routing",
    "RoutingStats",
    "RoutingSummary",
    "TTTReport",
    "TTTSettings",
    "Tokens",
    "agreement",
    "upcycle",
    "upcycle_checkpoint",
]
