"""Where the shipped profiles end: what nobody measured is refused or flagged, what ordinary trials ask is not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hwcost.cost_model import CalibrationRangeError, CostModel
from hwcost.ops import Call, ModelShape
from hwcost.profiles import parse_profile
from hwcost.reach import TEMPERATURE_MARGIN_C, outside

H100, H200 = (CostModel.for_device(name, 700.0) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
SHIPPED = pytest.mark.parametrize("model", [H100, H200], ids=["H100", "H200"])
TRIAL = {"batch_size": 16, "seq_len": 1024}


@SHIPPED
@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"dtype": "fp32"}, "dtype fp32 outside bf16"),
        ({"dtype": "float32"}, "dtype fp32 outside bf16"),
        ({"dtype": "fp16"}, "dtype fp16 outside bf16"),
        ({"activation": "swiglu"}, "activation swiglu outside gelu"),
        ({"vocab_size": 250_000}, "vocab_size 250000 outside 50257..50257"),
        ({"num_heads": 1}, "num_heads 1 outside 12..12"),
        ({"expert_widths": (12288, 0, 0, 0)}, "width 12288 outside 768..3072"),
        ({"expert_widths": (3072, 3072, 3072, 64)}, "width 64 outside 768..3072"),
        ({"expert_widths": (3072,), "top_k": 1}, "num_experts 1 outside 4..16"),
        ({"expert_widths": (3072, 3072)}, "num_experts 2 outside 4..16"),
    ],
)
def test_what_nobody_measured_is_refused_and_flagged(model, changes, flag):
    shape = ModelShape(**changes)
    with pytest.raises(CalibrationRangeError, match=f"train: {flag}".replace(".", r"\.")):
        model.get_cost("train_step", **TRIAL, shape=shape)
    assert f"extrapolated: {flag}" in model.get_cost("train_step", **TRIAL, shape=shape, extrapolate=True).flags


@SHIPPED
def test_a_board_far_hotter_than_any_that_was_measured_is_extrapolation(model):
    low, high = model.profile.ranges["train"]["temperature_c"]
    for temperature in (100.0, high + TEMPERATURE_MARGIN_C + 1, low - TEMPERATURE_MARGIN_C - 1):
        with pytest.raises(CalibrationRangeError, match="current_temp"):
            model.get_cost("train_step", **TRIAL, current_temp=temperature)
        flags = model.get_cost("train_step", **TRIAL, current_temp=temperature, extrapolate=True).flags
        assert [flag.split()[1] for flag in flags] == ["current_temp"]


def test_a_dense_step_counts_where_one_was_measured():
    dense = ModelShape(expert_widths=())
    assert H100.get_cost("train_step", **TRIAL, shape=dense).flags == ()
    with pytest.raises(CalibrationRangeError, match="ffn dense outside experts"):
        H200.get_cost("train_step", **TRIAL, shape=dense)


@SHIPPED
@pytest.mark.parametrize("temperature", [None, 30.0, 45.0, 60.0, 75.0])
@pytest.mark.parametrize(
    ("widths", "top_k"),
    [
        ((3072,) * 8, 2),
        ((3072,) * 4, 1),
        ((3072,) * 16, 4),
        ((1536,) * 8, 2),
        ((3072, 3072, 2304, 2304, 1536, 1536, 768, 768), 2),
        ((3072, 3072, 3072, 3072, 1536, 1536, 768, 0), 1),
        ((3072, 3072, 3072, 0), 2),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "bfloat16"])
def test_ordinary_trials_are_no_extrapolation(model, widths, top_k, temperature, dtype):
    shape = ModelShape(expert_widths=widths, top_k=top_k, dtype=dtype)
    assert model.get_cost("train_step", **TRIAL, shape=shape, current_temp=temperature).flags == ()


@SHIPPED
@pytest.mark.parametrize("op", ["prefill", "decode_step"])
def test_ordinary_inference_is_no_extrapolation(model, op):
    length = {"prefill": 1024, "decode_step": 256}[op]
    assert model.get_cost(op, batch_size=16, seq_len=length, current_temp=70.0).flags == ()


def test_the_margin_costs_less_than_the_bar_of_a_calibration():
    """If all of the leakage were wrong, the watts of so many degrees would still be below 4 % of the cap."""
    for model in (H100, H200):
        assert TEMPERATURE_MARGIN_C * model.profile.leak_w_per_c < 0.04 * model.profile.cap_w


def test_a_profile_from_before_loads_and_says_what_it_said():
    """No kinds, no widths, heads, vocabulary or degrees; its dense step stands in the span of experts."""
    values = json.loads(H100.profile.to_json())
    del values["kinds"]
    for table in values["ranges"].values():
        for name in ("width", "num_heads", "vocab_size", "temperature_c"):
            del table[name]
    values["ranges"]["train"]["num_experts"] = [0.0, 16.0]
    old = parse_profile(json.dumps(values), source="old.json")
    call = Call(batch_size=16, seq_len=1024)
    for shape in (ModelShape(), ModelShape(expert_widths=()), ModelShape(dtype="fp32")):
        assert outside(shape, call, 100.0, old) == []
    assert outside(ModelShape(expert_widths=(3072,) * 32), call, None, old) == ["num_experts 32 outside 0..16"]
    never_dense = dataclasses.replace(old, ranges={"train": {"num_experts": (4.0, 16.0)}})
    assert outside(ModelShape(expert_widths=()), call, None, never_dense) == ["num_experts 0 outside 4..16"]
