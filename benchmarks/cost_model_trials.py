"""The cost model against a real sweep: joules of whole trials, and watts over the time of one of them.

    python -m benchmarks.cost_model_trials docs/data/h200-first-sweep --figure docs/img/cost-model-h200.png

The sweep ran on other boards than the calibration, so boards' own differences (3-8 %) are in the errors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
from rich.console import Console
from rich.table import Table

from hwcost.cost_model import CostModel
from hwcost.judge import modelled_j, relative_errors
from hwcost.ops import ModelShape
from hwcost.points import Calibration, of_kind


def rows(sweep: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table of the sweep."""
    found: list[dict[str, Any]] = pads.dataset(sorted((sweep / table).rglob("*.parquet"))).to_table().to_pylist()
    return found


def steps_of(model: CostModel, trial: dict[str, Any]) -> tuple[float, float, float]:
    """Joules of a trial's training step: measured, modelled with the time measured, with the time predicted."""
    config = json.loads(trial["config_json"])
    batch, length = config["batch_size"], config["seq_len"]
    widths = trial["expert_widths"] or ()
    selected = trial.get("mean_selected_width")
    if widths and selected:  # what was routed, not what could have been
        widths = (round(selected / trial["top_k"]),) * len(widths)
    shape = ModelShape(
        d_model=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        expert_widths=tuple(widths),
        top_k=trial["top_k"] or 1,
    )
    steps = trial["tokens_trained"] / (batch * (length - 1))
    seconds = batch * (length - 1) / trial["tokens_per_s"]
    common = {"batch_size": batch, "seq_len": length, "shape": shape, "extrapolate": True}
    common["current_temp"] = trial["mean_temperature_c"]
    known = model.get_cost("train_step", duration_s=seconds, **common).energy_j
    predicted = model.get_cost("train_step", **common).energy_j
    return trial["train_energy_j"] / steps, known, predicted


def show(sweep: Path, model: CostModel, console: Console) -> None:
    """Error of every trial's joules, and their means."""
    table = Table("trial", "router, K", "J a step", "time measured", "time predicted")
    errors = []
    for trial in rows(sweep, "trials"):
        measured, known, predicted = steps_of(model, trial)
        errors.append((known / measured - 1, predicted / measured - 1))
        shown = (f"{100 * error:+.1f} %" for error in errors[-1])
        table.add_row(trial["trial_id"], f"{trial['router']}, {trial['top_k']}", f"{measured:.2f}", *shown)
    means = np.abs(np.array(errors)).mean(axis=0)
    table.add_row("mean of absolute errors", "", "", *(f"{100 * mean:.2f} %" for mean in means))
    console.print(table)


def figure(sweep: Path, model: CostModel, points: Calibration, path: Path) -> None:
    """Watts of the longest trial, measured and modelled, with their difference; and all held-out points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig = plt.figure(figsize=(12.5, 4.2), layout="constrained")
    grid = fig.add_gridspec(2, 3, width_ratios=(1.5, 1, 1), height_ratios=(2, 1))
    over = fig.add_subplot(grid[0, 0])
    _watts(sweep, model, over, fig.add_subplot(grid[1, 0], sharex=over))
    _held_out(model, points, fig.add_subplot(grid[:, 1]), fig.add_subplot(grid[:, 2]))
    fig.savefig(path, dpi=120)


def modelled_watts(model: CostModel, trial: dict[str, Any], samples: list[dict[str, Any]]) -> np.ndarray:
    """Modelled watts at each sample: as the trial wrote them; of older sweeps those of its training, time measured."""
    written = np.array([np.nan if r["modelled_power_w"] is None else r["modelled_power_w"] for r in samples])
    if not np.isnan(written).all():
        return written
    config = json.loads(trial["config_json"])
    watts = steps_of(model, trial)[1] / (config["batch_size"] * (config["seq_len"] - 1) / trial["tokens_per_s"])
    return np.array([watts if r["phase"] == "train" else np.nan for r in samples])


def _watts(sweep: Path, model: CostModel, over: Any, under: Any) -> None:
    trial = max(rows(sweep, "trials"), key=lambda row: row["train_energy_j"])
    trace = [r for r in rows(sweep, "power") if r["trial_id"] == trial["trial_id"] and r["power_w"] is not None]
    start = next(r["time_s"] for r in trace if r["phase"] == "train")
    end = max(r["time_s"] for r in trace if r["phase"] == "train")
    shown = [r for r in trace if start - 6 <= r["time_s"] <= end + 25]
    time_s = np.array([r["time_s"] - start for r in shown])
    measured, modelled = np.array([r["power_w"] for r in shown]), modelled_watts(model, trial, shown)
    over.plot(time_s, measured, lw=0.8, label="measured", color="0.35")
    over.plot(time_s, modelled, lw=2, label="modelled", color="tab:red")
    over.set(ylabel="watts", title=f"trial {trial['trial_id']}, K = {trial['top_k']}", ylim=(0, 900))
    over.legend(loc="upper right", ncols=2)
    under.axhline(0, color="0.6", lw=0.8)
    under.plot(time_s, measured - modelled, lw=0.8, color="tab:red")
    under.set(xlabel="seconds since training began", ylabel="difference, W")


def _held_out(model: CostModel, points: Calibration, rest: Any, parity: Any) -> None:
    held = [p for p in points.points if p.held_out and p.kind in ("train_step", "decode_step")]
    for kind, color in (("train_step", "tab:blue"), ("decode_step", "tab:orange")):
        some = of_kind(held, kind)
        measured = [p.energy_per_call_j for p in some]
        errors = 100 * relative_errors(model, some, time_measured=False)
        label = kind.replace("_", " ")
        rest.semilogx(measured, errors, "o", color=color, label=label)
        parity.loglog(
            measured, [modelled_j(model, p, time_measured=False) for p in some], "o", color=color, label=label
        )
    rest.axhline(0, color="0.6", lw=0.8)
    rest.set(xlabel="measured joules a step", ylabel="residual, %", title="held-out steps, time predicted")
    span = [0.05, 80]
    parity.loglog(span, span, color="0.6", lw=0.8)
    parity.set(xlabel="measured joules a step", ylabel="modelled joules a step", title="the same")
    parity.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--profile", type=Path, default=Path("hwcost/profiles/nvidia-h200.json"))
    parser.add_argument("--points", type=Path, default=Path("benchmarks/points/nvidia-h200.json"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    model = CostModel.load(options.profile)
    show(options.sweep, model, Console(width=120))
    if options.figure is not None:
        figure(options.sweep, model, Calibration.read(options.points), options.figure)


if __name__ == "__main__":
    main()
