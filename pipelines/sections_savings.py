"""The report's savings: joules at equal loss, and joules over a model's life."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.chart import Axis, Chart, Key, Line
from pipelines.compare import NO_EVIDENCE, Comparison, Estimate, Pair, compare
from pipelines.epoch_ends import POINTS
from pipelines.lifetime import Lifetime, Segment, bill, lifetime
from pipelines.results import Results, name_of
from pipelines.section import Section, Sheet
from pipelines.show import number

Namer = Callable[[Mapping[str, Any]], str]
POINTS_NOTE = (
    "Compared are the points that anytime trials passed through: each number of epochs is a configuration of its own, "
    "and a seed is one whole trial."
)


def questions(trials: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The comparisons that these trials can answer: (question, baseline, candidate), each selection once."""
    done = [row for row in trials if row["state"] == "COMPLETED" and not row["censored"]]
    routers = {row["router"] for row in done}
    found = []
    if "dense" in routers and len(routers) > 1:
        found.append(("experts against the dense model", "router=dense", "router!=dense"))
    priced = {row["router"]: set[bool]() for row in done}
    for row in done:
        if row["energy_lambda"] is not None:
            priced[row["router"]].add(row["energy_lambda"] > 0)
    if set().union(*priced.values()) == {True, False}:
        found.append(("a price on energy against none", "energy_lambda=0", "energy_lambda>0"))
    for name in sorted(routers - {"dense", "topk"}):
        same = priced[name] == {True} and priced.get("topk") == {False} and routers <= {"dense", "topk", name}
        if "topk" in routers and not same:
            found.append((f"the router {name} against topk", "router=topk", f"router={name}"))
    return found


def savings_section(results: Results) -> Section | None:
    """Joules saved at equal loss, for every question that the sweep can answer."""
    text, rows, tables = [], [], set[str]()
    for question, baseline, candidate in questions(results.trials):
        try:
            found = compare(results.store, baseline, candidate, sweep_id=results.sweep_id)
        except ValueError:  # no row of a side may stand on a front
            continue
        tables.add(found.table)
        text.append(f"{question[0].upper()}{question[1:]}: {verdict(found, results.look.name)}")
        rows += [(question, *pair_cells(pair, results.look.name)) for pair in found.pairs]
    if not text:
        return None
    rows.sort(key=lambda row: row[-2] == NO_EVIDENCE)
    sheet = Sheet(caption="Pairs, those with evidence first", head=("question", *PAIR_HEAD), rows=tuple(rows))
    note = (
        "Equal means that two one-sided tests put the losses within ±0.01 nat of each other. Joules saved carry 95 % "
        "intervals shared over all candidates of one baseline; p is Holm-adjusted over them."
    )
    if POINTS in tables:
        note = f"{POINTS_NOTE} {note}"
    return Section(id="savings", title="What is saved at equal loss", text=(*text, note), sheets=(sheet,))


def verdict(found: Comparison, name: Namer = name_of) -> str:
    """The mean saving between the fronts, and the best pair with evidence; or that there is none."""
    joules = "modelled joules" if found.context.modelled else "joules"
    saving, best = found.saving_at_equal_loss, found.best
    if saving is None:
        first = f"no mean saving, because {found.why_no_means}."
    elif saving.low is None:
        first = (
            f"{NO_EVIDENCE}: {saving.mean:+.1%} of the {joules} at equal loss, from one seed, so without an interval."
        )
    elif saving.excludes_zero:
        word = "saves" if saving.mean > 0 else "costs"
        first = f"{word} {abs(saving.mean):.1%} of the {joules} at equal loss on average ({percent_range(saving)})."
    else:
        first = f"{NO_EVIDENCE} of a saving at equal loss on average: {saving.mean:+.1%} ({percent_range(saving)})."
    if best is None:
        return f"{first} Pair by pair: {NO_EVIDENCE} of a saving."
    return (
        f"{first} Best pair: {name(best.candidate)} instead of {name(best.baseline)} saves {best.saving.mean:.1%} "
        f"({percent_range(best.saving)})."
    )


def percent_range(estimate: Estimate) -> str:
    """An interval of shares in words."""
    if estimate.low is None or estimate.high is None:
        return "interval not known"
    return f"{estimate.low:+.1%} to {estimate.high:+.1%}, {estimate.seeds} seeds"


PAIR_HEAD = ("baseline", "candidate", "joules saved", "loss difference (nat)", "p", "verdict", "why")


def pair_cells(pair: Pair, name: Namer = name_of) -> tuple[str, ...]:
    """One pair as text, in the order of `PAIR_HEAD`."""
    loss = pair.loss_difference
    span = "" if loss.low is None else f" ({loss.low:+.4f} to {loss.high:+.4f})"
    saved = f"{pair.saving.mean:+.1%}" + ("" if pair.saving.low is None else f" ({percent_range(pair.saving)})")
    p = "–" if pair.p_claim is None else f"{pair.p_claim:.3g}"
    return (name(pair.baseline), name(pair.candidate), saved, f"{loss.mean:+.4f}{span}", p, pair.verdict, pair.reason)


