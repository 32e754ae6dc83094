"""Sections of the reference study that come from JSON: the router under a budget at test time (`benchmarks/adapt.py`),
and experts chosen for a whole batch (`benchmarks/opening.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study_rows import Mean, Study
from benchmarks.study_text import NOT_RUN, Section, markdown, text
from pipelines.chart import Axis, Chart, Key, Line

Found = Mapping[str, Any]


def adapting(study: Study) -> Section:
    """Budgets kept, what came of a change of load or of text, prices learnt."""
    title, found = "Test time", study.files.get("adapt")
    if not found:
        return Section(title=title, text=(NOT_RUN,))
    said = [_where(found), _reach(found), _budgets(found), _changes(found), _prices(found)]
    left = [name.removesuffix(" failed") for name in found if name.endswith(" failed")]
    said.append(f"Broke off: {', '.join(left)}." if left else "")
    return Section(title=title, text=tuple(part for part in said if part), figures=_load_chart(found))


def _where(found: Found) -> str:
    device, training = found.get("device", {}), [value for name, value in found.items() if name.startswith("training")]
    base = device.get("set", {}).get("base", "random")
    start = "fresh weights" if base == "random" else "the study's dense model"
    trained = "".join(f", {one['tokens'] / 1e6:.1f} M tokens with {one['router']}" for one in training)
    return f"{device.get('name') or 'CPU'}, joules: {device.get('source')}. Model: {start}{trained}."


def _reach(found: Found) -> str:
    points = found.get("reach", {}).get("points")
    if not points:
        return ""
    body = [
        [f"{p['energy_lambda']:g}", _milli(p["j_per_token"]), text(p["loss_nats"]), text(p["width"], 0)] for p in points
    ]
    known = [p["j_per_token"] for p in points if _known(p["j_per_token"])]
    range_ = (
        f"{_milli(min(known))} to {_milli(max(known))} mJ/token ({1 - min(known) / max(known):.1%})" if known else "–"
    )
    head = ("λ", "mJ/token", "loss, nat/token", "width")
    return f"**Reachable range**: {range_}. Prefill, router frozen, two windows of each λ.\n\n{markdown(head, body)}"


def _budgets(found: Found) -> str:
    kept = {float(name.split()[1]): value for name, value in found.items() if name.startswith("budget ") and value}
    kept = {share: value for share, value in kept.items() if isinstance(value, Mapping)}
    if not kept:
        return ""
    body = [
        [
            f"{share:.0%}",
            _milli(one["budget_j"]),
            str(len(one["spread"])),
            f"{one['off']:+.2%}" if _known(one["off"]) else "–",
            str(len(one["pairs"])),
            _loss(one),
            _pm(one["raw"]),
            _pm(one["at_equal_joules"]),
            _around(one),
            f"{one['update_s'] / one['span_s']:.2%}",
        ]
        for share, one in sorted(kept.items())
    ]
    head = ("budget in the range", "budget, mJ/token", "windows", "mean of windows off by", "seeds",
            "loss, nat", "loss less static λ's, nat", "at equal joules, nat",
            "by static λ's around it, nat", "time of updates")  # fmt: skip
    return (
        "**Budgets**, stationary text, from the side of λ = 0. Static: the frozen router at the mean λ on the same "
        f"text, paired by seed, with 95 % intervals.\n\n{markdown(head, body)}"
    )


def _loss(one: Found) -> str:
    losses = [pair["adapted_loss"] for pair in one["pairs"] if _known(pair.get("adapted_loss"))]
    return f"{sum(losses) / len(losses):.4f}" if losses else "–"


def _around(one: Found) -> str:
    """Of some seeds static λ's beside the budget may not be known."""
    if "at_equal_joules_static" not in one:
        return "–"
    known = sum(_known(pair.get("at_equal_joules_static")) for pair in one["pairs"])
    return _pm(one["at_equal_joules_static"]) + ("" if known == len(one["pairs"]) else f" ({known} seeds)")


def _changes(found: Found) -> str:
    body = [
        [what, mode, *(f"{one[when]:+.2%}" if _known(one[when]) else "–" for when in ("before", "jump", "settled")),
         text(one.get("settled_after"), 0),
         "yes" if one["infeasible"] else ""]
        for what in ("load", "text")
        for mode, one in found.get(f"{what} changes", {}).items()
    ]  # fmt: skip
    if not body:
        return ""
    head = ("change of", "telemetry", "before", "right after", "at the end", "windows to settle", "infeasible")
    return (
        "**Changes** half-way, budget at 75 % of the range: how far off the budget. Replay: the controller hears what "
        f"was recorded before the change.\n\n{markdown(head, body)}"
    )


