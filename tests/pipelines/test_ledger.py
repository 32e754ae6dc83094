"""The ledger over attempts, heartbeats, budgets, checkpoints: without Ray, and with real processes where it matters."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from hwcost import DeviceInfo, EnergyMonitor
from pipelines import heartbeat, ledger, recover
from pipelines.beats import Beats, Meter
from pipelines.budget import Budget
from pipelines.config import ConfigError, StorageError, TrialConfig
from pipelines.data import load_corpus
from pipelines.epoch_ends import front_table
from pipelines.follow import SweepCallback
from pipelines.journal import Journal
from pipelines.ledger import Carry
from pipelines.model import Hardware, build_model
from pipelines.pareto import pareto_front
from pipelines.plan import plan_sweep
from pipelines.records import EpochRecord, PointRecord, Store, TrialRecord
from pipelines.training import Trainer, learning_rate
from pipelines.trial import Trial, TrialKey, run_trial
from pipelines.trial_rows import is_final
from tune_spaces import Space


def test_what_was_spent_beyond_a_checkpoint_is_lost() -> None:
    at_checkpoint = Carry(setup_j=10.0, train_j=20.0, eval_j=5.0, idle_j=1.0)
    assert at_checkpoint.losing_up_to(50.0).lost_j == 14.0
    assert at_checkpoint.losing_up_to(50.0).total_j == 50.0
    assert at_checkpoint.losing_up_to(None).lost_j is None
    assert Carry.from_document(json.loads(json.dumps({**vars(at_checkpoint)}))) == at_checkpoint


def lines_of(end: bool, last: bool) -> list[dict[str, Any]]:
    counter = [{"t": t, "j": 100.0 * t} for t in range(11)]
    edges = [
        {"t": 1.0, "attempt": "a-0", "edge": "begin", "phase": None},
        {"t": 2.0, "attempt": "a-0", "edge": "open", "phase": "train"},
        {"t": 4.0, "attempt": "a-0", "edge": "close", "phase": "train"},
        {"t": 6.0, "attempt": "a-0", "edge": "open", "phase": "train"},
    ]
    if end:
        edges += [{"t": 7.5, "attempt": "a-0", "edge": e, "phase": p} for e, p in (("close", "train"), ("end", None))]
    counter[-1] |= {"last": True} if last else {}
    return sorted([*counter, *edges], key=lambda line: line["t"])


def lines_in(path: Path) -> list[dict[str, Any]]:
    return heartbeat.parse(path.read_bytes()) if path.exists() else []


def test_heartbeats_tell_the_joules_of_an_attempt() -> None:
    spent = heartbeat.joules_of(lines_of(end=True, last=True), "a-0")
    assert spent is not None
    assert spent.total_j == pytest.approx(650.0)
    assert spent.phases_j == pytest.approx({"train": 350.0})
    died = heartbeat.joules_of(lines_of(end=False, last=True), "a-0")
    assert died is not None
    assert died.total_j == pytest.approx(900.0)
    assert "heartbeat_estimated" not in died.flags
    both = heartbeat.joules_of(lines_of(end=False, last=False), "a-0")
    assert both is not None
    assert both.total_j == pytest.approx(900.0 + 100.0 * heartbeat.PERIOD_S / 2)
    assert "heartbeat_estimated" in both.flags
    assert heartbeat.joules_of(lines_of(end=True, last=True), "b-0") is None


def test_a_board_counts_between_actors_and_a_process_does_not(tmp_path: Path) -> None:
    for number, (first, last) in enumerate(((0.0, 100.0), (150.0, 200.0))):
        for kind in ("gpu:x", "cpu:6"):
            rows = [{"t": 0, "spec": kind, "session": "s"}, {"t": 1, "j": first}, {"t": 2, "j": last}]
            (tmp_path / f"{kind[:3]}{number}.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"torn')
    meter = Meter(Beats(pafs.LocalFileSystem(), str(tmp_path)))
    assert meter.read_j() == 200.0 + 100.0 + 50.0
    assert meter.read_j() == 350.0
    assert Meter(Beats(pafs.LocalFileSystem(), str(tmp_path / "none"))).read_j() is None


def test_the_keeper_outlives_a_killed_process(tmp_path: Path) -> None:
    """A process burns CPU inside an attempt and is killed; its last second is in the file."""
    path = tmp_path / "beats.jsonl"
    code = (
        "import os, sys, time; from pipelines.heartbeat import Keeper, reader_of\n"
        "from pipelines.shipping import Place\n"
        "k = Keeper(Place(sys.argv[1]), 'cpu:6.0', read=reader_of('cpu:6.0', os.getpid()), period_s=0.1)\n"
        "k.edge('a-0', 'begin'); print('on', flush=True)\n"
        "while True: sum(range(10000))"
    )
    words = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert process.stdout is not None
    process.stdout.readline()
    while sum("j" in line for line in lines_in(path)) < 4:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while not any(line.get("last") for line in lines_in(path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    spent = heartbeat.joules_of(lines_in(path), "a-0")
    assert spent is not None
    assert spent.total_j is not None
    assert spent.total_j > 0
    assert spent.flags == ("from_heartbeats",)


def test_a_full_disk_takes_the_heartbeats_later(tmp_path: Path) -> None:
    """The keeper may not let its file grow, then its actor goes: it stays until it has written everything."""
    path = tmp_path / "beats.jsonl"
    words = [sys.executable, "-m", "pipelines.heartbeat", str(path), str(os.getpid()), "cpu:6.0", "0.05"]
    keeper = subprocess.Popen(words, stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert keeper.stdin is not None
    while len(lines_in(path)) < 2:
        time.sleep(0.02)
    resource.prlimit(keeper.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    size = path.stat().st_size
    keeper.stdin.write(b'{"t": 1e12, "attempt": "a-0", "edge": "end"}\n')
    keeper.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        keeper.wait(timeout=1)
    assert path.stat().st_size == size
    resource.prlimit(keeper.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert keeper.wait(timeout=60) == 0
    *_, last, handed = lines_in(path)
    assert last["last"]
    assert handed["edge"] == "end"


def advance(trial: Trial, count: int) -> None:
    for _ in range(count):
        assert isinstance(trial.advance(), EpochRecord)


def test_an_attempt_goes_on_where_the_last_checkpoint_was(tiny: dict[str, Any], tmp_path: Path) -> None:
    """To the bit as if nothing had happened, router noise included; the lost epoch's joules stand under lost."""
    config = TrialConfig.parse(tiny | {"epochs": 3, "router_jitter": 0.1, "bias_balance_rate": 0.01})
    journal, store = Journal(str(tmp_path), "s"), Store(tmp_path)
    with EnergyMonitor.for_assigned_devices(cpu_parallel=2) as monitor:
        first = Trial(config, TrialKey(sweep_id="s", trial_id=config.trial_id), store, monitor, journal=journal)
        advance(first, 3)
        first.ledger.close()
        assert first.ledger.span is not None
        spent_j = first.ledger.span.energy_j
        key = TrialKey(sweep_id="s", trial_id=config.trial_id, attempt=1)
        second = Trial(config, key, store, monitor, journal=journal, spent_j=spent_j)
        advance(second, 2)
        record = second.advance()
    assert isinstance(record, TrialRecord)
    assert record.state == "COMPLETED", record.error
    unbroken = run_trial(config, out=tmp_path / "unbroken")
    assert record.eval_loss_nats == unbroken.eval_loss_nats
    assert record.tokens_trained == unbroken.tokens_trained
    assert record.lost_energy_j is not None
    assert record.lost_energy_j > 0
    assert second.ledger.span is not None
    assert record.total_energy_j == pytest.approx(spent_j + second.ledger.span.energy_j)
    parts = ("setup", "train", "eval", "idle", "lost")
    assert sum(getattr(record, f"{part}_energy_j") for part in parts) == pytest.approx(record.total_energy_j)
    own = [r["epoch"] for r in store.read(EpochRecord, "s").to_pylist() if r["attempt"] == 1]
    assert own == [0, 1, 2, 3]
    left = sorted(path.name for path in (tmp_path / "checkpoints" / "s" / config.trial_id).iterdir())
    assert left == ["final"]


