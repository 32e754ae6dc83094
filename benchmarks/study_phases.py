"""Sections of the reference study that stand last: phases apart, measured against modelled joules, collapse."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import study_rows as data
from benchmarks.study_rows import Row, Study
from benchmarks.study_text import NOT_RUN, Section, markdown, text
from hwcost import CostModel
from hwcost.judge import mape
from hwcost.ops import COMPUTE, COUNTERS, MEMORY, Call, Counts, ModelShape, counts_of, lm_head, moe_layer
from moe.opening import choosing_launches
from pipelines.chart import COLOURS, DASHES, Axis, Chart, Key, Line, Point
from pipelines.modelled import at_width

BATCHES = (1, 8, 32, 128)
#: Share of a step's time from which on the host that dispatches its kernels bounds it (it runs beside the device).
_HOST_BOUND = 0.9


# --- phases ------------------------------------------------------------------------------------------------


def phases(study: Study) -> Section:
    """Joules per token of training, prefill and decode; what the hardware reached meanwhile."""
    title = "Phases apart"
    rows = data.named(study.stage("phases"))
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    batches = [batch for batch in BATCHES if any(row[_decode(batch)] is not None for row in rows)]
    columns = ["train_j_per_token", "prefill_j_per_token", *map(_decode, batches)]
    head = ("configuration", "training", "prefill", *(f"decode, batch {batch}" for batch in batches), "loss, nat")
    body = [
        [row["name"], *(text(_milli(row[column])) for column in columns), text(row["eval_loss_nats"])] for row in rows
    ]
    base = rows[data.baseline([row["config"] for row in rows]) or 0]
    said = [
        f"mJ per token, one seed each. {data.footing(study, rows, [base])}\n\n{markdown(head, body)}",
        _claims(study, rows, base, batches),
    ]
    return Section(title=title, text=tuple(said), figures=_phase_chart(rows, batches))


def _decode(batch: int) -> str:
    return f"decode_j_per_token_b{batch}"


def _rate(column: str) -> str:
    """Tokens per second that belong to a column of joules per token."""
    return column.replace("j_per_token", "tokens_per_s")


def _milli(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def phase_watts(samples: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Mean watts of each trial's phases."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in samples:
        if row["phase"] and row["power_w"] is not None:
            found.setdefault((row["trial_id"], row["phase"]), []).append(row["power_w"])
    return {key: float(np.mean(values)) for key, values in found.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """One phase of a trial: joules per token, and of one step the seconds, the rates, and the shares of the time that
    launches, experts, and all that the device does take by the profile; None where not known."""

    joules: float | None
    seconds: float | None
    flops_per_s: float | None
    bytes_per_s: float | None
    launch_share: float | None
    expert_share: float | None
    device_share: float | None

    @property
    def by_host(self) -> bool:
        """True where the device's work is less than half of the time: such joules are those of waiting for the host."""
        return bool(self.device_share and self.device_share < 0.5)

    @property
    def by_launches(self) -> bool:
        """True where starting kernels takes longer than experts do: such joules say little of experts."""
        return bool(self.launch_share and self.launch_share > (self.expert_share or 0.0))


def reached(row: Row, watts: Mapping[tuple[str, str], float], batches: Sequence[int]) -> dict[str, Reached]:
    """What the hardware reached in each phase. Time is measured; that of prefill and decode in rows of an older version
    is joules over the mean watts of the phase's power samples."""
    config, size = row["config"], row["config"]["batch_size"]
    call = Call(batch_size=size, seq_len=config["seq_len"])
    steps = row["tokens_trained"] / (size * (config["seq_len"] - 1))  # the first token is no target
    step_s = row["train_duration_s"] / steps if row["train_duration_s"] else None
    found = {"training": _reached(row, "train_step", call, row["train_j_per_token"], step_s)}
    cached = config["decode_prompt_tokens"] + config["decode_new_tokens"] // 2
    prompt = dataclasses.replace(call, phase="prefill")
    others = [("prefill", "prefill", "prefill", prompt, "prefill_j_per_token", call.tokens)]
    for batch in batches:
        step = Call(batch_size=batch, seq_len=cached, phase="decode")
        others.append((f"decode, batch {batch}", f"decode_b{batch}", "decode_step", step, _decode(batch), batch))
    for name, phase, op, asked, column, tokens in others:
        power, joules, rate = watts.get((row["trial_id"], phase)), row[column], row[_rate(column)]
        if rate:
            seconds = tokens / rate
        else:  # watts are as the board drew them, joules as the mean board would have
            seconds = tokens * joules / row["board_factor"] / power if power and joules is not None else None
        found[name] = _reached(row, op, asked, joules, seconds)
    return found


def _reached(row: Row, op: str, call: Call, joules: float | None, seconds: float | None) -> Reached:
    profile = CostModel.for_device(row["gpu_name"], row["power_limit_w"]).profile
    counts = counts_of(op, shape_of(row), call, graphed_batch=profile.decode_graph_batch)
    if op == "prefill":  # the operation counts every position's logits; a trial's prefill reads the last one's alone
        last = dataclasses.replace(call, seq_len=1)
        counts += -1.0 * lm_head(shape_of(row), call) + lm_head(shape_of(row), last)
    launches, experts = counts.launches, len(row["expert_widths"] or ())
    if op == "decode_step" and row["opening_active"]:
        launches += row["config"]["n_layer"] * choosing_launches(experts, row["config"]["top_k"], call.batch_size)
    launch_s, host_s = launches * profile.seconds["launches"], counts.host_launches * profile.host_s_per_launch
    if seconds and host_s > _HOST_BOUND * seconds:
        launch_s = host_s
    device_s = float(counts.vector() @ [profile.seconds[name] for name in COUNTERS])
    one = dataclasses.replace(moe_layer(shape_of(row), call), launches=0.0)  # or a dense layer's feed-forward block
    expert_s = row["config"]["n_layer"] * float(one.vector() @ [profile.seconds[name] for name in COUNTERS])
    return Reached(
        joules=joules,
        seconds=seconds,
        flops_per_s=_sum(counts, COMPUTE) / seconds if seconds else None,
        bytes_per_s=_sum(counts, MEMORY) / seconds if seconds else None,
        launch_share=launch_s / seconds if seconds else None,
        expert_share=expert_s / seconds if seconds else None,
        device_share=device_s / seconds if seconds else None,
    )


