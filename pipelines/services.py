"""What a sweep may connect to: is a Ray cluster there, does MLflow's server answer?"""

from __future__ import annotations

import importlib.metadata
import os
import socket
from urllib.parse import urlsplit

_TIMEOUT_S = 1.0
_RAY_PORT = 6379
_RAY_WORDS = {
    "auto": "the cluster that runs on this machine, where one does",
    "local": "a sweep starts its own on this machine",
}


def reachable() -> dict[str, str]:
    """Ray and MLflow, in words."""
    return {"Ray": _ray(), "MLflow": _mlflow()}


def _ray() -> str:
    version = _version("ray")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return f"{version}; a sweep starts its own on this machine (RAY_ADDRESS is not set)"
    if address in _RAY_WORDS:
        return f"{version}; RAY_ADDRESS={address}: {_RAY_WORDS[address]}"
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if parts.hostname is None:
        return f"{version}; RAY_ADDRESS={address}"
    return f"{version}; {address} {_answers(parts.hostname, parts.port or _RAY_PORT)}"


def _mlflow() -> str:
    version = _version("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"{version}; a sweep writes sqlite in its OUT (MLFLOW_TRACKING_URI is not set)"
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return f"{version}; {uri}"
    return f"{version}; {uri} {_answers(parts.hostname, parts.port or (443 if parts.scheme == 'https' else 80))}"


def _answers(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return "answers"
    except OSError as error:
        return f"does not answer ({error.strerror or error})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
