"""Real signals at named points: after any of them every joule is booked and every row and run is there once."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import heartbeat
from pipelines.journal import Journal
from pipelines.records import EpochRecord, PointRecord, Store, TrialRecord

HERE = Path(__file__).parent
SWEEP = "faults"
_spec = importlib.util.spec_from_file_location("fake_boards", HERE / "fakes" / "pynvml.py")
assert _spec is not None
assert _spec.loader is not None
boards: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(boards)


def begin(out: Path, space: Mapping[str, Any], fault: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start a driver in a session of its own."""
    path = out.parent / "space.yaml"
    path.write_text(yaml.safe_dump({"question": "?", "trial": dict(space)}))
    words = [sys.executable, str(HERE / "fault_driver.py"), str(out), str(path), SWEEP]
    words += [f"{key}={json.dumps(value)}" for key, value in options.items()]
    paths = [str(HERE / "fakes"), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment |= {"JOULEMOE_FAULT": fault} if fault else {}
    log = open(out.parent / "driver.log", "a", encoding="utf-8")  # noqa: SIM115 - the process keeps it
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a driver and read its last line."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return dict(json.loads(text.strip().splitlines()[-1]))


def run(out: Path, space: Mapping[str, Any], fault: str = "", **options: Any) -> dict[str, Any]:
    """A whole session of a driver."""
    return end(begin(out, space, fault, **options))


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until a marker exists."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, "the driver ended before the point was passed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_rows(out: Path) -> dict[str, TrialRecord]:
    found: dict[str, TrialRecord] = {}
    for values in sorted(Store(out).read(TrialRecord, SWEEP).to_pylist(), key=lambda row: row["attempt"]):
        found[values["trial_id"]] = TrialRecord(**values)
    return found


def check_exactly_once(out: Path) -> None:
    """One row and one MLflow run per claimed attempt, whole histories, no leftovers of writes."""
    import mlflow

    store, claims = Store(out), Journal(str(out), SWEEP).claims()
    rows = store.read(TrialRecord, SWEEP).to_pylist()
    attempts = collections.Counter((row["trial_id"], row["attempt"]) for row in rows)
    assert set(attempts) == {(claim["trial_id"], claim["attempt"]) for claim in claims}
    assert set(attempts.values()) == {1}
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.sweep_id = '{SWEEP}' and tags.kind = 'trial'", max_results=1000)
    mirrored = collections.Counter((run.data.tags["trial_id"], int(run.data.tags["attempt"])) for run in runs)
    assert mirrored == attempts
    epochs = store.read(EpochRecord, SWEEP).to_pylist()
    for row in rows:
        if row["state"] == "COMPLETED":
            own = [e for e in epochs if (e["trial_id"], e["attempt"]) == (row["trial_id"], row["attempt"])]
            assert [e["epoch"] for e in own] == list(range(row["epochs"] + 1))
    assert store.read(PointRecord, SWEEP).num_rows == sum(row["state"] == "COMPLETED" for row in rows)


def check_ledger(out: Path, died: Mapping[int, float]) -> None:
    """The sum over all ledgers is what the boards drew during the attempts; a heartbeat more where one died.

    `died`: moments of death by process.
    """
    journal = Journal(str(out), SWEEP)
    drawn, slack = 0.0, 0.0
    for claim in journal.claims():
        path = journal.beat_path(claim["beats"])
        assert path is not None
        lines = heartbeat.read_lines(path)
        board = boards.UUIDS.index(claim["device_columns"]["gpu_uuid"])
        edges = [line for line in lines if line.get("attempt") == f"{claim['trial_id']}-{claim['attempt']}"]
        ends = [line["t"] for line in edges if line["edge"] == "end"]
        end_s = ends[0] if ends else died.get(claim["pid"], lines[-1]["t"])
        drawn += boards.joules(board, end_s) - boards.joules(board, edges[0]["t"])
        slack += 0.0 if ends else 550 * heartbeat.PERIOD_S
    booked = sum(row.total_energy_j or 0.0 for row in last_rows(out).values())
    assert booked == pytest.approx(drawn, abs=1e-3 * drawn + slack)
    for row in last_rows(out).values():
        parts = (row.setup_energy_j, row.train_energy_j, row.eval_energy_j, row.idle_energy_j, row.lost_energy_j)
        assert sum(part or 0.0 for part in parts) == pytest.approx(row.total_energy_j)


def deaths(folder: Path) -> dict[int, float]:
    """Moments at which processes were hit, from the markers."""
    found = {}
    for path in folder.glob("hit-*"):
        moment, pid = path.read_text().split()
        found[int(pid)] = float(moment)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for a sweep; its log is shown where a test fails."""
    yield tmp_path
    log = tmp_path / "driver.log"
    if log.exists():
        print(log.read_text()[-3000:])


def space_of(tiny: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return tiny | {"epochs": 3, "measure_seconds": 0.2, "device": "auto"} | changes


#: Points that workers pass, and a word that keeps the driver out (it writes rows of `trials` too).
WORKER_POINTS = {
    "trial.begin": "",
    "train.step": "step12.",
    "checkpoint.write": "",
    "parquet.rename": "/points/",
    "trial.end": "",
}


@pytest.mark.slow
def test_workers_killed_at_every_stage(tiny: dict[str, Any], place: Path) -> None:
    """One sweep whose workers are killed at each point once; every trial ends well all the same."""
    out = place / "out"
    faults = [f"{point}:SIGKILL:{place}/hit-{point}:{word}" for point, word in WORKER_POINTS.items()]
    result = run(out, space_of(tiny, energy_lambda={"grid": [0.1, 0.2, 0.4]}), ";".join(faults), retries=5)
    assert result["states"] == ["COMPLETED"] * 3
    assert len(deaths(place)) == 5
    check_exactly_once(out)
    check_ledger(out, deaths(place))
    assert sum(row.lost_energy_j or 0 for row in last_rows(out).values()) > 0


def tables(out: Path) -> dict[Path, int]:
    """When each table's files were written (MLflow's copies apart)."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet") if "mlartifacts" not in path.parts}


