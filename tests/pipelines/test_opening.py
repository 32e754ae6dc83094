"""The switch of router `opening`: on where it pays in a decode step, off where it does not, and said either way."""

from __future__ import annotations

import dataclasses
import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hwcost import CostModel, EnergyMonitor
from hwcost.ops import ModelShape
from moe import MoEGPT2Config, MoEGPT2LMHeadModel
from moe.opening import EXACT_EXPERTS, KERNELS, choosing_launches
from pipelines import cli
from pipelines import evaluation as evaluations
from pipelines import model as models
from pipelines import scan as scans
from pipelines import trial as trials
from pipelines.config import TrialConfig
from pipelines.model import Hardware, opening_at, switch_opening, weigh_opening
from pipelines.opening import MAX_SHARE, OpeningCase, expected_open, opening_case
from pipelines.prices import expert_prices
from pipelines.records import Store, TrialRecord
from pipelines.trial_rows import opening_columns

PAYS = OpeningCase(
    batch=32, energy_lambda=0.3, open_plain=8.0, open_chosen=3.0, step_s=1e-3, saving_j=0.09, choosing_j=0.003,
    choosing_s=3e-5,
)  # fmt: skip
TOO_DEAR = dataclasses.replace(PAYS, saving_j=0.002)
TOO_SLOW = dataclasses.replace(PAYS, choosing_s=2e-4)
H200 = Hardware(device=torch.device("cpu"), dtype="bf16", compile=False, gpu_name="NVIDIA H200", power_limit_w=700.0)


def case(
    batch: int,
    energy_lambda: float = 0.3,
    *,
    experts: int = 8,
    launches: int | None = None,
    gpu: str = "NVIDIA H200",
    kind: str = "joules",
) -> OpeningCase:
    """On a calibrated GPU."""
    cost_model, widths = CostModel.for_device(gpu, 700.0), (3072,) * experts
    prices = expert_prices(
        cost_model, kind=kind, d_model=768, widths=widths, top_k=2, tokens=batch, dtype="bf16", phase="decode"
    )
    return opening_case(
        cost_model,
        ModelShape(expert_widths=widths),
        batch=batch,
        cached=96,
        launches=choosing_launches(experts, 2, batch) if launches is None else launches,
        energy_lambda=energy_lambda,
        join=prices.join,
        open_=prices.open,
    )


@pytest.mark.parametrize(("one", "pays"), [(PAYS, True), (TOO_DEAR, False), (TOO_SLOW, False)])
def test_it_pays_where_net_joules_are_lower_and_the_step_hardly_longer(one: OpeningCase, pays: bool) -> None:
    assert one.pays is pays
    assert ("runs" if pays else "is off") in str(one)
    assert opening_columns(one)["opening_active"] is pays


def test_a_batch_with_experts_to_close_pays() -> None:
    assert case(32).pays
    assert 0 < case(32).share <= MAX_SHARE


@pytest.mark.parametrize(
    ("energy_lambda", "pays"), [(0.0, False), (0.003, False), (0.01, False), (0.03, True), (0.1, True)]
)
def test_it_agrees_with_what_was_measured_of_lambda(energy_lambda: float, pays: bool) -> None:
    """One H100, batch 32 (docs/routing.md): nothing saved up to λ = 0.01, a step of 0.446 ms for 0.466 at λ = 0.1."""
    assert case(32, energy_lambda, gpu="NVIDIA H100 80GB HBM3").pays is pays


@pytest.mark.parametrize(
    ("batch", "energy_lambda", "pays"),
    [(8, 0.003, False), (8, 0.1, True), (128, 0.003, False), (128, 0.01, False), (128, 0.03, False)],
)
def test_it_agrees_with_what_was_measured_at_other_batches(batch: int, energy_lambda: float, pays: bool) -> None:
    """One H200 (docs/routing.md). Batch 8 at λ = 0.01 and 0.03 and batch 128 at 0.1 are too close to tell."""
    assert case(batch, energy_lambda).pays is pays


MEASURED = {  # experts open of 8: batch → λ → by the gate after training with top-k; at λ = 0 nothing is closed
    8: {0.0: 6.00, 0.003: 5.58, 0.01: 4.90, 0.03: 3.77, 0.1: 2.40},
    32: {0.0: 7.56, 0.01: 6.85, 0.03: 5.94, 0.1: 4.08},
    128: {0.0: 7.81, 0.003: 7.74, 0.01: 7.62, 0.03: 7.31, 0.1: 6.46},
}


