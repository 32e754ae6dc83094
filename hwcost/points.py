"""Calibration points: what was run, what it took, and the counts that explain it.

Points are the raw material of a profile and are kept as JSON. Counts are derived from a point's kind and
parameters whenever they are needed, so old points profit from better counting.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hwcost.ops import STEP_PHASES, Call, Counts, ModelShape, counts_of

POINTS_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """One point to measure.

    Attributes:
        name: unique. kind: key of a builder table and of `COUNTS`. params: plain values.
        window_s: seconds to measure. held_out: judged by the fit, never part of it.
        code: specs with the same code share one built (and compiled) workload; "" means its own.
        tier: 0 is measured first; later tiers only while time is left.
    """

    name: str
    kind: str
    params: Mapping[str, Any]
    window_s: float = 3.0
    held_out: bool = False
    code: str = ""
    tier: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A measured spec.

    Attributes:
        found: values that only running could tell (open experts), by name.
        calls: repetitions in the window of `duration_s` seconds and `energy_j` joules.
        start_s: seconds since the calibration began.
    """

    name: str
    kind: str
    params: Mapping[str, Any]
    held_out: bool
    found: Mapping[str, float]
    calls: int
    duration_s: float
    energy_j: float
    uncertainty_j: float | None
    mean_temperature_c: float | None
    max_temperature_c: float | None
    throttled: bool | None
    source: str | None
    flags: tuple[str, ...]
    start_s: float

    @property
    def energy_per_call_j(self) -> float:
        return self.energy_j / self.calls

    @property
    def seconds_per_call(self) -> float:
        return self.duration_s / self.calls

    @property
    def power_w(self) -> float:
        return self.energy_j / self.duration_s

    @property
    def counts(self) -> Counts:
        """What one call asks of the hardware."""
        return COUNTS[self.kind](self.params, self.found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Watts and degrees over a whole calibration, in order of time; seconds since it began."""

    time_s: tuple[float, ...]
    power_w: tuple[float, ...]
    temperature_c: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Everything that a calibration measured. `device` says on what and when; `skipped` says what was not reached."""

    device: Mapping[str, Any]
    points: tuple[Point, ...]
    trace: Trace
    skipped: tuple[str, ...] = ()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, through a temporary name."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        body = {"version": POINTS_VERSION, **dataclasses.asdict(self)}
        temporary = target.with_name(target.name + ".part")
        temporary.write_text(json.dumps(body) + "\n", encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """What `write` wrote.

        Raises:
            ValueError: another file.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("version") != POINTS_VERSION:
            raise ValueError(f"{path}: expected calibration points of version {POINTS_VERSION}")
        points = tuple(Point(**{**point, "flags": tuple(point["flags"])}) for point in data["points"])
        trace = Trace(**{name: tuple(values) for name, values in data["trace"].items()})
        return cls(device=data["device"], points=points, trace=trace, skipped=tuple(data["skipped"]))


def step_params(op: str, *, batch_size: int, seq_len: int, shape: ModelShape, **more: Any) -> dict[str, Any]:
    """The parameters of a whole step: a train step or a decode step of the model."""
    return {"op": op, "batch_size": batch_size, "seq_len": seq_len, "shape": dataclasses.asdict(shape), **more}


def step_shape(params: Mapping[str, Any], found: Mapping[str, float]) -> ModelShape:
    """The model shape of a step, with the open experts that were found."""
    values = dict(params["shape"])
    values["expert_widths"] = tuple(values["expert_widths"])
    if "open_experts" in found:
        values["open_experts"] = found["open_experts"]
    return ModelShape(**values)


def step_call(params: Mapping[str, Any]) -> Call:
    """How a step was called."""
    return Call(batch_size=params["batch_size"], seq_len=params["seq_len"], phase=STEP_PHASES[params["op"]])


def _step(params: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    call = step_call(params)
    return counts_of(
        params["op"], step_shape(params, found), call, graphed_batch=call.batch_size if found.get("own_step") else 0.0
    )


def _gemm(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    m, k, n = float(p["m"]), float(p["k"]), float(p["n"])
    return Counts(gemm_flops=2 * m * k * n, activation_bytes=2 * (m * k + m * n), weight_bytes=2 * k * n, launches=1)


def _copy(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    return Counts(activation_bytes=2.0 * p["bytes"], launches=1)


def _grouped(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    slots, width, d_model = float(p["slots"]), float(p["width"]), float(p["d_model"])
    return Counts(
        grouped_flops=4 * slots * d_model * width,
        activation_bytes=2 * slots * (2 * d_model + 2 * width),
        weight_bytes=4.0 * p["experts"] * d_model * width,
        launches=4,
    )


def _attention(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    rows, width = float(p["batch"]) * p["seq_len"], 64.0 * p["heads"]
    train = bool(p["train"])
    return Counts(
        attention_flops=2 * rows * p["seq_len"] * width * (3.5 if train else 1.0),
        activation_bytes=(14.0 if train else 4.0) * rows * width * 2,
        launches=4 if train else 1,
    )


def _launch(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    return Counts(launches=1)


def _adamw(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    return Counts(optimizer_bytes=28.0 * p["parameters"], launches=4)


def _nothing(p: Mapping[str, Any], found: Mapping[str, float]) -> Counts:
    return Counts()


COUNTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, float]], Counts]] = {
    "gemm": _gemm,
    "copy": _copy,
    "grouped": _grouped,
    "attention": _attention,
    "launch": _launch,
    "adamw": _adamw,
    "idle": _nothing,
    "anchor": _nothing,
    "train_step": _step,
    "prefill": _step,
    "decode_step": _step,
}
# Kinds that calibrate nothing but are kept: the anchor's counts are nobody's business.
NOT_FITTED = ("anchor",)


def of_kind(points: Sequence[Point], *kinds: str) -> list[Point]:
    """The points of some kinds, in order."""
    return [point for point in points if point.kind in kinds]
