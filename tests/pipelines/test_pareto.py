"""Fronts from Parquet: objectives, seeds, reference points, boards, what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipelines.pareto import Objective, pareto_front, pareto_fronts
from pipelines.records import Store, TrialRecord, to_table
from pipelines.show import front_csv, front_lines, print_front
from tests.pipelines import synthetic
from tests.pipelines.synthetic import SWEEP, trial


def table(*rows: TrialRecord):
    return to_table(TrialRecord, rows)


def ids(front) -> list[str]:
    return [row["trial_id"] for row in front.rows()]


def test_the_front_of_four_trials() -> None:
    front = pareto_front(
        table(
            trial("cheap", train_energy_j=10.0, eval_loss_nats=4.0),
            trial("good", train_energy_j=30.0, eval_loss_nats=3.0),
            trial("dominated", train_energy_j=31.0, eval_loss_nats=3.5),
            trial("mid", train_energy_j=15.0, eval_loss_nats=3.2),
        )
    )
    assert ids(front) == ["cheap", "mid", "good"]
    assert front.rows(members_only=False)[2]["dominated_by"] == "good"
    assert front.rows()[1]["knee"]
    assert front.metrics()["front_size"] == 3
    assert front.metrics()["knee_train_energy_j"] == 15.0


def test_an_empty_front_says_why() -> None:
    front = pareto_front(table(trial(state="FAILED", eval_loss_nats=None)))
    assert len(front) == 0
    assert front.hypervolume is None
    assert front.knee is None
    assert "left out: 1 × FAILED (t0)" in front_lines(front)
    assert json.loads(front.to_json())["front"] == []
    print_front(front, Console(quiet=True))


def test_no_rows_at_all(tmp_path: Path) -> None:
    assert len(pareto_front(tmp_path)) == 0


def test_directions_and_three_objectives() -> None:
    rows = [
        trial("fast", train_energy_j=10.0, tokens_per_s=100.0, eval_loss_nats=4.0),
        trial("slow", train_energy_j=10.0, tokens_per_s=50.0, eval_loss_nats=4.0),
        trial("good", train_energy_j=20.0, tokens_per_s=10.0, eval_loss_nats=3.0),
    ]
    assert ids(pareto_front(table(*rows), "train_energy_j", "tokens_per_s:max")) == ["fast"]
    front = pareto_front(table(*rows), "train_energy_j", "eval_loss_nats", "tokens_per_s:max")
    assert ids(front) == ["fast", "good"]
    assert front.rows(members_only=False)[1]["dominated_by"] == "fast"
    assert front.reference_M is not None
    assert front.reference_M[2] < 10.0


def test_equal_configurations_all_stay() -> None:
    assert len(pareto_front(table(trial("a"), trial("b")))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "no_such"}, "axis: expected a numeric column of 'trials', got 'no_such'"),
        ({"x": "router"}, "axis: expected a numeric column of 'trials', got 'router'"),
        ({"x": "train_energy_j:up"}, "expected 'min' or 'max', got 'up'"),
        ({"table": "tables"}, "table: expected one of ['points', 'trials'], got 'tables'"),
        ({"x": "lifetime_energy_j"}, "expected decode_tokens"),
        ({"reference": (1.0,)}, "reference: expected 2 numbers, got 1"),
    ],
)
def test_bad_input_speaks(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        pareto_front(table(trial()), **options)
    assert message in str(error.value)


def test_objectives_read_their_direction() -> None:
    assert Objective.parse("a") == Objective(column="a")
    assert Objective.parse("a:max") == Objective(column="a", maximise=True)


def test_seeds_of_a_configuration_are_one_point_with_intervals() -> None:
    rows = [
        trial(f"s{s}", seed=s, config_fingerprint="same", train_energy_j=100.0 + s, eval_loss_nats=3.0 + 0.01 * s)
        for s in range(3)
    ]
    front = pareto_front(table(*rows))
    (row,) = front.rows()
    assert row["seeds"] == 3
    assert row["trial_id"] == "s0 s1 s2"
    assert row["train_energy_j"] == pytest.approx(101.0)
    assert row["eval_loss_nats"] == pytest.approx(3.01)
    # t(0.975, 2) = 4.3027; standard error 1/sqrt(3); the meter's 1 J over three seeds adds 1.96/sqrt(3).
    assert row["train_energy_j_high"] - 101.0 == pytest.approx(np.hypot(4.30265, 1.95996) / np.sqrt(3), rel=1e-4)
    assert row["eval_loss_nats_low"] == pytest.approx(3.01 - 4.30265 * 0.01 / np.sqrt(3), rel=1e-4)
    assert len(pareto_front(table(*rows), per_trial=True).on_front_N) == 3


def test_one_seed_has_the_meters_interval_and_none_on_its_loss() -> None:
    (row,) = pareto_front(table(trial(train_energy_uncertainty_j=2.0))).rows()
    assert row["train_energy_j_high"] == pytest.approx(100 + 1.95996 * 2)
    assert row["eval_loss_nats_low"] is None
    assert row["front_probability"] is None


def test_the_reference_point_is_fixed_at_the_first_front(tmp_path: Path) -> None:
    rows = [trial("a", train_energy_j=10.0, eval_loss_nats=4.0), trial("b", train_energy_j=20.0, eval_loss_nats=3.0)]
    store = synthetic.write(tmp_path, rows)
    first = pareto_front(store, sweep_id=SWEEP)
    assert first.reference_M == pytest.approx((21.0, 4.1))
    synthetic.write(tmp_path, [trial("c", train_energy_j=5.0, eval_loss_nats=5.0)])
    later = pareto_front(store, sweep_id=SWEEP)
    assert later.reference_M == first.reference_M
    assert later.beyond_reference == 1
    assert later.hypervolume == pytest.approx(first.hypervolume)
    assert any("1 members lie beyond it" in line for line in front_lines(later))
    assert pareto_front(store, sweep_id=SWEEP, reference=(100.0, 10.0)).reference_M == (100.0, 10.0)


def test_a_folder_that_cannot_be_written_gives_a_note(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial()])
    (tmp_path / "reference").write_text("in the way")
    front = pareto_front(store, sweep_id=SWEEP)
    assert front.hypervolume is not None
    assert any("could not be stored" in note for note in front.notes)


def test_points_are_configurations_of_their_own(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, synthetic.sweep((1, 2, 2)))
    front = pareto_front(store, table="points", sweep_id=SWEEP)
    assert {row["epochs"] for row in front.rows(members_only=False)} == {1, 2}
    assert all(row["seeds"] == 2 for row in front.rows())


def test_every_context_gets_a_front_of_its_own() -> None:
    rows = [trial("a"), trial("b", energy_source="modelled"), trial("c", energy_source="modelled")]
    fronts = pareto_fronts(table(*rows))
    assert [front.context.energy_source for front in fronts] == ["modelled", "counter"]
    assert [front.modelled for front in fronts] == [True, False]


def test_boards_are_corrected_by_their_anchor() -> None:
    rows = [
        trial("a", gpu_uuid="GPU-a", train_energy_j=100.0, anchor_j_per_token=1.00e-3),
        trial("b", gpu_uuid="GPU-b", train_energy_j=103.4, anchor_j_per_token=1.034e-3, eval_loss_nats=3.4),
    ]
    front = pareto_front(table(*rows))
    joules = [row["train_energy_j"] for row in front.rows(members_only=False)]
    assert joules[0] == pytest.approx(joules[1])
    assert front.notes == ("2 boards of one model corrected by their anchor workload (3.4% apart)",)
    rows[1] = trial("b", gpu_uuid="GPU-b", train_energy_j=103.4, eval_loss_nats=3.4)
    plain = pareto_front(table(*rows))
    assert [row["train_energy_j"] for row in plain.rows(members_only=False)] == [100.0, 103.4]
    assert "not corrected: no anchor was measured" in plain.notes[0]
    assert "on 1 of them that compares" in plain.notes[0]


def test_modelled_joules_say_so_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    front = pareto_front(table(trial(energy_source="modelled"), trial("b", energy_source="modelled", eval_loss_nats=3)))
    print_front(front, Console(width=200))
    shown = capsys.readouterr().out
    assert "modelled joules" in shown
    assert "[J, modelled]" in shown
    assert "joules modelled" in shown
    assert json.loads(front.to_json())["joules"] == "modelled"
    assert front_csv(front).splitlines()[1].endswith("modelled")


def test_lifetime_joules_as_an_axis() -> None:
    rows = [
        trial("a", train_energy_j=100.0, decode_j_per_token=2e-3),
        trial("b", train_energy_j=200.0, decode_j_per_token=1e-3),
    ]
    cheap = pareto_front(table(*rows), "lifetime_energy_j", decode_tokens=1e4)
    assert ids(cheap) == ["a"]
    later = pareto_front(table(*rows), "lifetime_energy_j", decode_tokens=1e6)
    assert ids(later) == ["b"]
    assert later.rows()[0]["lifetime_energy_j"] == pytest.approx(1200.0)
    assert later.rows()[0]["lifetime_energy_j_high"] > 1200.0


def test_a_sweep_is_told_from_another(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [trial("a"), trial("b", sweep_id="other")])
    assert ids(pareto_front(store, sweep_id="other")) == ["b"]
    assert len(pareto_front(store).on_front_N) == 2


def test_the_table_fits_a_terminal_and_the_csv_holds_all(capsys: pytest.CaptureFixture[str]) -> None:
    front = pareto_front(table(*synthetic.sweep()))
    print_front(front, Console(width=100))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    assert len(front_csv(front).splitlines()) == 1 + len(front.on_front_N)


def test_from_a_path_a_store_and_a_table_alike(tmp_path: Path) -> None:
    rows = synthetic.sweep((1, 2, 2))
    store = synthetic.write(tmp_path, rows)
    found = [pareto_front(source, sweep_id=SWEEP) for source in (str(tmp_path), store, store.read(TrialRecord))]
    assert len({tuple(ids(front)) for front in found}) == 1
    assert isinstance(store, Store)
