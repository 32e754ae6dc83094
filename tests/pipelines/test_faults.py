"""Real signals and real conditions at named points: every joule is booked, every row and run is there once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.beats import Meter
from pipelines.cli import app
from pipelines.journal import process_start
from pipelines.plan import plan_sweep
from pipelines.records import TrialRecord
from pipelines.scheduler import Rungs
from tests.pipelines.fault_tools import (
    Fleet,
    PlainFolder,
    Server,
    SmallDisk,
    Sweep,
    check_exactly_once,
    check_ledger,
    fleet_in,
    keeper_of,
    small_disk,
)
from tests.pipelines.object_store import ObjectStore
from tune_spaces import load_space

pytestmark = pytest.mark.slow
#: Every stage at which a worker or its node can be lost, with the words of the file or step that is meant.
STAGES = {
    "trial.begin": "",
    "train.step": ".step12",
    "checkpoint.write": "epoch-0001",
    "parquet.rename": "/points/",
    "trial.end": "",
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One cluster for all of these tests."""
    with fleet_in(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running MLflow server."""
    server = Server(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder for a sweep; its log is shown where a test fails."""
    yield tmp_path
    log = tmp_path / "driver.log"
    if log.exists():
        print(log.read_text()[-5000:])


def trial_of(tiny: dict[str, Any], rates: list[float]) -> dict[str, Any]:
    """A trial per learning rate."""
    changes = {"epochs": 3, "measure_seconds": 0.2, "device": "auto", "grad_clip": 1e6}
    return tiny | changes | {"learning_rate": {"grid": rates}}


def names_of(sweep: Sweep) -> list[str]:
    """Its trials, in order."""
    return [trial.trial_id for trial in plan_sweep(load_space(sweep.space)).trials]


def stand_at_stages(sweep: Sweep, action: str, **options: Any) -> tuple[int, list[int]]:
    """A session in which five workers stand at the five stages while the driver, in the middle of an MLflow run (of a
    sixth trial, which ends well), is hit by a signal. Returns the driver and the workers that stand.
    """
    first, *others = names_of(sweep)[:6]
    faults = [
        (point, point, "SIGSTOP", f"{trial}&{words}")
        for trial, (point, words) in zip(others, STAGES.items(), strict=True)
    ]
    driver = sweep.begin(
        *faults,
        ("first", "train.step", "SIGSTOP", first),
        ("mlflow", "mlflow.write", action, first),
        parallel=6,
        **options,
    )
    runner, workers = sweep.hit("first"), [sweep.hit(point) for point in STAGES]
    os.kill(runner, signal.SIGCONT)
    assert sweep.hit("mlflow") == driver
    return driver, workers


def continue_later(sweep: Sweep, name: str, seconds: float) -> None:
    """SIGCONT for whoever stopped at a point, a while after."""

    def watch() -> None:
        pid = sweep.hit(name)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    threading.Thread(target=watch, daemon=True).start()


def test_workers_at_every_stage_and_a_server_that_is_down_for_ten_seconds(
    fleet: Fleet, tiny: dict[str, Any], place: Path, server: Server
) -> None:
    """One sweep in which each trial has its own bad luck."""
    sweep = Sweep(fleet, place, trial_of(tiny, [1e-3 * n for n in range(1, 10)] + [1e6]))
    victim, hung, *others, memory, paused, nan = names_of(sweep)
    killed = dict(zip(STAGES, others, strict=True))
    faults = [
        *((point, point, "SIGKILL", f"{killed[point]}&{words}") for point, words in STAGES.items()),
        ("memory", "train.step", "torch.OutOfMemoryError", f"{memory}&.step9"),
        ("victim", "train.step", "SIGSTOP", f"{victim}&.step5"),
        ("hung", "train.step", "SIGSTOP", f"{hung}&.step5"),
        ("paused", "train.step", "SIGSTOP", f"{paused}&.step7"),
    ]
    continue_later(sweep, "paused", 1.5)
    driver = sweep.begin(*faults, parallel=4, retries=6, trial_timeout=25, tracking_uri=server.uri)
    worker = sweep.hit("victim")
    sweep.arm(*faults, ("mlflow", "mlflow.write", "SIGSTOP", ""))
    assert sweep.hit("mlflow") == driver
    sweep.kill(worker)
    server.kill()
    os.kill(driver, signal.SIGCONT)
    time.sleep(10)
    server.start()
    assert sweep.end(driver) == 0
    rows = sweep.last_rows()
    assert {name for name, row in rows.items() if row.state == "COMPLETED"} == set(names_of(sweep)) - {memory, nan}
    assert (rows[memory].error or "").startswith("OutOfMemoryError")
    assert (rows[nan].error or "").startswith("NonFiniteLossError")
    assert rows[memory].attempt == rows[nan].attempt == rows[killed["trial.end"]].attempt == 0
    ended = [row["ended_by"] for row in sweep.store.read(TrialRecord, sweep.name).to_pylist()]
    assert ended.count("timeout") >= 1
    assert ended.count("died") >= 5
    check_exactly_once(sweep, server.uri)
    check_ledger(sweep)


def test_nodes_lost_and_a_server_that_is_down_for_good(
    fleet: Fleet, tiny: dict[str, Any], place: Path, server: Server
) -> None:
    """A node is lost with a worker at every stage on it, while the driver stands in the middle of a run."""
    sweep = Sweep(fleet, place, trial_of(tiny, [1e-3 * n for n in range(1, 7)]))
    driver, workers = stand_at_stages(sweep, "SIGSTOP", tracking_uri=server.uri)
    rungs = sweep.rungs()
    fleet.add_node()
    lose_node(sweep, workers)
    server.kill()
    os.kill(driver, signal.SIGCONT)
    assert sweep.end(driver) == 0
    assert "`joulemoe mirror " in sweep.log.read_text()
    assert {row.state for row in sweep.last_rows().values()} == {"COMPLETED"}
    check_ledger(sweep)
    check_rungs(rungs, sweep.rungs())
    server.start()
    done = CliRunner().invoke(app, ["mirror", str(sweep.out), "--tracking-uri", server.uri])
    assert done.exit_code == 0, done.output
    check_exactly_once(sweep, server.uri)


def test_a_worker_and_a_node_lost_where_results_are_on_an_object_store(
    fleet: Fleet, tiny: dict[str, Any], place: Path, server: Server, objects: ObjectStore
) -> None:
    """Their joules are booked there too, and count against a budget."""
    sweep = Sweep(fleet, place, trial_of(tiny, [1e-3 * n for n in range(1, 5)]))
    sweep.out = objects.uri("faults")
    died, stands, *_ = names_of(sweep)
    faults = [
        ("died", "train.step", "SIGKILL", f"{died}&.step12"),
        ("stands", "train.step", "SIGSTOP", f"{stands}&.step12"),
    ]
    driver = sweep.begin(*faults, parallel=2, tracking_uri=server.uri)
    sweep.hit("died")
    worker = sweep.hit("stands")
    fleet.add_node()
    lose_node(sweep, [worker])
    assert sweep.end(driver) == 0
    rows = sweep.store.read(TrialRecord, sweep.name).to_pylist()
    assert sum(row["ended_by"] == "died" for row in rows) >= 2
    assert None not in {row["total_energy_j"] for row in rows}
    check_exactly_once(sweep, server.uri)
    check_ledger(sweep)

    spent_j = Meter(sweep.journal.beats).read_j()
    assert spent_j is not None
    more = ("--resume", sweep.name, "--seeds", "2", "--max-joules", f"{spent_j + 1:.0f}")
    assert sweep.end(sweep.drive(str(sweep.space), *more, parallel=1, tracking_uri=server.uri)) == 0
    assert "max_joules: " in sweep.log.read_text()
    assert sum(row.seed == 1 and row.state == "COMPLETED" for row in sweep.last_rows().values()) < 4


def check_rungs(before: Rungs, after: Rungs) -> None:
    """What a scheduler knew it still knows."""
    assert before.reports
    for rung, reports in before.reports.items():
        losses = {name: report.loss for name, report in reports.items()}
        assert {name: after.reports[rung][name].loss for name in reports} == losses


def lose_node(sweep: Sweep, workers: list[int]) -> None:
    """SIGKILL to everything that runs on the oldest node: raylet, workers, and what writes their heartbeats."""
    node = sweep.fleet.oldest_node()
    raylet = node.all_processes["raylet"][0].process.pid
    everyone = [raylet, *workers, *(keeper for pid in workers for keeper in keeper_of(pid))]
    sweep.kill(*(pid for pid in everyone if process_start(pid)))
    sweep.fleet.cluster.remove_node(node, allow_graceful=False)


def test_every_end_of_a_driver(fleet: Fleet, tiny: dict[str, Any], place: Path) -> None:
    """Sessions of one sweep on a small disk: killed, interrupted, out of room, read-only, and at last done."""
    disk = small_disk(place / "disk")
    try:
        sweep = Sweep(fleet, place, trial_of(tiny, [1e-3 * n for n in range(1, 8)]))
        sweep.out = disk.folder / "out"
        end_drivers(sweep, disk)
        one_seed_more(sweep, tiny)
    finally:
        disk.close()


def end_drivers(sweep: Sweep, disk: SmallDisk | PlainFolder) -> None:
    driver, workers = stand_at_stages(sweep, "SIGKILL", scheduler="pareto-asha")
    assert sweep.end(driver) == -signal.SIGKILL
    rungs = sweep.rungs()
    assert sweep.journal.seconds() > 0  # what `--max-hours` counts
    for pid in workers:  # orphans go on, as far as they come until Ray ends them
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    for name, count in (("once", 1), ("twice", 2)):
        driver = sweep.begin((name, "train.step", "SIGSTOP", ""), parallel=1)
        sweep.hit(name)
        if name == "once":
            other = sweep.begin()
            assert sweep.end(other) == 2
            assert "expected a sweep that nobody drives" in sweep.log.read_text()
        for _ in range(count):
            os.kill(driver, signal.SIGINT)
            time.sleep(1.0)
        assert sweep.end(driver) == 130

    driver = sweep.begin(("full", "checkpoint.write", "SIGSTOP", ""), parallel=1)
    worker = sweep.hit("full")
    disk.fill(driver, worker)
    os.kill(worker, signal.SIGCONT)
    assert sweep.end(driver) == 1
    disk.empty()

    driver = sweep.begin(("locked", "train.step", "SIGSTOP", ""), parallel=1)
    worker = sweep.hit("locked")
    disk.lock()
    os.kill(worker, signal.SIGCONT)
    assert sweep.end(driver) == 1
    disk.unlock()
    assert sweep.log.read_text().count("out: expected a folder that can be written") == 2
    assert "Traceback" not in sweep.log.read_text()

    assert sweep.end(sweep.begin(parallel=2)) == 0
    assert {row.state for row in sweep.last_rows().values()} <= {"COMPLETED", "STOPPED"}
    check_exactly_once(sweep)
    check_ledger(sweep)
    check_rungs(rungs, sweep.rungs())
    before = sweep.tables()
    assert sweep.end(sweep.drive("--resume", sweep.name)) == 0
    assert sweep.tables() == before


def one_seed_more(sweep: Sweep, tiny: dict[str, Any]) -> None:
    """A finished sweep takes another seed of one of its trials, and runs nothing else."""
    old, claims = set(sweep.last_rows()), len(sweep.journal.claims())
    more = sweep.folder / "more.yaml"
    more.write_text(yaml.safe_dump({"question": "?", "trial": trial_of(tiny, [6e-3])}))
    assert sweep.end(sweep.drive(str(more), "--resume", sweep.name, "--seeds", "2")) == 0
    (new,) = set(sweep.last_rows()) - old
    assert new == names_of(sweep)[5].removesuffix("-s0") + "-s1"
    assert len(sweep.journal.claims()) == claims + 1
    check_exactly_once(sweep)
    check_ledger(sweep)
