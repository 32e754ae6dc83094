"""The MLflow UI in a browser: both pages that `joulemoe ui` links to show every trial without digging."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking import Tracker, ui_command, ui_environment
from tests.pipelines import synthetic
from tests.pipelines.browser import chromium, open_browser
from tests.pipelines.synthetic import SWEEP, trial

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PATIENCE_MS = 120_000
#: Values in every plot on the page, by plot: parallel coordinates hold one per run in each dimension.
COUNTS = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    kind: (plot.data[0].type || 'scatter').replace('scattergl', 'scatter'),
    count: plot.data[0].type === 'parcoords'
        ? Math.max(...plot.data[0].dimensions.map(d => d.values.length))
        : plot.data.reduce((sum, trace) => sum + (trace.x ? trace.x.length : 0), 0)}))"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tracker, str, int]]:
    """A sweep of 13 trials (more than the UI shows by itself), mirrored and served on a free port."""
    chromium()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    out = tmp_path_factory.mktemp("ui")
    rows = [*synthetic.sweep((2, 3, 2)), trial("dense", router="dense", top_k=None, energy_lambda=None)]
    store = synthetic.write(out, rows)
    tracker = Tracker(out)
    tracker.start_sweep(SWEEP)
    tracker.mirror(store, SWEEP)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = _serve(out, port)
    try:
        yield tracker, f"http://127.0.0.1:{port}", len(rows)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _serve(out: Path, port: int) -> subprocess.Popen[bytes]:
    with open(out / "server.log", "wb") as log:
        server = subprocess.Popen(
            ui_command(out, port=port),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=ui_environment(),
        )
    for _ in range(180):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return server
        except OSError:
            assert server.poll() is None, (out / "server.log").read_text()
            time.sleep(1)
    raise TimeoutError((out / "server.log").read_text())


@pytest.fixture(scope="module")
def tab(served: tuple[Tracker, str, int]) -> Iterator[Any]:
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1500, "height": 1200})
        page.set_default_timeout(PATIENCE_MS)
        yield page


def wait_for(tab: Any, kind: str, count: int) -> None:
    """Until a plot of this kind holds so many runs."""
    tab.wait_for_function(f"({COUNTS})().some(p => p.kind === '{kind}' && p.count === {count})", timeout=PATIENCE_MS)


def test_the_compare_link_shows_all_trials_in_both_plots(served: tuple[Tracker, str, int], tab: Any) -> None:
    tracker, base, count = served
    tab.goto(tracker.compare_url(SWEEP, base))
    tab.get_by_text(f"Comparing {count} Runs from 1 Experiment").wait_for()
    wait_for(tab, "parcoords", count)
    tab.get_by_role("tab", name="Scatter Plot").click()
    wait_for(tab, "scatter", count)


def test_the_chart_link_shows_loss_against_joules_at_once(served: tuple[Tracker, str, int], tab: Any) -> None:
    tracker, base, count = served
    tab.goto("about:blank")
    tab.goto(tracker.charts_url(SWEEP, base))
    wait_for(tab, "scatter", count)
    shown = tab.locator(".js-plotly-plot").first.text_content()
    assert "train_energy_j" in shown
    assert "eval_loss_nats" in shown
    tab.get_by_text("Parallel Coordinates").first.wait_for()
    tab.get_by_text("Showing all runs").first.wait_for()