def test_anytime_points_are_what_trials_of_that_length_are(tiny: dict[str, Any], tmp_path: Path) -> None:
    values = tiny | {"schedule": "wsd", "router_jitter": 0.1}
    record = run_trial(TrialConfig.parse(values | {"epochs": "anytime:3"}), out=tmp_path / "a")
    assert record.state == "COMPLETED", record.error
    points = Store(tmp_path / "a").read(PointRecord).to_pylist()
    assert [point["epochs"] for point in points] == [1, 2, 3]
    for point in points:
        alone = run_trial(TrialConfig.parse(values | {"epochs": point["epochs"]}), out=tmp_path / str(point["epochs"]))
        assert point["eval_loss_nats"] == alone.eval_loss_nats
        assert point["config_fingerprint"] == alone.config_fingerprint
        assert point["tokens_trained"] == alone.tokens_trained
    assert points[0]["branch_energy_j"] > 0
    assert points[2]["branch_energy_j"] is None
    assert points[2]["train_energy_j"] == record.train_energy_j
    assert record.branches_energy_j == pytest.approx(points[0]["branch_energy_j"] + points[1]["branch_energy_j"])
    names = ("setup", "train", "eval", "branches", "idle", "lost")
    assert sum(getattr(record, f"{name}_energy_j") for name in names) == pytest.approx(record.total_energy_j)


