"""The reference point of a sweep's hypervolume: fixed at its first front, so that later fronts compare."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.records import Store


def stored_reference(
    store: Store, key: Mapping[str, Any], default: Sequence[float]
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The reference point for this kind of front; the first caller's default becomes it.

    Args:
        store: where the sweep's tables live; the point is kept in its folder `reference/`.
        key: what makes two fronts comparable: table, axes, context.
        default: the point to fix where none is stored.

    Returns:
        The reference point, and notes (one where it could not be stored).
    """
    text = json.dumps(key, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    sweep = key.get("sweep_id") or "all"
    path = f"{store.root}/reference/sweep_id={sweep}/{name}.json"
    try:
        with store.fs.open_input_stream(path) as source:
            return tuple(float(value) for value in json.loads(source.read())["reference"]), ()
    except (FileNotFoundError, OSError, ValueError, KeyError):
        pass
    document = json.dumps({**key, "reference": list(default)}, indent=2, default=str).encode()
    try:
        _write(store, path, document)
    except OSError as error:
        return tuple(default), (f"the hypervolume's reference point could not be stored: {error}",)
    return tuple(default), ()


def _write(store: Store, path: str, document: bytes) -> None:
    if not store.local:
        with store.fs.open_output_stream(path) as sink:
            sink.write(document)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(document)
    os.replace(temporary, path)
