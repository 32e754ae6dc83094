"""MLflow as a mirror: every trial once, the same twice, and never in the way."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipelines import mirrored
from pipelines.pareto import pareto_front
from pipelines.records import PowerRecord
from pipelines.tracking import Tracker, ui_command, without_password
from tests.pipelines import synthetic
from tests.pipelines.synthetic import SWEEP, trial


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty store: migrating takes seconds, copying takes none."""
    folder = tmp_path_factory.mktemp("mlflow")
    Tracker(folder).run_urls("none")
    return folder / "mlflow.db"


@pytest.fixture
def out(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with sqlite3.connect(empty_mlflow) as source, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        source.backup(copy)
        copy.execute("UPDATE experiments SET artifact_location = ?", [(tmp_path / "mlartifacts").as_uri()])
    return tmp_path


def contents(out: Path) -> dict[str, list[Any]]:
    """Everything that MLflow holds, except the sweep's own run."""
    with sqlite3.connect(out / "mlflow.db") as base:
        rows = {
            "runs": "SELECT run_uuid, name, status, start_time, end_time FROM runs",
            "metrics": "SELECT run_uuid, key, value, step, timestamp FROM metrics",
            "params": "SELECT run_uuid, key, value FROM params",
            "tags": "SELECT run_uuid, key, value FROM tags",
        }
        return {name: sorted(base.execute(query).fetchall()) for name, query in rows.items()}


def test_mirroring_twice_changes_nothing(out: Path) -> None:
    store = synthetic.write(out, synthetic.sweep((1, 2, 2)))
    assert Tracker(out).mirror(store, SWEEP) == 4
    before = contents(out)
    assert len(before["runs"]) == 4
    assert Tracker(out).mirror(store, SWEEP) == 4
    assert contents(out) == before


def test_live_then_mirrored_is_as_mirrored_alone(out: Path) -> None:
    row = trial()
    store = synthetic.write(out, [row])
    tracker = Tracker.open(out)
    tracker.start_sweep(SWEEP, "quickstart", question="Which?")
    for epoch in synthetic.epochs(row):
        tracker.log_epoch(epoch)
    tracker.log_trial(row, synthetic.epochs(row), store.path(PowerRecord, SWEEP, "t0", 0))
    assert tracker.problem is None
    before = contents(out)
    assert Tracker(out).mirror(store, SWEEP) == 1
    assert contents(out) == before
    assert len(before["runs"]) == 2


def test_epochs_that_were_missed_are_filled_in(out: Path) -> None:
    row = trial(epochs=4)
    store = synthetic.write(out, [row])
    tracker = Tracker(out)
    tracker.start_sweep(SWEEP)
    tracker.log_epoch(synthetic.epochs(row)[1])
    tracker.mirror(store, SWEEP)
    with sqlite3.connect(out / "mlflow.db") as base:
        query = "SELECT step, value FROM metrics WHERE key = 'epoch/eval_loss_nats' ORDER BY step"
        found = base.execute(query).fetchall()
    assert found == [(epoch.epoch, epoch.eval_loss_nats) for epoch in synthetic.epochs(row)]


def test_attempts_are_runs_of_their_own_and_links_take_the_last(out: Path) -> None:
    rows = [trial("t", state="FAILED", error="died", eval_loss_nats=None), trial("t", attempt=1), trial("u")]
    store = synthetic.write(out, rows)
    tracker = Tracker(out)
    tracker.mirror(store, SWEEP)
    with sqlite3.connect(out / "mlflow.db") as base:
        found = dict(base.execute("SELECT name, status FROM runs").fetchall())
    assert found == {"t": "FAILED", "t attempt 1": "FINISHED", "u": "FINISHED"}
    assert set(tracker.run_urls(SWEEP)) == {"t", "u"}
    assert tracker.compare_url(SWEEP).count("%22") == 2 * 2 + 2


def test_the_sweeps_run_holds_front_and_table(out: Path) -> None:
    store = synthetic.write(out, synthetic.sweep((1, 2, 2)))
    picture = out / "front.png"
    picture.write_bytes(b"png")
    model = out / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    front = pareto_front(store, sweep_id=SWEEP)
    for _ in range(2):
        tracker = Tracker(out)
        tracker.mirror(store, SWEEP)
        tracker.start_sweep(SWEEP)
        models = {"k1-l0-s0": str(model), "not-on-the-front": str(model)}
        tracker.finish_sweep(front, artifacts=[picture], models=models)
        assert tracker.problem is None
    with sqlite3.connect(out / "mlflow.db") as base:
        ((run_id,),) = base.execute("SELECT run_uuid FROM tags WHERE key = 'kind' AND value = 'sweep'").fetchall()
        metrics = dict(base.execute("SELECT key, value FROM metrics WHERE run_uuid = ?", [run_id]).fetchall())
        models_logged = base.execute("SELECT name FROM logged_models").fetchall()
    assert metrics["front_size"] == len(front)
    assert metrics["hypervolume"] == front.hypervolume
    assert models_logged == [("k1-l0-s0",)]
    artifacts = out / "mlartifacts" / run_id / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {"front.png", "front.json", "front_table.json"}
    table = json.loads((artifacts / "front_table.json").read_text())
    assert len(table["data"]) == len(front)


def test_a_later_report_joins_the_sweeps_run(out: Path) -> None:
    page = out / "index.html"
    page.write_text("<p>", encoding="utf-8")
    Tracker(out).attach(SWEEP, [page])  # no run yet: nothing to join
    tracker = Tracker(out)
    tracker.start_sweep(SWEEP)
    Tracker(out).attach(SWEEP, [page])
    client, _ = tracker._client()
    assert [a.path for a in client.list_artifacts(tracker._sweep_run.info.run_id)] == ["index.html"]
    assert contents(out)["runs"] != []


def test_the_power_trace_is_an_artifact(out: Path) -> None:
    store = synthetic.write(out, [trial()])
    Tracker(out).mirror(store, SWEEP)
    (path,) = (out / "mlartifacts").rglob("*.parquet")
    assert path.parent.name == "power"
    assert path.name == "t0-0.parquet"


def test_a_server_that_is_down_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = trial()
    tracker = Tracker(tmp_path, tracking_uri="http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING, "joulemoe.tracking"):
        tracker.start_sweep(SWEEP)
        for epoch in synthetic.epochs(row):
            tracker.log_epoch(epoch)
        tracker.log_trial(row)
        tracker.finish_sweep(None)
    assert tracker.problem
    assert len([r for r in caplog.records if r.name == "joulemoe.tracking"]) == 1
    store = synthetic.write(tmp_path, [row])
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        tracker.mirror(store, SWEEP)


def test_remote_results_without_a_server_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker("memory://bucket/results")
    tracker.start_sweep(SWEEP)
    assert tracker.problem
    assert "tracking URI" in tracker.problem


def test_the_environment_and_the_argument_name_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-env")
    assert Tracker(tmp_path).uri == "http://from-env"
    assert Tracker(tmp_path, tracking_uri="http://given").uri == "http://given"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracker(tmp_path).uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert ui_command(tmp_path)[-4:] == ["--host", "127.0.0.1", "--port", "5000"]


def test_links_lead_to_the_server_and_keep_its_password(tmp_path: Path) -> None:
    assert Tracker(tmp_path).server is None
    assert Tracker(tmp_path, tracking_uri="http://host:5001/mlflow/").server == "http://host:5001/mlflow"
    assert Tracker(tmp_path, tracking_uri="https://me:sec@ret@host:5001/?x=1").server == "https://host:5001"
    said = "no answer from https://me:sec@ret@host:5001/api, nor http://host/a@b"
    assert without_password(said) == "no answer from https://host:5001/api, nor http://host/a@b"


# --- what MLflow shows of a record -------------------------------------------------------------------------


def test_numbers_are_metrics_and_configuration_is_both() -> None:
    row = trial(converged_at=3, eval_perplexity=math.inf, throttled=True)
    metrics, params = mirrored.trial_metrics(row), mirrored.trial_params(row)
    assert metrics["energy_lambda"] == 0.0
    assert params["energy_lambda"] == "0.0"
    assert metrics["converged_at"] == 3.0
    assert metrics["throttled"] == 1.0
    assert "eval_perplexity" not in metrics  # MLflow's charts cannot show infinity
    assert "attempt" not in metrics
    assert mirrored.trial_params(trial(regularizer=None, top_k=None))["regularizer"] == "none"
    assert "top_k" not in mirrored.trial_params(trial(top_k=None))


def test_the_audit_of_each_layer_is_a_curve() -> None:
    last = synthetic.epochs(trial(router="energy", energy_lambda=0.6))[-1]
    metrics = mirrored.epoch_metrics(dataclasses.replace(last, layer_logit_std=[1.0, math.nan]))
    layers = {name: value for name, value in metrics.items() if "_layer_" in name}
    expected = {"effective_experts": [3.5, 2.9], "price_flip_fraction": [0.3, 0.1], "logit_std": [1.0]}
    expected |= {"price_drift": [0.06, 0.4], "lambda_undone": [0.06, 0.4]}
    names = {f"epoch/{name}_layer_{n}": value for name, row in expected.items() for n, value in enumerate(row)}
    assert layers == pytest.approx(names)
    assert metrics["epoch/eval_loss_nats"] == last.eval_loss_nats
    free = mirrored.epoch_metrics(synthetic.epochs(trial())[-1])
    assert {name for name in free if "_layer_" in name} == {f"epoch/effective_experts_layer_{n}" for n in range(2)}


def test_modelled_joules_are_tagged() -> None:
    assert mirrored.trial_tags(trial(energy_source="modelled"))["joules"] == "modelled"
    assert mirrored.trial_tags(trial())["joules"] == "measured"
    assert "joules" not in mirrored.trial_tags(trial(energy_source=None))


def test_times_come_from_the_record() -> None:
    row = trial(duration_s=30.0)
    assert mirrored.end_ms(row) - mirrored.start_ms(row) == 30_000
    naive = dataclasses.replace(row, started_at=row.started_at.replace(tzinfo=None))
    assert mirrored.start_ms(naive) == mirrored.start_ms(row)
    times = mirrored.epoch_times(row, synthetic.epochs(row))
    assert [t - mirrored.start_ms(row) for t in times] == [0, 10_000, 20_000]


def test_the_compare_link_names_every_run() -> None:
    link = mirrored.compare_link(["a", "b"], "1", "http://127.0.0.1:5000/")
    assert link == ("http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%221%22%5D")


def test_the_view_fits_an_experiments_tag() -> None:
    key, view = mirrored.chart_view("sweep/1")
    assert key == "joulemoe-sweep-1"
    assert len(view) < 5000
    assert json.loads(view)["compareRunCharts"][0]["xaxis"]["key"] == "train_energy_j"


# --- the documented recipes --------------------------------------------------------------------------------


def test_search_recipes_of_the_documentation(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block marked `search_runs` in docs/analysis.md runs and finds something."""
    document = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    blocks = [part.split("```")[0] for part in document.split("```python\n")[1:]]
    recipes = [block for block in blocks if "search_runs" in block]
    assert len(recipes) >= 3
    store = synthetic.write(out, [*synthetic.sweep((1, 2, 2)), trial("bad", state="FAILED", eval_loss_nats=None)])
    tracker = Tracker(out)
    tracker.mirror(store, SWEEP)
    tracker.start_sweep(SWEEP)
    tracker.finish_sweep(pareto_front(store, sweep_id=SWEEP))
    scope: dict[str, Any] = {"tracking_uri": tracker.uri, "sweep_id": SWEEP}
    for recipe in recipes:
        exec(compile(recipe, "docs/analysis.md", "exec"), scope)
        assert len(scope["found"]) > 0
