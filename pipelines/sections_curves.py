"""The report's curves: loss and joules over epochs, routing health, load per layer, agreement with λ = 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.chart import Axis, Chart, Heat, Key, Line, Point
from pipelines.results import Results, energy_cell, keys_of, title_of
from pipelines.section import Section, Sheet
from pipelines.show import number

#: Trials whose load per layer is drawn.
LOADS = 4


def curves_section(results: Results) -> Section | None:
    """Validation loss over epochs and over joules, with the epoch of convergence."""
    if not results.curves:
        return None
    by_epoch = _curve_chart(results, "curves", "Validation loss over epochs", "epoch", "eval_loss_nats", "epoch")
    modelled = results.front.modelled or all(row["energy_source"] == "modelled" for row in results.trials)
    title = title_of("train_energy_j", modelled=modelled)
    by_joules = _curve_chart(
        results, "curves-joules", "Validation loss over training energy", "train_energy_j", "eval_loss_nats", title
    )
    done = [row for row in results.trials if row["converged_at"] is not None]
    text = (
        f"A trial counts as converged after the first epoch whose successor improves validation loss by less than "
        f"0.5 %: {len(done)} of {len(results.trials)} trials (ringed).",
    )
    figures = tuple(figure for figure in (by_epoch, by_joules) if figure.lines)
    return Section(
        id="curves",
        title="Loss and joules over epochs",
        text=text,
        figures=figures,
        sheets=(_curve_sheet(results),),
        paper=True,
    )


def routing_section(results: Results) -> Section | None:
    """The collapse view: diversity, effective experts, and load per layer."""
    charts = [
        _curve_chart(results, name, title, "epoch", column, "epoch", label)
        for name, title, column, label in (
            ("effective-experts", "Effective experts over training", "effective_experts", "exp(entropy of the load)"),
            ("diversity", "Routing diversity over training", "routing_diversity", "share of experts used"),
        )
    ]
    figures: list[Any] = [chart for chart in charts if chart.lines]
    if not figures:
        return None
    figures += _loads(results)
    text = (
        "A collapsed router sends everything to a few experts: its effective experts fall towards 1, in one layer "
        "before the others. The fuller a cell, the larger the share of the load; even rows are balanced.",
    )
    return Section(
        id="routing",
        title="Routing health",
        text=text,
        figures=tuple(figures),
        sheets=(_routing_sheet(results),),
        paper=True,
    )


def agreement_section(results: Results) -> Section | None:
    """How far a price moves the routing away from what the same weights do at λ = 0."""
    rows = [row for row in results.trials if row["routing_agreement"] is not None and row["energy_lambda"] is not None]
    if not rows:
        return None
    points = [
        Point(
            x=row["energy_lambda"],
            y=row["routing_agreement"],
            tip=f"{results.look.name(row)}\nagreement {row['routing_agreement']:.3f}\ntrial {row['trial_id']}",
            colour=results.look.colour(row),
            shape=results.look.shape(row),
            strong=row["trial_id"] in results.members,
            href=results.links.get(row["trial_id"], ""),
            keys=keys_of(row),
        )
        for row in rows
    ]
    low, high = min(point.y for point in points), max(point.y for point in points)
    figure = Chart(
        id="agreement",
        title="Agreement with λ = 0",
        alt=f"Agreement of the routing with the same checkpoint at λ = 0, by λ: from {low:.3f} to {high:.3f}.",
        x=Axis(title="λ (nat per c_ref)"),
        y=Axis(title="agreement, chance taken off"),
        points=tuple(points),
        legend=results.look.legend(),
        height=340,
    )
    head = ("configuration", "λ", "agreement", "decisions flipped by the price", "drift along the price", "trial")
    body = tuple(
        (results.look.name(row), f"{row['energy_lambda']:g}", *(_cell(row[name]) for name in _AUDIT), row["trial_id"])
        for row in rows
    )
    sheet = Sheet(
        caption="What the price did to the routing", head=head, rows=body, keys=tuple(keys_of(row) for row in rows)
    )
    text = ("1: the price changes no decision; 0: no more agreement than two routers of this load have by chance.",)
    return Section(id="agreement", title="What the price changes", text=text, figures=(figure,), sheets=(sheet,))


_AUDIT = ("routing_agreement", "price_flip_fraction", "price_drift")


def _curve_chart(
    results: Results, name: str, title: str, x: str, y: str, x_title: str, y_title: str | None = None
) -> Chart:
    lines, dots, ends = [], [], []
    for row in _weak_first(results):
        curve = [r for r in results.curves.get(row["trial_id"], []) if r[x] is not None and r[y] is not None]
        if y == "eval_loss_nats":  # the untrained model's loss would flatten all others
            curve = [r for r in curve if r["epoch"] > 0]
        if not curve:
            continue
        tip = f"{results.look.name(row)}\ntrial {row['trial_id']}, seed {row['seed']}"
        keys = keys_of(row)
        look: dict[str, Any] = {
            "colour": results.look.colour(row),
            "strong": row["trial_id"] in results.members,
            "keys": keys,
        }
        xs, ys = [r[x] for r in curve], [r[y] for r in curve]
        lines.append(Line(x=xs, y=ys, tip=tip, dash=results.look.dash(row), **look))
        ends.append(ys[-1])
        for r in curve:
            done = y == "eval_loss_nats" and r["epoch"] == row["converged_at"]
            if done or len(curve) == 1:
                words = f"{tip}\nconverged at epoch {r['epoch']}" if done else tip
                dots.append(Point(x=r[x], y=r[y], tip=words, shape=results.look.shape(row), ring=done, **look))
    bits = results.bits_per_nat if y == "eval_loss_nats" else None
    span = f"; last values from {min(ends):.4g} to {max(ends):.4g}" if ends else ""
    return Chart(
        id=name,
        title=title,
        alt=f"{title}, {len(lines)} trials{span}.",
        x=Axis(title=x_title, whole=x == "epoch"),
        y=Axis(
            title=y_title or title_of(y, modelled=False),
            other=None if bits is None else ("bit per byte", bits),
        ),
        lines=tuple(lines),
        points=tuple(dots),
        legend=(*results.look.legend("line"), Key(label="not on the front", kind="line", strong=False)),
        height=360,
    )


def _weak_first(results: Results) -> list[dict[str, Any]]:
    return sorted(results.trials, key=lambda row: (row["trial_id"] in results.members, row["trial_id"]))


def _loads(results: Results) -> list[Heat]:
    """Load per expert and layer after the last epoch, and effective experts per layer over the epochs."""
    order = [row["trial_id"].split()[0] for row in results.front.rows()]
    order = list(dict.fromkeys([*filter(None, [results.knee_trial]), *order[:1], *order[-1:], *order]))
    by_id = {row["trial_id"]: row for row in results.trials}
    wanted = [by_id[trial] for trial in order if results.curves.get(trial)]
    figures = []
    for i, row in enumerate(wanted[:LOADS]):
        curve = results.curves[row["trial_id"]]
        last = next((r for r in reversed(curve) if r["expert_load"]), None)
        if last is not None:
            figures.append(_load_heat(results, f"load-{i}", row, last))
        if any(r["layer_effective_experts"] for r in curve):
            figures.append(_layer_heat(results, f"layers-{i}", row, [r for r in curve if r["layer_effective_experts"]]))
    return figures


def _load_heat(results: Results, name: str, row: dict[str, Any], last: dict[str, Any]) -> Heat:
    load = last["expert_load"]
    widths = row["expert_widths"] or [None] * len(load[0])
    columns = tuple(f"{e}" if width is None else f"{e} ({width})" for e, width in enumerate(widths))
    top = max(max(layer) for layer in load)
    return Heat(
        id=name,
        title=f"Load per expert: {results.look.name(row)}, trial {row['trial_id']}, epoch {last['epoch']}",
        alt=f"Share of the choices per expert and layer of trial {row['trial_id']}; the largest share is {top:.2f}.",
        rows=tuple(f"layer {i}" for i in range(len(load))),
        columns=columns,
        values=tuple(tuple(layer) for layer in load),
        row_title="layer",
        column_title="expert (inner width)",
        top=max(top, 1e-9),
    )


def _layer_heat(results: Results, name: str, row: dict[str, Any], curve: Sequence[dict[str, Any]]) -> Heat:
    layers = len(curve[0]["layer_effective_experts"])
    experts = float(row["num_experts"] or max(max(r["layer_effective_experts"]) for r in curve))
    values = tuple(tuple(r["layer_effective_experts"][layer] for r in curve) for layer in range(layers))
    low = min(min(layer) for layer in values)
    return Heat(
        id=name,
        title=f"Effective experts per layer: {results.look.name(row)}, trial {row['trial_id']}",
        alt=f"Effective experts of each layer over epochs of trial {row['trial_id']}; the lowest is {low:.2f}.",
        rows=tuple(f"layer {i}" for i in range(layers)),
        columns=tuple(str(r["epoch"]) for r in curve),
        values=values,
        row_title="layer",
        column_title="epoch",
        top=experts,
    )


def _curve_sheet(results: Results) -> Sheet:
    head = (
        "configuration",
        "trial",
        "epoch",
        "loss (nat/token)",
        "loss (bit/byte)",
        "training energy (J)",
        "converged at",
    )
    body, keys = [], []
    for row in reversed(_weak_first(results)):
        name = results.look.name(row)
        for r in results.curves.get(row["trial_id"], []):
            done = "–" if row["converged_at"] is None else str(row["converged_at"])
            losses = (_cell(r["eval_loss_nats"]), _cell(r["eval_bits_per_byte"]))
            body.append((name, row["trial_id"], str(r["epoch"]), *losses, energy_cell(r, "train_energy_j"), done))
            keys.append(keys_of(row))
    return Sheet(caption="Every epoch, front members first", head=head, rows=tuple(body), keys=tuple(keys))


def _routing_sheet(results: Results) -> Sheet:
    names = (
        "routing_diversity",
        "effective_experts",
        "load_cv",
        "dropped_fraction",
        "open_experts",
        "mean_selected_width",
    )
    head = ("configuration", "trial", *(name.replace("_", " ") for name in names))
    rows = [row for row in reversed(_weak_first(results)) if row["effective_experts"] is not None]
    body = tuple((results.look.name(row), row["trial_id"], *(_cell(row[name]) for name in names)) for row in rows)
    return Sheet(caption="After training", head=head, rows=body, keys=tuple(keys_of(row) for row in rows))


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)
