"""A whole sweep on real Ray Tune: rows, front, MLflow, and a trial that fails among those that do not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from benchmarks.driver_overhead import TabulatedActor
from pipelines.config import ConfigError
from pipelines.plan import plan_sweep
from pipelines.records import EpochRecord, PowerRecord, Store
from pipelines.sweep import run_sweep
from tune_spaces import Grid, Space


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Any:
    """Two trials that end well and one that leaves the numbers."""
    out = tmp_path_factory.mktemp("sweep")
    domains = {"learning_rate": Grid((1e-3, 2e-3, 1e6))}
    fixed = tiny_values | {"grad_clip": 1e6, "epochs": 2}
    space = Space(name="test", question="?", fixed=fixed, domains=domains, conditions={}, sweep={})
    result = run_sweep(plan_sweep(space), out=out)
    return result, out


@pytest.mark.slow
def test_every_trial_has_its_row(swept: Any) -> None:
    result, out = swept
    assert sorted(record.state for record in result.records) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert result.completed == 2
    (failed,) = (record for record in result.records if record.state == "FAILED")
    assert failed.error.startswith("NonFiniteLossError: the training loss is not finite")
    epochs = Store(out).read(EpochRecord, result.sweep_id).to_pylist()
    for record in result.records:
        count = sum(row["trial_id"] == record.trial_id for row in epochs)
        assert count == (3 if record.state == "COMPLETED" else count)


@pytest.mark.slow
def test_each_actor_measured_its_own_energy(swept: Any) -> None:
    result, out = swept
    for record in result.records:
        if record.state == "COMPLETED":
            assert record.train_energy_j > 0
            assert record.energy_source in ("modelled", "rapl")
    power = Store(out).read(PowerRecord, result.sweep_id)
    assert power.num_rows == 0 or set(power["trial_id"].to_pylist()) <= {r.trial_id for r in result.records}


@pytest.mark.slow
def test_the_mirror_has_one_run_per_trial_and_one_for_the_sweep(swept: Any) -> None:
    import mlflow

    result, out = swept
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.sweep_id = '{result.sweep_id}'")
    trials = {run.data.tags["trial_id"] for run in runs if "trial_id" in run.data.tags}
    assert trials == {record.trial_id for record in result.records}
    assert len(runs) == len(result.records) + 1


@pytest.mark.slow
def test_a_gpu_asked_for_where_there_is_none_writes_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    space = Space(name="t", question="", fixed=tiny | {"device": "cuda"}, domains={}, conditions={}, sweep={})
    ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(ConfigError, match="device: expected a CUDA GPU"):
            run_sweep(plan_sweep(space), out=tmp_path / "out")
    finally:
        ray.shutdown()
    assert not (tmp_path / "out").exists()


class BusyActor(TabulatedActor):
    """In the middle of a long epoch, whatever one asks of it."""

    def step(self) -> dict[str, Any]:
        Path(self.config["out"], "busy").touch()
        time.sleep(120)
        return super().step()


@pytest.mark.slow
def test_an_interrupt_does_not_wait_for_the_epoch(tiny: dict[str, Any], tmp_path: Path) -> None:
    space = Space(name="t", question="", fixed=tiny, domains={}, conditions={}, sweep={"anchor": False})
    sent_s = []

    def interrupt() -> None:
        while not (tmp_path / "busy").exists():
            time.sleep(0.1)
        sent_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    result = run_sweep(plan_sweep(space), out=tmp_path, actor=BusyActor)
    assert time.monotonic() - sent_s[0] < 8.0  # three for the actor, and for Ray to end
    assert result.ended == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
