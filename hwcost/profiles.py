"""Profiles: the calibrated coefficients of a kind of GPU, and which one a device gets.

A profile is a JSON file in `hwcost/profiles/` (or anywhere, through `CostModel.load`). Where none
fits the device, the analytic default is used and says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from hwcost.ops import COMPUTE, COUNTERS
from hwcost.thermal import Thermal

PROFILE_VERSION = 1
# A profile fits a power limit when it was calibrated within 5 % of it.
_LIMIT_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pressure:
    """What a nearly full GPU memory costs: above `onset` the allocator retries, at `refuse` a batch is refused."""

    onset: float = 0.90
    refuse: float = 0.97
    retry_s: float = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """Coefficients of one kind of GPU. All energies are above idle and context power.

    Attributes:
        name: of the profile. gpu_name, power_limit_w: the device it was calibrated on.
        analytic: True where the coefficients were reasoned, not measured.
        idle_w, context_w: watts without a CUDA context, and what a context adds.
        active_w: what a busy GPU draws beside, whatever it computes (clocks, fans, leakage at the reference).
        energy: joules per unit of each counter of `hwcost.ops.COUNTERS`.
        seconds: seconds of device time per unit of each counter.
        decode_graph_batch: largest batch at which a decode step was the hand-made one (`moe.decoding`).
        host_s_per_launch: seconds that a host thread takes to dispatch a kernel of a whole step.
        cap_w: highest mean power seen under load; the board lowers its clocks to stay there. None: not seen.
        leak_w_per_c, leak_from_c: P_leak = leak_w_per_c · max(0, T − leak_from_c).
        reference_c: temperature of the calibration, assumed where none is given.
        intervals: 95 % interval of each coefficient, by name.
        ranges: calibrated range per phase and quantity, {"train": {"batch_size": (lo, hi), …}, …}.
        kinds: the same of what has no order, {"train": {"dtype": ("bf16",), …}, …}; empty in older profiles.
        errors: held-out errors by name, as fractions.
        provenance: driver, board hash, date, command.
    """

    name: str
    gpu_name: str | None = None
    power_limit_w: float | None = None
    analytic: bool = False
    idle_w: float
    context_w: float
    active_w: float = 0.0
    energy: Mapping[str, float]
    seconds: Mapping[str, float]
    host_s_per_launch: float = 0.0
    decode_graph_batch: float = 0.0
    cap_w: float | None = None
    leak_w_per_c: float = 0.0
    leak_from_c: float = 30.0
    reference_c: float = 55.0
    thermal: Thermal
    pressure: Pressure = dataclasses.field(default_factory=Pressure)
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in ("energy", "seconds"):
            got = getattr(self, table)
            if set(got) != set(COUNTERS):
                raise ValueError(f"{table}: expected the counters {', '.join(COUNTERS)}, got {', '.join(sorted(got))}")
            bad = [name for name, value in got.items() if not value >= 0]
            if bad:
                raise ValueError(f"{table}: expected coefficients >= 0, got {bad[0]} = {got[bad[0]]!r}")

    def to_json(self) -> str:
        return json.dumps({"version": PROFILE_VERSION, **dataclasses.asdict(self)}, indent=1, sort_keys=False) + "\n"


def analytic_profile(gpu_name: str | None = None, power_limit_w: float | None = None) -> Profile:
    """The default where nothing was calibrated: an H200's figures above idle, reasoned from public peaks.

    0.8 pJ/FLOP, 100 pJ/byte; 600 TFLOP/s dense, 4.25 TB/s, 3 µs a launch.
    """
    energy = dict.fromkeys(COUNTERS, 100e-12) | dict.fromkeys(COMPUTE, 0.8e-12)
    seconds = dict.fromkeys(COUNTERS, 1 / 4.25e12)
    seconds |= {"gemm_flops": 1 / 600e12, "grouped_flops": 1 / 400e12, "attention_flops": 1 / 300e12}
    seconds["decode_flops"] = 1 / 300e12
    energy["launches"], seconds["launches"] = 1e-4, 3e-6
    return Profile(
        name="analytic",
        gpu_name=gpu_name,
        power_limit_w=power_limit_w,
        analytic=True,
        idle_w=85.0,
        context_w=40.0,
        energy=energy,
        seconds=seconds,
        thermal=Thermal(inlet_c=32.0, resistance_c_per_w=0.04, time_constant_s=10.0, slowdown_c=89.0),
    )


def parse_profile(text: str, *, source: str) -> Profile:
    """A profile from its JSON.

    Raises:
        ValueError: not a profile; the message names the source and the key.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: expected a JSON profile, got {error}") from None
    if not isinstance(data, dict) or data.pop("version", None) != PROFILE_VERSION:
        raise ValueError(f"{source}: expected version {PROFILE_VERSION} of a profile")
    known = {field.name for field in dataclasses.fields(Profile)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{source}: unknown key {unknown[0]!r}")
    try:
        data["thermal"] = Thermal(**data["thermal"])
        data["pressure"] = Pressure(**data["pressure"])
        data["intervals"] = {name: tuple(pair) for name, pair in data.get("intervals", {}).items()}
        for key in ("ranges", "kinds"):
            data[key] = {
                phase: {name: tuple(values) for name, values in table.items()}
                for phase, table in data.get(key, {}).items()
            }
        return Profile(**data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: not a profile: {error}") from None


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in a file.

    Raises:
        ValueError: the file is not a profile.
        OSError: the file cannot be read.
    """
    return parse_profile(Path(path).read_text(encoding="utf-8"), source=str(path))


def shipped_profiles() -> Iterator[Profile]:
    """The profiles that come with the package, in order of file name."""
    folder = resources.files("hwcost") / "profiles"
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            yield parse_profile(entry.read_text(encoding="utf-8"), source=entry.name)


def select_profile(gpu_name: str | None, power_limit_w: float | None) -> Profile:
    """The shipped profile of a GPU's name and power limit, else the analytic default.

    A device whose limit is unknown gets the profile of its name; one whose limit differs by more
    than 5 % from every calibrated one does not, because joules per FLOP depend on the limit.
    """
    if gpu_name is not None:
        for profile in shipped_profiles():
            if _same_gpu(profile.gpu_name, gpu_name) and _same_limit(profile.power_limit_w, power_limit_w):
                return profile
    return analytic_profile(gpu_name, power_limit_w)


def _same_gpu(calibrated: str | None, name: str) -> bool:
    return calibrated is not None and _normal(calibrated) == _normal(name)


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).removeprefix("nvidia ").strip()


def _same_limit(calibrated_w: float | None, limit_w: float | None) -> bool:
    if calibrated_w is None or limit_w is None:
        return True
    return abs(calibrated_w - limit_w) <= _LIMIT_TOLERANCE * calibrated_w
