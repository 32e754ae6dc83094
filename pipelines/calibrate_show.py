"""What a calibration found, as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hwcost.cost_model import CostModel

_BARS = {
    "train_time_measured": 0.04,
    "train_time_predicted": 0.07,
    "decode_time_predicted": 0.08,
    "steady_temperature_c": 3.0,
}
_UNITS = {"flops": (1e12, "pJ/FLOP"), "bytes": (1e12, "pJ/byte"), "launches": (1e6, "µJ/launch")}


def table(model: CostModel) -> RenderableType:
    """Coefficients with their intervals, and errors on points that were held out."""
    profile = model.profile
    watts = f"idle {profile.idle_w:.1f} W, context {profile.context_w:.1f} W, active {profile.active_w:.1f} W"
    thermal = profile.thermal
    heat = (
        f"T = {thermal.inlet_c:.1f} °C + {thermal.resistance_c_per_w:.4f} °C/W · P, τ {thermal.time_constant_s:.1f} s"
    )
    head = Text(f"{profile.name}: {profile.gpu_name}, {watts}; leak {profile.leak_w_per_c:.2f} W/°C; {heat}")
    return Group(head, _coefficients(model), _errors(model))


def _coefficients(model: CostModel) -> Table:
    profile = model.profile
    shown = Table("counter", "joules", "95 % interval", "unit", "seconds", title="coefficients above idle")
    for name, value in profile.energy.items():
        factor, unit = _UNITS[name.rsplit("_", 1)[-1]]
        low, high = profile.intervals.get(f"energy.{name}", (float("nan"),) * 2)
        per_s = profile.seconds[name]
        speed = f"{1e-12 / per_s:.3g} T/s" if per_s > 0 and name != "launches" else f"{1e6 * per_s:.2f} µs"
        shown.add_row(name, f"{factor * value:.3g}", f"{factor * low:.3g} .. {factor * high:.3g}", unit, speed)
    return shown


def _errors(model: CostModel) -> Table:
    shown = Table("held-out error", "value", "bar")
    for name, value in model.profile.errors.items():
        text = f"{value:.2f} °C" if name.endswith("_c") else f"{100 * value:.2f} %"
        bar = _BARS.get(name)
        shown.add_row(name, text, "" if bar is None else (f"{bar:g} °C" if name.endswith("_c") else f"{100 * bar:g} %"))
    return shown
