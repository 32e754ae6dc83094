"""The command line: bad input ends in one line and exit code 2, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.cli import main
from pipelines.hub import prepare_hub


def joulemoe(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["joulemoe", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def space_file(tmp_path: Path, trial: dict[str, Any]) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({"question": "q", "trial": trial}))
    return str(path)


SEARCHED: dict[str, Any] = {"top_k": {"choice": [1, 2]}}
BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({"lambda": 0.1}, [], "lambda: unknown key; expected one of"),
    ({"energy_lambda": -1}, [], "energy_lambda: expected greater than or equal to 0, got -1"),
    ({"energy_lambda": {"grid": [0.1, -1]}}, [], "energy_lambda: expected greater than or equal to 0, got -1"),
    ({"top_k": 5}, [], "top_k: expected at most 4, the number of experts, got 5"),
    ({"router": "magic"}, [], "router: expected one of"),
    ({"regularizer": "magic"}, [], "regularizer: expected one of"),
    ({"data": "./nowhere.txt", "tokenizer": "embedded"}, [], "data: expected a text file, a glob"),
    ({}, ["--data", "EMPTY", "--tokenizer", "embedded"], "data: expected text, got an empty file"),
    ({}, ["--data", "SHORT", "--tokenizer", "embedded"], "data: expected at least one block of 64 tokens"),
    ({}, ["--set", "epochs"], "--set: expected KEY=VALUE, got 'epochs'"),
    ({}, ["--set", "top_k={grid: [1], grid: [2]}"], "--set top_k: grid: expected a key once in a mapping"),
    ({}, ["--search", "magic"], "search: expected one of grid"),
    (SEARCHED | {"seed": {"grid": [0, 1]}}, ["--search", "tpe"], "seed: expected one value with search tpe"),
    ({}, ["--search", "tpe"], "search: expected a space with domains for tpe, got fixed values only"),
    ({}, ["--objective", "router", "--objective", "eval_loss_nats"], "objectives: expected a column of numbers"),
    ({"top_k": {"choice": [1, 1, 1, 99]}}, ["--search", "tpe"], "top_k: expected at most 4"),
    (
        {"top_k": {"grid": [1], "when": {"router": "nosuch"}}},
        [],
        "top_k.when.router: expected a value that router takes",
    ),
    ({"top_k": {"grid": [1], "when": {"top_k": 1}}}, [], "top_k.when: expected keys that do not depend on 'top_k'"),
    ({"epochs": "anytime", "schedule": "cosine"}, [], "schedule: expected wsd (or none) with epochs: anytime"),
]


@pytest.mark.parametrize(("change", "options", "said"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input_ends_in_one_line_and_writes_nothing(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    options: list[str],
    said: str,
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("hello")
    files = {"EMPTY": str(tmp_path / "empty.txt"), "SHORT": str(tmp_path / "short.txt")}
    out = tmp_path / "out"
    words = [files.get(option, option) for option in options]
    code = joulemoe(monkeypatch, "sweep", space_file(tmp_path, tiny | change), "--out", str(out), *words)
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_missing_space_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joulemoe(monkeypatch, "sweep", str(tmp_path / "none.yaml")) == 2
    assert "expected a readable YAML file" in capsys.readouterr().err


def test_a_space_without_trials_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joulemoe(monkeypatch, "sweep", space_file(tmp_path, {}), "--out", str(tmp_path / "out")) == 2
    assert "trial: expected the keys of a trial" in capsys.readouterr().err


def test_a_config_that_gives_a_key_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text("seed: 1\ntop_k: 2\nseed: 3\n")
    assert joulemoe(monkeypatch, "trial", str(tmp_path / "t.yaml")) == 2
    error = capsys.readouterr().err
    assert "t.yaml: seed: expected a key once in a mapping, got it twice (lines 1 and 3)" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without a GPU")
def test_a_gpu_where_there_is_none(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny | {"device": "cuda"}))
    assert joulemoe(monkeypatch, "trial", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "out")) == 2
    assert "device: expected a CUDA GPU, got a host without one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny))
    assert joulemoe(monkeypatch, "trial", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "file" / "out")) == 2
    error = capsys.readouterr().err
    assert "out: expected a folder that can be written" in error
    assert error.count("\n") == 1


def test_the_hub_out_of_reach_names_the_options(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    prepare_hub.cache_clear()
    space = space_file(
        tmp_path, tiny | {"base": "nobody/nothing", "tokenizer": "nobody/nothing", "data": "nobody/nothing"}
    )
    assert joulemoe(monkeypatch, "sweep", space, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    for option in ("--base PATH", "--tokenizer PATH", "--data PATH"):
        assert option in error
    assert error.count("\n") == 1
    assert not os.path.exists(tmp_path / "out")


def test_space_prints_the_trials(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = space_file(tmp_path, tiny | {"top_k": {"grid": [1, 2]}})
    assert joulemoe(monkeypatch, "space", space) == 0
    assert "2 trials, 0 repeats dropped" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["doctor", "sweep", "trial"])
def test_a_variable_that_cannot_be_is_named_in_one_line(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setenv("JOULEMOE_WATTS_PER_CORE", "abc")
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tiny))
    out = tmp_path / "out"
    words = {
        "doctor": [],
        "sweep": [space_file(tmp_path, tiny), "--out", str(out)],
        "trial": [str(tmp_path / "t.yaml"), "--out", str(out)],
    }[command]
    assert joulemoe(monkeypatch, command, *words) == 2
    error = capsys.readouterr().err
    assert error == ("joulemoe: JOULEMOE_WATTS_PER_CORE: expected watts of one core, between 0 and 1000; got 'abc'\n")
    assert not out.exists()


def test_space_prints_an_estimate_of_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joulemoe(monkeypatch, "space", "quickstart") == 0
    assert "Training, modelled (" in capsys.readouterr().out


def test_space_prints_an_estimate_for_a_cpu_too(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joulemoe(monkeypatch, "space", space_file(tmp_path, tiny | {"device": "cpu"}), "--gpu", "NVIDIA H200") == 0
    said = capsys.readouterr().out
    assert "Training, modelled (" in said
    assert "That is for a GPU" in said


def test_space_lists_no_domain_that_was_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joulemoe(monkeypatch, "space", "full_design", "--set", "top_k=1", "--set", "router=topk") == 0
    said = capsys.readouterr().out
    assert "learning_rate: LogUniform" in said
    assert "top_k: Choice" not in said
