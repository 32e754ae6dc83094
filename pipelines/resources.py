"""What one trial asks of Ray, and how many run at once: decided from the nodes, not from their sum.

A cluster's CPUs and GPUs added up are no node: a head with 4 CPUs and a worker with 8 and a GPU have 12 CPUs per GPU,
which nobody can give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ray

from pipelines.config import ConfigError
from pipelines.plan import SweepPlan

#: What a node has: `CPU`, `GPU` and more.
Node = Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial gets, and how many run at once; `waits` where the GPUs for the first of them are yet to come."""

    cpus: float
    gpus: int
    parallel: int
    waits: bool = False


def resources_of(plan: SweepPlan, parallel: int | None, *, local: bool) -> Resources:
    """What the trials of a plan get of the Ray that this process is connected to.

    Args:
        parallel: trials at once; None: one per GPU, or per CPU core.
        local: a Ray of this machine alone, which no node can join.

    Raises:
        ConfigError: a GPU is asked for, and there can be none.
    """
    trials = plan.trials or plan.examples()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return allot([config.device for config in trials], nodes, count=plan.count, parallel=parallel, local=local)


def allot(devices: Sequence[str], nodes: Sequence[Node], *, count: int, parallel: int | None, local: bool) -> Resources:
    """The decision behind `resources_of`, for trials on these `devices` and `count` of them in all."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if local and "cuda" in devices and not gpus:
        raise ConfigError("device: expected a CUDA GPU, got a machine without one; use device: auto or cpu")
    if set(devices) != {"cpu"} and (gpus or "cuda" in devices):
        return _on_gpus(nodes, gpus, count=count, parallel=parallel, local=local)
    slots = min(count, sum(int(node.get("CPU", 0)) for node in nodes))
    parallel = max(1, min(parallel or slots, slots))
    return Resources(cpus=_cpus_for(nodes, parallel), gpus=0, parallel=parallel)


def _on_gpus(nodes: Sequence[Node], gpus: int, *, count: int, parallel: int | None, local: bool) -> Resources:
    """One GPU a trial. A cluster may grow: more trials than it has GPUs, if asked for, wait for theirs."""
    if local:
        parallel = max(1, min(parallel or gpus, gpus, count))
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        return Resources(cpus=max(1, cpus // parallel), gpus=1, parallel=parallel)
    shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1]
    wanted = max(1, min(parallel or gpus, count))
    return Resources(cpus=min(shares, default=0), gpus=1, parallel=wanted, waits=not gpus)


def _cpus_for(nodes: Sequence[Node], parallel: int) -> int:
    """The most CPUs that every one of so many trials can get on a node."""
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    fits = (c for c in range(largest, 0, -1) if sum(int(node.get("CPU", 0) // c) for node in nodes) >= parallel)
    return next(fits, 1)
