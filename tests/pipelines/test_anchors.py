"""The anchor workload at both ends of a sweep: taken once a board, on the sweep's joules, used to compare boards."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hwcost.anchor import AnchorReading
from pipelines import anchors, boards, recover
from pipelines.beats import Meter
from pipelines.budget import Budget
from pipelines.compare import compare
from pipelines.journal import Journal
from pipelines.pareto import pareto_front
from pipelines.plan import SweepPlan, plan_sweep
from pipelines.records import AnchorRecord, Store
from pipelines.report import write_report
from pipelines.results import load
from pipelines.sections_boards import boards_section, unmeasured
from tests.pipelines import synthetic
from tests.pipelines.synthetic import START
from tests.pipelines.synthetic import anchor as reading
from tests.pipelines.synthetic import write_anchors as write
from tune_spaces import SpaceError, parse_space

HERE = Path(__file__).parent
SWEEP = "anchored"


def run(out: Path, trial: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep in a process of its own that sees fake boards; what it says at its end."""
    space = out.parent / "space.yaml"
    space.write_text(yaml.safe_dump({"question": "?", "trial": dict(trial)}))
    paths = [str(HERE / "fakes"), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "anchor_driver.py"), str(out), str(space), SWEEP]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def monitor(source: str | None, uuid: str | None = "GPU-a") -> Any:
    device = types.SimpleNamespace(
        uuid=uuid, name="Fake", driver_version="1", power_limit_w=700.0, kind="gpu" if uuid else "cpu"
    )
    return types.SimpleNamespace(source=source, devices=(device,))


def taken(monitor: Any) -> AnchorReading:
    return AnchorReading(
        version=2,
        workload="anchor 2, torch 2",
        energy_j=9.0,
        j_per_step=4.0,
        j_per_token=2.0,
        j_per_token_uncertainty=0.1,
        s_per_step=0.01,
        mean_power_w=400.0,
        mean_temperature_c=50.0,
        steps=3,
        shared=False,
        flags=(),
    )


def broken(monitor: Any) -> AnchorReading:
    raise MemoryError("no room")


KEY = {"sweep_id": "sweep", "session": "s1", "anchor": True}


