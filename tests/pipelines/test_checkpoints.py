"""Checkpoints of a trial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.checkpoints import Checkpoints
from pipelines.journal import Journal


def test_the_newest_is_loaded_where_a_process_died_before_it_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(Journal(str(tmp_path), "s"), "t")
    monkeypatch.setattr(checkpoints, "prune", lambda keep=None: None)  # died in between
    for epoch in (9, 9_999, 10_000):
        checkpoints.save(epoch, torch.nn.Linear(1, 1), {}, {})
    found = checkpoints.load(torch.device("cpu"))
    assert found is not None
    assert found.values["epoch"] == 10_000
