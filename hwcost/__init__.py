"""Joules on hardware: read, windowed and modelled."""

from hwcost.cost_model import CostModel
from hwcost.prices import ExpertPrices

__all__ = ["CostModel", "ExpertPrices"]
