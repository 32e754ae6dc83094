"""From a search space to a measured Pareto front: trials, sweeps, records, fronts, reports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.config import TrialConfig
    from pipelines.pareto import pareto_front
    from pipelines.sweep import run_sweep
    from pipelines.trial import run_trial

# Loaded when asked for: reading a front must not import Ray.
_HOMES = {
    "TrialConfig": "pipelines.config",
    "run_trial": "pipelines.trial",
    "run_sweep": "pipelines.sweep",
    "pareto_front": "pipelines.pareto",
}

__all__ = ["TrialConfig", "pareto_front", "run_sweep", "run_trial"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
