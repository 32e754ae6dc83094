"""The same sweep as a job on a Ray cluster, through Ray's Jobs API."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.config import ConfigError

PACKAGES = ("pipelines", "moe", "hwcost", "tune_spaces")
# Tune saves its state at SIGINT; the default, SIGTERM and then SIGKILL after 3 s, would not let it.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
_POLL_S = 0.5
_READY_S = 60.0


def submit_sweep(
    space: Path,
    *,
    out: str,
    address: str,
    overrides: Mapping[str, Any] | None = None,
    follow: bool = False,
    options: Sequence[str] = (),
) -> int:
    """Send a space and the four packages to a cluster and start the sweep there.

    `out` is a path or URI as the cluster sees it (storage that all its nodes share); `options` are further words
    for `joulemoe sweep`. Returns the job's exit code with `follow`, else 0 once it was accepted. A head that wants
    a token gets it from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH). Ctrl-C while following
    stops the job with SIGINT, so that the sweep ends cleanly, and goes on following to its end.

    Raises:
        ConfigError: no Ray head answers at the address, or it refuses the job.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory() as folder:
        package(Path(folder), space)
        try:
            client = JobSubmissionClient(address)
            job_id = _accepted(
                client,
                entrypoint=entrypoint(space, out, overrides or {}, options),
                runtime_env={"working_dir": folder, "env_vars": {**_STOP, "PYTHONPATH": "."}},
            )
        except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"address: expected a Ray head at {address}, got {reason}") from None
    print(f"Submitted {job_id} to {address}.", flush=True)
    return _follow(client, job_id) if follow else 0


def _accepted(client: Any, **job: Any) -> str:
    """Submit; a head that has just started has no agent to take jobs for some seconds."""
    deadline_s = time.monotonic() + _READY_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)


def package(folder: Path, space: Path) -> None:
    """Copy the four packages and the space into a folder that travels to the cluster."""
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.copy(space, folder / "space.yaml")


def entrypoint(space: Path, out: str, overrides: Mapping[str, Any], options: Sequence[str] = ()) -> str:
    """The command that the cluster runs."""
    words = ["python", "-m", "pipelines.cli", "sweep", "space.yaml", "--out", out, "--address", "auto"]
    for key, value in overrides.items():
        words += ["--set", f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]
    return shlex.join([*words, *options])


def _follow(client: Any, job_id: str) -> int:
    """Stream the job's log until it ends; 0 where it succeeded, else its exit code (1 where Ray knows none)."""
    try:
        asyncio.run(_stream(client, job_id))
    except KeyboardInterrupt:
        print(f"Stopping {job_id}: the sweep ends cleanly.", flush=True)
        client.stop_job(job_id)
    while not client.get_job_status(job_id).is_terminal():
        time.sleep(_POLL_S)
    info = client.get_job_info(job_id)
    if info.status == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    print(f"Job {job_id}: {info.status}. {info.message or ''}".strip(), flush=True)
    return code if code else 1


async def _stream(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        print(lines, end="", flush=True)


__all__ = ["entrypoint", "package", "submit_sweep"]
