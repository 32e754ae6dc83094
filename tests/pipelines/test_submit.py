"""Submitting a sweep to a Ray head on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
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


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "joulemoe-test-token-0123456789abcdef0123456789"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Ray head with its dashboard on this machine, which wants a token. Only its own processes are ended:
    other Rays of this machine stay."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the job's `python` is that of the head's environment
    environment = os.environ | TOKEN | {"PATH": path}
    options = (
        f"--head --block --port=26379 --dashboard-port={PORT} --dashboard-host=127.0.0.1 --num-cpus=2 --num-gpus=0"
        f" --dashboard-agent-listen-port={PORT + 1}"  # the default is taken where another Ray runs: jobs find no agent
    )
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split(), "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("wb") as sink:
        started = subprocess.Popen(
            [*words, f"--temp-dir=/tmp/joulemoe-{os.getpid()}"],
            env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for_head(started, log)
        yield f"http://127.0.0.1:{PORT}"
    finally:
        family = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        started.terminate()  # ends its daemons too
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(timeout=60)
        for process in [started, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait(timeout=30)


def _wait_for_head(started: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/api/jobs/")
    request.add_header("Authorization", f"Bearer {TOKEN['RAY_AUTH_TOKEN']}")
    for _ in range(300):
        assert started.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2):
            return
        time.sleep(0.5)
    raise TimeoutError(log.read_text())


def submitted(space: Path, out: Path, head: str, *options: str, **token: str) -> subprocess.Popen[str]:
    """`joulemoe submit --follow`, running."""
    words = [sys.executable, "-m", "pipelines.cli", "submit", str(space), "--address", head, "--out", str(out)]
    words += ["--follow", *(f"--option={option}" for option in options)]
    # Scripts start what runs in the background with SIGINT ignored. Children inherit that, but not a handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            words, env=os.environ | TOKEN | token, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def space_of(trial: dict[str, Any], folder: Path) -> Path:
    """A space file."""
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({"question": "?", "trial": trial}))
    return path


@pytest.mark.slow
def test_a_submitted_sweep_runs_on_the_cluster(tiny: dict[str, Any], tmp_path: Path, head: str) -> None:
    out = tmp_path / "out"
    job = submitted(space_of(tiny | {"top_k": {"grid": [1, 2]}}, tmp_path), out, head)
    log, errors = job.communicate(timeout=400)
    assert job.returncode == 0, log + errors
    assert Store(out).read(TrialRecord)["state"].to_pylist() == ["COMPLETED", "COMPLETED"]
    assert "Submitted raysubmit_" in log
    assert "completed" in log  # the sweep's own lines came through


@pytest.mark.slow
def test_a_job_that_fails_returns_its_exit_code(tiny: dict[str, Any], tmp_path: Path, head: str) -> None:
    job = submitted(space_of(tiny, tmp_path), tmp_path / "out", head, "--no-such-option")
    log, errors = job.communicate(timeout=200)
    assert job.returncode == 2, log + errors
    assert "No such option" in log


@pytest.mark.slow
def test_a_wrong_token_is_refused_in_one_line(tiny: dict[str, Any], tmp_path: Path, head: str) -> None:
    job = submitted(space_of(tiny, tmp_path), tmp_path / "out", head, RAY_AUTH_TOKEN="wrong" * 10)
    log, errors = job.communicate(timeout=200)
    assert job.returncode == 2, log + errors
    assert f"address: expected a Ray head at {head}, got" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_cleanly_and_it_goes_on_later(tiny: dict[str, Any], tmp_path: Path, head: str) -> None:
    out = tmp_path / "out"
    job = submitted(space_of(tiny | {"epochs": 100_000}, tmp_path), out, head, "--sweep-id", "cut")
    assert job.stdout is not None
    for line in job.stdout:
        if "epoch 1/" in line:
            break
    job.send_signal(signal.SIGINT)
    log, errors = job.communicate(timeout=200)
    assert job.returncode not in (0, None), log + errors
    assert "the sweep ends cleanly" in log
    rows = Store(out).read(TrialRecord).to_pylist()
    assert [(row["state"], row["ended_by"]) for row in rows] == [("STOPPED", "interrupt")]
    assert list((out / "checkpoints" / "cut").rglob("state.json"))  # what `--resume cut` continues from


def test_options_of_a_sweep_travel_too() -> None:
    words = entrypoint(Path("s.yaml"), "/shared/out", {}, ["--scheduler", "pareto-asha", "--max-joules", "5e6"])
    assert words.endswith("--address auto --scheduler pareto-asha --max-joules 5e6")
