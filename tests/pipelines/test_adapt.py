"""`adapt`, `scan` and `eval` on a small checkpoint. Joules are made from what the routers really chose, so that λ acts
through the model; the clock is the telemetry's own, so that nothing depends on this machine's speed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from hwcost import CostModel, EnergyMonitor, Measurement
from hwcost.ops import ModelShape
from hwcost.readers import DeviceInfo
from moe import EnergyAwareTTTRouter, HardwareFeedback, MoEGPT2Config, MoEGPT2LMHeadModel, PriceLearner, TTTSettings
from moe.budget import LearntPrice
from pipelines import adapt as adapts
from pipelines import adapting, cli
from pipelines import scan as scanning
from pipelines.adapt import AdaptPlan, BudgetError, adapt
from pipelines.adapting import Stream, Window, modelled_chunks, price_learner, thermal_guard, with_learnt
from pipelines.checkpoint import Loaded, load_checkpoint
from pipelines.cli_models import _cost_of_adapting
from pipelines.config import ConfigError
from pipelines.model import model_shape
from pipelines.prices import Prices
from pipelines.records import AdaptRecord, Store, TrialRecord, to_table
from pipelines.scan import ScanPoint, broken, scan, worth_training, write_scan

KEYS: dict[str, Any] = {"batch_size": 4, "seq_len": 32, "max_eval_tokens": 512, "measure_seconds": 0.01, "threads": 1}
KEYS |= {"decode_batches": [2], "decode_prompt_tokens": 4, "decode_new_tokens": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Experts of four widths and a gate with opinions, so that joules fall smoothly with λ."""
    torch.manual_seed(0)
    config = MoEGPT2Config(
        vocab_size=512, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        expert_widths=[128, 64, 32, 0], router="energy", initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    MoEGPT2LMHeadModel(config).save_pretrained(path)
    return str(path)


class Meter:
    """A monitor whose joules are 1 per token and 0.02 per neuron chosen, times `load`; 3 chunks fill a window."""

    source, devices = "counter", ()

    def __init__(self) -> None:
        self.load, self.ticks, self.stream = 1.0, itertools.count(), None
        self.memory_bytes: int | None = None
        self.heat_c: Iterator[float | None] = itertools.repeat(None)
        self.system = types.SimpleNamespace(history=())
        self.clock = types.SimpleNamespace(monotonic=lambda: 0.0)

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[Any]:
        held = types.SimpleNamespace(measurement=None)
        yield held
        stream = self.stream
        assert stream is not None
        widths = torch.tensor(stream.ttt.model.config.expert_widths, dtype=torch.float64)
        neurons = float(stream.counts.chosen_E.double() @ widths)
        energy = self.load * (stream.counts.tokens + 0.02 * neurons)
        held.measurement = Measurement(
            name=name, energy_j=energy, duration_s=1.2, source="counter", max_memory_bytes=self.memory_bytes,
            max_temperature_c=next(self.heat_c),
        )  # fmt: skip


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    monkeypatch.setattr(adapting.time, "monotonic", lambda: 0.1 * next(meter.ticks))
    before = Stream.__init__

    def remember(self: Stream, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        meter.stream = self

    monkeypatch.setattr(Stream, "__init__", remember)
    return meter


def load(path: str, **changes: Any) -> Loaded:
    with EnergyMonitor.for_assigned_devices() as monitor:
        return load_checkpoint(path, KEYS | {"max_train_tokens": 20000} | changes, monitor)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_budget_inside_the_range_is_kept(checkpoint: str, meter: Meter, tmp_path: Path, share: float) -> None:
    said: list[str] = []
    plan = AdaptPlan(budget_share=share, windows=26)
    found = adapt(load(checkpoint), meter, plan, out=tmp_path, say=said.append)  # type: ignore[arg-type]
    assert found.reach.least_j < found.budget_j_per_token < found.reach.most_j
    settled = found.windows[6:]
    mean = sum(w.measurement.energy_j or 0.0 for w in settled) / sum(w.tokens for w in settled)
    assert mean == pytest.approx(found.budget_j_per_token, rel=0.015)
    rows = Store(tmp_path).read(AdaptRecord).to_pylist()
    assert [row["window"] for row in rows] == [w.index for w in found.windows]
    assert not rows[-1]["infeasible"]
    (trial,) = Store(tmp_path).read(TrialRecord).to_pylist()
    assert trial["train_energy_j"] is None
    assert trial["eval_energy_j"] == pytest.approx(sum(row["energy_j"] for row in rows))
    assert any(line.startswith("reachable") for line in said)


def test_the_load_changes_half_way_and_feedback_returns_to_the_budget(
    checkpoint: str, meter: Meter, tmp_path: Path
) -> None:
    def on_window(window: Window, budget: float) -> None:
        if len(seen) == 15:
            meter.load = 1.08
        seen.append(window)

    seen: list[Window] = []
    plan = AdaptPlan(budget_share=0.6, windows=70)
    found = adapt(load(checkpoint), meter, plan, out=tmp_path, on_window=on_window)  # type: ignore[arg-type]
    assert max(w.j_per_token or 0.0 for w in seen[15:20]) > 1.04 * found.budget_j_per_token
    settled = seen[-30:]  # a window of this small stream is off by some 4 % by itself
    mean = sum(w.measurement.energy_j or 0.0 for w in settled) / sum(w.tokens for w in settled)
    assert mean == pytest.approx(found.budget_j_per_token, rel=0.015)


def test_a_budget_below_the_range_is_refused_in_words_or_flagged(checkpoint: str, meter: Meter, tmp_path: Path) -> None:
    loaded = load(checkpoint)
    with pytest.raises(BudgetError, match=r"budget: expected .* J/token, which λ can reach here"):
        adapt(loaded, meter, AdaptPlan(budget_j_per_token=0.5), out=tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    plan = AdaptPlan(budget_j_per_token=0.5, force=True, windows=8)
    found = adapt(loaded, meter, plan, out=tmp_path)  # type: ignore[arg-type]
    assert found.windows[-1].report is not None
    assert found.windows[-1].report.infeasible


def test_a_budget_above_the_range_leaves_the_price_at_zero(checkpoint: str, meter: Meter, tmp_path: Path) -> None:
    said: list[str] = []
    plan = AdaptPlan(budget_j_per_token=1e3, windows=4)
    found = adapt(load(checkpoint), meter, plan, out=tmp_path, say=said.append)  # type: ignore[arg-type]
    assert {w.energy_lambda for w in found.windows} == {0.0}
    assert any("the price stays at 0" in line for line in said)


def test_adapting_leaves_the_checkpoint_as_it_was(checkpoint: str, meter: Meter, tmp_path: Path) -> None:
    loaded = load(checkpoint)
    gates = {n: p.clone() for n, p in loaded.model.named_parameters()}
    adapt(loaded, meter, AdaptPlan(budget_share=0.5, windows=3), out=tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(p, gates[n]) for n, p in loaded.model.named_parameters())
    assert all((router.offset_E == 0).all() for router in loaded.model.routers)
    assert not any(router.keep_first for router in loaded.model.routers)
    assert loaded.model.config.energy_lambda == loaded.config.energy_lambda


def test_the_joules_of_updates_are_the_windows_by_their_share_of_its_time(
    checkpoint: str, meter: Meter, tmp_path: Path
) -> None:
    plan = AdaptPlan(budget_share=0.5, windows=12, settings=TTTSettings(update_share=0.5))
    found = adapt(load(checkpoint), meter, plan, out=tmp_path)  # type: ignore[arg-type]
    rows = Store(tmp_path).read(AdaptRecord).to_pylist()
    updating = [row for row in rows if row["updates"]]
    assert updating
    assert all(
        row["update_energy_j"] == pytest.approx(row["energy_j"] * row["update_duration_s"] / row["duration_s"])
        for row in rows
    )
    assert 0 < updating[0]["update_energy_j"] < updating[0]["energy_j"]
    line = _cost_of_adapting(found.windows)
    total = sum(row["update_energy_j"] for row in rows)
    assert f"and, by it, {total:.4g} of {sum(row['energy_j'] for row in rows):.4g} J" in line
    assert {row["modelled_j"] for row in rows} == {None}  # no GPU, whose joules the cost model could know
    assert "modelled" not in line
    guessed = [
        dataclasses.replace(w, measurement=dataclasses.replace(w.measurement, source="modelled")) for w in found.windows
    ]
    assert " J (modelled), which" in _cost_of_adapting(guessed)
    assert "(modelled)" not in line


def test_feedback_tells_memory_and_the_cost_models_joules(
    checkpoint: str, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(checkpoint)
    meter.devices = (DeviceInfo(device_id="GPU-1", kind="gpu", memory_bytes=1000),)  # type: ignore[assignment]
    heard: list[HardwareFeedback] = []
    ttt = EnergyAwareTTTRouter(loaded.model, canary_BS=loaded.corpus.splits["validation"].blocks_NS[:2].long())
    before = ttt.ttt_update

    def listen(feedback: HardwareFeedback | None = None, *, update: bool | None = None) -> Any:
        if feedback is not None:
            heard.append(feedback)
        return before(feedback, update=update)

    monkeypatch.setattr(ttt, "ttt_update", listen)
    shape = model_shape(loaded.model.config, loaded.hardware)
    model = CostModel.for_device("NVIDIA H200", 700.0)
    stream = Stream(
        ttt,
        loaded.corpus.splits["train"].blocks_NS,
        meter,  # type: ignore[arg-type]
        batch_size=4,
        window_s=0.1,
        modelled=modelled_chunks(model, shape, 32),
    )
    meter.memory_bytes = 250
    (window,) = stream.run(1)
    assert (window.memory_fraction, heard[0].memory_fraction) == (0.25, 0.25)
    assert window.modelled_j == heard[0].modelled_j
    assert window.modelled_j is not None
    assert window.modelled_j > 0
    meter.memory_bytes = None
    (window,) = stream.run(1)
    assert window.memory_fraction is None


def test_modelled_joules_follow_the_width_that_was_selected_and_the_tokens() -> None:
    shape = ModelShape(expert_widths=(3072, 1536, 0, 0), top_k=1)
    model = CostModel.for_device("NVIDIA H200", 700.0)
    joules = modelled_chunks(model, shape, 1024)

    def of(chosen: list[int], chunks: int = 1) -> float:
        counts = adapting.Counts(tokens=16 * 1024 * chunks, chosen_E=chunks * torch.tensor(chosen))
        found = joules(counts, 16, None)
        assert found is not None
        return found

    slots = 6 * 16 * 1024
    wide, narrow, none = of([slots, 0, 0, 0]), of([0, slots, 0, 0]), of([0, 0, slots, 0])
    assert wide > narrow > none
    assert of([slots, 0, 0, 0], chunks=3) == pytest.approx(3 * wide)
    whole = dataclasses.replace(shape, expert_widths=(3072,) * 4)
    assert wide == pytest.approx(model.get_cost("prefill", 16, 1024, shape=whole, extrapolate=True).energy_j)
    assert joules(adapting.Counts(), 16, None) is None


def test_adapt_rows_of_an_older_version_read_with_nulls(tmp_path: Path) -> None:
    values: dict[str, Any] = {"sweep_id": "adapt", "trial_id": "a", "attempt": 0, "window": 1, "energy_lambda": 0.1}
    values |= {"budget_j_per_token": 1.0, "tokens": 9, "loss_nats": 2.0, "batch_size": 1, "duration_s": 1.0}
    row = AdaptRecord(**values, updates=0, update_duration_s=0.0, events=[])
    added = ["modelled_j", "update_energy_j", "memory_fraction"]
    table = to_table(AdaptRecord, [row]).drop_columns(added)
    store = Store(tmp_path)
    path = Path(store.path(AdaptRecord, "adapt", "a", 0))
    path.parent.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata({"schema_version": "4", "table": "adapt"}), path)
    (back,) = store.read(AdaptRecord).to_pylist()
    assert {back[name] for name in added} == {None}
    assert back["tokens"] == 9


def test_a_hot_gpu_shrinks_the_next_batch_and_it_grows_back(checkpoint: str, meter: Meter) -> None:
    loaded = load(checkpoint)
    blocks_NS = loaded.corpus.splits["train"].blocks_NS
    ttt = EnergyAwareTTTRouter(loaded.model, canary_BS=blocks_NS[:2].long())
    stream = Stream(
        ttt, blocks_NS, meter, batch_size=8, window_s=0.1, thermal=lambda degrees, most: 3 if degrees > 80 else most  # type: ignore[arg-type]
    )  # fmt: skip
    assert stream._cool(70.0) == []
    assert stream._cool(85.0) == ["batch 8 to 3: 85 °C"]
    assert stream.chunk().shape[0] == 3
    assert stream._cool(None) == []
    assert stream._cool(60.0) == ["batch 3 to 8: 60 °C"]


def test_a_stream_heeds_the_profile_of_its_board(checkpoint: str, meter: Meter) -> None:
    """Slowdown at 89 °C, a margin of 5 °C: over 84 °C no batch is safe, and one sequence at a time goes on."""
    loaded = load(checkpoint)
    blocks_NS = loaded.corpus.splits["train"].blocks_NS
    model = CostModel.for_device("NVIDIA H200", 700.0)
    assert not model.analytic
    guard = thermal_guard(model, model_shape(loaded.model.config, loaded.hardware), blocks_NS.shape[1])
    ttt = EnergyAwareTTTRouter(loaded.model, canary_BS=blocks_NS[:2].long())
    stream = Stream(ttt, blocks_NS, meter, batch_size=8, window_s=0.1, thermal=guard)  # type: ignore[arg-type]
    limit_c = model.profile.thermal.slowdown_c - 5
    meter.heat_c = iter([70.0, limit_c, limit_c + 1, 92.0, limit_c, 60.0, 60.0])
    windows = list(stream.run(7))
    # a window is read a moment into the next one, whose batch it changes from there on
    assert [w.batch_size for w in windows] == [8, 8, 8, 8, 1, 1, 8]
    assert windows[4].tokens < windows[0].tokens / 4
    assert [w.events for w in windows if w.events] == [("batch 8 to 1: 85 °C",), ("batch 1 to 8: 84 °C",)]


def test_warming_up_keeps_the_routers_and_what_learning_costs(checkpoint: str, meter: Meter) -> None:
    loaded = load(checkpoint)
    blocks_NS = loaded.corpus.splits["train"].blocks_NS
    ttt = EnergyAwareTTTRouter(loaded.model, canary_BS=blocks_NS[:2].long())
    before = ttt.state()
    Stream(ttt, blocks_NS, meter, batch_size=4, window_s=0.1).warm_up()  # type: ignore[arg-type]
    after = ttt.state()
    assert torch.equal(after.offset_LE, before.offset_LE)
    assert (after.chunks, after.energy_lambda) == (before.chunks, before.energy_lambda)
    assert after.cost_ratio != before.cost_ratio


def test_the_range_is_measured_without_updates_and_told_with_what_they_will_cost(
    checkpoint: str, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, learnt = load(checkpoint), list[float]()
    blocks_NS = loaded.corpus.splits["train"].blocks_NS
    ttt = EnergyAwareTTTRouter(
        loaded.model, canary_BS=blocks_NS[:2].long(), settings=TTTSettings(update_share=0.5)
    )  # every other chunk, did it learn
    stream = Stream(ttt, blocks_NS, meter, batch_size=4, window_s=0.1)  # type: ignore[arg-type]
    learn = ttt._learn
    monkeypatch.setattr(ttt, "_learn", lambda *args: learnt.append(loaded.model.config.energy_lambda) or learn(*args))
    reach, windows = adapting.measure_reach(stream, (0.0, 1.0, 4.0))
    assert len(learnt) == adapting.WARM_UP_CALLS + 2  # the warm-up's
    assert {w.updates for w in windows} == {0}
    assert {float(ttt.offsets().abs().max())} == {0.0}
    assert 0.25 < ttt.cost_share <= 0.5
    first = [w.j_per_token for w in windows[:2]]
    assert reach.most_j == pytest.approx((1 + ttt.cost_share) * sum(first) / 2)  # type: ignore[arg-type]


def test_the_controller_of_a_stream_hears_updates_evenly(checkpoint: str, meter: Meter, tmp_path: Path) -> None:
    """Their joules here are made up from their time alone: what a window lacks, the next ones get."""
    plan = AdaptPlan(budget_share=0.5, windows=16, settings=TTTSettings(update_share=0.1))
    found = adapt(load(checkpoint), meter, plan, out=tmp_path)  # type: ignore[arg-type]
    assert 3 <= sum(w.updates for w in found.windows) < 16
    told = [w.j_per_token for w in found.windows]
    heard = [w.report.heard_j_per_token for w in found.windows if w.report is not None]
    assert heard != told
    assert sum(heard) / 16 == pytest.approx(sum(told) / 16, rel=0.05)  # type: ignore[arg-type]


def test_prices_are_learnt_from_what_was_counted(checkpoint: str) -> None:
    loaded = load(checkpoint)
    shape = model_shape(loaded.model.config, loaded.hardware)
    learner, read = price_learner(CostModel.for_device(None, None), shape, 32)
    assert set(learner.table_j) >= {"token", "join 32", "join 64", "join 128", "open"}
    per_expert = CostModel.for_device(None, None).expert_price(
        d_model=shape.d_model,
        widths=shape.expert_widths,
        top_k=shape.top_k,
        tokens=32,
        dtype=shape.dtype,
        phase="prefill",
    )
    computing = sum(width > 0 for width in shape.expert_widths)
    assert learner.table_j["open"] == pytest.approx(sum(per_expert.open_j) / computing)
    # The last expert is null: choosing it opens nothing.
    counts = adapting.Counts(tokens=64, chosen_E=torch.tensor([10, 20, 30, 68]), open_E=torch.tensor([2, 1, 3, 2]))
    static_w = CostModel.for_device(None, None).static_w
    found = read(counts, Measurement(name="adapt", energy_j=5.0 + 2 * static_w, duration_s=2.0))
    assert found is not None
    values, energy = found
    assert energy == pytest.approx(5.0)
    assert (values["token"], values["join 128"], values["join 64"], values["join 32"], values["open"]) == (
        64,
        10,
        20,
        30,
        6,
    )
    assert read(counts, Measurement(name="adapt")) is None


def test_trusted_learnt_prices_replace_the_tables_in_its_own_unit() -> None:
    table = Prices(join=(1.0, 0.5, 0.25, 0.0), open=(60.0, 30.0, 15.0, 0.0), c_ref_j=2e-5, profile="p")

    def learnt(name: str, joules: float, trusted: bool) -> LearntPrice:
        return LearntPrice(name=name, table_j=1e-5, learnt_j=joules, low_j=0.0, high_j=1.0, trusted=trusted)

    found = [learnt("token", 9.0, True), learnt("join 128", 3e-5, True), learnt("join 64", 9.0, False)]
    found += [learnt("open", 9.0, True)]
    prices, names = with_learnt(table, found, (128, 64, 32, 0))
    assert names == ("join 128",)
    assert prices == dataclasses.replace(table, join=(1.5, 0.5, 0.25, 0.0))
    assert with_learnt(table, found[2:], (128, 64, 32, 0)) == (table, ())


@pytest.mark.parametrize("trusted", [True, False])
def test_learnt_prices_go_on_the_routers_if_asked_and_trusted_and_come_off_again(
    checkpoint: str, meter: Meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    loaded, said, joins = load(checkpoint), list[str](), list[list[float]]()
    assert loaded.prices is not None
    table = loaded.prices["prefill"]
    twice = 2 * table.c_ref_j

    def prices(self: Any) -> tuple[LearntPrice, ...]:
        values = {"table_j": twice / 2, "learnt_j": twice, "low_j": twice, "high_j": twice, "trusted": trusted}
        return (LearntPrice(name="join 128", **values),)

    def on_window(window: Window, budget: float) -> None:
        joins.append(loaded.model.routers[0].join_E.tolist())

    monkeypatch.setattr(PriceLearner, "prices", prices)
    plan = AdaptPlan(budget_share=0.5, windows=3, dither_windows=2, use_learnt=True)
    found = adapt(loaded, meter, plan, out=tmp_path, say=said.append, on_window=on_window)  # type: ignore[arg-type]
    expected = [2.0 if trusted else table.join[0], *table.join[1:]]
    assert joins == [pytest.approx(expected)] * 3
    assert loaded.model.routers[0].join_E.tolist() == pytest.approx(list(table.join))
    assert found.record.price_prefill_join == pytest.approx(expected)
    event = "learnt prices: join 128" if trusted else "no learnt price to trust"
    rows = Store(tmp_path).read(AdaptRecord).to_pylist()
    assert [event in row["events"] for row in rows] == [True, False, False]
    assert any(("On the routers: learnt join 128; the rest" if trusted else "keep the table's.") in s for s in said)


def test_learnt_prices_need_dithered_windows_and_joules(checkpoint: str, meter: Meter, tmp_path: Path) -> None:
    plan = AdaptPlan(budget_share=0.5, use_learnt=True)
    with pytest.raises(ConfigError, match=r"use_learnt: expected windows with dithered shares"):
        adapt(load(checkpoint), meter, plan, out=tmp_path)  # type: ignore[arg-type]
    plan = dataclasses.replace(plan, dither_windows=2)
    with pytest.raises(ConfigError, match=r"price: expected joules where learnt prices are used, got shuffled"):
        adapt(load(checkpoint, price="shuffled"), meter, plan, out=tmp_path)  # type: ignore[arg-type]


# scan


def point(**changes: Any) -> ScanPoint:
    values: dict[str, Any] = {
        "energy_lambda": 0.0, "loss_nats": 3.0, "routing_diversity": 1.0, "effective_experts": 4.0, "agreement": 1.0,
        "flip_fraction": 0.0, "position_open_experts": 4.0, "mean_selected_width": 100.0, "prefill_j_per_token": 1.0,
        "decode_j_per_token": 1.0, "modelled_train_j_per_token": None, "energy_source": "counter",
    }  # fmt: skip
    return ScanPoint(**(values | changes))


def test_a_walk_ends_where_loss_or_diversity_breaks() -> None:
    free = point()
    assert broken(free, point(energy_lambda=0.1, loss_nats=3.05)) is None
    assert "nat above" in str(broken(free, point(energy_lambda=1.0, loss_nats=3.2)))
    assert "nat above" in str(broken(free, point(energy_lambda=1.0, loss_nats=float("nan"))))
    assert "diversity is 0.40" in str(broken(free, point(energy_lambda=1.0, routing_diversity=0.4)))


def test_the_range_worth_training_is_where_the_price_acts() -> None:
    flips = {1e-4: 0.0, 1e-2: 0.02, 0.1: 0.3, 1.0: 0.6, 10.0: 0.6, 100.0: 0.6}
    points = [point(), *(point(energy_lambda=x, flip_fraction=f) for x, f in flips.items())]
    assert worth_training(points) == (1e-2, 1.0)
    assert worth_training(points[:2]) is None
    assert worth_training([*points[:4], point(energy_lambda=1.0, flip_fraction=0.6, loss_nats=4.0)]) == (1e-2, 0.1)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"flip_fraction": 0.3}, "Worth training: λ from 1 to 1."),
        ({"flip_fraction": 0.001}, "No λ of the walk changed decisions"),
        ({"flip_fraction": 0.001, "loss_nats": 4.0}, "No λ of the walk changed decisions"),
        ({"flip_fraction": 0.3, "loss_nats": 4.0}, "The first λ of the walk that changed decisions, 1, broke"),
        ({"flip_fraction": 0.3, "routing_diversity": 0.2}, r"between 0\.01 and 1 \(--lambdas\)\.$"),
    ],
)
def test_a_scan_tells_a_price_that_never_acts_from_one_that_breaks_at_once(last: dict[str, float], said: str) -> None:
    points = (point(), point(energy_lambda=0.01), point(energy_lambda=1.0, **last))
    worth = worth_training(points)
    found = scanning.Scan(checkpoint="model", sequences=4, points=points, stopped="it had to", worth=worth)
    assert re.search(said, scanning.verdict(found))


def test_a_scan_command_says_that_the_first_acting_price_broke_the_loss(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "broken", lambda free, p: "the loss broke" if p.energy_lambda > 0 else None)
    keys = [f"--set={key}={value}" for key, value in KEYS.items()]
    walked = CliRunner().invoke(cli.app, ["scan", checkpoint, "--lambdas=3", f"--out={tmp_path}", *keys])
    assert walked.exit_code == 0, walked.output
    assert "open: distinct experts that compute at a position of 4 sequences" in walked.output
    assert "that changed decisions, 3, broke loss or diversity too" in walked.output
    assert not (tmp_path / "space.yaml").exists()


def test_a_scan_writes_its_curve_and_a_space_that_loads(checkpoint: str, tmp_path: Path) -> None:
    from pipelines.plan import plan_sweep
    from tune_spaces import load_space

    loaded = load(checkpoint)
    with EnergyMonitor.for_assigned_devices() as monitor:
        found = scan(loaded, monitor, (1e-5, 0.3, 3.0))
    assert [p.energy_lambda for p in found.points] == [0.0, 1e-5, 0.3, 3.0]
    assert found.points[0].agreement == pytest.approx(1.0)
    assert found.points[3].mean_selected_width < found.points[0].mean_selected_width
    assert loaded.model.config.energy_lambda == 0.0
    paths = write_scan(found, loaded, tmp_path)
    assert [p.name for p in paths] == ["scan.json", "scan.png", "scan.svg", "space.yaml"]
    assert yaml.safe_load(paths[3].read_text())["trial"]["energy_lambda"]["grid"][0] == 0.0
    assert len(plan_sweep(load_space(paths[3])).trials) >= 2


SCANNED = (
    "expert_widths", "num_experts_per_tok", "moe_layers", "router", "router_temperature", "router_top_p",
    "router_jitter", "capacity_factor", "bias_balance_rate", "regularizers", "resid_pdrop",
)  # fmt: skip


def test_the_space_of_a_scan_trains_what_was_scanned(tmp_path: Path) -> None:
    from pipelines.model import moe_config_of
    from pipelines.plan import plan_sweep
    from tune_spaces import load_space

    config = MoEGPT2Config(
        vocab_size=512, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        expert_widths=[128, 64, 32, 0], router="energy", num_experts_per_tok=1, moe_layers=[1], router_temperature=0.5,
        router_top_p=0.8, router_jitter=0.02, capacity_factor=2.0, bias_balance_rate=0.01, regularizers={"cv2": 0.03},
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, energy_lambda=0.7,
    )  # fmt: skip
    MoEGPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    changes = {
        "price": "params",
        "dtype": "fp32",
        "learning_rate": 1e-3,
        "epochs": 2,
        "schedule": "constant",
        "seed": 3,
    }
    loaded = load(str(tmp_path / "model"), **changes)
    points = (point(), point(energy_lambda=0.1, flip_fraction=0.2), point(energy_lambda=1.0, flip_fraction=0.4))
    found = scanning.Scan(checkpoint="model", sequences=4, points=points, stopped="it had to", worth=(0.1, 1.0))
    space = write_scan(found, loaded, tmp_path / "scan")[-1]
    assert "Not the model's" not in space.read_text()
    trials = plan_sweep(load_space(space)).trials
    assert [trial.energy_lambda for trial in trials] == [0.0, 0.1, 0.215, 0.464, 1.0]
    for trial in trials[1:]:
        same = {key: value for key, value in trial.effective().items() if key not in ("base", "energy_lambda")}
        assert same == {key: value for key, value in loaded.config.effective().items() if key in same}
        assert set(loaded.config.effective()) - set(same) == {"base", "energy_lambda"}
        assert trial.seed == 3
        built = moe_config_of(trial, config)
        for key in SCANNED:
            assert getattr(built, key) == getattr(config, key), key


def test_a_space_says_what_it_cannot_say_of_a_model() -> None:
    config = MoEGPT2Config(
        n_embd=32, n_inner=128, mixing="probability", shared_expert_width=16, regularizers={"cv2": 0.1, "z_loss": 0.1}
    )
    said = scanning.unsaid_keys(config)
    assert said[:2] == ["mixing = probability", "shared_expert_width = 16"]
    assert said[2].startswith("regularizers = ")
    assert scanning.unsaid_keys(MoEGPT2Config()) == []


def test_a_scan_weighs_opening_at_each_lambda_and_adapt_at_the_highest(
    checkpoint: str, meter: Meter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def weigh(config: Any, model_config: Any, hardware: Any, *, energy_lambda: float | None = None) -> None:
        asked.append(model_config.energy_lambda if energy_lambda is None else energy_lambda)

    monkeypatch.setattr(scanning, "weigh_opening", weigh)
    monkeypatch.setattr(adapts, "weigh_opening", weigh)
    loaded = load(checkpoint)
    with EnergyMonitor.for_assigned_devices() as monitor:
        scan(loaded, monitor, (0.1,))
    assert asked == [0.0, 0.1, 0.0]  # and as it was
    adapt(loaded, meter, AdaptPlan(budget_share=0.5, windows=2), out=tmp_path)  # type: ignore[arg-type]
    assert asked[3:] == [adapts.REACH_LAMBDAS[-1]]


@pytest.mark.parametrize("router", ["energy", "opening"])
def test_a_rising_price_closes_experts_in_a_scan(router: str, checkpoint: str, tmp_path: Path) -> None:
    """While, over whole batches, each expert is taken by somebody for longer."""
    model = MoEGPT2LMHeadModel.from_pretrained(checkpoint, router=router)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    with EnergyMonitor.for_assigned_devices() as monitor:
        found = scan(loaded, monitor, (0.1, 0.3, 1.0, 3.0))
    opened = [p.position_open_experts for p in found.points]
    assert found.sequences == 4
    assert opened == sorted(opened, reverse=True)
    assert opened[-1] < 0.8 * opened[0]
    assert opened[0] < 3  # of three that compute, though a whole batch takes each
    labels = [line.get_label() for line in scanning.draw(found).axes[2].get_lines()]
    assert "open experts of 4 sequences" in labels


def test_a_scan_tells_the_joules_of_each_phase_as_each_was_measured(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill falls with the width that λ leaves; decode has its own; both stand in the file and in the figure."""

    def joules(phase: str) -> Any:
        def measured(model: Any, *_: Any) -> Any:
            price = 2.0 if phase == "prefill" else 5.0
            return types.SimpleNamespace(j_per_token=price / (1 + model.config.energy_lambda))

        return measured

    for phase in ("prefill", "decode"):
        monkeypatch.setattr(scanning, f"measure_{phase}", joules(phase))
    loaded = load(checkpoint)
    with EnergyMonitor.for_assigned_devices() as monitor:
        found = scan(loaded, monitor, (1e-5, 0.25))
    last = found.points[-1]
    assert (last.prefill_j_per_token, last.decode_j_per_token) == pytest.approx((1.6, 4.0))
    data = json.loads(write_scan(found, loaded, tmp_path)[0].read_text())
    assert [point["decode_j_per_token"] for point in data["points"]] == pytest.approx([5.0, 5.0, 4.0], rel=1e-4)
    lines = {line.get_label(): line.get_ydata() for line in scanning.draw(found).axes[2].get_lines()}
    assert lines["prefill"][-1] == pytest.approx(0.8)
    assert lines["decode"][-1] == pytest.approx(0.8)
    assert "training, modelled" not in lines  # no GPU: nobody knows


# commands


def test_upcycle_and_eval(tmp_path: Path) -> None:
    import transformers

    dense = tmp_path / "dense"
    shape = transformers.GPT2Config(vocab_size=512, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(shape).save_pretrained(dense)
    runner, out = CliRunner(), str(tmp_path / "moe")
    made = runner.invoke(cli.app, ["upcycle", str(dense), out, "--widths", "1,0.5,0", "--top-k", "2"])
    assert made.exit_code == 0, made.output
    keys = [f"--set={key}={value}" for key, value in KEYS.items()]
    judged = runner.invoke(cli.app, ["eval", out, "--json", *keys])
    assert judged.exit_code == 0, judged.output
    found = yaml.safe_load(judged.stdout)
    assert found["loss_nats"] > 0
    assert found["prefill_j_per_token"] > 0
    assert found["decode_j_per_token_b2"] > 0
    assert runner.invoke(cli.app, ["eval", str(dense), "--json", *keys]).exit_code == 0
    again = runner.invoke(cli.app, ["upcycle", str(dense), out])
    assert isinstance(again.exception, ConfigError)
    twice = runner.invoke(cli.app, ["upcycle", out, str(tmp_path / "twice")])
    assert isinstance(twice.exception, ConfigError)
    assert str(twice.exception) == f"base: expected a dense GPT-2, got {out} (model_type moe_gpt2)"
    assert not (tmp_path / "twice").exists()


def test_eval_compares_routers(tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "expert_widths": [64] * 3}
    for name, more in (("one", {}), ("two", {}), ("narrow", {"n_embd": 16})):
        config = MoEGPT2Config(**(shape | {"num_experts_per_tok": 1, "router": "energy"} | more))
        MoEGPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    one, two, narrow = (str(tmp_path / name) for name in ("one", "two", "narrow"))
    keys = [f"--set={key}={value}" for key, value in (KEYS | {"seq_len": 64, "max_eval_tokens": 4096}).items()]

    def judge(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["eval", one, "--json", *keys, *arguments])

    itself = yaml.safe_load(judge("--oracle", "--against", one).stdout)
    assert itself["layer_other_agreement"] == pytest.approx([1.0, 1.0])
    assert len(itself["layer_oracle_agreement"]) == 2
    assert itself["oracle_agreement"] == pytest.approx(sum(itself["layer_oracle_agreement"]) / 2)
    assert abs(itself["oracle_agreement"]) < 0.5  # an untrained router is no oracle
    other = yaml.safe_load(judge("--against", two).stdout)
    assert other["other_agreement"] < 0.9
    assert "oracle_agreement" not in other
    for arguments, message in (
        (["--against", narrow], "other: expected a model of width 32, got 16"),
        (["--against", "/nowhere"], "against: expected a model in /nowhere"),
        (["--oracle", "--set=max_eval_tokens=512"], "batches: expected at least 2048 predicted tokens"),
    ):
        found = judge(*arguments)
        assert isinstance(found.exception, ConfigError)
        assert message in str(found.exception)


@pytest.mark.parametrize("top_k", [1, 2])
def test_upcycle_without_noise_is_exact(tmp_path: Path, top_k: int) -> None:
    import transformers

    from moe.upcycling import upcycling_error

    shape = transformers.GPT2Config(vocab_size=512, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    dense, out = transformers.GPT2LMHeadModel(shape), str(tmp_path / "moe")
    dense.save_pretrained(tmp_path / "dense")
    arguments = [str(tmp_path / "dense"), out, "--experts=3", f"--top-k={top_k}", "--noise"]
    errors = []
    for noise in ("0", "0.05"):
        made = CliRunner().invoke(cli.app, ["upcycle", *arguments, noise])
        assert made.exit_code == 0, made.output
        model = MoEGPT2LMHeadModel.from_pretrained(out)
        errors.append(upcycling_error(dense, model, torch.arange(32)[None]))
        shutil.rmtree(out)
    assert errors[0] < 1e-5 < errors[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/nowhere"], "checkpoint: expected a folder with a config.json, got /nowhere"),
        (["adapt", "/nowhere"], "budget: expected --budget-j-per-token or --budget-share"),
        (["scan", "/nowhere", "--lambdas", "a"], "lambdas: expected numbers"),
        (["upcycle", "/nowhere", "/tmp/x", "--widths", "1", "--router", "no"], "router: expected one of"),
    ],
)
def test_bad_input_names_the_key(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(cli.app, arguments)
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)


def test_a_router_without_a_price_cannot_keep_a_budget(checkpoint: str, meter: Meter, tmp_path: Path) -> None:
    loaded = load(checkpoint, router="topk")
    with pytest.raises(ConfigError, match="router: expected one on which λ acts"):
        adapt(loaded, meter, AdaptPlan(budget_share=0.5), out=tmp_path)  # type: ignore[arg-type]
    with EnergyMonitor.for_assigned_devices() as monitor, pytest.raises(ConfigError, match="router"):
        scan(loaded, monitor)