@pytest.mark.parametrize(("ended_by", "state"), [("scheduler", "STOPPED"), ("died", "FAILED")])
def test_an_anytime_trial_that_is_ended_keeps_its_points(
    tiny: dict[str, Any], tmp_path: Path, ended_by: str, state: str
) -> None:
    config = TrialConfig.parse(tiny | {"epochs": "anytime:4"})
    journal, store, key = Journal(str(tmp_path), "s"), Store(tmp_path), TrialKey(sweep_id="s", trial_id=config.trial_id)
    with ledger.trial_monitor() as monitor:
        journal.claim(config.trial_id, recover.empty_claim(config) | {"source": monitor.source})
        trial = Trial(config, key, store, monitor, journal=journal)
        reached = [trial.advance() for _ in range(3)][1:]  # and the scheduler says stop
    assert not store.files(PointRecord, "s")
    (row,) = recover.write_missing(store, journal, ended_by=ended_by, alive=True)
    points = store.read(PointRecord, "s").to_pylist()
    assert [point["epochs"] for point in points] == [1, 2]
    for point, epoch in zip(points, reached, strict=True):
        assert isinstance(epoch, EpochRecord)
        assert (point["state"], point["censored"]) == (row.state, row.censored) == (state, state == "STOPPED")
        assert (point["eval_loss_nats"], point["train_energy_j"]) == (epoch.eval_loss_nats, epoch.train_energy_j)
        assert point["branch_energy_j"] == epoch.epoch_energy_j
        trunk_j = sum(window.energy_j or 0.0 for window in trial.ledger.of(ledger.TRAIN)[: point["epochs"]])
        assert trunk_j > 0
        assert point["train_energy_j"] == pytest.approx(trunk_j + point["branch_energy_j"])
    assert row.corpus_fingerprint == trial.corpus.fingerprint
    front = pareto_front(store, sweep_id="s", table=front_table(store, "s"))
    assert {row["epochs"] for row in front.rows(members_only=False)} == {1, 2}
    with ledger.trial_monitor() as monitor:
        journal.claim(config.trial_id, recover.empty_claim(config))
        again = Trial(config, dataclasses.replace(key, attempt=1), store, monitor, journal=journal)
        again.advance()  # from the checkpoint, and ended before the next point
    recover.write_missing(store, journal, ended_by=ended_by, alive=True)
    assert [(p["epochs"], p["attempt"]) for p in store.read(PointRecord, "s").to_pylist()] == [
        (1, 0), (2, 0), (1, 1), (2, 1)
    ]  # fmt: skip
    front = pareto_front(store, sweep_id="s", table="points")
    assert len(front.rows(members_only=False)) == 2  # the later attempt's stand for the earlier one's


