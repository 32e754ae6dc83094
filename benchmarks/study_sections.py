"""Sections of the reference study that stand first: its cost, its repeatability, the front, its members and epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import study_rows as data
from benchmarks.study_dense import Beside
from benchmarks.study_prices import against_lines
from benchmarks.study_rows import Mean, Row, Study
from benchmarks.study_text import NOT_RUN, Section, markdown, text, total
from pipelines.chart import Axis, Chart, Key, Line, Point
from pipelines.pareto import Front, pareto_front
from pipelines.results import Look, title_of
from pipelines.show import front_lines, interval, number

# --- cost --------------------------------------------------------------------------------------------------


def cost(study: Study) -> Section:
    """What the study took: joules of trials and anchors, GPU-minutes."""
    rows = []
    for stage in data.STAGES:
        attempts = [row for row in study.attempts if row["stage"] == stage]
        if attempts:
            rows.append(_bill(stage, attempts, [a for a in study.anchors() if data.stage(a["sweep_id"]) == stage]))
    if not rows:
        return Section(title="Cost of the study", text=(NOT_RUN,))
    sums = [total(row[i] for row in rows) for i in range(1, 7)]
    body = [_cells(row) for row in [*rows, ("all", *sums)]]
    head = ("stage", "trials", "failed", "training, kJ", "all of the trials, kJ", "anchors, kJ", "GPU-minutes")
    joules = (sums[3] or 0.0) + (sums[4] or 0.0)
    boards = sorted({row["gpu_uuid"] for row in study.attempts if row["gpu_uuid"]})
    said = f"{joules / 1e3:,.1f} kJ ({joules / 3.6e6:.3f} kWh) on {len(boards)} boards. {study.context}."
    return Section(title="Cost of the study", text=(said, markdown(head, body)))


def _bill(stage: str, attempts: Sequence[Row], anchors: Sequence[Row]) -> tuple[Any, ...]:
    """Trials, failed ones, training, everything, anchors, minutes. Totals of a trial are over its attempts already."""
    last: dict[str, Row] = {}
    for row in sorted(attempts, key=lambda row: row["attempt"]):
        last[row["trial_id"]] = row
    seconds = total(row["duration_s"] for row in attempts)
    return (
        stage,
        len(last),
        sum(row["state"] == "FAILED" for row in last.values()),
        total(row["train_energy_j"] for row in last.values()),
        total(map(_whole_j, last.values())),
        total(row["energy_j"] for row in anchors),
        None if seconds is None else seconds / 60,
    )


def _whole_j(row: Row) -> float | None:
    """All joules of a trial; where some part is not known, those that are."""
    whole: float | None = row["total_energy_j"]
    return total([row["setup_energy_j"], row["train_energy_j"]]) if whole is None else whole


def _cells(row: Sequence[Any]) -> list[str]:
    stage, trials, failed, *joules, minutes = row
    return [stage, str(trials), str(failed), *(text(j and j / 1e3, 1) for j in joules), text(minutes, 1)]


# --- repeatability -----------------------------------------------------------------------------------------


def repeatability(study: Study) -> Section:
    """A/A: the spread of equal trials, and effects in multiples of it."""
    rows = data.named(study.stage("repeatability"))
    title = "Repeatability (A/A)"
    if not rows:
        return Section(title=title, text=(NOT_RUN,))
    joules, losses = data.joules_spread(study), data.loss_spread(study)
    body = []
    for group in data.by_config(rows).values():
        for board in sorted({row["gpu_uuid"] or row["host"] for row in group}):
            body.append(_cell_row(group, board))
    head = ("configuration", "board", "trials", "mJ/token", "spread", "loss, nat/token", "spread, nat")
    said = [
        "Seeds differ between trials of one configuration, so the spread of loss is that of seeds. Spread: standard "
        "deviation; of joules relative to the mean, within one board.",
        markdown(head, body),
    ]
    over = data.joules_spread(study, over_boards=True)
    if joules is not None and over is not None and losses is not None:
        said.append(
            f"Pooled: joules {joules.value:.2%} within a board ({joules.dof} degrees of freedom), {over.value:.2%} "
            f"over all boards, {'corrected' if study.corrected else 'not corrected'} ({over.dof}); loss "
            f"{losses.value:.4f} nat ({losses.dof})."
        )
        said.append(_effects(study, rows, max(joules.value, over.value), losses.value))
    same = _same_trials(study)
    if same is not None:
        said.append(
            f"Trials of one configuration, seed and board that ran in several stages: joules {same[0].value:.2%}, "
            f"loss {same[1].value:.5f} nat ({same[0].dof} degrees of freedom): without the seed."
        )
    return Section(title=title, text=tuple(said))


def _cell_row(group: Sequence[Row], board: str) -> list[str]:
    here = [row for row in group if (row["gpu_uuid"] or row["host"]) == board]
    spread = data.Spread.of([[data.log_joules(row) for row in here]])
    loss = data.Spread.of([[data.loss(row) for row in here]])
    per_token = np.mean([row["train_energy_j"] / row["tokens_trained"] for row in here])
    return [
        here[0]["name"],
        board[-4:],
        str(len(here)),
        f"{per_token * 1e3:.4f}",
        "–" if spread is None else f"{spread.value:.2%}",
        f"{np.mean([data.loss(row) for row in here]):.4f}",
        text(loss and loss.value),
    ]


def _effects(study: Study, rows: Sequence[Row], joules: float, losses: float) -> str:
    """Each configuration against the first, paired by seed, in multiples of the spreads."""
    groups = list(data.by_config(rows).values())
    base = max(groups, key=lambda group: (not data.acts(group[0]), group[0]["config"]["top_k"]))
    body = []
    for group in groups:
        if group is base:
            continue
        change, loss = data.paired(group, base, data.log_joules), data.paired(group, base, data.loss)
        if change is None or loss is None:
            continue
        large = abs(change.mean) > 3 * joules
        body.append(
            [
                group[0]["name"],
                change.text(2, scale=100, sign=True, unit=" %"),
                f"{abs(change.mean) / joules:.1f}",
                loss.text(4, sign=True),
                f"{abs(loss.mean) / losses:.1f}" if losses else "–",
                "yes" if large else "no",
            ]
        )
    head = ("configuration", "joules (log ratio)", "× spread", "loss, nat", "× spread", "joules beyond 3×")
    where = data.footing(study, rows, base)
    said = f"Against {base[0]['name']}, paired by seed, in multiples of the larger spread. {where}"
    return f"{said}\n\n{markdown(head, body)}"


def _same_trials(study: Study) -> tuple[data.Spread, data.Spread] | None:
    rows = [row for stage in data.STAGES if stage not in data.OTHER_TEXT for row in study.stage(stage)]
    keys = ("config_fingerprint", "seed", "gpu_uuid")
    joules = data.Spread.of(data.cells(rows, data.log_joules, *keys))
    losses = data.Spread.of(data.cells(rows, data.loss, *keys))
    return None if joules is None or losses is None else (joules, losses)


# --- the front ---------------------------------------------------------------------------------------------


def front(study: Study) -> Section:
    """Loss against joules: members, the hypervolume, what regularizers do at equal λ, K and widths."""
    table = study.table("front")
    if table is None:
        return Section(title="The front", text=(NOT_RUN,))
    rows = {row["trial_id"]: row for row in data.named(study.stage("front"))}
    found = pareto_front(table)
    said = [f"{len(found)} of {len(found.on_front_N)} configurations are not dominated."]
    said.append(_members(found, rows))
    dense = Beside.of(study, found, list(rows.values()))
    if dense.runs:
        said.append(dense.text())
    said.append("\n".join(f"* {line}" for line in front_lines(found)))
    said += filter(None, [_regularizers(list(rows.values())), against_lines(list(rows.values()))])
    return Section(title="The front", text=tuple(said), figures=(_front_chart(found, rows, "front", dense),))


def members(study: Study) -> Section:
    """The front's members and their neighbours with more seeds, on the test split."""
    title = "The front's members on the test split"
    table, rows = study.table("members"), data.named(study.stage("members"))
    if table is None:
        return Section(title=title, text=(NOT_RUN,))
    found = pareto_front(table, y="test_loss_nats")
    groups, places = data.by_config(rows), {row["config_fingerprint"]: row for row in _places(found, rows)}
    first = study.table("front")
    chosen = (
        set()
        if first is None
        else {
            row["config_fingerprint"] for row in _places(pareto_front(first), study.stage("front")) if row["on_front"]
        }
    )
    at = data.baseline([row["config"] for row in rows])
    base = [] if at is None else groups[rows[at]["config_fingerprint"]]
    order = sorted(groups, key=lambda key: float(np.mean([*map(data.log_joules, groups[key])])))
    body = [_second_look(groups[key], base, places[key], key in chosen) for key in order if key in places]
    head = (
        "configuration",
        "seeds",
        "mJ/token",
        "test loss, nat",
        "joules, %",
        "test loss, nat, change",
        "on test",
        "P(front)",
    )
    against = f" from {base[0]['name']}, paired by seed" if base else " (no baseline ran)"
    stay = sum(places[key]["on_front"] for key in chosen & set(places))
    said = (
        "Chosen on validation loss by one seed, judged here on the test split by seeds that did not choose. Means with "
        f"95 % intervals over seeds; changes{against}, joules per token as a log ratio. "
        f"{data.footing(study, rows, base)}"
    )
    told = f"{stay} of {len(chosen & set(places))} members that ran again are undominated on test (●: was a member)."
    dense = Beside.of(study, found, rows)
    return Section(
        title=title,
        text=(said, markdown(head, body), told, *([dense.text()] if dense.runs else [])),
        figures=(_front_chart(found, {row["trial_id"]: row for row in rows}, "members", dense),),
    )


