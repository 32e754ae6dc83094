"""A whole sweep on S3, with an MLflow server: the real API of both, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import parquet
from pipelines.config import ConfigError
from pipelines.journal import Journal
from pipelines.pareto import pareto_front
from pipelines.records import EpochRecord, Store, TrialRecord
from pipelines.sweep import check_storage
from tests.pipelines import synthetic
from tests.pipelines.object_store import ObjectStore


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """A real tracking server over sqlite."""
    port = free_port()
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{tmp_path}/m.db", "--artifacts-destination", f"{tmp_path}/artifacts"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{base}/health", server)
        yield base
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until a server answers."""
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)


def test_a_table_is_one_put_and_a_refused_one_is_sent_again(objects: ObjectStore) -> None:
    store = Store(objects.uri("tables"))
    objects.multipart = 0
    row = synthetic.trial("t0")
    store.write(TrialRecord, [row], sweep_id=row.sweep_id, trial_id="t0", attempt=0)
    path = f"/{store.path(TrialRecord, row.sweep_id, 't0', 0)}"
    assert objects.puts[path] == 1
    assert objects.multipart == 0
    objects.refuse = "t1-0"
    other = synthetic.trial("t1")
    store.write(TrialRecord, [other], sweep_id=row.sweep_id, trial_id="t1", attempt=0)
    objects.refuse = None
    assert sum(objects.refused.values()) == 1
    assert sorted(store.read(TrialRecord)["trial_id"].to_pylist()) == ["t0", "t1"]


def test_a_lease_on_an_object_store_keeps_a_second_driver_out(objects: ObjectStore) -> None:
    out = objects.uri("lease")
    with Journal(out, "s").driving(), pytest.raises(ConfigError, match="resume: expected a sweep that nobody drives"):
        Journal(out, "s").driving().__enter__()
    with Journal(out, "s").driving():
        pass  # it was given back


def test_a_tracking_uri_is_required(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="tracking-uri: expected the address of an MLflow server") as caught:
        check_storage(objects.uri("x"), None)
    assert "\n" not in str(caught.value)


def test_any_fsspec_uri_opens(tmp_path: Path) -> None:
    fs, path = parquet.filesystem("memory://joules/out")
    with fs.open_output_stream(f"{path}/a.txt") as sink:
        sink.write(b"1")
    assert fs.get_file_info(f"{path}/a.txt").is_file


@pytest.mark.slow
def test_a_driver_whose_sweep_was_taken_over_ends(
    tiny: dict[str, Any], tmp_path: Path, objects: ObjectStore, mlflow_server: str
) -> None:
    """Exit code 1, one line, not a row more."""
    space = tmp_path / "s.yaml"
    grid = {"energy_lambda": {"grid": [0.1, 0.2, 0.4]}}
    space.write_text(yaml.safe_dump({"question": "?", "trial": tiny | {"epochs": 12} | grid}))
    out = objects.uri("taken")
    words = [sys.executable, "-m", "pipelines.cli", "sweep"]
    more = ["--out", out, "--parallel", "1", "--tracking-uri", mlflow_server]
    begin = [*words, str(space), "--sweep-id", "taken", *more]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    store, journal = Store(out), Journal(out, "taken")
    with subprocess.Popen(begin, **how) as driver:
        for _ in range(1800):
            if store.files(EpochRecord):
                break
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.1)
        other = {"lease": "another", "pid": 7, "host": "elsewhere", "renewed": time.time()}
        journal.put("driver.json", other)
        shown, problem = driver.communicate(timeout=120)
    assert driver.returncode == 1, shown + problem
    (line,) = problem.strip().splitlines()[-1:]
    assert line.startswith("joulemoe: resume: expected to be the one driver of taken, got process 7 on elsewhere"), (
        problem
    )
    assert "Pareto front" not in shown
    assert journal.get("driver.json") == other
    rows = {row["trial_id"] for row in store.read(TrialRecord).to_pylist()}
    claimed = {claim["trial_id"] for claim in journal.claims()}
    assert len(claimed - rows) == 1  # the trial that ran has no row of this driver's
    assert len(claimed) < 3


@pytest.mark.slow
def test_a_whole_sweep_on_s3(tiny: dict[str, Any], tmp_path: Path, objects: ObjectStore, mlflow_server: str) -> None:
    space = tmp_path / "s.yaml"
    space.write_text(yaml.safe_dump({"question": "?", "trial": tiny | {"top_k": {"grid": [1, 2]}}}))
    objects.puts.clear()
    objects.refused.clear()
    objects.multipart, objects.refuse = 0, ""
    out = objects.uri("sweep")
    words = [sys.executable, "-m", "pipelines.cli", "sweep", str(space), "--out", out, "--parallel", "1"]
    done = subprocess.run(
        [*words, "--tracking-uri", mlflow_server],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=tmp_path,
    )
    objects.refuse = None
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"MLflow: {mlflow_server}\n" in done.stdout
    assert f"{mlflow_server}/#/compare-runs?runs=" in done.stdout
    store = Store(out)
    (sweep_id,) = store.sweep_ids()
    assert store.read(TrialRecord)["state"].to_pylist() == ["COMPLETED", "COMPLETED"]
    assert set(store.read(EpochRecord)["epoch"].to_pylist()) == {0, 1}
    assert set(objects.refused) == set(objects.puts)  # every object was refused once and sent again
    for name in (
        "/plan.json",
        "/driver.json",
        "/attempts/",
        "/epochs/",
        "/points/",
        "/checkpoints/",
        "/trials/",
        "/beats/",
    ):
        assert any(name in path for path in objects.refused), name
    tables = {path: count for path, count in objects.puts.items() if path.endswith(".parquet") and "epochs" not in path}
    assert set(tables.values()) == {1}, tables
    assert len(pareto_front(store, sweep_id=sweep_id)) >= 1
    asked = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "pareto", out, "--format", "json"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert sweep_id in asked.stdout
    assert not list(tmp_path.glob("s3:*"))  # nothing took the URI for a folder

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=mlflow_server)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.kind = 'trial'")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]
    assert all("eval_loss_nats" in run.data.metrics for run in runs)
