"""Modelled watts beside measured ones: what the cost model says of each phase, and where it says nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hwcost import CostModel
from hwcost.ops import ModelShape
from moe import MoEGPT2Config
from pipelines.config import TrialConfig
from pipelines.model import Hardware
from pipelines.modelled import PhaseModel
from pipelines.records import EpochRecord, PowerRecord, Store
from pipelines.trial import run_trial

H200 = Hardware(device=torch.device("cpu"), dtype="bf16", compile=True, gpu_name="NVIDIA H200", power_limit_w=700.0)
GPT2 = MoEGPT2Config(n_embd=768, n_layer=6, n_head=12, vocab_size=50257, expert_widths=[3072] * 8)


def config(**changes: Any) -> TrialConfig:
    return TrialConfig.parse({"router": "topk", "num_experts": 8, "decode_batches": [8, 32], **changes})


def test_watts_and_joules_are_the_cost_models() -> None:
    found = PhaseModel.of(config(), GPT2, H200)
    model, shape = CostModel.for_device("NVIDIA H200", 700.0), ModelShape()
    step = model.get_cost("train_step", batch_size=16, seq_len=1024, shape=shape)
    assert found.power_w("train") == pytest.approx(step.power_w)
    assert found.training_j(10) == pytest.approx(10 * step.energy_j)
    prefill = model.get_cost("prefill", batch_size=16, seq_len=1024, shape=shape)
    assert found.power_w("prefill") == pytest.approx(prefill.power_w)
    assert found.power_w("eval") is None
    watts = [found.power_w("decode_b8"), found.power_w("decode_b32")]
    assert 120 < watts[0] < watts[1] < 700
    assert any(flag.startswith("cost_model:extrapolated: seq_len") for flag in found.flags)  # prompts of 64 tokens


def test_what_was_routed_counts() -> None:
    whole = PhaseModel.of(config(), GPT2, H200)
    half = PhaseModel.of(config(), GPT2, H200, selected_width=3072.0)  # two experts of half the width
    assert half.training_j(1) < whole.training_j(1)
    dense = PhaseModel.of(config(router="dense"), GPT2, H200, selected_width=None)
    assert 0 < dense.training_j(1) < whole.training_j(1)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"gpu_name": None}, ()),
        ({"gpu_name": "NVIDIA Unheard-of"}, ("cost_model:no_profile",)),
        ({"power_limit_w": 300.0}, ("cost_model:no_profile",)),
        ({"compile": False}, ("cost_model:not_compiled",)),
    ],
)
def test_without_a_profile_of_this_work_nothing_is_modelled(changes: dict[str, Any], flags: tuple[str, ...]) -> None:
    found = PhaseModel.of(config(), GPT2, dataclasses.replace(H200, **changes))
    assert (found.power_w("train"), found.training_j(5), found.flags) == (None, None, flags)


def test_a_trials_tables_hold_modelled_beside_measured(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real trial on the CPU, told that it runs compiled on an H200."""
    monkeypatch.setattr(Hardware, "of", classmethod(lambda cls, config, **_: dataclasses.replace(H200, dtype="fp32")))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    record = run_trial(TrialConfig.parse(tiny | {"measure_seconds": 0.6, "epochs": 2}), out=tmp_path)
    assert record.error is None
    epochs = Store(tmp_path).read(EpochRecord, "single").to_pylist()
    steps_j = [row["modelled_energy_j"] for row in epochs]
    assert steps_j[0] is None
    assert min(steps_j[1:]) > 0
    assert record.modelled_train_energy_j == pytest.approx(2 * steps_j[2])
    assert any(flag.startswith("cost_model:extrapolated") for flag in record.energy_flags)
    power = Store(tmp_path).read(PowerRecord, "single").to_pylist()
    seen = {row["phase"]: row["modelled_power_w"] for row in power}
    assert seen["decode_b2"] > 100
    assert {row["modelled_power_w"] for row in power if row["phase"] in ("setup", "eval")} <= {None}
