"""The cost model: units, monotony, additivity, refusal, prices. Laws are checked as properties."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwcost.cost_model import CalibrationRangeError, Conditions, CostModel, MemoryPressureError
from hwcost.ops import OPS, STEP_PHASES, Call, ModelShape, blocks, expert_open
from hwcost.profiles import Profile, analytic_profile

PHASES = ("train", "prefill", "decode")


def leaky(**changes: object) -> Profile:
    """A calibrated-looking profile: leakage, an active term, a power limit and ranges."""
    values = {
        "name": "leaky",
        "analytic": False,
        "active_w": 60.0,
        "leak_w_per_c": 1.5,
        "power_limit_w": 700.0,
        "ranges": {"train": {"batch_size": (4.0, 32.0), "seq_len": (256.0, 1024.0)}},
    }
    return dataclasses.replace(analytic_profile("NVIDIA H200"), **{**values, **changes})


MODELS = {
    "analytic": CostModel(analytic_profile()),
    "leaky": CostModel(leaky()),
    "slow host": CostModel(leaky(host_s_per_launch=1e-4, decode_graph_batch=64.0)),
}
shapes = st.builds(
    ModelShape,
    d_model=st.sampled_from([64, 768]),
    num_layers=st.integers(1, 8),
    expert_widths=st.lists(st.sampled_from([0, 128, 3072]), min_size=2, max_size=16).map(tuple),
    top_k=st.integers(1, 2),
    activation=st.sampled_from(["gelu", "swiglu"]),
)
calls = st.tuples(st.sampled_from(sorted(OPS)), st.sampled_from(PHASES), st.integers(1, 256), st.integers(1, 2048))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, call=calls, more=st.integers(1, 64), heat=st.tuples(st.floats(20, 90), st.floats(0, 30)))
def test_cost_is_monotone_in_batch_sequence_and_temperature(model, shape, call, more, heat):
    op, phase, batch, length = call

    def joules(b, s, temperature):
        return model.get_cost(
            op, batch_size=b, seq_len=s, shape=shape, phase=phase, current_temp=temperature, extrapolate=True
        )

    base = joules(batch, length, heat[0])
    assert base.energy_j > 0
    assert base.duration_s > 0
    for other in (
        joules(batch + more, length, heat[0]),
        joules(batch, length + more, heat[0]),
        joules(batch, length, sum(heat)),
    ):
        assert other.energy_j >= base.energy_j * (1 - 1e-12)
        assert other.duration_s >= base.duration_s * (1 - 1e-12)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@settings(max_examples=40, deadline=None)
@given(shape=shapes, call=calls, temperature=st.floats(20, 90), pressure=st.sampled_from([None, 0.2, 0.95]))
def test_breakdown_sums_to_the_total(model, shape, call, temperature, pressure):
    op, phase, batch, length = call
    state = {"current_temp": temperature, "memory_pressure": pressure, "extrapolate": True}
    cost = model.get_cost(op, batch_size=batch, seq_len=length, shape=shape, phase=phase, **state)
    parts = model.get_cost_breakdown(
        op, batch_size=batch, seq_len=length, shape=shape, phase=phase, conditions=Conditions(**state)
    )
    terms = (parts.compute_j, parts.memory_j, parts.launch_j, parts.static_j, parts.thermal_j)
    assert min(terms) >= 0
    assert math.isclose(sum(terms), cost.energy_j, rel_tol=1e-12)
    assert parts.duration_s == cost.duration_s
    assert parts.flags == cost.flags


@given(shape=shapes, batch=st.integers(1, 64), phase=st.sampled_from(PHASES))
@settings(max_examples=40, deadline=None)
def test_counts_add_up_over_layers(shape, batch, phase):
    call = Call(batch_size=batch, seq_len=128, phase=phase)
    one = dataclasses.replace(shape, num_layers=1)
    assert blocks(shape, call).vector() == pytest.approx(shape.num_layers * blocks(one, call).vector())


def test_energy_is_additive_over_layers_given_the_time():
    model = MODELS["leaky"]

    def joules(layers, seconds):
        shape = ModelShape(num_layers=layers)
        return model.get_cost("train_step", batch_size=8, seq_len=512, shape=shape, duration_s=seconds).energy_j

    step_2, step_4, step_6 = (joules(layers, layers * 1e-3) for layers in (2, 4, 6))
    assert step_4 - step_2 == pytest.approx(step_6 - step_4)


def test_batch_size_counts_sequences_and_joules_are_divided_once():
    """The wrong conversions of the past: batch taken for tokens, per-token joules multiplied by K."""
    model, shape = MODELS["analytic"], ModelShape(top_k=4)
    cost = model.get_cost("train_step", batch_size=16, seq_len=1024, shape=shape)
    assert cost.j_per_sequence == pytest.approx(cost.energy_j / 16)
    assert cost.j_per_token == pytest.approx(cost.energy_j / (16 * 1024))
    assert cost.j_per_expert_slot == pytest.approx(cost.j_per_token / 4)
    decode = model.get_cost("decode_step", batch_size=16, seq_len=1024, shape=shape)
    assert decode.j_per_token == pytest.approx(decode.energy_j / 16)
    assert cost.power_w == pytest.approx(cost.energy_j / cost.duration_s)


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_operation_has_a_cost_and_the_default_says_analytic(op):
    cost = CostModel.for_device(None).get_cost(op, batch_size=4, seq_len=128)
    assert cost.flags == ("analytic",)
    assert cost.energy_j > 0


@pytest.mark.parametrize("op", sorted(STEP_PHASES))
def test_whole_steps_know_their_phase(op):
    model = MODELS["analytic"]
    costs = {model.get_cost(op, batch_size=4, seq_len=128, phase=phase).energy_j for phase in PHASES}
    assert len(costs) == 1


def test_extrapolation_is_refused_or_flagged():
    model = MODELS["leaky"]
    with pytest.raises(CalibrationRangeError, match=r"batch_size 64 outside 4\.\.32"):
        model.get_cost("train_step", batch_size=64, seq_len=1024)
    cost = model.get_cost("train_step", batch_size=64, seq_len=2048, extrapolate=True)
    assert cost.flags == (
        "extrapolated: batch_size 64 outside 4..32",
        "extrapolated: seq_len 2048 outside 256..1024",
    )
    assert model.get_cost("train_step", batch_size=32, seq_len=1024).flags == ()


def test_a_phase_without_points_counts_as_extrapolation():
    with pytest.raises(CalibrationRangeError, match="decode"):
        MODELS["leaky"].get_cost("decode_step", batch_size=8, seq_len=128)
    cost = MODELS["leaky"].get_cost("decode_step", batch_size=8, seq_len=128, extrapolate=True)
    assert cost.flags == ("extrapolated: decode was not calibrated",)


def test_memory_pressure_adds_retries_then_refuses():
    model = MODELS["leaky"]

    def cost(pressure):
        return model.get_cost("train_step", batch_size=8, seq_len=1024, memory_pressure=pressure)

    assert cost(None) == cost(0.5)
    assert cost(0.93).energy_j > cost(0.5).energy_j
    assert cost(0.95).duration_s > cost(0.93).duration_s
    assert cost(0.95).flags == ("memory_retries",)
    with pytest.raises(MemoryPressureError, match=r"less than 0\.97, got 0\.98"):
        cost(0.98)


def test_the_power_limit_stretches_time():
    hot = leaky(energy={name: 5 * value for name, value in leaky().energy.items()})
    cost = CostModel(hot).get_cost("train_step", batch_size=32, seq_len=1024)
    assert cost.power_w == pytest.approx(700.0)


def test_joules_never_exceed_what_the_cap_allows_in_the_time():
    model = CostModel(leaky(cap_w=600.0, energy={name: 50 * value for name, value in leaky().energy.items()}))
    parts = model.get_cost_breakdown("train_step", batch_size=8, seq_len=1024, conditions=Conditions(duration_s=0.02))
    assert parts.energy_j == pytest.approx(600.0 * 0.02)
    assert parts.static_j == pytest.approx(model.static_w * 0.02)


def test_the_host_bounds_the_time_of_small_steps_but_not_of_a_graph():
    slow = CostModel(leaky(host_s_per_launch=1e-4, ranges={}))

    def seconds(model, op, batch):
        return model.get_cost(op, batch_size=batch, seq_len=128, extrapolate=True).duration_s

    assert seconds(slow, "train_step", 1) == seconds(slow, "train_step", 2) > seconds(MODELS["leaky"], "train_step", 2)
    assert seconds(slow, "train_step", 256) == seconds(MODELS["leaky"], "train_step", 256)
    assert seconds(slow, "decode_step", 1) == seconds(MODELS["leaky"], "decode_step", 1)


def test_the_hand_made_decode_step_starts_fewer_kernels_up_to_its_largest_batch():
    own, other = MODELS["slow host"], MODELS["leaky"]
    steps = {
        (name, batch): model.get_cost("decode_step", batch, 256, extrapolate=True).duration_s
        for name, model in (("own", own), ("other", other))
        for batch in (64, 65)
    }
    assert steps["own", 64] < steps["other", 64]
    assert steps["own", 65] == steps["other", 65]


def test_a_breakdown_waits_for_the_host_too():
    """The shipped profile: a training step of four sequences is bound by the host that launches it."""
    model = CostModel.for_device("NVIDIA H200", 700.0)
    assert model.profile.host_s_per_launch > 0
    whole, parts = (f("train_step", 4, 1024) for f in (model.get_cost, model.get_cost_breakdown))
    assert (parts.energy_j, parts.duration_s) == (pytest.approx(whole.energy_j), whole.duration_s)


def test_the_shipped_h200_prices_experts_by_phase():
    model = CostModel.for_device("NVIDIA H200", 700.0)
    assert not model.analytic
    prices = {
        phase: model.expert_price(d_model=768, widths=[3072, 1536, 0], top_k=1, tokens=64, dtype="bf16", phase=phase)
        for phase in PHASES
    }
    for found in prices.values():
        assert found.join[0] == pytest.approx(1.0)
        assert found.join[2] == found.open[2] == 0.0
        assert found.open_j[0] > found.join_j[0] > found.join_j[1] > 0
    train, decode = (prices[phase].join_j[0] for phase in ("train", "decode"))
    assert train != decode


def test_measured_time_replaces_the_predicted_one():
    cost = MODELS["leaky"].get_cost("train_step", batch_size=8, seq_len=1024, duration_s=0.5)
    longer = MODELS["leaky"].get_cost("train_step", batch_size=8, seq_len=1024, duration_s=0.6)
    leak_w = 1.5 * (leaky().reference_c - leaky().leak_from_c)
    assert cost.duration_s == 0.5
    assert longer.energy_j - cost.energy_j == pytest.approx(0.1 * (MODELS["leaky"].static_w + leak_w))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op_type": "softmax"}, "op_type: expected one of"),
        ({"batch_size": 0}, "batch_size"),
        ({"phase": "tune"}, "phase: expected one of train, prefill, decode, got 'tune'"),
        ({"memory_pressure": 1.5}, "memory_pressure: expected a share"),
        ({"duration_s": 0.0}, "duration_s"),
        ({"current_temp": 300.0}, "current_temp"),
    ],
)
def test_nonsense_is_named(arguments, message):
    values = {"op_type": "expert", "batch_size": 1, "seq_len": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        MODELS["analytic"].get_cost(values.pop("op_type"), **values)


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 9}, {"expert_widths": (3, -1)}, {"dtype": "int8"}, {"activation": "relu"}, {"num_layers": 0}],
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ModelShape(**changes)


# --- prices --------------------------------------------------------------------------------------


def price(widths=(3072, 1536, 0), **changes):
    values = {"d_model": 768, "top_k": 1, "tokens": 16384, "dtype": "bf16", "phase": "train", **changes}
    return MODELS["leaky"].expert_price(widths=list(widths), **values)


@pytest.mark.parametrize("phase", PHASES)
def test_prices_are_in_units_of_the_dense_ffn(phase):
    prices = price(phase=phase)
    assert prices.join[0] == pytest.approx(1.0)
    assert 0.4 < prices.join[1] < 0.6
    assert prices.join[2] == prices.open[2] == prices.join_j[2] == 0.0
    assert prices.join_j == pytest.approx([join * prices.c_ref_j for join in prices.join])
    assert prices.open_j == pytest.approx([opening * prices.c_ref_j for opening in prices.open])


def test_the_opening_price_is_the_weights_and_is_not_shared_among_tokens():
    prices, many = price(), price(tokens=10 * 16384, top_k=2)
    assert prices.join == many.join
    assert prices.open == many.open
    counts = expert_open(ModelShape(), 3072, "train")
    assert prices.open_j[0] == pytest.approx(counts.weight_bytes * leaky().energy["weight_bytes"])


def test_equal_widths_have_equal_prices_and_the_profile_is_named():
    prices = price((3072,) * 8)
    assert len(set(prices.join)) == len(set(prices.open)) == 1
    assert (prices.profile, prices.analytic) == ("leaky", False)
    assert CostModel.for_device(None).expert_price(d_model=8, widths=[8], top_k=1, tokens=1, dtype="fp32").analytic


def test_swiglu_of_two_thirds_width_costs_about_a_gelu_expert():
    """Three matrices of 2048 are two of 3072: equal FLOPs and weights."""
    ours, theirs = price((3072,)), price((2048,), activation="swiglu")
    assert theirs.open_j[0] == pytest.approx(ours.open_j[0])
    assert theirs.join_j[0] == pytest.approx(ours.join_j[0], rel=0.15)


@pytest.mark.parametrize("changes", [{"widths": ()}, {"top_k": 4}, {"dtype": "int4"}, {"phase": "test"}])
def test_prices_refuse_what_cannot_be(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        price(**changes)


# --- thermal batch ----------------------------------------------------------------------------------


def test_a_thermally_safe_batch_shrinks_with_heat():
    thermal = dataclasses.replace(leaky().thermal, resistance_c_per_w=0.09, slowdown_c=89.0)
    model = CostModel(leaky(thermal=thermal, power_limit_w=None))
    sizes = [
        model.get_thermal_safe_batch_size("decode_step", t, seq_len=256, max_batch=64)
        for t in (30.0, 80.0, 90.0, 140.0)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 0


def test_a_cool_gpu_takes_the_largest_batch():
    assert MODELS["analytic"].get_thermal_safe_batch_size("train_step", 40.0, seq_len=1024, max_batch=32) == 32


def test_no_batch_is_safe_where_idling_is_too_hot():
    thermal = dataclasses.replace(leaky().thermal, inlet_c=100.0)
    assert CostModel(leaky(thermal=thermal)).get_thermal_safe_batch_size("expert", 50.0, seq_len=8, max_batch=8) == 0


SHIPPED = [("NVIDIA H100 80GB HBM3", 700.0), ("NVIDIA H200", 700.0)]


@pytest.mark.parametrize("op", ["train_step", "prefill", "decode_step"])
@pytest.mark.parametrize("device", SHIPPED, ids=["H100", "H200"])
def test_a_shipped_profile_hears_a_hot_board(device, op):
    """Slowdown at 89 °C, a margin of 5 °C: above 84 °C nothing is safe, at loads the boards were calibrated at all."""
    model = CostModel.for_device(*device)
    assert not model.analytic
    limit_c = model.profile.thermal.slowdown_c - 5.0

    def safe(temperature_c, margin_c=5.0):
        return model.get_thermal_safe_batch_size(op, temperature_c, seq_len=256, max_batch=64, margin_c=margin_c)

    readings = [30.0, 50.0, 60.0, 70.0, 80.0, limit_c, limit_c + 1, 89.0, 110.0]
    sizes = [safe(t) for t in readings]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[: readings.index(limit_c) + 1] == [64] * (readings.index(limit_c) + 1)
    assert sizes[-3:] == [0, 0, 0]
    assert [safe(70.0, margin_c=m) for m in (0.0, 18.0, 20.0, 40.0)] == [64, 64, 0, 0]


@pytest.mark.parametrize("device", SHIPPED, ids=["H100", "H200"])
def test_where_full_load_settles_above_the_limit_batches_shrink_before_the_board_is_hot(device):
    """The steady temperature counts while the board is still cool; once it is above the limit nothing is safe."""
    model = CostModel.for_device(*device)
    thermal = model.profile.thermal
    hottest_c = thermal.steady_c(model.profile.cap_w)
    slow = dataclasses.replace(thermal, slowdown_c=hottest_c + 5.0 - 1.0)  # full load settles 1 °C above the limit
    tight = CostModel(dataclasses.replace(model.profile, thermal=slow))

    def safe(temperature_c):
        return tight.get_thermal_safe_batch_size("decode_step", temperature_c, seq_len=256, max_batch=256)

    assert 0 < safe(hottest_c - 20.0) == safe(hottest_c - 1.5)
    assert safe(hottest_c) == 0
