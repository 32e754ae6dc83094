"""The switch of router `opening`: on where it pays in a decode step, off where it does not, and said either way."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from hwcost import CostModel
from hwcost.ops import ModelShape
from moe import MoEGPT2Config, MoEGPT2LMHeadModel
from moe.opening import EXACT_EXPERTS, KERNELS, choosing_launches
from pipelines.config import TrialConfig
from pipelines.model import Hardware, switch_opening, weigh_opening
from pipelines.opening import MAX_SHARE, OpeningCase, opening_case
from pipelines.trial_rows import opening_columns

PAYS = OpeningCase(batch=32, step_s=1e-3, saving_j=0.09, choosing_j=0.003, choosing_s=3e-5)
TOO_DEAR = OpeningCase(batch=32, step_s=1e-3, saving_j=0.002, choosing_j=0.003, choosing_s=3e-5)
TOO_SLOW = OpeningCase(batch=32, step_s=1e-3, saving_j=0.09, choosing_j=0.003, choosing_s=2e-4)
H200 = Hardware(device=torch.device("cpu"), dtype="bf16", compile=False, gpu_name="NVIDIA H200", power_limit_w=700.0)


def case(batch: int, experts: int = 8, launches: int | None = None) -> OpeningCase:
    """On the calibrated H200."""
    return opening_case(
        CostModel.for_device("NVIDIA H200", 700.0),
        ModelShape(expert_widths=(3072,) * experts),
        batch=batch,
        cached=96,
        launches=choosing_launches(experts, 2, batch) if launches is None else launches,
    )


@pytest.mark.parametrize(("one", "pays"), [(PAYS, True), (TOO_DEAR, False), (TOO_SLOW, False)])
def test_it_pays_where_net_joules_are_lower_and_the_step_hardly_longer(one: OpeningCase, pays: bool) -> None:
    assert one.pays is pays
    assert ("runs" if pays else "is off") in str(one)
    assert opening_columns(one)["opening_active"] is pays


def test_a_batch_with_experts_to_close_pays() -> None:
    assert case(32).pays
    assert 0 < case(32).share <= MAX_SHARE


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
    full = MoEGPT2Config(router="opening", n_layer=6)  # DistilGPT2's shape, with 8 experts
    config = TrialConfig.parse({"router": "opening", "decode_batches": [batch], "num_experts": 8})
    here = Hardware(
        device=torch.device("cpu"), dtype="bf16", compile=False, gpu_name="NVIDIA H200", power_limit_w=700.0
    )
    found = weigh_opening(config, full, here)
    assert found is not None
    assert found.pays is pays


def test_without_a_gpu_or_with_another_router_nothing_is_switched(model: Any) -> None:
    cpu = Hardware(device=torch.device("cpu"), dtype="fp32", compile=False)
    assert weigh_opening(TrialConfig.parse({"router": "opening"}), model.config, cpu) is None
    assert weigh_opening(TrialConfig.parse({"router": "energy"}), model.config, H200) is None
    assert opening_columns(None) == {}
    switch_opening(model, None)
    assert all(router.active for router in model.routers)
