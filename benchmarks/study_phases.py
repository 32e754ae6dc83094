"""Sections of the reference study that stand last: phases apart, measured against modelled joules, collapse."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import study_rows as data
from benchmarks.study_rows import Row, Study
from benchmarks.study_sections import NOT_RUN, Section, markdown, text
from hwcost import CostModel
from hwcost.judge import mape
from hwcost.ops import Call, Counts, ModelShape, decode_step, prefill, train_step
from pipelines.chart import COLOURS, DASHES, Axis, Chart, Key, Line, Point

_FLOPS = ("gemm_flops", "grouped_flops", "decode_flops", "attention_flops")
_BYTES = ("activation_bytes", "weight_bytes", "cache_bytes", "head_bytes", "optimizer_bytes")
BATCHES = (1, 8, 32, 128)


# --- phases ------------------------------------------------------------------------------------------------


def phases(study: Study) -> Section:
    """Joules per token of training, prefill and decode; what the hardware reached meanwhile."""
    title = "Phases apart"
    rows = data.named(study.stage("phases"))
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    batches = [batch for batch in BATCHES if any(row[_decode(batch)] is not None for row in rows)]
    columns = ["train_j_per_token", "prefill_j_per_token", *map(_decode, batches)]
    head = ("configuration", "training", "prefill", *(f"decode, batch {batch}" for batch in batches))
    body = [[row["name"], *(text(_milli(row[column])) for column in columns)] for row in rows]
    said = [f"mJ per token, one seed each.\n\n{markdown(head, body)}"]
    base = data.first(rows, lambda row: row["router"] == "energy" and not data.acts(row)) or rows[0]
    body = [
        [row["name"], *(_ratio(row[column], base[column]) for column in columns)] for row in rows if row is not base
    ]
    said.append(f"The same over those of {base['name']}:\n\n{markdown(head, body)}")
    watts = phase_watts(study.power("phases"))
    reached = [[row["name"], *_reached(row, watts, batches)] for row in rows]
    head = ("configuration", *(f"{phase}, TFLOP/s and TB/s" for phase in ("training", "prefill")),
            *(f"decode {batch}, ms/step and TB/s" for batch in batches))  # fmt: skip
    said.append(
        "What was reached: operations and bytes counted from the model's shape and the width selected, experts open as "
        "a balanced router opens them, over the time. Training's time is measured; that of prefill and decode is "
        "joules per token over the mean watts of the phase's power samples. A step whose time barely changes with the "
        f"batch is bound by launches, not by experts.\n\n{markdown(head, reached)}"
    )
    return Section(title=title, text=tuple(said), figures=_phase_chart(rows, batches))


def _decode(batch: int) -> str:
    return f"decode_j_per_token_b{batch}"


def _milli(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def _ratio(value: float | None, base: float | None) -> str:
    return "–" if value is None or not base else f"{value / base:.3f}"


def phase_watts(samples: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Mean watts of each trial's phases."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in samples:
        if row["phase"] and row["power_w"] is not None:
            found.setdefault((row["trial_id"], row["phase"]), []).append(row["power_w"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _reached(row: Row, watts: Mapping[tuple[str, str], float], batches: Sequence[int]) -> list[str]:
    config, shape = row["config"], shape_of(row)
    call = Call(batch_size=config["batch_size"], seq_len=config["seq_len"])
    tokens = call.tokens
    steps = row["tokens_trained"] / (config["batch_size"] * (config["seq_len"] - 1))  # the first token is no target
    step_s = None if not row["train_duration_s"] else row["train_duration_s"] / steps
    found = [_rates(train_step(shape, call), step_s)]
    found.append(_rates(prefill(shape, call), _seconds(row, watts, "prefill", "prefill_j_per_token", tokens)))
    cached = config["decode_prompt_tokens"] + config["decode_new_tokens"] // 2
    for batch in batches:
        seconds = _seconds(row, watts, f"decode_b{batch}", _decode(batch), batch)
        counts = decode_step(shape, Call(batch_size=batch, seq_len=cached))
        found.append("–" if seconds is None else f"{1e3 * seconds:.3f} \\| {_sum(counts, _BYTES) / seconds / 1e12:.2f}")
    return found


def _seconds(row: Row, watts: Mapping[tuple[str, str], float], phase: str, column: str, tokens: float) -> float | None:
    """Time of `tokens` tokens: their joules over the phase's mean watts."""
    power, joules = watts.get((row["trial_id"], phase)), row[column]
    return None if not power or joules is None else tokens * joules / power


