"""The report's audit of absorption: what the gates have made of the price, layer by layer, over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.chart import Axis, Chart, Heat, Key, Line
from pipelines.results import Results, keys_of
from pipelines.section import Section, Sheet
from pipelines.show import number

#: Trials that are drawn; the table has all of them.
DRAWN = 4
Row = dict[str, Any]


def absorption_section(results: Results) -> Section | None:
    """Drift of mean logits along the price, λ undone, std(z) and flips at λ → 0; None where no price acted."""
    audited = [(row, curve) for row in _front_first(results) if (curve := _audited(results, row))]
    if not audited:
        return None
    figures: list[Any] = []
    for i, (row, curve) in enumerate(audited[:DRAWN]):
        figures.append(_undone_chart(results, f"absorption-{i}", row, curve))
        if curve[-1]["layer_price_flip_fraction"]:
            figures.append(_flip_heat(results, f"flips-{i}", row, curve))
    return Section(
        id="absorption",
        title="Has the gate learnt the price away?",
        text=(
            "Selection is by s − λ·c̃. A gate can take λ back by letting the logits of dear experts drift upwards "
            "(λ undone: slope of the drift since the start over c̃, divided by τ; λ that is left: λ − that), or by "
            "growing its logits until λ is small beside their spread, std(z). A share of flipped decisions near 0 says "
            "that the price decides nothing any more. Drift alone is no proof: an expert that is dear because it is "
            "wide may deserve its tokens.",
        ),
        figures=tuple(figures),
        sheets=(_sheet(results, audited),),
    )


def _front_first(results: Results) -> list[Row]:
    return sorted(results.trials, key=lambda row: (row["trial_id"] not in results.members, row["trial_id"]))


def _audited(results: Results, row: Row) -> list[Row]:
    """Epochs with an audit, of a trial whose λ is above 0."""
    if not row["energy_lambda"]:
        return []
    return [r for r in results.curves.get(row["trial_id"], []) if r["layer_lambda_undone"]]


def _undone_chart(results: Results, name: str, row: Row, curve: Sequence[Row]) -> Chart:
    """λ undone of every layer over epochs, beside λ itself: where a line meets λ, the price is gone."""
    epochs = [r["epoch"] for r in curve]
    layers = len(curve[0]["layer_lambda_undone"])
    lines = [
        Line(
            x=epochs,
            y=[r["layer_lambda_undone"][layer] for r in curve],
            tip=f"layer {layer}\nλ undone {number(curve[-1]['layer_lambda_undone'][layer])}",
            colour=layer % 7,
            dash=layer // 7,
            keys=keys_of(row),
        )
        for layer in range(layers)
    ]
    own = row["energy_lambda"]
    lines.append(Line(x=epochs, y=[own] * len(epochs), tip=f"λ = {own:g}: all undone", strong=False, keys=keys_of(row)))
    last = curve[-1]["layer_lambda_undone"]
    return Chart(
        id=name,
        title=f"λ undone per layer: {results.look.name(row)}, trial {row['trial_id']}",
        alt=(
            f"λ undone by each of {layers} layers over epochs of trial {row['trial_id']}, whose λ is {own:g}; after the"
            f" last epoch from {min(last):.3g} to {max(last):.3g} nat per c_ref."
        ),
        x=Axis(title="epoch", whole=True),
        y=Axis(title="λ undone (nat per c_ref)"),
        lines=tuple(lines),
        legend=(
            *(Key(label=f"layer {layer}", kind="line", colour=layer % 7, dash=layer // 7) for layer in range(layers)),
            Key(label="λ itself", kind="line", strong=False),
        ),
        height=320,
    )


def _flip_heat(results: Results, name: str, row: Row, curve: Sequence[Row]) -> Heat:
    flips = [r for r in curve if r["layer_price_flip_fraction"]]
    layers = len(flips[0]["layer_price_flip_fraction"])
    values = tuple(tuple(r["layer_price_flip_fraction"][layer] for r in flips) for layer in range(layers))
    top = max(max(layer) for layer in values)
    return Heat(
        id=name,
        title=f"Decisions that flip at λ → 0: {results.look.name(row)}, trial {row['trial_id']}",
        alt=f"Share of decisions that the price decides, by layer and epoch, trial {row['trial_id']}; up to {top:.3f}.",
        rows=tuple(f"layer {layer}" for layer in range(layers)),
        columns=tuple(str(r["epoch"]) for r in flips),
        values=values,
        row_title="layer",
        column_title="epoch",
        top=max(top, 1e-9),
    )


def _sheet(results: Results, audited: Sequence[tuple[Row, list[Row]]]) -> Sheet:
    head = (
        "configuration", "trial", "layer", "λ", "drift along c̃ (nat per c_ref)", "λ undone", "λ left",
        "std(z) at the start", "std(z)", "flips at λ → 0",
    )  # fmt: skip
    body, keys = [], []
    for row, curve in audited:
        first, last = curve[0], curve[-1]
        for layer, undone in enumerate(last["layer_lambda_undone"]):
            spreads = (_at(first["layer_logit_std"], layer), _at(last["layer_logit_std"], layer))
            values = (
                _at(last["layer_price_drift"], layer), number(undone), number(row["energy_lambda"] - undone), *spreads,
                _at(last["layer_price_flip_fraction"], layer),
            )  # fmt: skip
            own = f"{row['energy_lambda']:g}"
            body.append((results.look.name(row), row["trial_id"], str(layer), own, *values))
            keys.append(keys_of(row))
    return Sheet(caption="Every layer, after the last epoch", head=head, rows=tuple(body), keys=tuple(keys))


def _at(values: Sequence[float] | None, layer: int) -> str:
    return "–" if not values else number(values[layer])
