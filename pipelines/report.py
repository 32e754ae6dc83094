"""The report of a sweep: one HTML page that needs no network, and figures for papers."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from pipelines.pareto import Front, pareto_front
from pipelines.records import Store
from pipelines.show import axis_title, print_front


def write_report(out: str | os.PathLike[str], sweep_id: str, *, links: Mapping[str, str] | None = None) -> list[Path]:
    """Write `OUT/report/<sweep_id>/index.html` and its figures; returns their paths, the page first."""
    front = pareto_front(Store(out), sweep_id=sweep_id)
    folder = Path(out) / "report" / sweep_id
    folder.mkdir(parents=True, exist_ok=True)
    png, page = folder / "front.png", folder / "index.html"
    matplotlib.use("Agg")
    figure = _figure(front)
    figure.savefig(png, dpi=160)
    vector = io.StringIO()
    figure.savefig(vector, format="svg")
    text = io.StringIO()
    print_front(front, Console(file=text, width=120))
    svg = vector.getvalue()
    body = f"<h1>{html.escape(sweep_id)}</h1>{svg[svg.index('<svg') :]}<pre>{html.escape(text.getvalue())}</pre>"
    page.write_text(f"<!doctype html><meta charset=utf-8><title>{html.escape(sweep_id)}</title>{body}")
    return [page, png]


def _figure(front: Front) -> Figure:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    x, y = (axis.column for axis in front.objectives)
    rest = ~front.on_front_N
    axes.scatter(front.mean_NM[rest, 0], front.mean_NM[rest, 1], c="0.6", label="dominated")
    members = front.order()
    axes.step(front.mean_NM[members, 0], front.mean_NM[members, 1], "k-o", where="post", label="front")
    axes.set_xlabel(axis_title(x, modelled=front.modelled))
    axes.set_ylabel(axis_title(y, modelled=front.modelled))
    axes.legend()
    return figure