def _claims(study: Study, rows: Sequence[Row], base: Row, batches: Sequence[int]) -> str:
    """Joules over the baseline's, phase by phase, what was reached beside them, and whether that makes a claim."""
    watts, spread = phase_watts(study.power("phases")), data.joules_spread(study, over_boards=True)
    found = {row["trial_id"]: reached(row, watts, batches) for row in (base, *(r for r in rows if r is not base))}
    names = {row["trial_id"]: row["name"] for row in rows}
    body = []
    for phase, plain in found[base["trial_id"]].items():
        for trial_id, phases_ in found.items():
            one = phases_[phase]
            if one.joules is not None:
                body.append([phase, names[trial_id], *_claim(one, plain, spread)])
    head = ("phase", "configuration", "joules over those of " + base["name"], "ms/step", "TFLOP/s", "TB/s",
            "launches", "experts", "device", "claim")  # fmt: skip
    return (
        "Beside each claim what was reached: operations and bytes counted from the model's shape and the width "
        "selected, experts open as a balanced router opens them, over the time (of prefill and decode in rows without "
        "a rate: joules over the mean watts of the phase's samples). Launches, experts, device: what the profile gives "
        "to starting a step's kernels, to its experts and to all that the device does, over the step's time; decoding "
        "is the whole of `generate`, prompt included. No claim where the device's work is less than half of the time, "
        "or launches take longer than experts, in either of the two; nor where joules differ by less than three times "
        "the A/A repeatability (of training).\n\n"
        f"{markdown(head, body)}"
    )


def _claim(one: Reached, plain: Reached, spread: data.Spread | None) -> list[str]:
    ratio = one.joules / plain.joules if one.joules and plain.joules else None
    cells = [text(ratio, 3), text(_milli(one.seconds), 3)]
    cells += [text(rate and rate / 1e12, 2) for rate in (one.flops_per_s, one.bytes_per_s)]
    cells += [
        "–" if share is None else f"{share:.0%}" for share in (one.launch_share, one.expert_share, one.device_share)
    ]
    if one is plain or ratio is None:
        return [*cells, ""]
    if one.launch_share is None or plain.launch_share is None or spread is None:
        return [*cells, "none: time or repeatability not known"]
    if one.by_host or plain.by_host:
        return [*cells, "none: the host, not the device"]
    if one.by_launches or plain.by_launches:
        return [*cells, "none: launches, not experts"]
    if abs(math.log(ratio)) <= 3 * spread.value:
        return [*cells, "none: within repeatability"]
    return [*cells, "fewer joules" if ratio < 1 else "more joules"]


def _sum(counts: Counts, names: Sequence[str]) -> float:
    return float(sum(getattr(counts, name) for name in names))


def shape_of(row: Row) -> ModelShape:
    """The model of a row, with the width that its router selected."""
    config = row["config"]
    shape = ModelShape(
        d_model=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        expert_widths=tuple(row["expert_widths"] or ()),
        top_k=config["top_k"],
        dtype="fp32" if row["dtype"] == "fp32" else "bf16",
    )
    selected = row["mean_selected_width"]
    return at_width(shape, selected) if shape.expert_widths and selected and shape.top_k else shape


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
    spread = data.joules_spread(study, over_boards=True)
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
    """Share of pairs on one text that the model orders as the meter does, where the meter tells them apart."""
    if spread is None:
        return "Signs of differences: not known without an A/A."
    measured: dict[tuple[str, str], list[float]] = {}
    model: dict[tuple[str, str], list[float]] = {}
    kind = {}
    for row, value in known:
        key = (row["corpus_fingerprint"], row["config_fingerprint"])
        measured.setdefault(key, []).append(data.log_joules(row))
        model.setdefault(key, []).append(np.log(value / row["tokens_trained"]))
        kind[key] = (row["router"] == "dense", row["top_k"])
    alike: dict[bool, list[bool]] = {True: [], False: []}  # by whether both have the same K
    for one, other in itertools.combinations(sorted(measured), 2):
        change = float(np.mean(measured[one]) - np.mean(measured[other]))
        if one[0] == other[0] and abs(change) > spread.value:
            agrees = (np.mean(model[one]) - np.mean(model[other])) * change > 0
            alike[kind[one] == kind[other]].append(bool(agrees))
    every = alike[True] + alike[False]
    if not every:
        return "No two configurations differ by more than the A/A repeatability."
    same = f"; of the {len(alike[True])} of equal K, {np.mean(alike[True]):.1%}" if alike[True] else ""
    return (
        f"Of {len(every)} pairs of configurations whose measured joules per token differ by more than the A/A "
        f"repeatability ({spread.value:.2%}), it orders {np.mean(every):.1%} alike{same}."
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