@pytest.mark.parametrize("batch", MEASURED)
def test_drawn_scores_open_and_close_what_a_trained_gate_did(batch: int) -> None:
    """At the price of opening in force then (that of batch 32, on an H100, was not kept: the same is assumed)."""
    shape = ModelShape(expert_widths=(3072,) * 8)
    for energy_lambda, opened in MEASURED[batch].items():
        plain, chosen = expected_open(shape, batch, energy_lambda=energy_lambda, join=(1.0,) * 8, open_=(82.4,) * 8)
        assert plain == pytest.approx(MEASURED[batch][0.0], abs=0.25)
        assert chosen == pytest.approx(opened, abs=0.25)


@pytest.mark.parametrize(("batch", "measured_ms"), [(8, 0.0269), (32, 0.0335), (128, 0.0707)])
def test_choosing_takes_the_time_that_was_measured(batch: int, measured_ms: float) -> None:
    assert 1e3 * case(batch).choosing_s == pytest.approx(measured_ms, rel=0.2)


def test_it_saves_more_the_higher_the_price_and_nothing_where_opening_is_free() -> None:
    found = [case(32, energy_lambda) for energy_lambda in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)]
    assert found[0].saving_j == 0
    assert [c.saving_j for c in found] == sorted(c.saving_j for c in found)
    assert found[-1].open_chosen == pytest.approx(2.0, abs=0.1)  # K
    for kind in ("zero", "flops"):  # nothing is paid for opening
        assert case(32, kind=kind).open_chosen == case(32, kind=kind).open_plain
        assert not case(32, kind=kind).pays
    assert case(32, kind="uniform").pays  # one price for all still closes


def test_choosing_takes_time_at_the_power_of_the_step() -> None:
    found = case(32)
    step = CostModel.for_device("NVIDIA H200", 700.0).get_cost(
        "decode_step", 32, 96, shape=ModelShape(open_experts=found.open_plain), extrapolate=True
    )
    assert found.choosing_j == pytest.approx(found.choosing_s * step.power_w)


def test_null_experts_cost_nothing_to_open() -> None:
    shape = ModelShape(expert_widths=(3072,) * 4 + (0,) * 4)
    plain, chosen = expected_open(shape, 64, energy_lambda=0.0, join=(0.0,) * 8, open_=(0.0,) * 8)
    assert plain == chosen
    assert 7 < plain <= 8  # four of twice the mean width, hardly ever less than all of them


def test_a_batch_of_one_has_nothing_to_close() -> None:
    assert case(1).saving_j == pytest.approx(0.0, abs=1e-9)
    assert not case(1).pays


def test_choosing_that_takes_many_kernels_does_not_pay() -> None:
    assert choosing_launches(EXACT_EXPERTS, 2, 32) == KERNELS
    assert choosing_launches(EXACT_EXPERTS + 1, 2, 32) > 100
    assert not case(32, experts=16).pays
    assert case(32, launches=0).share == pytest.approx(0.0, abs=1e-9)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = MoEGPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, router="opening",
        expert_widths=[64] * 4, energy_lambda=3.0, initializer_range=0.2,
    )  # fmt: skip
    return MoEGPT2LMHeadModel(config).eval()


def test_switched_off_it_routes_as_plain_priced_top_k_and_back_on_it_chooses(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids_BS = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(0))

    def choices(router: str) -> torch.Tensor:
        plain = MoEGPT2LMHeadModel(MoEGPT2Config(**(model.config.to_dict() | {"router": router}))).eval()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            return plain(ids_BS, output_routing=True).routing[0].expert_TK

    with torch.no_grad(), caplog.at_level(logging.INFO):
        switch_opening(model, TOO_DEAR)
        off_TK = model(ids_BS, output_routing=True).routing[0].expert_TK
        switch_opening(model, PAYS)
        on_TK = model(ids_BS, output_routing=True).routing[0].expert_TK
    assert torch.equal(off_TK, choices("energy"))
    assert torch.equal(on_TK, choices("opening"))
    assert not torch.equal(on_TK, off_TK)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "router opening is off" in caplog.text


@pytest.mark.parametrize(("batch", "pays"), [(32, True), (1, False)])
def test_a_trial_weighs_it_at_its_own_decode_batch(model: Any, batch: int, pays: bool) -> None:
    full = MoEGPT2Config(router="opening", n_layer=6, energy_lambda=0.3)  # DistilGPT2's shape, with 8 experts
    config = TrialConfig.parse({"router": "opening", "decode_batches": [batch], "num_experts": 8})
    here = Hardware(
        device=torch.device("cpu"), dtype="bf16", compile=False, gpu_name="NVIDIA H200", power_limit_w=700.0
    )
    found = weigh_opening(config, full, here)
    assert found is not None
    assert found.pays is pays
    free = weigh_opening(config, full, here, energy_lambda=0.0)
    assert free is not None
    assert not free.pays
    unpriced = weigh_opening(TrialConfig.parse({**config.model_dump(), "price": "zero"}), full, here)
    assert unpriced is not None
    assert not unpriced.pays