def test_a_board_is_measured_once_a_session(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = anchors.at_start(store, monitor("counter"), KEY, measure=taken)
    assert (first.position, first.j_per_token, first.steps, first.skipped) == ("start", 2.0, 3, None)
    assert anchors.at_start(store, monitor("counter"), KEY, measure=broken) == first
    other = anchors.at_start(store, monitor("counter"), KEY | {"session": "s2"}, measure=taken)
    assert (other.attempt, other.session) == (1, "s2")
    assert store.read(AnchorRecord, "sweep").num_rows == 2


@pytest.mark.parametrize(
    ("source", "key", "measure", "reason"),
    [
        ("modelled", {}, taken, "the joules are modelled: a board's drift cannot show in them"),
        ("rapl", {}, taken, "the joules are rapl: a board's drift cannot show in them"),
        (None, {}, taken, "no joules can be read here"),
        ("counter", {"anchor": False}, taken, "turned off"),
        ("counter", {}, broken, "failed: MemoryError: no room"),
    ],
)
def test_where_it_is_not_measured_the_row_says_why(
    tmp_path: Path, source: str | None, key: dict[str, Any], measure: anchors.Measure, reason: str
) -> None:
    uuid = "GPU-a" if source == "counter" else None
    record = anchors.at_start(Store(tmp_path), monitor(source, uuid), KEY | key, measure=measure)
    assert (record.skipped, record.j_per_token, record.energy_j) == (reason, None, None)
    assert Store(tmp_path).read(AnchorRecord, "sweep")["skipped"].to_pylist() == [reason]


def test_the_default_measure_needs_a_gpu(tmp_path: Path) -> None:
    record = anchors.at_start(Store(tmp_path), monitor("counter"), KEY)
    assert record.skipped == "failed: RuntimeError: torch has no GPU here"


def test_drift_is_the_end_over_the_start() -> None:
    rows = [reading("a", "start", 1.0), reading("a", "end", 1.02), reading("b", "start", 1.1)]
    rows += [reading("c", "start", 1.0, shared=True), reading("d", "start", 5.0, workload="anchor 1, torch 2")]
    found = {drift.board: drift for drift in boards.drifts([dataclasses.asdict(row) for row in rows])}
    assert set(found) == {"a", "b"}
    assert found["a"].share == pytest.approx(0.02)
    assert found["b"].share is None


def test_fronts_and_comparisons_use_both_readings(tmp_path: Path) -> None:
    """Joules of board b stand 4 % higher as a trial ran between readings 3 % and 5 % above those of board a."""
    rows = [
        synthetic.trial("a", gpu_uuid="a", train_energy_j=100.0, router="topk"),
        synthetic.trial("b", gpu_uuid="b", train_energy_j=104.0, router="energy"),
    ]
    store = synthetic.write(tmp_path, rows)
    plain = pareto_front(store)
    assert "no anchor was measured" in " ".join(plain.notes)
    write(store, reading("a", "start", 1.0), reading("a", "end", 1.0))
    write(store, reading("b", "start", 1.03), reading("b", "end", 1.05))
    front = pareto_front(store)
    assert front.mean_NM[:, 0] == pytest.approx([102.0, 102.0])
    assert "2 boards of one model corrected by their anchor workload (4.0% apart)" in front.notes
    points = pareto_front(store, table="points")
    assert any("corrected by their anchor" in note for note in points.notes)
    found = compare(store, "router=topk", "router=energy")
    assert found.pairs[0].saving.mean == pytest.approx(0.0, abs=1e-9)


def test_the_report_shows_boards_and_their_drift(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [synthetic.trial("a", gpu_uuid="a"), synthetic.trial("b", gpu_uuid="b")])
    later = {"started_at": START + dt.timedelta(hours=2), "j_per_token_uncertainty": 0.001}
    write(store, reading("a", "start", 1.0), reading("a", "end", 1.02, **later), reading("b", "start", 1.05))
    found = boards_section(load(tmp_path, synthetic.SWEEP))
    assert found is not None
    assert found.text[0] == "2 boards: the same work takes 4.0% more joules on the dearest than on the cheapest."
    assert found.text[1] == "Between start and end it drifted by +2.0%."
    (figure,), (sheet,) = found.figures, found.sheets
    assert [point.x for point in figure.points] == [0.0, 2.0, 0.0]
    assert figure.points[0].y == pytest.approx(100 * (1.0 / 1.03 - 1))
    assert [row[2] for row in sheet.rows] == ["start", "start", "end"]
    page = write_report(tmp_path, synthetic.SWEEP, papers="none")[0].read_text()
    assert "Anchor workload by board" in page


def test_the_report_says_why_nothing_was_measured(tmp_path: Path) -> None:
    store = synthetic.write(tmp_path, [synthetic.trial("a")])
    write(store, reading("a", "start", None, skipped="turned off"))
    results = load(tmp_path, synthetic.SWEEP)
    assert boards_section(results) is None
    assert unmeasured(results) == ["anchor workload not measured: turned off (1 ×)"]
    assert "anchor workload not measured: turned off" in write_report(tmp_path, synthetic.SWEEP)[0].read_text()


def test_the_budget_keeps_the_joules_of_the_end(tmp_path: Path) -> None:
    store = Store(tmp_path)
    reserve = anchors.Reserve(store, synthetic.SWEEP, "s1")
    assert reserve.read_j() == 0.0
    write(store, reading("a", "start", 1.0), reading("b", "start", 1.0), reading("z", "start", 1.0, session="s0"))
    assert reserve.read_j() == 16_000.0
    write(store, reading("a", "end", 1.0))
    assert reserve.read_j() == 8_000.0
    plan = SweepPlan(sweep_id="s", space="s", question="", trials=(), dropped=0, max_joules=100_000.0)
    assert not Budget(plan, lambda: 91_000.0, reserve_j=reserve.read_j).stop_all()
    budget = Budget(plan, lambda: 92_500.0, reserve_j=reserve.read_j)
    assert budget.stop_all()
    assert budget.reason == "max_joules: 92,500 J of 100,000 J are spent, 8,000 J are kept for the anchor"


def test_a_space_and_a_command_can_turn_it_off(tiny: dict[str, Any]) -> None:
    space = parse_space("s", {"trial": tiny, "sweep": {"anchor": False}})
    assert not plan_sweep(space).anchor
    assert plan_sweep(space, anchor=True).anchor
    on = plan_sweep(parse_space("s", {"trial": tiny}))
    assert on.anchor
    assert SweepPlan.from_document({k: v for k, v in on.to_document().items() if k != "anchor"}).anchor
    with pytest.raises(SpaceError, match=r"sweep\.anchor: expected true or false, got 'no'"):
        parse_space("s", {"trial": tiny, "sweep": {"anchor": "no"}})


@pytest.mark.slow
def test_a_sweep_on_two_boards_measures_each_at_both_ends(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Real Ray actors, fake boards of 400 and 410 W; the anchor's work is small and runs on the CPU."""
    out = tmp_path / "out"
    changes = {"epochs": 1, "measure_seconds": 0.2, "device": "auto", "checkpoint": False}
    assert run(out, tiny | changes | {"energy_lambda": {"grid": [0.1, 0.2, 0.3]}})["states"] == ["COMPLETED"] * 3
    trials = recover.rows_of(Store(out), SWEEP).values()
    rows = Store(out).read(AnchorRecord, SWEEP).to_pylist()
    places = {(row["gpu_uuid"], row["position"]) for row in rows}
    used = {row.gpu_uuid for row in trials}
    assert places == {(board, position) for board in used for position in ("start", "end")}
    assert len(rows) == len(places)
    assert {row["skipped"] for row in rows} == {None}
    assert len({row["session"] for row in rows}) == 1
    for row in rows:
        watts = row["mean_power_w"]
        assert 290 < watts < 560
        assert row["energy_j"] > row["j_per_token"] * row["steps"] > 0
    starts = {row["gpu_uuid"]: row["j_per_token"] for row in rows if row["position"] == "start"}
    for record in trials:
        assert record.anchor_j_per_token == starts[record.gpu_uuid]
    drawn_j = Meter(Journal(str(out), SWEEP).beats).read_j()
    trials_j = sum(record.total_energy_j for record in trials)
    assert drawn_j > trials_j + sum(row["energy_j"] for row in rows)
