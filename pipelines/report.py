"""The report of a sweep: one HTML page that needs no network, and figures for papers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from pipelines import figures, svg
from pipelines import sections_boards as boards
from pipelines import sections_curves as curves
from pipelines import sections_energy as energy
from pipelines import sections_front as fronts
from pipelines import sections_savings as savings
from pipelines.chart import Heat
from pipelines.records import EpochRecord, TrialRecord
from pipelines.results import FILTERS, Results, joules_word, keys_of, load, title_of
from pipelines.section import Section
from pipelines.show import number

#: Matrices of at most so many columns stand two in a row.
NARROW = 5
Papers = Literal["few", "all", "none"]
_FILTER_TITLES = {"energy_lambda": "λ", "top_k": "top-k"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bill:
    """What the report is told about the model's life: tokens to decode, price of a kWh, grams of CO2 per kWh."""

    decode_tokens: float | None = None
    price_per_kwh: float | None = None
    co2_g_per_kwh: float | None = None


def write_report(
    out: str | os.PathLike[str],
    sweep_id: str,
    *,
    links: Mapping[str, str] | None = None,
    bill: Bill | None = None,
    refresh_s: int | None = None,
    running: str = "",
    papers: Papers = "few",
) -> list[Path]:
    """Write `OUT/report/<sweep_id>/index.html` and its figures as PNG and SVG.

    Args:
        out: folder of the results. For an object store the report is written to `./report/<sweep_id>`.
        sweep_id: the sweep.
        links: address of each trial's MLflow run, by trial id.
        bill: tokens to decode over the model's life, price and carbon intensity, where known.
        refresh_s: the page reloads itself so often; not at all where None.
        running: a line that says that the sweep is still running.
        papers: which figures also become PNG and SVG: the fronts and the curves (`few`), `all` or `none`.

    Returns:
        The paths written, the page first.

    Raises:
        ValueError: the sweep has no trials here.
    """
    results = load(out, sweep_id, links)
    sections = build(results, bill or Bill())
    folder = _folder(os.fspath(out)) / sweep_id
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    _replace(page, render(results, sections, refresh_s=refresh_s, running=running))
    wanted = [section for section in sections if papers == "all" or (papers == "few" and section.paper)]
    drawn = [figure for section in wanted for figure in section.figures]
    return [page, *(path for figure in drawn for path in figures.save(figure, folder))]


def watch(
    out: str | os.PathLike[str],
    sweep_id: str,
    *,
    every_s: float = 10.0,
    bill: Bill | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Path]:
    """Write the page again whenever the sweep's files changed; yields its path each time.

    The page reloads itself. Stop by closing the iterator (Ctrl-C at the command line).
    """
    seen: list[str] | None = None
    while True:
        try:
            results = load(out, sweep_id)
        except ValueError:
            sleep(every_s)
            continue
        state = [*results.store.files(TrialRecord, sweep_id), *results.store.files(EpochRecord, sweep_id)]
        if state != seen:
            seen = state
            count = sum(1 for _ in results.trials)
            text = f"Following a running sweep: {count} trials have ended. This page reloads every {every_s:.0f} s."
            page = write_report(
                out, sweep_id, bill=bill, refresh_s=max(1, round(every_s)), running=text, papers="none"
            )[0]
            yield page
        sleep(every_s)


def build(results: Results, bill: Bill) -> list[Section]:
    """All sections that the sweep has data for."""
    front = fronts.front_section(results) if len(results.front) else None
    found: Sequence[Section | None] = (
        fronts.decision(results),
        front,
        savings.savings_section(results),
        savings.lifetime_section(results, bill.decode_tokens, bill.price_per_kwh, bill.co2_g_per_kwh),
        fronts.seconds_section(results),
        curves.curves_section(results),
        curves.routing_section(results),
        curves.agreement_section(results),
        energy.phases_section(results),
        energy.power_section(results),
        boards.boards_section(results),
        energy.provenance_section(results, [*fronts.fine_print(results), *boards.unmeasured(results)]),
        energy.commands_section(results),
    )
    return [section for section in found if section is not None]


def render(results: Results, sections: Sequence[Section], *, refresh_s: int | None = None, running: str = "") -> str:
    """The page. Every name that comes from data is escaped; the page may load nothing (content security policy)."""
    files = importlib.resources.files("pipelines") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.tests["heat"] = lambda figure: isinstance(figure, Heat) and len(figure.columns) <= NARROW
    template = environment.from_string((files / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        sweep_id=results.sweep_id,
        headline=_headline(results),
        facts=_facts(results),
        running=running,
        refresh_s=refresh_s,
        filters=_filters(results),
        sections=sections,
        draw=lambda figure: Markup(svg.draw(figure)),
        css=Markup((files / "report.css").read_text(encoding="utf-8")),
        js=Markup((files / "report.js").read_text(encoding="utf-8")),
        version=_version(),
    )


def _headline(results: Results) -> str:
    front = results.front
    if not len(front):
        return "No front yet"
    rows = front.rows()
    loss = [row[front.objectives[1].column] for row in rows]
    joules = [row[front.objectives[0].column] for row in rows]
    if len(rows) == 1:
        return f"One configuration beats all others: loss {loss[0]:.3f} for {number(joules[0])} {joules_word(front)}"
    return (
        f"From loss {loss[0]:.3f} for {number(joules[0])} {joules_word(front)} to {loss[-1]:.3f} for "
        f"{number(joules[-1])}: {len(rows)} ways to spend them"
    )


def _facts(results: Results) -> list[str]:
    states = [row["state"] for row in results.trials]
    started = min(row["started_at"] for row in results.trials)
    found = [f"{states.count('COMPLETED')} of {len(states)} trials completed", str(results.front.context)]
    return [*found, f"began {started:%Y-%m-%d %H:%M} UTC"]


def _filters(results: Results) -> list[dict[str, Any]]:
    """Menus for the labels in which the trials differ."""
    found = []
    for name in FILTERS:
        attribute = name.replace("_", "-")
        values = {keys_of(row)[attribute]: row[name] for row in results.trials}
        if len(values) > 1:
            order = sorted(values, key=lambda key: (values[key] is None, _rank(values[key]), key))
            title = _FILTER_TITLES.get(name, title_of(name, modelled=False))
            found.append({"name": attribute, "title": title, "choices": order})
    return found


def _rank(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _folder(out: str) -> Path:
    if "://" in out and not out.startswith("file://"):
        return Path("report")
    return Path(out.removeprefix("file://")) / "report"


def _replace(path: Path, text: str) -> None:
    """A reader of the page never sees half of it."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _version() -> str:
    try:
        return importlib.metadata.version("joulemoe")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