def test_it_is_weighed_at_each_decode_batch_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On at batch 32, off at 1 while that is measured, and as it was afterwards."""
    dropped: list[Any] = []
    monkeypatch.setattr(models, "drop_decoders", dropped.append)
    full = MoEGPT2Config(router="opening", n_layer=6, energy_lambda=0.1)
    config = TrialConfig.parse({"router": "opening", "decode_batches": [32, 1], "num_experts": 8})
    routers = [types.SimpleNamespace(active=True) for _ in range(6)]
    model = types.SimpleNamespace(config=full, routers=routers)
    switch_opening(model, weigh_opening(config, full, H200))
    for batch, pays, drops in ((32, True, 0), (1, False, 2)):
        with opening_at(model, config, H200, batch):
            assert {router.active for router in routers} == {pays}
        assert all(router.active for router in routers)
        assert len(dropped) == drops


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(decode batch, whether sets were chosen) of each measurement, on a made-up GPU where choosing pays at 32 only."""
    found: list[tuple[int, bool]] = []

    def decode(model: Any, split: Any, batch: int, *_: Any, **__: Any) -> Any:
        found.extend((batch, router.active) for router in model.routers[:1])
        return types.SimpleNamespace(j_per_token=1.0, tokens_per_s=1.0)

    def weigh(*_: Any, batch: int, **__: Any) -> OpeningCase:
        return PAYS if batch == 32 else TOO_DEAR

    cpu = dataclasses.replace(H200, dtype="fp32")
    monkeypatch.setattr(Hardware, "of", classmethod(lambda cls, config, **_: cpu))
    monkeypatch.setattr(models, "opening_case", weigh)
    for module in (trials, evaluations, scans):
        monkeypatch.setattr(module, "measure_decode", decode)
    return found


def test_a_trial_measures_each_decode_batch_as_it_pays_there(
    tiny: dict[str, Any], measured: list[tuple[int, bool]], tmp_path: Path
) -> None:
    values = tiny | {"router": "opening", "decode_batches": [32, 1, 8], "prefill": False, "max_train_tokens": 512}
    with EnergyMonitor.for_assigned_devices() as monitor:
        key = trials.TrialKey(sweep_id="single", trial_id="one")
        trial = trials.Trial(TrialConfig.parse(values), key, Store(tmp_path), monitor)
        while not isinstance(record := trial.advance(), TrialRecord):
            pass
    assert record.state == "COMPLETED", record.error
    assert measured == [(32, True), (1, False), (8, False)]
    assert record.opening_active is True
    assert all(router.active for router in trial.model.routers)


def test_eval_and_scan_measure_a_decode_batch_as_it_pays_there(
    measured: list[tuple[int, bool]], tmp_path: Path
) -> None:
    config = MoEGPT2Config(
        vocab_size=512, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        expert_widths=[64] * 4, router="opening", energy_lambda=0.1,
    )  # fmt: skip
    MoEGPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    keys = ["batch_size=4", "max_eval_tokens=256", "measure_seconds=0.01", "threads=1", "decode_batches=[32, 1]"]
    arguments = [str(tmp_path / "model"), *(f"--set={key}" for key in keys)]
    judged = CliRunner().invoke(cli.app, ["eval", *arguments])
    assert judged.exit_code == 0, judged.output
    assert measured == [(32, True), (1, False)]
    walked = CliRunner().invoke(cli.app, ["scan", *arguments, "--lambdas=0.1", f"--out={tmp_path / 'scan'}"])
    assert walked.exit_code == 0, walked.output
    assert measured[2:] == [(32, True)] * 2


def test_a_captured_step_is_forgotten_when_choosing_is_switched(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(models, "drop_decoders", dropped.append)
    for one in (PAYS, TOO_DEAR, TOO_SLOW, PAYS):
        switch_opening(model, one)
    assert len(dropped) == 2


def test_without_a_gpu_or_with_another_router_nothing_is_switched(model: Any) -> None:
    cpu = Hardware(device=torch.device("cpu"), dtype="fp32", compile=False)
    assert weigh_opening(TrialConfig.parse({"router": "opening"}), model.config, cpu) is None
    assert weigh_opening(TrialConfig.parse({"router": "energy"}), model.config, H200) is None
    assert opening_columns(None) == {}
    switch_opening(model, None)
    assert all(router.active for router in model.routers)
