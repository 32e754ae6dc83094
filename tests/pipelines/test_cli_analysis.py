"""The commands that read results: what they print, and how they refuse."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from pipelines import cli_analysis, tracking
from pipelines.config import ConfigError
from pipelines.epoch_ends import front_table
from pipelines.journal import Journal
from pipelines.plan import plan_sweep
from pipelines.records import Store
from pipelines.sweep import _front_members
from tests.pipelines import synthetic
from tests.pipelines.synthetic import SWEEP, trial
from tune_spaces import Space

APP = typer.Typer()
cli_analysis.register(APP)


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(APP, list(words), catch_exceptions=False)
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    synthetic.write(tmp_path, synthetic.sweep((1, 3, 2)))
    return str(tmp_path)


def test_a_front_as_table_json_and_csv(out: str) -> None:
    assert "Pareto front: 3 of 3 configurations" in run("pareto", out)[1]
    document = json.loads(run("pareto", out, "--format", "json")[1])
    assert len(document["front"]) == 3
    rows = list(csv.DictReader(io.StringIO(run("pareto", out, "--format", "csv", "--table", "points")[1])))
    assert {row["epochs"] for row in rows} == {"1", "2"}


def test_every_context_on_demand(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [trial("a"), trial("b", energy_source="modelled")])
    shown = run("pareto", str(tmp_path), "--all")[1]
    assert shown.count("Pareto front") == 2
    assert "modelled joules" in shown
    mixed = run("pareto", str(tmp_path), "--mix")[1]
    assert "2 configurations" in mixed


def test_a_front_over_epochs_is_drawn_from_points_where_trials_are_anytime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = synthetic.write(tmp_path, synthetic.anytime((1, 3, 2)))
    shown, out = io.StringIO(), str(tmp_path)
    assert cli_analysis.conclude_sweep(Console(file=shown, width=200), out, SWEEP, None)
    assert "of 6 configurations" in shown.getvalue()
    assert "epochs" in shown.getvalue()
    document = json.loads(run("pareto", out, "--format", "json")[1])
    assert {row["epochs"] for row in document["front"]} == {1, 2}
    assert document["context"]["corpus_fingerprint"] == "corpus-a"
    ends = list(csv.DictReader(io.StringIO(run("pareto", out, "--format", "csv", "--table", "trials")[1])))
    assert {row["epochs"] for row in ends} == {"2"}
    assert "of 3 configurations" in run("pareto", out, "--x", "train_duration_s")[1]  # points have no seconds
    short = {trial for row in document["front"] if row["epochs"] == 1 for trial in row["trial_id"].split()}
    assert short
    plan = plan_sweep(Space(name="s", question="", fixed={}, domains={}, conditions={}, sweep={}), sweep_id=SWEEP)
    assert short <= _front_members(store, plan)


def test_a_sweep_ends_with_the_front_of_its_own_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dearest trial is the fastest: it is on the front of who asked for speed; `pareto` asks for loss, joules."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = [trial("cheap", tokens_per_s=10.0), trial("fast", tokens_per_s=20.0, train_energy_j=300.0)]
    synthetic.write(tmp_path, rows)
    space = Space(name="s", question="", fixed={}, domains={}, conditions={}, sweep={})
    plan = plan_sweep(space, sweep_id=SWEEP, objectives=["eval_loss_nats", "tokens_per_s:max", "train_energy_j"])
    Journal(str(tmp_path), SWEEP).put("plan.json", plan.to_document())
    shown = io.StringIO()
    assert cli_analysis.conclude_sweep(Console(file=shown, width=200), tmp_path, SWEEP, None)
    assert "Pareto front: 2 of 2 configurations" in shown.getvalue()
    assert "tokens_per_s" in shown.getvalue()
    assert _front_members(Store(tmp_path), plan) == {"cheap", "fast"}
    assert "Pareto front: 1 of 2 configurations" in run("pareto", str(tmp_path))[1]


def test_other_sweeps_draw_their_front_from_trials(out: str) -> None:
    assert front_table(Store(out), SWEEP) == "trials"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pareto", "OUT", "--x", "nope"], "axis: expected a numeric column of 'trials', got 'nope'"),
        (["pareto", "OUT", "--sweep", "nope"], f"sweep: expected one of {SWEEP}, got 'nope'"),
        (["pareto", "OUT/none"], "expected the results of a sweep, got none"),
        (["pareto", "OUT", "--table", "nope"], "table: expected one of ['points', 'trials'], got 'nope'"),
        (["compare", "OUT", "--baseline", "x", "--candidate", "router=energy"], "expected COLUMN=VALUE"),
        (["compare", "OUT", "--baseline", "top_k=9", "--candidate", "router=energy"], "selects a completed trial"),
        (["report", "OUT", "--sweep", "nope"], "sweep: expected one of"),
        (["export", "OUT/none"], "expected the results of a sweep"),
        (["mirror", "OUT/none"], "expected the results of a sweep"),
        (["ui", "OUT/none"], "expected the results of a sweep"),
        (["compact", "OUT/none"], "expected the results of a sweep"),
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(out: str, words: list[str], message: str) -> None:
    code, _, problem = run(*[word.replace("OUT", out) for word in words])
    assert code == 2
    assert message in problem
    assert len(problem.strip().splitlines()) == 1


def test_one_driver_compacts_and_concludes(out: str) -> None:
    with Journal(out, SWEEP).driving():
        code, _, problem = run("compact", out)
        with pytest.raises(ConfigError, match="expected a sweep that nobody drives"):
            cli_analysis.conclude_sweep(Console(quiet=True), out, SWEEP, None)
    assert code == 2
    assert f"expected a sweep that nobody drives, got {SWEEP}" in problem
    assert len(problem.strip().splitlines()) == 1
    assert "files into one" in run("compact", out)[1]


def test_compare_prints_its_verdict(out: str) -> None:
    code, shown, _ = run("compare", out, "--baseline", "energy_lambda=0", "--candidate", "energy_lambda>0")
    assert code == 0
    assert "no evidence" in shown
    assert "points that anytime trials" not in shown


def test_compare_says_that_it_looked_at_points(tmp_path: Path) -> None:
    synthetic.write(tmp_path, synthetic.anytime((1, 2, 2)))
    sides = ("--baseline", "energy_lambda=0", "--candidate", "energy_lambda>0")
    assert "Compared are the points that anytime trials passed through" in run("compare", str(tmp_path), *sides)[1]
    assert "points that anytime" not in run("compare", str(tmp_path), *sides, "--table", "trials")[1]


def test_export_and_schema(out: str, tmp_path: Path) -> None:
    code, shown, _ = run("export", out, "--to", str(tmp_path / "csv"))
    assert code == 0
    assert len(shown.splitlines()) == 4
    assert "## `trials`" in run("schema")[1]


@pytest.mark.slow
def test_a_sweep_concludes_with_front_report_and_links(out: str, tmp_path: Path) -> None:
    shown = io.StringIO()
    assert cli_analysis.conclude_sweep(Console(file=shown, width=120), out, SWEEP, None)
    text = shown.getvalue()
    assert "Pareto front: 3 of 3 configurations" in text
    assert f"Report: {tmp_path}/report/{SWEEP}/index.html" in text
    assert "/#/compare-runs?runs=" in text
    assert "viewStateShareKey" in text
    assert (tmp_path / "report" / SWEEP / "front.png").stat().st_size > 10_000
    assert len(list((tmp_path / "trials" / f"sweep_id={SWEEP}").iterdir())) == 1
    page = (tmp_path / "report" / SWEEP / "index.html").read_text()
    assert "http://127.0.0.1:5000/#/experiments/1/runs/" in page


def test_a_sweep_concludes_without_mlflow(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(tracking.Tracker, "_client", down)
    shown = io.StringIO()
    assert cli_analysis.conclude_sweep(Console(file=shown, width=200), out, SWEEP, None)
    assert "MLflow was left out (no server)" in shown.getvalue()
    assert "Report:" in shown.getvalue()


def test_a_sweep_without_a_front_says_so(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [trial(state="FAILED", eval_loss_nats=None)])
    assert not cli_analysis.conclude_sweep(Console(quiet=True), tmp_path, SWEEP, None)


@pytest.mark.slow
def test_ui_prints_the_links_and_serves_on_localhost(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[list[str]] = []
    monkeypatch.setattr(cli_analysis.os, "execve", lambda path, command, environment: served.append(command))
    run("mirror", out)
    code, shown, _ = run("ui", out, "--port", "5999")
    assert code == 0
    assert "http://127.0.0.1:5999/#/compare-runs?runs=" in shown
    assert served[0][-4:] == ["--host", "127.0.0.1", "--port", "5999"]
