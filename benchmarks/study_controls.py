"""The reference study's controls: what a price in joules must beat, seed by seed, at equal loss and at equal joules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import study_rows as data
from benchmarks.study_rows import Mean, Row, Study
from benchmarks.study_sections import NOT_RUN, Section, markdown, text
from pipelines.chart import COLOURS, SHAPES, Axis, Chart, Key, Line, Point
from pipelines.compare import Estimate, Pair, compare

STAGES = ("controls", "controls_routers")
#: A board that waits for work draws what the lowest twentieth of its samples draw.
_WAITING = 5.0


def controls(study: Study) -> Section:
    """Means over seeds, differences from the references, verdicts of `compare`."""
    title = "Controls"
    table, rows = study.table(*STAGES), data.named(study.stage(*STAGES))
    if table is None:
        return Section(title=title, text=(NOT_RUN,))
    groups = dict(
        sorted(data.by_config(rows).items(), key=lambda item: float(np.mean([*map(data.log_joules, item[1])])))
    )
    said = [_means(study, groups)]
    for what, base in references(rows).items():
        said.append(_differences(study, what, base, table, groups))
    said += _at_equal_loss(study, rows, table, groups)
    switched = [row for row in rows if row["opening_active"] is not None]
    if switched:
        active = sum(row["opening_active"] for row in switched)
        said.append(f"Router `opening` chose sets in {active} of {len(switched)} trials (it routes as `energy` else).")
    return Section(title=title, text=tuple(said), figures=_chart(rows, groups))


def references(rows: Sequence[Row]) -> dict[str, Row]:
    """A row of each configuration that a price must beat: no price, a lower K, the price on other experts."""
    routed = [row for row in rows if row["config"]["router"] in ("energy", "topk") and len(_widths(row)) > 1]
    plain = sorted((row for row in routed if not data.acts(row)), key=lambda row: -row["config"]["top_k"])
    found = {
        "no price": plain[0] if plain else None,
        "a lower K": data.first(plain, lambda row: row["config"]["top_k"] < plain[0]["config"]["top_k"]),
        "a shuffled price": data.first(routed, lambda row: data.acts(row) and row["config"]["price"] == "shuffled"),
    }
    return {what: row for what, row in found.items() if row is not None}


def _widths(row: Row) -> Sequence[float]:
    return row["config"]["expert_width_factors"] or (1.0,) * 8


# --- means -------------------------------------------------------------------------------------------------


def _means(study: Study, groups: Mapping[str, list[Row]]) -> str:
    waiting = waiting_w(study, *STAGES)
    body = []
    for group in groups.values():
        columns = [
            Mean.of(row["train_energy_j"] for row in group),
            Mean.of(row["train_energy_j"] / row["tokens_trained"] for row in group),
            Mean.of(_above(row, waiting) for row in group),
            Mean.of(row["eval_loss_nats"] for row in group),
            Mean.of(row["test_loss_nats"] for row in group),
        ]
        shown = [
            "–" if mean is None else mean.text(digits, scale=scale)
            for mean, scale, digits in zip(columns, (1.0, 1e3, 1e3, 1.0, 1.0), (0, 4, 4, 4, 4), strict=True)
        ]
        body.append([group[0]["name"], str(len(group)), *shown, _mean_text(group, "mean_selected_width", 0)])
    head = (
        "configuration",
        "seeds",
        "J",
        "mJ/token",
        "above waiting, mJ/token",
        "loss, nat",
        "test loss, nat",
        "width",
    )
    return (
        "Means with 95 % intervals over seeds. Joules are those of the whole training steps, routers included. Above "
        "waiting: joules less the time times the watts of a waiting board "
        f"({_waiting_words(study, waiting)}). Width: mean neurons that a token passes through per layer.\n\n"
        f"{markdown(head, body)}"
    )


def _mean_text(group: Sequence[Row], column: str, digits: int) -> str:
    mean = Mean.of(row[column] for row in group)
    return text(mean and mean.mean, digits)


def waiting_w(study: Study, *stages: str) -> dict[str, float]:
    """Watts of each board while it waits, from the lowest of its power samples; empty without samples."""
    samples: dict[str, list[float]] = {}
    for stage in stages:
        for row in study.power(stage):
            if row["power_w"] is not None:
                samples.setdefault(row["device_id"], []).append(row["power_w"])
    return {board: float(np.percentile(watts, _WAITING)) for board, watts in sorted(samples.items())}


def _waiting_words(study: Study, waiting: Mapping[str, float]) -> str:
    if study.rows and any(row["train_energy_dynamic_j"] is not None for row in study.stage(*STAGES)):
        return "calibrated idle watts"
    if not waiting:
        return "not known: no power samples"
    return "the lowest 5 % of its power samples: " + ", ".join(f"{watts:.0f} W" for watts in waiting.values())


def _above(row: Row, waiting: Mapping[str, float]) -> float | None:
    """Joules per token above idle: the trial's own where idle watts were calibrated, else above waiting (whose watts
    are corrected as the board's joules are)."""
    if row["train_energy_dynamic_j"] is not None:
        return row["train_energy_dynamic_j"] / row["tokens_trained"]
    watts = waiting.get(row["gpu_uuid"] or "cpu")
    if watts is None or row["train_duration_s"] is None:
        return None
    return float(row["train_energy_j"] - row["board_factor"] * watts * row["train_duration_s"]) / row["tokens_trained"]


