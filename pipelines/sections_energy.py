"""The report's account of joules and watts, and its provenance."""

from __future__ import annotations

import collections
import json
import shlex
from collections.abc import Sequence
from typing import Any

from pipelines.chart import Axis, Band, Bars, Chart, Key, Line
from pipelines.results import Results, energy_cell, is_modelled, keys_of
from pipelines.section import Section, Sheet
from pipelines.show import number

PHASES = (
    ("training", "train_energy_j"),
    ("load, compile, warm-up", "setup_energy_j"),
    ("evaluation", "eval_energy_j"),
    ("decay branches", "branches_energy_j"),
    ("idle between windows", "idle_energy_j"),
    ("lost", "lost_energy_j"),
)
#: NVML clock event reasons that hold clocks down: power cap, hardware slowdown, thermal, power brake.
THROTTLE = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
#: Trials whose power trace is drawn, points per trace, bars per chart.
TRACES, SAMPLES, BARS = 3, 400, 40


def phases_section(results: Results) -> Section | None:
    """Where the joules of each trial went."""
    rows = [row for row in results.trials if any(row[column] for _, column in PHASES)]
    if not rows:
        return None
    rows.sort(key=lambda row: sum(row[column] or 0.0 for _, column in PHASES))
    shown = rows[:BARS]
    kinds = {is_modelled(row) for row in rows}
    mark = ", modelled" if kinds == {True} else ", some modelled" if True in kinds else ""
    totals = {name: sum(row[column] or 0.0 for row in rows) for name, column in PHASES}
    whole = sum(totals.values())
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in totals.items() if value)
    figure = Bars(
        id="phases",
        title="Energy by phase",
        alt=f"Joules of {len(shown)} trials by phase. Over all trials: {shares}.",
        x=Axis(title=f"energy (J{mark})", zero=True),
        labels=tuple(f"{results.look.name(row)} · {row['trial_id']}" for row in shown),
        parts=tuple(name for name, _ in PHASES),
        values=tuple(tuple(row[column] or 0.0 for _, column in PHASES) for row in shown),
        keys=tuple(keys_of(row) for row in shown),
    )
    head = (
        "configuration",
        "trial",
        *(f"{name} (J)" for name, _ in PHASES),
        "total (J)",
        "cost model, training (J)",
        "source",
    )
    body = tuple(
        (
            results.look.name(row),
            row["trial_id"],
            *(energy_cell(row, column) for _, column in PHASES),
            energy_cell(row, "total_energy_j"),
            _modelled(row),
            row["energy_source"] or "–",
        )
        for row in rows
    )
    sheet = Sheet(caption="Joules by phase", head=head, rows=body, keys=tuple(keys_of(row) for row in rows))
    hidden = f" {len(rows) - BARS} dearer trials are in the table only." if len(rows) > BARS else ""
    text = f"The trials took {_by_source(rows)}: {shares}.{hidden}{_anchor_words(results)}"
    return Section(id="phases", title="Where the joules went", text=(text,), figures=(figure,), sheets=(sheet,))


def _modelled(row: dict[str, Any]) -> str:
    """What the cost model says of a trial's training, and how far off it was where the joules were measured."""
    modelled_j, measured_j = row["modelled_train_energy_j"], row["train_energy_j"]
    if modelled_j is None:
        return "–"
    off = f" ({modelled_j / measured_j - 1:+.1%})" if measured_j and not is_modelled(row) else ""
    return f"{number(modelled_j)} modelled{off}"


def _anchor_words(results: Results) -> str:
    spent_j = sum(row["energy_j"] or 0.0 for row in results.anchors)
    return f" The anchor workload took {number(spent_j)} J beside them." if spent_j else ""


def _by_source(rows: Sequence[dict[str, Any]]) -> str:
    """Joules of all phases, never adding modelled ones to measured ones."""
    sums: dict[str, float] = {}
    for row in rows:
        source = row["energy_source"] or "not known"
        sums[source] = sums.get(source, 0.0) + sum(row[column] or 0.0 for _, column in PHASES)
    return " and ".join(f"{number(joules)} J ({source})" for source, joules in sums.items())


def power_section(results: Results) -> Section | None:
    """Measured against modelled watts over time, their difference, temperature and throttling."""
    figures: list[Chart] = []
    rows: list[tuple[str, ...]] = []
    for i, (row, samples) in enumerate(_traces(results)):
        figures += _power_charts(results, f"power-{i}", row, samples)
        rows += _phase_rows(row, samples)
    if not figures:
        return None
    head = ("trial", "phase", "samples", "measured (W)", "modelled (W)", "difference (W)", "highest (°C)", "throttled")
    sheet = Sheet(caption="Means by phase", head=head, rows=tuple(rows))
    text = (
        "The difference is measured minus modelled; training, prefill and decoding are modelled, the rest is not. "
        "Shaded: clocks held down by power or heat.",
    )
    return Section(id="power", title="Watts, degrees, throttling", text=text, figures=tuple(figures), sheets=(sheet,))