def _rates(counts: Counts, seconds: float | None) -> str:
    if not seconds:
        return "–"
    return f"{_sum(counts, _FLOPS) / seconds / 1e12:.1f} \\| {_sum(counts, _BYTES) / seconds / 1e12:.2f}"


def _sum(counts: Counts, names: Sequence[str]) -> float:
    return float(sum(getattr(counts, name) for name in names))


def shape_of(row: Row) -> ModelShape:
    """The model of a row, with the width that its router selected."""
    config = row["config"]
    widths = tuple(row["expert_widths"] or ())
    selected = row["mean_selected_width"]
    if widths and selected and config["top_k"]:
        widths = (round(selected / config["top_k"]),) * len(widths)
    return ModelShape(
        d_model=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        expert_widths=widths,
        top_k=config["top_k"],
        dtype="fp32" if row["dtype"] == "fp32" else "bf16",
    )


def _phase_chart(rows: Sequence[Row], batches: Sequence[int]) -> tuple[Chart, ...]:
    if len(batches) < 2:
        return ()
    lines, keys = [], []
    for i, row in enumerate(rows):
        known = [(batch, 1e3 * row[_decode(batch)]) for batch in batches if row[_decode(batch)] is not None]
        if not known:
            continue
        look: dict[str, Any] = {"colour": i % COLOURS, "dash": i % len(DASHES)}
        lines.append(Line(x=[b for b, _ in known], y=[j for _, j in known], tip=row["name"], **look))
        keys.append(Key(label=row["name"], kind="line", **look))
    return (
        Chart(
            id="phases",
            title="Joules of decoding",
            alt=f"Joules per generated token over the batch, {len(lines)} configurations.",
            x=Axis(title="sequences decoded together", log=True),
            y=Axis(title="decoding energy (mJ/token)", log=True),
            lines=tuple(lines),
            legend=tuple(keys),
        ),
    )


# --- measured against modelled -----------------------------------------------------------------------------


def modelled(study: Study) -> Section:
    """Training joules as measured and as the cost model says, and whether it orders configurations alike."""
    title = "Measured against modelled"
    rows = [row for stage in data.STAGES for row in study.stage(stage)]
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    if study.context.modelled:
        return Section(title=title, text=("Nothing was measured here: these joules are modelled.",))
    spread = data.joules_spread(study)
    said, figures = [], []
    for what, values in _predictions(rows).items():
        known = [(row, value) for row, value in zip(rows, values, strict=True) if value]
        if not known:
            said.append(f"{what}: not known for any trial.")
            continue
        errors = [value / row["train_energy_j"] - 1 for row, value in known]
        said.append(
            f"{what}: {len(known)} trials, mean absolute error {mape(errors):.1%}, mean error {np.mean(errors):+.1%}, "
            f"after the mean error is taken off {np.std(np.log1p(errors)):.1%}. {_signs(known, spread)}"
        )
        figures.append(_model_chart(known, f"model-{len(figures) + 1}", what))
    return Section(title=title, text=tuple(said), figures=tuple(figures))


