"""The routers by the name that a configuration gives."""

from __future__ import annotations

from moe.opening import OpeningRouter, PiggybackRouter
from moe.routers import (
    CapacityRouter,
    EnergyRouter,
    HashRouter,
    PermutedRouter,
    RandomRouter,
    Router,
    TopKRouter,
    TopPRouter,
)

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "energy": EnergyRouter,
    "opening": OpeningRouter,
    "piggyback": PiggybackRouter,
    "capacity": CapacityRouter,
    "topp": TopPRouter,
    "random": RandomRouter,
    "permuted": PermutedRouter,
    "hash": HashRouter,
}
