"""What a process keeps between trials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pipelines import warm
from pipelines.config import TrialConfig
from pipelines.model import Hardware, build_model
from pipelines.trial import run_trial

TINY = {
    "base": "random", "data": "embedded", "n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 32, "batch_size": 2,
    "max_train_tokens": 256, "max_eval_tokens": 128, "router": "energy", "expert_width_factors": [1.0, 0.5, 0.0],
    "top_k": 1, "decode_batches": [], "prefill": False, "checkpoint": False, "compile": True, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No compiled code before and after; traced alone, since generating code takes a minute here."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager", **options))
    warm.forget()
    counters.clear()
    yield
    warm.forget()


def loss(out: Path, **changes: Any) -> float:
    record = run_trial(TrialConfig.parse(TINY | changes), out=out)
    assert record.state == "COMPLETED", record.error
    assert record.eval_loss_nats is not None
    return record.eval_loss_nats


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_trials_of_a_shape_compile_once_and_end_as_if_alone(tmp_path: Path) -> None:
    trials = [
        {"energy_lambda": 0.0, "seed": 0},
        {"energy_lambda": 2.0, "seed": 1, "learning_rate": 0.01},
        {"energy_lambda": 0.0, "seed": 0, "epochs": 2},
    ]
    together = [loss(tmp_path, **trial) for trial in trials]
    assert counters["stats"]["unique_graphs"] == 1
    loss(tmp_path, top_k=2)
    assert counters["stats"]["unique_graphs"] == 2
    alone = []
    for trial in trials:
        warm.forget()
        alone.append(loss(tmp_path, **trial))
    assert together == alone


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_more_shapes_than_the_compiler_holds_by_itself(tmp_path: Path) -> None:
    names = ("none", "load_balance", "cv2")
    shapes = [{"top_k": k, "regularizer": name, "regularizer_weight": 0.1} for k in (1, 2, 3) for name in names]
    for shape in (*shapes, shapes[0]):  # by itself it refuses the ninth version of a function where a graph is whole
        loss(tmp_path, **shape, max_train_tokens=128)
    assert counters["stats"]["unique_graphs"] == len(warm._shapes) == len(shapes)


def test_what_stays_out_of_the_shape_and_what_does_not() -> None:
    def shape(**changes: Any) -> str:
        config = TrialConfig.parse(TINY | changes)
        hardware = Hardware.of(config)
        model, _ = build_model(config, warm.corpus_of(config), hardware)
        return warm.shape_of(model, config, hardware)

    same = shape()
    assert shape(energy_lambda=1.0, temperature=2.0, seed=3, learning_rate=0.1) == same
    others = [shape(top_k=2), shape(batch_size=4), shape(regularizer="load_balance", regularizer_weight=0.1)]
    assert len({same, *others}) == 4
    assert shape(router="hash", seed=1) != shape(router="hash", seed=2)  # its seed is part of the code


def test_a_failed_trial_takes_its_compiled_code_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    warm.forget()
    record = run_trial(TrialConfig.parse(TINY | {"learning_rate": 1e30, "epochs": 3, "grad_clip": 1e30}), out=tmp_path)
    assert record.state == "FAILED"
    assert not warm._shapes
    loss(tmp_path)
    (kept,) = warm._shapes.values()
    assert not kept.busy
    assert sum(p.numel() for p in kept.module.parameters()) == 0  # empty between trials
    warm.forget()


def test_a_wait_for_another_process_is_not_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    @contextlib.contextmanager
    def busy(shape: str) -> Iterator[None]:
        nonlocal now_s
        now_s += 60.0
        yield

    monkeypatch.setattr(warm, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(warm, "_one_at_a_time", busy)
    code = warm.Compiled(module=None, forward=None, shape="a")
    with warm.compiling(code):
        now_s += 4.0
    assert (code.waited_s, code.seconds, code.ready) == (60.0, 4.0, True)


def test_a_corpus_is_read_once_and_again_when_its_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two three four five six seven eight nine ten\n" * 400)
    config = TrialConfig.parse(TINY | {"data": str(file), "tokenizer": "embedded"})
    first = warm.corpus_of(config)
    assert warm.corpus_of(config) is first
    file.write_text("ten nine eight seven six five four three two one\n" * 500)
    assert warm.corpus_of(config).fingerprint != first.fingerprint
