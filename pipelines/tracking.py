"""MLflow as a mirror of the Parquet tables: the only file that imports mlflow.

One flat run per attempt of a trial (no parent tag: the UI folds children away and shows no charts) and one run
for the sweep. Every run is found by its tags before it is created, and what it already holds is not written
again, so mirroring the same rows twice changes nothing. A tracker is used by one process, the sweep's driver; it
never stops a sweep: after an error it pauses, tries again, and `mirror` repairs what is missing later.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol

import pyarrow.parquet as pq

from pipelines.faults import passing
from pipelines.mirrored import (
    chart_view,
    compare_link,
    end_ms,
    epoch_metrics,
    epoch_times,
    start_ms,
    trial_metrics,
    trial_params,
    trial_tags,
)
from pipelines.records import EpochRecord, PowerRecord, Record, Store, TrialRecord, to_table

log = logging.getLogger("joulemoe.tracking")
EXPERIMENT = "joulemoe"
DEFAULT_UI = "http://127.0.0.1:5000"
_STATUS = {"COMPLETED": "FINISHED", "STOPPED": "FINISHED", "FAILED": "FAILED"}
#: Tag of a run that holds all of its trial's row and so many epochs.
_WHOLE = "mirrored"
#: A metric that every epoch has: its history tells which epochs a run already holds.
_EVERY_EPOCH = "epoch/tokens_trained"
#: Seconds without MLflow after an error; doubled by each further one, up to the longest.
_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0
_MIRROR_AGAIN_S = 2.0
_NO_STORE = "the results are not in a local folder: name a tracking URI or set MLFLOW_TRACKING_URI"
_P = ParamSpec("_P")


class FrontLike(Protocol):
    """What the sweep's run needs to know of a front."""

    def rows(self) -> list[dict[str, Any]]:
        """One plain row per front member."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers that describe the front as a whole."""
        ...

    def to_json(self) -> str:
        """The whole front."""
        ...


