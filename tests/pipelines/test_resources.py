"""What a trial asks of Ray must fit on a node, on clusters whose head has no GPU too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines.config import ConfigError
from pipelines.plan import plan_sweep
from pipelines.resources import allot, resources_of
from pipelines.sweep import run_sweep
from tune_spaces import Grid, Space

HEAD, WORKER, SMALL = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 2.0}
BIG = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("devices", "nodes", "parallel", "local", "expected"),
    [
        (["auto"], [HEAD, WORKER], None, False, (8, 1, 1)),  # 12 CPUs and a GPU are on no node
        (["auto"], [HEAD, WORKER, SMALL], None, False, (2, 1, 3)),
        (["auto"], [HEAD, WORKER], 8, False, (8, 1, 8)),  # seven wait for nodes that are yet to come
        (["cuda"], [HEAD], 8, False, (0, 1, 8)),
        (["cuda"], [HEAD], None, False, (0, 1, 1)),
        (["auto", "cuda"], [HEAD], 100, False, (0, 1, 20)),
        (["auto"], [HEAD], 2, False, (2, 0, 2)),  # nobody said that there will be GPUs
        (["cpu"], [HEAD, WORKER], None, False, (1, 0, 12)),
        (["cpu"], [HEAD, WORKER], 2, False, (4, 0, 2)),
        (["cpu"], [HEAD, WORKER], 1, False, (8, 0, 1)),
        (["auto"], [BIG], None, True, (8, 1, 8)),
        (["auto"], [BIG], 16, True, (8, 1, 8)),
        (["auto"], [BIG], 1, True, (64, 1, 1)),
        (["auto"], [{"CPU": 2.0}], None, True, (1, 0, 2)),
        (["auto"], [{"CPU": 5.0}], 2, True, (2, 0, 2)),
    ],
)
def test_a_trial_asks_for_what_a_node_has(
    devices: list[str], nodes: list[dict[str, float]], parallel: int | None, local: bool, expected: tuple[int, ...]
) -> None:
    found = allot(devices, nodes, count=20, parallel=parallel, local=local)
    assert (found.cpus, found.gpus, found.parallel) == expected
    assert found.waits == (found.gpus > 0 and not any("GPU" in node for node in nodes))


def test_a_machine_without_a_gpu_gets_none() -> None:
    with pytest.raises(ConfigError, match="device: expected a CUDA GPU"):
        allot(["cuda"], [HEAD], count=1, parallel=None, local=True)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head with four CPUs, and no GPU yet."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0, "include_dashboard": False})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def space(values: dict[str, Any], **domains: Grid) -> Space:
    return Space(name="t", question="", fixed=values, domains=domains, conditions={}, sweep={})


@pytest.mark.slow
def test_trials_run_on_the_gpu_node_of_a_cluster(tiny: dict[str, Any], tmp_path: Path, cluster: Cluster) -> None:
    ray.init(cluster.address, log_to_driver=False)
    asked = resources_of(plan_sweep(space(tiny | {"device": "cuda"})), 2, local=False)
    held = ray.remote(num_cpus=asked.cpus, num_gpus=asked.gpus)(lambda: True).remote()
    assert ray.wait([held], timeout=1.0)[0] == []  # it waits for a GPU
    cluster.add_node(num_cpus=8, num_gpus=1)
    assert ray.get(held, timeout=60.0)
    plan = plan_sweep(space(tiny, top_k=Grid((1, 2))))
    assert resources_of(plan, None, local=False).cpus == 8
    result = run_sweep(plan, out=tmp_path, address=cluster.address, tracking_uri=f"sqlite:///{tmp_path}/m.db")
    assert [record.state for record in result.records] == ["COMPLETED", "COMPLETED"]
