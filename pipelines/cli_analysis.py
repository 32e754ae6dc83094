"""Commands that read results: fronts, comparisons, reports, MLflow."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

Out = Annotated[str, typer.Argument(help="Folder (or URI) with the results.")]
Sweep = Annotated[str | None, typer.Option(help="Sweep id; default: the newest.")]
Uri = Annotated[str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow; default: sqlite in OUT.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    for command in (pareto, report, mirror, ui):
        app.command()(command)


def conclude_sweep(console: Console, out: str | os.PathLike[str], sweep_id: str, tracking_uri: str | None) -> bool:
    """End a sweep: print its front, write its report, bring MLflow up to date, print the links.

    Returns:
        True where a front with at least one member was written.
    """
    from pipelines.pareto import pareto_front
    from pipelines.records import Store
    from pipelines.report import write_report
    from pipelines.show import print_front
    from pipelines.tracking import Tracker

    store = Store(out)
    front = pareto_front(store, sweep_id=sweep_id)
    print_front(front, console)
    if not len(front):
        return False
    tracker = Tracker.open(out, tracking_uri)
    links: dict[str, str] = {}
    try:
        tracker.mirror(store, sweep_id)
        links = tracker.run_urls(sweep_id)
    except Exception as error:
        console.print(f"MLflow was left out ({error}); `joulemoe mirror {out}` repairs it.", markup=False)
    paths = write_report(out, sweep_id, links=links)
    tracker.start_sweep(sweep_id)
    tracker.finish_sweep(front, artifacts=paths)
    console.print(f"report: {paths[0]}", markup=False, soft_wrap=True)
    if links:
        console.print(f"MLflow: joulemoe ui {out}", markup=False, soft_wrap=True)
        console.print(f"compare the trials there: {tracker.compare_url(sweep_id)}", markup=False, soft_wrap=True)
    return True


def pareto(out: Out, sweep: Sweep = None, x: str = "train_energy_j", y: str = "eval_loss_nats") -> None:
    """Print the front, its hypervolume and its knee, from Parquet alone."""
    from pipelines.pareto import pareto_front
    from pipelines.records import Store
    from pipelines.show import print_front

    store = Store(out)
    print_front(pareto_front(store, x, y, sweep_id=_sweep(store, sweep)))


def report(out: Out, sweep: Sweep = None) -> None:
    """Write the report of a sweep: one HTML page and figures."""
    from pipelines.records import Store
    from pipelines.report import write_report

    for path in write_report(out, _sweep(Store(out), sweep)):
        typer.echo(str(path))


def mirror(out: Out, sweep: Sweep = None, tracking_uri: Uri = None) -> None:
    """Bring the Parquet rows into MLflow once more."""
    from pipelines.records import Store
    from pipelines.tracking import Tracker

    store = Store(out)
    sweep_id = _sweep(store, sweep)
    tracker = Tracker.open(out, tracking_uri)
    typer.echo(f"{tracker.mirror(store, sweep_id)} attempts mirrored to {tracker.uri}")


def ui(out: Out, sweep: Sweep = None, port: int = 5000, tracking_uri: Uri = None) -> None:
    """Serve the MLflow UI on 127.0.0.1 and print the link that compares the sweep's trials."""
    from pipelines.records import Store
    from pipelines.tracking import Tracker, ui_command

    link = Tracker.open(out, tracking_uri).compare_url(_sweep(Store(out), sweep), f"http://127.0.0.1:{port}")
    typer.echo(f"compare the trials: {link}")
    command = ui_command(out, port=port, tracking_uri=tracking_uri)
    os.execv(command[0], command)


def _sweep(store: object, sweep: str | None) -> str:
    """The sweep asked for, or the newest."""
    from pipelines.records import Store

    assert isinstance(store, Store)
    known = store.sweep_ids()
    if not known:
        raise typer.BadParameter(f"{store.root}: expected the results of a sweep, got none")
    if sweep is not None and sweep not in known:
        raise typer.BadParameter(f"sweep: expected one of {', '.join(known)}, got {sweep!r}")
    return sweep or known[-1]
