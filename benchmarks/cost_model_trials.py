"""The cost model against a real sweep: joules of whole trials, and watts over the time of one of them.

    python -m benchmarks.cost_model_trials docs/data/h200-first-sweep --figure docs/img/cost-model-h200.png

The sweep ran on other boards than the calibration, so boards' own differences (3-8 %) are in the errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
from rich.console import Console
from rich.table import Table

from hwcost.cost_model import CostModel
from hwcost.judge import REPEATABILITY, modelled_j, relative_errors
from hwcost.ops import ModelShape
from hwcost.points import Calibration, of_kind
from pipelines.modelled import at_width

PAIR_GAP = REPEATABILITY  # pairs of trials closer than this do not say which costs more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """One phase of one trial: joules per token as measured, and the model's relative errors."""

    sweep: str
    trial: dict[str, Any]
    phase: str
    measured: float
    predicted_error: float
    known_error: float | None = None  # with the time measured, which only training tells


def rows(sweep: Path, table: str) -> list[dict[str, Any]]:
    """All rows of a table of the sweep."""
    found: list[dict[str, Any]] = pads.dataset(sorted((sweep / table).rglob("*.parquet"))).to_table().to_pylist()
    return found


def completed(sweep: Path) -> list[dict[str, Any]]:
    """Trials that ended by themselves; what was cut off has joules of a part."""
    return [row for row in rows(sweep, "trials") if row["state"] == "COMPLETED" and not row["censored"]]


def shape_of(trial: dict[str, Any]) -> ModelShape:
    """What was routed, not what could have been: all experts as wide as those selected on average."""
    config = json.loads(trial["config_json"])
    shape = ModelShape(
        d_model=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        expert_widths=tuple(trial["expert_widths"] or ()),
        top_k=trial["top_k"] or 1,
    )
    selected = trial.get("mean_selected_width")
    return at_width(shape, selected) if shape.expert_widths and selected else shape


def modelled(
    model: CostModel, trial: dict[str, Any], phase: str, seconds: float | None = None
) -> tuple[float, float, int]:
    """Joules, seconds and tokens of one repetition of a phase: a step, a batch of prompts, a generation.

    Args:
        seconds: of a step, where they were measured.
    """
    config, shape = json.loads(trial["config_json"]), shape_of(trial)
    common: dict[str, Any] = {"shape": shape, "extrapolate": True}
    if phase == "train" and trial["mean_temperature_c"] is not None:
        common["current_temp"] = trial["mean_temperature_c"]
    batch, length = config["batch_size"], config["seq_len"]
    if not phase.startswith("decode_b"):
        op = {"train": "train_step"}.get(phase, phase)
        cost = model.get_cost(op, batch_size=batch, seq_len=length, duration_s=seconds, **common)
        return cost.energy_j, cost.duration_s, batch * (length - 1 if phase == "train" else length)
    batch, prompt, new = (
        int(phase.removeprefix("decode_b")),
        config["decode_prompt_tokens"],
        config["decode_new_tokens"],
    )
    first = model.get_cost("prefill", batch_size=batch, seq_len=prompt, **common)
    step = model.get_cost("decode_step", batch_size=batch, seq_len=prompt + new / 2, **common)
    return first.energy_j + new * step.energy_j, first.duration_s + new * step.duration_s, batch * new


def phases_of(model: CostModel, trial: dict[str, Any]) -> list[Judged]:
    """The phases of a trial that have joules of their own."""
    config = json.loads(trial["config_json"])
    step_s = config["batch_size"] * (config["seq_len"] - 1) / trial["tokens_per_s"]
    measured = {"train": trial["train_energy_j"] / trial["tokens_trained"], "prefill": trial["prefill_j_per_token"]}
    for name in (key for key in trial if key.startswith("decode_j_per_token_b")):
        measured[f"decode_b{name.rpartition('_b')[2]}"] = trial[name]
    found = []
    for phase, value in measured.items():
        if value is not None:
            joules, _, tokens = modelled(model, trial, phase)
            known = modelled(model, trial, phase, step_s)[0] / tokens / value - 1 if phase == "train" else None
            found.append(
                Judged(
                    sweep=trial["sweep_id"],
                    trial=trial,
                    phase=phase,
                    measured=value,
                    predicted_error=joules / tokens / value - 1,
                    known_error=known,
                )
            )
    return found


def signs(judged: Sequence[Judged], error: Callable[[Judged], float]) -> tuple[int, int]:
    """Pairs of trials on one board that differ in joules per token; those of which the model tells which is more."""
    right = pairs = 0
    for one, other in itertools.combinations(judged, 2):
        if one.trial["gpu_uuid"] != other.trial["gpu_uuid"]:
            continue
        if abs(one.measured - other.measured) > PAIR_GAP * min(one.measured, other.measured):
            said = one.measured * (1 + error(one)) - other.measured * (1 + error(other))
            pairs, right = pairs + 1, right + (said * (one.measured - other.measured) > 0)
    return pairs, right