def _places(found: Front, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every configuration of a front, with its fingerprint."""
    known = {row["trial_id"]: row["config_fingerprint"] for row in rows}
    every = found.rows(members_only=False)
    return [{**row, "config_fingerprint": known[row["trial_id"].split()[0]]} for row in every]


def _second_look(group: Sequence[Row], base: Sequence[Row], place: dict[str, Any], member: bool) -> list[str]:
    same = bool(base) and group[0]["config_fingerprint"] == base[0]["config_fingerprint"]
    joules = None if same else data.paired(group, base, data.log_joules)
    loss = None if same else data.paired(group, base, data.test_loss)
    per_token, test = (
        Mean.of(row["train_energy_j"] / row["tokens_trained"] for row in group),
        Mean.of(map(data.test_loss, group)),
    )
    return [
        group[0]["name"] + (" ●" if member else ""),
        str(len(group)),
        "–" if per_token is None else per_token.text(4, scale=1e3),
        "–" if test is None else test.text(4),
        "–" if joules is None else joules.text(2, scale=100, sign=True),
        "–" if loss is None else loss.text(4, sign=True),
        "undominated" if place["on_front"] else "dominated",
        text(place["front_probability"], 2),
    ]


def _members(found: Front, rows: dict[str, Row]) -> str:
    body = []
    for row in found.rows():
        trial = rows[row["trial_id"].split()[0]]
        chance = row["front_probability"]
        body.append(
            [
                trial["name"] + (" ◀" if row["knee"] else ""),
                interval(row, "train_energy_j"),
                interval(row, "eval_loss_nats"),
                text(trial["test_loss_nats"]),
                text(trial["effective_experts"], 2),
                text(chance, 2),
            ]
        )
    return markdown(("member", "J", "loss, nat/token", "test loss", "effective experts", "P(front)"), body)


def _regularizers(rows: Sequence[Row]) -> str:
    """Mean change against no regularizer, at equal everything else."""
    keyed = {(_rest(row), row["regularizer"]): row for row in rows}
    body = []
    for name in sorted({row["regularizer"] for row in rows if row["regularizer"]}):
        pairs = [(row, keyed.get((rest, None))) for (rest, regularizer), row in keyed.items() if regularizer == name]
        both = [(row, base) for row, base in pairs if base is not None]
        joules = Mean.of([data.log_joules(row) - data.log_joules(base) for row, base in both])
        losses = Mean.of([data.loss(row) - data.loss(base) for row, base in both])
        if joules is not None and losses is not None:
            body.append([name, str(joules.count), joules.text(2, scale=100, sign=True), losses.text(4, sign=True)])
    if not body:
        return ""
    head = ("regularizer", "pairs", "joules, %", "loss, nat")
    return f"Against no regularizer at equal λ, K and widths (means over pairs, one seed):\n\n{markdown(head, body)}"


def _rest(row: Row) -> tuple[Any, ...]:
    config = row["config"]
    return (config["router"], config["top_k"], config["energy_lambda"], tuple(config["expert_width_factors"] or ()))


def _front_chart(found: Front, rows: dict[str, Row], name: str, dense: Beside) -> Chart:
    look = Look.of(list(rows.values()))
    x, y = (axis.column for axis in found.objectives)
    points = []
    for row in found.rows(members_only=False):
        trial = rows[row["trial_id"].split()[0]]
        equal = len(set(trial["config"]["expert_width_factors"] or [1])) == 1
        points.append(
            Point(
                x=row[x],
                y=row[y],
                tip=trial["name"],
                x_range=_range(row, x),
                y_range=_range(row, y),
                colour=None if equal else look.colour(trial),
                shape=look.shape(trial),
                strong=row["on_front"],
                ring=row["knee"],
            )
        )
    order = found.order()
    beaten = f" Dense runs dominate {int(dense.dominated_F.sum())} of them." if dense.runs else ""
    stairs = Line(x=found.mean_NM[order, 0].tolist(), y=found.mean_NM[order, 1].tolist(), step=True, tip="front")
    return Chart(
        id=name,
        title="Loss against training energy",
        alt=f"{len(found)} of {len(found.on_front_N)} configurations are on the front.{beaten}",
        x=Axis(title=title_of(x, modelled=found.modelled)),
        y=Axis(title=title_of(y, modelled=False)),
        points=(*points, *dense.points()),
        lines=(stairs, *dense.lines()),
        legend=(
            Key(label="front", kind="line"),
            *dense.legend(),
            *look.legend(),
            Key(label="equal experts", kind="point"),
            Key(label="dominated", kind="point", strong=False),
        ),
    )


def _range(row: dict[str, Any], axis: str) -> tuple[float, float] | None:
    low = row.get(f"{axis}_low")
    return None if low is None else (low, row[f"{axis}_high"])


# --- epochs ------------------------------------------------------------------------------------------------


def epochs(study: Study) -> Section:
    """The ends that each anytime trial passed through, as configurations of their own."""
    title = "Another epoch"
    trials = {row["trial_id"]: row for row in study.stage("epochs")}
    if not trials:
        return Section(title=title, text=(NOT_RUN,))
    found = pareto_front(study.points("epochs"), table="points")
    ends = found.rows(members_only=False)
    known = [(end, {**trials[end["trial_id"]], "epochs": end["epochs"]}) for end in ends if end["trial_id"] in trials]
    names = data.named([row for _, row in known])
    before = {(end["trial_id"], end["epochs"]): end for end, _ in known}
    body = []
    for (end, _), row in zip(known, names, strict=True):
        fewer = before.get((end["trial_id"], end["epochs"] - 1))
        ratio = fewer and 100 * math.log(end["train_energy_j"] / fewer["train_energy_j"])
        bought = fewer and end["eval_loss_nats"] - fewer["eval_loss_nats"]
        cells = [number(end["train_energy_j"]), f"{end['eval_loss_nats']:.4f}"]
        cells += ["–" if ratio is None else f"{ratio:+.2f}", "–" if bought is None else f"{bought:+.4f}"]
        body.append([row["name"], *cells, "front" if end["on_front"] else "dominated"])
    said = (
        "One trial each, of one seed, passes through all ends; an end's joules are those of the trunk and of its own "
        "decay. Changes: from an epoch less, joules as a log ratio."
    )
    head = ("end", "J", "loss, nat/token", "joules, %", "loss, nat, change", "place")
    return Section(title=title, text=(said, markdown(head, body)))