def _prices(found: Found) -> str:
    prices = found.get("prices")
    if not prices:
        return ""
    body = [
        [
            price["name"],
            text(_micro(price["table_j"]), 3),
            text(_micro(price["learnt_j"]), 3),
            f"{text(_micro(price['low_j']), 3)} to {text(_micro(price['high_j']), 3)}",
            "yes" if price["trusted"] else "no",
        ]
        for price in prices["prices"]
    ]
    table = prices["profile"] + (", analytic" if prices["analytic"] else "")
    head = ("price", "table, µJ", "learnt, µJ", "95 % interval", "trusted")
    return f"**Prices** learnt from {prices['windows']} windows, against the table ({table}).\n\n{markdown(head, body)}"


def _load_chart(found: Found) -> tuple[Chart, ...]:
    """Joules per token over windows, the load changed half-way: by feedback and by replay."""
    modes = {mode: one for mode, one in found.get("load changes", {}).items() if one.get("first")}
    if not modes:
        return ()
    lines, keys, most = list[Line](), list[Key](), list[float]()
    before = max(len(one["first"]) for one in modes.values())
    end = before + max(len(one["second"]) for one in modes.values())
    for i, (mode, one) in enumerate(modes.items()):
        values = [window["j_per_token"] for window in (*one["first"], *one["second"])]
        ahead = before - len(one["first"])  # a replay needs fewer: the change stands at one place
        known = [(at, 1e3 * value) for at, value in enumerate(values, 1 + ahead) if _known(value)]
        look: dict[str, Any] = {"colour": 1 + 3 * i, "dash": i}
        lines.append(Line(x=[at for at, _ in known], y=[value for _, value in known], tip=mode, **look))
        keys.append(Key(label=mode, kind="line", **look))
        most += [value for _, value in known]
    if not most:
        return ()
    first = next(iter(modes.values()))
    change = before + 0.5
    lines.append(Line(x=(change, change), y=(min(most), max(most)), tip="load changes", strong=False))
    budget = first.get("budget_j")
    if budget:
        lines.append(Line(x=(1, end), y=(1e3 * budget, 1e3 * budget), tip="budget", strong=False, dash=2))
        keys.append(Key(label="budget", kind="line", strong=False, dash=2))
    return (
        Chart(
            id="load",
            title="A budget under a load that changes",
            alt=f"Joules per token of {end} windows with a load added after window {before}: {' and '.join(modes)}.",
            x=Axis(title="window (1 s)", whole=True),
            y=Axis(title="energy (mJ/token)"),
            lines=tuple(lines),
            legend=tuple(keys),
        ),
    )


def opening(study: Study) -> Section:
    """Joules and loss of decoding against open experts, by batch."""
    title, found = "Experts chosen for a batch", study.files.get("opening")
    if not found or not found.get("rows"):
        return Section(title=title, text=(NOT_RUN,))
    rows = sorted(found["rows"], key=lambda row: (row["trained"], row["batch"]))
    body = [
        [
            f"{row['router']}, K={row['top_k']}" + (f", λ={row['energy_lambda']:g}" if row["energy_lambda"] else ""),
            row["trained"],
            str(row["batch"]),
            text(row["loss_nats"]),
            text(row["open"], 2),
            _energy(row),
            text(row.get("step_ms"), 3) + ("" if row.get("step") == "captured" else " (not captured)"),
        ]
        for row in rows
    ]
    head = ("read with", "trained with", "batch", "loss, nat/token", "open experts", "decode, mJ/token", "ms/step")
    over = [entry for entry in found.get("overhead", ()) if _known(entry.get("share_of_joules"))]
    words = [
        f"{e['share_of_joules']:+.1%} joules, {e['share_of_step']:+.1%} time at batch {e['batch']} ({e['trained']})"
        for e in over
    ]
    said = [
        f"{found.get('device', {}).get('name') or 'CPU'}. One model of each, read with every router without more "
        "training. Open experts: distinct computing ones per position and layer. ±: the meter's 95 % interval.",
        markdown(head, body),
    ]
    if words:
        said.append(f"Choosing alone (`opening` at λ = 0 opens what `topk` opens) takes {'; '.join(words)}.")
    return Section(title=title, text=tuple(said))


def _energy(row: Found) -> str:
    value, uncertainty = row.get("mj_per_token"), row.get("uncertainty_mj")
    if not _known(value):
        return "–"
    half = None if not _known(uncertainty) else 1.96 * float(uncertainty)  # type: ignore[arg-type]
    return Mean(mean=value, half=half, count=1).text(3)  # type: ignore[arg-type]


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _milli(value: float | None) -> str:
    return text(None if value is None else 1e3 * value)


def _micro(value: float | None) -> float | None:
    return None if value is None else 1e6 * value


def _pm(pair: Sequence[float]) -> str:
    half = pair[1] if _known(pair[1]) else None
    return Mean(mean=pair[0], half=half, count=2).text(5, sign=True)