def show(sweep: Path, model: CostModel, console: Console) -> None:
    """Error of every trial's joules, their means, and how often the model tells which of two trials costs more."""
    judged = [phase for trial in completed(sweep) for phase in phases_of(model, trial)]
    table = Table("trial", "board", "router, K", "mJ a token", "time measured", "time predicted")
    train = [one for one in judged if one.phase == "train"]
    for one in train:
        row = one.trial
        name = (f"{one.sweep} {row['trial_id']}", (row["gpu_uuid"] or "")[4:9], f"{row['router']}, {row['top_k']}")
        table.add_row(*name, f"{1e3 * one.measured:.4f}", *_percent([one], "+.1f"))
    console.print(table)
    summary = Table("of the trials of", "trials", "time measured", "time predicted")
    for name in sorted({one.sweep for one in train}):
        some = [one for one in train if one.sweep == name]
        summary.add_row(f"{name}, training", str(len(some)), *_percent(some))
    summary.add_row("all, training", str(len(train)), *_percent(train))
    for phase in sorted({one.phase for one in judged} - {"train"}):
        some = [one for one in judged if one.phase == phase]
        summary.add_row(f"all, {phase}", str(len(some)), *_percent(some))
    console.print(summary)
    for name, error in (("measured", lambda one: one.known_error), ("predicted", lambda one: one.predicted_error)):
        pairs, right = signs(train, error)
        share = f"{100 * right / pairs:.1f} %" if pairs else "-"
        console.print(f"which of two trials of one board costs more, time {name}: {right} of {pairs} pairs, {share}")


def _percent(some: Sequence[Judged], form: str = ".2f") -> tuple[str, str]:
    """Mean of absolute errors with the time measured and predicted; of one trial the signed error."""
    shown = []
    for values in ([one.known_error for one in some], [one.predicted_error for one in some]):
        known = np.array([value for value in values if value is not None])
        mean = known[0] if len(some) == 1 and known.size else np.abs(known).mean() if known.size else None
        shown.append("" if mean is None else f"{100 * mean:{form}} %")
    return shown[0], shown[1]


def figure(sweep: Path, model: CostModel, points: Calibration, path: Path) -> None:
    """Watts of one trial, measured and modelled, with their difference; and all held-out points."""
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
    """Modelled watts of each sample's phase (training, prefill, decode), times predicted; NaN of the others."""
    watts: dict[str, float] = {}
    for phase in {str(r["phase"]) for r in samples}:
        if phase in ("train", "prefill") or (phase.startswith("decode_b") and not phase.endswith("_warmup")):
            joules, seconds, _ = modelled(model, trial, phase)
            watts[phase] = joules / seconds
    return np.array([watts.get(str(r["phase"]), np.nan) for r in samples])


def _told_most(sweep: Path) -> dict[str, Any]:
    """The trial with the most phases, of these the longest training."""

    def told(trial: dict[str, Any]) -> tuple[int, float]:
        phases = [key for key in trial if key.startswith("decode_j_per_token_b") and trial[key] is not None]
        return len(phases), trial["train_energy_j"]

    return max(completed(sweep), key=told)


def _watts(sweep: Path, model: CostModel, over: Any, under: Any) -> None:
    trial = _told_most(sweep)
    name = (trial["sweep_id"], trial["trial_id"])
    of_trial = [r for r in rows(sweep, "power") if (r["sweep_id"], r["trial_id"]) == name]
    trace = sorted((r for r in of_trial if r["power_w"] is not None), key=lambda r: float(r["time_s"]))
    expected = modelled_watts(model, trial, trace)
    time_s = np.array([r["time_s"] for r in trace])
    told = time_s[~np.isnan(expected)]
    shown = (time_s >= told[0] - 6) & (time_s <= told[-1] + 2)
    time_s, expected = time_s[shown] - told[0], expected[shown]
    measured, phases = np.array([r["power_w"] for r in trace])[shown], np.array([str(r["phase"]) for r in trace])[shown]
    over.plot(time_s, measured, lw=0.8, label="measured", color="0.35")
    over.plot(time_s, expected, lw=2, label="modelled", color="tab:red")
    over.set(ylabel="watts", title=f"trial {trial['trial_id']}, K = {trial['top_k']}", ylim=(0, 1150))
    over.legend(loc="upper right", ncols=2)
    under.axhline(0, color="0.6", lw=0.8)
    under.plot(time_s, measured - expected, lw=0.8, color="tab:red")
    under.set(xlabel="seconds since training began", ylabel="difference, W")
    for phase in np.unique(phases[~np.isnan(expected)]):
        here = phases == phase
        top = float(max(measured[here].max(), expected[here].max()))
        label = str(phase).replace("decode_b", "decode, batch ")
        over.text(float(time_s[here].mean()), top + 25, label, rotation=90, ha="center", va="bottom", fontsize=7)


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
