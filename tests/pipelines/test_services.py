"""Reachability in words: set, not set, and nobody there."""

from __future__ import annotations

import json
import socket

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.services import reachable


def test_nothing_set_says_what_a_sweep_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = reachable()
    assert "a sweep starts its own" in found["Ray"]
    assert "sqlite in its OUT" in found["MLflow"]


def test_a_server_that_answers_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert reachable()["MLflow"].endswith("answers")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert "does not answer" in reachable()["Ray"]


@pytest.mark.parametrize(
    ("word", "said"), [("auto", "the cluster that runs on this machine"), ("local", "a sweep starts its own")]
)
def test_rays_words_are_no_hosts(monkeypatch: pytest.MonkeyPatch, word: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", word)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("looked for a host of that name"))
    assert f"RAY_ADDRESS={word}: {said}" in reachable()["Ray"]


def test_doctor_tells_people_and_programs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    found = json.loads(done.output)
    assert {"source", "reason", "gpus", "rapl", "watts_per_core", "driver_version", "versions"} <= set(found)
    assert set(found["services"]) == {"Ray", "MLflow"}
    text = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).output
    for words in (f"Energy source here: {found['source']}", found["reason"], found["services"]["Ray"]):
        assert words in text
