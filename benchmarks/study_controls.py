"""The reference study's controls: what a price in joules must beat, seed by seed, at equal loss and at equal joules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import study_rows as data
from benchmarks.study_prices import among_prices
from benchmarks.study_rows import Mean, Row, Study
from benchmarks.study_text import NOT_RUN, Section, markdown, text
from pipelines.chart import COLOURS, SHAPES, Axis, Chart, Key, Line, Point
from pipelines.compare import MARGIN_NATS, Estimate, Pair, compare
from pipelines.config import experiment_of

STAGES = ("controls", "controls_routers")
#: A board that waits for work draws what the lowest twentieth of its samples draw.
_WAITING = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One stage of the controls and what its configurations are held against: baselines of its own where it has them,
    seed by seed, so that pairs may lie on one board; those of the other stage for the rest.

    Attributes:
        groups: every configuration, each seed once, this stage's rows before the other's.
        own: keys of the configurations that are this stage's to judge, the cheapest first.
        table: rows as `compare` takes them; of equal configuration and seed it keeps the first.
    """

    stage: str
    groups: Mapping[str, list[Row]]
    own: tuple[str, ...]
    table: pa.Table

    def again(self, sides: Sequence[Side]) -> list[str]:
        """Keys of configurations that ran in this stage and are an earlier one's to judge."""
        ran = {key for key, group in self.groups.items() if group[0]["stage"] == self.stage}
        return [key for side in sides if side is not self for key in side.own if key in ran]


def sides(study: Study, rows: Sequence[Row]) -> list[Side]:
    """The stages that ran; a configuration of both is the first's to judge."""
    ran = [name for name in STAGES if name in study.tables]
    found, seen = [], set[str]()
    for name in ran:
        order = (name, *(other for other in ran if other != name))
        once: dict[tuple[str, int], Row] = {}
        for row in sorted(rows, key=lambda row: order.index(row["stage"])):
            once.setdefault((row["config_fingerprint"], row["seed"]), row)
        groups, table = data.by_config(once.values()), study.table(*order)
        mine = {row["config_fingerprint"] for row in rows if row["stage"] == name} - seen
        seen |= mine
        own = sorted(mine, key=lambda key: float(np.mean([*map(data.log_joules, groups[key])])))
        assert table is not None
        found.append(Side(stage=name, groups=groups, own=tuple(own), table=table))
    return found


def _judged(both: Sequence[Side], without: Sequence[str]) -> list[tuple[Side, str]]:
    """Every configuration but some, with the stage whose it is to judge."""
    return [(side, key) for side in both for key in side.own if key not in without]


def controls(study: Study) -> Section:
    """Means over seeds, differences from the references, verdicts of `compare`."""
    title = "Controls"
    rows = data.named(study.stage(*STAGES))
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    both = sides(study, rows)
    said = [_means(study, both)]
    for what, base in references(rows).items():
        said.append(_differences(study, what, base, both))
    said += _at_equal_loss(study, rows, both)
    by_k = _lines(rows)["K without a price"]
    if study.corrected and len(by_k) == 2:
        groups = {key: side.groups[key] for side in both for key in side.own}
        said += filter(None, [among_prices(groups, *by_k)])
    switched = [row for row in rows if row["opening_active"] is not None]
    if switched:
        active = sum(row["opening_active"] for row in switched)
        said.append(f"Router `opening` chose sets in {active} of {len(switched)} trials (it routes as `energy` else).")
    return Section(title=title, text=tuple(said), figures=_chart(rows, both))


def references(rows: Sequence[Row]) -> dict[str, Row]:
    """A row of each configuration that a price must beat: no price, a lower K, the price on other experts."""
    routed = [row for row in rows if row["config"]["router"] in ("energy", "topk") and len(data.widths(row)) > 1]
    plain = sorted((row for row in routed if not data.acts(row)), key=lambda row: -row["config"]["top_k"])
    found = {
        "no price": plain[0] if plain else None,
        "a lower K": data.first(plain, lambda row: row["config"]["top_k"] < plain[0]["config"]["top_k"]),
        "a shuffled price": data.first(routed, lambda row: data.acts(row) and row["config"]["price"] == "shuffled"),
    }
    return {what: row for what, row in found.items() if row is not None}


# --- means -------------------------------------------------------------------------------------------------


def _means(study: Study, both: Sequence[Side]) -> str:
    waiting = waiting_w(study, *STAGES)
    shown = [(side.groups[key], "") for side, key in _judged(both, ())]
    shown += [(_of_stage(side, key), f" ({side.stage})") for side in both for key in side.again(both)]
    shown.sort(key=lambda group: float(np.mean([*map(data.log_joules, group[0])])))
    body = []
    for group, where in shown:
        columns = [
            Mean.of(row["train_energy_j"] for row in group),
            Mean.of(row["train_energy_j"] / row["tokens_trained"] for row in group),
            Mean.of(_above(row, waiting) for row in group),
            Mean.of(row["eval_loss_nats"] for row in group),
            Mean.of(row["test_loss_nats"] for row in group),
        ]
        cells = [
            "–" if mean is None else mean.text(digits, scale=scale)
            for mean, scale, digits in zip(columns, (1.0, 1e3, 1e3, 1.0, 1.0), (0, 4, 4, 4, 4), strict=True)
        ]
        name, width = group[0]["name"] + where, _mean_text(group, "mean_selected_width", 0)
        body.append([name, str(len(group)), *cells, width])
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
    watts = sorted(
        row["train_energy_j"] / row["board_factor"] / row["train_duration_s"]
        for group, _ in shown
        for row in group
        if row["train_duration_s"]
    )
    drew = f" Training drew {watts[0]:.0f} to {watts[-1]:.0f} W." if watts else ""
    return (
        "Means with 95 % intervals over seeds. Joules are those of the whole training steps, routers included. Above "
        "waiting: joules less the time times the watts of a waiting board "
        f"({_waiting_words(study, waiting)}). Width: mean neurons that a token passes through per layer."
        f"{drew}\n\n{markdown(head, body)}"
    )


