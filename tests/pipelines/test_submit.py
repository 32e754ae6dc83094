"""Submitting a sweep to a Ray head on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import ConfigError
from pipelines.records import Store, TrialRecord
from pipelines.submit import PACKAGES, entrypoint, package, submit_sweep

PORT = 28265  # beyond 10002 to 19999, which Ray gives to its workers


def test_the_four_packages_and_the_space_travel(tmp_path: Path) -> None:
    space = tmp_path / "s.yaml"
    space.write_text("trial: {top_k: 1}")
    (tmp_path / "sent").mkdir()
    package(tmp_path / "sent", space)
    assert {p.name for p in (tmp_path / "sent").iterdir()} == {*PACKAGES, "space.yaml"}
    assert (tmp_path / "sent" / "tune_spaces" / "quickstart.yaml").exists()


def test_the_entrypoint_quotes_overrides() -> None:
    words = entrypoint(Path("s.yaml"), "/shared/my results", {"data": "/a b.txt", "decode_batches": [1, 2]})
    assert "--out '/shared/my results'" in words
    assert "'data=/a b.txt'" in words
    assert "'decode_batches=[1, 2]'" in words


def test_no_head_is_named_in_one_line(tmp_path: Path) -> None:
    space = tmp_path / "s.yaml"
    space.write_text("trial: {top_k: 1}")
    with pytest.raises(ConfigError) as caught:
        submit_sweep(space, out="/x", address="http://127.0.0.1:1")
    assert "address: expected a Ray head at http://127.0.0.1:1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A real Ray head with its dashboard on this machine."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the job's `python` is that of the head's environment
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": path}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    options = f"--head --port=26379 --dashboard-port={PORT} --dashboard-host=127.0.0.1 --num-cpus=2 --num-gpus=0"
    start = [*ray, "start", *options.split(), "--disable-usage-stats", f"--temp-dir=/tmp/joulemoe-{os.getpid()}"]
    started = subprocess.run(start, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stderr
    try:
        yield f"http://127.0.0.1:{PORT}"
    finally:
        subprocess.run([*ray, "stop", "--force"], env=environment, check=False, capture_output=True, timeout=120)


@pytest.mark.slow
def test_a_submitted_sweep_runs_on_the_cluster(
    tiny: dict[str, Any], tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    space = tmp_path / "s.yaml"
    space.write_text(yaml.safe_dump({"question": "?", "trial": tiny | {"top_k": {"grid": [1, 2]}}}))
    out = tmp_path / "out"
    code = submit_sweep(space, out=str(out), address=head, follow=True)
    assert code == 0, capfd.readouterr().out
    states = Store(out).read(TrialRecord)["state"].to_pylist()
    assert states == ["COMPLETED", "COMPLETED"]
    assert "Submitted raysubmit_" in capfd.readouterr().out


@pytest.mark.slow
def test_a_job_that_fails_returns_its_exit_code(
    tiny: dict[str, Any], tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    space = tmp_path / "s.yaml"
    space.write_text(yaml.safe_dump({"question": "?", "trial": tiny | {"top_k": 99}}))
    assert submit_sweep(space, out=str(tmp_path / "out"), address=head, follow=True) == 2


def test_options_of_a_sweep_travel_too() -> None:
    words = entrypoint(Path("s.yaml"), "/shared/out", {}, ["--scheduler", "pareto-asha", "--max-joules", "5e6"])
    assert words.endswith("--address auto --scheduler pareto-asha --max-joules 5e6")