# --- over a lifetime ---------------------------------------------------------------------------------------


def lifetime_section(
    results: Results,
    decode_tokens: float | None = None,
    price_per_kwh: float | None = None,
    co2_g_per_kwh: float | None = None,
) -> Section | None:
    """From how many decoded tokens on which configuration costs least, at the best loss and at the knee's."""
    limits: list[float | None] = [None]
    if results.front.knee is not None:
        limits = [float(results.front.mean_NM[results.front.knee, 1]), None]
    lives = [lifetime(results.store, sweep_id=results.sweep_id, max_loss=limit) for limit in limits]
    known = [life for life in lives if life is not None]
    if not known:
        return None
    text, sheets = [], []
    for life in known:
        words = "; ".join(segment_words(segment, results.look.name) for segment in life.segments)
        text.append(f"With a loss of at most {life.max_loss:.4f} nat/token: {words}.")
        sheets.append(_sheet(results, life, decode_tokens, price_per_kwh, co2_g_per_kwh))
    if results.by_points:
        text.append(
            "Decoding is measured at the end of a trial only, so that each anytime trial stands here with its last "
            "number of epochs."
        )
    figure = _chart(results, known[0], decode_tokens)
    title = "Training and decoding together"
    return Section(id="lifetime", title=title, text=tuple(text), figures=(figure,), sheets=tuple(sheets))


def segment_words(segment: Segment, name: Namer = name_of) -> str:
    """Where a configuration is the cheapest."""
    if segment.from_tokens == 0:
        return f"from the first token on {name(segment.labels)} costs least"
    span = ""
    if segment.from_range is not None:
        low, high = segment.from_range
        span = f" (95 %: {number(low)} to {'never' if math.isinf(high) else number(high)})"
    return f"from {number(segment.from_tokens)} decoded tokens{span} on {name(segment.labels)} costs least"


def _chart(results: Results, life: Lifetime, decode_tokens: float | None) -> Chart:
    first, last = life.segments[0], life.segments[-1]
    pays = first.train_j / max(first.decode_j_per_token, 1e-12)
    top = max(decode_tokens or 0.0, 10 * last.from_tokens, 10 * pays)
    tokens = np.geomspace(top / 1e4, top, 80).tolist()
    lines, legend = [], []
    for i, segment in enumerate(life.segments):
        name, colour = results.look.name(segment.labels), results.look.colour(segment.labels)
        joules = [segment.joules(n) for n in tokens]
        lines.append(Line(x=tokens, y=joules, colour=colour, dash=i % 4, tip=name))
        legend.append(Key(label=name, kind="line", colour=colour, dash=i % 4))
    title = f"Energy over the model's life, loss at most {life.max_loss:.4f}"
    return Chart(
        id="lifetime-energy",
        title=title,
        alt=f"{title}: {'; '.join(segment_words(segment, results.look.name) for segment in life.segments)}.",
        x=Axis(title="decoded tokens", log=True),
        y=Axis(title=f"train + decode (J{', modelled' if life.modelled else ''})", log=True),
        lines=tuple(lines),
        legend=tuple(legend),
        height=320,
    )


def _sheet(
    results: Results,
    life: Lifetime,
    decode_tokens: float | None,
    price_per_kwh: float | None,
    co2_g_per_kwh: float | None,
) -> Sheet:
    mark = " modelled" if life.modelled else ""
    head = [
        "configuration",
        f"train (J{mark})",
        f"decode (J/token{mark})",
        "loss (nat/token)",
        "cheapest from (tokens)",
    ]
    if decode_tokens is not None:
        head += [f"J{mark} at {decode_tokens:.3g} tokens", f"kWh{mark}", "price", "CO2 (kg)"]
    rows = []
    for segment in life.segments:
        cells = [results.look.name(segment.labels), number(segment.train_j), number(segment.decode_j_per_token)]
        cells += [f"{segment.loss:.4f}", number(segment.from_tokens)]
        if decode_tokens is not None:
            due = bill(segment.joules(decode_tokens), price_per_kwh=price_per_kwh, co2_g_per_kwh=co2_g_per_kwh)
            money = ("–" if value is None else number(value) for value in (due.price, due.co2_kg))
            cells += [number(segment.joules(decode_tokens)), number(due.kwh), *money]
        rows.append(tuple(cells))
    caption = f"Cheapest by decoded tokens, loss at most {life.max_loss:.4f} nat/token"
    return Sheet(caption=caption, head=tuple(head), rows=tuple(rows))
