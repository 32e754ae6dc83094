"""How far a calibration reaches: what of an operation can lie outside of what was measured.

A dense model has no experts to count, so its steps widen no span of experts: whether it was measured stands in its
`ffn`. Null experts have no width.
"""

from __future__ import annotations

from collections.abc import Mapping

from hwcost.ops import Call, ModelShape
from hwcost.profiles import Profile

TEMPERATURE_MARGIN_C = 15.0
"""Degrees beyond the measured ones that are no extrapolation yet. Leakage is about 1.3 W/°C on an H100: were it wrong
by all of itself, 15 °C would be 20 of 690 W, 3 %, less than the error that a calibration may have (4 %)."""

_SAME_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def quantities(shape: ModelShape, call: Call) -> dict[str, tuple[float, ...]]:
    """What has an order, by name: one value, or the least and the largest."""
    values: dict[str, tuple[float, ...]] = {
        "batch_size": (call.batch_size,),
        "seq_len": (call.seq_len,),
        "d_model": (shape.d_model,),
        "num_layers": (shape.num_layers,),
        "num_heads": (shape.num_heads,),
        "vocab_size": (shape.vocab_size,),
    }
    if shape.expert_widths:
        values |= {"num_experts": (shape.num_experts,), "top_k": (shape.top_k,), "mean_width": (shape.mean_width,)}
    widths = [width for width in shape.expert_widths if width > 0]
    if widths:
        values["width"] = (min(widths), max(widths))
    return {name: tuple(map(float, pair)) for name, pair in values.items()}


def traits(shape: ModelShape) -> dict[str, str]:
    """What has no order, by name."""
    return {
        "dtype": _SAME_DTYPES.get(shape.dtype, shape.dtype),
        "activation": shape.activation,
        "ffn": "experts" if shape.expert_widths else "dense",
    }


def outside(shape: ModelShape, call: Call, temperature_c: float | None, profile: Profile) -> list[str]:
    """What lies outside of what a profile was calibrated on, in words; a phase without ranges was not calibrated at
    all. Profiles from before a quantity was kept say nothing of it.
    """
    if call.phase not in profile.ranges:
        return [f"{call.phase} was not calibrated"]
    ranges, kinds = profile.ranges[call.phase], profile.kinds.get(call.phase, {})
    values = quantities(shape, call)
    if not shape.expert_widths and "ffn" not in kinds:
        values["num_experts"] = (0.0,)  # an older profile's way to say that a dense step was measured
    found = [
        f"{name} {value:g} outside {low:g}..{high:g}"
        for name, (low, high) in ranges.items()
        for value in dict.fromkeys(values.get(name, ()))
        if not low <= value <= high
    ]
    found += [
        f"{name} {value} outside {', '.join(kinds[name])}"
        for name, value in traits(shape).items()
        if name in kinds and value not in kinds[name]
    ]
    return found + _heat(temperature_c, ranges)


def _heat(temperature_c: float | None, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    if temperature_c is None or "temperature_c" not in ranges:
        return []
    low, high = ranges["temperature_c"]
    low, high = low - TEMPERATURE_MARGIN_C, high + TEMPERATURE_MARGIN_C
    return [] if low <= temperature_c <= high else [f"current_temp {temperature_c:g} outside {low:g}..{high:g}"]