@pytest.mark.slow
def test_a_driver_killed_interrupted_and_resumed(tiny: dict[str, Any], place: Path) -> None:
    """SIGKILL while a worker writes, SIGINT, a worker that hangs; then the end, and nothing after it."""
    out, space = place / "out", space_of(tiny)
    process = begin(out, space, f"checkpoint.write:SIGSTOP:{place}/hit-frozen")
    wait_for(place / "hit-frozen", process)
    assert begin(out, space).wait(timeout=200) == 1
    assert "expected a sweep that nobody drives" in (place / "driver.log").read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert interrupted(out, space, place / "hit-once", step=10, count=1)
    assert run(out, space, f"train.step:SIGSTOP:{place}/hit-hung:step18.", timeout_s=6)["states"] == ["COMPLETED"]
    ended = [row["ended_by"] for row in Store(out).read(TrialRecord, SWEEP).to_pylist()]
    assert sorted(ended) == ["died", "interrupt", "itself", "timeout"]
    check_exactly_once(out)
    check_ledger(out, {})
    before = tables(out)
    run(out, space)
    assert tables(out) == before


@pytest.mark.slow
@pytest.mark.skipif("JOULEMOE_MATRIX" not in os.environ, reason="the rest of the fault matrix: set JOULEMOE_MATRIX=1")
def test_the_driver_at_its_other_points(tiny: dict[str, Any], place: Path) -> None:
    """SIGKILL between a report and its mirror, SIGINT twice, SIGKILL between a row and its mirror."""
    out, space = place / "out", space_of(tiny)
    assert begin(out, space, f"driver.report:SIGKILL:{place}/hit-report").wait(timeout=200) == -signal.SIGKILL
    assert interrupted(out, space, place / "hit-twice", step=18, count=2)
    assert begin(out, space, f"driver.end:SIGKILL:{place}/hit-end").wait(timeout=200) == -signal.SIGKILL
    assert run(out, space)["states"] == ["COMPLETED"]
    check_exactly_once(out)
    check_ledger(out, {})


def interrupted(out: Path, space: Mapping[str, Any], marker: Path, *, step: int, count: int) -> bool:
    """A session whose worker is frozen at a step (so that nothing ends by itself) and whose driver gets SIGINT."""
    process = begin(out, space, f"train.step:SIGSTOP:{marker}:step{step}.")
    wait_for(marker, process)
    for _ in range(count):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1.0)
    return bool(end(process)["ended"] == "interrupted")