def _of_stage(side: Side, key: str) -> list[Row]:
    return [row for row in side.groups[key] if row["stage"] == side.stage]


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


def _differences(study: Study, what: str, base: Row, both: Sequence[Side]) -> str:
    """Every configuration against one, seed by seed; the verdict is that of `joulemoe compare`, Holm-adjusted."""
    key = base["config_fingerprint"]
    parts = [(side, [other for other in side.own if other != key]) for side in both]
    parts = [(side, others) for side, others in parts if others]
    if not parts:
        return f"Against {what}: {NOT_RUN.lower()}"
    body = [row for side, others in parts for row in _against(study, side, key, others)]
    places = []
    for side, others in parts:
        pairs = data.footing(study, [row for other in others for row in side.groups[other]], side.groups[key])
        places.append(pairs if len(parts) == 1 else f"Stage {side.stage}: {pairs}")
    tried = "candidates tried" if len(parts) == 1 else "candidates that its stage tried"
    head = ("configuration", "seeds", "loss, nat", "joules, %", "above waiting, %", "p(losses differ)", "verdict")
    return (
        f"**Against {what}** ({base['name']}): differences paired by seed, with 95 % intervals; all joules of "
        f"training, as a log ratio. {' '.join(places)} Losses within ±{MARGIN_NATS:g} nat count as equal; verdicts are "
        f"adjusted for all {tried}.\n\n{markdown(head, body)}"
    )


def _against(study: Study, side: Side, key: str, others: Sequence[str]) -> list[list[str]]:
    """Rows of the table of differences: configurations of one stage."""
    answer = compare(side.table, f"config_fingerprint={key}", f"config_fingerprint={'|'.join(others)}")
    waiting, judged = waiting_w(study, *STAGES), answer.pairs if study.corrected else ()
    pairs = {experiment_of(pair.candidate["trial_id"]): pair for pair in judged}
    base, body = side.groups[key], []
    for group in (side.groups[other] for other in others):
        loss, joules = data.paired(group, base, data.loss), data.paired(group, base, data.log_total)
        above = data.paired(group, base, lambda row: _log_above(row, waiting))
        if loss is None or joules is None:
            continue
        pair = pairs.get(experiment_of(group[0]["trial_id"]))
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
    return body


def _log_above(row: Row, waiting: Mapping[str, float]) -> float | None:
    value = _above(row, waiting)
    return math.log(value * row["tokens_trained"]) if value is not None and value > 0 else None


def _verdict(pair: Pair) -> str:
    if pair.p_claim is None or pair.reason:
        return pair.verdict
    return f"{pair.verdict} (p {pair.p_claim:.3f})"


def _at_equal_loss(study: Study, rows: Sequence[Row], both: Sequence[Side]) -> list[str]:
    """Each configuration against lines between others: from lower to higher K, and from a dense epoch to the next."""
    if not study.corrected:
        return ["At equal loss: not judged, as joules of boards without an anchor do not compare."]
    found = []
    for what, keys in _lines(rows).items():
        if len(keys) < 2:
            continue
        ends = " to ".join(both[0].groups[key][0]["name"] for key in keys)
        body = []
        for side, key in _judged(both, keys):
            answer = compare(side.table, f"config_fingerprint={'|'.join(keys)}", f"config_fingerprint={key}")
            saving, loss = answer.saving_at_equal_loss, answer.loss_at_equal_joules
            if saving is not None or loss is not None:
                body.append([side.groups[key][0]["name"], estimate(saving, 100, 1), estimate(loss, 1, 4)])
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


def estimate(value: Estimate | None, scale: float, digits: int) -> str:
    """A mean with its interval where more than one seed gives one; a dash where it is not known."""
    if value is None:
        return "–"
    mean = f"{value.mean * scale:+.{digits}f}"
    if value.low is None or value.high is None:
        return mean
    return f"{mean} ({value.low * scale:+.{digits}f} to {value.high * scale:+.{digits}f})"


def _chart(rows: Sequence[Row], both: Sequence[Side]) -> tuple[Chart, ...]:
    """Loss against joules, both as differences from no price."""
    known: dict[str, Any] = references(rows)
    if "no price" not in known:
        return ()
    plain = known["no price"]["config_fingerprint"]
    points, labels = [], []
    for side, key in _judged(both, (plain,)):
        group, base = side.groups[key], side.groups[plain]
        loss, joules = data.paired(group, base, data.loss), data.paired(group, base, data.log_total)
        if loss is None or joules is None:
            continue
        points.append((group[0], joules, loss))
        labels.append(group[0]["name"])
    looks = [{"colour": i % COLOURS, "shape": (i // COLOURS + i) % len(SHAPES)} for i in range(len(points))]
    return (
        Chart(
            id="controls",
            title=f"Controls against {known['no price']['name']}",
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
