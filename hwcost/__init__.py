"""Joules measured and modelled: energy windows over GPUs and CPUs, and what operations cost."""

from hwcost.cost_model import CostModel
from hwcost.history import GpuSystemMonitor, PowerSample
from hwcost.monitor import EnergyMonitor, EnergyWindow, LedgerEntry
from hwcost.prices import ExpertPrices
from hwcost.readers import DeviceInfo, PowerBaseline
from hwcost.shares import EnergyShares, share_energy
from hwcost.windows import Measurement

__all__ = [
    "CostModel",
    "DeviceInfo",
    "EnergyMonitor",
    "EnergyShares",
    "EnergyWindow",
    "ExpertPrices",
    "GpuSystemMonitor",
    "LedgerEntry",
    "Measurement",
    "PowerBaseline",
    "PowerSample",
    "share_energy",
]