def _traces(results: Results) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The knee's trial and the front's cheapest and dearest, as far as they have samples."""
    order = [row["trial_id"].split()[0] for row in results.front.rows()]
    wanted = list(dict.fromkeys([*filter(None, [results.knee_trial]), *order[:1], *order[-1:]]))
    wanted = wanted or [row["trial_id"] for row in results.trials]
    traces = results.power(wanted[:TRACES]) if wanted else {}
    by_id = {row["trial_id"]: row for row in results.trials}
    return [(by_id[trial], traces[trial]) for trial in wanted if traces.get(trial)]


def _power_charts(results: Results, name: str, row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[Chart]:
    found = []
    measured, modelled = _series(samples, "power_w"), _series(samples, "modelled_power_w")
    head = f"{results.look.name(row)}, trial {row['trial_id']}"
    spans = _throttled(samples)
    if measured or modelled:
        lines = _lines((measured, "measured"), (modelled, "modelled"))
        mean = sum(_values(measured)) / len(_values(measured)) if measured else None
        words = "no watts were measured" if mean is None else f"measured mean {mean:.4g} W"
        axis = Axis(title="power (W" + (")" if measured else ", modelled)"), zero=True)
        legend: tuple[Key, ...] = (Key(label="measured", kind="line"),) if measured else ()
        legend += (Key(label="modelled", kind="line", colour=3, dash=1),) if modelled else ()
        found.append(
            _trace_chart(name, f"Power: {head}", f"Power over time; {words}.", axis, lines, spans, legend, 280)
        )
    gap = _series([{**s, "gap": _gap(s)} for s in samples], "gap")
    if gap:
        worst = max(map(abs, _values(gap)))
        axis, alt = Axis(title="difference (W)"), f"Measured minus modelled watts over time; largest {worst:.4g} W."
        lines = _lines((gap, "measured − modelled"))
        found.append(_trace_chart(f"{name}-gap", f"Measured − modelled: {head}", alt, axis, lines, spans, (), 180))
    heat = _series(samples, "temperature_c")
    if heat:
        axis, alt = Axis(title="temperature (°C)"), f"Temperature over time, at most {max(_values(heat)):.4g} °C."
        lines = _lines((heat, "temperature"))
        found.append(_trace_chart(f"{name}-heat", f"Temperature: {head}", alt, axis, lines, spans, (), 180))
    return found


def _trace_chart(
    name: str,
    title: str,
    alt: str,
    y: Axis,
    lines: tuple[Line, ...],
    spans: tuple[Band, ...],
    legend: tuple[Key, ...],
    height: int,
) -> Chart:
    if spans:
        legend = (*legend, Key(label="throttled", kind="span"))
        alt += f" Throttled in {len(spans)} spans."
    time = Axis(title="time since the attempt began (s)")
    return Chart(id=name, title=title, alt=alt, x=time, y=y, lines=lines, bands=spans, legend=legend, height=height)


Run = tuple[list[float], list[float]]


def _lines(*series: tuple[list[Run], str]) -> tuple[Line, ...]:
    looks: tuple[dict[str, Any], ...] = ({"colour": None, "dash": 0}, {"colour": 3, "dash": 1})
    return tuple(
        Line(x=x, y=y, tip=tip, colour=look["colour"], dash=look["dash"] or 0)
        for (runs, tip), look in zip(series, looks, strict=False)
        for x, y in runs
    )


def _values(runs: Sequence[Run]) -> list[float]:
    return [value for _, values in runs for value in values]


def _series(samples: Sequence[dict[str, Any]], column: str) -> list[Run]:
    """A column over time, one run (times, values) for every stretch without a null: nothing is drawn where nothing is
    known. Beyond 400 samples the values are means over bins of equal length.
    """
    stretches: list[list[tuple[float, float]]] = [[]]
    for sample in samples:
        if sample[column] is not None:
            stretches[-1].append((sample["time_s"], sample[column]))
        elif stretches[-1]:
            stretches.append([])
    known = [stretch for stretch in stretches if stretch]
    if sum(map(len, known)) > SAMPLES:
        width = (known[-1][-1][0] - known[0][0][0]) / SAMPLES or 1.0
        known = [_binned(stretch, width) for stretch in known]
    return [([t for t, _ in stretch], [v for _, v in stretch]) for stretch in known]


def _binned(stretch: Sequence[tuple[float, float]], width: float) -> list[tuple[float, float]]:
    bins: dict[int, list[tuple[float, float]]] = {}
    for t, v in stretch:
        bins.setdefault(int((t - stretch[0][0]) / width), []).append((t, v))
    return [(sum(t for t, _ in rows) / len(rows), sum(v for _, v in rows) / len(rows)) for rows in bins.values()]


def _gap(sample: dict[str, Any]) -> float | None:
    if sample["power_w"] is None or sample["modelled_power_w"] is None:
        return None
    return float(sample["power_w"] - sample["modelled_power_w"])


def _throttled(samples: Sequence[dict[str, Any]]) -> tuple[Band, ...]:
    spans: list[list[float]] = []
    held = False
    for sample in samples:
        now = bool((sample["throttle_reasons"] or 0) & THROTTLE)
        if now and held:
            spans[-1][1] = sample["time_s"]
        elif now:
            spans.append([sample["time_s"], sample["time_s"]])
        held = now
    return tuple(Band(x=span, tip=f"throttled from {span[0]:.1f} s to {span[1]:.1f} s") for span in spans)


def _phase_rows(row: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(sample["phase"] or "between windows", []).append(sample)
    found: list[tuple[str, ...]] = []
    for phase, part in groups.items():
        gaps = [{"gap": _gap(sample)} for sample in part]
        heat = [s["temperature_c"] for s in part if s["temperature_c"] is not None]
        held = [bool(s["throttle_reasons"] & THROTTLE) for s in part if s["throttle_reasons"] is not None]
        means = (_mean(part, "power_w"), _mean(part, "modelled_power_w"), _mean(gaps, "gap"))
        share = f"{sum(held) / len(held):.0%}" if held else "–"
        found.append((row["trial_id"], phase, str(len(part)), *means, f"{max(heat):.0f}" if heat else "–", share))
    return found


def _mean(rows: Sequence[dict[str, Any]], column: str) -> str:
    known = [row[column] for row in rows if row[column] is not None]
    return f"{sum(known) / len(known):.1f}" if known else "–"


# --- provenance --------------------------------------------------------------------------------------------

_PROVENANCE = (
    ("energy source", "energy_source"),
    ("GPU", "gpu_name"),
    ("board", "gpu_uuid"),
    ("driver", "driver_version"),
    ("power limit (W)", "power_limit_w"),
    ("host", "host"),
    ("device", "device"),
    ("precision", "dtype"),
    ("base model", "base"),
    ("corpus", "corpus_fingerprint"),
    ("price profile", "price_profile"),
    ("commit", "git_sha"),
    ("throttled", "throttled"),
    ("shared GPU", "shared_gpu"),
)


def provenance_section(results: Results, fine_print: Sequence[str]) -> Section:
    """On what the numbers were measured, with which versions, and what was left out."""
    rows = []
    for title, column in _PROVENANCE:
        rows += [(title, value, count) for value, count in _counts(row[column] for row in results.trials)]
    versions = [json.loads(row["versions_json"]) for row in results.trials if row["versions_json"]]
    for name in sorted({name for found in versions for name in found}):
        rows += [(name, value, count) for value, count in _counts(found.get(name) for found in versions)]
    flags = [flag for row in results.trials for flag in row["energy_flags"] or []]
    rows += [("monitor's remark", value, count) for value, count in _counts(flags)]
    facts = Sheet(caption="What the trials ran on", head=("what", "value", "trials"), rows=tuple(rows))
    states = Sheet(
        caption="Outcomes",
        head=("state", "reason", "trials"),
        rows=tuple(
            (state, error or "–", str(count))
            for (state, error), count in collections.Counter(
                (r["state"], r["error"]) for r in results.trials
            ).most_common()
        ),
    )
    return Section(
        id="provenance",
        title="Provenance, and what was left out",
        text=tuple(fine_print),
        sheets=(states, facts),
        open_tables=True,
    )


def commands_section(results: Results) -> Section:
    """The commands that make these numbers again."""
    out, sweep = shlex.quote(results.out), shlex.quote(results.sweep_id)
    lines = [
        f"joulemoe pareto {out} --sweep {sweep}",
        f"joulemoe pareto {out} --sweep {sweep} --x train_duration_s --format csv",
        f"joulemoe report {out} --sweep {sweep}",
        f"joulemoe export {out} --sweep {sweep} --csv",
        f"joulemoe ui {out} --sweep {sweep}",
    ]
    row = next((row for row in results.trials if row["trial_id"] == results.knee_trial), None)
    if row is not None and row["config_json"] not in ("", "{}"):
        config = json.dumps(json.loads(row["config_json"]), indent=2, ensure_ascii=False)
        lines += [
            "",
            "# the knee once more",
            f"cat > knee.yaml <<'EOF'\n{config}\nEOF",
            "joulemoe trial knee.yaml --out again",
        ]
    return Section(id="commands", title="Commands", code="\n".join(lines))


def _counts(values: Any) -> list[tuple[str, str]]:
    found = collections.Counter("not known" if value is None else str(value) for value in values)
    return [(value, str(count)) for value, count in found.most_common()]