def test_wsd_is_stable_then_decays_and_shares_its_trunk(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny | {"schedule": "wsd", "learning_rate": 1.0, "epochs": 2})
    short, long = ([learning_rate(config, step, total, 50) for step in range(total)] for total in (50, 100))
    assert short[:40] == long[:40]
    assert long[3:80] == [1.0] * 77
    assert long[80:] == sorted(long[80:], reverse=True)
    assert 0 <= long[-1] < 0.05


def test_a_branch_leaves_no_trace(tiny: dict[str, Any]) -> None:
    config = TrialConfig.parse(tiny | {"schedule": "wsd", "router_jitter": 0.1, "bias_balance_rate": 0.01})
    corpus, hardware = load_corpus(config), Hardware.of(config)
    trainer = Trainer(build_model(config, corpus, hardware)[0], config, hardware, corpus.splits["train"].first(2048))
    trainer.run_to(3, 8)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with trainer.branch():
        trainer.run_to(6, 6)
    assert trainer.step == 3
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(before[name], value), name


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    one, two = (Journal(str(tmp_path), "s") for _ in range(2))
    with one.driving(), pytest.raises(ConfigError, match=f"driven by process {os.getpid()}"), two.driving():
        pass
    with two.driving():
        pass


def test_one_lease_at_a_time_on_an_object_store(tmp_path: Path) -> None:
    one, two = (Journal("memory://leases/out", "s") for _ in range(2))
    with one.driving(), pytest.raises(ConfigError, match="expected a sweep that nobody drives"), two.driving():
        pass
    with two.driving():
        assert two.get("driver.json")["pid"] == os.getpid()