def _harmless(
    method: Callable[Concatenate[Tracker, _P], None],
) -> Callable[Concatenate[Tracker, _P], None]:
    """Run a method unless MLflow did not answer a moment ago; the first error of an outage is logged."""

    @functools.wraps(method)
    def guarded(self: Tracker, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if time.monotonic() < self._again_s:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._failed(error)
        else:
            self.problem, self._pause_s = None, _PAUSE_S

    return guarded  # type: ignore[return-value]  # mypy loses the first argument's name


class Tracker:
    """Writes one sweep at a time to MLflow.

    Args:
        out: folder of the results. Without another address MLflow lives in `OUT/mlflow.db`, its artifacts in
            `OUT/mlartifacts`.
        tracking_uri: address of a tracking server or store; else the environment's `MLFLOW_TRACKING_URI`.

    Attributes:
        uri: address in use.
        problem: why nothing is written for now; None while MLflow answers.
    """

    def __init__(self, out: str | os.PathLike[str], *, tracking_uri: str | None = None) -> None:
        self.out = os.fspath(out)
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _default_uri(self.out) or ""
        self.problem: str | None = None if self.uri else _NO_STORE
        self._again_s, self._pause_s = -math.inf, _PAUSE_S
        if self.problem:
            self._again_s = math.inf
            log.warning("MLflow is left out: %s", self.problem)
        self.sweep_id: str | None = None
        self._opened: tuple[Any, str] | None = None
        self._runs: dict[tuple[str, int], Any] = {}
        self._new: dict[str, set[int]] = {}  # epochs that a run of this session holds, until its trial ended
        self._stale = False
        self._sweep_run: Any = None

    @classmethod
    def open(cls, out: str | os.PathLike[str], tracking_uri: str | None = None) -> Tracker:
        """A tracker for a folder of results; MLflow itself is reached by the first call."""
        return cls(out, tracking_uri=tracking_uri)

    # --- a sweep, live ---------------------------------------------------------------------------------

    @_harmless
    def start_sweep(
        self, sweep_id: str, space: str = "", *, question: str = "", params: Mapping[str, Any] | None = None
    ) -> None:
        """Find or create the sweep's run; from here on trials and epochs may be logged.

        Args:
            sweep_id: the sweep.
            space: name of its search space.
            question: what it asks; the run's description.
            params: what else the sweep was asked for (search, scheduler, ...).
        """
        self._select(sweep_id)
        client, experiment = self._client()
        if self._sweep_run is None:
            tags = {"sweep_id": sweep_id, "kind": "sweep", "space": space, "mlflow.note.content": question}
            self._sweep_run = client.create_run(experiment, tags=tags, run_name=f"sweep {sweep_id}")
        self._log_params(self._sweep_run, _strings({"space": space, **(params or {})}))

    @_harmless
    def log_epoch(self, record: EpochRecord) -> None:
        """One epoch's metrics, step = epoch, on the run of its trial (created by the first)."""
        self._select(record.sweep_id)
        run = self._trial_run(record.trial_id, record.attempt, start=None)
        self._log_epochs(run, [(record, int(time.time() * 1000))])

    @_harmless
    def log_trial(
        self, record: TrialRecord, epochs: Sequence[EpochRecord] = (), power: Sequence[PowerRecord] | str = ()
    ) -> None:
        """The outcome of an attempt: parameters, final metrics, tags, curves and the power trace.

        Args:
            record: the attempt's row.
            epochs: its curves; epochs that the run already holds are not written again.
            power: its power trace, or the path of its Parquet file (left to `mirror` where it is not here).
        """
        self._write_trial(record, epochs, power)

    def finish_sweep(
        self,
        front: FrontLike | None,
        *,
        artifacts: Sequence[str | os.PathLike[str]] = (),
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Close the sweep's run: the front as table, figures and metrics; models of front members.

        Args:
            front: the front; None where there is none.
            artifacts: files for the sweep's run (figures, the report).
            models: checkpoint folder by trial id; only those of front members are logged.
        """
        self._finish(front, [Path(path) for path in artifacts], models or {})

    @_harmless
    def attach(self, sweep_id: str, artifacts: Sequence[str | os.PathLike[str]]) -> None:
        """More files for the sweep's run, where it has one."""
        self._select(sweep_id)
        client, _ = self._client()
        for path in artifacts if self._sweep_run is not None else ():
            client.log_artifact(self._sweep_run.info.run_id, str(path))

    # --- from Parquet ----------------------------------------------------------------------------------

    def mirror(self, store: Store, sweep_id: str) -> int:
        """Bring every attempt of a sweep into MLflow once more; what is already there stays as it is.

        Returns:
            Attempts mirrored.

        Raises:
            Exception: MLflow's own error where it does not answer (a mirror is asked for, not incidental).
        """
        self.problem, self._again_s = None, -math.inf
        with contextlib.suppress(Exception):
            return self._mirror(store, sweep_id)
        self.sweep_id = None
        time.sleep(_MIRROR_AGAIN_S if self.uri else 0)
        return self._mirror(store, sweep_id)

    def _mirror(self, store: Store, sweep_id: str) -> int:
        curves = _by_attempt(store, EpochRecord, sweep_id)
        traces = _by_attempt(store, PowerRecord, sweep_id)
        rows = [TrialRecord(**row) for row in store.read(TrialRecord, sweep_id).to_pylist()]
        self._select(sweep_id, fresh=True)
        for row in sorted(rows, key=lambda row: (row.started_at, row.trial_id, row.attempt)):
            key = (row.trial_id, row.attempt)
            self._write_trial(row, curves.get(key, []), traces.get(key, []))
        return len(rows)

    # --- links -----------------------------------------------------------------------------------------

    @property
    def server(self) -> str | None:
        """Address at which a browser finds the tracking server, without a user's name and password; None where the
        store is a database, whose UI `joulemoe ui` serves.
        """
        parts = urllib.parse.urlsplit(self.uri)
        if parts.scheme not in ("http", "https"):
            return None
        return without_password(parts._replace(query="", fragment="").geturl().rstrip("/"))

    @property
    def ui(self) -> str:
        """Address of MLflow's UI: the server's own, or the one that `joulemoe ui` takes."""
        return self.server or DEFAULT_UI

    def run_urls(self, sweep_id: str, base: str | None = None) -> dict[str, str]:
        """Address of each trial's run in the MLflow UI, by trial id (its last attempt).

        `base`: another address of the UI than `ui`.
        """
        self._select(sweep_id, fresh=True)
        _, experiment = self._client()
        ordered = sorted(self._runs.items(), key=lambda item: item[0][1])
        runs = f"{base or self.ui}/#/experiments/{experiment}/runs"
        return {trial: f"{runs}/{run.info.run_id}" for (trial, _), run in ordered}

    def compare_url(self, sweep_id: str, base: str | None = None) -> str:
        """The MLflow UI's page that compares the last attempts of a sweep's trials that have a loss."""
        self._select(sweep_id, fresh=True)
        _, experiment = self._client()
        last = {trial: run for (trial, _), run in sorted(self._runs.items(), key=lambda item: item[0][1])}
        order = sorted(last.values(), key=lambda run: (run.info.start_time, run.info.run_id))
        ids = [run.info.run_id for run in order if "eval_loss_nats" in run.data.metrics]
        return compare_link(ids, experiment, base or self.ui)

    def charts_url(self, sweep_id: str, base: str | None = None) -> str:
        """The MLflow UI's chart page of the sweep's trials: loss against joules, parallel coordinates, curves."""
        client, experiment = self._client()
        key, view = chart_view(sweep_id)
        tag = f"mlflow.sharedViewState.{key}"
        if client.get_experiment(experiment).tags.get(tag) != view:
            client.set_experiment_tag(experiment, tag, view)
        page = f"{base or self.ui}/#/experiments/{experiment}/runs"
        return f"{page}?viewStateShareKey={key}&compareRunsMode=CHART"

    # --- inside ----------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        """Pause. Whether the call that failed was carried out is not known: the runs are asked for anew."""
        if self.problem is None:
            self.problem = without_password(" ".join(str(error).split()))[:300] or type(error).__name__
            log.warning("MLflow does not answer (%s): the sweep goes on; `mirror` repairs it later", self.problem)
        self._again_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self.sweep_id = None

    def _client(self) -> tuple[Any, str]:
        """The client and the experiment's id; the store is migrated once, by one process, first."""
        if not self.uri:
            raise ValueError(_NO_STORE)
        if self._opened is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # A request that is sent twice may create two runs: this class asks what is there, then tries again.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            import mlflow

            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # `_failed` says it in a line
            with _one_process_at_a_time(self.uri):
                client = mlflow.MlflowClient(tracking_uri=self.uri)
                self._opened = client, _experiment(client, self.uri, self.out)
        return self._opened

    def _select(self, sweep_id: str, *, fresh: bool = False) -> None:
        """Load the runs of a sweep; afterwards they are known without asking. `fresh`: with what was just logged."""
        if self.sweep_id == sweep_id and not (fresh and self._stale):
            return
        client, experiment = self._client()
        self._runs, self._sweep_run = {}, None
        quoted = sweep_id.replace("'", "\\'")
        token = None
        while True:
            page = client.search_runs([experiment], f"tags.sweep_id = '{quoted}'", max_results=1000, page_token=token)
            for run in page:
                self._remember(run)
            token = page.token
            if not token:
                break
        self.sweep_id, self._stale = sweep_id, False

    def _remember(self, run: Any) -> Any:
        tags = run.data.tags
        if tags.get("kind") == "sweep":
            self._sweep_run = run
        else:
            self._runs[(tags["trial_id"], int(tags["attempt"]))] = run
        return run

    def _trial_run(self, trial_id: str, attempt: int, start: int | None) -> Any:
        key = (trial_id, attempt)
        if key not in self._runs:
            client, experiment = self._client()
            tags = {"sweep_id": self.sweep_id, "trial_id": trial_id, "attempt": attempt, "kind": "trial"}
            name = trial_id if attempt == 0 else f"{trial_id} attempt {attempt}"
            run = self._remember(client.create_run(experiment, start_time=start, tags=_strings(tags), run_name=name))
            self._new[run.info.run_id] = set()
        return self._runs[key]

    def _write_trial(
        self, record: TrialRecord, epochs: Sequence[EpochRecord], power: Sequence[PowerRecord] | str
    ) -> None:
        self._select(record.sweep_id)
        client, _ = self._client()
        run = self._trial_run(record.trial_id, record.attempt, start=start_ms(record))
        whole = f"{record.state} {len(epochs)}"
        if run.data.tags.get(_WHOLE) == whole and run.info.status == _STATUS[record.state]:
            return
        self._log_epochs(run, list(zip(epochs, epoch_times(record, epochs), strict=True)))
        if run.info.run_id not in self._new:  # what a new run holds is known without asking
            run = self._remember(client.get_run(run.info.run_id))
        self._log_params(run, trial_params(record))
        passing("mlflow.write", f"{record.trial_id}-{record.attempt}")
        self._log_metrics(run, trial_metrics(record), end_ms(record), step=record.epochs)
        self._log_power(run, record, power)
        self._log_tags(run, trial_tags(record) | {_WHOLE: whole})  # last: it says that the rest is there
        if run.info.status != _STATUS[record.state]:
            client.set_terminated(run.info.run_id, _STATUS[record.state], end_ms(record))
        self._new.pop(run.info.run_id, None)
        self._stale = True

    def _log_epochs(self, run: Any, rows: Sequence[tuple[EpochRecord, int]]) -> None:
        if not rows:
            return
        client, _ = self._client()
        from mlflow.entities import Metric

        have = self._new.get(run.info.run_id)
        if have is None:
            have = {metric.step for metric in client.get_metric_history(run.info.run_id, _EVERY_EPOCH)}
        batch = [
            Metric(name, value, stamp, row.epoch)
            for row, stamp in rows
            if row.epoch not in have
            for name, value in epoch_metrics(row).items()
        ]
        for part in _parts(batch):
            client.log_batch(run.info.run_id, metrics=part)
        have |= {row.epoch for row, _ in rows}

    def _log_metrics(self, run: Any, values: Mapping[str, float], stamp: int, *, step: int) -> None:
        from mlflow.entities import Metric

        new = [Metric(k, v, stamp, step) for k, v in values.items() if run.data.metrics.get(k) != v]
        for part in _parts(new):
            self._client()[0].log_batch(run.info.run_id, metrics=part)

    def _log_params(self, run: Any, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in values.items() if key not in run.data.params]
        if new:
            self._client()[0].log_batch(run.info.run_id, params=new[:100])

    def _log_tags(self, run: Any, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        new = [RunTag(key, value) for key, value in values.items() if run.data.tags.get(key) != value]
        if new:
            self._client()[0].log_batch(run.info.run_id, tags=new)

    def _log_power(self, run: Any, record: TrialRecord, power: Sequence[PowerRecord] | str) -> None:
        client, _ = self._client()
        if isinstance(power, str):
            if os.path.exists(power):
                client.log_artifact(run.info.run_id, power, "power")
        elif power:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{record.trial_id}-{record.attempt}.parquet"
                pq.write_table(to_table(PowerRecord, power), path)
                client.log_artifact(run.info.run_id, str(path), "power")

    @_harmless
    def _finish(self, front: FrontLike | None, artifacts: Sequence[Path], models: Mapping[str, str]) -> None:
        if self._sweep_run is None:
            raise RuntimeError("finish_sweep before start_sweep")
        client, _ = self._client()
        run = client.get_run(self._sweep_run.info.run_id)
        run_id = run.info.run_id
        for path in artifacts:
            client.log_artifact(run_id, str(path))
        if front is not None:
            self._log_metrics(run, front.metrics(), int(time.time() * 1000), step=0)
            client.log_text(run_id, front.to_json(), "front.json")
            client.log_dict(run_id, _split_table(front.rows()), "front_table.json")
            client.set_tag(run_id, "mlflow.loggedArtifacts", '[{"path": "front_table.json", "type": "table"}]')
            members = {trial for row in front.rows() for trial in str(row["trial_id"]).split()}
            for trial_id in sorted(members & set(models)):
                self._log_model(trial_id, models[trial_id])
        if run.info.status != "FINISHED":
            client.set_terminated(run_id, "FINISHED")

    def _log_model(self, trial_id: str, folder: str) -> None:
        """A front member's checkpoint as a logged model of its run."""
        client, experiment = self._client()
        runs = {attempt: run for (trial, attempt), run in self._runs.items() if trial == trial_id}
        if not runs:
            return
        run = client.get_run(runs[max(runs)].info.run_id)
        if run.outputs is not None and run.outputs.model_outputs:
            return
        from mlflow.entities import LoggedModelOutput

        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in trial_id)
        model = client.create_logged_model(experiment, name=name, source_run_id=run.info.run_id)
        client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run.info.run_id, models=[LoggedModelOutput(model_id=model.model_id, step=0)])


def ui_command(out: str | os.PathLike[str], *, port: int = 5000, tracking_uri: str | None = None) -> list[str]:
    """The command that serves the MLflow UI of a folder of results on 127.0.0.1."""
    uri = Tracker(out, tracking_uri=tracking_uri).uri
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def ui_environment() -> dict[str, str]:
    """The environment for `ui_command`: no usage reports, and no job workers, which this UI does not need."""
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return {**quiet, **os.environ}


def without_password(text: str) -> str:
    """Addresses in a text without a user's name and password."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _default_uri(out: str) -> str | None:
    """The store beside local results; there is none beside remote ones."""
    if "://" in out and not out.startswith("file://"):
        return None
    return f"sqlite:///{os.path.abspath(urllib.parse.urlparse(out).path if '://' in out else out)}/mlflow.db"


def _experiment(client: Any, uri: str, out: str) -> str:
    """The experiment's id; a local store keeps its artifacts beside the database."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri == _default_uri(out):
        location = Path(uri.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=location))


@contextlib.contextmanager
def _one_process_at_a_time(uri: str) -> Iterator[None]:
    """First connections of several processes to an empty sqlite store fail: let them come one by one."""
    if not uri.startswith("sqlite:///") or os.name == "nt":
        yield
        return
    import fcntl

    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _by_attempt(store: Store, record: type[Record], sweep_id: str) -> dict[tuple[str, int], list[Any]]:
    found: dict[tuple[str, int], list[Any]] = {}
    for row in store.read(record, sweep_id).to_pylist():
        found.setdefault((row["trial_id"], row["attempt"]), []).append(record(**row))
    return found


def _split_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in values.items()}


def _parts(batch: Sequence[Any], size: int = 1000) -> Iterator[Sequence[Any]]:
    """MLflow takes a thousand metrics at once."""
    for start in range(0, len(batch), size):
        yield batch[start : start + size]
