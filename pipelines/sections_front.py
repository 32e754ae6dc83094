"""The report's first part: the decision, and the fronts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.chart import Axis, Band, Chart, Key, Line, Point
from pipelines.epoch_ends import epochs_line
from pipelines.pareto import Front
from pipelines.results import Results, joules_word, keys_of, title_of
from pipelines.section import Section, Sheet
from pipelines.show import front_lines, interval, number

#: Dominated configurations drawn at most; all of them are counted in the caption.
DRAWN = 2000


def decision(results: Results) -> Section:
    """What to take, in a few sentences."""
    front = results.front
    if not len(front):
        lines = [f"No configuration can stand on a front. {left.count} × {left.reason}." for left in front.left_out]
        return Section(id="decision", title="In short", text=tuple(lines or ["No trial has finished yet."]))
    rows = front.rows()
    best = rows[-1]
    text = [
        f"{len(front)} of {len(front.on_front_N)} configurations are not dominated: no other one has both less loss "
        f"and fewer {joules_word(front)}.",
        f"Cheapest: {_point_words(results, front, rows[0])}.",
        f"Lowest loss: {_point_words(results, front, best)}.",
    ]
    knee = next((row for row in rows if row["knee"]), None)
    if knee is not None:
        sure = "under every scaling tried" if front.knee_is_stable else "but another scaling of the axes names another"
        text.insert(1, f"The knee, beyond which loss gets dear: {_point_words(results, front, knee)} ({sure}).")
    if front.modelled:
        text.append("All joules here are modelled, not measured: they rank configurations, they do not bill them.")
    if front.probability_N is None:
        text.append(
            "No configuration was repeated with another seed: nothing is known of the spread of its loss, and the "
            "intervals of its joules are the meter's alone, without the spread between runs."
        )
    text += [f"{note[0].upper()}{note[1:]}." for note in front.notes]
    return Section(id="decision", title="In short", text=tuple(text))


def front_section(results: Results) -> Section:
    """Loss against joules."""
    front = results.front
    text = ["Bars are 95 % intervals. Filled and strong: on the front. Pale: dominated. Ring: the knee."]
    if front.attainment is not None:
        text.append(
            f"Shaded: between what at least one and what all of {front.attainment.seeds} seeds reach (empirical "
            f"attainment). Volume under the mean front {number(front.attainment.mean_hypervolume)}, mean deviation of "
            f"a seed from it {number(front.attainment.deviation)}."
        )
    text += [epochs_line(results.trials), *_hidden_words(front)]
    figure = front_chart(results, front, "front", "Loss against training energy")
    return Section(
        id="front", title="The front", text=tuple(text), figures=(figure,), sheets=(_sheet(results, front),), paper=True
    )


def seconds_section(results: Results) -> Section | None:
    """Loss against seconds: the second front."""
    front = results.seconds
    if front is None:
        return None
    both = set(_member_ids(front)) & set(_member_ids(results.front))
    text = f"{len(both)} configurations are on both fronts, {len(front) - len(both)} only on this one."
    if results.by_points:
        text += " Seconds are known of whole trials only, so that each stands here with its last number of epochs."
    figure = front_chart(results, front, "seconds", "Loss against training time")
    return Section(
        id="seconds",
        title="Loss against seconds",
        text=(text,),
        figures=(figure,),
        sheets=(_sheet(results, front),),
        paper=True,
    )


def front_chart(results: Results, front: Front, name: str, title: str) -> Chart:
    """The points, the staircase of the front, and the attainment band."""
    x, y = front.objectives[0].column, front.objectives[1].column
    rows = front.rows(members_only=False)
    drawn = _drawn(front)
    points = [_point(results, front, rows[i], x, y) for i in drawn]
    order = front.order()
    stairs = Line(x=front.mean_NM[order, 0].tolist(), y=front.mean_NM[order, 1].tolist(), step=True, tip="front")
    legend = (Key(label="front", kind="line"), *results.look.legend())
    if len(drawn) > len(front):
        legend += (Key(label="dominated", kind="point", strong=False),)
    bits = results.bits_per_nat if y == "eval_loss_nats" else None
    ends = [f"{number(front.mean_NM[i, 0])} and {number(front.mean_NM[i, 1])}" for i in (order[0], order[-1])]
    alt = (
        f"{title}: {len(front)} configurations on the front, from {ends[0]} to {ends[1]} "
        f"({title_of(x, modelled=front.modelled)}; {title_of(y, modelled=False)})."
    )
    return Chart(
        id=name,
        title=title,
        alt=alt,
        x=Axis(title=title_of(x, modelled=front.modelled)),
        y=Axis(title=title_of(y, modelled=False), other=None if bits is None else ("bit per byte", bits)),
        points=tuple(points),
        lines=(stairs,),
        bands=_attainment_band(front),
        legend=legend,
        height=440,
    )


def _attainment_band(front: Front) -> tuple[Band, ...]:
    """Between the region that one seed reaches and the one that all reach, as far as both are defined."""
    found = front.attainment
    if found is None:
        return ()
    levels = sorted(found.surfaces)
    one, every = found.surfaces[levels[0]], found.surfaces[levels[-1]]
    if not len(one) or not len(every):
        return ()
    at = np.unique(np.concatenate([one[:, 0], every[:, 0]]))
    at = at[at >= max(one[:, 0].min(), every[:, 0].min())]
    low, high = _stair(one, at), _stair(every, at)
    tip = "between what one seed's front reaches and what all reach"
    return (Band(x=at.tolist(), low=low.tolist(), high=high.tolist(), tip=tip),)


def _stair(surface: np.ndarray, at: np.ndarray) -> np.ndarray:
    ordered = surface[np.lexsort((surface[:, 1], surface[:, 0]))]
    best = np.minimum.accumulate(ordered[:, 1])
    return np.asarray(best[np.searchsorted(ordered[:, 0], at, side="right") - 1])


def _point(results: Results, front: Front, row: dict[str, Any], x: str, y: str) -> Point:
    trial = row["trial_id"].split()[0]
    return Point(
        x=row[x],
        y=row[y],
        tip=_tip(results, front, row, x, y),
        x_range=_range(row, x),
        y_range=_range(row, y),
        colour=results.look.colour(row),
        shape=results.look.shape(row),
        strong=row["on_front"],
        ring=row["knee"],
        href=results.links.get(trial, ""),
        keys=keys_of(row, member="front" if row["on_front"] else "dominated"),
    )


def _tip(results: Results, front: Front, row: dict[str, Any], x: str, y: str) -> str:
    lines = [results.look.name(row)]
    lines += [f"{title_of(axis, modelled=front.modelled)}: {interval(row, axis)}" for axis in (x, y)]
    lines.append("1 seed" if row["seeds"] == 1 else f"{row['seeds']} seeds")
    if row["front_probability"] is not None:
        lines.append(f"on the front with probability {row['front_probability']:.2f}")
    if row["dominated_by"]:
        lines.append(f"dominated by {row['dominated_by'].split()[0]}")
    lines.append(f"trial {row['trial_id']}")
    return "\n".join(lines)


def _range(row: dict[str, Any], axis: str) -> tuple[float, float] | None:
    low = row.get(f"{axis}_low")
    return None if low is None else (low, row[f"{axis}_high"])


def _drawn(front: Front) -> list[int]:
    """Rows to draw: the front, and of the dominated an even sample."""
    rest = np.flatnonzero(~front.on_front_N)
    if len(rest) > DRAWN:
        rest = rest[np.linspace(0, len(rest) - 1, DRAWN).astype(int)]
    return [*rest.tolist(), *front.order().tolist()]


def _hidden_words(front: Front) -> list[str]:
    hidden = len(front.on_front_N) - len(front) - DRAWN
    return [f"{hidden} more dominated configurations are not drawn."] if hidden > 0 else []


def _member_ids(front: Front) -> list[str]:
    return [row["trial_id"] for row in front.rows()]


def _point_words(results: Results, front: Front, row: dict[str, Any]) -> str:
    x, y = (axis.column for axis in front.objectives)
    mark = " (modelled)" if front.modelled else ""
    return f"{results.look.name(row)}, with {interval(row, x)} J{mark} for a loss of {interval(row, y)} nat/token"


def _sheet(results: Results, front: Front) -> Sheet:
    axes = [axis.column for axis in front.objectives]
    rows = front.rows(members_only=False)
    rows.sort(key=lambda row: (not row["on_front"], row[axes[0]]))
    bits = results.bits_per_nat
    head = ["configuration", *(title_of(axis, modelled=front.modelled) for axis in axes)]
    head += (["validation loss (bit/byte)"] if bits else []) + ["seeds", "P(front)", "place", "trials"]
    body = []
    for row in rows:
        cells = [results.look.name(row), *(interval(row, axis) for axis in axes)]
        if bits:
            cells.append(f"{row['eval_loss_nats'] * bits:.4f}")
        chance = row["front_probability"]
        place = (
            "knee" if row["knee"] else "front" if row["on_front"] else f"dominated by {row['dominated_by'].split()[0]}"
        )
        body.append((*cells, str(row["seeds"]), "–" if chance is None else f"{chance:.2f}", place, row["trial_id"]))
    return Sheet(
        caption=f"{len(rows)} configurations, the front first",
        head=tuple(head),
        rows=tuple(body),
        keys=tuple(keys_of(row, member="front" if row["on_front"] else "dominated") for row in rows),
        links=tuple(results.links.get(row["trial_id"].split()[0], "") for row in rows),
    )


def fine_print(results: Results) -> tuple[str, ...]:
    """Hypervolume, knee, context, what was left out: as on the terminal."""
    return tuple(front_lines(results.front))
