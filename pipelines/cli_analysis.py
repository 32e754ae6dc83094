"""Commands that read results: fronts, comparisons, reports, exports, MLflow."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.console import standard_output

if TYPE_CHECKING:
    from pipelines.pareto import Front
    from pipelines.records import Store
    from pipelines.tracking import Tracker

Out = Annotated[str, typer.Argument(help="Folder (or URI) with the results.")]
Sweep = Annotated[str | None, typer.Option(help="Sweep id; default: the newest.")]
Uri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow; default: sqlite in OUT.")]
Tokens = Annotated[float | None, typer.Option(min=0, help="Tokens decoded over the model's life.")]
Rows = Annotated[
    str | None,
    typer.Option("--table", help="trials, or points (every epoch boundary); default: points where trials are anytime."),
]


class Format(enum.StrEnum):
    """How a front is printed."""

    table = "table"
    json = "json"
    csv = "csv"


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    for command in (pareto, compare, report, export, compact, mirror, ui, schema):
        app.command()(command)


def conclude_sweep(console: Console, out: str | os.PathLike[str], sweep_id: str, tracking_uri: str | None) -> bool:
    """End a sweep: compact its tables, print its front, write its report, bring MLflow up to date, print the links.

    Returns:
        True where a front with at least one member was written.

    Raises:
        ConfigError: another driver is at work on this sweep.
    """
    from pipelines.journal import Journal

    with Journal(os.fspath(out), sweep_id).driving():
        return _conclude(console, out, sweep_id, tracking_uri)


def _conclude(console: Console, out: str | os.PathLike[str], sweep_id: str, tracking_uri: str | None) -> bool:
    from pipelines import compaction
    from pipelines.checkpoints import final_models
    from pipelines.config import StorageError
    from pipelines.journal import Journal
    from pipelines.records import Store
    from pipelines.report import write_report
    from pipelines.show import print_front
    from pipelines.tracking import Tracker, without_password

    store = Store(out)
    try:
        compaction.compact(store, sweep_id)
    except (OSError, RuntimeError) as error:
        console.print(f"The tables stay in many files ({error}).", markup=False)
    front = _own_front(store, out, sweep_id)
    print_front(front, console)
    if not len(front):
        return False
    tracker = Tracker.open(out, tracking_uri)
    links: dict[str, str] = {}
    try:
        tracker.mirror(store, sweep_id)
        links = tracker.run_urls(sweep_id)
    except Exception as error:
        said = without_password(str(error))
        console.print(f"MLflow was left out ({said}); `joulemoe mirror {out}` repairs it.", markup=False)
    try:
        paths = write_report(out, sweep_id, links=links)
    except OSError as error:
        raise StorageError(f"report: expected a folder that can be written, got {out}: {error}") from None
    tracker.start_sweep(sweep_id)
    tracker.finish_sweep(front, artifacts=paths, models=final_models(Journal(os.fspath(out), sweep_id)))
    console.print(f"Report: {paths[0]}", markup=False, soft_wrap=True)
    if links:
        console.print(f"MLflow: {tracker.server or f'joulemoe ui {out}'}", markup=False, soft_wrap=True)
        for line in _link_lines(tracker, sweep_id):
            console.print(line, markup=False, soft_wrap=True)
    return True


def pareto(
    out: Out,
    sweep: Sweep = None,
    x: Annotated[str, typer.Option(help="COLUMN, COLUMN:min or COLUMN:max.")] = "train_energy_j",
    y: Annotated[str, typer.Option(help="Second axis.")] = "eval_loss_nats",
    z: Annotated[str | None, typer.Option(help="Third axis.")] = None,
    rows: Rows = None,
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    mix: Annotated[bool, typer.Option(help="Put energy sources, GPU models and power limits together.")] = False,
    per_trial: Annotated[bool, typer.Option(help="Do not average over seeds.")] = False,
    every: Annotated[bool, typer.Option("--all", help="A front for every energy source and GPU model.")] = False,
    decode_tokens: Tokens = None,
) -> None:
    """Print the front, its hypervolume and its knee, from Parquet alone."""
    from pipelines.epoch_ends import front_table
    from pipelines.pareto import LIFETIME, pareto_front, pareto_fronts
    from pipelines.records import Store
    from pipelines.show import front_csv, print_front

    with _one_line():
        store = Store(out)
        x = LIFETIME if decode_tokens is not None and x == "train_energy_j" else x
        make = pareto_fronts if every else lambda *a, **k: [pareto_front(*a, **k)]
        axes = (x, y) if z is None else (x, y, z)
        sweep_id = _sweep(store, sweep)
        fronts = make(
            store,
            *axes,
            sweep_id=sweep_id,
            table=rows or front_table(store, sweep_id, axes),
            mix=mix,
            per_trial=per_trial,
            decode_tokens=decode_tokens,
        )
    for front in fronts:
        if form is Format.json:
            typer.echo(front.to_json())
        elif form is Format.csv:
            typer.echo(front_csv(front), nl=False)
        else:
            print_front(front, standard_output())


def compare(
    out: Out,
    baseline: Annotated[str, typer.Option(help="For example 'router=topk,top_k=2'.")],
    candidate: Annotated[str, typer.Option(help="For example 'router=energy,energy_lambda>0'.")],
    sweep: Sweep = None,
    rows: Rows = None,
    margin: Annotated[float, typer.Option(min=0, help="Losses closer than this are equal, nat per token.")] = 0.01,
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.5, help="Level of the tests.")] = 0.05,
) -> None:
    """Say how many joules a candidate saves at equal loss, with evidence or without."""
    from pipelines import compare as comparing
    from pipelines.epoch_ends import POINTS
    from pipelines.records import Store
    from pipelines.sections_savings import PAIR_HEAD, POINTS_NOTE, pair_cells, verdict

    with _one_line():
        store = Store(out)
        found = comparing.compare(
            store, baseline, candidate, sweep_id=_sweep(store, sweep), table=rows, margin=margin, alpha=alpha
        )
    console = standard_output()
    sheet = Table(title=f"{candidate}  against  {baseline}, equal within ±{margin:g} nat", title_justify="left")
    for head in PAIR_HEAD:
        sheet.add_column(head)
    order = sorted(found.pairs, key=lambda pair: pair.verdict == comparing.NO_EVIDENCE)
    for pair in order[:40]:
        sheet.add_row(*map(escape, pair_cells(pair)))
    console.print(sheet)
    loss = found.loss_at_equal_joules
    console.print(verdict(found), markup=False)
    if found.table == POINTS:
        console.print(POINTS_NOTE, markup=False)
    if loss is not None:
        span = "one seed gives no interval" if loss.low is None else f"{loss.low:+.4f} to {loss.high:+.4f}"
        console.print(f"At equal joules the loss differs by {loss.mean:+.4f} nat on average ({span}).", markup=False)
    for left in found.left_out:
        console.print(f"left out: {left.count} × {left.reason}", markup=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def report(
    out: Out,
    sweep: Sweep = None,
    watch: Annotated[bool, typer.Option(help="Follow a running sweep; stop with Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option(min=1, help="How often to look, with --watch.")] = 10.0,
    every_figure: Annotated[bool, typer.Option("--all-figures", help="Every figure as PNG and SVG.")] = False,
    decode_tokens: Tokens = None,
    price_per_kwh: Annotated[float | None, typer.Option(min=0, help="Price of a kWh, any currency.")] = None,
    co2_per_kwh: Annotated[float | None, typer.Option(min=0, help="Grams of CO2 per kWh.")] = None,
    tracking_uri: Uri = None,
) -> None:
    """Write the report of a sweep: one HTML page and figures."""
    from pipelines.records import Store
    from pipelines.report import Bill, write_report
    from pipelines.report import watch as follow
    from pipelines.tracking import Tracker

    bill = Bill(decode_tokens=decode_tokens, price_per_kwh=price_per_kwh, co2_g_per_kwh=co2_per_kwh)
    with _one_line():
        sweep_id = _sweep(Store(out), sweep)
        if watch:
            try:
                for page in follow(out, sweep_id, every_s=every_s, bill=bill):
                    typer.echo(f"{page} written; it reloads itself")
            except KeyboardInterrupt:
                return
        links, lines = _links(out, sweep_id, tracking_uri)
        paths = write_report(out, sweep_id, links=links, bill=bill, papers="all" if every_figure else "few")
        if links:
            Tracker.open(out, tracking_uri).attach(sweep_id, paths)
        for path in paths:
            typer.echo(str(path))
    for line in lines:
        typer.echo(line)


def export(
    out: Out,
    sweep: Sweep = None,
    csv: Annotated[bool, typer.Option("--csv", help="CSV (the only format so far).")] = True,
    to: Annotated[Path | None, typer.Option(help="Folder for the files; default: OUT/export/SWEEP.")] = None,
) -> None:
    """Write the tables of a sweep as CSV; lists become JSON."""
    from pipelines.export import export_csv
    from pipelines.records import Store

    with _one_line():
        if not csv:
            raise ValueError("format: expected --csv, got --no-csv")
        store = Store(out)
        sweep_id = _sweep(store, sweep)
        for path in export_csv(store, sweep_id, to or Path(out) / "export" / sweep_id):
            typer.echo(str(path))


def compact(out: Out, sweep: Sweep = None) -> None:
    """Put each table of a sweep into one file, read it back, then delete the parts."""
    from pipelines import compaction
    from pipelines.journal import Journal
    from pipelines.records import Store

    with _one_line():
        store = Store(out)
        sweep_id = _sweep(store, sweep)
        with Journal(out, sweep_id).driving():
            for done in compaction.compact(store, sweep_id):
                typer.echo(f"{done.table}: {done.parts} files into one, {done.rows} rows")


def mirror(out: Out, sweep: Sweep = None, tracking_uri: Uri = None) -> None:
    """Bring the Parquet rows into MLflow once more."""
    from pipelines.records import Store
    from pipelines.tracking import Tracker, without_password

    with _one_line():
        store = Store(out)
        sweep_id = _sweep(store, sweep)
        tracker = Tracker.open(out, tracking_uri)
        count = tracker.mirror(store, sweep_id)
        folder = Path(out) / "report" / sweep_id
        tracker.start_sweep(sweep_id)
        front = _own_front(store, out, sweep_id)
        tracker.finish_sweep(front, artifacts=sorted(folder.glob("*")))
    typer.echo(f"{count} attempts mirrored to {without_password(tracker.uri)}")


def ui(
    out: Out, sweep: Sweep = None, port: Annotated[int, typer.Option(min=1)] = 5000, tracking_uri: Uri = None
) -> None:
    """Serve the MLflow UI on 127.0.0.1 and print the link that compares the sweep's trials.

    A tracking server has a UI of its own: then only the links to it are printed.
    """
    from pipelines.records import Store
    from pipelines.tracking import Tracker, ui_command, ui_environment

    with _one_line():
        tracker = Tracker.open(out, tracking_uri)
        lines = _link_lines(tracker, _sweep(Store(out), sweep), tracker.server or f"http://127.0.0.1:{port}")
    for line in lines:
        typer.echo(line)
    if tracker.server is not None:
        return
    command = ui_command(out, port=port, tracking_uri=tracking_uri)
    sys.stdout.flush()
    os.execve(command[0], command, ui_environment())


def schema(
    write: Annotated[Path | None, typer.Option(help="Replace the tables of this document, below its head.")] = None,
) -> None:
    """Print what every column of every table means."""
    from pipelines.records import schema_markdown

    if write is None:
        typer.echo(schema_markdown())
        return
    head = write.read_text(encoding="utf-8").split("## `", maxsplit=1)[0]
    write.write_text(head + schema_markdown(), encoding="utf-8")


def _own_front(store: Store, out: str | os.PathLike[str], sweep_id: str) -> Front:
    """The front of a sweep by the objectives and directions that it searched by."""
    from pipelines.epoch_ends import front_table
    from pipelines.pareto import pareto_front
    from pipelines.plan import objectives_of

    axes = objectives_of(out, sweep_id)
    return pareto_front(store, *axes, sweep_id=sweep_id, table=front_table(store, sweep_id, axes))


def _link_lines(tracker: Tracker, sweep_id: str, base: str | None = None) -> list[str]:
    """The two pages of the MLflow UI that show all trials at once."""
    return [
        f"Loss against joules, parallel coordinates: {tracker.charts_url(sweep_id, base)}",
        f"Compare the trials: {tracker.compare_url(sweep_id, base)}",
    ]


def _links(out: str, sweep_id: str, tracking_uri: str | None) -> tuple[dict[str, str], list[str]]:
    """Addresses of the trials' runs and of the pages that compare them; empty where MLflow does not answer."""
    from pipelines.tracking import Tracker

    try:
        tracker = Tracker.open(out, tracking_uri)
        links = tracker.run_urls(sweep_id)
        return links, _link_lines(tracker, sweep_id) if links else []
    except Exception:
        return {}, []


@contextmanager
def _one_line() -> Iterator[None]:
    """A user's mistake ends in one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"joulemoe: {error}", err=True)
        raise typer.Exit(2) from None


def _sweep(store: Store, sweep: str | None) -> str:
    """The sweep asked for, or the newest."""
    known = store.sweep_ids()
    if not known:
        raise ValueError(f"{store.root}: expected the results of a sweep, got none")
    if sweep is not None and sweep not in known:
        raise ValueError(f"sweep: expected one of {', '.join(known)}, got {sweep!r}")
    return sweep or known[-1]