# --- differences -------------------------------------------------------------------------------------------


def _differences(study: Study, what: str, base: Row, table: pa.Table, groups: Mapping[str, list[Row]]) -> str:
    """Every configuration against one, seed by seed; the verdict is that of `joulemoe compare`, Holm-adjusted."""
    key = base["config_fingerprint"]
    others = [other for other in groups if other != key]
    if not others:
        return f"Against {what}: {NOT_RUN.lower()}"
    answer = compare(table, f"config_fingerprint={key}", f"config_fingerprint={'|'.join(others)}")
    waiting, judged = waiting_w(study, *STAGES), answer.pairs if study.corrected else ()
    pairs = {pair.candidate["trial_id"].split("-s")[0]: pair for pair in judged}
    body = []
    for other in others:
        group = groups[other]
        loss = data.paired(group, groups[key], data.loss)
        joules = data.paired(group, groups[key], data.log_total)
        above = data.paired(group, groups[key], lambda row: _log_above(row, waiting))
        if loss is None or joules is None:
            continue
        pair = pairs.get(group[0]["trial_id"].split("-s")[0])
        body.append(
            [
                group[0]["name"],
                str(loss.count),
                loss.text(4, sign=True),
                joules.text(2, scale=100, sign=True),
                "–" if above is None else above.text(2, scale=100, sign=True),
                "–" if pair is None or pair.p_equal is None else f"{pair.p_equal:.3f}",
                "–" if pair is None else _verdict(pair),
            ]
        )
    where = data.footing(study, [row for group in groups.values() for row in group], groups[key])
    head = ("configuration", "seeds", "loss, nat", "joules, %", "above waiting, %", "p(losses differ)", "verdict")
    return (
        f"**Against {what}** ({base['name']}): differences paired by seed, with 95 % intervals; all joules of "
        f"training, as a log ratio. {where} Losses within ±{answer.margin_nats:g} nat count as equal; verdicts are "
        "adjusted for all "
        f"candidates tried.\n\n{markdown(head, body)}"
    )


def _log_above(row: Row, waiting: Mapping[str, float]) -> float | None:
    value = _above(row, waiting)
    return math.log(value * row["tokens_trained"]) if value is not None and value > 0 else None


def _verdict(pair: Pair) -> str:
    if pair.p_claim is None or pair.reason:
        return pair.verdict
    return f"{pair.verdict} (p {pair.p_claim:.3f})"