def test_a_lease_does_not_lapse_while_its_driver_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.journal.LEASE_S", 0.6)
    one, two = (Journal("memory://leases/long", "s") for _ in range(2))
    with one.driving():
        time.sleep(1.5)  # data are loaded, boards are measured, MLflow does not answer
        with pytest.raises(ConfigError, match="expected a sweep that nobody drives"), two.driving():
            pass
        assert one.holds()
        one.put("driver.json", {"lease": "another", "renewed": 0.0})  # taken over after a standstill
        time.sleep(0.3)
        assert not one.holds()
    assert one.get("driver.json")["lease"] == "another"
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_a_driver_that_wakes_up_knows_before_it_writes(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease lapsed while the whole process stood still, its thread too: looked up at once, and nothing written."""
    now = time.time()
    monkeypatch.setattr(Journal, "_renew", lambda *args: None)
    one, two = (Journal("memory://leases/asleep", "s") for _ in range(2))
    plan = plan_sweep(Space(name="s", question="", fixed=tiny, domains={}, conditions={}, sweep={}), sweep_id="s")
    budget = Budget(plan, lambda: None, holds=one.holds)
    with one.driving():
        assert not budget.stop_all()
        (config,) = plan.trials
        one.claim(config.trial_id, recover.empty_claim(config))
        monkeypatch.setattr(time, "time", lambda: now + 31.0)
        with two.driving():
            assert budget.stop_all()
            assert budget.reason == "another driver took the sweep over"
            follower = SweepCallback(plan, "memory://leases/asleep", None, budget)
            follower.store, follower.journal = Store("memory://leases/asleep"), one
            trial = types.SimpleNamespace(config={"trial": {"trial_id": config.trial_id}})
            follower._write_missing(trial, "died")
            follower.on_trial_result(0, [], trial, {"trial_row": "not looked at"})
            assert not follower.store.files(TrialRecord)
            assert "got process" in str(one.taken_over())
            assert two.holds()
    assert two.get("driver.json")["released"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweeps").touch()
    with (
        pytest.raises(StorageError, match="out: expected a folder that can be written"),
        Journal(str(tmp_path), "s").driving(),
    ):
        pass


def test_a_session_that_is_killed_counts(tiny: dict[str, Any], tmp_path: Path) -> None:
    journal, space = (
        Journal(str(tmp_path), "s"),
        Space(name="s", question="", fixed=tiny, domains={}, conditions={}, sweep={}),
    )
    for seconds in (0.0, 5.0, 10.0):
        journal.book_session("one", seconds)
    journal.book_session("two", 7.0, 3.5)
    assert journal.seconds() == 17.0
    assert journal.get("sessions.json")[1] == {"session": "two", "seconds": 7.0, "sweep_energy_j": 3.5}
    booked: list[float] = []
    plan = plan_sweep(space)
    follower = SweepCallback(plan, "", None, Budget(plan, lambda: None), None, lambda: booked.append(time.monotonic()))
    follower.longest_s, follower._looked_s = 0.0, 0.0
    for iteration in range(3):
        follower.on_step_end(iteration, [])
    assert len(booked) == 1  # every few seconds, not at every step


def test_an_attempt_that_died_gets_its_row(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = TrialConfig.parse(tiny)
    journal, store = Journal(str(tmp_path), "s"), Store(tmp_path)
    claim = recover.empty_claim(config) | {"beats": "b", "spent_j": 100.0, "source": "counter"}
    assert journal.claim(config.trial_id, claim) == 0
    path = journal.beats.place("b").path
    rows = [
        {**line, "attempt": f"{config.trial_id}-0"} if "attempt" in line else line for line in lines_of(False, True)
    ]
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n")
    (row,) = recover.write_missing(store, journal, ended_by="died")
    assert (row.state, row.ended_by, is_final(row)) == ("FAILED", "died", False)
    assert row.total_energy_j == pytest.approx(1000.0)
    assert (row.lost_energy_j, row.train_energy_j, row.idle_energy_j) == pytest.approx((100.0, 600.0, 300.0))
    assert recover.write_missing(store, journal, ended_by="died") == []
    before = recover.row_before(store, journal, config.trial_id)
    assert recover.spent_j(before, journal.attempts(config.trial_id)) == pytest.approx(1000.0)
    assert journal.claim(config.trial_id, claim) == 1


def test_a_trial_on_the_cpu_of_a_gpu_host_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU of its own it would find none, and have no joules at all."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(ledger.EnergyMonitor, "for_assigned_devices", lambda **how: asked.append(how["torch_device"]))
    ledger.trial_monitor(device="cpu")
    ledger.trial_monitor()
    assert asked == ["cpu", "cuda:0"]


@pytest.mark.parametrize(("limit_w", "calibrated"), [(700.0, True), (350.0, False), (None, True)])
def test_idle_watts_come_from_the_profile_of_the_enforced_limit(
    monkeypatch: pytest.MonkeyPatch, limit_w: float | None, calibrated: bool
) -> None:
    """The board's own word through NVML: half the limit is another board as far as joules go."""
    info = DeviceInfo(device_id="GPU-0", kind="gpu", name="NVIDIA H200", power_limit_w=limit_w)
    found = types.SimpleNamespace(readers=(types.SimpleNamespace(info=info),))
    profiles: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr("hwcost.devices.find_readers", lambda **how: found)
    monkeypatch.setattr(ledger.EnergyMonitor, "for_assigned_devices", lambda **how: profiles.append(how["profile"]))
    ledger.trial_monitor()
    assert [model.analytic for model in profiles] == [not calibrated]
