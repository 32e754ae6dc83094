"""The cost model against recorded trials: what is compared, and which pairs count."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.cost_model_trials import Judged, completed, figure, modelled_watts, phases_of, show, signs
from hwcost.cost_model import CostModel
from hwcost.points import Calibration

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "docs" / "data" / "h100-repeatability"
MODEL = CostModel.load(ROOT / "hwcost" / "profiles" / "nvidia-h100.json")


def judged(measured: float, error: float, board: str = "a", **trial: Any) -> Judged:
    row = {"gpu_uuid": board, **trial}
    return Judged(sweep="s", trial=row, phase="train", measured=measured, predicted_error=error)


def test_recorded_trials_are_within_the_bars(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    show(SWEEP, MODEL, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "all, training" in text
    assert "11 of 11 pairs" in text
    for trial in completed(SWEEP):
        (train,) = phases_of(MODEL, trial)
        assert train.known_error is not None
        assert abs(train.known_error) < 0.04
        assert abs(train.predicted_error) < 0.07
    figure(SWEEP, MODEL, Calibration.read(ROOT / "benchmarks" / "points" / "nvidia-h100.json"), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_watts_are_modelled_where_a_phase_is_and_unknown_elsewhere() -> None:
    trial = completed(SWEEP)[0]
    phases = ("setup", "train", "decode_b8_warmup", "decode_b8", None)
    watts = modelled_watts(MODEL, trial, [{"phase": phase} for phase in phases])
    assert [bool(w > 100) for w in watts] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("other", "counted"),
    [
        (judged(1.2, 0.0), (1, 1)),
        (judged(1.2, -0.3), (1, 0)),  # the model has them the wrong way round
        (judged(1.005, 0.0), (0, 0)),  # closer than a repetition
        (dataclasses.replace(judged(1.2, 0.0), trial={"gpu_uuid": "b"}), (0, 0)),  # boards differ by themselves
    ],
)
def test_pairs_count_on_one_board_beyond_the_repeatability(other: Judged, counted: tuple[int, int]) -> None:
    assert signs([judged(1.0, 0.0), other], lambda one: one.predicted_error) == counted
