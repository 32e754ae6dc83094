"""What the fault tests share: a cluster of fake GPU nodes, drivers that can be killed, and what must hold after all."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from pipelines import heartbeat
from pipelines.faults import VARIABLE
from pipelines.journal import Journal
from pipelines.records import EpochRecord, PointRecord, Store, TrialRecord
from pipelines.scheduler import Rungs, rungs_of
from pipelines.tracking import ui_environment
from tests.pipelines.object_store import KEYS

HERE = Path(__file__).parent
PATIENCE_S = 480.0
_spec = importlib.util.spec_from_file_location("fake_boards", HERE / "fakes" / "pynvml.py")
assert _spec is not None
assert _spec.loader is not None
boards: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(boards)


class Fleet:
    """A Ray cluster whose nodes have fake GPUs, and the process that starts drivers on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes = folder, 0
        self.faults = folder / "faults"
        quiet = {"prestart_worker_first_driver": False}
        head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "_system_config": quiet}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._drivers = subprocess.Popen(
            [sys.executable, str(HERE / "fault_driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def add_node(self) -> Any:
        """A node with boards of its own."""
        self.nodes += 1
        return self.cluster.add_node(
            num_cpus=boards.BOARDS,
            num_gpus=boards.BOARDS,
            env_vars={"JOULEMOE_FAKE_NODE": str(self.nodes)},
            wait=False,
        )

    def oldest_node(self) -> Any:
        """The node that was added first."""
        return min(self.cluster.worker_nodes, key=lambda node: int(node._ray_params.env_vars["JOULEMOE_FAKE_NODE"]))

    def close(self) -> None:
        """End everything."""
        assert self._drivers.stdin is not None
        self._drivers.stdin.close()
        self._drivers.wait(timeout=30)
        self.cluster.shutdown()

    def ask(self, request: Mapping[str, Any]) -> Any:
        """A request to the process that starts drivers."""
        assert self._drivers.stdin is not None
        assert self._drivers.stdout is not None
        self._drivers.stdin.write(json.dumps(request) + "\n")
        self._drivers.stdin.flush()
        return json.loads(self._drivers.stdout.readline())


@contextlib.contextmanager
def fleet_in(folder: Path) -> Iterator[Fleet]:
    """A fleet with one node; its processes see the fake boards, and read their faults from a file."""
    paths = [str(HERE / "fakes"), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        VARIABLE: f"@{folder}/faults",
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AUTH_MODE": "disabled",
        "MLFLOW_DISABLE_TELEMETRY": "true",  # what forks may have no threads
        **KEYS,
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in changes.items():
            patch.setenv(key, value)
        fleet = Fleet(folder)
        try:
            fleet.add_node()
            yield fleet
        finally:
            fleet.close()


class Sweep:
    """One sweep under test: its sessions, and the markers of the faults that hit it."""

    def __init__(self, fleet: Fleet, folder: Path, trial: Mapping[str, Any], name: str = "faults") -> None:
        self.fleet, self.folder, self.name = fleet, folder, name
        self.out: Path | str = folder / "out"  # or the URI of an object store
        self.space, self.log = folder / "space.yaml", folder / "driver.log"
        self.space.write_text(yaml.safe_dump({"question": "?", "trial": dict(trial)}))
        self.died_s: dict[int, float] = {}

    @property
    def store(self) -> Store:
        """Its tables."""
        return Store(self.out)

    @property
    def journal(self) -> Journal:
        """Its journal."""
        return Journal(str(self.out), self.name)

    def marker(self, point: str) -> Path:
        """Where a process leaves the moment at which it was hit, and its id."""
        return self.folder / f"hit-{point}"

    def begin(self, *faults: tuple[str, str, str, str], **options: Any) -> int:
        """Start a session; faults are (marker, point, action, words). Returns the driver's process id."""
        self.arm(*faults)
        return self.drive(str(self.space), "--sweep-id", self.name, **options)

    def drive(self, *words: str, **options: Any) -> int:
        """Start `joulemoe sweep` with these words."""
        words += ("--out", str(self.out), "--address", self.fleet.cluster.address)
        words += tuple(w for key, value in options.items() for w in (f"--{key.replace('_', '-')}", str(value)))
        return int(self.fleet.ask({"run": ["sweep", *words], "log": str(self.log)}))

    def arm(self, *faults: tuple[str, str, str, str]) -> None:
        """Set what happens from now on to whoever passes; what was set before is forgotten."""
        lines = [f"{point}:{action}:{self.marker(name)}:{words}" for name, point, action, words in faults]
        new = self.fleet.faults.with_suffix(".new")
        new.write_text("\n".join(lines))
        new.replace(self.fleet.faults)

    def end(self, pid: int) -> int:
        """Wait for a driver; its exit code."""
        code = self.fleet.ask({"wait": pid, "timeout_s": PATIENCE_S})
        assert code is not None, "the driver did not end"
        return int(code)

    def hit(self, name: str) -> int:
        """Wait until a fault has hit; the process's id."""
        path, deadline = self.marker(name), time.monotonic() + PATIENCE_S
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline, f"nobody passed {name}"
            time.sleep(0.02)
        return int(path.read_text().split()[1])

    def kill(self, *pids: int) -> None:
        """SIGKILL, and remember when."""
        for pid in pids:
            self.died_s[pid] = time.monotonic()
            os.kill(pid, signal.SIGKILL)

    def last_rows(self) -> dict[str, TrialRecord]:
        """The last row of every trial."""
        found: dict[str, TrialRecord] = {}
        for values in sorted(self.store.read(TrialRecord, self.name).to_pylist(), key=lambda row: row["attempt"]):
            found[values["trial_id"]] = TrialRecord(**values)
        return found

    def rungs(self) -> Rungs:
        """What a scheduler would know after a restart."""
        rows = self.store.read(TrialRecord, self.name).to_pylist()
        epochs = self.store.read(EpochRecord, self.name).to_pylist()
        return rungs_of(epochs, {row["trial_id"]: row["config_json"] for row in rows})

    def tables(self) -> dict[Path, int]:
        """When each table's files were written, on a disk."""
        files = [path for kind in ("trials", "points", "epochs", "power") for path in Path(self.out, kind).rglob("*")]
        return {path: path.stat().st_mtime_ns for path in files if path.suffix == ".parquet"}


def keeper_of(pid: int) -> list[int]:
    """Heartbeat processes of an actor."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"pipelines.heartbeat" in words and str(pid).encode() in words:
                found.append(int(path.parent.name))
    return found


def check_exactly_once(sweep: Sweep, uri: str | None = None) -> None:
    """One row and one MLflow run per claimed attempt, whole histories in both, no leftovers of writes."""
    rows = sweep.store.read(TrialRecord, sweep.name).to_pylist()
    attempts = collections.Counter((row["trial_id"], row["attempt"]) for row in rows)
    assert set(attempts) == {(claim["trial_id"], claim["attempt"]) for claim in sweep.journal.claims()}
    assert set(attempts.values()) == {1}
    client, runs = runs_of(sweep, uri)
    assert collections.Counter(map(attempt_of, runs)) == attempts
    run_of = {attempt_of(run): run for run in runs}
    epochs = sweep.store.read(EpochRecord, sweep.name).to_pylist()
    whole = [row for row in rows if row["state"] == "COMPLETED"]
    assert len({row["trial_id"] for row in whole}) == len(whole)
    for row in whole:
        own = [e for e in epochs if (e["trial_id"], e["attempt"]) == (row["trial_id"], row["attempt"])]
        assert sorted(e["epoch"] for e in own) == list(range(row["epochs"] + 1))
        run = run_of[row["trial_id"], row["attempt"]]
        assert run.info.status == "FINISHED"
        mirrored = client.get_metric_history(run.info.run_id, "epoch/eval_loss_nats")
        assert sorted((m.step, m.value) for m in mirrored) == sorted((e["epoch"], e["eval_loss_nats"]) for e in own)
    _check_same_losses(epochs)
    assert sweep.store.read(PointRecord, sweep.name).num_rows == len(whole)
    if isinstance(sweep.out, Path):
        assert [path for path in sweep.out.rglob("*.tmp") if "mlartifacts" not in path.parts] == []


def _check_same_losses(epochs: Iterable[Mapping[str, Any]]) -> None:
    """Whatever attempt an epoch was trained in, it is the same epoch."""
    losses = collections.defaultdict(set)
    for row in epochs:
        losses[(row["trial_id"], row["epoch"])].add(row["eval_loss_nats"])
    assert {key: values for key, values in losses.items() if len(values) > 1} == {}


def runs_of(sweep: Sweep, uri: str | None = None) -> tuple[Any, list[Any]]:
    """MLflow's client and its runs of the sweep's attempts."""
    import mlflow

    client = mlflow.MlflowClient(uri or f"sqlite:///{sweep.out}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    where = f"tags.sweep_id = '{sweep.name}' and tags.kind = 'trial'"
    return client, list(client.search_runs(experiments, where, max_results=1000))


def attempt_of(run: Any) -> tuple[str, int]:
    """The attempt that a run mirrors."""
    return run.data.tags["trial_id"], int(run.data.tags["attempt"])


def check_ledger(sweep: Sweep) -> None:
    """The sum over all ledgers is what the boards drew during the attempts, within 0.1 %.

    One heartbeat more is allowed only where the process that writes them was killed too (two, 1 s in all, where it had
    to put them on an object store).
    """
    unseen_s = heartbeat.PERIOD_S * (1 if sweep.journal.local else 2)
    drawn, slack = 0.0, 0.0
    rows = {(r["trial_id"], r["attempt"]): r for r in sweep.store.read(TrialRecord, sweep.name).to_pylist()}
    for claim in sweep.journal.claims():
        lines = sweep.journal.beats.lines(claim["beats"])
        uuid = claim["device_columns"]["gpu_uuid"]
        edges = [line for line in lines if line.get("attempt") == f"{claim['trial_id']}-{claim['attempt']}"]
        ends = [line["t"] for line in edges if line["edge"] == "end"] or [e["t"] for e in lines if e.get("last")]
        if rows[claim["trial_id"], claim["attempt"]]["ended_by"] == "scheduler":
            ends = [edges[0]["t"] + rows[claim["trial_id"], claim["attempt"]]["duration_s"]]
        slack += 0.0 if ends else boards.MOST_W * unseen_s
        end_s = ends[0] if ends else sweep.died_s[claim["pid"]]
        drawn += boards.joules(uuid, end_s) - boards.joules(uuid, edges[0]["t"])
    last = sweep.last_rows().values()
    assert sum(row.total_energy_j or 0.0 for row in last) == pytest.approx(drawn, abs=1e-3 * drawn + slack)
    for row in last:
        parts = (row.setup_energy_j, row.train_energy_j, row.eval_energy_j, row.idle_energy_j, row.lost_energy_j)
        assert sum(part or 0.0 for part in parts) == pytest.approx(row.total_energy_j)


class Server:
    """A real MLflow server on loopback, which can be killed and started again on the same store."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        words += ["--artifacts-destination", f"{self.folder}/artifacts"]
        with open(self.folder / "server.log", "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                words, env=ui_environment(), stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class SmallDisk:
    """A file system of a few megabytes; it can be full, and it can be read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount("-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder))

    def fill(self, *pids: int) -> None:
        """Write until there is no room."""
        with contextlib.suppress(OSError), open(self.folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))

    def empty(self) -> None:
        """Take the filler away."""
        (self.folder / "filler").unlink()

    def lock(self) -> None:
        """Lay a read-only mount of it over it: files that are open stay open."""
        for attempt in range(20):
            mount("--bind", str(self.folder), str(self.folder))
            try:
                mount("-o", "remount,bind,ro", str(self.folder))
            except subprocess.CalledProcessError:  # busy: a file was opened for writing through it in between
                self.unlock()
                if attempt == 19:
                    raise
            else:
                break

    def unlock(self) -> None:
        """Take that mount away."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def close(self) -> None:
        """Unmount it, and what a test that failed left over it: pytest cannot clear a folder that is mounted."""
        while os.path.ismount(self.folder):
            self.unlock()


class PlainFolder:
    """The same for a user who may not mount: limits of processes, and rights of folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def fill(self, *pids: int) -> None:
        """No file of these processes may grow."""
        for pid in (*pids, *(keeper for worker in pids for keeper in keeper_of(worker))):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def empty(self) -> None:
        """These processes are gone."""

    def lock(self) -> None:
        """Nobody may create files."""
        for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            folder.chmod(0o555)

    def unlock(self) -> None:
        """They may again."""
        for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            folder.chmod(0o755)

    def close(self) -> None:
        """Nothing to undo."""


def small_disk(folder: Path) -> SmallDisk | PlainFolder:
    """A folder for results whose disk can fail."""
    try:
        return SmallDisk(folder)
    except subprocess.CalledProcessError:
        folder.rmdir()
        return PlainFolder(folder)


def mount(*words: str) -> None:
    """Mount something."""
    subprocess.run(["mount", *words], check=True, capture_output=True)
