"""`joulemoe calibrate`: the plan, the budget, workers that fail, and a whole small run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import types
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from hwcost.cost_model import CostModel
from hwcost.ops import STEP_PHASES
from hwcost.points import Calibration, ProbeSpec
from pipelines import calibrate, calibrate_plan
from pipelines.calibrate_steps import DecodeStep, TrainStep, zipf_tokens
from pipelines.calibrate_workers import Ran, Worker, WorkerError

CPU = torch.device("cpu")


def tiny(op, **changes):
    spec = next(spec for spec in calibrate_plan.small_plan().specs if spec.kind == op)
    return {**spec.params, **changes}


# --- the plan ----------------------------------------------------------------------------------------


def test_the_full_plan_covers_what_is_promised():
    plan = calibrate_plan.full_plan()
    names = [spec.name for spec in plan.all_specs]
    assert len(names) == len(set(names))
    train = [spec for spec in plan.specs if spec.kind == "train_step"]
    assert {len(spec.params["shape"]["expert_widths"]) for spec in train} >= {4, 8, 16}
    assert {spec.params["shape"]["top_k"] for spec in train} >= {1, 2, 4}
    assert {spec.params["batch_size"] for spec in train} >= {4, 8, 16, 32}
    decode = [spec for spec in plan.specs if spec.kind == "decode_step"]
    assert {spec.params["batch_size"] for spec in decode} >= {1, 256}
    assert {spec.params["open"] for spec in decode} >= {1, 8}
    for kind in STEP_PHASES:
        assert {spec.held_out for spec in plan.specs if spec.kind == kind} == {True, False}
    assert all(spec.window_s >= 3.0 for spec in plan.all_specs)
    expected_s = sum(spec.window_s + 1.2 for spec in plan.all_specs if spec.tier == 0)
    assert expected_s < 400


def test_one_code_is_built_once_and_open_experts_share_it():
    plan = calibrate_plan.full_plan()
    decode = [spec for spec in plan.specs if spec.kind == "decode_step"]
    assert len({spec.code for spec in decode}) < len(decode) / 2
    shares = calibrate._share(list(plan.specs), 6)
    assert sorted(spec.name for share in shares for spec in share) == sorted(spec.name for spec in plan.specs)
    assert not any(spec.kind in STEP_PHASES for spec in shares[0])


def test_points_are_taken_in_random_order_within_a_tier():
    plan = dataclasses.replace(calibrate_plan.full_plan(), seed=3)
    order = [spec.name for spec in calibrator(plan)._order()]
    other = [spec.name for spec in calibrator(dataclasses.replace(plan, seed=4))._order()]
    assert order != other
    assert sorted(order) == sorted(other)
    assert order[:3] == ["cool-1", "anchor-start", "ramp"]
    assert order[-3:] == ["cool-2", "steady", "anchor-end"]
    tiers = {spec.name: spec.tier for spec in plan.specs}
    assert [tiers[name] for name in order if name in tiers] == sorted(tiers.values())


# --- running it, with workers that do as they are told --------------------------------------------------


class FakeWorker:
    """Answers at once; refuses what is in `broken`, finds no room for `large` the first so many times, and `slow` kinds
    never get ready."""

    broken: tuple[str, ...] = ()
    large: ClassVar[dict[str, int]] = {}
    slow: tuple[str, ...] = ()

    def __init__(self, device, *, threads):
        self.answers = [("ok", None)]
        self.process = types.SimpleNamespace(is_alive=lambda: True, kill=lambda: None)
        self.stopped = False

    def ask(self, name, *args):
        spec = args[0] if args and isinstance(args[0], ProbeSpec) else None
        value = {"run": Ran(calls=10, duration_s=0.1), "ready": {"open_experts": 2.0}, "describe": {"torch": "0"}}.get(
            name
        )
        bad = name == "prepare" and spec.name in self.broken
        self.answers.append(("error", "Traceback\nRuntimeError: no such kernel") if bad else ("ok", value))
        if name == "prepare" and self.large.get(spec.name, 0) > 0:
            self.large[spec.name] -= 1
            self.answers[-1] = (
                "error",
                "Traceback\nRuntimeError: CUBLAS_STATUS_ALLOC_FAILED in cublasCreate",
            )
        if name == "prepare" and spec.name in self.slow:
            self.answers.pop()

    def has_answer(self, timeout_s=0.0):
        return bool(self.answers)

    def answer(self, timeout_s=None):
        state, value = self.answers.pop(0)
        if state == "error":
            raise WorkerError(value)
        return value

    def call(self, name, *args, timeout_s=None):
        self.ask(name, *args)
        return self.answer()

    def dismiss(self):
        self.stopped = True

    def stop(self):
        assert self.stopped


class FakeMonitor:
    """Two watts per window, nothing for windows in `blind`."""

    def __init__(self, blind=()):
        self.blind, self.devices = blind, ()
        self.system = types.SimpleNamespace(history=())

    @contextlib.contextmanager
    def window(self, name):
        joules = None if name in self.blind else 2.0
        got = types.SimpleNamespace(
            energy_j=joules, uncertainty_j=0.1, mean_temperature_c=50.0, max_temperature_c=51.0, throttled=False,
            source="counter", flags=("frozen_counter",) if joules is None else (),
        )  # fmt: skip
        yield types.SimpleNamespace(measurement=got)


def calibrator(plan, *, monitor=None, raw=None):
    console = Console(file=io.StringIO(), width=150)
    return calibrate.Calibrator(plan, monitor or FakeMonitor(), device="cpu", console=console, raw=raw)


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(calibrate, "Worker", FakeWorker)
    monkeypatch.setattr(calibrate.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(FakeWorker, "broken", ())
    monkeypatch.setattr(FakeWorker, "slow", ())
    monkeypatch.setattr(FakeWorker, "large", {})
    return FakeWorker


def test_everything_is_measured_and_written(workers, tmp_path):
    plan = calibrate_plan.small_plan()
    measured = calibrator(plan, raw=tmp_path / "points.json").run()
    assert measured.skipped == ()
    assert {p.name for p in measured.points} == {spec.name for spec in plan.all_specs} | {"idle-bare", "idle-context"}
    decode = next(p for p in measured.points if p.kind == "decode_step")
    assert decode.found == {"open_experts": 2.0}
    assert decode.energy_per_call_j == 0.2
    assert Calibration.read(tmp_path / "points.json").device["torch"] == "0"


def test_what_is_fitted_on_the_spot_is_what_was_saved(workers, tmp_path, monkeypatch):
    """The device goes on being watched while the workers end: a trace of those seconds would be fitted and not kept."""
    monitor = FakeMonitor()
    sample = types.SimpleNamespace(power_w=120.0, temperature_c=40.0, sm_clock_mhz=None)

    def stop(worker):
        monitor.system.history += (types.SimpleNamespace(**vars(sample), time_s=calibrate.time.monotonic() + 1e3),)

    monkeypatch.setattr(workers, "stop", stop)
    measured = calibrator(calibrate_plan.small_plan(), monitor=monitor, raw=tmp_path / "points.json").run()
    assert Calibration.read(tmp_path / "points.json").trace == measured.trace


def test_what_cannot_be_built_or_measured_is_left_out_with_a_reason(workers, monkeypatch):
    plan = calibrate_plan.small_plan()
    train = [spec.name for spec in plan.specs if spec.kind == "train_step"]
    monkeypatch.setattr(workers, "broken", (train[0],))
    measured = calibrator(plan, monitor=FakeMonitor(blind=(train[1],))).run()
    assert {p.name for p in measured.points}.isdisjoint(train[:2])
    assert f"{train[0]}: RuntimeError: no such kernel" in measured.skipped
    assert f"{train[1]}: no joules (frozen_counter)" in measured.skipped
    assert len(measured.points) == len(plan.all_specs)  # two lost, two idle windows


def test_what_finds_no_room_is_built_once_more_when_the_others_are_done(workers, monkeypatch):
    plan = calibrate_plan.small_plan()
    train = [spec.name for spec in plan.specs if spec.kind == "train_step"]
    monkeypatch.setattr(workers, "large", {train[0]: 1, train[1]: 2})
    measured = calibrator(plan).run()
    assert train[0] in {p.name for p in measured.points}
    assert [reason.split(":")[0] for reason in measured.skipped if "ALLOC_FAILED" in reason] == [train[1]]


def test_code_that_is_not_ready_in_time_is_left_out(workers, monkeypatch):
    plan = dataclasses.replace(calibrate_plan.small_plan(), prepare_s=0.2)
    last = [spec.name for spec in plan.specs][-1]
    monkeypatch.setattr(workers, "slow", (last,))
    measured = calibrator(plan).run()
    assert any(reason.startswith(f"{last}: not compiled") for reason in measured.skipped)
    assert measured.points


def test_out_of_time_leaves_out_the_rest_but_never_the_last(workers):
    plan = dataclasses.replace(calibrate_plan.small_plan(), budget_s=0.0)
    measured = calibrator(plan).run()
    assert [p.name for p in measured.points] == ["idle-bare", "idle-context", "anchor-end"]
    assert all(reason.endswith(("out of time",)) for reason in measured.skipped)


def test_points_can_be_fitted_again_without_a_gpu(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(
        calibrate,
        "EnergyMonitor",
        types.SimpleNamespace(for_assigned_devices=lambda: contextlib.nullcontext(FakeMonitor())),
    )
    console = Console(file=io.StringIO(), width=150)
    raw = tmp_path / "raw.json"
    first = calibrate.calibrate(tmp_path / "mine.json", device="cpu", raw=raw, console=console)
    again = calibrate.calibrate(tmp_path / "again" / "mine.json", points=raw, console=console)
    assert again.profile == first.profile
    assert CostModel.load(tmp_path / "mine.json").profile.name == "mine"
    assert "held-out error" in console.file.getvalue()


def test_a_gpu_that_is_not_there_is_named():
    if torch.cuda.device_count():
        pytest.skip("needs a host without a GPU")
    with pytest.raises(ValueError, match="device: expected a CUDA GPU"):
        calibrate.calibrate(None, device="cuda")


# --- the steps themselves -------------------------------------------------------------------------------


def test_a_training_step_is_the_trials_own():
    step = TrainStep(tiny("train_step"), CPU)
    before = [p.detach().clone() for p in step.model.parameters()]
    step.park()
    assert not step.trainer.optimizer.state
    step.unpark()
    steps = step.run()
    assert steps == len(step.trainer.split.blocks_NS) // step.trainer.config.batch_size
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


@pytest.mark.parametrize("opened", [1, 2, 4])
def test_a_decode_step_opens_no_more_experts_than_asked(opened):
    step = DecodeStep(tiny("decode_step", batch_size=48), CPU)
    found = step.configure({"open": opened})["open_experts"]
    assert opened - 1 < found <= opened
    step.run()
    step.run()
    assert all(int(layer.cumulative_length) == step.context for layer in step.cache.layers)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")), reason="needs a GPU")
def test_a_decode_step_is_the_one_that_generate_replays():
    pytest.importorskip("triton", reason="needs Triton")
    cuda = torch.cuda.is_available()
    shape = {**tiny("decode_step")["shape"], "d_model": 64, "num_heads": 2, "expert_widths": [64] * 4, "top_k": 2}
    step = DecodeStep(
        tiny("decode_step", batch_size=3, seq_len=16, shape=shape), torch.device("cuda" if cuda else "cpu")
    )
    replay = step._replay if cuda else step._graphed(torch.float32, graph=False)
    assert step.own_step
    first = replay.func.__self__.logits_TV.clone()
    replay()
    assert torch.equal(replay.func.__self__.logits_TV, first)  # it stays where it is
    found = step.configure({"open": 2})
    replay()
    assert found == {"open_experts": 2.0, "own_step": 1.0}
    assert not torch.equal(replay.func.__self__.logits_TV, first)  # experts were barred in the captured step too


def test_made_up_text_has_the_frequencies_of_text():
    ids_NS = zipf_tokens(16, 256, 1000)
    assert ids_NS.dtype == torch.int32
    counts_V = torch.bincount(ids_NS.flatten(), minlength=1000)
    assert counts_V[:10].sum() > counts_V[500:].sum()
    assert torch.equal(ids_NS, zipf_tokens(16, 256, 1000))


# --- real processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_reports_errors_and_its_own_end():
    worker = Worker("cpu", threads=1)
    try:
        worker.answer(120.0)
        with pytest.raises(WorkerError, match="no-such-kind"):
            worker.call("prepare", ProbeSpec(name="x", kind="no-such-kind", params={}))
        worker.process.kill()
        with pytest.raises(WorkerError, match="gone"):
            worker.call("describe")
    finally:
        worker.stop()


@pytest.mark.slow
def test_a_whole_small_calibration_on_the_cpu(tmp_path):
    console = Console(file=io.StringIO(), width=150)
    model = calibrate.calibrate(tmp_path / "cpu.json", device="cpu", console=console)
    assert not model.analytic
    points = Calibration.read(tmp_path / "cpu.points.json")
    assert points.skipped == ()
    assert {p.kind for p in points.points} >= set(STEP_PHASES) | {"gemm", "copy", "grouped", "idle", "anchor"}
    assert "W" in console.file.getvalue()