def _at_equal_loss(study: Study, rows: Sequence[Row], table: pa.Table, groups: Mapping[str, list[Row]]) -> list[str]:
    """Each configuration against lines between others: from lower to higher K, and from a dense epoch to the next."""
    if not study.corrected:
        return ["At equal loss: not judged, as joules of boards without an anchor do not compare."]
    found = []
    for what, keys in _lines(rows).items():
        if len(keys) < 2:
            continue
        ends = " to ".join(groups[key][0]["name"] for key in keys)
        body = []
        for key, group in groups.items():
            if key in keys:
                continue
            answer = compare(table, f"config_fingerprint={'|'.join(keys)}", f"config_fingerprint={key}")
            saving, loss = answer.saving_at_equal_loss, answer.loss_at_equal_joules
            if saving is not None or loss is not None:
                body.append([group[0]["name"], _estimate(saving, 100, 1), _estimate(loss, 1, 4)])
        if body:
            head = ("configuration", "joules saved at equal loss, %", "loss at equal joules, nat")
            found.append(
                f"**Against the line of {what}** ({ends}), interpolated in log joules, per seed (a dash: out of the "
                f"line's range for some seed):\n\n{markdown(head, body)}"
            )
        else:
            found.append(f"Against the line of {what} ({ends}): no configuration lies within its range for all seeds.")
    return found


def _lines(rows: Sequence[Row]) -> dict[str, list[str]]:
    known = references(rows)
    by_k = [known[name]["config_fingerprint"] for name in ("a lower K", "no price") if name in known]
    dense = sorted((row for row in rows if row["router"] == "dense"), key=lambda row: row["epochs"])
    return {"K without a price": by_k, "dense epochs": list(dict.fromkeys(row["config_fingerprint"] for row in dense))}


def _estimate(value: Estimate | None, scale: float, digits: int) -> str:
    if value is None:
        return "–"
    mean = f"{value.mean * scale:+.{digits}f}"
    if value.low is None or value.high is None:
        return mean
    return f"{mean} ({value.low * scale:+.{digits}f} to {value.high * scale:+.{digits}f})"


def _chart(rows: Sequence[Row], groups: Mapping[str, list[Row]]) -> tuple[Chart, ...]:
    """Loss against joules, both as differences from no price."""
    known: dict[str, Any] = references(rows)
    if "no price" not in known:
        return ()
    base = groups[known["no price"]["config_fingerprint"]]
    points, labels = [], []
    for group in groups.values():
        loss, joules = data.paired(group, base, data.loss), data.paired(group, base, data.log_total)
        if group is base or loss is None or joules is None:
            continue
        points.append((group[0], joules, loss))
        labels.append(group[0]["name"])
    looks = [{"colour": i % COLOURS, "shape": (i // COLOURS + i) % len(SHAPES)} for i in range(len(points))]
    return (
        Chart(
            id="controls",
            title=f"Controls against {base[0]['name']}",
            alt=f"{len(points)} configurations: change of loss against change of training joules, with intervals.",
            x=Axis(title="training joules, change (%, log ratio)"),
            y=Axis(title="validation loss, change (nat/token)"),
            points=tuple(
                Point(
                    x=100 * joules.mean,
                    y=loss.mean,
                    tip=row["name"],
                    x_range=_span(joules, 100),
                    y_range=_span(loss, 1),
                    **look,
                )
                for (row, joules, loss), look in zip(points, looks, strict=True)
            ),
            lines=(Line(x=(0.0, 0.0), y=_around(points), strong=False),),
            legend=tuple(Key(label=label, kind="point", **look) for label, look in zip(labels, looks, strict=True)),
        ),
    )


def _span(mean: Mean, scale: float) -> tuple[float, float] | None:
    if mean.half is None or not math.isfinite(mean.half):
        return None
    return (scale * (mean.mean - mean.half), scale * (mean.mean + mean.half))


def _around(points: Sequence[tuple[Row, Mean, Mean]]) -> tuple[float, float]:
    losses = [0.0, *(loss.mean for _, _, loss in points)]
    return min(losses), max(losses)