def _predictions(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """What trials noted of a calibrated profile, and what the model says now, calibrated for this device or not."""
    models = {key: CostModel.for_device(*key) for key in {(row["gpu_name"], row["power_limit_w"]) for row in rows}}
    profiles = sorted({model.profile.name for model in models.values()})
    again = []
    for row in rows:
        model, config = models[row["gpu_name"], row["power_limit_w"]], row["config"]
        cost = model.get_cost(
            "train_step", config["batch_size"], config["seq_len"], shape=shape_of(row), extrapolate=True
        )
        steps = row["tokens_trained"] / (config["batch_size"] * (config["seq_len"] - 1))
        again.append(steps * cost.energy_j)
    return {
        "As trials noted (a calibrated profile of the device)": [row["modelled_train_energy_j"] for row in rows],
        f"Profile {', '.join(profiles)}, with the widths selected": again,
    }


def _signs(known: Sequence[tuple[Row, float]], spread: data.Spread | None) -> str:
    """Share of pairs of configurations that the model orders as the meter does, where the meter tells them apart."""
    if spread is None:
        return "Signs of differences: not known without an A/A."
    measured: dict[str, list[float]] = {}
    model: dict[str, list[float]] = {}
    for row, value in known:
        measured.setdefault(row["config_fingerprint"], []).append(data.log_joules(row))
        model.setdefault(row["config_fingerprint"], []).append(np.log(value / row["tokens_trained"]))
    agree = count = 0
    for one, other in itertools.combinations(sorted(measured), 2):
        change = float(np.mean(measured[one]) - np.mean(measured[other]))
        if abs(change) > spread.value:
            count += 1
            agree += (np.mean(model[one]) - np.mean(model[other])) * change > 0
    if not count:
        return "No two configurations differ by more than the A/A repeatability."
    return (
        f"Of {count} pairs of configurations whose measured joules per token differ by more than the A/A repeatability "
        f"({spread.value:.2%}), it orders {agree / count:.1%} alike."
    )


def _model_chart(known: Sequence[tuple[Row, float]], name: str, what: str) -> Chart:
    scale = [1e3 * row["train_energy_j"] / row["tokens_trained"] for row, _ in known]
    model = [1e3 * value / row["tokens_trained"] for row, value in known]
    ends = (min(scale), max(scale))
    top_ks = sorted({row["top_k"] for row, _ in known if row["top_k"] is not None})
    shapes = {None: 6, **{top_k: i for i, top_k in enumerate(top_ks)}}
    return Chart(
        id=name,
        title="Measured and modelled training joules",
        alt=f"{what}: modelled over measured joules per token of {len(known)} trials; the line is equality.",
        x=Axis(title="measured (mJ/token)"),
        y=Axis(title="modelled (mJ/token)"),
        points=tuple(
            Point(x=x, y=y, tip=row["trial_id"], shape=shapes[row["top_k"]], colour=1)
            for x, y, (row, _) in zip(scale, model, known, strict=True)
        ),
        lines=(Line(x=ends, y=ends),),
        legend=tuple(
            Key(label="dense" if top_k is None else f"top-{top_k}", kind="point", shape=shape, colour=1)
            for top_k, shape in shapes.items()
            if any(row["top_k"] == top_k for row, _ in known)
        ),
    )


# --- collapse ----------------------------------------------------------------------------------------------


def collapse(study: Study) -> Section:
    """Effective experts and loss with and without each cure."""
    title = "Collapse and its cures"
    rows = data.named(study.stage("collapse"))
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    last, best = study.epochs("collapse"), min(row["eval_loss_nats"] for row in rows)
    body, points = [], []
    for row in rows:
        layers = last.get(row["trial_id"], {})
        least = min(layers.get("layer_effective_experts") or [float("nan")])
        busiest = max((max(load) for load in layers.get("expert_load") or []), default=float("nan"))
        alive = least >= 0.9 * row["num_experts"] and row["eval_loss_nats"] <= 1.02 * best
        cells = (text(row["eval_loss_nats"]), f"{row['eval_loss_nats'] / best - 1:+.2%}")
        cells += (text(row["effective_experts"], 2), text(least, 2), text(busiest, 2), "yes" if alive else "")
        body.append([row["name"], *cells])
        points.append(row)
    head = ("run", "loss, nat", "over the best", "effective experts", "least layer", "busiest expert", "cured")
    said = (
        "One seed each. Cured: every layer keeps nine tenths of its experts' worth, within 2 % of the best loss. "
        "Runs on unequal experts compare among themselves."
    )
    return Section(title=title, text=(said, markdown(head, body)), figures=(_collapse_chart(points),))


def _collapse_chart(rows: Sequence[Row]) -> Chart:
    looks = [{"colour": i % COLOURS, "shape": (i // COLOURS + i) % 7} for i in range(len(rows))]
    return Chart(
        id="collapse",
        title="Loss against effective experts",
        alt=f"Validation loss over effective experts of {len(rows)} runs.",
        x=Axis(title="effective experts, mean of layers"),
        y=Axis(title="validation loss (nat/token)"),
        points=tuple(
            Point(x=row["effective_experts"], y=row["eval_loss_nats"], tip=row["name"], **look)
            for row, look in zip(rows, looks, strict=True)
        ),
        legend=tuple(Key(label=row["name"], kind="point", **look) for row, look in zip(rows, looks, strict=True)),
    )
